"""ICDAR2019-LSVT with weak labels: `train_weak_labels.json`, image stem -> list of {transcription}. Unlabelled images with
a keyword, never images without text."""

from __future__ import annotations

from collections.abc import Iterator

from i3cl.data.importers import art, parse
from i3cl.data.importers.base import Folder, Importer, Item, LabelledImage, clean, one_file, own_entries, whole_set
from i3cl.data.importers.lsvt import images_of
from i3cl.errors import UserError

_LAYOUT = "train_weak_labels.json and train_weak_images_<k>/gt_<n>.jpg"


def items(folder: Folder, split: str) -> Iterator[Item]:
    """Every image of the label file and of the folders train_weak_images*."""
    if split != "train":
        raise UserError("lsvt_weak: has a train split only; import lsvt_test for the test images")
    name = one_file(folder, "train_weak_labels.json", _LAYOUT)
    return whole_set(folder, name, images_of(folder, "train_weak_images"), art.read_object(folder, name), _LAYOUT)


def read(folder: Folder, item: Item) -> LabelledImage:
    """An unlabelled image; without an entry in the label file it has no keyword."""
    if item.label is None:
        return LabelledImage(item.file_name, None)
    entries, where = own_entries(folder, item.label)
    texts = [
        parse.a_text(parse.an_object(e, f"{where}: entry {i}"), "transcription", f"{where}: entry {i}")
        for i, e in enumerate(entries, 1)
    ]
    return LabelledImage(item.file_name, None, tuple(clean(text) or "" for text in texts))


LSVT_WEAK = Importer(items, read, labelled=False)

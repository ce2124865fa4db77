"""ICDAR2019-LSVT in its three parts: full labels, weak labels, and the unlabelled test images.

- `train_full_labels.json`: as ArT's labels, without language;
- `train_weak_labels.json`: image stem -> list of {transcription}; such an image is unlabelled and has keywords, it is never an
  image without text.
"""

from __future__ import annotations

from collections.abc import Iterator

from i3cl.data.importers import art, parse
from i3cl.data.importers.base import (
    IMAGE_ENDINGS,
    Folder,
    Importer,
    Item,
    LabelledImage,
    clean,
    files,
    one_file,
    own_entries,
    unlabelled,
    whole_set,
)
from i3cl.errors import UserError

_FULL_LAYOUT = "train_full_labels.json and train_full_images_0/gt_<n>.jpg, train_full_images_1/..."
_WEAK_LAYOUT = "train_weak_labels.json and train_weak_images_<k>/gt_<n>.jpg"


def full_items(folder: Folder, split: str) -> Iterator[Item]:
    """Every image of the full label file and of the folders train_full_images*."""
    if split != "train":
        raise UserError("lsvt: the test set has no labels; import lsvt_test")
    name = one_file(folder, "train_full_labels.json", _FULL_LAYOUT)
    return whole_set(folder, name, _images_of(folder, "train_full_images"), art.read_object(folder, name), _FULL_LAYOUT)


def weak_items(folder: Folder, split: str) -> Iterator[Item]:
    """Every image of the weak label file and of the folders train_weak_images*."""
    if split != "train":
        raise UserError("lsvt_weak: has a train split only; import lsvt_test for the test images")
    name = one_file(folder, "train_weak_labels.json", _WEAK_LAYOUT)
    return whole_set(folder, name, _images_of(folder, "train_weak_images"), art.read_object(folder, name), _WEAK_LAYOUT)


def test_items(folder: Folder, split: str) -> list[Item]:
    """Every image that is not below a train folder, whichever split is asked for."""
    found = [Item(name, None) for name in files(folder, "test", IMAGE_ENDINGS)]
    if not found:
        raise UserError(f"{folder.root}: no test images; expected test_part1_images/gt_<n>.jpg, test_part2_images/...")
    return found


def read_weak(folder: Folder, item: Item) -> LabelledImage:
    """An unlabelled image; without an entry in the label file it has no keyword."""
    if item.label is None:
        return unlabelled(folder, item)
    entries, where = own_entries(folder, item.label)
    texts = [
        parse.a_text(parse.an_object(e, f"{where}: entry {i}"), "transcription", f"{where}: entry {i}")
        for i, e in enumerate(entries, 1)
    ]
    return LabelledImage(item.file_name, None, tuple(clean(text) or "" for text in texts))


def _images_of(folder: Folder, beginning: str) -> list[str]:
    """The images in folders whose names begin with `beginning`; where there is no such folder, all images of the train split.

    Images of the full and of the weak part have the same names: only the folder tells which is which.
    """
    images = files(folder, "train", IMAGE_ENDINGS)
    wanted = [n for n in images if any(part.startswith(beginning) for part in n.split("/")[:-1])]
    others = ("train_full_images", "train_weak_images")
    return wanted or [n for n in images if not any(part.startswith(others) for part in n.split("/")[:-1])]


LSVT = Importer(full_items, art.read)
LSVT_WEAK = Importer(weak_items, read_weak, labelled=False)
LSVT_TEST = Importer(test_items, unlabelled, labelled=False)

"""ICDAR2019-LSVT with full labels: `train_full_labels.json`, as ArT's but without language."""

from __future__ import annotations

from collections.abc import Iterator

from i3cl.data.importers import art
from i3cl.data.importers.base import IMAGE_ENDINGS, Folder, Importer, Item, files, one_file, whole_set
from i3cl.errors import UserError

_LAYOUT = "train_full_labels.json and train_full_images_0/gt_<n>.jpg, train_full_images_1/..."


def items(folder: Folder, split: str) -> Iterator[Item]:
    """Every image of the label file and of the folders train_full_images*."""
    if split != "train":
        raise UserError("lsvt: the test set has no labels; import lsvt_test")
    name = one_file(folder, "train_full_labels.json", _LAYOUT)
    return whole_set(folder, name, images_of(folder, "train_full_images"), art.read_object(folder, name), _LAYOUT)


def images_of(folder: Folder, beginning: str) -> list[str]:
    """The images below folders that begin so; all of the train split where no folder does.

    The weak set's images have the same names: which is which only the folder tells.
    """
    images = files(folder, "train", IMAGE_ENDINGS)
    wanted = [n for n in images if any(part.startswith(beginning) for part in n.split("/")[:-1])]
    others = ("train_full_images", "train_weak_images")
    return wanted or [n for n in images if not any(part.startswith(others) for part in n.split("/")[:-1])]


LSVT = Importer(items, art.read)

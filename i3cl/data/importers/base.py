"""What the importers share: what an importer is, the folder that it reads, and how labels find their images.

A new importer is a file with two functions and an ``Importer`` of them, and one line in registry.py:

    def items(folder: Folder, split: str) -> list[Item]:          # which images there are, and where each one's label is
        return paired(folder, split, (".txt",), stem, "image_<n>.jpg and image_<n>.txt")

    def read(folder: Folder, item: Item) -> LabelledImage:        # one image's label
        return line_by_line(folder, item, read_line)

`paired` fits a label file per image, `whole_set` one label file for all. Points are handed over as the file has them:
import_set.py repairs and counts.
"""

from __future__ import annotations

import json
import os
import posixpath
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from i3cl import storage
from i3cl.data.formats.checks import is_companion
from i3cl.data.formats.rings import degenerate
from i3cl.data.importers import parse
from i3cl.data.loading.endings import IMAGE_ENDINGS
from i3cl.errors import UserError

LABEL_ENDINGS = (".txt", ".json", ".xml", ".mat", ".csv")
"""Files with these endings are labels or read-me files, so an import does not list them as left out."""
MAX_LABEL_BYTES = 16 << 20
"""Largest label file of one image, in bytes."""
MAX_SET_BYTES = 2 << 30
"""Largest label file of a whole set, in bytes; the largest published one (LSVT) is under 0.2 GB."""


@dataclass(frozen=True, eq=False, slots=True)
class LabelledInstance:
    """One instance as its file has it."""

    polygon: NDArray[np.float32]
    """(N, 2) float32 x, y pixels, raw: may leave the image, repeat vertices, cross itself; N < 3 or no area when degenerate."""
    ignore: bool = False
    """Don't care; a degenerate polygon is always one."""
    text: str | None = None
    """Transcription; the data set's own mark where the region is don't-care."""
    language: str | None = None
    """Language or script as the data set names it."""


@dataclass(frozen=True, eq=False, slots=True)
class LabelledImage:
    """One image and what its data set says about it."""

    file_name: str
    """Relative to the source; `<key>.jpg` where the source has labels but no such image."""
    instances: tuple[LabelledInstance, ...] | None
    """None: unlabelled, which is not the same as an image without text."""
    keywords: tuple[str, ...] = ()
    """Texts known to be somewhere in an unlabelled image (weak labels)."""


@dataclass(frozen=True, slots=True)
class Item:
    """An image still to be read: small, so that the list of a whole set fits in memory and can be sent to other machines."""

    file_name: str
    """As ``LabelledImage.file_name``."""
    label: str | None
    """What the importer's `read` needs: the label file's name in the source, or this image's labels as json. None: no label."""


@dataclass(frozen=True)
class Importer:
    """How one public data set is read."""

    items: Callable[[Folder, str], Iterable[Item]]
    """All images of a split ('train', 'test'), in a fixed order; opens a file only when it holds the labels of the whole set."""
    read: Callable[[Folder, Item], LabelledImage]
    """One image's labels. UserError that names file, line or key, and reason."""
    labelled: bool = True
    """False: the set has no polygons, and its images stay unlabelled."""


class Folder:
    """A source folder, local or s3://, listed once. Links inside a local folder are followed: its owner made them."""

    def __init__(self, root: str) -> None:
        self.root = storage.absolute(root)
        self._names: list[str] | None = None

    def path(self, name: str) -> str:
        """Path or URL of a file in the folder."""
        return storage.join(self.root, name)

    @property
    def names(self) -> list[str]:
        """Sorted names, relative to the folder, of all files at any depth, without hidden ones. UserError when there is none."""
        if self._names is None:
            found = storage.list_files(self.root) if storage.is_remote(self.root) else _walk(self.path(""))
            self._names = sorted(n for n in found if not is_companion(n))
        if not self._names and storage.is_file(self.root):
            raise UserError(f"{self.root}: is a file and none of .zip, .tar, .tar.gz and .tgz; unpack it and give the folder")
        if not self._names:
            raise UserError(f"{self.root}: no such folder, or nothing in it; give the folder of the download")
        return self._names

    @property
    def listed(self) -> bool:
        """Whether the folder has been listed: an importer that knows all names from its label file never does it."""
        return self._names is not None

    def read(self, name: str, limit: int = MAX_LABEL_BYTES) -> bytes:
        """A file's bytes. UserError when it is missing or larger than `limit`."""
        with storage.open_read(self.path(name)) as file:
            data = file.read(limit + 1)
        if len(data) > limit:
            raise UserError(f"{self.path(name)}: more than {limit >> 20} MiB; is this a label file?")
        return bytes(data)


def _walk(root: str) -> Iterator[str]:
    seen: set[tuple[int, int]] = set()
    for folder, below, names in os.walk(root, followlinks=True):
        stat = os.stat(folder)
        if (stat.st_dev, stat.st_ino) in seen:
            below.clear()  # a link that leads back up
            continue
        seen.add((stat.st_dev, stat.st_ino))
        yield from (os.path.relpath(os.path.join(folder, name), root).replace(os.sep, "/") for name in names)


# ------------------------------------------------------------------------------------------------- finding files


def files(folder: Folder, split: str, endings: Sequence[str]) -> list[str]:
    """Sorted names of the split's files with one of the endings (lower case; names are compared in lower case).

    A folder whose name has a word that begins with 'train' or 'test' holds that split; a file in neither belongs to both.
    """
    return [n for n in folder.names if n.lower().endswith(tuple(endings)) and _split_of(n) in (None, split)]


def _split_of(name: str) -> str | None:
    words = re.findall(r"[a-z]+", posixpath.dirname(name).lower())
    # The innermost folder decides: a download named after the train split may hold the test set, and the other way round.
    return next((s for word in reversed(words) for s in ("train", "test") if word.startswith(s)), None)


def stem(name: str) -> str:
    """File name without folders and ending."""
    return posixpath.splitext(posixpath.basename(name))[0]


def by_key(names: Iterable[str], key: Callable[[str], str], folder: Folder) -> dict[str, str]:
    """Key -> name. UserError when two names have the same key, since it would not be clear which one is meant."""
    found: dict[str, str] = {}
    for name in names:
        other = found.setdefault(key(name), name)
        if other != name:
            raise UserError(
                f"{folder.root}: {other} and {name} stand for the same image; give --source a folder with one of them"
            )
    return found


def paired(folder: Folder, split: str, label_endings: Sequence[str], key: Callable[[str], str], layout: str) -> list[Item]:
    """Images with their label files, matched by `key` of the names, ordered by file name.

    Labels without an image (in a folder where others have one) and images without labels are in the list too: the caller
    decides about them. UserError when there is no label file.
    """
    images = by_key(files(folder, split, IMAGE_ENDINGS), key, folder)
    labels = by_key(files(folder, split, label_endings), key, folder)
    return join_pairs(folder, split, images, labels, layout)


def join_pairs(folder: Folder, split: str, images: dict[str, str], labels: dict[str, str], layout: str) -> list[Item]:
    """As ``paired``, for names that already have keys; a key is the image's usual name without its ending."""
    if not labels:
        raise UserError(f"{folder.root}: no label files of the {split} split; expected {layout}")
    # A folder without any matched label holds read-me files. Labels without any image at all are fine.
    holding = {posixpath.dirname(name) for key, name in labels.items() if key in images}
    if holding:
        labels = {key: name for key, name in labels.items() if posixpath.dirname(name) in holding}
    return sorted(
        (Item(images.get(key, f"{key}.jpg"), labels.get(key)) for key in {*images, *labels}),
        key=lambda item: item.file_name,
    )


def whole_set(folder: Folder, label_name: str, images: Sequence[str], entries: dict[str, object], layout: str) -> Iterator[Item]:
    """Items of a set whose labels are one object, image stem -> labels, ordered by file name.

    label_name: the label file; entries: its object. Images that the object does not name get the label None; the label of the
    others is what ``own_entries`` reads.
    """
    by_stem = by_key(images, stem, folder)
    for key in entries:
        if key not in by_stem and not re.fullmatch(r"[\w-]{1,200}", key):
            raise UserError(f"{folder.path(label_name)}: key {key[:80]!r} is not an image's name; expected {layout}")
    names = {key: by_stem.get(key, f"{key}.jpg") for key in {*by_stem, *entries}}
    for key in sorted(names, key=lambda key: names[key]):
        label = json.dumps([label_name, key, entries[key]], ensure_ascii=True) if key in entries else None
        yield Item(names[key], label)


def own_entries(folder: Folder, label: str) -> tuple[list[Any], str]:
    """An image's own list in the object of ``whole_set``, and its place (file and key) for messages."""
    name, key, entries = parse.parse_json(label, folder.root)
    where = f"{folder.path(name)}: key {key}"
    return parse.a_list(entries, where), where


def one_file(folder: Folder, basename: str, layout: str) -> str:
    """The name of the only file called `basename`, at any depth. UserError when there is none, or several."""
    found = [name for name in folder.names if posixpath.basename(name) == basename]
    if len(found) != 1:
        what = f"{len(found)} files called" if found else "no"
        raise UserError(f"{folder.root}: {what} {basename}; expected {layout}")
    return found[0]


# ------------------------------------------------------------------------------------------------------ instances


def instance(
    polygon: NDArray[np.float32], ignore: bool = False, text: str | None = None, language: str | None = None
) -> LabelledInstance:
    """An instance of checked points; a degenerate polygon becomes an ignore region."""
    return LabelledInstance(polygon, ignore or degenerate(polygon), clean(text), clean(language))


def dont_care(text: str | None) -> bool:
    """Whether a transcription is the mark `###`, ignoring blanks around it and one pair of double quotes."""
    if text is None:
        return False
    text = text.strip()
    return text in ("###", '"###"')


def clean(text: str | None) -> str | None:
    """The text without lone surrogates: they are valid json but not Unicode text, and no table can hold them."""
    return text.encode("utf-8", "replace").decode() if text else text


def line_by_line(folder: Folder, item: Item, read: Callable[[str, str], LabelledInstance]) -> LabelledImage:
    """An image whose label file has one instance per line; read(line, place) makes the instance."""
    name = required_label(folder, item)
    rows = parse.lines(folder.read(name), folder.path(name))
    return LabelledImage(item.file_name, tuple(read(line, where) for where, line in rows))


def unlabelled(folder: Folder, item: Item) -> LabelledImage:
    """An unlabelled image: the `read` of a set without labels."""
    return LabelledImage(item.file_name, None)


def required_label(folder: Folder, item: Item) -> str:
    """The item's label. UserError when there is none: in a labelled set every image needs one."""
    if item.label is None:
        raise UserError(f"{folder.path(item.file_name)}: no labels for this image; add them or remove the image")
    return item.label

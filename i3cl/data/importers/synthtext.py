"""SynthText: `gt.mat` with `imnames`, `wordBB` and `txt`, 1 x N cells each, read side by side as a stream.

A wordBB is 2 x 4 x W (x and y, corners clockwise from the top left, words), 2 x 4 when there is one word. A txt is an array of
strings with one or more words each, separated by blanks or line ends; together they have W words.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from i3cl import storage
from i3cl.data.importers import parse
from i3cl.data.importers.base import Folder, Importer, Item, LabelledImage, clean, instance, required_label
from i3cl.data.importers.matlab import MatFile
from i3cl.errors import UserError

_LAYOUT = "gt.mat and <folder>/<image>.jpg beside it"


def items(folder: Folder, split: str) -> Iterator[Item]:
    """Every image in the order of gt.mat, which is read once from front to back.

    gt.mat lies in the source or, as in the official archive, in a folder there. Deeper ones are not listed.
    """
    if split != "train":
        raise UserError("synthtext: has a train split only")
    path, below = folder.path("gt.mat"), ""
    if not storage.is_file(path):
        inner = [name for name in storage.list_dir(folder.root) if storage.is_file(folder.path(f"{name}/gt.mat"))]
        if len(inner) != 1:
            raise UserError(f"{path}: no such file{' but several in its folders' if inner else ''}; expected {_LAYOUT}")
        path, below = folder.path(f"{inner[0]}/gt.mat"), f"{inner[0]}/"
    file = MatFile(lambda: storage.open_read(path), path)
    counts = {name: file.count(name) for name in ("imnames", "wordBB", "txt")}
    if len(set(counts.values())) != 1:
        raise UserError(f"{path}: imnames, wordBB and txt differ in length ({counts})")
    names, boxes, texts = (file.cells(name) for name in counts)
    for number, (name, box, text) in enumerate(zip(names, boxes, texts), 1):
        where = f"{path}: image {number}"
        yield Item(below + _file_name(name, where), _label(box, text))


def read(folder: Folder, item: Item) -> LabelledImage:
    """Every word of an image; a word is an ignore region only when its box is degenerate."""
    where = f"{folder.root}: gt.mat: {item.file_name}"
    content = parse.an_object(parse.parse_json(required_label(folder, item), where), where)
    boxes, words = content["boxes"], content["words"]
    if boxes is None:
        raise UserError(f"{where}: wordBB is not an array of 2 x 4 x words")
    if len(boxes) != len(words):
        raise UserError(f"{where}: {len(boxes)} boxes but {len(words)} words")
    found = [instance(parse.points(box, f"{where}: word {i}"), text=word) for i, (box, word) in enumerate(zip(boxes, words), 1)]
    return LabelledImage(item.file_name, tuple(found))


def _label(box: NDArray[Any], text: NDArray[Any]) -> str:
    """Both cells as json, unchecked: one broken image must not end the stream."""
    if text.dtype == object:
        text = np.array([row for cell in text.ravel() for row in (cell if cell.dtype.kind == "U" else [])], np.str_)
    words = [clean(word) for row in text for word in str(row).split()] if text.dtype.kind == "U" else []
    if box.dtype.kind not in "iuf" or (box.size and box.shape[:2] != (2, 4)):
        return json.dumps({"boxes": None, "words": words})
    # (x|y, corner, word) -> one row x0, y0, ..., x3, y3 per word.
    with np.errstate(over="ignore"):  # numbers too large for float32 become infinite, which read() refuses
        flat = box.astype(np.float32).reshape(2, 4, -1).transpose(2, 1, 0).reshape(-1, 8)
    return json.dumps({"boxes": flat.tolist(), "words": words})


def _file_name(cell: NDArray[Any], where: str) -> str:
    if cell.dtype == object and cell.size == 1:
        cell = cell.ravel()[0]
    name = str(cell[0]) if cell.dtype.kind == "U" and cell.size == 1 else ""
    parts = name.split("/")
    if not name.strip() or ".." in parts or "" in parts or "\\" in name or ":" in name or not name.isprintable():
        raise UserError(f"{where}: imnames has {parse.shown(name)}; expected <folder>/<image>.jpg")
    return name


SYNTHTEXT = Importer(items, read)

"""Total-Text in all its label forms, which are told apart by ending and content.

- `.mat`: `polygt`, one row per instance: 'x:', x vector, 'y:', y vector, text, orientation; or, in the rectangular files,
  xmin, ymin, xmax, ymax, width, height, text, orientation;
- legacy text: records that begin with `x:` and may wrap over lines;
- copies for evaluation scripts: `x1,y1,...,xn,yn,TEXT` or `x1,y1,...,xn,yn,####TEXT`.
"""

from __future__ import annotations

import io
import re
from typing import Any

import numpy as np
from numpy.typing import NDArray

from i3cl.data.importers import parse
from i3cl.data.importers.base import (
    IMAGE_ENDINGS,
    Folder,
    Importer,
    Item,
    LabelledImage,
    LabelledInstance,
    by_key,
    dont_care,
    files,
    instance,
    join_pairs,
    required_label,
    stem,
)
from i3cl.data.importers.matlab import MatFile
from i3cl.errors import UserError

_LAYOUT = "img<n>.jpg and poly_gt_img<n>.mat or .txt, e.g. Images/Train/img1.jpg, Groundtruth/Polygon/Train/poly_gt_img1.mat"
_MARK = ",####"


def items(folder: Folder, split: str) -> list[Item]:
    """Images and label files matched by the number in their names.

    Where an image has several label files, polygons come before rectangles and .mat before .txt.
    """
    images = by_key(files(folder, split, IMAGE_ENDINGS), _number, folder)
    ranked: dict[tuple[bool, bool], list[str]] = {}
    for name in files(folder, split, (".mat", ".txt")):
        ranked.setdefault(("rect" in name.lower(), name.lower().endswith(".txt")), []).append(name)
    labels: dict[str, str] = {}
    for rank in sorted(ranked, reverse=True):
        labels |= by_key(ranked[rank], _number, folder)
    return join_pairs(folder, split, images, labels, _LAYOUT)


def _number(name: str) -> str:
    found = re.search(r"[0-9]+$", stem(name))
    return f"img{found[0].lstrip('0')}" if found else stem(name)


def read(folder: Folder, item: Item) -> LabelledImage:
    """Ignore regions are instances marked `#` (text or orientation) or `###`, and rows with fewer than three vertices."""
    name = required_label(folder, item)
    where, data = folder.path(name), folder.read(name)
    if name.lower().endswith(".mat"):
        found = _read_mat(data, where)
    elif data.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"x:"):
        found = _read_legacy(parse.decode(data, where), where)
    else:
        found = [_read_line(line, place) for place, line in parse.lines(data, where)]
    return LabelledImage(item.file_name, tuple(found))


def _make(polygon: NDArray[np.float32], text: str, orientation: str = "") -> LabelledInstance:
    return instance(polygon, text.strip() == "#" or orientation.strip() == "#" or dont_care(text), text)


# ------------------------------------------------------------------------------------------------------------ .mat


def _read_mat(data: bytes, where: str) -> list[LabelledInstance]:
    cells = MatFile(lambda: io.BytesIO(data), where).read("polygt", "rectgt")
    if cells.size == 0:
        return []
    if cells.dtype != object or cells.ndim != 2 or cells.shape[1] not in (6, 8):
        raise UserError(f"{where}: polygt is an array of {cells.shape}; expected rows of 6 cells (8 in rectangular files)")
    return [_read_row(list(row), f"{where}: polygt row {i}") for i, row in enumerate(cells, 1)]


def _read_row(row: list[Any], where: str) -> LabelledInstance:
    text, orientation = _string(row[-2], where), _string(row[-1], where)
    if len(row) == 8:
        low_x, low_y, high_x, high_y = (_vector(cell, where)[:1] for cell in row[:4])
        flat = [*low_x, *low_y, *high_x, *low_y, *high_x, *high_y, *low_x, *high_y]
        return _make(parse.points(flat, where), text, orientation)
    return _make(_zipped(_vector(row[1], where), _vector(row[3], where), where), text, orientation)


def _zipped(x: list[Any], y: list[Any], where: str) -> NDArray[np.float32]:
    if len(x) != len(y):
        raise UserError(f"{where}: {len(x)} x but {len(y)} y coordinates")
    return parse.points([v for pair in zip(x, y) for v in pair], where, minimum=1)


def _vector(cell: Any, where: str) -> list[float]:
    if cell.dtype.kind not in "iuf":
        raise UserError(f"{where}: coordinates are not numbers")
    return [float(v) for v in cell.ravel(order="F")[: parse.MAX_POINTS + 1]]


def _string(cell: Any, where: str) -> str:
    if cell.size == 0:
        return ""
    if cell.dtype.kind != "U":
        raise UserError(f"{where}: transcription and orientation must be text")
    return " ".join(str(part) for part in cell)


# ----------------------------------------------------------------------------------------------------- legacy text

_ESCAPE = re.compile(r"\\(?:x([0-9a-fA-F]{2})|u([0-9a-fA-F]{4})|U([0-9a-fA-F]{8})|(.))", re.DOTALL)
_PLAIN_ESCAPES = {"n": "\n", "t": "\t", "r": "\r"}


def _read_legacy(text: str, where: str) -> list[LabelledInstance]:
    """A record begins with a line that begins with `x:` and ends before the next such line."""
    found = []
    record: list[str] = []
    first = 1
    for number, line in enumerate([*text.split("\n"), "x:"], 1):
        line = line.removesuffix("\r")
        if line.lstrip().startswith("x:") and record:
            found.append(_Record(" ".join(record), f"{where}: line {first}").instance())
            record = []
        if line.strip():
            first = first if record else number
            record.append(line)
    return found


class _Record:
    """A cursor over one record: `x: [[..]], y: [[..]], ornt: [u'c'], transcriptions: [u'TEXT']`."""

    def __init__(self, text: str, where: str) -> None:
        self.text, self.where, self.at = text, where, 0

    def instance(self) -> LabelledInstance:
        x = self.numbers("x:")
        y = self.numbers("y:")
        orientation = self.strings("ornt:")
        text = self.strings("transcriptions:")
        self.blanks()
        if self.at < len(self.text):
            self.fail("more than transcriptions at its end")
        return _make(_zipped(x, y, self.where), text, orientation)

    def fail(self, problem: str) -> None:
        raise UserError(f"{self.where}: {problem}; expected x: [[..]], y: [[..]], ornt: [u'c'], transcriptions: [u'TEXT']")

    def blanks(self) -> None:
        while self.at < len(self.text) and self.text[self.at] in " \t,":
            self.at += 1

    def take(self, literal: str) -> None:
        self.blanks()
        if not self.text.startswith(literal, self.at):
            self.fail(f"no {literal} at column {self.at + 1}")
        self.at += len(literal)

    def numbers(self, key: str) -> list[Any]:
        self.take(key)
        self.take("[[")
        end = self.text.find("]]", self.at)
        if end < 0:
            self.fail(f"{key} has no end")
        inside = self.text[self.at : end]
        self.at = end + 2
        return inside.replace(",", " ").split()

    def strings(self, key: str) -> str:
        """The strings of a list, joined by the comma at which the writer split them."""
        self.take(key)
        self.take("[")
        parts: list[str] = []
        while True:
            self.blanks()
            rest = self.text[self.at : self.at + 2]
            if rest.startswith("]"):
                self.at += 1
                return ",".join(parts)
            self.at += rest[:1] in ("u", "b")
            quote = self.text[self.at : self.at + 1]
            if quote not in ("'", '"'):
                self.fail(f"no quoted text at column {self.at + 1}")
            parts.append(self.quoted(quote))

    def quoted(self, quote: str) -> str:
        start = self.at = self.at + 1
        while self.at < len(self.text) and self.text[self.at] != quote:
            self.at += 2 if self.text[self.at] == "\\" else 1
        if self.at >= len(self.text):
            self.fail(f"the text from column {start} on has no closing quote")
        self.at += 1
        return _ESCAPE.sub(_unescaped, self.text[start : self.at - 1])


def _unescaped(found: re.Match[str]) -> str:
    code = found[1] or found[2] or found[3]
    if code is None:
        return _PLAIN_ESCAPES.get(found[4], found[4])
    return chr(int(code, 16)) if int(code, 16) < 0x110000 else "\N{REPLACEMENT CHARACTER}"


# ---------------------------------------------------------------------------------------------------- copies


def _read_line(line: str, where: str) -> LabelledInstance:
    numbers, mark, text = line.partition(_MARK)
    if mark:
        return _make(parse.points(numbers.split(","), where), text)
    fields = line.split(",")
    count = next((i for i, field in enumerate(fields) if not parse.is_number(field)), len(fields))
    if count == len(fields):
        # A text that is a number makes the count odd; with an even count nothing is certain.
        if count % 2 == 0:
            raise UserError(f"{where}: cannot tell coordinates from text in {count} numbers; write ####TEXT after them")
        count -= 1
    count -= count % 2
    return _make(parse.points(fields[:count], where), ",".join(fields[count:]))


TOTALTEXT = Importer(items, read)

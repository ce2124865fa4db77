"""Checks of annotations: each item of a file becomes a checked value, or a ``BadItem`` that says what is wrong and the remedy."""

from __future__ import annotations

import json
import lzma
import math
import posixpath
import re
import zipfile
import zlib
from collections.abc import Iterable
from typing import Any

import cv2
import numpy as np
import shapely
from numpy.typing import NDArray

from i3cl import geometry, storage
from i3cl.data.formats.records import Instance, Problem
from i3cl.data.formats.rings import Notes, degenerate, repair, untangle
from i3cl.errors import UserError

MAX_SIDE = 1_000_000
"""Pixels; a coordinate or an image side beyond this is taken for a mistake."""
MAX_PIXELS = 178_956_970
"""Pixels; RLE masks of larger images are refused before memory is taken for them."""
LARGEST = float(np.finfo(np.float32).max)
CATEGORY: dict[str, Any] = {"id": 1, "name": "text"}
OTHER_CATEGORY = "other category"
DUPLICATE_ANNOTATION = "duplicate annotation id"
_SAYS_NOTHING_OF_TEXT = {OTHER_CATEGORY, DUPLICATE_ANNOTATION}
"""Kinds of left-out annotations that hide no text: the annotation is of something else, or is read under its first id."""
ZIP_FAULTS = (zipfile.BadZipFile, zlib.error, lzma.LZMAError, OSError, EOFError, RuntimeError, ValueError)
"""What zipfile raises: for damage in each of its compressions, for passwords, unknown methods, and offsets before the start."""
JOIN_REMEDY = "give the file one id, or join the labels with: prepare.py export coco --join-same-files"


class BadItem(Exception):
    """One image or annotation that cannot be used."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(kind, message)
        self.kind, self.message = kind, message


class Faults:
    """Handles bad items: each is a UserError, or with `skip_bad` a line in `problems`."""

    def __init__(self, skip_bad: bool) -> None:
        self.skip_bad = skip_bad
        self.problems: list[Problem] = []

    def bad(self, where: str, error: BadItem) -> None:
        """Stop at the item at `where`, which cannot be used, or note it. UserError unless `skip_bad`."""
        if not self.skip_bad:
            raise UserError(f"{where}: {error.message}, or leave such items out with --skip-bad (data.skip_bad)") from None
        self.problems.append(Problem(error.kind, where, error.message))

    def repaired(self, where: str, notes: Notes) -> None:
        """Note that the item at `where` is kept, changed as `notes` say."""
        self.problems += [Problem(kind, where, message, left_out=False) for kind, message in notes]


def may_hide_text(kinds: Iterable[str], kept: int) -> bool:
    """Whether an image must be left out because none of its annotations could be read: it would pass for one without text.

    kinds: of the image's annotations that were left out; kept: number of those that were read.
    """
    return not kept and any(kind not in _SAYS_NOTHING_OF_TEXT for kind in kinds)


def nothing_read(count: int) -> BadItem:
    """The fault of an image for which ``may_hide_text`` holds; count: its annotations."""
    return BadItem("no label readable", f"none of its {count} annotations can be read, and it must not pass for one without text")


def same_file(identity: int, name: str) -> BadItem:
    """The fault of an image whose file also stands under the id `identity`."""
    return BadItem("same file", f"is the file {shown(name)}, as image {identity} is; {JOIN_REMEDY}")


def is_companion(name: str) -> bool:
    """Whether a relative name is of a file that macOS or a tool keeps for itself: `._x.jpg`, `__MACOSX/...`, `.cache/...`."""
    return any(part.startswith((".", "__MACOSX")) for part in name.split("/"))


class PresentFiles:
    """Whether an image is there: asks for each file locally, lists the root once on S3, where asking is slow."""

    def __init__(self, root: str) -> None:
        self.root = root
        self._listed = storage.list_files(root) if storage.is_remote(root) else None

    def has(self, name: str) -> bool:
        """Whether the file is there; `name` is relative to the root."""
        return storage.is_file(storage.join(self.root, name)) if self._listed is None else name in self._listed


def parse_json(text: str, where: str, *, lines: bool = True) -> Any:
    """The value of a JSON text. UserError, naming `where`, for other text and for a key that occurs twice in one object.

    Of such a key json would keep the last value without a word. lines: the message says the line; False for a text of one line.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            seen: set[str] = set()
            twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
            raise UserError(f"{where}: key {shown(twice)} occurs twice; correct the file")
        return result

    try:
        return json.loads(text, object_pairs_hook=unique)
    except json.JSONDecodeError as error:
        instead = storage.stand_in(text[:512].encode("utf-8", "replace"))
        if instead:
            raise UserError(f"{where}: {instead}") from None
        place = f"line {error.lineno} column {error.colno}" if lines else f"column {error.colno}"
        raise UserError(f"{where}: {place}: not valid JSON ({error.msg}); is the file complete?") from None
    except RecursionError:
        raise UserError(f"{where}: JSON nested too deeply for annotations") from None
    except ValueError as error:  # e.g. an integer of thousands of digits
        raise UserError(f"{where}: not usable JSON ({' '.join(str(error).split())})") from None


def identity_of(entry: Any) -> int:
    """The id of an image or annotation. BadItem when it is not an object or has no whole number as id."""
    if not isinstance(entry, dict):
        raise BadItem("type", f"is {kind_of(entry)}; write an object")
    identity = whole_number(entry.get("id"))
    if identity is None:
        raise BadItem("type", f"id is {shown(entry.get('id'))}; write a whole number")
    return identity


def image_head(image: dict[str, Any]) -> tuple[str, int, int, str | None]:
    """File name, height and width in pixels, and source of a COCO image. BadItem for a wrong one."""
    name = checked_file_name(image.get("file_name"))
    sides = []
    for key in ("height", "width"):
        side = whole_number(image.get(key))
        if side is None or not 1 <= side <= MAX_SIDE:
            raise BadItem("image size", f"{key} is {shown(image.get(key))}; write the pixels as a whole number from 1")
        sides.append(side)
    return name, sides[0], sides[1], _text(image, "source")


_DRIVE_OR_URL = re.compile(r"^[A-Za-z]:|://")


def checked_file_name(name: Any) -> str:
    """The file name, normalised. BadItem when it leaves the images root or cannot be a path."""
    if not isinstance(name, str) or not name.strip():
        raise BadItem("type", f"file_name is {shown(name)}; write a path relative to the images root")
    parts = name.split("/")
    if name.startswith(("/", "~")) or "\\" in name or ".." in parts or _DRIVE_OR_URL.search(name):
        raise BadItem(
            "file name",
            f"file_name {shown(name)} leaves the images root; write a path relative to it with '/'",
        )
    if any(ord(c) < 32 or 0xD800 <= ord(c) <= 0xDFFF for c in name):
        raise BadItem("file name", f"file_name {shown(name)} has characters that no path can hold; rename the file")
    normal = posixpath.normpath(name)
    if normal == "." or name.endswith("/"):
        raise BadItem("file name", f"file_name {shown(name)} names a folder; write the image's path")
    return normal


def checked_instance(entry: dict[str, Any], categories: dict[int, bool], height: int, width: int) -> tuple[Instance, Notes]:
    """The instance of a COCO annotation, and what was repaired. BadItem for one that cannot be used.

    categories: category id -> whether it is the text category; height, width: pixels of the image.
    """
    category = whole_number(entry.get("category_id"))
    if category is None or category not in categories:
        given = shown(entry.get("category_id"))
        raise BadItem("unknown category", f"category_id {given} is not in categories; use the id of 'text'")
    if not categories[category]:
        raise BadItem(OTHER_CATEGORY, f"category_id {category} is not 'text'; only text is read, remove this")
    ignore = flag(entry, "iscrowd") | flag(entry, "ignore")
    lossweight = _number(entry, "lossweight", 0.0, math.inf, "a finite number from 0")
    outlineweight = _number(entry, "outlineweight", 0.0, math.inf, "a finite number from 0")
    score = _number(entry, "score", 0.0, 1.0, "a number from 0 to 1")
    votes = entry.get("votes")
    if votes is not None:
        votes = whole_number(votes)
        if votes is None or not 0 <= votes < 2**31:
            raise BadItem("type", f"votes is {shown(entry['votes'])}; write a whole number from 0")

    text, language = _text(entry, "text"), _text(entry, "language")
    problem, strength = _text(entry, "problem"), _number(entry, "problem_score", 0.0, 1.0, "a number from 0 to 1")

    notes: Notes = []
    segmentation = entry.get("segmentation")
    if isinstance(segmentation, dict):
        polygon = rle_outline(segmentation, height, width, notes)
    elif segmentation is None or segmentation == []:
        polygon = box_polygon(entry.get("bbox"))
    else:
        polygon = _largest_part(segmentation, notes)

    low, high = polygon.min(axis=0), polygon.max(axis=0)
    if high[0] <= 0 or high[1] <= 0 or low[0] >= width or low[1] >= height:
        box = ", ".join(f"{v:g}" for v in (*low, *high))
        raise BadItem("outside", f"box ({box}) is outside the image of {width} x {height}; correct the coordinates")
    if degenerate(polygon):
        raise BadItem("zero area", "the polygon has no area; remove it")
    inside, repaired = repair(polygon, height, width)
    if inside is None:
        raise BadItem("outside", f"nothing of it is inside the image of {width} x {height}; correct the coordinates")
    weight = 1.0 if lossweight is None else lossweight
    outline = 1.0 if outlineweight is None else outlineweight
    mark = None if problem is None or strength is None else (problem, strength)
    return Instance(inside, ignore, weight, score, votes, text, language, outline, mark), notes + repaired


def _largest_part(segmentation: Any, notes: Notes) -> NDArray[np.float32]:
    """The part with the largest area, measured after a crossing ring is untangled."""
    if not isinstance(segmentation, list):
        raise BadItem("type", f"segmentation is {kind_of(segmentation)}; write a list of polygons or an RLE object")
    # Some writers leave out the outer list of a single polygon.
    parts = segmentation if isinstance(segmentation[0], list) else [segmentation]
    polygons = [polygon_of(part) for part in parts]
    if len(polygons) == 1:
        return polygons[0]
    notes.append(("parts", f"the largest of {len(polygons)} parts is kept"))
    return max(polygons, key=lambda polygon: 0.0 if degenerate(polygon) else geometry.polygon_area(untangle(polygon)[0]))


def _not_a_number(values: list[Any]) -> str | None:
    """The first value that is not a number, for a message; None when all are."""
    return next((shown(value) for value in values if type(value) not in (int, float)), None)


def polygon_of(numbers: Any) -> NDArray[np.float32]:
    """(N, 2) float32 of a flat list x0, y0, x1, y1, ...; a closing point that repeats the first is dropped."""
    wrong = _not_a_number(numbers) if isinstance(numbers, list) else shown(numbers)
    if wrong is not None:
        raise BadItem("type", f"segmentation holds {wrong}; write a list of numbers x0, y0, x1, y1, ...")
    if len(numbers) % 2 or len(numbers) < 6:
        raise BadItem("polygon", f"a polygon has {len(numbers)} numbers; it needs x, y pairs of at least 3 points")
    # False for NaN too, and before any conversion that a huge number could break.
    if not all(-MAX_SIDE <= v <= MAX_SIDE for v in numbers):
        raise BadItem("coordinates", "a coordinate is not finite or beyond any image; correct it")
    polygon = np.array(numbers, np.float32).reshape(-1, 2)
    if len(polygon) > 3 and polygon[0, 0] == polygon[-1, 0] and polygon[0, 1] == polygon[-1, 1]:
        polygon = polygon[:-1]
    return polygon


def box_polygon(box: Any) -> NDArray[np.float32]:
    """(4, 2) float32 corners of a COCO bbox [x, y, width, height], clockwise from the top left."""
    if box is None:
        raise BadItem("polygon", "has neither segmentation nor bbox; add one")
    if not isinstance(box, list) or len(box) != 4:
        raise BadItem("type", f"bbox is {shown(box)}; write [x, y, width, height]")
    wrong = _not_a_number(box)
    if wrong is not None:
        raise BadItem("type", f"bbox holds {wrong}; write [x, y, width, height] as numbers")
    if not all(-MAX_SIDE <= v <= MAX_SIDE for v in box):
        raise BadItem("coordinates", "a number of bbox is not finite or beyond any image; correct it")
    x, y, width, height = box
    if width <= 0 or height <= 0:
        raise BadItem("zero area", f"bbox is {width:g} x {height:g}; remove it")
    return np.array([[x, y], [x + width, y], [x + width, y + height], [x, y + height]], np.float32)


def rle_outline(rle: dict[str, Any], height: int, width: int, notes: Notes) -> NDArray[np.float32]:
    """(N, 2) float32 outline of the largest region of a run-length mask, along the edges of its pixels to half a pixel.

    height, width: pixels of the image. Says in `notes` when the mask has other regions. BadItem for a broken mask.
    """
    size, runs = rle.get("size"), rle.get("counts")
    if size != [height, width]:
        raise BadItem(
            "rle",
            f"RLE size is {shown(size)} but the image is {height} x {width} (height first); correct one",
        )
    if height * width > MAX_PIXELS:
        raise BadItem("rle", f"RLE of {height} x {width} pixels is too large; write polygons")
    if isinstance(runs, str):
        runs = _unpack_runs(runs)
    if not isinstance(runs, list) or not set(map(type, runs)) <= {int}:
        raise BadItem("type", f"RLE counts is {shown(runs)}; write a string or a list of whole numbers")
    # Decoded here and not by a C library, which trusts the numbers that it is given.
    if min(runs, default=0) < 0 or sum(runs) != height * width:
        raise BadItem("rle", f"RLE counts do not add up to the {height * width} pixels of the image; write it again")
    mask = np.repeat(np.arange(len(runs)) & 1, runs).astype(np.uint8).reshape(width, height).T
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if not len(rows):
        raise BadItem("zero area", "the RLE mask is empty; remove it")
    y, x = rows[0], columns[0]
    crop = np.ascontiguousarray(mask[y : rows[-1] + 1, x : columns[-1] + 1])
    # Contours run through pixel centres; on a finer grid, grown by half a fine pixel, along pixel edges.
    fine = np.repeat(np.repeat(crop, 4, axis=0), 4, axis=1)
    contours, _ = cv2.findContours(fine, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)
    largest = max(contours, key=cv2.contourArea).reshape(-1, 2)
    if len(contours) > 1:
        notes.append(("parts", f"the largest of {len(contours)} parts is kept"))
    outline = shapely.Polygon((largest + 0.5) / 4 + [x, y]).buffer(0.125, join_style="mitre").simplify(0.5)
    ring = geometry.largest_ring(outline)
    assert ring is not None, "a region of at least one pixel has an outline"
    return ring


def _unpack_runs(text: str) -> list[int]:
    """Run lengths of COCO's compressed RLE string.

    5 bits a character, low ones first, a sixth bit when more follow; from the fourth run on the numbers are
    differences to the run before the last.
    """
    runs: list[int] = []
    value = shift = 0
    for character in text:
        code = ord(character) - 48
        if not 0 <= code < 64 or shift > 40:
            raise BadItem("rle", "RLE counts is not a COCO RLE string; write it again")
        value |= (code & 0x1F) << shift
        shift += 5
        if not code & 0x20:
            if code & 0x10:
                value -= 1 << shift
            runs.append(value + (runs[-2] if len(runs) > 2 else 0))
            value = shift = 0
    if shift:
        raise BadItem("rle", "RLE counts ends in the middle of a number; write it again")
    return runs


def whole_number(value: Any) -> int | None:
    """The value as an int when it is a whole number that fits 64 bits, else None."""
    if isinstance(value, float) and value.is_integer() and abs(value) < 2**53:
        return int(value)
    return value if isinstance(value, int) and not isinstance(value, bool) and -(2**63) <= value < 2**63 else None


def flag(entry: dict[str, Any], key: str) -> bool:
    """entry[key] as a bool, False when it is missing. BadItem unless it is true, false, 0 or 1: a text 'false' would be true."""
    value = entry.get(key)
    if value is None:
        return False
    if not isinstance(value, int | float) or value not in (0, 1):
        raise BadItem("type", f"{key} is {shown(value)}; write 0 or 1")
    return bool(value)


def _number(entry: dict[str, Any], key: str, low: float, high: float, wanted: str) -> float | None:
    value = entry.get(key)
    if value is None:
        return None
    right = isinstance(value, int | float) and not isinstance(value, bool)
    if not right or not low <= value <= high or value > LARGEST:
        raise BadItem(key, f"{key} is {shown(value)}; write {wanted}")
    return float(value)


def _text(entry: dict[str, Any], key: str) -> str | None:
    value = entry.get(key)
    if value is not None and not isinstance(value, str):
        raise BadItem("type", f"{key} is {shown(value)}; write text")
    # Half a surrogate pair is valid JSON but no Unicode text, and no table can hold it.
    return value.encode("utf-8", "replace").decode() if value else value


def kind_of(value: Any) -> str:
    """The kind of a JSON value, for a message: 'a list', 'a number', ..."""
    names = {dict: "an object", list: "a list", str: "a string", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")


def shown(value: Any) -> str:
    """A value for a message: short, on one line, printable whatever it holds."""
    if value is None:
        return "missing"
    if isinstance(value, list | dict):
        return f"{kind_of(value)} of {len(value)}"
    if isinstance(value, int) and abs(value) >= 10**30:
        return "a huge number"
    text = ascii(value[:100] if isinstance(value, str) else value)
    return text if len(text) <= 80 else text[:77] + "..."


def named(what: str, entry: Any, position: int) -> str:
    """'image 7' by the entry's id, or its place in the list (from 0) when it has none."""
    identity = whole_number(entry.get("id")) if isinstance(entry, dict) else None
    return f"{what} {identity}" if identity is not None else f"{what} number {position + 1} of the list"


def set_name(annotations: str) -> str:
    """Name of a data set: that of its annotation file or folder."""
    return posixpath.basename(annotations.rstrip("/")).rsplit(".", 1)[0]

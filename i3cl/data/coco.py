"""COCO json with our `lossweight`, `score` and `votes`, and its Parquet twin: checked reading, whole writing.

Reading gives either a right data set or one line that names the file, the id and the remedy; with `skip_bad`
bad items are listed and left out instead. Choices where COCO leaves room:
- one class: category "text"; further categories may be listed but an annotation may not use them;
- `iscrowd` or `ignore` makes an ignore region;
- of a segmentation in several parts, polygons or RLE, the largest part is the instance (listed as "parts");
- a polygon that is partly outside the image is clipped to it (listed as "clipped");
- without a segmentation the bbox is the polygon.
"""

from __future__ import annotations

import json
import math
import posixpath
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
import shapely
from numpy.typing import NDArray

from i3cl import geometry, storage
from i3cl.config import UserError

MAX_SIDE = 1_000_000
"""Pixels; a coordinate or an image side beyond this is taken for a mistake."""
MAX_PIXELS = 178_956_970
"""Pixels; RLE masks of larger images are refused before memory is taken for them."""
_LARGEST = float(np.finfo(np.float32).max)
CATEGORY = {"id": 1, "name": "text"}


@dataclass(frozen=True, eq=False, slots=True)
class Instance:
    """One text instance or ignore region."""

    polygon: NDArray[np.float32]
    """(N, 2) float32 x, y pixels of the image, N >= 3, not closed."""
    ignore: bool = False
    """Don't care: neither taught nor counted, and not a negative."""
    lossweight: float = 1.0
    """Weight of its losses, >= 0."""
    score: float | None = None
    """Fused score of a pseudo label, 0-1."""
    votes: int | None = None
    """Ensemble members that saw a pseudo label."""
    text: str | None = None
    """Transcription where the source has one; detection does not need it, people who review do."""
    language: str | None = None
    """Language or script as the source names it, e.g. 'Latin'."""


@dataclass(frozen=True, eq=False, slots=True)
class ImageRecord:
    """One image and its instances."""

    id: int
    file_name: str
    """Relative to the images root, forward slashes, never outside it."""
    height: int
    """Pixels, as stored (EXIF orientation not applied)."""
    width: int
    instances: tuple[Instance, ...] = ()
    source: str | None = None
    """Data set that the image comes from, e.g. 'art'."""


@dataclass(frozen=True, slots=True)
class Problem:
    """Something in the annotation file that was left out or mended."""

    kind: str
    """Short name to count by, e.g. 'polygon', 'clipped'."""
    where: str
    """File and id."""
    message: str
    left_out: bool = True
    """False: the item was mended and kept."""


@dataclass(frozen=True, eq=False, slots=True)
class Dataset:
    """What one annotation file holds."""

    name: str
    images_root: str
    records: Sequence[ImageRecord]
    problems: Sequence[Problem] = ()

    def __len__(self) -> int:
        return len(self.records)

    def path(self, record: ImageRecord) -> str:
        """Path or URL of a record's image."""
        return storage.join(self.images_root, record.file_name)

    def summary(self) -> str:
        """One line: images, instances, ignore regions, and the problems counted by kind."""
        instances = sum(len(r.instances) for r in self.records)
        ignored = sum(i.ignore for r in self.records for i in r.instances)
        line = f"{self.name}: {len(self.records)} images, {instances - ignored} instances"
        line += f", {ignored} ignore regions"
        left_out = Counter(p.kind for p in self.problems if p.left_out)
        mended = Counter(p.kind for p in self.problems if not p.left_out)
        for title, counts in (("left out", left_out), ("mended", mended)):
            if counts:
                line += f"; {title}: " + ", ".join(f"{n} {kind}" for kind, n in counts.most_common())
        return line


# ---------------------------------------------------------------------------------------------------- reading


def read_coco(
    annotations: str, images_root: str, *, skip_bad: bool = False, check_files: bool = True
) -> Dataset:
    """Read a COCO json, or a Parquet file or folder as ``write_parquet`` writes, and check every item of it.

    `annotations` and `images_root` are local paths or s3:// URLs. `check_files` asks whether every image is
    there (it is not opened). UserError at the first bad item, or with `skip_bad` only when the file as a
    whole cannot be used.
    """
    if annotations.rstrip("/").endswith(".parquet") or storage.is_dir(annotations):
        content: Any = _entries_of_table(_read_table(annotations), annotations)
    else:
        content = _parse_json(annotations)
    if not isinstance(content, dict):
        raise UserError(f"{annotations}: is {_kind(content)}, not a COCO object with images and annotations")
    images = _list_of(content, "images", annotations, required=True)
    entries = _list_of(content, "annotations", annotations, required=False)
    categories = _categories(_list_of(content, "categories", annotations, required=False), annotations)

    problems: list[Problem] = []

    def bad(where: str, error: _Bad) -> None:
        if not skip_bad:
            raise UserError(f"{where}: {error.message}, or leave such items out with skip_bad=true")
        problems.append(Problem(error.kind, where, error.message))

    present = _PresentFiles(images_root) if check_files else None
    heads: dict[int, tuple[str, int, int, str | None]] = {}
    instances: dict[int, list[Instance]] = {}
    bad_images: set[int] = set()
    for position, image in enumerate(images):
        try:
            identity = _identity(image, position)
            if identity in heads or identity in bad_images:
                raise _Bad("duplicate image id", "occurs twice; give every image its own id")
            bad_images.add(identity)
            head = _image_head(image)
            if present is not None and not present.has(head[0]):
                path = storage.join(images_root, head[0])
                raise _Bad("missing image", f"{path} is not there; correct the images root or the file name")
            bad_images.discard(identity)
            heads[identity], instances[identity] = head, []
        except _Bad as error:
            bad(f"{annotations}: {_named('image', image, position)}", error)

    seen: set[int] = set()
    for position, entry in enumerate(entries):
        try:
            identity = _identity(entry, position)
            if identity in seen:
                raise _Bad("duplicate annotation id", "occurs twice; give every annotation its own id")
            seen.add(identity)
            image_id = _whole(entry.get("image_id"))
            if image_id is None:
                raise _Bad(
                    "type", f"image_id is {_shown(entry.get('image_id'))}; write the image's whole number"
                )
            if image_id not in heads:
                if image_id in bad_images:
                    raise _Bad("image left out", f"its image {image_id} is left out; correct that first")
                raise _Bad(
                    "unknown image", f"image_id {image_id} is not in images; add the image or remove this"
                )
            _, height, width, _ = heads[image_id]
            instance, mended = _instance(entry, categories, height, width)
            instances[image_id].append(instance)
            for kind, message in mended:
                problems.append(
                    Problem(kind, f"{annotations}: annotation {identity}", message, left_out=False)
                )
        except _Bad as error:
            bad(f"{annotations}: {_named('annotation', entry, position)}", error)

    records = tuple(ImageRecord(i, *head[:3], tuple(instances[i]), head[3]) for i, head in heads.items())
    name = posixpath.basename(annotations.rstrip("/")).rsplit(".", 1)[0]
    return Dataset(name, images_root, records, tuple(problems))


class _Bad(Exception):
    """One image or annotation that cannot be used."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(kind, message)
        self.kind, self.message = kind, message


def _parse_json(path: str) -> Any:
    text = storage.read_text(path)
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(
            f"{path}: line {error.lineno} column {error.colno}: not valid JSON ({error.msg}); "
            "is the file complete?"
        ) from None
    except RecursionError:
        raise UserError(f"{path}: JSON nested too deeply for an annotation file") from None
    except ValueError as error:  # e.g. an integer of thousands of digits
        raise UserError(f"{path}: not usable JSON ({error})") from None


def _list_of(content: dict[str, Any], key: str, path: str, required: bool) -> list[Any]:
    value = content.get(key)
    if value is None and not required:
        return []
    if not isinstance(value, list):
        state = f"is {_kind(value)}" if key in content else "is missing"
        raise UserError(f"{path}: {key} {state}; a COCO file has a list there")
    return value


def _categories(entries: list[Any], path: str) -> dict[int, bool]:
    """Category id -> whether it is the text category."""
    result: dict[int, bool] = {}
    for entry in entries:
        identity = _whole(entry.get("id")) if isinstance(entry, dict) else None
        name = entry.get("name") if isinstance(entry, dict) else None
        if identity is None or not isinstance(name, str):
            raise UserError(
                f"{path}: categories: {_shown(entry)} is not {{'id': whole number, 'name': text}}"
            )
        if identity in result:
            raise UserError(f"{path}: categories: id {identity} occurs twice")
        result[identity] = name.strip().lower() == "text"
    if entries and sum(result.values()) != 1:
        raise UserError(
            f"{path}: categories: {sum(result.values())} of {len(result)} are named 'text'; name one so"
        )
    return result


class _PresentFiles:
    """Whether an image is there: a look each locally, one listing of the root on S3, where looks are slow."""

    def __init__(self, root: str) -> None:
        self._root = root
        self._listed = storage.list_files(root) if storage.is_remote(root) else None

    def has(self, name: str) -> bool:
        return (
            storage.is_file(storage.join(self._root, name)) if self._listed is None else name in self._listed
        )


def _identity(entry: Any, position: int) -> int:
    if not isinstance(entry, dict):
        raise _Bad("type", f"is {_kind(entry)}; write an object")
    identity = _whole(entry.get("id"))
    if identity is None:
        raise _Bad("type", f"id is {_shown(entry.get('id'))}; write a whole number")
    return identity


def _image_head(image: dict[str, Any]) -> tuple[str, int, int, str | None]:
    name = _file_name(image.get("file_name"))
    sides = []
    for key in ("height", "width"):
        side = _whole(image.get(key))
        if side is None or not 1 <= side <= MAX_SIDE:
            raise _Bad(
                "image size", f"{key} is {_shown(image.get(key))}; write the pixels as a whole number from 1"
            )
        sides.append(side)
    return name, sides[0], sides[1], _text(image, "source")


_DRIVE_OR_URL = re.compile(r"^[A-Za-z]:|://")


def _file_name(name: Any) -> str:
    """A file name that cannot leave the images root, normalised."""
    if not isinstance(name, str) or not name.strip():
        raise _Bad("type", f"file_name is {_shown(name)}; write a path relative to the images root")
    parts = name.split("/")
    if name.startswith(("/", "~")) or "\\" in name or ".." in parts or _DRIVE_OR_URL.search(name):
        raise _Bad(
            "file name",
            f"file_name {_shown(name)} leaves the images root; write a path relative to it with '/'",
        )
    if any(ord(c) < 32 or 0xD800 <= ord(c) <= 0xDFFF for c in name):
        raise _Bad(
            "file name", f"file_name {_shown(name)} has characters that no path can hold; rename the file"
        )
    normal = posixpath.normpath(name)
    if normal == "." or name.endswith("/"):
        raise _Bad("file name", f"file_name {_shown(name)} names a folder; write the image's path")
    return normal


def _instance(
    entry: dict[str, Any], categories: dict[int, bool], height: int, width: int
) -> tuple[Instance, list[tuple[str, str]]]:
    """The instance of a COCO annotation and what was mended on the way: (kind, message) pairs."""
    category = _whole(entry.get("category_id"))
    if category is None or category not in categories:
        shown = _shown(entry.get("category_id"))
        raise _Bad("unknown category", f"category_id {shown} is not in categories; use the id of 'text'")
    if not categories[category]:
        raise _Bad("other category", f"category_id {category} is not 'text'; only text is read, remove this")
    ignore = _flag(entry, "iscrowd") | _flag(entry, "ignore")
    lossweight = _number(entry, "lossweight", 0.0, math.inf, "a finite number from 0")
    score = _number(entry, "score", 0.0, 1.0, "a number from 0 to 1")
    votes = entry.get("votes")
    if votes is not None:
        votes = _whole(votes)
        if votes is None or not 0 <= votes < 2**31:
            raise _Bad("type", f"votes is {_shown(entry['votes'])}; write a whole number from 0")

    text, language = _text(entry, "text"), _text(entry, "language")

    mended: list[tuple[str, str]] = []
    segmentation = entry.get("segmentation")
    if isinstance(segmentation, dict):
        polygon = _rle_outline(segmentation, height, width, mended)
    elif segmentation is None or segmentation == []:
        polygon = _box_polygon(entry.get("bbox"))
    else:
        polygon = _largest_part(segmentation, mended)

    low, high = polygon.min(axis=0), polygon.max(axis=0)
    if high[0] <= 0 or high[1] <= 0 or low[0] >= width or low[1] >= height:
        box = ", ".join(f"{v:g}" for v in (*low, *high))
        raise _Bad(
            "outside", f"box ({box}) is outside the image of {width} x {height}; correct the coordinates"
        )
    if geometry.polygon_area(polygon) <= 1e-6 and geometry.to_shapely([polygon])[0].area <= 1e-6:
        raise _Bad("zero area", "the polygon has no area; remove it")
    if low[0] < 0 or low[1] < 0 or high[0] > width or high[1] > height:
        inside = geometry.clip_polygon(polygon, width, height)
        if inside is None:
            raise _Bad(
                "outside", f"nothing of it is inside the image of {width} x {height}; correct the coordinates"
            )
        polygon = inside
        mended.append(("clipped", f"partly outside the image of {width} x {height}; clipped to it"))
    weight = 1.0 if lossweight is None else lossweight
    return Instance(polygon, ignore, weight, score, votes, text, language), mended


def _largest_part(segmentation: Any, mended: list[tuple[str, str]]) -> NDArray[np.float32]:
    if not isinstance(segmentation, list):
        raise _Bad(
            "type", f"segmentation is {_kind(segmentation)}; write a list of polygons or an RLE object"
        )
    # Some writers leave out the outer list of a single polygon.
    parts = segmentation if isinstance(segmentation[0], list) else [segmentation]
    polygons = [_polygon(part) for part in parts]
    if len(polygons) == 1:
        return polygons[0]
    mended.append(("parts", f"the largest of {len(polygons)} parts is kept"))
    return max(polygons, key=geometry.polygon_area)


def _polygon(numbers: Any) -> NDArray[np.float32]:
    if not isinstance(numbers, list) or not set(map(type, numbers)) <= {int, float}:
        raise _Bad(
            "type", f"segmentation holds {_shown(numbers)}; write a list of numbers x0, y0, x1, y1, ..."
        )
    if len(numbers) % 2 or len(numbers) < 6:
        raise _Bad(
            "polygon", f"a polygon has {len(numbers)} numbers; it needs x, y pairs of at least 3 points"
        )
    # False for NaN too, and before any conversion that a huge number could break.
    if not all(-MAX_SIDE <= v <= MAX_SIDE for v in numbers):
        raise _Bad("coordinates", "a coordinate is not finite or beyond any image; correct it")
    polygon = np.array(numbers, np.float32).reshape(-1, 2)
    if len(polygon) > 3 and polygon[0, 0] == polygon[-1, 0] and polygon[0, 1] == polygon[-1, 1]:
        polygon = polygon[:-1]
    return polygon


def _box_polygon(box: Any) -> NDArray[np.float32]:
    if box is None:
        raise _Bad("polygon", "has neither segmentation nor bbox; add one")
    if not isinstance(box, list) or len(box) != 4 or not set(map(type, box)) <= {int, float}:
        raise _Bad("type", f"bbox is {_shown(box)}; write [x, y, width, height]")
    if not all(-MAX_SIDE <= v <= MAX_SIDE for v in box):
        raise _Bad("coordinates", "a number of bbox is not finite or beyond any image; correct it")
    x, y, width, height = box
    if width <= 0 or height <= 0:
        raise _Bad("zero area", f"bbox is {width:g} x {height:g}; remove it")
    return np.array([[x, y], [x + width, y], [x + width, y + height], [x, y + height]], np.float32)


def _rle_outline(
    rle: dict[str, Any], height: int, width: int, mended: list[tuple[str, str]]
) -> NDArray[np.float32]:
    """Outline of the largest region of a run-length mask, along the edges of its pixels to half a pixel."""
    size, runs = rle.get("size"), rle.get("counts")
    if size != [height, width]:
        raise _Bad(
            "rle",
            f"RLE size is {_shown(size)} but the image is {height} x {width} (height first); correct one",
        )
    if height * width > MAX_PIXELS:
        raise _Bad("rle", f"RLE of {height} x {width} pixels is too large; write polygons")
    if isinstance(runs, str):
        runs = _unpack_runs(runs)
    if not isinstance(runs, list) or not set(map(type, runs)) <= {int}:
        raise _Bad("type", f"RLE counts is {_shown(runs)}; write a string or a list of whole numbers")
    # Decoded here and not by a C library, which trusts the numbers that it is given.
    if min(runs, default=0) < 0 or sum(runs) != height * width:
        raise _Bad(
            "rle", f"RLE counts do not add up to the {height * width} pixels of the image; write it anew"
        )
    mask = np.repeat(np.arange(len(runs)) & 1, runs).astype(np.uint8).reshape(width, height).T
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if not len(rows):
        raise _Bad("zero area", "the RLE mask is empty; remove it")
    y, x = rows[0], columns[0]
    crop = np.ascontiguousarray(mask[y : rows[-1] + 1, x : columns[-1] + 1])
    # Contours run through pixel centres; on a finer grid, grown by half a fine pixel, along pixel edges.
    fine = np.repeat(np.repeat(crop, 4, axis=0), 4, axis=1)
    contours, _ = cv2.findContours(fine, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)
    largest = max(contours, key=cv2.contourArea).reshape(-1, 2)
    if len(contours) > 1:
        mended.append(("parts", f"the largest of {len(contours)} parts is kept"))
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
            raise _Bad("rle", "RLE counts is not a COCO RLE string; write it anew")
        value |= (code & 0x1F) << shift
        shift += 5
        if not code & 0x20:
            if code & 0x10:
                value -= 1 << shift
            runs.append(value + (runs[-2] if len(runs) > 2 else 0))
            value = shift = 0
    if shift:
        raise _Bad("rle", "RLE counts ends in the middle of a number; write it anew")
    return runs


def _whole(value: Any) -> int | None:
    """The value as an int when it is a whole number that fits 64 bits, else None."""
    if isinstance(value, float) and value.is_integer() and abs(value) < 2**53:
        return int(value)
    return (
        value
        if isinstance(value, int) and not isinstance(value, bool) and -(2**63) <= value < 2**63
        else None
    )


def _flag(entry: dict[str, Any], key: str) -> bool:
    value = entry.get(key)
    if value is None:
        return False
    if not isinstance(value, int | float) or value not in (0, 1):
        raise _Bad("type", f"{key} is {_shown(value)}; write 0 or 1")
    return bool(value)


def _number(entry: dict[str, Any], key: str, low: float, high: float, wanted: str) -> float | None:
    value = entry.get(key)
    if value is None:
        return None
    right = isinstance(value, int | float) and not isinstance(value, bool)
    if not right or not low <= value <= high or value > _LARGEST:
        raise _Bad(key, f"{key} is {_shown(value)}; write {wanted}")
    return float(value)


def _text(entry: dict[str, Any], key: str) -> str | None:
    value = entry.get(key)
    if value is not None and not isinstance(value, str):
        raise _Bad("type", f"{key} is {_shown(value)}; write text")
    # Half a surrogate pair is valid JSON but no Unicode text, and no table can hold it.
    return value.encode("utf-8", "replace").decode() if value else value


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")


def _shown(value: Any) -> str:
    """A value for a message: short, on one line, printable whatever it holds."""
    if value is None:
        return "missing"
    if isinstance(value, list | dict):
        return f"{_kind(value)} of {len(value)}"
    text = repr(value) if not isinstance(value, int) or abs(value) < 10**30 else "a huge number"
    text = text.encode("ascii", "backslashreplace").decode() if isinstance(value, str) else text
    return text if len(text) <= 80 else text[:77] + "..."


def _named(what: str, entry: Any, position: int) -> str:
    identity = _whole(entry.get("id")) if isinstance(entry, dict) else None
    return f"{what} {identity}" if identity is not None else f"{what} number {position + 1} of the list"


# ---------------------------------------------------------------------------------------------------- writing


def write_coco(path: str, records: Iterable[ImageRecord], info: Mapping[str, Any] | None = None) -> None:
    """Write records as COCO json, atomically. Coordinates survive exactly; annotation ids are numbered from
    1.

    ValueError when two records share an id: such a file could not be read back.
    """
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    seen: set[int] = set()
    for record in records:
        if record.id in seen:
            raise ValueError(f"two records have the id {record.id}")
        seen.add(record.id)
        image = {"id": record.id, "file_name": record.file_name, "height": record.height, "width": record.width}
        images.append(image if record.source is None else {**image, "source": record.source})
        for instance in record.instances:
            annotations.append(_annotation(instance, len(annotations) + 1, record.id))
    content = {
        "info": {"description": "text polygons", **(info or {})},
        "images": images,
        "categories": [CATEGORY],
        "annotations": annotations,
    }
    storage.write_text_atomic(path, json.dumps(content, ensure_ascii=False, allow_nan=False))


def _annotation(instance: Instance, identity: int, image_id: int) -> dict[str, Any]:
    # The shortest decimal that gives the same float32 back.
    points = [float(str(v)) for v in np.asarray(instance.polygon, np.float32).ravel()]
    xs, ys = points[::2], points[1::2]
    entry = {
        "id": identity,
        "image_id": image_id,
        "category_id": CATEGORY["id"],
        "bbox": [min(xs), min(ys), round(max(xs) - min(xs), 4), round(max(ys) - min(ys), 4)],
        "area": round(geometry.polygon_area(instance.polygon), 4),
        "segmentation": [points],
        # Evaluation tools look at iscrowd, data loaders at ignore.
        "iscrowd": int(instance.ignore),
        "ignore": int(instance.ignore),
        "lossweight": float(instance.lossweight),
    }
    if instance.score is not None:
        entry["score"] = float(instance.score)
    if instance.votes is not None:
        entry["votes"] = int(instance.votes)
    if instance.text is not None:
        entry["text"] = instance.text
    if instance.language is not None:
        entry["language"] = instance.language
    return entry


# ----------------------------------------------------------------------------------------------------- tables

_INSTANCE_TYPE = pa.struct(
    [
        ("polygon", pa.list_(pa.float32())),
        ("ignore", pa.bool_()),
        ("lossweight", pa.float32()),
        ("score", pa.float32()),
        ("votes", pa.int32()),
        ("text", pa.string()),
        ("language", pa.string()),
    ]
)
IMAGE_SCHEMA = pa.schema(
    [
        ("image_id", pa.int64()),
        ("file_name", pa.string()),
        ("path", pa.string()),
        ("height", pa.int32()),
        ("width", pa.int32()),
        ("instances", pa.list_(_INSTANCE_TYPE)),
        ("source", pa.string()),
    ]
)
"""One row an image; `polygon` is flat x0, y0, x1, y1, ...; `path` is images root and `file_name` joined."""


def to_table(records: Sequence[ImageRecord], images_root: str) -> pa.Table:
    """Records as a table of ``IMAGE_SCHEMA``."""
    columns: dict[str, list[Any]] = {
        "image_id": [r.id for r in records],
        "file_name": [r.file_name for r in records],
        "path": [storage.join(images_root, r.file_name) for r in records],
        "height": [r.height for r in records],
        "width": [r.width for r in records],
        "instances": [
            [
                {
                    "polygon": np.asarray(i.polygon, np.float32).ravel(),
                    "ignore": i.ignore,
                    "lossweight": i.lossweight,
                    "score": i.score,
                    "votes": i.votes,
                    "text": i.text,
                    "language": i.language,
                }
                for i in r.instances
            ]
            for r in records
        ],
        "source": [r.source for r in records],
    }
    return pa.table(columns, schema=IMAGE_SCHEMA)


def from_table(table: pa.Table) -> list[ImageRecord]:
    """Records of a table of ``IMAGE_SCHEMA``; the inverse of ``to_table``."""
    return [record_from_row(row) for batch in table.to_batches() for row in batch.to_pylist()]


def record_from_row(row: Mapping[str, Any]) -> ImageRecord:
    """The record of a row of ``IMAGE_SCHEMA`` as Python or Ray Data hands it (lists, arrays; None, NaN)."""
    instances = row["instances"] if row["instances"] is not None else ()
    return ImageRecord(
        int(row["image_id"]),
        str(row["file_name"]),
        int(row["height"]),
        int(row["width"]),
        tuple(
            Instance(
                np.array(i["polygon"], np.float32).reshape(-1, 2),
                bool(i["ignore"]),
                float(i["lossweight"]),
                None if _absent(i["score"]) else float(i["score"]),
                None if _absent(i["votes"]) else int(i["votes"]),
                i["text"],
                i["language"],
            )
            for i in instances
        ),
        row["source"],
    )


def _absent(value: Any) -> bool:
    return value is None or value != value


def write_parquet(path: str, records: Sequence[ImageRecord], images_root: str) -> None:
    """Write records as one Parquet file of ``IMAGE_SCHEMA``, atomically; ``read_coco`` reads it."""
    import pyarrow.parquet as pq

    sink = pa.BufferOutputStream()
    pq.write_table(to_table(records, images_root), sink)
    storage.write_bytes_atomic(path, sink.getvalue().to_pybytes())


def _read_table(path: str) -> pa.Table:
    import pyarrow.dataset as ds

    if not storage.exists(path):
        raise UserError(f"{path}: no such file or folder; check the path")
    filesystem, inside = storage.filesystem(path)
    names = [f.name for f in IMAGE_SCHEMA if f.name != "path"]
    try:
        return ds.dataset(inside, filesystem=filesystem, format="parquet").to_table(columns=names)
    except (OSError, pa.ArrowException) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{path}: not a Parquet table of images ({reason}); use write_parquet") from None


def _entries_of_table(table: pa.Table, path: str) -> dict[str, Any]:
    """The table as the COCO object that it stands for, so that both pass the same checks."""
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for row in table.to_pylist():
        images.append({"id": row["image_id"], **{k: row[k] for k in ("file_name", "height", "width", "source")}})
        instances = row["instances"]
        if instances is not None and not (
            isinstance(instances, list) and all(isinstance(i, dict) and "polygon" in i for i in instances)
        ):
            raise UserError(
                f"{path}: column instances is not a list of instances; write it with write_parquet"
            )
        for instance in instances or ():
            annotations.append(
                {
                    **instance,
                    "segmentation": [instance["polygon"]],
                    "id": len(annotations) + 1,
                    "image_id": row["image_id"],
                    "category_id": CATEGORY["id"],
                }
            )
    return {"images": images, "annotations": annotations, "categories": [CATEGORY]}

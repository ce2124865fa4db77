"""Truths and results as the outside world writes them, recognised by their content, into one form.

Truth: COCO json or Parquet; ArT/LSVT json; text files (a folder, or a flat zip) of ``x1,y1,...,text``, ``x1,y1,...,####text``
or CTW1500 v1 offsets; any importer's source by name. Results: the predictions table; COCO results json; ArT submission json;
a COCO data set with scores (pseudo labels); text files of ``x1,y1,...[,confidence]``. A fault is one line with file and line.
"""

from __future__ import annotations

import io
import json
import math
import re
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from i3cl import storage
from i3cl.data.formats.checks import MAX_SIDE
from i3cl.errors import UserError
from i3cl.evaluation.metrics.batch import Sample

PointOrder = Literal["xy", "yx"]
Ring = NDArray[np.float64]

MAX_FILES = 1_000_000
MAX_FILE_BYTES = 64 << 20
"""Of one file in a zip, unpacked."""
MAX_ZIP_BYTES = 4 << 30
"""Of all files in a zip, unpacked."""


@dataclass(eq=False)
class Found:
    """One image's detections."""

    name: str
    polygons: list[Ring]
    """M polygons (P, 2) float64 pixels, P >= 3."""
    scores: NDArray[np.float64]
    """(M,) 0-1."""
    id: int | None = None
    """COCO image id, where the format has one."""
    segmentations: list[Any] | None = None
    """M COCO segmentations as given (RLE), where the format has them."""


@dataclass(eq=False)
class Truth:
    """One image's truth."""

    name: str
    polygons: list[Ring]
    ignore: list[bool]
    texts: list[str | None]
    languages: list[str | None]
    id: int | None = None
    height: int | None = None
    width: int | None = None
    file_name: str | None = None


@dataclass(eq=False)
class Source:
    """What was read, and what there is to say about it."""

    path: str
    format: str
    """How it was understood, in words."""
    images: list[Any]
    """`Truth` or `Found`."""
    left_out: list[str] = field(default_factory=list)
    """One line for each fault that was skipped."""
    warnings: list[str] = field(default_factory=list)


class _Faults:
    """Raises at the first fault, or lists faults when they are to be skipped."""

    def __init__(self, skip: bool) -> None:
        self.skip = skip
        self.lines: list[str] = []

    def add(self, where: str, message: str) -> None:
        line = f"{where}: {message}"
        if not self.skip:
            raise UserError(f"{line}; correct it, or leave such items out with --skip-bad")
        self.lines.append(line)


# ------------------------------------------------------------------------------------------------------------- results


def read_results(path: str, *, member: str | None = None, point_order: PointOrder = "xy", skip_bad: bool = False) -> Source:
    """Detections of any format above. UserError for what cannot be read; with `skip_bad` bad items are left out and listed.

    member: which of a predictions table's; needed when it holds several. point_order: 'yx' for files that write y first, as
    the official Total-Text ones.
    """
    faults = _Faults(skip_bad)
    files = _text_files(path)
    if files is None and _is_table(path):
        source = _predictions(path, member)
    elif files is None or _only_json(files):
        label, data = (path, storage.read_bytes(path)) if files is None else next(iter(files.items()))
        source = _json_results(path if files is None else f"{path}:{label}", data, faults)
    else:
        source = _text_results(path, files, faults)
    if member is not None and source.format != "predictions table":
        raise UserError(f"--member {member}: {path} is no predictions table; leave the option out")
    if point_order == "yx":
        for image in source.images:
            image.polygons = [polygon[:, ::-1] for polygon in image.polygons]
    source.left_out = faults.lines
    return source


def _is_table(path: str) -> bool:
    return path.rstrip("/").endswith(".parquet") or (
        storage.is_dir(path) and any(name.endswith(".parquet") for name in storage.list_dir(path))
    )


def _predictions(path: str, member: str | None) -> Source:
    from i3cl.data.formats.predictions import read_batches, read_predictions

    members: set[str] = set()
    for batch in read_batches(path, ["member"]):
        members.update(batch["member"].unique().to_pylist())
    if member is None:
        if len(members) > 1:
            raise UserError(f"{path}: holds {', '.join(sorted(members))}; choose one with --member NAME")
        member = next(iter(members), "")
    elif member not in members:
        raise UserError(f"--member {member}: {path} holds {', '.join(sorted(members))}")
    images, unread = [], 0
    for rows in read_predictions(path):
        for row in rows:
            if row["member"] != member:
                continue
            if row["error"] is not None:
                unread += 1
            else:
                images.append(found_of_row(row))
                break
    warnings = [f"{path}: {unread} images could not be read when they were predicted; they count as empty"] if unread else []
    return Source(path, "predictions table", images, warnings=warnings)


def found_of_row(row: Mapping[str, Any]) -> Found:
    """The detections of one row of a predictions table."""
    polygons = [np.asarray(polygon, np.float64).reshape(-1, 2) for polygon in row["polygons"]]
    return Found(row["file_name"], polygons, np.asarray(row["scores"], np.float64), row["image_id"])


def _json_results(path: str, data: bytes, faults: _Faults) -> Source:
    content = _json(path, data)
    if isinstance(content, list):
        return Source(path, "COCO results", _coco_results(path, content, faults))
    if isinstance(content, dict) and "images" in content and "annotations" in content:
        return Source(path, "COCO data set with scores", _coco_as_results(path, faults.skip))
    if isinstance(content, dict) and all(isinstance(value, list) for value in content.values()):
        return Source(path, "ArT submission", _art_results(path, content, faults))
    raise UserError(f"{path}: neither a COCO results list nor an ArT submission (res_N: [...])")


def _json(path: str, data: bytes) -> Any:
    try:
        return json.loads(data.decode("utf-8-sig"))
    except json.JSONDecodeError as error:
        raise UserError(f"{path}: line {error.lineno} column {error.colno}: not valid JSON ({error.msg})") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text (byte {error.start}); save it as UTF-8") from None
    except (RecursionError, ValueError) as error:
        raise UserError(f"{path}: not usable JSON ({type(error).__name__})") from None


def _coco_results(path: str, content: list[Any], faults: _Faults) -> list[Found]:
    images: dict[int, Found] = {}
    scores: dict[int, list[float]] = {}
    for position, entry in enumerate(content):
        where = f"{path}: result {position + 1}"
        try:
            if not isinstance(entry, dict):
                raise ValueError("is no object with image_id, segmentation or bbox, and score")
            identity = entry.get("image_id")
            if isinstance(identity, bool) or not isinstance(identity, int | str):
                raise ValueError(f"image_id is {identity!r:.40}; write the image's number")
            if isinstance(identity, str):
                raise ValueError(f"image_id is the text {identity!r:.60}; write the image's number of the truth")
            score = _score(entry.get("score"))
            segmentation = entry.get("segmentation")
            polygon = _segmentation(segmentation) if segmentation else _box(entry.get("bbox"))
        except ValueError as error:
            faults.add(where, str(error))
            continue
        image = images.setdefault(identity, Found(str(identity), [], np.zeros(0), identity, []))
        image.polygons.append(polygon)
        assert image.segmentations is not None
        image.segmentations.append(segmentation)
        scores.setdefault(identity, []).append(score)
    for identity, image in images.items():
        image.scores = np.array(scores[identity])
    return list(images.values())


def _segmentation(segmentation: Any) -> Ring:
    if isinstance(segmentation, dict):
        from i3cl.data.formats.checks import BadItem, rle_outline

        size = segmentation.get("size")
        if not (isinstance(size, list) and len(size) == 2 and all(type(s) is int and 0 < s <= MAX_SIDE for s in size)):
            raise ValueError(f"RLE size is {size!r:.40}; write [height, width]")
        try:
            return np.asarray(rle_outline(segmentation, size[0], size[1], []), np.float64)
        except BadItem as error:
            raise ValueError(error.message) from None
    if not isinstance(segmentation, list):
        raise ValueError("segmentation is neither polygons nor an RLE object")
    parts = segmentation if isinstance(segmentation[0], list) else [segmentation]
    rings = [ring(part) for part in parts]
    from i3cl.geometry import polygon_area

    return max(rings, key=polygon_area)


def _box(box: Any) -> Ring:
    if not isinstance(box, list) or len(box) != 4:
        raise ValueError("has neither a segmentation nor a bbox [x, y, width, height]")
    x, y, width, height = box
    try:
        return ring([x, y, x + width, y, x + width, y + height, x, y + height])
    except TypeError:
        raise ValueError(f"bbox is {box!r:.60}; write four numbers") from None


def _coco_as_results(path: str, skip_bad: bool) -> list[Found]:
    from i3cl.data.formats.coco import read_coco

    images = []
    for record in read_coco(path, "", skip_bad=skip_bad, check_files=False).records:
        kept = [i for i in record.instances if not i.ignore]
        scores = np.array([1.0 if i.score is None else i.score for i in kept])
        polygons = [np.asarray(i.polygon, np.float64) for i in kept]
        images.append(Found(record.file_name, polygons, scores, record.id))
    return images


def _art_results(path: str, content: dict[str, list[Any]], faults: _Faults) -> list[Found]:
    images = []
    for key, entries in content.items():
        polygons, scores = [], []
        for position, entry in enumerate(entries):
            try:
                if not isinstance(entry, dict) or "points" not in entry:
                    raise ValueError("has no points")
                polygon = ring(entry["points"])
                score = _score(entry.get("confidence", 1.0))
            except ValueError as error:
                faults.add(f"{path}: {key}: polygon {position + 1}", str(error))
                continue
            polygons.append(polygon)
            scores.append(score)
        images.append(Found(key, polygons, np.array(scores, np.float64)))
    return images


def _score(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
        raise ValueError(f"score is {value!r:.40}; write a number from 0 to 1")
    return float(value)


def ring(points: Any) -> Ring:
    """(P, 2) float64 from nested or flat numbers. ValueError that names the fault: too few, odd, not finite, huge."""
    try:
        array = np.asarray(points, np.float64)
    except (TypeError, ValueError, OverflowError):
        raise ValueError("points are not numbers x, y") from None
    if array.ndim == 2 and array.shape[1] != 2:
        raise ValueError("points are not x, y pairs")
    if array.size % 2:
        raise ValueError(f"{array.size} coordinates, an odd number")
    if array.size < 6:
        raise ValueError(f"a polygon of {array.size // 2} points; it needs at least 3")
    # Written so that NaN fails too.
    if not (np.abs(array) <= MAX_SIDE).all():
        raise ValueError("a coordinate is not finite or beyond any image")
    return array.reshape(-1, 2)


# ----------------------------------------------------------------------------------------------------------- text files


def _text_files(path: str) -> dict[str, bytes] | None:
    """Name -> content of a zip's or a folder's files; None for any other file."""
    if not storage.exists(path):
        raise UserError(f"{path}: no such file or folder; check the path")
    if storage.is_dir(path):
        names = [name for name in storage.list_dir(path) if not name.startswith(".")]
        wanted = [name for name in names if name.lower().endswith(".txt")]
        if not wanted:
            if any(name.endswith(".parquet") for name in names):
                return None
            raise UserError(f"{path}: holds neither *.txt nor *.parquet files; check the path")
        return {name: storage.read_bytes(storage.join(path, name)) for name in wanted}
    with storage.open_read(path) as file:
        if file.read(4) != b"PK\x03\x04":
            if path.lower().endswith(".zip"):
                raise UserError(f"{path}: not a zip file, or an empty one; zip it again")
            return None
    return _unzipped(path, storage.read_bytes(path))


def _unzipped(path: str, packed: bytes) -> dict[str, bytes]:
    files: dict[str, bytes] = {}
    left = MAX_ZIP_BYTES
    try:
        with zipfile.ZipFile(io.BytesIO(packed)) as archive:
            entries = archive.infolist()
            if len(entries) > MAX_FILES:
                raise UserError(f"{path}: {len(entries)} files, more than {MAX_FILES}; is it the right zip?")
            for entry in entries:
                name = entry.filename
                if name.startswith("__MACOSX/") or name.rsplit("/", 1)[-1] == ".DS_Store":
                    continue
                if "/" in name or "\\" in name or name in ("", ".", ".."):
                    raise UserError(
                        f"{path}: {name!r:.80} lies in a folder; zip the files themselves, flat, as the sites want it"
                    )
                if name.lower().endswith(".zip"):
                    raise UserError(f"{path}: {name!r:.80} is a zip in a zip; unpack it first")
                if not name.lower().endswith((".txt", ".json")):
                    raise UserError(f"{path}: {name!r:.80} is neither .txt nor .json; leave it out of the zip")
                if name in files:
                    raise UserError(f"{path}: {name!r:.80} occurs twice; zip it again")
                if entry.flag_bits & 1:
                    raise UserError(f"{path}: {name!r:.80} is encrypted; zip it without a password")
                # Read with a limit of its own: the size in a zip's directory is only what its writer claims.
                limit = min(MAX_FILE_BYTES, left)
                with archive.open(entry) as part:
                    data = part.read(limit + 1)
                if len(data) > limit:
                    raise UserError(f"{path}: {name!r:.80} unpacks to more than {limit} bytes; is it the right zip?")
                left -= len(data)
                files[name] = data
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, ValueError) as error:
        # What zipfile raises for damage, for a compression it does not know, and for offsets before the start.
        raise UserError(f"{path}: the zip cannot be unpacked ({str(error)[:120]}); zip it again") from error
    if not files:
        raise UserError(f"{path}: the zip holds no .txt or .json file")
    return files


def _only_json(files: Mapping[str, bytes]) -> bool:
    return len(files) == 1 and next(iter(files)).lower().endswith(".json")


@dataclass(frozen=True)
class _Line:
    where: str
    name: str
    numbers: list[float]
    text: str | None


_LEADING = re.compile(r"(?:\s*[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?\s*(?:,|$))*")
_NOT_FINITE = re.compile(r"[-+]?(?:nan|inf(?:inity)?)\s*,", re.IGNORECASE)
_MARK = ",####"
_ENOUGH = 10
"""Lines that must agree on the number of coordinates before numbers after it are taken for text ("1,000,000")."""
_MLT_SCRIPT = re.compile(r"(Arabic|Latin|Chinese|Japanese|Korean|Bangla|Hindi|Symbols|Mixed|None),(.*)", re.DOTALL)
_RCTW = re.compile(r'([01]),(".*")', re.DOTALL)


def _lines(path: str, files: Mapping[str, bytes]) -> Iterator[tuple[str, int, str]]:
    """(file name, line number, stripped line) of all lines that are not blank."""
    for name, data in files.items():
        try:
            text = data.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise UserError(f"{path}: {name}: not UTF-8 text (byte {error.start}); save it as UTF-8") from None
        # Not splitlines(): a transcription may hold other characters that Unicode takes for line ends.
        for number, line in enumerate(text.split("\n"), start=1):
            line = line.strip()
            if line:
                yield name, number, line


def _text_results(path: str, files: Mapping[str, bytes], faults: _Faults) -> Source:
    rows: list[tuple[str, int, list[float]]] = []
    marked = 0
    for name, number, line in _lines(path, files):
        mark = line.find(_MARK)
        if mark >= 0:
            line, marked = line[:mark], marked + 1
        try:
            values = list(map(float, line.rstrip(",").split(",")))
            if "_" in line:  # Python reads 1_000 as a number.
                raise ValueError
        except ValueError:
            faults.add(f"{path}: {name} line {number}", f"{line[:60]!r} is not x1,y1,x2,y2,...[,confidence]")
            continue
        rows.append((name, number, values))

    # A confidence is the last number of an odd count; one file set has it everywhere or nowhere.
    odd = sum(len(values) % 2 for _, _, values in rows)
    confident = odd > len(rows) / 2 and all(0 <= values[-1] <= 1 for _, _, values in rows if len(values) % 2)
    offsets = not confident and bool(rows) and all(_is_ctw_v1(values) for _, _, values in rows)
    images = {name: Found(name, [], np.zeros(0)) for name in files}
    scores: dict[str, list[float]] = {name: [] for name in files}
    for name, number, values in rows:
        score = 1.0
        try:
            if confident:
                if len(values) % 2 == 0:
                    raise ValueError(f"{len(values)} numbers; the other lines end in a confidence, this one does not")
                score = values.pop()
            elif len(values) % 2:
                raise ValueError(f"{len(values)} numbers, an odd count; a confidence at the end must lie in 0-1")
            polygon = ring(_from_offsets(values) if offsets else values)
        except ValueError as error:
            faults.add(f"{path}: {name} line {number}", str(error))
            continue
        images[name].polygons.append(polygon)
        scores[name].append(score)
    for name, image in images.items():
        image.scores = np.array(scores[name], np.float64)
    kind = "text files, CTW1500 v1 offsets" if offsets else "text files"
    kind += " with confidence" if confident else ", no confidence (1 is taken)"
    return Source(path, kind + (", #### marks" if marked else ""), list(images.values()))


def _is_ctw_v1(values: Sequence[float]) -> bool:
    """xmin, ymin, xmax, ymax and 14 offsets from the first corner that fill just this box."""
    if len(values) != 32 or not all(map(math.isfinite, values)):
        return False
    box, xs, ys = values[:4], values[4::2], values[5::2]
    width, height = box[2] - box[0], box[3] - box[1]
    return (
        width > 0
        and height > 0
        and abs(min(xs)) <= 2
        and abs(min(ys)) <= 2
        and abs(max(xs) - width) <= 2
        and abs(max(ys) - height) <= 2
    )


def _from_offsets(values: Sequence[float]) -> list[float]:
    return [value + values[k % 2] for k, value in enumerate(values[4:])]


# --------------------------------------------------------------------------------------------------------------- truths


def read_truth(
    path: str,
    *,
    format_name: str | None = None,
    split: str = "test",
    skip_bad: bool = False,
    hash_is_dont_care: bool = False,
) -> Source:
    """Truth of any format above. Errors as `read_results`.

    format_name: an importer's data set ('totaltext', 'mlt', ...) whose source `path` is; None: recognised by content.
    split: which part of that data set, 'train' or 'test'.
    hash_is_dont_care: the transcription '#' marks don't-care besides '###', as in Total-Text.
    """
    faults = _Faults(skip_bad)
    if format_name is not None:
        source = _imported(path, format_name, split, faults)
    elif _is_table(path):
        source = _coco_truth(path, skip_bad)
    else:
        files = _text_files(path)
        if files is None or _only_json(files):
            label, data = (path, storage.read_bytes(path)) if files is None else next(iter(files.items()))
            source = _json_truth(path, label, data, faults)
        else:
            source = _text_truth(path, files, faults)
    if hash_is_dont_care:
        for image in source.images:
            image.ignore = [i or _bare(text) == "#" for i, text in zip(image.ignore, image.texts)]
    source.left_out = faults.lines
    if not source.images:
        raise UserError(f"{path}: holds no image; check the path")
    return source


def _bare(text: str | None) -> str:
    """A transcription without blanks around it and one pair of double quotes."""
    text = (text or "").strip()
    return text[1:-1].strip() if len(text) >= 2 and text[0] == text[-1] == '"' else text


def _imported(path: str, format_name: str, split: str, faults: _Faults) -> Source:
    try:
        from i3cl.data.importers.registry import read_labels
    except ImportError:
        raise UserError(f"--truth-format {format_name}: this installation has no importers") from None

    images = []
    for record in read_labels(format_name, path, split, faults.lines if faults.skip else None):
        if record.instances is None:
            faults.add(f"{path}: {record.file_name}", "has no labels, so it is no truth")
            continue
        image = _empty_truth(record.file_name)
        image.file_name = record.file_name
        for instance in record.instances:
            points = np.asarray(instance.polygon, np.float64).reshape(-1, 2)
            if not (np.abs(points) <= MAX_SIDE).all():
                faults.add(f"{path}: {record.file_name}", "a coordinate is not finite or beyond any image")
                continue
            _append(image, points, bool(instance.ignore), instance.text, instance.language)
        images.append(image)
    return Source(path, f"importer {format_name} {split}", images)


def _empty_truth(name: str) -> Truth:
    return Truth(name, [], [], [], [])


def _append(image: Truth, polygon: Ring, ignore: bool, text: str | None, language: str | None) -> None:
    image.polygons.append(polygon)
    image.ignore.append(ignore)
    image.texts.append(text)
    image.languages.append(language)


def truth_of_record(record: Any) -> Truth:
    """The truth of one `i3cl.data.formats.coco.ImageRecord`."""
    image = _empty_truth(record.file_name)
    image.id, image.height, image.width, image.file_name = record.id, record.height, record.width, record.file_name
    for i in record.instances:
        _append(image, np.asarray(i.polygon, np.float64), i.ignore or _bare(i.text) == "###", i.text, i.language)
    return image


def _coco_truth(path: str, skip_bad: bool) -> Source:
    from i3cl.data.formats.coco import read_coco

    data = read_coco(path, "", skip_bad=skip_bad, check_files=False)
    warnings = [data.summary()] if data.problems else []
    return Source(path, "COCO", [truth_of_record(record) for record in data.records], warnings=warnings)


def _json_truth(path: str, label: str, data: bytes, faults: _Faults) -> Source:
    content = _json(label, data)
    if isinstance(content, dict) and "images" in content:
        return _coco_truth(path, faults.skip)
    if not isinstance(content, dict) or not all(isinstance(value, list) for value in content.values()):
        raise UserError(f"{path}: neither a COCO data set nor ArT/LSVT labels (gt_N: [...]); name it with --truth-format")
    images = []
    for key, entries in content.items():
        image = _empty_truth(key)
        for position, entry in enumerate(entries):
            try:
                if not isinstance(entry, dict) or "points" not in entry:
                    raise ValueError("has no points; weak labels without places are no truth for detection")
                polygon = ring(entry["points"])
            except ValueError as error:
                faults.add(f"{path}: {key}: instance {position + 1}", str(error))
                continue
            text, language = entry.get("transcription"), entry.get("language")
            text = text if isinstance(text, str) else None
            ignore = bool(entry.get("illegibility")) or _bare(text) == "###"
            _append(image, polygon, ignore, text, language if isinstance(language, str) else None)
        images.append(image)
    return Source(path, "ArT/LSVT labels", images)


def _text_truth(path: str, files: Mapping[str, bytes], faults: _Faults) -> Source:
    lines = list(_text_truth_lines(path, files, faults))
    images = {name: _empty_truth(name) for name in files}
    texts = [line.text for line in lines if line.text is not None]
    mlt, rctw = (bool(texts) and all(form.fullmatch(t) for t in texts) for form in (_MLT_SCRIPT, _RCTW))
    rule = _MLT_SCRIPT if mlt else _RCTW if rctw else None
    offsets = not texts and bool(lines) and all(_is_ctw_v1(line.numbers) for line in lines)
    for line in lines:
        text, language, ignore = line.text, None, False
        parts = rule.fullmatch(text) if rule is not None and text is not None else None
        if parts is not None and mlt:
            language, text = parts.groups()
        elif parts is not None:
            ignore, text = parts[1] != "0", parts[2]
        try:
            polygon = ring(_from_offsets(line.numbers) if offsets else line.numbers)
        except ValueError as error:
            faults.add(line.where, str(error))
            continue
        _append(images[line.name], polygon, ignore or _bare(text) == "###", text, language)
    kind = "text files" + (", CTW1500 v1 offsets" if offsets else "" if texts else " without transcriptions")
    return Source(path, kind + (" (MLT)" if mlt else " (RCTW)" if rctw else ""), list(images.values()))


def _text_truth_lines(path: str, files: Mapping[str, bytes], faults: _Faults) -> Iterator[_Line]:
    """Lines cut before their transcription, which may itself hold commas and numbers."""
    cut: list[tuple[str, str, list[str], str | None]] = []
    marked: set[str] = set()
    for name, number, line in _lines(path, files):
        where = f"{path}: {name} line {number}"
        if line.startswith("x:"):
            raise UserError(f"{where}: Total-Text's own labels; name them with --truth-format totaltext")
        mark = line.find(_MARK)
        if mark >= 0:
            marked.add(where)
            cut.append((where, name, line[:mark].split(","), line[mark + len(_MARK) :]))
            continue
        leading = _LEADING.match(line)
        assert leading is not None, "the pattern matches the empty text"
        head, tail = leading[0], line[leading.end() :]
        fields = head.rstrip(",").split(",") if head else []
        # A text may be empty: `...,` ends in a comma.
        cut.append((where, name, fields, tail if tail or head.endswith(",") else None))
    # Lines whose text does not begin with a number say how many coordinates there are, where all say the same.
    lengths = Counter(len(fields) for _, _, fields, rest in cut if rest is not None and len(fields) % 2 == 0)
    common = next(iter(lengths)) if len(lengths) == 1 else 0
    sure = common > 0 and lengths[common] >= _ENOUGH
    if cut and all(rest is not None and rest.startswith('"') and len(fields) == 9 for _, _, fields, rest in cut):
        common, sure = 8, True  # RCTW: four corners, whether it is difficult, and the text in quotes
    for where, name, fields, rest in cut:
        count = len(fields)
        if where in marked:
            pass  # nothing before the mark is text
        elif (sure and count > common) or (rest is not None and count == common + 1):
            count = common
        elif rest is None and count % 2:
            count -= 1  # the text is a number
        words = [*fields[count:], *([rest] if rest is not None else [])]
        text = ",".join(words) if words else None
        if text is not None and _NOT_FINITE.match(text):
            faults.add(where, f"a coordinate is not finite ({text[:20]!r})")
            continue
        yield from _line(where, name, fields[:count], text, faults)


def _line(where: str, name: str, fields: list[str], text: str | None, faults: _Faults) -> Iterator[_Line]:
    try:
        numbers = [float(value) for value in fields]
        if len(numbers) % 2 or len(numbers) < 6:
            raise ValueError
    except ValueError:
        message = f"{len(fields)} coordinates before the text; it needs x1,y1,x2,y2,... of at least 3 points, then the text"
        faults.add(where, message)
        return
    yield _Line(where, name, numbers, text)


# ------------------------------------------------------------------------------------------------- truths with results


@dataclass(frozen=True)
class Paired:
    samples: list[Sample]
    """In the order of the truth."""
    missing: list[str]
    """Truth images that the results do not name; they count as empty."""
    how: str
    """What tied the images together."""
    found: list[Found | None]
    """The results of each sample."""


_PREFIX = re.compile(r"^(?:task\d+_|res_|gt_|poly_|det_)+(?=.)")


def _stem(name: str) -> str:
    base = name.replace("\\", "/").rsplit("/", 1)[-1]
    return re.sub(r"\.(?:txt|jpe?g|png|json|xml|mat|bmp|tiff?|webp|gif)$", "", base, flags=re.IGNORECASE)


def _short(name: str) -> str:
    return _PREFIX.sub("", _stem(name))


def image_number(name: str) -> int | None:
    """The last number in an image's name: 7 of 'train/gt_007.jpg'."""
    numbers = re.findall(r"\d+", _stem(name))
    return int(numbers[-1]) if numbers and len(numbers[-1]) < 18 else None


def pair(truth: Source, results: Source, *, unknown: Literal["error", "ignore"] = "error") -> Paired:
    """Ties every result to its truth image. UserError for results of images that the truth does not have.

    By COCO image id where both have one, else by file name, else by name without folder, extension and the prefixes gt_, res_,
    poly_gt_, task1_, else by the number in the name: the first of these that leaves no result over.
    """
    ways: list[tuple[str, Callable[[Any], Any]]] = []
    if all(t.id is not None for t in truth.images) and all(f.id is not None for f in results.images):
        ways.append(("image id", lambda image: image.id))
    if results.format != "COCO results":
        ways.append(("file name", lambda image: image.name.rsplit(".", 1)[0]))
        ways.append(("name without prefix and extension", lambda image: _short(image.name)))
    ways.append(("number in the name", lambda image: image_number(image.name)))
    best: tuple[int, str, dict[Any, Truth], dict[Any, Found]] | None = None
    for how, key in ways:
        truths = {key(image): image for image in truth.images}
        found = {key(image): image for image in results.images}
        if len(truths) != len(truth.images) or len(found) != len(results.images) or None in truths:
            continue
        strangers = sum(k not in truths for k in found)
        if best is None or strangers < best[0]:
            best = (strangers, how, truths, found)
        if strangers == 0:
            break
    if best is None:
        stems = (Counter(_stem(image.name) for image in images) for images in (truth.images, results.images))
        twice = [name for counted in stems for name, count in counted.items() if count > 1]
        raise UserError(
            f"{results.path}: images cannot be told apart by name or number"
            + (f" ({twice[0]} occurs twice)" if twice else "")
            + "; give the results the truth's file names"
        )
    strangers, how, truths, found = best
    if strangers and unknown == "error":
        names = [image.name for key, image in found.items() if key not in truths]
        raise UserError(
            f"{results.path}: {strangers} of {len(found)} results are of images that the truth does not have "
            f"({', '.join(names[:3])}{', ...' if strangers > 3 else ''}){_shift_hint(truth, results)}; remove or rename them"
        )
    samples: list[Sample] = []
    missing: list[str] = []
    partners: list[Found | None] = []
    for key, image in truths.items():
        partner = found.get(key)
        if partner is None:
            missing.append(image.name)
        partners.append(partner)
        samples.append(sample_of(image, partner))
    return Paired(samples, missing, how, partners)


def _shift_hint(truth: Source, results: Source) -> str:
    known = {image_number(image.name) if image.id is None else image.id for image in truth.images}
    given = [image_number(image.name) if image.id is None else image.id for image in results.images]
    shifts = {shift: sum(n is not None and n + shift in known for n in given) for shift in (1, -1)}
    shift, hits = max(shifts.items(), key=lambda item: item[1])
    now = sum(n in known for n in given)
    if hits > now and hits == len(given):
        return f": the numbers look shifted, {shift:+d} would fit them all"
    return ""


def sample_of(truth: Truth, found: Found | None) -> Sample:
    """Truth and detections of one image."""
    return Sample(
        truth.name,
        truth.polygons,
        np.array(truth.ignore, bool),
        found.polygons if found else [],
        found.scores if found else np.zeros(0),
        truth.texts,
        truth.languages,
        truth.height,
        truth.width,
        truth.file_name,
    )


def read_images_of(path: str) -> set[str]:
    """Image names of a list file: one a line, compared without folder, prefix and extension."""
    return {_short(line.strip()) for line in storage.read_text(path).splitlines() if line.strip()}


def named(samples: Iterable[Sample], names: set[str]) -> list[bool]:
    """Whether each sample is on such a list."""
    return [_short(sample.name) in names for sample in samples]

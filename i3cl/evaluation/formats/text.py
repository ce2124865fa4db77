"""Text files, one per image: `x1,y1,...,text` as truth, `x1,y1,...[,confidence]` as results.

How many numbers of a line are coordinates is decided once, over all lines of a set, and said in `PolygonSet.format`: a line
alone cannot tell the corner 5,99 from the price 5,99.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import cv2
import numpy as np

from i3cl.data.formats.checks import BadItem, Faults
from i3cl.data.importers import parse
from i3cl.errors import UserError
from i3cl.evaluation.formats.sets import ImageDetections, ImageTruth, PolygonSet, numbers, ring
from i3cl.geometry import polygon_area

_MARK = ",####"
"""Stands between coordinates and text in the files of CTW1500 and in many copies of other sets."""
_QUADRILATERAL = 8
_WHOLE = 0.7
"""Share of its smallest rotated rectangle that a word's quadrilateral fills. The first four corners of a longer outline run
along one of its sides and fill at most about half."""
_FAR = 2.0
"""Diagonals of the first corners' box; a last corner further away does not belong to the same word."""
_SCRIPTS = ("Arabic", "Latin", "Chinese", "Japanese", "Korean", "Bangla", "Hindi", "Symbols", "Mixed", "None")


# ---------------------------------------------------------------------------------------------------------------- results


def text_results(path: str, files: Mapping[str, bytes], faults: Faults) -> PolygonSet[ImageDetections]:
    """Detections; the score is 1 where the set has no confidences."""
    rows: list[tuple[str, str, list[float]]] = []
    marked = False
    for name, where, line in _lines(path, files):
        line, mark, _ = line.partition(_MARK)
        marked |= bool(mark)
        try:
            rows.append((name, where, numbers(line.rstrip(",").split(","))))
        except BadItem as error:
            faults.bad(where, BadItem(error.kind, f"not x1,y1,x2,y2,...[,confidence]: {error.message}"))

    # A confidence is the last number of an odd count; one set has it everywhere or nowhere.
    odd = sum(len(values) % 2 for _, _, values in rows)
    confident = odd > len(rows) / 2 and all(0 <= values[-1] <= 1 for _, _, values in rows if len(values) % 2)
    offsets = not confident and bool(rows) and all(_is_ctw_v1(values) for _, _, values in rows)
    images = {name: ImageDetections(name, [], np.zeros(0)) for name in files}
    scores: dict[str, list[float]] = {name: [] for name in files}
    sizes = []
    for name, where, values in rows:
        score = 1.0
        try:
            if confident:
                if len(values) % 2 == 0:
                    message = f"{len(values)} numbers; the other lines end in a confidence, this one does not; add it"
                    raise BadItem("polygon", message)
                score = values.pop()
            elif len(values) % 2:
                message = f"{len(values)} numbers, an odd count; a confidence at the end must lie in 0-1; correct it"
                raise BadItem("polygon", message)
            polygon = ring(_from_offsets(values) if offsets else values)
        except BadItem as error:
            faults.bad(where, error)
            continue
        images[name].polygons.append(polygon)
        scores[name].append(score)
        sizes.append(len(polygon))
    for name, image in images.items():
        image.scores = np.array(scores[name], np.float64)
    kind = "text files, CTW1500 v1 offsets" if offsets else f"text files, {_points(sizes)}"
    kind += ", then a confidence" if confident else ", no confidence (1 is taken)"
    return PolygonSet(path, kind + (", #### marks" if marked else ""), list(images.values()))


# ------------------------------------------------------------------------------------------------------------------ truth


@dataclass(frozen=True)
class _Line:
    """A line of truth: the numbers that it begins with, and what follows them."""

    name: str
    where: str
    head: list[str]
    """Number tokens."""
    rest: str | None
    """The text after them; None when the line ends with its numbers."""
    marked: bool = False
    """A mark separates coordinates and text, so nothing has to be decided."""

    @property
    def count(self) -> int:
        return len(self.head)

    def cut(self, count: int) -> tuple[list[str], str | None]:
        """The first `count` numbers, and all the rest as the text; None when there is none."""
        words = [*self.head[count:], *([] if self.rest is None else [self.rest])]
        return self.head[:count], ",".join(words) if words else None

    def corners(self, count: int) -> np.ndarray:
        """(count / 2, 2) the points of the first `count` numbers."""
        return np.array([float(token) for token in self.head[:count]], np.float32).reshape(-1, 2)


def text_truth(path: str, files: Mapping[str, bytes], faults: Faults) -> PolygonSet[ImageTruth]:
    """Truth in the forms of ICDAR, Total-Text, CTW1500, MLT and RCTW; don't-care are `###` and RCTW's difficult lines."""
    lines = [_cut(name, where, line) for name, where, line in _lines(path, files)]
    images = {name: ImageTruth(name) for name in files}
    plain = [line for line in lines if not line.marked]
    offsets = bool(lines) and all(not line.marked and line.rest is None and _is_offset_line(line) for line in lines)
    columns = _decide(plain)
    mlt = bool(lines) and all(_is_mlt(line) for line in lines)
    rctw = bool(lines) and all(_is_rctw(line) for line in lines)
    if mlt or rctw:
        columns = _Columns(_QUADRILATERAL, bool(lines))
    sizes = []
    for line in lines:
        try:
            fields, text = line.cut(line.count) if line.marked or offsets else columns.cut(line)
            values = numbers(fields)
            polygon = ring(_from_offsets(values) if offsets else _at_least_three(values))
        except BadItem as error:
            faults.bad(line.where, error)
            continue
        ignore, language = False, None
        if mlt and text is not None:
            language, _, text = text.partition(",")
            language = language.strip()
        elif rctw and text is not None:
            difficult, _, text = text.partition(",")
            ignore = difficult.strip() != "0"
        images[line.name].add(polygon, ignore, text, language)
        sizes.append(len(polygon))
    kind = "text files, CTW1500 v1 offsets" if offsets else f"text files, {_points(sizes)}"
    if not offsets:
        texts = any(text is not None for image in images.values() for text in image.texts)
        kind += ", then the text" if texts else ", no transcriptions"
    kind += " (MLT)" if mlt else " (RCTW)" if rctw else ""
    numeric = 0 if mlt or rctw or offsets else columns.numeric_texts(plain)
    return PolygonSet(path, kind + (f"; {numeric} texts begin with numbers" if numeric else ""), list(images.values()))


def _cut(name: str, where: str, line: str) -> _Line:
    if line.startswith("x:"):
        raise UserError(f"{where}: Total-Text's own labels; name them with --truth-format totaltext")
    head, mark, text = line.partition(_MARK)
    if mark:
        return _Line(name, where, head.split(","), text, marked=True)
    fields = line.split(",")
    count = next((k for k, field in enumerate(fields) if not parse.is_number(field)), len(fields))
    return _Line(name, where, fields[:count], ",".join(fields[count:]) if count < len(fields) else None)


@dataclass(frozen=True)
class _Columns:
    """How many numbers at the beginning of each line of a set are coordinates."""

    fixed: int | None
    """So many in every line; None: the lines differ, and all leading numbers of a line are coordinates."""
    texts: bool
    """Lines end in a transcription."""

    def cut(self, line: _Line) -> tuple[list[str], str | None]:
        """The coordinates of an unmarked line and its text. BadItem where the set's rule does not fit it."""
        count = line.count
        if self.fixed is not None:
            if count < self.fixed:
                _refuse_not_finite(line)
                message = f"{count} coordinates before the text where the set has {self.fixed}; correct it"
                raise BadItem("polygon", message)
            return line.cut(self.fixed)
        if self.texts and line.rest is None:
            if count % 2 == 0:
                raise BadItem("polygon", f"cannot tell coordinates from text in {count} numbers; write ####TEXT after them")
            return line.cut(count - 1)
        _refuse_not_finite(line)
        if count > _QUADRILATERAL and _looks_like_text(line):
            message = "the last numbers before the text lie far from the first corner; write ####TEXT after the coordinates"
            raise BadItem("polygon", message)
        return line.cut(count)

    def numeric_texts(self, lines: Iterable[_Line]) -> int:
        """Lines whose text begins with a number."""
        return 0 if self.fixed is None else sum(line.count > self.fixed for line in lines)


def _decide(lines: Sequence[_Line]) -> _Columns:
    """The columns of a set of unmarked lines."""
    votes = Counter(line.count for line in lines if line.rest is not None and line.count % 2 == 0 and line.count >= 6)
    if not votes:
        # Every text is a number, so that each line has an odd count; or there are no texts at all.
        votes = Counter(line.count - 1 for line in lines if line.count % 2 and line.count >= 7)
    if not votes:
        return _Columns(None, texts=any(line.rest is not None for line in lines))
    quadrilaterals = votes[_QUADRILATERAL]
    if quadrilaterals and (min(votes) == _QUADRILATERAL or quadrilaterals > votes.total() / 2):
        usual = _QUADRILATERAL
        longer = [line for line in lines if line.count >= usual + 2]
        shapes = [_filled(line.corners(usual)) for line in longer]
        fixed = float(np.median(shapes)) >= _WHOLE if shapes else min(votes) == usual
    else:
        usual = max(votes, key=lambda count: (votes[count], -count))
        longer = [line for line in lines if line.count >= usual + 2]
        fixed = min(votes) == usual and len(longer) < len(lines) / 2
    return _Columns(usual if fixed else None, texts=True)


def _filled(corners: np.ndarray) -> float:
    """Share of the smallest rotated rectangle that a ring fills, 0-1."""
    width, height = cv2.minAreaRect(corners)[1]
    return polygon_area(corners) / (width * height) if width * height > 0 else 0.0


def _looks_like_text(line: _Line) -> bool:
    """Whether the first four corners are a word of their own and the last one, which an outline has beside the first, is far."""
    if _filled(line.corners(_QUADRILATERAL)) < _WHOLE:
        return False
    first, last = line.corners(_QUADRILATERAL), line.corners(line.count // 2 * 2)[-1]
    low, high = first.min(axis=0), first.max(axis=0)
    away = np.maximum(np.maximum(low - last, last - high), 0)
    return float(np.linalg.norm(away)) > _FAR * max(float(np.linalg.norm(high - low)), 1.0)


def _refuse_not_finite(line: _Line) -> None:
    word = (line.rest or "").partition(",")
    if word[1] and word[0].strip().lstrip("+-").lower() in ("nan", "inf", "infinity"):
        raise BadItem("coordinates", f"a coordinate is not finite ({word[0].strip()}); correct it")


def _at_least_three(values: list[float]) -> list[float]:
    if len(values) % 2 or len(values) < 6:
        message = f"{len(values)} coordinates before the text; it needs x1,y1,x2,y2,... of at least 3 points, then the text"
        raise BadItem("polygon", message)
    return values


def _is_mlt(line: _Line) -> bool:
    """x1,y1,...,x4,y4,script,text."""
    script, comma, _ = (line.rest or "").partition(",")
    return not line.marked and line.count == _QUADRILATERAL and bool(comma) and script.strip() in _SCRIPTS


def _is_rctw(line: _Line) -> bool:
    """x1,y1,...,x4,y4,difficult,"text"."""
    quoted = (line.rest or "").strip()
    is_flag = line.count == _QUADRILATERAL + 1 and line.head[-1].strip() in ("0", "1")
    return not line.marked and is_flag and len(quoted) >= 2 and quoted[0] == quoted[-1] == '"'


# ----------------------------------------------------------------------------------------------------------------- both


def _lines(path: str, files: Mapping[str, bytes]) -> Iterator[tuple[str, str, str]]:
    """(file name, place, stripped line) of all lines that are not blank."""
    for name, data in files.items():
        for where, line in parse.lines(data, f"{path}: {name}"):
            yield name, where, line.strip()


def _points(sizes: Sequence[int]) -> str:
    """'4 points a line', '4-14 points a line'."""
    if not sizes:
        return "no polygon"
    low, high = min(sizes), max(sizes)
    return f"{low} points a line" if low == high else f"{low}-{high} points a line"


def _is_offset_line(line: _Line) -> bool:
    return line.count == 32 and _is_ctw_v1([float(token) for token in line.head])


def _is_ctw_v1(values: Sequence[float]) -> bool:
    """Whether these are xmin, ymin, xmax, ymax and 14 offsets from the first corner that fill just this box."""
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

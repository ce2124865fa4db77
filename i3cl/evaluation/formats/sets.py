"""What every format becomes: the truth or the detections of many images, and checked polygons and scores."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

from i3cl.data.formats.checks import MAX_SIDE, BadItem, shown
from i3cl.data.importers import parse
from i3cl.data.importers.base import dont_care

PointOrder = Literal["xy", "yx"]
Ring = NDArray[np.float64]
"""(P, 2) pixels, P >= 3."""


@dataclass(eq=False)
class ImageDetections:
    """One image's detections."""

    name: str
    polygons: list[Ring]
    """M polygons."""
    scores: NDArray[np.float64]
    """(M,) 0-1."""
    id: int | None = None
    """COCO image id, where the format has one."""
    height: int | None = None
    """Pixels of the image that was searched, where the format says so."""
    width: int | None = None
    masks: list[Any] | None = None
    """M COCO RLE masks, None where an entry has a polygon; None for formats without masks."""


@dataclass(eq=False)
class ImageTruth:
    """One image's truth."""

    name: str
    polygons: list[Ring] = field(default_factory=list)
    ignore: list[bool] = field(default_factory=list)
    texts: list[str | None] = field(default_factory=list)
    languages: list[str | None] = field(default_factory=list)
    id: int | None = None
    height: int | None = None
    width: int | None = None
    file_name: str | None = None

    def add(self, polygon: Ring, ignore: bool, text: str | None, language: str | None) -> None:
        """Adds one instance; a text that marks don't-care makes it one."""
        self.polygons.append(polygon)
        self.ignore.append(ignore or dont_care(text))
        self.texts.append(text)
        self.languages.append(language)

    def spare_hashes(self) -> None:
        """Make don't-care of what is transcribed as '#', as Total-Text does."""
        self.ignore = [i or parse.unquoted(text or "").strip() == "#" for i, text in zip(self.ignore, self.texts)]


Image = TypeVar("Image", ImageTruth, ImageDetections)


@dataclass(eq=False)
class PolygonSet(Generic[Image]):
    """The images that were read from one path, and what there is to say about it."""

    path: str
    format: str
    """How it was understood, in words."""
    images: list[Image]
    left_out: list[str] = field(default_factory=list)
    """One line for each fault that was skipped."""
    warnings: list[str] = field(default_factory=list)


def numbers(tokens: Sequence[str]) -> list[float]:
    """The values of plain decimal numbers. BadItem names the first token that is something else."""
    for token in tokens:
        if not parse.is_number(token):
            raise BadItem("type", f"{shown(token)} is not a number; correct it")
    return [float(token) for token in tokens]


def ring(points: Any) -> Ring:
    """A polygon from nested or flat numbers. BadItem names the fault: too few, odd, not finite, huge, not numbers."""
    try:
        array = np.asarray(points)
        if array.dtype.kind not in "iuf":
            raise ValueError
        array = array.astype(np.float64)
    except (TypeError, ValueError, OverflowError):
        raise BadItem("type", "points are not numbers x, y; correct them") from None
    # Three dimensions are several rings, which would become one.
    if sum(count > 1 for count in array.shape[:-1]) > 1:
        raise BadItem("polygon", "points are several lists of points; write one polygon")
    if array.ndim == 2 and array.shape[1] != 2:
        raise BadItem("polygon", "points are not x, y pairs; correct them")
    if array.size == 4:
        raise BadItem(
            "polygon",
            "4 numbers, so a box and not a polygon; write its four corners x1,y1,x2,y1,x2,y2,x1,y2, because nothing tells "
            "x, y, width, height from two corners",
        )
    if array.size % 2:
        raise BadItem("polygon", f"{array.size} coordinates, an odd number; correct them")
    if array.size < 6:
        raise BadItem("polygon", f"a polygon of {array.size // 2} points; it needs at least 3")
    # Written so that NaN fails too.
    if not (np.abs(array) <= MAX_SIDE).all():
        raise BadItem("coordinates", "a coordinate is not finite or beyond any image; correct it")
    return array.reshape(-1, 2)


def score_of(value: Any) -> float:
    """A score as a float. BadItem unless it is a number from 0 to 1."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
        raise BadItem("score", f"score is {shown(value)}; write a number from 0 to 1")
    return float(value)

"""Tiles of a large image, and what was found in them joined to one list of words.

Two polygons of different tiles are the same word when they agree where both tiles see. Tiles overlap, so a word that is not
longer than the overlap is whole in at least one of them, and its other pieces are dropped. The pieces of a longer word are
united.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import shapely
from numpy.typing import NDArray

from i3cl.geometry import boxes_of, largest_ring, simplify, to_shapely

_AGREE = 0.4
"""IoU, where both tiles see, from which two polygons are the same word."""
_INSIDE = 0.9
"""A piece with at least this share of its area inside another tile shows nothing that the other tile does not see."""
_COVERED = 0.7
"""A cut piece with at least this share of its area under another tile's polygon is a piece of that word."""


@dataclass(frozen=True)
class Tile:
    """A rectangle of an image, in pixels; the right and bottom edges are exclusive."""

    x0: int
    y0: int
    x1: int
    y1: int

    def cut(self, image: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """This part of the image (H, W, 3), as a view: no pixel is copied."""
        return image[self.y0 : self.y1, self.x0 : self.x1]


def tiles_of(height: int, width: int, side: int, overlap: int) -> list[Tile]:
    """Tiles that cover an image, row by row: squares of `side` pixels, or as long as the image where that is shorter.

    Neighbours share at least `overlap` pixels, which is less than `side`; tiles are spread evenly, so most share a little more.
    """
    rows, columns = _starts(height, side, overlap), _starts(width, side, overlap)
    return [Tile(x, y, min(x + side, width), min(y + side, height)) for y in rows for x in columns]


def _starts(length: int, side: int, overlap: int) -> list[int]:
    gaps = -(-max(0, length - side) // (side - overlap))
    return [k * (length - side) // gaps for k in range(gaps + 1)] if gaps else [0]


@dataclass(frozen=True)
class Found:
    """What was found in one tile."""

    tile: Tile
    polygons: Sequence[NDArray[np.float32]]
    """N arrays (K, 2) of x, y in pixels of the whole image."""
    scores: NDArray[np.float32]
    """(N,), 0-1."""


def join(found: Sequence[Found], height: int, width: int) -> tuple[list[NDArray[np.float32]], NDArray[np.float32]]:
    """Every word once, and whole, from what was found in the tiles of an image of height x width pixels.

    Returns:
        The polygons, each (K, 2) float32 in pixels of the image, and their scores (N,) float32. A word that had to be united has
        the mean score of its pieces, weighted by area.
    """
    polygons = [polygon for each in found for polygon in each.polygons]
    if not polygons:
        return [], np.zeros(0, np.float32)
    scores = np.concatenate([each.scores for each in found]).astype(np.float32)
    tile = np.repeat(np.arange(len(found)), [len(each.polygons) for each in found])
    frames = np.array([[each.tile.x0, each.tile.y0, each.tile.x1, each.tile.y1] for each in found], np.float64)[tile]
    shapes = to_shapely(polygons)
    areas = shapely.area(shapes)
    # Outlines are only so exact, and end a little before a border that cuts them.
    margin = np.maximum(2.0, (frames[:, 2:] - frames[:, :2]).max(axis=1) / 100)
    cut = _cut(boxes_of(polygons), frames, margin[:, None], height, width)
    pairs = _Pairs(shapes, areas, tile, frames, margin)

    kept: set[int] = set()
    joined: dict[int, set[int]] = {}
    # Whole words first, the surest first; then pieces, the largest first.
    for i in np.lexsort((np.where(cut, -areas, -scores), cut)).tolist():
        links = [link for link in pairs.of(i) if link.other in kept]
        if any(_says_it_all(link, bool(cut[i]), bool(cut[link.other])) for link in links):
            continue
        kept.add(i)
        joined[i] = {link.other for link in links if link.agree >= _AGREE}
    words = [_united(group, polygons, shapes, areas, scores) for group in _groups(joined)]
    return [polygon for polygon, _ in words], np.array([score for _, score in words], np.float32)


def _cut(
    boxes: NDArray[np.float32], frames: NDArray[np.float64], margin: NDArray[np.float64], height: int, width: int
) -> NDArray[np.bool_]:
    """Whether each box comes within `margin` of a border of its tile at which the image goes on.

    A whole word that is taken for a piece does no harm: another tile has it too.
    """
    low = (boxes[:, :2] - frames[:, :2] < margin) & (frames[:, :2] > 0)
    high = (frames[:, 2:] - boxes[:, 2:] < margin) & (frames[:, 2:] < [width, height])
    return np.any(low | high, axis=1)


class _Link(NamedTuple):
    """What a polygon has to do with one of another tile."""

    other: int
    agree: float
    """IoU where both tiles see."""
    covered: float
    """Share of the polygon under the other one, grown by the margin ..."""
    inside: float
    """... and inside the other one's tile."""


def _says_it_all(link: _Link, cut: bool, other_cut: bool) -> bool:
    """Whether a polygon adds nothing to the one that it is linked to; two pieces that agree add to each other."""
    if link.inside < _INSIDE:
        return False
    if link.agree >= _AGREE:
        return not other_cut
    return cut and link.covered >= _COVERED


class _Pairs:
    """The pairs of polygons of different tiles that overlap."""

    def __init__(
        self,
        shapes: NDArray[np.object_],
        areas: NDArray[np.float64],
        tile: NDArray[np.int64],
        frames: NDArray[np.float64],
        margin: NDArray[np.float64],
    ) -> None:
        # Grown, because the outline of a long word may leave out all of a thin piece at its end.
        grown = shapely.buffer(shapes, margin, quad_segs=2)
        first, second = shapely.STRtree(grown).query(shapes)
        apart = tile[first] != tile[second]
        first, second = first[apart], second[apart]
        covered = shapely.area(shapely.intersection(shapes[first], grown[second])) / np.maximum(areas[first], 1e-9)
        touching = covered > 0
        first, second, covered = first[touching], second[touching], covered[touching]
        common = shapely.area(shapely.intersection(shapes[first], shapes[second]))
        windows = shapely.box(*frames.T)
        # The part of the first that the second's tile sees, and the other way round.
        seen = shapely.area(shapely.intersection(shapes[first], windows[second]))
        back = shapely.area(shapely.intersection(shapes[second], windows[first]))
        agree = common / np.maximum(seen + back - common, 1e-9)
        self._of: dict[int, list[_Link]] = {}
        columns = (first, second, agree, covered, seen / np.maximum(areas[first], 1e-9))
        for i, *rest in zip(*(column.tolist() for column in columns), strict=True):
            self._of.setdefault(i, []).append(_Link(*rest))

    def of(self, i: int) -> list[_Link]:
        """One link for every polygon that overlaps polygon i."""
        return self._of.get(i, [])


def _groups(joined: dict[int, set[int]]) -> list[list[int]]:
    """Connected components of the graph node -> nodes before it, sorted."""
    group: dict[int, list[int]] = {}
    for i, others in joined.items():
        members = [i, *{member for other in others for member in group[other]}]
        for member in members:
            group[member] = members
    return [sorted(members) for members in {id(members): members for members in group.values()}.values()]


def _united(
    members: Sequence[int],
    polygons: Sequence[NDArray[np.float32]],
    shapes: NDArray[np.object_],
    areas: NDArray[np.float64],
    scores: NDArray[np.float32],
) -> tuple[NDArray[np.float32], float]:
    """Polygon and score of one word."""
    best = max(members, key=lambda i: areas[i])
    if len(members) == 1:
        return polygons[best], float(scores[best])
    ring = largest_ring(shapely.union_all(shapes[members]))
    # The tolerance is a share of the perimeter, and a long word is thin: the usual tolerance would cut into it.
    outline = polygons[best] if ring is None else simplify(ring, 0.0005)
    return outline, float(np.average(scores[members], weights=areas[members]))

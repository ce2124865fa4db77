"""Polygons, boxes and masks: conversion, area, overlap, simplification, validity.

A polygon is an (N, 2) float array of x, y pixels, N >= 3, not closed (the first point is not repeated). x runs right and y runs
down; pixel (i, j) covers [i, i+1) x [j, j+1), and its centre is (i + 0.5, j + 0.5). Boxes are x0, y0, x1, y1; the right and
bottom edges are exclusive. This module imports nothing else of the package.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
import shapely
from numpy.typing import ArrayLike, NDArray

Polygon = NDArray[np.floating]


def as_polygon(points: ArrayLike) -> NDArray[np.float32]:
    """Make an (N, 2) float32 polygon from nested lists, flat [x0, y0, ...] lists or arrays.

    ValueError when N < 3 or a value is not finite.
    """
    array = np.asarray(points, dtype=np.float32)
    if array.size % 2:
        raise ValueError(f"a polygon needs x, y pairs, not {array.size} numbers")
    array = array.reshape(-1, 2)
    if len(array) < 3:
        raise ValueError(f"a polygon needs at least 3 points, not {len(array)}")
    if not np.isfinite(array).all():
        raise ValueError("a polygon has a coordinate that is not finite")
    return array


def polygon_area(polygon: Polygon) -> float:
    """Unsigned area in square pixels by the shoelace formula; self-intersecting rings may give less than they cover."""
    return abs(_signed_area(polygon))


def _signed_area(polygon: Polygon) -> float:
    """Positive when the ring runs clockwise as seen on screen."""
    # Relative to the first point, because far from the origin the products would lose precision.
    x, y = (np.asarray(polygon, np.float64) - polygon[0]).T
    return float(x[:-1] @ y[1:] - x[1:] @ y[:-1]) / 2


def polygon_box(polygon: Polygon) -> NDArray[np.float32]:
    """(4,) float32 x0, y0, x1, y1: the tight axis-aligned box."""
    return np.concatenate([polygon.min(axis=0), polygon.max(axis=0)]).astype(np.float32)


def boxes_of(polygons: Sequence[Polygon]) -> NDArray[np.float32]:
    """(N, 4) float32 boxes of N polygons; (0, 4) when there are none."""
    return np.stack([polygon_box(p) for p in polygons]) if len(polygons) else np.zeros((0, 4), np.float32)


def short_side(polygon: Polygon) -> float:
    """Shorter side, in pixels, of the smallest rotated rectangle around the polygon."""
    return float(min(cv2.minAreaRect(np.asarray(polygon, np.float32))[1]))


def clockwise(polygon: Polygon) -> Polygon:
    """Return the same ring in clockwise order as seen on screen (y down)."""
    return polygon if _signed_area(polygon) >= 0 else polygon[::-1]


def simplify(polygon: Polygon, tolerance: float = 0.005) -> NDArray[np.float32]:
    """Simplify the closed ring by Douglas-Peucker with epsilon = tolerance x perimeter.

    Returns the polygon itself when fewer than 3 points would remain.
    """
    ring = np.ascontiguousarray(polygon, np.float32)
    kept = np.asarray(cv2.approxPolyDP(ring, tolerance * cv2.arcLength(ring, True), True), np.float32).reshape(-1, 2)
    return kept if len(kept) >= 3 else ring


def to_shapely(polygons: Sequence[Polygon]) -> NDArray[np.object_]:
    """Make (N,) valid shapely geometries (a bow-tie becomes its parts); an empty geometry where nothing with area is left."""
    if not len(polygons):
        return np.empty(0, dtype=object)
    # One call for all rings: a loop over shapely.Polygon takes ten times as long.
    points = np.concatenate([np.asarray(polygon, np.float64) for polygon in polygons])
    owner = np.repeat(np.arange(len(polygons)), [len(polygon) for polygon in polygons])
    rings: NDArray[np.object_] = shapely.polygons(shapely.linearrings(points, indices=owner))
    invalid = ~shapely.is_valid(rings)
    if invalid.any():
        rings[invalid] = shapely.buffer(shapely.make_valid(rings[invalid]), 0)
    return rings


def largest_ring(geometry: shapely.Geometry) -> NDArray[np.float32] | None:
    """Return the outline of the largest polygon in a geometry, (N, 2) float32 without the closing point; None without area."""
    parts = [g for g in shapely.get_parts(geometry) if isinstance(g, shapely.Polygon) and g.area > 0]
    if not parts:
        return None
    ring = np.asarray(max(parts, key=lambda g: g.area).exterior.coords, dtype=np.float32)[:-1]
    return ring if len(ring) >= 3 else None


@dataclass(frozen=True)
class Overlaps:
    """The pairs of two polygon lists whose intersection has area; only these, because in a photograph few of N x M overlap."""

    first: NDArray[np.int64]
    """(K,) index into the first list, ascending; equal ones are sorted by `second`."""
    second: NDArray[np.int64]
    """(K,) index into the second list."""
    intersection: NDArray[np.float64]
    """(K,) square pixels."""
    area_first: NDArray[np.float64]
    """(N,) square pixels of the repaired polygons."""
    area_second: NDArray[np.float64]
    """(M,)."""

    @property
    def iou(self) -> NDArray[np.float64]:
        """(K,) intersection over union, 0-1."""
        union = self.area_first[self.first] + self.area_second[self.second] - self.intersection
        return self.intersection / np.maximum(union, 1e-12)

    def dense_intersection(self) -> NDArray[np.float64]:
        """(N, M) matrix of common areas in square pixels."""
        matrix = np.zeros((len(self.area_first), len(self.area_second)))
        matrix[self.first, self.second] = self.intersection
        return matrix

    def dense_iou(self) -> NDArray[np.float64]:
        """(N, M) matrix of IoU, zero where the polygons do not overlap."""
        matrix = np.zeros((len(self.area_first), len(self.area_second)))
        matrix[self.first, self.second] = self.iou
        return matrix


def overlaps(first: Sequence[Polygon], second: Sequence[Polygon]) -> Overlaps:
    """Intersect N with M polygons exactly; with an STRtree, the time grows with the overlapping pairs, not with N x M."""
    a, b = to_shapely(first), to_shapely(second)
    area_a = shapely.area(a) if len(a) else np.zeros(0)
    area_b = shapely.area(b) if len(b) else np.zeros(0)
    if len(a) and len(b):
        i, j = shapely.STRtree(b).query(a)
        order = np.lexsort((j, i))
        i, j = i[order], j[order]
        area = shapely.area(shapely.intersection(a[i], b[j]))
        touching = area > 0
        i, j, area = i[touching], j[touching], area[touching]
    else:
        i = j = np.zeros(0, np.int64)
        area = np.zeros(0)
    return Overlaps(i.astype(np.int64), j.astype(np.int64), area, area_a, area_b)


def clip_polygon(polygon: Polygon, width: float, height: float) -> NDArray[np.float32] | None:
    """Clip a polygon to [0, width] x [0, height]: the largest piece, (N, 2) float32; None when nothing with area is left.

    The result keeps the polygon's direction and starts at or near its first point, because these give the reading direction.
    """
    low, high = polygon.min(axis=0), polygon.max(axis=0)
    if low[0] >= 0 and low[1] >= 0 and high[0] <= width and high[1] <= height:
        return np.asarray(polygon, np.float32)
    ring = largest_ring(shapely.intersection(to_shapely([polygon])[0], shapely.box(0, 0, width, height)))
    if ring is None:
        return None
    if _signed_area(ring) * _signed_area(polygon) < 0:
        ring = ring[::-1]
    return np.roll(ring, -int(np.linalg.norm(ring - polygon[0], axis=1).argmin()), axis=0)


def mask_crop(polygon: Polygon, height: int, width: int) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Draw the polygon as a 0/1 bitmap of its own box.

    Returns the (h, w) uint8 crop and its (2,) int64 x, y origin. Pixels are set as pycocotools sets them: when their centre is
    inside. The box is limited to the image of `height` x `width` pixels and is at least 1 x 1.
    """
    # Here, so that the rest of the module works where pycocotools is not installed.
    from pycocotools import mask as mask_codec

    x0, y0 = np.clip(np.floor(polygon.min(axis=0)), 0, [width - 1, height - 1]).astype(np.int64)
    x1, y1 = np.clip(np.ceil(polygon.max(axis=0)), [x0 + 1, y0 + 1], [width, height]).astype(np.int64)
    ring = (np.asarray(polygon, np.float64) - [x0, y0]).ravel().tolist()
    crop = mask_codec.decode(mask_codec.frPyObjects([ring], int(y1 - y0), int(x1 - x0)))[..., 0]
    return np.ascontiguousarray(crop), np.array([x0, y0])


def outlines_from_masks(
    masks: NDArray[np.float32], boxes: NDArray[np.float32], threshold: float = 0.5, tolerance: float = 0.005
) -> list[NDArray[np.float32] | None]:
    """Trace the outlines of probability masks that each fill a box, in image pixels, without making a full-size bitmap.

    masks: (N, S, S) float32 in 0-1, stretched over its box; boxes: (N, 4) float32. Each mask gets a border of zeros (as pasting
    it into an image does), is enlarged four times bilinearly and cut at `threshold`, so that the outline is accurate to an eighth
    of a mask cell. The largest outer contour is taken and simplified with `tolerance` x perimeter. None where no value reaches
    the threshold.
    """
    grow = 4
    result: list[NDArray[np.float32] | None] = []
    for mask, box in zip(masks, boxes, strict=True):
        side = mask.shape[0]
        padded = cv2.copyMakeBorder(mask, 1, 1, 1, 1, cv2.BORDER_CONSTANT, value=0)
        fine = cv2.resize(padded, None, fx=grow, fy=grow, interpolation=cv2.INTER_LINEAR) >= threshold
        contours, _ = cv2.findContours(fine.astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
        largest = max(contours, key=cv2.contourArea, default=None)
        if largest is None or len(largest) < 3:
            result.append(None)
            continue
        scale = np.array([box[2] - box[0], box[3] - box[1]], np.float32) / side
        ring = ((largest.reshape(-1, 2) + 0.5) / grow - 1) * scale + box[:2]
        outline = simplify(ring.astype(np.float32), tolerance)
        result.append(outline if polygon_area(outline) > 0 else None)
    return result


def intersection_areas(polygons: Sequence[Polygon], first: NDArray[np.int64], second: NDArray[np.int64]) -> NDArray[np.float64]:
    """Intersection areas, (K,) in square pixels, of K pairs of simple polygons; takes a tenth of the time of an exact overlay.

    polygons: N valid rings (P, 2) without self-intersections; first, second: (K,) indices of the pairs.

    A ring's area is the signed sum of the strips under its edges, so |A n B| = the sum over pairs of edges of s_a s_b times the
    integral of min(y_a, y_b) over their common x. min(y_a, y_b) = (y_a + y_b - |y_a - y_b|) / 2; the sums cancel because a ring
    is closed, which leaves |A n B| = |sum of s_a s_b times the integral of |y_a - y_b|| / 2.
    """
    areas = np.zeros(len(first))
    if not len(first):
        return areas
    lengths = np.array([len(polygon) for polygon in polygons])
    # Rings of similar length are measured together; shorter ones repeat their first point, which adds edges without area.
    sizes = -(-lengths // 4) * 4
    stacks: dict[int, NDArray[np.float64]] = {}
    place = np.zeros(len(polygons), np.int64)
    used = np.unique(np.concatenate([first, second]))
    for size in np.unique(sizes[used]).tolist():
        members = used[sizes[used] == size]
        place[members] = np.arange(len(members))
        stacks[size] = rings = np.empty((len(members), size + 1, 2))
        for k, ring in zip(members.tolist(), rings):
            ring[: lengths[k]] = polygons[k]
            ring[lengths[k] :] = polygons[k][0]
    shape = sizes[first] * (sizes.max() + 1) + sizes[second]
    order = np.argsort(shape, kind="stable")
    for group in np.split(order, np.flatnonzero(np.diff(shape[order])) + 1):
        one, other = first[group], second[group]
        size_a, size_b = int(sizes[one[0]]), int(sizes[other[0]])
        step = max(1, 16384 // (size_a * size_b))  # fits into the processor's cache
        for start in range(0, len(group), step):
            part = slice(start, start + step)
            areas[group[part]] = _common_areas(stacks[size_a][place[one[part]]], stacks[size_b][place[other[part]]])
    return areas


def _common_areas(one: NDArray[np.float64], other: NDArray[np.float64]) -> NDArray[np.float64]:
    """Intersection areas, (K,), of closed rings, (K, S + 1, 2) and (K, T + 1, 2)."""
    # Relative to a point of the pair, because far from the origin the products would lose precision.
    origin = one[:, :1]
    low_a, high_a, slope_a, rise_a, sign_a = _edges(one - origin)
    low_b, high_b, slope_b, rise_b, sign_b = _edges(other - origin)
    low = np.maximum(low_a[:, :, None], low_b[:, None])
    width = np.minimum(high_a[:, :, None], high_b[:, None])
    high = width.copy()
    width -= low
    np.maximum(width, 0, out=width)
    slope = slope_a[:, :, None] - slope_b[:, None]
    rise = rise_a[:, :, None] - rise_b[:, None]
    low *= slope
    low += rise
    high *= slope
    high += rise
    crossing = np.minimum(low * high, 0, out=rise)
    both = np.abs(low, out=low)
    both += np.abs(high, out=high)
    # The integral of |d| along a line from d0 to d1 over a width w is w (|d0| + |d1|) / 2; where the sign changes, subtract
    # w |d0 d1| / (|d0| + |d1|).
    crossing /= np.maximum(both, 1e-300, out=slope)
    both *= 0.5
    both += crossing
    both *= width
    total: NDArray[np.float64] = (sign_a[:, None] @ both @ sign_b[:, :, None])[:, 0, 0]
    return np.abs(total) / 2


def _edges(rings: NDArray[np.float64]) -> tuple[NDArray[np.float64], ...]:
    """Lower x, upper x, slope, y at x = 0 and direction of the edges, each (K, S); a vertical edge has no strip."""
    x, y = rings[..., 0], rings[..., 1]
    run = np.diff(x, axis=1)
    slope = np.divide(np.diff(y, axis=1), run, out=np.zeros_like(run), where=run != 0)
    start, end = x[:, :-1], x[:, 1:]
    return np.minimum(start, end), np.maximum(start, end), slope, y[:, :-1] - slope * start, np.sign(run)

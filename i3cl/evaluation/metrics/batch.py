"""Many images measured at once: every touching pair of truth and detection with the area that they share.

All protocols score from this one measurement. Shapely is called once for all polygons of a batch, not once an image; pairs
come from an STRtree over boxes that are moved apart image by image, while areas are computed where the polygons are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import shapely
from numpy.typing import ArrayLike, NDArray

from i3cl.geometry import Polygon, intersection_areas

Repair = Literal["make_valid", "buffer0"]
"""What a self-intersecting polygon becomes, truth and detection alike. make_valid: all that its ring encloses (a bow-tie keeps
both wings); buffer0: GEOS' buffer of width 0, which may keep one wing only (mmocr and many scripts)."""


@dataclass(frozen=True, eq=False)
class Sample:
    """One image: its truth and what was found in it. Coordinates are pixels of the original image."""

    name: str
    truths: Sequence[NDArray[np.floating]]
    """N polygons (P, 2); fewer than 3 points mark a degenerate truth, which counts as don't-care."""
    ignore: NDArray[np.bool_]
    """(N,), True for don't-care."""
    detections: Sequence[NDArray[np.floating]]
    """M polygons (P, 2), P >= 3, in the order of the result's file."""
    scores: NDArray[np.floating]
    """(M,) 0-1; 1 where the format has none."""
    texts: Sequence[str | None] = ()
    """N transcriptions, or none at all."""
    languages: Sequence[str | None] = ()
    """N languages or scripts, or none at all."""
    height: int | None = None
    """Pixels, where the truth says so."""
    width: int | None = None
    file_name: str | None = None
    """Of the image, relative to the images root, where the truth says so."""

    def __post_init__(self) -> None:
        if len(self.truths) != len(self.ignore):
            raise ValueError(f"image {self.name}: {len(self.truths)} truths but {len(self.ignore)} ignore flags")
        if len(self.detections) != len(self.scores):
            raise ValueError(f"image {self.name}: {len(self.detections)} detections but {len(self.scores)} scores")


@dataclass(frozen=True, eq=False)
class Batch:
    """The images of a batch measured. N truths and M detections over all of them, images one after another."""

    names: Sequence[str]
    """I image names."""
    truth_image: NDArray[np.int64]
    """(N,) image of each truth, ascending."""
    detection_image: NDArray[np.int64]
    """(M,)."""
    ignore: NDArray[np.bool_]
    """(N,)."""
    scores: NDArray[np.float64]
    """(M,)."""
    truths: NDArray[np.object_]
    """(N,) shapely geometries, repaired; empty for degenerate truths."""
    detections: NDArray[np.object_]
    """(M,)."""
    truth_area: NDArray[np.float64]
    """(N,) square pixels."""
    detection_area: NDArray[np.float64]
    """(M,)."""
    truth_repaired: NDArray[np.bool_]
    """(N,) self-intersecting as given."""
    detection_repaired: NDArray[np.bool_]
    """(M,)."""
    truth: NDArray[np.int64]
    """(K,) truth of each pair whose intersection has area, ascending, ties by detection."""
    detection: NDArray[np.int64]
    """(K,)."""
    intersection: NDArray[np.float64]
    """(K,) square pixels."""

    def iou(self, margin: float = 0.0) -> NDArray[np.float64]:
        """(K,) intersection over (union + margin)."""
        union = self.truth_area[self.truth] + self.detection_area[self.detection] - self.intersection
        return self.intersection / (union + margin)

    def truth_share(self) -> NDArray[np.float64]:
        """(K,) share of the truth's area that the detection covers (area recall)."""
        return self.intersection / self.truth_area[self.truth]

    def detection_share(self, margin: float = 0.0) -> NDArray[np.float64]:
        """(K,) share of the detection's area that lies in the truth (area precision)."""
        return self.intersection / (self.detection_area[self.detection] + margin)


def measure(samples: Sequence[Sample], repair: Repair = "make_valid") -> Batch:
    """Areas and intersections of all the images' polygons."""
    truth_rings, detection_rings = [p for s in samples for p in s.truths], [p for s in samples for p in s.detections]
    truths, truth_repaired = shapes(truth_rings, repair)
    detections, detection_repaired = shapes(detection_rings, repair)
    images = np.arange(len(samples))
    truth_image = np.repeat(images, [len(s.truths) for s in samples])
    detection_image = np.repeat(images, [len(s.detections) for s in samples])
    truth, detection = _touching(truths, truth_image, detections, detection_image)
    truth_area, detection_area = (np.asarray(shapely.area(of), np.float64) for of in (truths, detections))
    simple = ~truth_repaired[truth] & ~detection_repaired[detection]
    intersection = np.zeros(len(truth))
    intersection[simple] = intersection_areas(
        [*truth_rings, *detection_rings], truth[simple], detection[simple] + len(truth_rings)
    )
    exactly = ~simple | _at_a_limit(intersection, truth_area[truth], detection_area[detection])
    intersection[exactly] = shapely.area(shapely.intersection(truths[truth[exactly]], detections[detection[exactly]]))
    real = intersection > 1e-12 * detection_area[detection]
    return Batch(
        names=[s.name for s in samples],
        truth_image=truth_image,
        detection_image=detection_image,
        ignore=_joined([s.ignore for s in samples], np.bool_),
        scores=_joined([s.scores for s in samples], np.float64),
        truths=truths,
        detections=detections,
        truth_area=truth_area,
        detection_area=detection_area,
        truth_repaired=truth_repaired,
        detection_repaired=detection_repaired,
        truth=truth[real],
        detection=detection[real],
        intersection=intersection[real],
    )


def _at_a_limit(
    intersection: NDArray[np.float64], truth: NDArray[np.float64], detection: NDArray[np.float64]
) -> NDArray[np.bool_]:
    """(K,) pairs whose IoU or shares, with a margin of one pixel or none, are next to 0.001, 0.002 ... 0.999, as thresholds are.

    There `>` and `>=` differ, and the last bits of the fast areas must not decide.
    """
    union = truth + detection - intersection
    with np.errstate(divide="ignore", invalid="ignore"):
        shares = 1000 * intersection / np.stack([union, union + 1, truth, detection, detection + 1])
        near = (np.abs(shares - np.round(shares)) < 1e-6) & (shares > 0.5) & (shares < 999.5)
    return np.logical_or.reduce(near, axis=0)


def shapes(polygons: Sequence[Polygon], repair: Repair = "make_valid") -> tuple[NDArray[np.object_], NDArray[np.bool_]]:
    """(N,) valid shapely geometries of N polygons, and (N,) bool which of them had to be repaired.

    A polygon of fewer than 3 points becomes an empty geometry.
    """
    geometries = np.full(len(polygons), shapely.Polygon(), dtype=object)
    repaired = np.zeros(len(polygons), bool)
    proper = [k for k, polygon in enumerate(polygons) if len(polygon) >= 3]
    if not proper:
        return geometries, repaired
    # Closed here: shapely closes an open ring only, and one that turns back to its start after two points is too short for it.
    points = np.concatenate([part for k in proper for part in (polygons[k], polygons[k][:1])]).astype(np.float64)
    owner = np.repeat(np.arange(len(proper)), [len(polygons[k]) + 1 for k in proper])
    rings = shapely.polygons(shapely.linearrings(points, indices=owner))
    invalid = ~shapely.is_valid(rings)
    if invalid.any():
        mended = rings[invalid] if repair == "buffer0" else shapely.make_valid(rings[invalid])
        rings[invalid] = shapely.buffer(mended, 0)
    geometries[proper] = rings
    repaired[proper] = invalid
    return geometries, repaired


def _touching(
    truths: NDArray[np.object_], truth_image: ArrayLike, detections: NDArray[np.object_], detection_image: ArrayLike
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Pairs of one image whose boxes touch, sorted by truth, then detection."""
    first, second = shapely.bounds(truths), shapely.bounds(detections)
    both = np.concatenate([first, second])
    if not len(truths) or not len(detections) or np.isnan(both).all():
        return np.zeros(0, np.int64), np.zeros(0, np.int64)
    # A power of two, so that moving whole pixels is exact; the margin covers the rounding of fractions.
    stride = 2.0 ** np.ceil(np.log2(np.nanmax(both[:, [0, 2]]) - np.nanmin(both[:, [0, 2]]) + 4))
    boxes = []
    for bounds, image in ((first, truth_image), (second, detection_image)):
        low, high = bounds[:, :2] - 0.25, bounds[:, 2:] + 0.25
        offset = np.asarray(image) * stride
        boxes.append(shapely.box(low[:, 0] + offset, low[:, 1], high[:, 0] + offset, high[:, 1]))
    truth, detection = shapely.STRtree(boxes[1]).query(boxes[0])
    order = np.lexsort((detection, truth))
    return truth[order].astype(np.int64), detection[order].astype(np.int64)


def _joined(parts: Sequence[ArrayLike], dtype: type) -> NDArray:
    return np.concatenate([np.zeros(0, dtype), *(np.asarray(part, dtype).reshape(-1) for part in parts)])

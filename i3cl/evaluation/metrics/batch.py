"""Images to evaluate, and many of them measured at once: every touching pair of truth and detection with its common area.

All protocols score from this one measurement. Shapely is called once for all polygons of a batch, not once per image. Pairs
come from an STRtree over boxes that are moved apart image by image; areas are computed where the polygons are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import shapely
from numpy.typing import ArrayLike, NDArray

from i3cl.geometry import Polygon, as_polygon, intersection_areas, short_side

Repair = Literal["make_valid", "buffer0"]
"""What a self-intersecting polygon becomes, truth and detection alike. make_valid: everything that its ring encloses (a bow-tie
keeps both wings); buffer0: GEOS' buffer of width 0, which may keep only one wing (mmocr and many scripts)."""


@dataclass(frozen=True, eq=False)
class EvalImage:
    """One image to evaluate: its truth and what was detected in it. Coordinates are pixels of the original image.

    Raises:
        ValueError: Lengths differ, or a score lies outside 0-1.
    """

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
    """The image's file, relative to the images root, where the truth says so."""
    masks: Sequence[dict[str, Any] | None] | None = None
    """M COCO RLE masks of `height` x `width` that COCO AP uses in place of the polygons; None where there is no mask."""

    def __post_init__(self) -> None:
        if len(self.truths) != len(self.ignore):
            raise ValueError(f"image {self.name}: {len(self.truths)} truths but {len(self.ignore)} ignore flags")
        if len(self.detections) != len(self.scores):
            raise ValueError(f"image {self.name}: {len(self.detections)} detections but {len(self.scores)} scores")
        scores = np.asarray(self.scores)
        # Written so that NaN fails too.
        if not ((scores >= 0) & (scores <= 1)).all():
            raise ValueError(f"image {self.name}: scores must lie in 0-1")


@dataclass(frozen=True, eq=False)
class Batch:
    """The measured images of a batch. N truths and M detections over all images, one image after another."""

    names: Sequence[str]
    """I image names."""
    truth_image: NDArray[np.int64]
    """(N,) image of each truth, ascending."""
    detection_image: NDArray[np.int64]
    """(M,) image of each detection, ascending."""
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
    """(K,) truth of each pair whose intersection has area, ascending; equal ones are sorted by detection."""
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

    def without_shapes(self) -> Batch:
        """The same numbers without the geometries, which take most of the memory."""
        nothing = np.zeros(0, object)
        return replace(self, truths=nothing, detections=nothing)


def measure_polygons(images: Sequence[EvalImage], repair: Repair = "make_valid") -> Batch:
    """Areas and intersections of all the images' polygons.

    Raises:
        ValueError: A coordinate is not finite, or a detection has fewer than 3 points.
    """
    for image in images:
        for polygons, least in ((image.truths, 0), (image.detections, 3)):
            if any(len(polygon) < least or not np.isfinite(polygon).all() for polygon in polygons):
                raise ValueError(f"image {image.name}: a polygon needs at least 3 points, all of them finite")
    truth_rings, detection_rings = [p for i in images for p in i.truths], [p for i in images for p in i.detections]
    truths, truth_repaired = shapes(truth_rings, repair)
    detections, detection_repaired = shapes(detection_rings, repair)
    numbers = np.arange(len(images))
    truth_image = np.repeat(numbers, [len(i.truths) for i in images])
    detection_image = np.repeat(numbers, [len(i.detections) for i in images])
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
        names=[i.name for i in images],
        truth_image=truth_image,
        detection_image=detection_image,
        ignore=_joined([i.ignore for i in images], np.bool_),
        scores=_joined([i.scores for i in images], np.float64),
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


def mark_small(truths: Sequence[ArrayLike], ignore: ArrayLike, small_side: float) -> NDArray[np.bool_]:
    """The ignore flags with small truths marked as don't-care too.

    Args:
        truths: N polygons (P, 2).
        ignore: (N,) bool.
        small_side: Pixels; a truth is small when the short side of its smallest rotated rectangle is under this.

    Returns:
        A new (N,) bool array.

    Raises:
        ValueError: The lengths differ.
    """
    flags = np.asarray(ignore, bool).reshape(-1)
    if len(flags) != len(truths):
        raise ValueError(f"{len(truths)} truths but {len(flags)} ignore flags")
    return flags | np.array([short_side(as_polygon(truth)) < small_side for truth in truths], dtype=bool)


def _at_a_limit(
    intersection: NDArray[np.float64], truth: NDArray[np.float64], detection: NDArray[np.float64]
) -> NDArray[np.bool_]:
    """(K,) pairs whose IoU or shares, with a margin of one pixel or none, are next to 0.001, 0.002 ... 0.999.

    Thresholds are such numbers. There `>` and `>=` differ, and the last bits of the fast areas must not decide.
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
    # Closed here: shapely closes only open rings, and one that turns back to its start after two points is too short for it.
    points = np.concatenate([part for k in proper for part in (polygons[k], polygons[k][:1])]).astype(np.float64)
    owner = np.repeat(np.arange(len(proper)), [len(polygons[k]) + 1 for k in proper])
    rings = shapely.polygons(shapely.linearrings(points, indices=owner))
    invalid = ~shapely.is_valid(rings)
    if invalid.any():
        valid = rings[invalid] if repair == "buffer0" else shapely.make_valid(rings[invalid])
        rings[invalid] = shapely.buffer(valid, 0)
    geometries[proper] = rings
    repaired[proper] = invalid
    return geometries, repaired


def _touching(
    truths: NDArray[np.object_], truth_image: ArrayLike, detections: NDArray[np.object_], detection_image: ArrayLike
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Pairs within one image whose boxes touch, sorted by truth, then detection."""
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

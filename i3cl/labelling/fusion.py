"""What several detectors, each in one or more views, agree on in one image.

Instances of different members and views that overlap are clustered. A cluster's score is the weighted sum of
its scores over the weight of everyone who looked, so that it falls when members miss the instance; its shape
is a vote of its polygons. No result depends on the order of the members or of their polygons.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import cv2
import numpy as np
import shapely
from numpy.typing import ArrayLike, NDArray

from i3cl.config import FusionSettings
from i3cl.geometry import as_polygon, largest_ring, to_shapely

Ring = NDArray[np.float32]

_CELLS = 96
"""Side of the window that a cluster's shape is voted in."""


@dataclass(frozen=True)
class MemberPrediction:
    """What one member found in one view of the image; a member with several views gives several of these."""

    member: str
    polygons: Sequence[ArrayLike]
    """N polygons (P, 2) in pixels of the original image."""
    scores: ArrayLike
    """(N,) float, 0-1."""
    weight: float | None = None
    """Weight of the member's vote, >= 0, shared equally by its views. None: `member_weights` of the
    settings."""


@dataclass(frozen=True)
class FusedInstances:
    """One image's instances by descending score."""

    polygons: list[Ring]
    """n valid polygons (P, 2) float32 in pixels."""
    scores: NDArray[np.float64]
    """(n,) 0-1."""
    votes: NDArray[np.int64]
    """(n,) members (not views) that saw the instance, >= 1."""

    def __len__(self) -> int:
        return len(self.polygons)


def fuse(predictions: Sequence[MemberPrediction], settings: FusionSettings) -> FusedInstances:
    """The instances of one image out of all members' and views' predictions.

    - A member of weight 0 is absent; one without polygons looked and saw nothing. Predictions under
      `settings.min_score` or without area are left out, self-intersecting polygons are repaired.
    - Within a view, polygons that overlap a better one by more than `settings.iou` are left out.
    - By descending score, polygons that no seed of another view overlaps by `settings.iou` or more are the
      seeds of clusters. The others join seeds that they overlap so, by descending IoU and at most one of each
      view to a seed. What finds no place is clustered in the same way again.
    - Score: sum of view weight x score over the cluster / total weight of the members.
    - Shape: where polygons with at least half of the cluster's sum of view weight x score lie over each
      other. A polygon that has more than half alone, and so any that nobody joined, is returned as it is;
      other shapes are true to about a hundredth of their length and of their width.
    - Of results that overlap by more than `settings.iou` the one with the higher score stays.

    ValueError: lengths that differ, scores outside 0-1, a negative weight, weights that differ between the
    views of one member, polygons of fewer than 3 points or with values that are not finite.
    """
    found = _candidates(predictions, settings)
    shapes = _Shapes.of(found.polygons, settings.iou)
    alive = shapes.best_of_overlapping(rivals=found.view[:, None] == found.view)
    clusters = _clusters(shapes, found.view, alive)

    parts = [found.share[cluster] * found.scores[cluster] for cluster in clusters]
    scores = [min(float(part.sum()), 1.0) for part in parts]
    votes = [len({found.members[k] for k in cluster}) for cluster in clusters]
    outlines = [_vote([found.polygons[k] for k in cluster], part) for cluster, part in zip(clusters, parts)]
    rows = zip(scores, votes, _valid(outlines))
    fused = [(score, vote, ring) for score, vote, ring in rows if ring is not None]
    fused.sort(key=lambda row: (-row[0], -row[1], row[2].tobytes()))
    stays = _Shapes.of([ring for _, _, ring in fused], settings.iou).best_of_overlapping()
    kept = [fused[k] for k in np.flatnonzero(stays)]
    return FusedInstances(
        polygons=[ring for _, _, ring in kept],
        scores=np.array([score for score, _, _ in kept], np.float64),
        votes=np.array([vote for _, vote, _ in kept], np.int64),
    )


@dataclass(frozen=True)
class _Candidates:
    """All polygons that take part, by descending score; equal scores in an order that the polygons decide."""

    polygons: list[Ring]
    scores: NDArray[np.float64]
    share: NDArray[np.float64]
    """(n,) the view's part of the total weight; those of all views sum to 1."""
    view: NDArray[np.int64]
    """(n,) number of the prediction that the polygon comes from."""
    members: list[str]


def _candidates(predictions: Sequence[MemberPrediction], settings: FusionSettings) -> _Candidates:
    rows: list[tuple[float, bytes, float, str, int, Ring]] = []
    for view, (prediction, share) in enumerate(zip(predictions, _shares(predictions, settings))):
        name, scores = prediction.member, np.asarray(prediction.scores, np.float64).reshape(-1)
        if len(scores) != len(prediction.polygons):
            raise ValueError(f"member {name!r}: {len(prediction.polygons)} polygons but {len(scores)} scores")
        if not ((scores >= 0) & (scores <= 1)).all():
            raise ValueError(f"member {name!r}: scores must lie in 0-1")
        if share == 0:
            continue
        enough = np.flatnonzero(scores >= settings.min_score).tolist()
        polygons = _valid([as_polygon(prediction.polygons[k]) for k in enough])
        for polygon, score in zip(polygons, scores[enough].tolist()):
            if polygon is not None:
                rows.append((-score, polygon.tobytes(), -share, name, view, polygon))
    rows.sort(key=lambda row: row[:5])
    return _Candidates(
        polygons=[row[5] for row in rows],
        scores=np.array([-row[0] for row in rows], np.float64),
        share=np.array([-row[2] for row in rows], np.float64),
        view=np.array([row[4] for row in rows], np.int64),
        members=[row[3] for row in rows],
    )


def _shares(predictions: Sequence[MemberPrediction], settings: FusionSettings) -> list[float]:
    weights: dict[str, float] = {}
    views: dict[str, int] = {}
    for prediction in predictions:
        name, weight = prediction.member, prediction.weight
        if weight is None:
            weight = settings.member_weights.get(name, 1.0)
        if not 0 <= weight < np.inf:
            raise ValueError(f"member {name!r}: a weight must be 0 or more, not {weight}")
        if weights.setdefault(name, weight) != weight:
            raise ValueError(f"member {name!r}: weights of its views differ, {weights[name]} and {weight}")
        views[name] = views.get(name, 0) + 1
    # Sorted, because a sum of floats depends on its order and the result must not.
    total = sum(sorted(weights.values()))
    return [weights[p.member] / total / views[p.member] if total else 0.0 for p in predictions]


def _valid(polygons: Sequence[Ring]) -> list[Ring | None]:
    """Valid polygons as they are, the largest part of others, None for those without area."""
    if not polygons:
        return []
    owner = np.repeat(np.arange(len(polygons)), [len(polygon) for polygon in polygons])
    rings = shapely.polygons(shapely.linearrings(np.concatenate(polygons).astype(np.float64), indices=owner))
    fine = shapely.is_valid(rings) & (shapely.area(rings) > 0)
    return [p if ok else largest_ring(to_shapely([p])[0]) for p, ok in zip(polygons, fine.tolist())]


@dataclass(frozen=True)
class _Shapes:
    """Polygons, best first, and which of their pairs are worth measuring: that is where fusion spends its
    time."""

    geometries: NDArray[np.object_]
    areas: NDArray[np.float64]
    limit: float
    """IoU that counts as overlap."""
    possible: NDArray[np.bool_]
    """(n, n) pairs whose boxes allow that IoU: |A n B| / |A u B| <= common part of the boxes / larger
    area."""

    @classmethod
    def of(cls, polygons: Sequence[Ring], limit: float) -> _Shapes:
        geometries = to_shapely(polygons)
        areas = shapely.area(geometries) if len(polygons) else np.zeros(0)
        boxes = shapely.bounds(geometries) if len(polygons) else np.zeros((0, 4))
        low, high = boxes[:, :2], boxes[:, 2:]
        common = (np.minimum(high[:, None], high) - np.maximum(low[:, None], low)).clip(min=0).prod(axis=2)
        # A thousandth of slack, so that rounding does not rule out what measuring would find.
        possible = (common > 0) & (1.001 * common >= limit * np.maximum(areas[:, None], areas))
        np.fill_diagonal(possible, False)
        return cls(geometries, areas, limit, possible)

    def iou(self, first: NDArray[np.int64], second: NDArray[np.int64]) -> NDArray[np.float64]:
        """(K,) IoU of K pairs of numbers."""
        common = shapely.area(shapely.intersection(self.geometries[first], self.geometries[second]))
        return common / (self.areas[first] + self.areas[second] - common)

    def best_of_overlapping(self, rivals: NDArray[np.bool_] | Literal[True] = True) -> NDArray[np.bool_]:
        """(n,) bool: which stay when each that stays rules out those, of its (n, n) `rivals`, above the
        limit."""
        stays = np.ones(len(self.areas), bool)
        better, worse = np.nonzero(np.triu(self.possible & rivals))
        above = self.iou(better, worse) > self.limit
        # Sorted by the better one, so that its own fate is settled before it decides another's.
        for i, j in zip(better[above].tolist(), worse[above].tolist()):
            if stays[i]:
                stays[j] = False
        return stays


def _clusters(shapes: _Shapes, view: NDArray[np.int64], alive: NDArray[np.bool_]) -> list[NDArray[np.int64]]:
    """Ascending numbers of the polygons in each cluster of those `alive`, by the rules of `fuse`."""
    partners = shapes.possible & (view[:, None] != view)
    waiting = alive.copy()
    clusters: list[NDArray[np.int64]] = []
    while waiting.any():
        joined: dict[int, list[int]] = {}
        matches: list[tuple[float, int, int]] = []
        unseeded = waiting.copy()
        for seed in np.flatnonzero(waiting).tolist():
            if unseeded[seed]:
                joined[seed] = [seed]
                near = np.flatnonzero(partners[seed] & waiting)
                iou = shapes.iou(np.full(len(near), seed), near)
                enough = (iou >= shapes.limit) & (iou > 0)
                unseeded[near[enough]] = False
                matches += [
                    (-value, seed, k) for value, k in zip(iou[enough].tolist(), near[enough].tolist())
                ]

        waiting[list(joined)] = False
        for _, seed, k in sorted(matches):
            if waiting[k] and view[k] not in view[joined[seed]]:
                joined[seed].append(k)
                waiting[k] = False
        clusters += [np.sort(cluster) for cluster in joined.values()]
    return clusters


def _vote(polygons: Sequence[Ring], parts: NDArray[np.float64]) -> Ring:
    """Outline of the region where polygons with at least half of the sum of `parts` lie over each other."""
    # Cells are sums of float32: without a margin rounding would decide a tie.
    half = parts.sum() / 2
    strongest = int(np.argmax(parts))
    if parts[strongest] > half * (1 + 1e-5) or half == 0:
        return polygons[strongest]

    # The window is the smallest rotated rectangle around all: a long slanted line is as fine across as along.
    points = np.concatenate(polygons).astype(np.float64)
    origin = points.min(axis=0)
    centre, size, angle = cv2.minAreaRect((points - origin).astype(np.float32))
    middle = origin + centre
    cosine, sine = np.cos(np.radians(angle)), np.sin(np.radians(angle))
    axes = np.array([[cosine, -sine], [sine, cosine]])
    # One free cell all around; a cell's number is its centre.
    cell = np.array(size) / (_CELLS - 3)
    window = np.round(((points - middle) @ axes / cell + (_CELLS - 1) / 2) * 16).astype(np.int32)

    votes = np.zeros((_CELLS, _CELLS), np.float32)
    start = 0
    for polygon, part in zip(polygons, parts.tolist()):
        ring = window[start : start + len(polygon)]
        # It sets the cells under the edge too and findContours runs through the centres of the outermost
        # cells, so that an outline comes back in its place, neither grown nor shrunk.
        votes += cv2.fillPoly(np.zeros((_CELLS, _CELLS), np.float32), [ring], part, shift=4)
        start += len(polygon)
    region = (votes >= half * (1 - 1e-5)).astype(np.uint8)
    contours, _ = cv2.findContours(region, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    outline = cv2.approxPolyDP(max(contours, key=cv2.contourArea), 0.75, True).reshape(-1, 2)
    if len(outline) < 3:
        return polygons[strongest]
    return (((outline - (_CELLS - 1) / 2) * cell) @ axes.T + middle).astype(np.float32)

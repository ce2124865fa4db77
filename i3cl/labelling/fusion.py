"""Fusion: one set of instances per image out of the predictions of several detectors, each in one or more views.

Instances of different members and views that overlap form a cluster. A cluster's score is the weighted sum of its scores divided
by the weight of all members, so it falls when members miss the instance; its shape is the mean of its polygons with the same
weights. No result depends on the order of the members or of their polygons.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise

import cv2
import numpy as np
import pyclipper
import shapely
from numpy.typing import ArrayLike, NDArray

from i3cl.config import FusionSettings
from i3cl.geometry import as_polygon, intersection_areas, largest_ring, overlaps, to_shapely

Ring = NDArray[np.float32]

_CELLS = 56
"""Cells along the window in which a cluster's shape is averaged ..."""
_CELLS_ACROSS = 20
"""... and at least this many across, however thin it is."""
_SHIFT = 16
"""Fractional bits of the fixed-point numbers in which drawing and clipping work ..."""
_STEPS = 2**_SHIFT
"""... that is, steps in a cell."""


@dataclass(frozen=True)
class MemberPrediction:
    """What one member found in one view of the image; a member with several views has several of these."""

    member: str
    polygons: Sequence[ArrayLike]
    """N polygons (P, 2) in pixels of the original image."""
    scores: ArrayLike
    """(N,) float, 0-1."""
    weight: float | None = None
    """Weight of the member's vote, >= 0, shared by its views. None: `member_weights` of the settings."""
    view: str = "default"
    """Name of the view; its part of the member's vote is `view_weights` of the settings."""
    lines: bool = False
    """Whether its polygons enclose lines of text and not words."""


@dataclass(frozen=True)
class FusedInstances:
    """The instances of one image, by descending score."""

    polygons: list[Ring]
    """n valid polygons (P, 2) float32 in pixels."""
    scores: NDArray[np.float64]
    """(n,) 0-1."""
    votes: NDArray[np.int64]
    """(n,) members (not views) that found the instance, >= 1."""
    agreement: NDArray[np.float64]
    """(n,) 0-1, how well the outlines agree: the mean IoU over all pairs of polygons (members and views) that were fused; 0 when
    only one polygon was found, so that nothing confirms its outline."""
    lines: list[Ring] = field(default_factory=list)
    """m lines of text in which no word was found: there is text, and how it divides into words is not known."""
    line_scores: NDArray[np.float64] = field(default_factory=lambda: np.zeros(0))
    """(m,) 0-1, in the unit of `scores`: the line's score times the weight of its member's vote."""

    def __len__(self) -> int:
        return len(self.polygons)


def fuse(predictions: Sequence[MemberPrediction], settings: FusionSettings) -> FusedInstances:
    """The instances of one image out of the predictions of all members and views.

    - A member of weight 0 is left out; a member without polygons counts as one that found nothing. Predictions with a score
      under `settings.min_score` or without area are left out, self-intersecting polygons are repaired.
    - Within a view, polygons that overlap a better one by more than `settings.iou` are left out.
    - In the order of descending score, a polygon that no seed of another view overlaps by `settings.iou` or more becomes the
      seed of a cluster. The others join a seed that they overlap that much, in the order of descending IoU, at most one polygon
      of each view per seed. Polygons that find no seed are clustered again in the same way.
    - Score: sum of view weight x score over the cluster / total weight of the members.
    - Shape: the line where the mean of the signed distances to the cluster's outlines, weighted by view weight x score, is zero.
      It is exact to about a hundredth of the length and inside the union of the cluster's polygons (up to float32 rounding). A
      polygon that no other joined keeps its shape; when the mean is positive nowhere, the polygon of the largest weight counts.
    - Agreement: the mean IoU over the pairs of polygons in the cluster.
    - A view of lines joins no cluster and lends no outline. Its best line that covers at least `settings.line_cover` of an
      instance's area adds view weight x score to the instance's score, and its member's vote. Where it has no such line it counts
      as a view that found nothing. Lines of which instances cover less than a quarter are returned as `lines`.
    - When results overlap by more than `settings.iou`, the one with the higher score stays.

    ValueError: lengths that differ, scores outside 0-1, a negative weight, weights that differ between the views of one member,
    polygons of fewer than 3 points or with values that are not finite.
    """
    return fuse_images([predictions], settings)[0]


def fuse_images(images: Sequence[Sequence[MemberPrediction]], settings: FusionSettings) -> list[FusedInstances]:
    """`fuse` for many images; dozens at once take less time than one by one."""
    found = _candidates(images, settings)
    overlapping = _overlapping([candidates.polygons for candidates in found], settings.iou)
    drafts = [_draft(candidates, pairs, settings.iou) for candidates, pairs in zip(found, overlapping)]
    clusters = [cluster for draft in drafts for cluster in draft]
    outlines = iter(_valid(_mean_outlines(clusters)))
    agreements = iter(_agreements(clusters).tolist())

    fused, lines = [], []
    for predictions, draft in zip(images, drafts):
        drawn = [(c.score, c.votes, next(agreements), next(outlines)) for c in draft]
        rows = [(score, votes, agreement, ring) for score, votes, agreement, ring in drawn if ring is not None]
        rows, left = _with_lines(rows, predictions, settings)
        lines.append(left)
        fused.append(sorted(rows, key=lambda row: (-row[0], -row[1], row[3].tobytes())))
    overlapping = _overlapping([[row[3] for row in rows] for rows in fused], settings.iou)
    return [_best(rows, pairs, settings.iou, left) for rows, pairs, left in zip(fused, overlapping, lines)]


_Row = tuple[float, int, float, Ring]
"""Score, votes, agreement and outline of an instance."""
_Line = tuple[float, Ring]
"""Share x score and outline of a line."""
_EMPTY = 0.25
"""Share of a line that instances cover, below which it counts as a line without words."""


def _with_lines(
    rows: list[_Row], predictions: Sequence[MemberPrediction], settings: FusionSettings
) -> tuple[list[_Row], list[_Line]]:
    """The instances with the support of views of lines, and the lines that hardly cover any."""
    found: list[tuple[str, int, float, Ring]] = []
    if not any(prediction.lines for prediction in predictions):
        return rows, []
    for view, (prediction, share) in enumerate(zip(predictions, _shares(predictions, settings))):
        if prediction.lines and share > 0:
            scores = np.asarray(prediction.scores, np.float64).reshape(-1)
            chosen = np.flatnonzero(scores >= settings.min_score).tolist()
            valid = _valid([as_polygon(prediction.polygons[k]) for k in chosen])
            found += [(prediction.member, view, share * scores[k], ring) for k, ring in zip(chosen, valid) if ring is not None]
    if not found:
        return rows, []
    # By score and coordinates, so that the result does not depend on the order of members or lines.
    found.sort(key=lambda line: (-line[2], line[3].tobytes()))
    pairs = overlaps([row[3] for row in rows], [line[3] for line in found])
    common = pairs.dense_intersection()
    covers = common >= settings.line_cover * pairs.area_first[:, None]
    supported: list[_Row] = []
    for (score, votes, agreement, ring), covering in zip(rows, covers):
        best: dict[int, float] = {}
        members = set()
        for k in np.flatnonzero(covering).tolist():
            member, view, part, _ = found[k]
            best.setdefault(view, part)
            members.add(member)
        support = math.fsum(best.values())
        supported.append((min(score + support, 1.0), votes + len(members), agreement, ring))
    filled = common.sum(axis=0) / pairs.area_second
    return supported, [(part, ring) for (_, _, part, ring), share in zip(found, filled) if share < _EMPTY]


def _best(rows: Sequence[_Row], pairs: _Pairs, limit: float, lines: Sequence[_Line]) -> FusedInstances:
    stays = _best_of_overlapping(len(rows), pairs.above(limit))
    kept = [row for row, stay in zip(rows, stays) if stay]
    return FusedInstances(
        polygons=[ring for *_, ring in kept],
        scores=np.array([row[0] for row in kept], np.float64),
        votes=np.array([row[1] for row in kept], np.int64),
        agreement=np.array([row[2] for row in kept], np.float64),
        lines=[ring for _, ring in lines],
        line_scores=np.array([score for score, _ in lines], np.float64),
    )


def _agreements(clusters: Sequence[_Cluster]) -> NDArray[np.float64]:
    """(n,) mean IoU over the pairs of polygons of each cluster; 0 for a cluster of one polygon."""
    rings = [ring for cluster in clusters for ring in cluster.polygons]
    sizes = [len(cluster.polygons) for cluster in clusters]
    first, second, owner = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
    for number, (size, end) in enumerate(zip(sizes, accumulate(sizes))):
        if size > 1:
            a, b = np.triu_indices(size, 1)
            first.append(a + end - size)
            second.append(b + end - size)
            owner.append(np.full(len(a), number))
    pair, other, cluster = np.concatenate(first), np.concatenate(second), np.concatenate(owner)
    _, areas = _boxes_and_areas(rings)
    common = intersection_areas(rings, pair, other)
    iou = common / (areas[pair] + areas[other] - common) if len(pair) else np.zeros(0)
    count = np.bincount(cluster, minlength=len(clusters))
    return np.minimum(np.bincount(cluster, iou, len(clusters)) / np.maximum(count, 1), 1.0)


@dataclass(frozen=True)
class _Candidates:
    """All polygons that take part, by descending score; the coordinates decide the order of equal scores."""

    polygons: list[Ring]
    scores: NDArray[np.float64]
    share: NDArray[np.float64]
    """(n,) the view's part of the total weight; those of all views sum to 1."""
    view: NDArray[np.int64]
    """(n,) number of the prediction that the polygon comes from."""
    members: list[str]


def _candidates(images: Sequence[Sequence[MemberPrediction]], settings: FusionSettings) -> list[_Candidates]:
    rings: list[Ring] = []
    rows: list[tuple[int, float, float, str, int]] = []  # image, score, share, member, view
    for number, predictions in enumerate(images):
        for view, (prediction, share) in enumerate(zip(predictions, _shares(predictions, settings))):
            name, scores = prediction.member, np.asarray(prediction.scores, np.float64).reshape(-1)
            if len(scores) != len(prediction.polygons):
                raise ValueError(f"member {name!r}: {len(prediction.polygons)} polygons but {len(scores)} scores")
            if not ((scores >= 0) & (scores <= 1)).all():
                raise ValueError(f"member {name!r}: scores must lie in 0-1")
            if share > 0 and not prediction.lines:
                for k in np.flatnonzero(scores >= settings.min_score).tolist():
                    rings.append(as_polygon(prediction.polygons[k]))
                    rows.append((number, float(scores[k]), share, name, view))

    # The coordinates decide the order of equal scores, so that no result depends on the order of the members.
    ordered: list[list[tuple[float, bytes, float, str, int, Ring]]] = [[] for _ in images]
    for (number, score, share, name, view), ring in zip(rows, _valid(rings)):
        if ring is not None:
            ordered[number].append((-score, ring.tobytes(), -share, name, view, ring))
    found = []
    for own in ordered:
        own.sort(key=lambda row: row[:5])
        found.append(
            _Candidates(
                polygons=[row[5] for row in own],
                scores=np.array([-row[0] for row in own], np.float64),
                share=np.array([-row[2] for row in own], np.float64),
                view=np.array([row[4] for row in own], np.int64),
                members=[row[3] for row in own],
            )
        )
    return found


def _shares(predictions: Sequence[MemberPrediction], settings: FusionSettings) -> list[float]:
    weights: dict[str, float] = {}
    views: dict[str, list[float]] = {}
    for prediction in predictions:
        name, weight = prediction.member, prediction.weight
        if weight is None:
            weight = settings.member_weights.get(name, 1.0)
        if not 0 <= weight < np.inf:
            raise ValueError(f"member {name!r}: a weight must be 0 or more, not {weight}")
        if weights.setdefault(name, weight) != weight:
            raise ValueError(f"member {name!r}: weights of its views differ, {weights[name]} and {weight}")
        views.setdefault(name, []).append(settings.view_weights.get(prediction.view, 1.0))
    # Sorted, because a sum of floats depends on its order and the result must not.
    within = {name: sum(sorted(parts)) for name, parts in views.items()}
    # A member whose views all have weight 0 is left out.
    total = sum(sorted(weight for name, weight in weights.items() if within[name]))
    return [
        weights[p.member] / total * settings.view_weights.get(p.view, 1.0) / within[p.member]
        if total and within[p.member]
        else 0.0
        for p in predictions
    ]


def _valid(polygons: Sequence[Ring]) -> list[Ring | None]:
    """Valid polygons as they are, the largest part of others, None for those without area."""
    if not polygons:
        return []
    owner = np.repeat(np.arange(len(polygons)), [len(polygon) for polygon in polygons])
    rings = shapely.polygons(shapely.linearrings(np.concatenate(polygons).astype(np.float64), indices=owner))
    fine = shapely.is_valid(rings) & (shapely.area(rings) > 0)
    return [p if ok else largest_ring(to_shapely([p])[0]) for p, ok in zip(polygons, fine.tolist())]


@dataclass(frozen=True)
class _Pairs:
    """Polygons of one image that overlap by at least the limit."""

    first: NDArray[np.int64]
    """(K,) ascending, ties by second."""
    second: NDArray[np.int64]
    """(K,) numbers above those of `first`."""
    iou: NDArray[np.float64]

    def above(self, limit: float, rivals: NDArray[np.bool_] | None = None) -> list[tuple[int, int]]:
        """The pairs with an IoU above `limit`, and of these the ones where `rivals`, (K,) bool."""
        chosen = self.iou > limit if rivals is None else (self.iou > limit) & rivals
        return list(zip(self.first[chosen].tolist(), self.second[chosen].tolist()))


def _overlapping(images: Sequence[Sequence[Ring]], limit: float) -> list[_Pairs]:
    """Each image's pairs of valid polygons with an IoU of at least `limit`, and above 0."""
    rings = [ring for image in images for ring in image]
    ends = np.cumsum([0] + [len(image) for image in images])
    boxes, areas = _boxes_and_areas(rings)
    owners, firsts, seconds = [], [], []
    for number, (start, end) in enumerate(pairwise(ends.tolist())):
        low_x, low_y, high_x, high_y = boxes[start:end].T
        area = areas[start:end]
        width = np.minimum(high_x[:, None], high_x) - np.maximum(low_x[:, None], low_x)
        height = np.minimum(high_y[:, None], high_y) - np.maximum(low_y[:, None], low_y)
        first, second = np.nonzero(np.triu((width > 0) & (height > 0), 1))
        # The intersection of A and B is inside the common part of their boxes and inside the smaller of the two. A thousandth of
        # slack keeps rounding from excluding a pair that the exact areas would include.
        area_first, area_second = area[first], area[second]
        bound = np.minimum(width[first, second] * height[first, second], np.minimum(area_first, area_second))
        possible = 1.001 * bound * (1 + limit) >= limit * (area_first + area_second)
        firsts.append(first[possible] + start)
        seconds.append(second[possible] + start)
        owners.append(np.full(np.count_nonzero(possible), number))
    first, second, owner = (np.concatenate([np.zeros(0, np.int64), *x]) for x in (firsts, seconds, owners))
    common = intersection_areas(rings, first, second)
    iou = common / (areas[first] + areas[second] - common)
    enough = (iou >= limit) & (iou > 0)
    first, second, owner, iou = first[enough], second[enough], owner[enough], iou[enough]
    cuts = np.searchsorted(owner, np.arange(len(images) + 1))
    return [
        _Pairs(first[a:b] - start, second[a:b] - start, iou[a:b])
        for (a, b), start in zip(pairwise(cuts.tolist()), ends[:-1].tolist())
    ]


def _boxes_and_areas(rings: Sequence[Ring]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """(N, 4) boxes x0, y0, x1, y1 and (N,) areas by the shoelace formula, in float64."""
    if not rings:
        return np.zeros((0, 4)), np.zeros(0)
    lengths = np.array([len(ring) for ring in rings])
    ends = np.cumsum(lengths)
    starts = ends - lengths
    points = np.concatenate(rings).astype(np.float64)
    boxes = np.hstack([np.minimum.reduceat(points, starts), np.maximum.reduceat(points, starts)])
    # Relative to the first point: far from the origin the products would cancel.
    points -= np.repeat(points[starts], lengths, axis=0)
    after = np.arange(1, len(points) + 1)
    after[ends - 1] = starts
    cross = points[:, 0] * points[after, 1] - points[after, 0] * points[:, 1]
    return boxes, np.abs(np.add.reduceat(cross, starts)) / 2


def _best_of_overlapping(count: int, pairs: Sequence[tuple[int, int]]) -> list[bool]:
    """Which of `count` stay when each that stays excludes the second of its pairs. The pairs are ascending."""
    stays = [True] * count
    # Sorted by the better one, so that it is settled whether it stays before it excludes another.
    for i, j in pairs:
        if stays[i]:
            stays[j] = False
    return stays


@dataclass(frozen=True)
class _Cluster:
    polygons: list[Ring]
    parts: NDArray[np.float64]
    """(n,) share x score of each."""
    votes: int

    @property
    def score(self) -> float:
        return min(float(self.parts.sum()), 1.0)


def _draft(found: _Candidates, pairs: _Pairs, limit: float) -> list[_Cluster]:
    own_view = found.view[pairs.first] == found.view[pairs.second]
    alive = _best_of_overlapping(len(found.polygons), pairs.above(limit, own_view))
    partners: list[list[tuple[float, int]]] = [[] for _ in found.polygons]
    other = ~own_view
    for i, j, iou in zip(pairs.first[other].tolist(), pairs.second[other].tolist(), pairs.iou[other].tolist()):
        partners[i].append((iou, j))
        partners[j].append((iou, i))
    return [
        _Cluster(
            [found.polygons[k] for k in numbers],
            found.share[numbers] * found.scores[numbers],
            len({found.members[k] for k in numbers}),
        )
        for numbers in _clusters(partners, found.view.tolist(), alive)
    ]


def _clusters(partners: Sequence[Sequence[tuple[float, int]]], view: Sequence[int], alive: Sequence[bool]) -> list[list[int]]:
    """Ascending numbers of the polygons in each cluster of those `alive`, by the rules of `fuse`.

    partners: for each polygon IoU and number of those of other views that overlap it enough.
    """
    waiting = [k for k, stays in enumerate(alive) if stays]
    clusters: list[list[int]] = []
    while waiting:
        here = set(waiting)
        joined: dict[int, list[int]] = {}
        matches: list[tuple[float, int, int]] = []
        reached: set[int] = set()
        for seed in waiting:
            if seed not in reached:
                joined[seed] = [seed]
                near = [(-iou, seed, k) for iou, k in partners[seed] if k in here]
                reached.update(k for _, _, k in near)
                matches += near

        here.difference_update(joined)
        for _, seed, k in sorted(matches):
            if k in here and all(view[k] != view[member] for member in joined[seed]):
                joined[seed].append(k)
                here.remove(k)
        clusters += [sorted(cluster) for cluster in joined.values()]
        waiting = sorted(here)
    return clusters


def _mean_outlines(clusters: Sequence[_Cluster]) -> list[Ring]:
    """Where the mean of the signed distances to each cluster's outlines is zero, inside the union of its polygons.

    Inside what all polygons have in common every distance is positive, outside of all every one is negative: the
    outline runs between. Where there is no such place, the polygon of the largest part.
    """
    result = [cluster.polygons[int(np.argmax(cluster.parts))] for cluster in clusters]
    apart = [len({polygon.tobytes() for polygon in cluster.polygons}) > 1 for cluster in clusters]
    drawn = [k for k, cluster in enumerate(clusters) if apart[k] and cluster.score > 0]
    # Each step for all clusters: alternating between the libraries takes a third longer.
    windows = [_window(clusters[k].polygons) for k in drawn]
    lines = [_zero_line(window, clusters[k].parts) for k, window in zip(drawn, windows)]
    clipped = [_clipped(line, window.rings) for line, window in zip(lines, windows)]
    for k, window, line in zip(drawn, windows, clipped):
        if line is not None:
            result[k] = (line @ window.axes + window.origin).astype(np.float32)
    return result


@dataclass(frozen=True)
class _Window:
    """A grid over the smallest rotated rectangle around some polygons, so that a slanted line is as fine across as along."""

    width: int
    height: int
    rings: list[NDArray[np.int32]]
    """The polygons in steps of cells; the centre of the first cell is 0, 0."""
    axes: NDArray[np.float64]
    """(2, 2) pixels of a step to the right and of one down."""
    origin: NDArray[np.float64]
    """(2,) pixel of the centre of the first cell."""


def _window(polygons: Sequence[Ring]) -> _Window:
    points = np.concatenate(polygons).astype(np.float64)
    low = points.min(axis=0)
    points -= low
    # Scaled to one size for float32, whatever the unit.
    scale = float(points.max()) / 1000
    centre, size, angle = cv2.minAreaRect((points / scale).astype(np.float32))
    longest = max(size)
    width, height = (max(round(_CELLS * side / longest), _CELLS_ACROSS) for side in size)
    # One free cell all around.
    step_x, step_y = (max(side, 1e-3) * scale / (n - 3) / _STEPS for side, n in zip(size, (width, height)))
    cosine, sine = math.cos(math.radians(angle)), math.sin(math.radians(angle))
    axes = np.array([[cosine * step_x, sine * step_x], [-sine * step_y, cosine * step_y]])
    back = np.array([[cosine / step_x, -sine / step_y], [sine / step_x, cosine / step_y]])
    origin = np.multiply(centre, scale) - np.multiply((width - 1, height - 1), _STEPS / 2) @ axes
    steps = np.rint((points - origin) @ back).astype(np.int32)
    rings = [steps[end - len(polygon) : end] for polygon, end in zip(polygons, accumulate(map(len, polygons)))]
    return _Window(width, height, rings, axes, origin + low)


def _zero_line(window: _Window, parts: NDArray[np.float64]) -> NDArray[np.int32]:
    """(P, 2) outline, in steps, of where the mean distance by `parts` is positive; (0, 2) when nowhere."""
    edge = np.empty((window.height, window.width), np.uint8)
    sign, distance = np.zeros((2, window.height, window.width), np.float32)
    for ring, share in zip(window.rings, (parts / parts.sum()).tolist()):
        edge[:], sign[:] = 1, -share
        cv2.polylines(edge, [ring], True, 0, shift=_SHIFT)
        cv2.fillPoly(sign, [ring], share, shift=_SHIFT)
        cv2.accumulateProduct(cv2.distanceTransform(edge, cv2.DIST_L2, cv2.DIST_MASK_3), sign, distance)
    # Twice as fine, because distances can be interpolated. findContours runs through the centres of the outermost
    # cells: with half a cell of margin the outline has neither grown nor shrunk.
    region = cv2.resize(distance, None, fx=2, fy=2) >= -0.25
    contours, _ = cv2.findContours(region.astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    if not contours:
        return np.zeros((0, 2), np.int32)
    outline = cv2.approxPolyDP(max(contours, key=cv2.contourArea), 1.2, True).reshape(-1, 2)
    # The centre of fine cell k lies at k / 2 - 1 / 4.
    return (outline * (_STEPS // 2) - _STEPS // 4).astype(np.int32)


def _clipped(outline: NDArray[np.int32], rings: Sequence[NDArray[np.int32]]) -> NDArray[np.int64] | None:
    """(P, 2): the largest part of the outline inside the union of the rings, None when there is no area."""
    areas = [cv2.contourArea(ring, True) for ring in rings]
    # Polygons far thinner than a window's smallest step have no area left.
    if len(outline) < 3 or not cv2.contourArea(outline) or not any(areas):
        return None
    clipper = pyclipper.Pyclipper()
    clipper.AddPath(outline.tolist(), pyclipper.PT_SUBJECT)
    # All with the same orientation: opposite ones would cancel where they overlap.
    clipper.AddPaths([ring[:: 1 if area > 0 else -1].tolist() for ring, area in zip(rings, areas)], pyclipper.PT_CLIP)
    pieces = clipper.Execute(pyclipper.CT_INTERSECTION, pyclipper.PFT_NONZERO, pyclipper.PFT_NONZERO)
    return np.array(max(pieces, key=pyclipper.Area)) if pieces else None

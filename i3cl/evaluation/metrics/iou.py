"""The text-detection IoU protocol: recall, precision and hmean with don't-care regions.

The rules are those of the ICDAR robust-reading scripts (ArT, LSVT, CTW1500 v2, Total-Text as x, y, text):

1. A detection is dropped when more than half of its area lies in one don't-care truth: |G n D| / |D| > 0.5.
   Several don't-cares are not summed. A detection without area is not dropped.
2. Kept detections and care truths are matched one to one; a pair counts when IoU = |G n D| / |G u D| is above
   the threshold, strictly.
3. Totals are summed over the images first: R = TP / truths, P = TP / kept detections, H = 2PR / (P + R). Each
   is 0 when its denominator is 0.

Self-intersecting polygons are repaired by `geometry.to_shapely`, truths and detections alike. A truth without
area cannot be found by anyone, so it counts as a don't-care.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import shapely
from numpy.typing import ArrayLike, NDArray

from i3cl.geometry import Polygon, as_polygon, overlaps, short_side

Matching = Literal["first", "best_gt", "max", "greedy"]

UNMATCHED = -1
"""`assign`: a kept detection without a truth, a false positive."""
DROPPED = -2
"""`assign`: a detection that lies in a don't-care region, neither right nor wrong."""

MATCHINGS: dict[Matching, str] = {
    "first": "truths in file order take their first free detection in file order",
    "best_gt": "detections in file order, each looks at its best truth only",
    "max": "maximum bipartite matching",
    "greedy": "pairs by descending IoU",
}
"""Who is matched first, with its explanation."""


@dataclass(frozen=True)
class IouSummary:
    """The score of a data set at one score threshold."""

    recall: float
    precision: float
    hmean: float
    threshold: float
    """Detections with a score above this count."""
    true_positives: int
    truths: int
    """Care truths, the denominator of recall."""
    dont_cares: int
    """Truths that count neither way, those without area included."""
    detections: int
    """Kept detections above the threshold, the denominator of precision."""
    dropped: int
    """Detections above the threshold that lie in a don't-care region."""
    images: int
    invalid_truths: int
    """Truths without area."""
    repaired: int
    """Self-intersecting polygons, truths and detections, that were repaired before measuring."""
    rules: str
    """The rule set in one line, to be printed beside the numbers."""


@dataclass(frozen=True)
class PrecisionRecall:
    """The score at every threshold that makes a difference: arrays of one length, thresholds ascending."""

    thresholds: NDArray[np.float64]
    recall: NDArray[np.float64]
    precision: NDArray[np.float64]
    hmean: NDArray[np.float64]


def mark_small(truths: Sequence[ArrayLike], ignore: ArrayLike, small_side: float) -> NDArray[np.bool_]:
    """`ignore` with the truths of a short side (smallest rotated rectangle) under `small_side` pixels added.

    truths: N polygons (P, 2); ignore: (N,) bool. Returns a new (N,) bool array. ValueError if the lengths
    differ.
    """
    marked = _flags(ignore, len(truths))
    return marked | np.array([short_side(as_polygon(truth)) < small_side for truth in truths], dtype=bool)


def assign(
    truths: Sequence[ArrayLike],
    ignore: ArrayLike,
    detections: Sequence[ArrayLike],
    iou: float = 0.5,
    matching: Matching = "first",
) -> NDArray[np.int64]:
    """One image's verdicts: (M,) int64, for each detection its truth's index, `UNMATCHED` or `DROPPED`.

    All detections take part: filter by score first. truths: N polygons (P, 2); ignore: (N,) bool; detections:
    M polygons. ValueError for a matching that does not exist, lengths that differ and polygons of fewer than
    3 points.
    """
    _check_rule(iou, matching)
    image = _measure(truths, ignore, detections, iou)
    verdict = np.full(len(detections), UNMATCHED, np.int64)
    verdict[image.dropped] = DROPPED
    for truth, detection in match_pairs(image.truth, image.detection, image.iou, matching):
        verdict[detection] = truth
    return verdict


class IouMetric:
    """Collects images with `update`, then answers for any score threshold.

    Every image of the truth must be given, those without a detection too: their truths count as missed.

    >>> square = [[0, 0], [9, 0], [9, 9], [0, 9]]
    >>> metric = IouMetric()
    >>> metric.update("photo", truths=[square], ignore=[False], detections=[square], scores=[0.8])
    >>> metric.summary(0.5).hmean
    1.0
    """

    # Polygons are measured once, in update(), and there an image becomes a list of steps: (score, change of
    # its true positives when the threshold falls below that score). Every threshold's total is then a sum of
    # steps, so that a sweep costs one sort, however many thresholds it has.

    def __init__(self, iou: float = 0.5, matching: Matching = "first") -> None:
        """iou: 0-1, a match is above it. matching: who is matched first. ValueError for any other value."""
        _check_rule(iou, matching)
        self.iou = iou
        self.matching: Matching = matching
        self._images: set[int | str] = set()
        self._truths = self._dont_cares = self._invalid_truths = self._repaired = 0
        self._kept: list[NDArray[np.float64]] = []
        self._dropped: list[NDArray[np.float64]] = []
        self._step_scores: list[NDArray[np.float64]] = []
        self._steps: list[NDArray[np.int64]] = []

    def update(
        self,
        image_id: int | str,
        truths: Sequence[ArrayLike],
        ignore: ArrayLike,
        detections: Sequence[ArrayLike],
        scores: ArrayLike,
    ) -> None:
        """Adds one image.

        truths: N polygons (P, 2) in pixels; ignore: (N,) bool, True for don't-care; detections: M polygons in
        the same pixels; scores: (M,) in 0-1. The order of both lists matters to `first` and `best_gt`: it
        stands for the order of the lines in the scripts' files, which need not be that of the scores.
        ValueError for an image given twice, lengths that differ, scores outside 0-1 and polygons of fewer
        than 3 points or with values that are not finite.
        """
        if image_id in self._images:
            raise ValueError(f"image {image_id!r} was given twice")
        score = np.asarray(scores, dtype=np.float64).reshape(-1)
        if len(score) != len(detections):
            raise ValueError(f"image {image_id!r}: {len(detections)} detections but {len(score)} scores")
        if not ((score >= 0) & (score <= 1)).all():
            raise ValueError(f"image {image_id!r}: scores must lie in 0-1")
        try:
            image = _measure(truths, ignore, detections, self.iou)
        except ValueError as error:
            raise ValueError(f"image {image_id!r}: {error}") from error

        self._images.add(image_id)
        self._truths += image.truths
        self._dont_cares += len(truths) - image.truths
        self._invalid_truths += image.invalid_truths
        self._repaired += image.repaired
        self._kept.append(score[~image.dropped])
        self._dropped.append(score[image.dropped])

        rivals_of_truth = np.bincount(image.truth, minlength=len(truths))[image.truth]
        rivals_of_detection = np.bincount(image.detection, minlength=len(detections))[image.detection]
        alone = (rivals_of_truth == 1) & (rivals_of_detection == 1)
        self._step_scores.append(score[image.detection[alone]])
        self._steps.append(np.ones(np.count_nonzero(alone), np.int64))

        truth, detection, iou = image.truth[~alone], image.detection[~alone], image.iou[~alone]
        levels = np.unique(score[detection])[::-1]
        reached = [0]
        for level in levels:
            part = score[detection] >= level
            reached.append(len(match_pairs(truth[part], detection[part], iou[part], self.matching)))
        self._step_scores.append(levels)
        self._steps.append(np.diff(reached))

    def merge(self, other: IouMetric) -> None:
        """Adds the images of another metric. ValueError when its rules differ or an image is in both."""
        if (self.iou, self.matching) != (other.iou, other.matching):
            raise ValueError("metrics with different rules cannot be merged")
        shared = self._images & other._images
        if shared:
            raise ValueError(f"image {next(iter(shared))!r} was given twice")
        self._images |= other._images
        self._truths += other._truths
        self._dont_cares += other._dont_cares
        self._invalid_truths += other._invalid_truths
        self._repaired += other._repaired
        self._kept += other._kept
        self._dropped += other._dropped
        self._step_scores += other._step_scores
        self._steps += other._steps

    def summary(self, score_threshold: float | Literal["best"] = "best") -> IouSummary:
        """The score of the detections above `score_threshold`.

        'best' takes the threshold of `curve` with the highest hmean, the lowest one of equals. It is chosen
        on the very images that it is measured on, so the number is optimistic; `rules` says that it was.
        ValueError for any other word.
        """
        if isinstance(score_threshold, str):
            if score_threshold != "best":
                raise ValueError(f"score_threshold is a number or 'best', not {score_threshold!r}")
            curve = self.curve()
            threshold = float(curve.thresholds[np.argmax(curve.hmean)])
            choice = "the best of these images"
        else:
            threshold = float(score_threshold)
            choice = "fixed"
        at = np.array([threshold])
        true_positives, detections = self._true_positives(at), self._detections(at)
        recall, precision, hmean = self._rates(true_positives, detections)
        return IouSummary(
            recall=float(recall[0]),
            precision=float(precision[0]),
            hmean=float(hmean[0]),
            threshold=threshold,
            true_positives=int(true_positives[0]),
            truths=self._truths,
            dont_cares=self._dont_cares,
            detections=int(detections[0]),
            dropped=int(sum(np.count_nonzero(scores > threshold) for scores in self._dropped)),
            images=len(self._images),
            invalid_truths=self._invalid_truths,
            repaired=self._repaired,
            rules=(
                f"polygon IoU > {self.iou:g}; matching '{self.matching}' ({MATCHINGS[self.matching]});"
                " a detection with more than half of its area in one don't-care region is dropped;"
                f" totals over all images; score > {threshold:.4g} ({choice})"
            ),
        )

    def curve(self) -> PrecisionRecall:
        """The score at threshold 0 and at every distinct score of kept detections but the highest."""
        distinct = np.unique(_joined(self._kept))[:-1]
        thresholds = np.unique(np.concatenate([np.zeros(1), distinct]))
        rates = self._rates(self._true_positives(thresholds), self._detections(thresholds))
        return PrecisionRecall(thresholds, *rates)

    def _true_positives(self, thresholds: NDArray[np.float64]) -> NDArray[np.int64]:
        steps = np.concatenate([np.zeros(0, np.int64), *self._steps])
        return _total_above(_joined(self._step_scores), steps, thresholds)

    def _detections(self, thresholds: NDArray[np.float64]) -> NDArray[np.int64]:
        scores = _joined(self._kept)
        return _total_above(scores, np.ones(len(scores), np.int64), thresholds)

    def _rates(
        self, true_positives: NDArray[np.int64], detections: NDArray[np.int64]
    ) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
        recall = true_positives / max(self._truths, 1)
        precision = true_positives / np.maximum(detections, 1)
        both = recall + precision
        hmean = 2 * recall * precision / np.where(both > 0, both, 1.0)
        return recall, precision, hmean


@dataclass(frozen=True)
class _Measured:
    truth: NDArray[np.int64]
    """(K,) index of the care truth of a pair above the IoU threshold, ascending, ties by detection."""
    detection: NDArray[np.int64]
    """(K,) index of its kept detection."""
    iou: NDArray[np.float64]
    """(K,)."""
    dropped: NDArray[np.bool_]
    """(M,) detections inside a don't-care region."""
    truths: int
    invalid_truths: int
    repaired: int


def _measure(truths: Sequence[ArrayLike], ignore: ArrayLike, detections: Sequence[ArrayLike], iou: float) -> _Measured:
    flags = _flags(ignore, len(truths))
    truth_polygons = [as_polygon(truth) for truth in truths]
    detection_polygons = [as_polygon(detection) for detection in detections]
    found = overlaps(truth_polygons, detection_polygons)
    invalid = ~flags & (found.area_first == 0)
    flags = flags | invalid

    inside = flags[found.first] & (found.intersection > 0.5 * found.area_second[found.second])
    dropped = np.zeros(len(detections), bool)
    dropped[found.second[inside]] = True
    pairs = (found.iou > iou) & ~flags[found.first] & ~dropped[found.second]
    return _Measured(
        truth=found.first[pairs],
        detection=found.second[pairs],
        iou=found.iou[pairs],
        dropped=dropped,
        truths=int(np.count_nonzero(~flags)),
        invalid_truths=int(np.count_nonzero(invalid)),
        repaired=_count_invalid([*truth_polygons, *detection_polygons]),
    )


def _count_invalid(polygons: Sequence[Polygon]) -> int:
    if not polygons:
        return 0
    ring = np.repeat(np.arange(len(polygons)), [len(polygon) for polygon in polygons])
    rings = shapely.linearrings(np.concatenate(polygons).astype(np.float64), indices=ring)
    return int(np.count_nonzero(~shapely.is_valid(shapely.polygons(rings))))


def _flags(ignore: ArrayLike, count: int) -> NDArray[np.bool_]:
    flags = np.asarray(ignore, dtype=bool).reshape(-1)
    if len(flags) != count:
        raise ValueError(f"{count} truths but {len(flags)} ignore flags")
    return flags


def _check_rule(iou: float, matching: str) -> None:
    if matching not in MATCHINGS:
        raise ValueError(f"matching must be one of {', '.join(MATCHINGS)}, not {matching!r}")
    if not 0 <= iou <= 1:
        raise ValueError(f"iou must lie in 0-1, not {iou}")


def match_pairs(
    truth: NDArray[np.int64], detection: NDArray[np.int64], iou: NDArray[np.float64], matching: Matching
) -> list[tuple[int, int]]:
    """One-to-one (truth, detection) pairs; the candidates come sorted by truth, then detection."""
    pairs = list(zip(truth.tolist(), detection.tolist()))
    if matching == "max":
        return _maximum_matching(pairs)
    if matching == "best_gt":
        best: dict[int, int] = {}
        for k in np.lexsort((truth, -iou, detection)).tolist():
            best.setdefault(pairs[k][1], k)
        pairs = [pairs[k] for k in best.values()]
    elif matching == "greedy":
        pairs = [pairs[k] for k in np.lexsort((detection, truth, -iou)).tolist()]
    return _take_free(pairs)


def _take_free(pairs: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    truths: set[int] = set()
    detections: set[int] = set()
    taken = []
    for truth, detection in pairs:
        if truth not in truths and detection not in detections:
            truths.add(truth)
            detections.add(detection)
            taken.append((truth, detection))
    return taken


def _maximum_matching(pairs: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Maximum bipartite matching by augmenting paths (Kuhn), breadth first so that nothing recurses."""
    neighbours: dict[int, list[int]] = {}
    for truth, detection in pairs:
        neighbours.setdefault(truth, []).append(detection)
    detection_of: dict[int, int] = {}
    truth_of: dict[int, int] = {}
    for start in neighbours:
        reached_from: dict[int, int] = {}
        free = None
        queue = [start]
        for truth in queue:
            for detection in neighbours[truth]:
                if detection not in reached_from:
                    reached_from[detection] = truth
                    if detection not in truth_of:
                        free = detection
                        break
                    queue.append(truth_of[detection])
            if free is not None:
                break
        while free is not None:
            truth = reached_from[free]
            given_up = detection_of.get(truth)
            detection_of[truth], truth_of[free] = free, truth
            free = given_up
    return sorted(detection_of.items())


def _joined(parts: Sequence[NDArray[np.float64]]) -> NDArray[np.float64]:
    return np.concatenate([np.zeros(0), *parts])


def _total_above(scores: NDArray[np.float64], values: NDArray[np.int64], thresholds: NDArray[np.float64]) -> NDArray[np.int64]:
    """For each threshold the sum of the values whose score is above it."""
    order = np.argsort(scores, kind="stable")
    from_top = np.concatenate([np.cumsum(values[order][::-1])[::-1], np.zeros(1, np.int64)])
    return from_top[np.searchsorted(scores[order], thresholds, side="right")]

"""The one F of this package: collect images with `DetectionMetric.update`, ask for recall, precision and F at any threshold."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from i3cl.evaluation.metrics.batch import Batch, EvalImage, measure_polygons
from i3cl.evaluation.metrics.judge import candidates, judge
from i3cl.evaluation.metrics.matching import match_pairs
from i3cl.evaluation.metrics.protocols import PROTOCOLS, Rules

COLUMNS = (
    "recall_hits",
    "precision_hits",
    "truths",
    "dont_cares",
    "detections",
    "dropped",
    "skipped",
    "invalid_truths",
    "repaired",
)
"""What is counted in each image."""


@dataclass(frozen=True)
class Summary:
    """The score of a data set at one score threshold."""

    recall: float
    precision: float
    hmean: float
    recall_hits: float
    """What the truths add up to: by IoU the true positives."""
    precision_hits: float
    """What the detections add up to: by IoU the true positives."""
    truths: int
    """Care truths, the denominator of recall."""
    dont_cares: int
    """Truths that count neither way, those without area included."""
    detections: int
    """Kept detections, the denominator of precision."""
    dropped: int
    """Detections that lie in a don't-care region."""
    skipped: int
    """Invalid detections that the rules leave out."""
    invalid_truths: int
    """Truths without area or with fewer than 3 points."""
    repaired: int
    """Self-intersecting polygons, truths and detections, that were repaired before measuring."""
    images: int
    threshold: float | None
    """Detections with a score above this count; None: all of them."""
    rules: str
    """The rule set in one line, to be printed beside the numbers."""

    @property
    def true_positives(self) -> int:
        """Matched truths; a whole number by IoU, rounded by DetEval and TIoU."""
        return round(self.recall_hits)


@dataclass(frozen=True, eq=False)
class Counts:
    """Counts of each image by one rule set at one score threshold: small, and all that intervals and comparisons need."""

    rules: Rules
    threshold: float | None
    """Detections with a score above this count; None: all of them."""
    names: Sequence[str]
    """I image names."""
    table: NDArray[np.float64]
    """(I, 9) one row per image, columns as in `COLUMNS`."""

    @property
    def ratios(self) -> NDArray[np.float64]:
        """(I, 4) recall hits, truths, precision hits, detections: the numbers behind R, P and F."""
        return self.table[:, [0, 2, 1, 4]]

    def image_hmean(self) -> NDArray[np.float64]:
        """(I,) F of each image, for display: 1 where there is neither truth nor detection. The mean of these is not a score."""
        recall_hits, truths, precision_hits, detections = self.ratios.T
        recall = np.where(truths > 0, recall_hits / np.maximum(truths, 1), 1.0)
        alone = np.where(truths > 0, 0.0, 1.0)
        precision = np.where(detections > 0, precision_hits / np.maximum(detections, 1), alone)
        return hmean(recall, precision)

    def summary(self, choice: str = "fixed") -> Summary:
        """Totals over all images, then R, P and F from the totals. choice: where the threshold comes from, in words."""
        return summarise(self.table.sum(axis=0), len(self.names), self.rules, self.threshold, choice)


@dataclass(frozen=True)
class PrecisionRecall:
    """The score at every threshold that makes a difference: arrays of one length, thresholds ascending."""

    thresholds: NDArray[np.float64]
    recall: NDArray[np.float64]
    precision: NDArray[np.float64]
    hmean: NDArray[np.float64]


class DetectionMetric:
    """Collects images with `update`, then answers for any score threshold.

    Every image of the truth must be given, also those without a detection: their truths count as missed.

    >>> square = np.array([[0, 0], [9, 0], [9, 9], [0, 9]], float)
    >>> metric = DetectionMetric()
    >>> metric.update([EvalImage("photo", [square], np.array([False]), [square], np.array([0.8]))])
    >>> metric.summary(0.5).hmean
    1.0
    """

    def __init__(self, rules: Rules = PROTOCOLS["icdar"][0]) -> None:
        self.rules = rules
        self._names: set[str] = set()
        self._batches: list[Batch] = []

    def update(self, images: Sequence[EvalImage] | Batch) -> None:
        """Adds images, or a batch that was measured before with the rules' repair.

        The order of the truths and detections of an image matters to the matchings 'first' and 'best_gt': it stands for the
        order of the lines in the scripts' files, which need not be that of the scores.

        Raises:
            ValueError: An image was given twice, or a polygon is broken.
        """
        batch = images if isinstance(images, Batch) else measure_polygons(images, self.rules.repair)
        self._add_names(batch.names)
        self._batches.append(batch if self.rules.method == "tiou" else batch.without_shapes())

    def merge(self, other: DetectionMetric) -> None:
        """Adds the images of another metric.

        Raises:
            ValueError: Its rules differ, or an image is in both.
        """
        if self.rules != other.rules:
            raise ValueError("metrics with different rules cannot be merged")
        self._add_names([name for batch in other._batches for name in batch.names])
        self._batches += other._batches

    def _add_names(self, names: Sequence[str]) -> None:
        new = set(names)
        twice = self._names & new
        if twice or len(new) < len(names):
            name = min(twice) if twice else next(n for n in new if list(names).count(n) > 1)
            raise ValueError(f"image {name} was given twice")
        self._names |= new

    def counts(self, threshold: float | None = None) -> Counts:
        """Counts of each image; detections with a score above `threshold` count, with None all of them."""
        tables = [_table(batch, self.rules, threshold) for batch in self._batches]
        names = [name for batch in self._batches for name in batch.names]
        return Counts(self.rules, threshold, names, np.concatenate([np.zeros((0, len(COLUMNS))), *tables]))

    def summary(self, threshold: float | Literal["best"] | None = None) -> Summary:
        """The score of the detections above `threshold`; None: of all detections.

        'best' takes the threshold of `curve` with the highest F, the lowest one of equals. It is chosen on the images that it
        is measured on, so the number is optimistic; `Summary.rules` says that it was chosen so.

        Raises:
            ValueError: Any other word, or 'best' with rules that have no `curve`.
        """
        if isinstance(threshold, str):
            if threshold != "best":
                raise ValueError(f"the threshold is a number, None or 'best', not {threshold!r}")
            curve = self.curve()
            best = float(curve.thresholds[curve.hmean.argmax()])
            return self.counts(best).summary("the best of all, chosen on these images")
        return self.counts(threshold).summary()

    def curve(self) -> PrecisionRecall:
        """The score at threshold 0 and at every distinct score of kept detections but the highest.

        Costs one sort, however many thresholds there are: each image becomes a list of steps, the changes of its true
        positives when the threshold falls below a score, and the total at any threshold is a sum of steps.

        Raises:
            ValueError: The rules do not match by IoU, or compare scores by `>=`.
        """
        if self.rules.method != "iou" or self.rules.scores_at_least:
            raise ValueError(f"{self.rules.name}: only rules that match by IoU and compare scores by > have a curve")
        parts = [_steps(batch, self.rules) for batch in self._batches]
        kept, scores, steps, truths = ([part[k] for part in parts] for k in range(4))
        kept_scores = np.concatenate([np.zeros(0), *kept])
        thresholds = np.unique(np.concatenate([np.zeros(1), np.unique(kept_scores)[:-1]]))
        hits = _total_above(np.concatenate([np.zeros(0), *scores]), np.concatenate([np.zeros(0), *steps]), thresholds)
        detections = _total_above(kept_scores, np.ones(len(kept_scores)), thresholds)
        totals = np.stack([hits, np.full(len(hits), float(sum(truths))), hits, detections], axis=1)
        return PrecisionRecall(thresholds, *rates(totals, self.rules.no_truth_is_full_recall))


def summarise(totals: NDArray[np.float64], images: int, rules: Rules, threshold: float | None, choice: str = "fixed") -> Summary:
    """R, P and F of (9,) totals over the images, columns as in `COLUMNS`."""
    total = dict(zip(COLUMNS, np.asarray(totals, np.float64).tolist()))
    recall, precision, f = rates(
        np.array([total["recall_hits"], total["truths"], total["precision_hits"], total["detections"]]),
        rules.no_truth_is_full_recall,
    )
    sign = ">=" if rules.scores_at_least else ">"
    return Summary(
        float(recall),
        float(precision),
        float(f),
        recall_hits=total.pop("recall_hits"),
        precision_hits=total.pop("precision_hits"),
        **{name: round(value) for name, value in total.items()},
        images=images,
        threshold=threshold,
        rules=rules.text + ("" if threshold is None else f"; score {sign} {threshold:.4g} ({choice})"),
    )


def rates(
    totals: NDArray[np.float64], no_truth_is_full_recall: bool = False
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """R, P and F, each (...), of (..., 4) totals: recall hits, truths, precision hits, detections."""
    recall_hits, truths, precision_hits, detections = np.moveaxis(np.asarray(totals, np.float64), -1, 0)
    recall = np.where(truths > 0, recall_hits / np.where(truths > 0, truths, 1), 0.0)
    precision = np.where(detections > 0, precision_hits / np.where(detections > 0, detections, 1), 0.0)
    if no_truth_is_full_recall:
        recall = np.where(truths > 0, recall, 1.0)
        precision = np.where((truths == 0) & (detections == 0), 1.0, precision)
    return recall, precision, hmean(recall, precision)


def hmean(recall: NDArray[np.float64], precision: NDArray[np.float64]) -> NDArray[np.float64]:
    """2 R P / (R + P), 0 where both are 0."""
    both = recall + precision
    return 2 * recall * precision / np.where(both > 0, both, 1.0)


def _table(batch: Batch, rules: Rules, threshold: float | None) -> NDArray[np.float64]:
    """(I, 9) counts of each image of the batch."""
    verdicts = judge(batch, rules, threshold)
    number = len(batch.names)

    def of_truths(values: NDArray) -> NDArray[np.float64]:
        return np.bincount(batch.truth_image, values.astype(np.float64), number).astype(np.float64)

    def of_detections(values: NDArray) -> NDArray[np.float64]:
        return np.bincount(batch.detection_image, values.astype(np.float64), number).astype(np.float64)

    columns = {
        "recall_hits": of_truths(verdicts.truth_credit),
        "precision_hits": of_detections(verdicts.detection_credit),
        "truths": of_truths(verdicts.care),
        "dont_cares": of_truths(~verdicts.care),
        "detections": of_detections(verdicts.kept),
        "dropped": of_detections(verdicts.dropped),
        "skipped": of_detections(verdicts.skipped),
        "invalid_truths": of_truths(batch.truth_area == 0),
        "repaired": of_truths(batch.truth_repaired & (batch.truth_area > 0))
        + of_detections(batch.detection_repaired & ~verdicts.below & (batch.detection_area > 0)),
    }
    return np.stack([columns[name] for name in COLUMNS], axis=1)


def _steps(batch: Batch, rules: Rules) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64], int]:
    """Scores of kept detections; scores and sizes of the steps of the true positives; number of care truths."""
    verdicts = judge(batch, rules)
    truth, detection, iou = candidates(batch, rules, verdicts.care, verdicts.kept)
    rivals_of_truth = np.bincount(truth, minlength=len(batch.ignore))[truth]
    rivals_of_detection = np.bincount(detection, minlength=len(batch.scores))[detection]
    alone = (rivals_of_truth == 1) & (rivals_of_detection == 1)
    scores, steps = [batch.scores[detection[alone]]], [np.ones(np.count_nonzero(alone))]

    # Where pairs compete, each image is matched again at every score at which one more detection takes part.
    truth, detection, iou = truth[~alone], detection[~alone], iou[~alone]
    image = batch.truth_image[truth]
    starts = np.flatnonzero(np.diff(image, prepend=-1)).tolist()
    for start, end in zip(starts, [*starts[1:], len(image)]):
        g, d, value = truth[start:end], detection[start:end], iou[start:end]
        score = batch.scores[d]
        levels = np.unique(score)[::-1]
        reached = [0]
        for level in levels:
            part = score >= level
            reached.append(len(match_pairs(g[part], d[part], value[part], rules.matching)[0]))
        scores.append(levels)
        steps.append(np.diff(reached).astype(np.float64))
    return batch.scores[verdicts.kept], np.concatenate(scores), np.concatenate(steps), int(verdicts.care.sum())


def _total_above(
    scores: NDArray[np.float64], values: NDArray[np.float64], thresholds: NDArray[np.float64]
) -> NDArray[np.float64]:
    """For each threshold the sum of the values whose score is above it."""
    order = np.argsort(scores, kind="stable")
    from_top = np.concatenate([np.cumsum(values[order][::-1])[::-1], np.zeros(1)])
    return from_top[np.searchsorted(scores[order], thresholds, side="right")]

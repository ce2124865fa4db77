"""What becomes of every truth and detection of a batch by one rule set."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from i3cl.evaluation.metrics import deteval, tiou
from i3cl.evaluation.metrics.batch import Batch, EvalImage, measure_polygons
from i3cl.evaluation.metrics.matching import Matching, match_pairs
from i3cl.evaluation.metrics.protocols import Rules, iou_rules

UNMATCHED = -1
"""A detection without a truth; when it counts, it is a false positive."""
DROPPED = -2
"""`assign`: a detection that lies in a don't-care region, neither right nor wrong."""


@dataclass(frozen=True, eq=False)
class Verdicts:
    """What became of every truth and detection of a batch."""

    care: NDArray[np.bool_]
    """(N,) truths that count."""
    kept: NDArray[np.bool_]
    """(M,) detections that count."""
    dropped: NDArray[np.bool_]
    """(M,) detections above the score threshold that lie in a don't-care region."""
    skipped: NDArray[np.bool_]
    """(M,) detections above the score threshold that are invalid and count neither way."""
    below: NDArray[np.bool_]
    """(M,) detections that the score threshold leaves out."""
    truth_credit: NDArray[np.float64]
    """(N,) what each truth adds to recall: 0 or 1 by IoU, between them by DetEval and TIoU."""
    detection_credit: NDArray[np.float64]
    """(M,) what each detection adds to precision."""
    match: NDArray[np.int64]
    """(M,) truth that each detection is matched with, `UNMATCHED` for none; DetEval, which has no pairs, gives none."""


def judge(batch: Batch, rules: Rules, threshold: float | None = None) -> Verdicts:
    """Judges every polygon of a batch by the rules; detections above `threshold` count, with None all of them."""
    truths, detections = len(batch.ignore), len(batch.scores)
    care = ~batch.ignore & (batch.truth_area > 0) if rules.dont_care else np.ones(truths, bool)
    if threshold is None:
        above = np.ones(detections, bool)
    elif rules.scores_at_least:
        above = batch.scores.astype(np.float32) >= np.float32(threshold)
    else:
        above = batch.scores > threshold
    inside = ~care[batch.truth] & (batch.intersection > 0.5 * (batch.detection_area[batch.detection] + rules.dont_care_margin))
    dropped = np.zeros(detections, bool)
    dropped[batch.detection[inside]] = True
    dropped &= above
    invalid = batch.detection_repaired | (batch.detection_area == 0)
    skipped = invalid & above & ~dropped if rules.skip_invalid else np.zeros(detections, bool)
    kept = above & ~dropped & ~skipped

    truth_credit, detection_credit = np.zeros(truths), np.zeros(detections)
    match = np.full(detections, UNMATCHED, np.int64)
    if rules.method == "deteval":
        deteval.credit(
            batch,
            care,
            kept,
            rules.recall_threshold,
            rules.precision_threshold,
            rules.merge,
            truth_credit,
            detection_credit,
        )
    else:
        truth, detection = match_pairs(*candidates(batch, rules, care, kept), rules.matching)
        match[detection] = truth
        if rules.method == "tiou":
            truth_credit[truth], detection_credit[detection] = tiou.tightness(batch, truth, detection)
        else:
            truth_credit[truth] = detection_credit[detection] = 1.0
    return Verdicts(care, kept, dropped, skipped, ~above, truth_credit, detection_credit, match)


def candidates(
    batch: Batch, rules: Rules, care: NDArray[np.bool_], kept: NDArray[np.bool_]
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64]]:
    """(K,) truths, detections and IoUs of the pairs whose IoU is above the rules' threshold.

    care: (N,) truths that count; kept: (M,) detections that count.
    """
    iou = batch.iou(rules.union_margin)
    match = iou >= rules.iou if rules.at_least else iou > rules.iou
    match &= care[batch.truth] & kept[batch.detection]
    return batch.truth[match], batch.detection[match], iou[match]


def assign(
    truths: Sequence[ArrayLike],
    ignore: ArrayLike,
    detections: Sequence[ArrayLike],
    iou: float = 0.5,
    matching: Matching = "first",
) -> NDArray[np.int64]:
    """The verdicts of one image by polygon IoU. All detections take part: filter by score first.

    Args:
        truths: N polygons (P, 2), pixels.
        ignore: (N,) bool, True for don't-care.
        detections: M polygons (P, 2), pixels.
        iou: 0-1, a match is above it.
        matching: Who is matched first.

    Returns:
        (M,) int64: for each detection its truth's index, `UNMATCHED` or `DROPPED`.

    Raises:
        ValueError: The matching does not exist, lengths differ, or a polygon has fewer than 3 points.
    """
    rings, found = ([np.asarray(polygon) for polygon in polygons] for polygons in (truths, detections))
    image = EvalImage("1", rings, np.asarray(ignore, bool).reshape(-1), found, np.ones(len(found)))
    verdicts = judge(measure_polygons([image]), iou_rules(iou, matching))
    return np.where(verdicts.dropped, DROPPED, verdicts.match)

"""RCTW-17's average precision: detections of all images by descending score, polygon IoU > 0.5, each truth used once."""

from __future__ import annotations

import numpy as np

from i3cl.evaluation.metrics.batch import Batch
from i3cl.evaluation.metrics.judge import judge
from i3cl.evaluation.metrics.protocols import Rules

RULES = "PASCAL VOC AP (area under the precision envelope) at polygon IoU > {iou:g}; don't-care detections dropped"


def polygon_ap(batch: Batch, iou: float = 0.5) -> float:
    """Area under the monotone precision-recall curve, 0-1; 0 without a care truth.

    A detection is right when its best truth has an IoU above `iou` and is not taken by a detection of higher score.
    """
    verdicts = judge(batch, Rules("rctw", iou=iou))
    ious = batch.iou()
    match = verdicts.care[batch.truth] & verdicts.kept[batch.detection] & (ious > iou)
    truth, detection, value = batch.truth[match], batch.detection[match], ious[match]
    best: dict[int, int] = {}
    for k in np.lexsort((truth, -value, detection)).tolist():
        best.setdefault(int(detection[k]), int(truth[k]))
    kept = np.flatnonzero(verdicts.kept)
    taken: set[int] = set()
    right = np.zeros(len(kept))
    for k, d in enumerate(kept[np.argsort(-batch.scores[kept], kind="stable")].tolist()):
        if d in best and best[d] not in taken:
            taken.add(best[d])
            right[k] = 1
    truths = int(verdicts.care.sum())
    if not truths or not len(kept):
        return 0.0
    hits = np.cumsum(right)
    precision = np.maximum.accumulate((hits / np.arange(1, len(hits) + 1))[::-1])[::-1]
    return float((precision * right).sum() / truths)

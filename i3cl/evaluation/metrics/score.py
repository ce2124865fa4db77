"""One model's predictions of a data set against its truth: the row of a results table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from i3cl.config import EvaluateSettings
from i3cl.data.formats.records import ImageRecord
from i3cl.evaluation.metrics.coco_ap import ImageRecord as ApRecord
from i3cl.evaluation.metrics.coco_ap import coco_mask_ap
from i3cl.evaluation.metrics.iou import IouMetric, PrecisionRecall, mark_small
from i3cl.geometry import Polygon

Found = Mapping[int, tuple[Sequence[Polygon], NDArray[np.floating]]]
"""Image id -> polygons and their scores; an image that is absent has none."""


@dataclass(frozen=True)
class Score:
    """One row of a table."""

    name: str
    recall: float
    precision: float
    hmean: float
    threshold: float
    """Detections above this score count."""
    hmean_large: float
    """hmean at its own best threshold, with truths of a short side under evaluate.small_side as don't-care."""
    mask_ap: float
    """COCO mask AP over IoU 0.50-0.95."""
    mask_ap50: float
    rules: str
    """The rule set in one line."""


@dataclass(frozen=True)
class Measured:
    score: Score
    curve: PrecisionRecall


def measure(name: str, truth: Sequence[ImageRecord], found: Found, settings: EvaluateSettings) -> Measured:
    """Polygon-IoU and COCO scores; every image of the truth counts, also one without predictions."""
    every, large = (IouMetric(settings.iou, settings.matching) for _ in range(2))
    for_ap = []
    for record in truth:
        polygons, scores = found.get(record.id, ((), np.zeros(0)))
        truths, ignore = [i.polygon for i in record.instances], np.array([i.ignore for i in record.instances], bool)
        every.update(record.id, truths, ignore, polygons, scores)
        large.update(record.id, truths, mark_small(truths, ignore, settings.small_side), polygons, scores)
        for_ap.append(ApRecord(record.height, record.width, truths, ignore, polygons, scores))
    best = every.summary(settings.score_threshold)
    ap = coco_mask_ap(for_ap)
    score = Score(
        name,
        best.recall,
        best.precision,
        best.hmean,
        best.threshold,
        large.summary(settings.score_threshold).hmean,
        ap["AP"],
        ap["AP50"],
        best.rules,
    )
    return Measured(score, every.curve())

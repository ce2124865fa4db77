"""One model's predictions of a data set against its truth: the row of a results table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from i3cl.config import EvaluateSettings
from i3cl.data.formats.records import ImageRecord
from i3cl.evaluation.metrics.batch import EvalImage, mark_small
from i3cl.evaluation.metrics.coco_ap import coco_mask_ap
from i3cl.evaluation.metrics.metric import DetectionMetric, PrecisionRecall
from i3cl.evaluation.metrics.protocols import iou_rules
from i3cl.geometry import Polygon

Predictions = Mapping[int, tuple[Sequence[Polygon], NDArray[np.floating]]]
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
    """F at its own best threshold, with truths of a short side under evaluate.small_side as don't-care."""
    mask_ap: float
    """COCO mask AP over IoU 0.50-0.95."""
    mask_ap50: float
    rules: str
    """The rule set in one line."""


@dataclass(frozen=True)
class Measured:
    """A model's score and how it depends on the score threshold."""

    score: Score
    curve: PrecisionRecall


def score_predictions(name: str, truth: Sequence[ImageRecord], predictions: Predictions, settings: EvaluateSettings) -> Measured:
    """Polygon-IoU and COCO scores; every image of the truth counts, also one without predictions."""
    images = [image_of_record(record, *predictions.get(record.id, ((), np.zeros(0)))) for record in truth]
    every, large = (DetectionMetric(iou_rules(settings.iou, settings.matching)) for _ in range(2))
    every.update(images)
    large.update([replace(i, ignore=mark_small(i.truths, i.ignore, settings.small_side)) for i in images])
    best = every.summary(settings.score_threshold)
    ap = coco_mask_ap(images)
    score = Score(
        name,
        best.recall,
        best.precision,
        best.hmean,
        best.threshold or 0.0,
        large.summary(settings.score_threshold).hmean,
        ap["AP"],
        ap["AP50"],
        best.rules,
    )
    return Measured(score, every.curve())


def image_of_record(
    record: ImageRecord, polygons: Sequence[NDArray[np.floating]], scores: NDArray[np.floating] | None = None
) -> EvalImage:
    """A record's truth with detections; scores: (M,) 0-1, 1 each when they are None."""
    return EvalImage(
        # Ids are unique in a data set, file names need not be.
        str(record.id),
        [i.polygon for i in record.instances],
        np.array([i.ignore for i in record.instances], bool),
        polygons,
        np.ones(len(polygons)) if scores is None else np.asarray(scores),
        height=record.height,
        width=record.width,
        file_name=record.file_name,
    )

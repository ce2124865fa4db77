"""The scoring step: checkpoints predict labelled images, and each is scored against the truth."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from i3cl.config import EvaluateSettings, MemberSettings, Settings, with_overrides
from i3cl.data.formats.predictions import member_predictions
from i3cl.data.formats.records import Dataset
from i3cl.evaluation.analysis.intervals import seeds_difference
from i3cl.evaluation.formats.table import check_image_sizes
from i3cl.evaluation.metrics.metric import DetectionMetric
from i3cl.evaluation.metrics.model_score import Measured, image_of_record, score_predictions
from i3cl.evaluation.metrics.protocols import iou_rules
from i3cl.inference.recipe import Given
from i3cl.labelling.calibration import write_calibration
from i3cl.labelling.predict import predict
from i3cl.labelling.trust import measure_trust


@dataclass(frozen=True)
class Scores:
    """What `score_checkpoints` returns."""

    predictions: str
    """Folder of the members' predictions."""
    members: dict[str, Measured]
    """By name, in the order in which they were given."""


def score_checkpoints(
    truth: Dataset,
    members: Mapping[str, str | MemberSettings],
    settings: Settings,
    out: str,
    title: str,
    given: Given | None = None,
    every_view: bool = False,
) -> Scores:
    """Polygon-IoU and COCO scores of checkpoints on labelled images. The same call continues where it was stopped.

    Args:
        truth: Labelled images. One that cannot be read counts as an image in which nothing was found.
        members: Name -> detector, or in its place a checkpoint directory.
        settings: The whole recipe; `evaluate`, `label` and `cluster.gpu` count.
        out: Folder for the predictions.
        title: Begins the lines of progress.
        given: What takes the place of the checkpoints' own test sizes and tiles; None: the keys of data.test_* and data.tile that
            the recipe or the command line gives.
        every_view: Predict in all of label.views, for those who need the stored predictions; scores are always those of the
            first one.

    Raises:
        UserError: As `predict` raises it, and for an image whose size is not the one that its annotation states.
    """
    if not every_view:
        settings = settings.model_copy(update={"label": settings.label.model_copy(update={"views": settings.label.views[:1]})})
    predictions = predict(truth, members, settings, out, title, given)
    check_image_sizes(predictions, truth.records)
    scored = {
        name: score_predictions(name, truth.records, member_predictions(predictions, name), settings.evaluate) for name in members
    }
    return Scores(predictions, scored)


@dataclass(frozen=True)
class Gain:
    """F of one model minus F of another on the same images, each at its own threshold."""

    difference: float
    low: float
    """Lower limit of the 95 % interval by paired bootstrap over the images."""
    high: float
    """Upper limit."""


def gain(truth: Dataset, a: tuple[Scores, str], b: tuple[Scores, str], settings: EvaluateSettings) -> Gain:
    """What model `a` reaches more than model `b`; each is given by what `score_checkpoints` returned and its name in it."""
    rows = []
    for scores, name in (a, b):
        found = member_predictions(scores.predictions, name)
        metric = DetectionMetric(iou_rules(settings.iou, settings.matching))
        metric.update([image_of_record(record, *found.get(record.id, ((), np.zeros(0)))) for record in truth.records])
        rows.append(metric.counts(scores.members[name].score.threshold).ratios)
    difference, interval = seeds_difference(rows[:1], rows[1:])
    return Gain(difference, interval.low, interval.high)


def calibrate(truth: Dataset, scores: Scores, settings: Settings, path: str) -> Settings:
    """Settings whose label.select.calibration is learned from the members' predictions of labelled images, written to `path`."""
    found = measure_trust(scores.predictions, truth.records, settings.label, settings.evaluate)
    write_calibration(path, found.calibration)
    return with_overrides(settings, {"label.select.calibration": path}, "selftrain.calibrate")


def score_labels(name: str, truth: Dataset, labels: Dataset, settings: EvaluateSettings) -> Measured:
    """Score pseudo labels as a student gets them: all count, whatever their score; ignore regions do not."""
    found = {}
    for record in labels.records:
        kept = [i for i in record.instances if not i.ignore]
        found[record.id] = ([i.polygon for i in kept], np.array([i.score for i in kept], np.float32))
    return score_predictions(name, truth.records, found, settings.model_copy(update={"score_threshold": 0.0}))

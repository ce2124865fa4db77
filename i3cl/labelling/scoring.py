"""The scoring step: checkpoints predict labelled images, and each is scored against the truth."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from i3cl.config import EvaluateSettings, Settings
from i3cl.data.formats.predictions import member_predictions
from i3cl.data.formats.records import Dataset
from i3cl.evaluation.metrics.model_score import Measured, score_predictions
from i3cl.inference.recipe import Given
from i3cl.labelling.predict import predict


@dataclass(frozen=True)
class Scores:
    """What `score_checkpoints` returns."""

    predictions: str
    """Folder of the members' predictions."""
    members: dict[str, Measured]
    """By name, in the order in which they were given."""


def score_checkpoints(
    truth: Dataset, members: dict[str, str], settings: Settings, out: str, title: str, given: Given | None = None
) -> Scores:
    """Polygon-IoU and COCO scores of checkpoints on labelled images. The same call continues where it was stopped.

    Args:
        truth: Labelled images. One that cannot be read counts as an image in which nothing was found.
        members: Name -> checkpoint directory.
        settings: The whole recipe; `evaluate`, `label` and `cluster.gpu` count.
        out: Folder for the predictions.
        title: Begins the lines of progress.
        given: What takes the place of the checkpoints' own test sizes; None: the keys of data.test_* that the recipe or the
            command line gives.

    Raises:
        UserError: As `predict` raises it.
    """
    predictions = predict(truth, members, settings, out, title, given)
    scored = {
        name: score_predictions(name, truth.records, member_predictions(predictions, name), settings.evaluate) for name in members
    }
    return Scores(predictions, scored)


def score_labels(name: str, truth: Dataset, labels: Dataset, settings: EvaluateSettings) -> Measured:
    """Score pseudo labels as a student gets them: all count, whatever their score; ignore regions do not."""
    found = {}
    for record in labels.records:
        kept = [i for i in record.instances if not i.ignore]
        found[record.id] = ([i.polygon for i in kept], np.array([i.score for i in kept], np.float32))
    return score_predictions(name, truth.records, found, settings.model_copy(update={"score_threshold": 0.0}))

"""The objectives of a sweep: F of pseudo labels made from stored predictions, or F of a student trained on them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from i3cl import storage
from i3cl.claims import claim_run
from i3cl.config import (
    EvaluateSettings,
    LabelSettings,
    Settings,
    with_overrides,
)
from i3cl.data.formats.predictions import member_predictions, read_predictions
from i3cl.data.formats.records import ImageRecord
from i3cl.errors import UserError
from i3cl.evaluation.analysis.intervals import compare, hmean_interval
from i3cl.evaluation.metrics.metric import Counts, DetectionMetric
from i3cl.evaluation.metrics.model_score import image_of_record
from i3cl.evaluation.metrics.protocols import iou_rules
from i3cl.labelling.calibration import read_calibration
from i3cl.labelling.fused import FusedStore, members_of
from i3cl.labelling.fusion import FusedInstances, MemberPrediction, fuse_images
from i3cl.labelling.label import select_labels, unlabelled_root
from i3cl.labelling.pseudo import with_pseudo_labels
from i3cl.labelling.select import select
from i3cl.search.space import named
from i3cl.training.launch import IDENTITY, fit


def count(truth: Sequence[ImageRecord], found: Mapping[int, Sequence[NDArray[np.float32]]], settings: EvaluateSettings) -> Counts:
    """Every image of `truth` counted by polygon IoU; an image that `found` lacks has no detection."""
    metric = DetectionMetric(iou_rules(settings.iou, settings.matching))
    metric.update([image_of_record(record, found.get(record.id, ())) for record in truth])
    return metric.counts()


def scores(counts: Counts) -> dict[str, float]:
    """recall, precision, hmean over all images, 0-1."""
    summary = counts.summary()
    return {"recall": summary.recall, "precision": summary.precision, "hmean": summary.hmean}


def verdict(found: Counts, present: Counts, seed: int) -> dict[str, Any]:
    """95 % bootstrap intervals of both hmeans over the same images, and of their paired difference with its p value."""
    compared = compare(found.ratios, present.ratios, seed=seed)
    intervals = {
        "found": hmean_interval(found.ratios, seed=seed),
        "present": hmean_interval(present.ratios, seed=seed),
        "difference": compared.interval,
    }
    limits: dict[str, Any] = {name: [round(i.low, 4), round(i.high, 4)] for name, i in intervals.items()}
    return {**limits, "p_value": round(compared.p_value, 4)}


@dataclass
class StoredLabels:
    """Stored predictions of labelled images, turned into pseudo labels by any label settings."""

    truth: Sequence[ImageRecord]
    predictions: Mapping[int, Sequence[MemberPrediction]]
    evaluate: EvaluateSettings
    _fused: dict[str, dict[int, FusedInstances]] = field(default_factory=dict)

    @classmethod
    def read(cls, url: str, truth: Sequence[ImageRecord], evaluate: EvaluateSettings) -> StoredLabels:
        """The predictions folder `url` for the images of `truth`. UserError when an image is missing there."""
        wanted = {record.id for record in truth}
        found: dict[int, Sequence[MemberPrediction]] = {}
        unread: set[int] = set()
        for rows in read_predictions(url):
            if rows[0]["image_id"] in wanted and rows[0]["error"] is not None:
                unread.add(rows[0]["image_id"])
            elif rows[0]["image_id"] in wanted:
                found[rows[0]["image_id"]] = members_of(rows)
        missing = [record for record in truth if record.id not in found and record.id not in unread]
        if missing:
            raise UserError(
                f"{url}: has no predictions of {missing[0].file_name} ({len(missing)} of {len(truth)} images); "
                "is it the predictions of data.validation?"
            )
        return cls(truth, found, evaluate)

    def score(self, settings: LabelSettings) -> tuple[dict[str, float], Counts]:
        """Score the pseudo labels that these settings make.

        Returns recall, precision, hmean (0-1), labels and ignored (counts) and mean_weight (0-1); and the counts per image.
        """
        # Thresholds do not change the fusion: most trials of a sweep share it.
        key = settings.fusion.model_dump_json()
        if key not in self._fused:
            if len(self._fused) >= 8:
                self._fused.pop(next(iter(self._fused)))
            fused = fuse_images(list(self.predictions.values()), settings.fusion)
            self._fused[key] = dict(zip(self.predictions, fused, strict=True))
        calibration = read_calibration(settings.select.calibration) if settings.select.calibration else None
        labels: dict[int, list[NDArray[np.float32]]] = {}
        weights: list[float] = []
        ignored = 0
        for image_id, instances in self._fused[key].items():
            chosen = select(instances, settings.select, calibration)
            kept = np.flatnonzero(~chosen.ignore)
            labels[image_id] = [chosen.polygons[k] for k in kept]
            weights += chosen.lossweight[kept].tolist()
            ignored += len(chosen) - len(kept)
        counts = count(self.truth, labels, self.evaluate)
        mean = float(np.mean(weights)) if weights else 0.0
        return {**scores(counts), "labels": len(weights), "ignored": ignored, "mean_weight": mean}, counts


def student_folder(run: str, values: Mapping[str, Any], copy: int) -> str:
    """Where the student of these values trains: named after them, so that a trial which was killed continues there."""
    return storage.join(run, "students", named(values, copy))


def train_student(
    values: Mapping[str, Any], settings: Settings, folder: str, callbacks: Sequence[Any], store: FusedStore
) -> None:
    """Train one student in `folder`, or continue it.

    It learns from the labelled sources and from pseudo labels that the trial's settings make of the stored predictions.

    Args:
        values: The trial's settings.
        settings: With absolute paths and the search part as data.validation.
        folder: For the pseudo labels and the run `student`.
        callbacks: Of Ray Train.
        store: Of search.unlabelled, shared by the trials.

    Raises:
        UserError: No prediction passed the thresholds, training cannot go on, or `folder` was begun with other labels.
    """
    assert settings.search.unlabelled is not None
    chosen = with_overrides(settings, dict(values), "search.space")
    labels = select_labels(settings.search.unlabelled, chosen.label, folder, unlabelled_root(chosen), store=store).checked()
    sources = with_pseudo_labels(chosen, labels.path, labels.images_root)
    student = with_overrides(chosen, {"data.train": sources, "storage": folder, "name": "student"}, "search")
    claim_run(storage.join(folder, "student"), student, IDENTITY)
    stopped = fit(student, callbacks)
    if stopped:
        raise UserError(stopped)


def student_counts(name: str, predictions: str, truth: Sequence[ImageRecord], settings: Settings, threshold: float) -> Counts:
    """Counts per image of one member's stored predictions with a score above `threshold`."""
    found = {
        image_id: [polygons[k] for k in np.flatnonzero(scores > threshold)]
        for image_id, (polygons, scores) in member_predictions(predictions, name).items()
    }
    return count(truth, found, settings.evaluate)


def student_metrics(run: str) -> dict[str, Any]:
    """metrics.json of a student's best checkpoint."""
    path = storage.join(run, "student", "best", "metrics.json")
    return json.loads(storage.read_text(path))

"""What a trial measures: the F of pseudo labels from stored predictions, or of a student trained on them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from i3cl import storage
from i3cl.config import EvaluateSettings, LabelSettings, Settings, UserError, with_overrides
from i3cl.data.predictions import member_predictions, polygons_of, read_predictions
from i3cl.data.records import ImageRecord
from i3cl.evaluation.iou import DROPPED, assign
from i3cl.labelling.fusion import FusedInstances, MemberPrediction, fuse
from i3cl.labelling.pseudo import make_pseudo_labels
from i3cl.labelling.select import select


@dataclass(frozen=True)
class Counts:
    """Per image, so that they can be resampled: (N,) int64 each."""

    true_positives: NDArray[np.int64]
    truths: NDArray[np.int64]
    detections: NDArray[np.int64]

    def scores(self) -> dict[str, float]:
        """recall, precision, hmean over all images, 0-1."""
        return _scores(self.true_positives.sum(), self.truths.sum(), self.detections.sum())

    def resampled(self, picks: NDArray[np.int64]) -> NDArray[np.float64]:
        """(B,) hmean of B draws of images; picks: (B, N) indices."""
        totals = (self.true_positives[picks].sum(1), self.truths[picks].sum(1), self.detections[picks].sum(1))
        hits, truths, detections = (t.astype(np.float64) for t in totals)
        return 2 * hits / np.maximum(truths + detections, 1)


def _scores(hits: float, truths: float, detections: float) -> dict[str, float]:
    # 2PR / (P + R) with R = hits / truths and P = hits / detections.
    return {
        "recall": float(hits / max(truths, 1)),
        "precision": float(hits / max(detections, 1)),
        "hmean": float(2 * hits / max(truths + detections, 1)),
    }


def bootstrap(first: Counts, second: Counts, draws: int = 2000, seed: int = 0) -> dict[str, Any]:
    """95 % percentile intervals of the hmean of two results over the same images, and of their paired difference.

    Images are drawn with replacement (Efron 1979), the same ones for both. Returns first, second and difference as [low, high],
    and `better`: the share of the draws in which the first is above the second.
    """
    picks = np.random.default_rng(seed).integers(0, len(first.truths), (draws, len(first.truths)))
    a, b = first.resampled(picks), second.resampled(picks)
    limits = {
        name: [round(float(v), 4) for v in np.percentile(values, [2.5, 97.5])]
        for name, values in (("first", a), ("second", b), ("difference", a - b))
    }
    return {**limits, "better": round(float((a > b).mean()), 4)}


def held_out(image_id: int, share: float, seed: int) -> bool:
    """Whether an image belongs to the part that no trial sees. Depends on the id and the seed alone."""
    digest = hashlib.blake2b(f"{seed}/{image_id}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") < share * 2**64


def count(truth: Sequence[ImageRecord], found: Mapping[int, Sequence[NDArray[np.float32]]], settings: EvaluateSettings) -> Counts:
    """Hits, truths and detections of every image of `truth`; an image that `found` lacks has no detection."""
    rows = []
    for record in truth:
        polygons = found.get(record.id, ())
        ignore = [i.ignore for i in record.instances]
        verdict = assign([i.polygon for i in record.instances], ignore, polygons, settings.iou, settings.matching)
        rows.append((np.count_nonzero(verdict >= 0), len(ignore) - sum(ignore), np.count_nonzero(verdict != DROPPED)))
    return Counts(*np.array(rows, np.int64).reshape(-1, 3).T)


@dataclass
class StoredLabels:
    """Stored predictions of labelled images, turned into pseudo labels by any label settings."""

    truth: Sequence[ImageRecord]
    predictions: Mapping[int, Sequence[MemberPrediction]]
    evaluate: EvaluateSettings
    _fused: dict[str, dict[int, FusedInstances]] = field(default_factory=dict)

    @classmethod
    def read(cls, url: str, truth: Sequence[ImageRecord], evaluate: EvaluateSettings) -> StoredLabels:
        """The predictions folder `url` for the images of `truth`. UserError when it lacks one of them."""
        wanted = {record.id for record in truth}
        found: dict[int, list[MemberPrediction]] = {}
        for rows in read_predictions(url):
            if rows[0]["image_id"] in wanted:
                found[rows[0]["image_id"]] = [
                    MemberPrediction(row["member"], polygons_of(row), np.asarray(row["scores"]))
                    for row in rows
                    if row["error"] is None
                ]
        missing = [record for record in truth if record.id not in found]
        if missing:
            raise UserError(
                f"{url}: has no predictions of {missing[0].file_name} ({len(missing)} of {len(truth)} images); "
                "is it the predictions of data.validation?"
            )
        return cls(truth, found, evaluate)

    def measure(self, settings: LabelSettings) -> tuple[dict[str, float], Counts]:
        """recall, precision, hmean of the pseudo labels, labels and ignored (counts), mean_weight; and the counts per image."""
        # Thresholds do not change what is fused: most trials of a sweep share it.
        key = settings.fusion.model_dump_json()
        if key not in self._fused:
            if len(self._fused) >= 8:
                self._fused.pop(next(iter(self._fused)))
            self._fused[key] = {i: fuse(parts, settings.fusion) for i, parts in self.predictions.items()}
        labels: dict[int, list[NDArray[np.float32]]] = {}
        weights: list[float] = []
        ignored = 0
        for image_id, fused in self._fused[key].items():
            chosen = select(fused, settings.select)
            kept = np.flatnonzero(~chosen.ignore)
            labels[image_id] = [chosen.polygons[k] for k in kept]
            weights += chosen.lossweight[kept].tolist()
            ignored += len(chosen) - len(kept)
        counts = count(self.truth, labels, self.evaluate)
        mean = float(np.mean(weights)) if weights else 0.0
        return {**counts.scores(), "labels": len(weights), "ignored": ignored, "mean_weight": mean}, counts


def train_student(values: Mapping[str, Any], settings: Settings, run: str, callbacks: Sequence[Any]) -> None:
    """One student under `run`: pseudo labels from the stored predictions by the trial's settings, then a Ray Train run on labels
    and pseudo labels. Continues what is there. `settings` come with absolute paths and the search part as data.validation.
    """
    from i3cl.training.launch import fit

    assert settings.label.source is not None and settings.search.unlabelled is not None
    chosen = with_overrides(settings, dict(values), "search.space")
    pseudo = storage.join(run, "pseudo.json")
    if not storage.exists(pseudo):
        counts = make_pseudo_labels(settings.search.unlabelled, chosen.label, pseudo)
        if not counts["instances"]:
            raise UserError("label.select: no prediction passed the thresholds")
    source = {
        "annotations": pseudo,
        "images": storage.join(settings.data_root, settings.label.source.images),
        "weight": chosen.selftrain.pseudo_weight,
    }
    sources = [s.model_dump() for s in chosen.data.train]
    student = with_overrides(chosen, {"data.train": [*sources, source], "storage": run, "name": "student"}, "search")
    stopped = fit(student, callbacks)
    if stopped:
        raise UserError(stopped)


def measure_student(name: str, predictions: str, truth: Sequence[ImageRecord], settings: Settings, threshold: float) -> Counts:
    """Counts per image of one member's stored predictions above `threshold`."""
    found = {
        image_id: [polygons[k] for k in np.flatnonzero(scores > threshold)]
        for image_id, (polygons, scores) in member_predictions(predictions, name).items()
    }
    return count(truth, found, settings.evaluate)


def student_metrics(run: str) -> dict[str, Any]:
    """metrics.json of a student's best checkpoint. UserError when it has none yet."""
    path = storage.join(run, "student", "best", "metrics.json")
    return json.loads(storage.read_text(path))

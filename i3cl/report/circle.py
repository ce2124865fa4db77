"""Collects what the report of the whole circle shows. It reads a few dozen pictures, never the whole corpus."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from i3cl import storage
from i3cl.config import Settings, to_yaml
from i3cl.data.formats.coco import read_coco
from i3cl.data.formats.predictions import member_predictions
from i3cl.data.formats.records import Dataset, ImageRecord
from i3cl.data.loading.images import decode_image
from i3cl.evaluation.metrics.model_score import Measured
from i3cl.report.html import TRUTH, Curve, OutlinedPicture, ReportData, Result, WeightedPicture, write_report

_PICTURES = 12


def write_circle_report(
    path: str,
    settings: Settings,
    measured: Mapping[str, Measured],
    pseudo_measured: Measured | None,
    seconds: Mapping[str, float],
    validation: Dataset,
    predictions: str,
    pseudo: str,
    pseudo_images: str,
    runs: Mapping[str, str],
    others: Sequence[Mapping[str, Any]] = (),
    verdict: str = "",
    made_from: Mapping[str, str] | None = None,
) -> None:
    """Write report.html. `measured` holds the teachers in order and the student last; `runs` their run directories.

    verdict: what the pseudo labels brought, in words; the report begins with it.
    made_from: what the report shows -> SHA-256 of its content.
    others: rows of summary.json for further models: the control, and students of later rounds.
    """
    *teachers, student = measured
    results = [_result(measured[name], "teacher") for name in teachers]
    if pseudo_measured is not None:
        results.append(_result(pseudo_measured, "pseudo"))
    results.append(_result(measured[student], "student"))
    results += [
        Result(
            row["name"],
            "other",
            row["recall"],
            row["precision"],
            row["hmean"],
            row["threshold"],
            row["hmean_large"],
            row["mask_ap"],
        )
        for row in others
    ]
    best = max(teachers, key=lambda name: measured[name].score.hmean)
    write_report(
        path,
        ReportData(
            title=f"I3CL self-training: {settings.name}",
            facts=[
                ("backbone", settings.model.backbone.name),
                ("pseudo label thresholds", f"{settings.label.select.low:g} to {settings.label.select.high:g}"),
                ("protocol", measured[student].score.rules.split(";")[0]),
                *((f"SHA-256 of {role}", sha256[:12]) for role, sha256 in (made_from or {}).items()),
            ],
            verdict=verdict,
            results=results,
            small_side=settings.evaluate.small_side,
            curves={name: _curve(item) for name, item in measured.items()},
            metrics={name: _rows(run) for name, run in runs.items()},
            validation=_validation_pictures(validation, predictions, measured, [best, student], settings.data.upright),
            pseudo_labels=_pseudo_pictures(pseudo, pseudo_images, settings.data.upright),
            seconds=dict(seconds),
            settings=to_yaml(settings),
        ),
    )


def _result(item: Measured, kind: Any) -> Result:
    score = item.score
    return Result(score.name, kind, score.recall, score.precision, score.hmean, score.threshold, score.hmean_large, score.mask_ap)


def _curve(item: Measured) -> Curve:
    return Curve(item.curve.recall, item.curve.precision, (item.score.recall, item.score.precision))


def _rows(run: str) -> list[dict[str, Any]]:
    lines = storage.read_text(storage.join(run, "metrics.jsonl")).splitlines()
    return [row for row in map(json.loads, lines) if "loss" in row]


def _spread(records: Sequence[ImageRecord]) -> list[ImageRecord]:
    """At most _PICTURES of the records, evenly spread over the list."""
    return [records[i] for i in np.unique(np.linspace(0, len(records) - 1, min(_PICTURES, len(records))).astype(int))]


def _validation_pictures(
    validation: Dataset, predictions: str, measured: Mapping[str, Measured], names: list[str], upright: bool
) -> list[OutlinedPicture]:
    found = {name: member_predictions(predictions, name) for name in names}
    pictures = []
    for record in _spread([r for r in validation.records if r.instances]):
        outlines = {TRUTH: [i.polygon for i in record.instances if not i.ignore]}
        for name in names:
            polygons, scores = found[name].get(record.id, ([], np.zeros(0)))
            keep = np.flatnonzero(scores > measured[name].score.threshold)
            outlines[name] = [polygons[i] for i in keep]
        image = decode_image(storage.join(validation.images_root, record.file_name), upright=upright)
        pictures.append(OutlinedPicture(record.file_name, image, outlines))
    return pictures


def _pseudo_pictures(pseudo: str, images: str, upright: bool) -> list[WeightedPicture]:
    dataset = read_coco(pseudo, images)
    return [
        WeightedPicture(
            record.file_name,
            decode_image(storage.join(images, record.file_name), upright=upright),
            [i.polygon for i in record.instances],
            [None if i.ignore else i.lossweight for i in record.instances],
        )
        for record in _spread(dataset.records)
    ]

"""From stored predictions to a pseudo-label set: fusion and selection image by image, COCO json out. Never needs a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from i3cl.config import LabelSettings
from i3cl.data.coco import ImageRecord, Instance, write_coco
from i3cl.data.predictions import polygons_of, read_predictions
from i3cl.labelling.fusion import FusedInstances, MemberPrediction, fuse
from i3cl.labelling.select import SelectionSummary, select


@dataclass(frozen=True)
class FusedImage:
    image_id: int
    file_name: str
    height: int
    width: int
    fused: FusedInstances


def fused_images(predictions: str, settings: LabelSettings) -> Iterator[FusedImage]:
    """Every readable image of a predictions folder with its members fused."""
    for rows in read_predictions(predictions):
        first = rows[0]
        if first["error"] is not None:
            continue
        parts = [MemberPrediction(row["member"], polygons_of(row), np.asarray(row["scores"])) for row in rows]
        fused = fuse(parts, settings.fusion)
        yield FusedImage(first["image_id"], first["file_name"], first["height"], first["width"], fused)


def make_pseudo_labels(predictions: str, settings: LabelSettings, out: str) -> dict[str, Any]:
    """Write the pseudo-label COCO json `out` (whole or not at all) and return its counts (SelectionSummary.summary)."""
    summary = SelectionSummary()
    records: list[ImageRecord] = []
    for item in fused_images(predictions, settings):
        chosen = select(item.fused, settings.select)
        summary.update(chosen)
        if settings.select.drop_empty and not np.any(~chosen.ignore):
            continue
        instances = tuple(
            Instance(polygon, ignore=bool(ignore), lossweight=float(weight), score=float(score), votes=int(votes))
            for polygon, ignore, weight, score, votes in zip(
                chosen.polygons, chosen.ignore, chosen.lossweight, chosen.scores, chosen.votes, strict=True
            )
        )
        records.append(ImageRecord(item.image_id, item.file_name, item.height, item.width, instances))
    records.sort(key=lambda record: record.id)
    write_coco(out, records, info={"description": "pseudo labels", "thresholds": settings.select.model_dump()})
    return summary.summary()

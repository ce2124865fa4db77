"""The predictions table that `label.py predict` writes, as results."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from i3cl import storage
from i3cl.data.formats.parts import unfinished
from i3cl.data.formats.predictions import read_batches, read_predictions
from i3cl.data.formats.records import ImageRecord
from i3cl.data.loading.images import check_size
from i3cl.errors import UserError
from i3cl.evaluation.formats.sets import ImageDetections, PolygonSet

FORMAT = "predictions table"


def table_results(path: str, member: str | None) -> PolygonSet[ImageDetections]:
    """One member's detections, of its first view.

    Raises:
        UserError: There is no part, one is not of predictions, or it is not clear which member is meant.
    """
    member = chosen_member(path, members_of(path), member)
    images, unread = [], 0
    for rows in read_predictions(path):
        for row in rows:
            if row["member"] != member:
                continue
            if row["error"] is not None:
                unread += 1
            else:
                images.append(detections_of_row(row))
                break
    warnings = unfinished_warning(path)
    if unread:
        warnings.append(f"{path}: {unread} images could not be read when they were predicted; they count as empty")
    return PolygonSet(path, FORMAT, images, warnings=warnings)


def members_of(path: str) -> set[str]:
    """Names of all members in a table. UserError as `read_batches`."""
    members: set[str] = set()
    for batch in read_batches(path, ["member"]):
        members.update(batch["member"].unique().to_pylist())
    return members


def chosen_member(path: str, members: set[str], member: str | None) -> str:
    """The member to score. UserError when there are several and none is named, or the named one is not there."""
    if member is None and len(members) <= 1:
        return next(iter(members), "")
    if member not in members:
        raise UserError(f"{path}: holds {', '.join(sorted(members))}; choose one with --member NAME")
    assert member is not None
    return member


def unfinished_warning(path: str) -> list[str]:
    """A warning when a folder is not finished and is read all the same, else nothing."""
    found = None if storage.is_file(path) else unfinished(path)
    return [f"{path}: is not finished, {found}; images without a result count as empty"] if found else []


def detections_of_row(row: Mapping[str, Any]) -> ImageDetections:
    """The detections of one row of a predictions table."""
    polygons = [np.asarray(polygon, np.float64).reshape(-1, 2) for polygon in row["polygons"]]
    scores = np.asarray(row["scores"], np.float64)
    return ImageDetections(row["file_name"], polygons, scores, row["image_id"], row["height"] or None, row["width"] or None)


def check_image_sizes(predictions: str, truth: Iterable[ImageRecord]) -> None:
    """Compares the sizes of predicted images with those that the truth states.

    Raises:
        UserError: An image has another size than its annotation says, as training reports it.
    """
    wanted = {record.id: record for record in truth}
    for batch in read_batches(predictions, ["image_id", "height", "width", "error"]):
        for row in batch.to_pylist():
            record = wanted.get(row["image_id"])
            # Earlier versions wrote no size for images without text.
            if record is not None and row["error"] is None and row["height"]:
                check_size(record.file_name, (row["height"], row["width"]), (record.height, record.width))

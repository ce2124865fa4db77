"""Reading what is to be exported, image by image: a data set (COCO json or Parquet table) or a folder of predictions."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from i3cl import storage
from i3cl.data.formats.coco import read_for_command
from i3cl.data.formats.join import join_same_files
from i3cl.data.formats.predictions import read_batches, read_predictions
from i3cl.data.formats.records import ImageRecord, Instance
from i3cl.data.formats.table import is_table
from i3cl.detections import Detections
from i3cl.errors import UserError


def read_labels(
    source: str,
    *,
    member: str | None = None,
    score: float | None = None,
    skip_bad: bool = False,
    join: bool = False,
) -> Iterator[ImageRecord]:
    """The images of a COCO json, a Parquet table or a predictions folder, one at a time.

    score: instances with a score up to it are left out; those without a score were made by people and stay. member: whose
    predictions (of its first view); needed when there are several. join: join entries of one file, which otherwise are an
    error. An image that could not be read when it was predicted has height and width 0 and no instances. UserError from the
    readers, for a score outside 0-1, and for an unknown member.
    """
    if not storage.exists(source):
        raise UserError(f"{source}: no such file or folder; check the path")
    if score is not None and not 0 <= score <= 1:
        raise UserError(f"--score {score:g}: give a number from 0 to 1")
    if source.endswith(".json") or is_table(source):
        if member is not None:
            raise UserError(f"{source}: holds labels, not predictions; leave out --member")
        found = read_for_command(source, skip_bad=skip_bad, same_files=join).records
        records = join_same_files(found) if join else iter(found)
    else:
        records = _predicted(source, member)
    return records if score is None else (_above(record, score) for record in records)


def _above(record: ImageRecord, score: float) -> ImageRecord:
    kept = tuple(i for i in record.instances if i.score is None or i.score > score)
    return record if len(kept) == len(record.instances) else replace(record, instances=kept)


def _predicted(source: str, member: str | None) -> Iterator[ImageRecord]:
    members = sorted({name for batch in read_batches(source, ["member"]) for name in batch["member"].unique().to_pylist()})
    if member is None and len(members) > 1:
        raise UserError(f"{source}: holds predictions of {', '.join(members)}; choose one with --member NAME")
    if member is not None and member not in members:
        raise UserError(f"{source}: holds no predictions of {member}; it has {', '.join(members)}")
    # Not a generator itself, so that the errors above are raised at the call.
    return _of_member(source, member if member is not None else (members or [""])[0])


def _of_member(source: str, member: str) -> Iterator[ImageRecord]:
    for rows in read_predictions(source):
        row = next((row for row in rows if row["member"] == member), None)
        if row is None:
            continue
        if row["error"] is not None:
            yield ImageRecord(row["image_id"], row["file_name"], 0, 0)
            continue
        pairs = zip(row["polygons"], row["scores"].tolist(), strict=True)
        instances = tuple(Instance(polygon, score=score) for polygon, score in pairs)
        yield ImageRecord(row["image_id"], row["file_name"], row["height"], row["width"], instances)


def detections_of(record: ImageRecord) -> Detections:
    """A record's text instances (no ignore regions) as detections; without a score it is 1."""
    kept = [i for i in record.instances if not i.ignore]
    scores = np.array([1.0 if i.score is None else i.score for i in kept], np.float32)
    size = max(1, record.height), max(1, record.width)
    return Detections([i.polygon for i in kept], scores, *size, image_id=record.id, name=record.file_name)

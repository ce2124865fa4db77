"""Joining image entries that are one file under several ids: merged sets, or images that were annotated twice."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace

from i3cl import geometry
from i3cl.data.formats.records import ImageRecord
from i3cl.errors import UserError

logger = logging.getLogger(__name__)

_SAME = 0.5
"""Intersection over union from which two outlines of different entries are taken for the same word."""


def join_same_files(records: Sequence[ImageRecord]) -> Iterator[ImageRecord]:
    """The records with entries of one file joined under the first id; the joined image comes where its last entry stood.

    An instance of a later entry is dropped when it overlaps one of an earlier entry by at least half (intersection over union).
    Logs how many entries were joined. UserError when two entries of a file disagree on its size.
    """
    left = {name: count for name, count in Counter(record.file_name for record in records).items() if count > 1}
    joined = len(left)
    entries = sum(left.values())
    waiting: dict[str, ImageRecord] = {}
    dropped = 0
    for record in records:
        name = record.file_name
        if name not in left:
            yield record
            continue
        if name in waiting:
            first = waiting[name]
            if (first.height, first.width) != (record.height, record.width):
                raise UserError(
                    f"{name}: image {first.id} says {first.width} x {first.height} and image {record.id} says "
                    f"{record.width} x {record.height}; correct the wrong one"
                )
            found = geometry.overlaps([i.polygon for i in record.instances], [i.polygon for i in first.instances])
            doubles = set(found.first[found.iou >= _SAME].tolist())
            dropped += len(doubles)
            new = tuple(i for number, i in enumerate(record.instances) if number not in doubles)
            record = replace(first, instances=first.instances + new)
        waiting[name] = record
        left[name] -= 1
        if not left[name]:
            yield waiting.pop(name)
    if joined:
        logger.info("joined %d entries of %d files; %d instances that both had are kept once", entries, joined, dropped)

"""The quickstart's data set on disk, made by Ray tasks: labelled, unlabelled (its truth in a file apart) and validation parts."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import cv2

from i3cl import storage
from i3cl.config import SyntheticSettings
from i3cl.data.formats.coco import write_coco
from i3cl.data.formats.records import ImageRecord, Instance
from i3cl.data.synthetic.plain import make_split
from i3cl.runtime.cluster import connect

logger = logging.getLogger(__name__)

_CHUNK = 32
"""Number of images in one Ray task."""
_QUALITY = 90
"""JPEG quality."""


def write_synthetic_set(settings: SyntheticSettings, folder: str) -> None:
    """Write {labelled,unlabelled,validation}/*.jpg with COCO json files beside them, and unlabelled_truth.json.

    Image ids are unique over all parts; the same settings make the same pixels on any number of workers. Does nothing when the
    set is there already: the last json is written when everything else is done.
    """
    parts = {"labelled": settings.labelled, "unlabelled": settings.unlabelled, "validation": settings.validation}
    if storage.exists(storage.join(folder, "validation.json")):
        return
    connect()
    import ray

    make = ray.remote(num_cpus=1)(_write_chunk)
    first = 0
    pending = {}
    for part, count in parts.items():
        storage.make_dirs(storage.join(folder, part))
        pending[part] = [
            make.remote(settings, storage.join(folder, part), first + i, min(_CHUNK, count - i)) for i in range(0, count, _CHUNK)
        ]
        first += count
    for part, chunks in pending.items():
        records = [record for chunk in ray.get(chunks) for record in chunk]
        words = sum(len(record.instances) for record in records)
        logger.info("data: %s: %d images, %d words", part, len(records), words)
        if part == "unlabelled":
            write_coco(storage.join(folder, "unlabelled_truth.json"), records)
            records = [ImageRecord(r.id, r.file_name, r.height, r.width, ()) for r in records]
        write_coco(storage.join(folder, f"{part}.json"), records)


def _write_chunk(settings: SyntheticSettings, folder: str, start: int, count: int) -> list[ImageRecord]:
    return list(_records(settings, folder, start, count))


def _records(settings: SyntheticSettings, folder: str, start: int, count: int) -> Iterator[ImageRecord]:
    images = make_split(start, count, settings.seed, settings.side, settings.difficulty)
    for index, made in enumerate(images, start):
        name = f"{index:06d}.jpg"
        encoded, jpeg = cv2.imencode(".jpg", made.image[:, :, ::-1], [cv2.IMWRITE_JPEG_QUALITY, _QUALITY])
        assert encoded
        storage.write_bytes_atomic(storage.join(folder, name), jpeg.tobytes())
        instances = tuple(Instance(polygon) for polygon in made.polygons)
        yield ImageRecord(index + 1, name, settings.side, settings.side, instances)

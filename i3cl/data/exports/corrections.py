"""Labels that people have corrected, put in the place of the pseudo labels they come from."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np

from i3cl.data.exports import cvat, label_studio, labelme, paddle
from i3cl.data.exports.common import TEXT, UNREADABLE, ImageNames, Region, Reviewed
from i3cl.data.formats.checks import (
    CATEGORY,
    BadItem,
    Faults,
    checked_instance,
    shown,
)
from i3cl.data.formats.coco import read_for_command, write_coco
from i3cl.data.formats.records import ImageRecord, Instance, Problem
from i3cl.data.formats.table import write_shards
from i3cl.errors import UserError

READERS: dict[str, Callable[[str], Iterator[Reviewed]]] = {
    "label-studio": label_studio.read,
    "cvat": cvat.read,
    "labelme": labelme.read,
    "paddle": paddle.read,
}


@dataclass(frozen=True)
class Merged:
    """What ``import_corrections`` did."""

    images: int
    """Images written."""
    corrected: int
    """Of them those that a person has annotated."""
    instances: int
    """Text instances of the corrected images."""
    ignored: int
    """Their ignore regions."""
    removed: int
    """Pseudo labels and ignore regions that stood there before."""
    problems: tuple[Problem, ...]


def import_corrections(
    format: str,
    source: str,
    base: str,
    out: str,
    *,
    only_corrected: bool = False,
    prefix: str = "",
    skip_bad: bool = False,
) -> Merged:
    """Write `base` with the instances of every reviewed image replaced by those of `source`.

    A corrected instance has lossweight 1 and neither score nor votes; a label other than 'text' makes an ignore region. An
    image without any region in `source` has none. Other images keep theirs, or with `only_corrected` are left out. `out` is
    COCO json when it ends in .json, else a folder of Parquet shards. UserError for a broken file, an image that `base` does
    not have, an image that occurs twice, another image size, and, unless `skip_bad`, a region that cannot be used.
    """
    records = read_for_command(base, skip_bad=skip_bad).records
    names = ImageNames((record.file_name for record in records), base, prefix)
    reviewed: dict[str, Reviewed] = {}
    for item in READERS[format](source):
        name = names.find(item.name, item.where)
        if name in reviewed:
            raise UserError(f"{item.where}: image {shown(name)} occurs twice; also at {reviewed[name].where}")
        reviewed[name] = item
    if not reviewed:
        raise UserError(f"{source}: holds no annotated image; nothing to bring back")
    faults = Faults(skip_bad)
    counts = {"images": 0, "instances": 0, "ignored": 0, "removed": 0}

    def merged() -> Iterator[ImageRecord]:
        for record in records:
            item = reviewed.get(record.file_name)
            if item is None and only_corrected:
                continue
            counts["images"] += 1
            if item is not None:
                counts["removed"] += len(record.instances)
                record = replace(record, instances=_instances(item, record, faults))
                ignored = sum(i.ignore for i in record.instances)
                counts["ignored"] += ignored
                counts["instances"] += len(record.instances) - ignored
            yield record

    if out.endswith(".json"):
        write_coco(out, merged(), info={"description": "corrected labels"})
    else:
        write_shards(out, merged())
    return Merged(corrected=len(reviewed), problems=tuple(faults.problems), **counts)


def _instances(item: Reviewed, record: ImageRecord, faults: Faults) -> tuple[Instance, ...]:
    for side, given, known in (("width", item.width, record.width), ("height", item.height, record.height)):
        if given is not None and given != known:
            raise UserError(
                f"{item.where}: image {shown(record.file_name)} has the {side} {given} there and {known} in the base; "
                "it must be the same file, without rotation"
            )
    instances = []
    for number, region in enumerate(item.regions, 1):
        where = f"{item.where}: region {number}"
        try:
            instance, mended = _instance(region, item.percent, record)
        except BadItem as error:
            faults.bad(where, error)
            continue
        faults.mended(where, mended)
        instances.append(_with_words(instance, record))
    return tuple(instances)


def _with_words(instance: Instance, record: ImageRecord) -> Instance:
    """With transcription and language of the base where the instance was left as it is: not every tool carries them."""
    for old in record.instances:
        same = old.ignore == instance.ignore and len(old.polygon) == len(instance.polygon)
        if same and np.abs(old.polygon - instance.polygon).max() < 0.05:
            return replace(instance, text=instance.text if instance.text is not None else old.text, language=old.language)
    return instance


def _instance(region: Region, percent: bool, record: ImageRecord) -> tuple[Instance, list[tuple[str, str]]]:
    if region.fault is not None:
        raise BadItem("region", region.fault)
    if not isinstance(region.label, str) or not region.label.strip():
        raise BadItem("label", f"its label is {shown(region.label)}; give it '{TEXT}' or 'ignore'")
    points = region.points
    numbers = isinstance(points, list) and all(isinstance(v, int | float) and not isinstance(v, bool) for v in points)
    if percent and numbers and all(-1e6 < v < 1e6 for v in points):
        points = [v * (record.height if i % 2 else record.width) / 100 for i, v in enumerate(points)]
        limits = np.array([record.width, record.height])
        # Percent of a border may land a hair beyond it.
        points = [float(limits[i % 2]) if abs(v - limits[i % 2]) < 1e-3 else v for i, v in enumerate(points)]
    ignore = region.label.strip().lower() != TEXT
    entry = {
        "segmentation": [points],
        "category_id": CATEGORY["id"],
        "ignore": int(ignore),
        # An ignore region that became text keeps its mark in some tools.
        "text": region.text if not ignore and region.text != UNREADABLE else None,
    }
    return checked_instance(entry, {CATEGORY["id"]: True}, record.height, record.width)

"""Labels that people have corrected in another tool: they replace the pseudo labels that were exported."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from i3cl import storage
from i3cl.data.exports.common import IGNORE, TEXT, UNREADABLE, ImageNames, Region, Reviewed, are_numbers
from i3cl.data.exports.registry import REVIEW_FORMATS
from i3cl.data.formats.checks import (
    CATEGORY,
    BadItem,
    Faults,
    checked_instance,
    shown,
)
from i3cl.data.formats.coco import read_for_command, write_coco
from i3cl.data.formats.records import ImageRecord, Instance, Problem
from i3cl.data.formats.rings import Notes
from i3cl.data.formats.table import write_shards
from i3cl.errors import UserError


@dataclass(frozen=True)
class Merged:
    """The result of ``import_corrections``."""

    images: int
    """Number of images written."""
    corrected: int
    """How many of them a person has annotated."""
    instances: int
    """Number of text instances in the corrected images."""
    ignored: int
    """Number of ignore regions in them."""
    removed: int
    """Number of pseudo labels and ignore regions that were replaced."""
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
    image without any region in `source` becomes one without text. An image none of whose regions can be used keeps the labels
    of `base`: it must not pass for one without text. Other images keep their labels, or with `only_corrected` are left out.
    `out` is COCO json when it ends in .json, else a folder of Parquet shards. UserError for a broken file, an image that `base`
    does not have, an image that occurs twice, another image size, and, unless `skip_bad`, a region that cannot be used.
    """
    storage.refuse_to_overwrite(out, source)
    records = read_for_command(base, skip_bad=skip_bad).records
    reviewed = _reviewed(format, source, records, base, prefix)
    faults = Faults(skip_bad)
    counts = {"images": 0, "corrected": 0, "instances": 0, "ignored": 0, "removed": 0}

    def merged() -> Iterator[ImageRecord]:
        for record in records:
            item = reviewed.get(record.file_name)
            instances = None if item is None else _instances(item, record, faults)
            if instances is None and only_corrected:
                continue
            counts["images"] += 1
            if instances is not None:
                counts["corrected"] += 1
                counts["removed"] += len(record.instances)
                record = replace(record, instances=instances)
                ignored = sum(i.ignore for i in record.instances)
                counts["ignored"] += ignored
                counts["instances"] += len(record.instances) - ignored
            yield record

    if out.endswith(".json"):
        write_coco(out, merged(), info={"description": "corrected labels"})
    else:
        write_shards(out, merged())
    return Merged(problems=tuple(faults.problems), **counts)


def read_instances(
    format: str, source: str, images: Sequence[ImageRecord], base: str, faults: Faults
) -> Iterator[tuple[ImageRecord, tuple[Instance, ...] | None]]:
    """The images of another tool's file and their instances; None for an image none of whose regions can be used.

    format: a key of `REVIEW_FORMATS`; images: those that it may name; base: where they come from, for messages; faults: collects
    what cannot be used. Errors as `import_corrections`.
    """
    known = {record.file_name: record for record in images}
    for name, item in _reviewed(format, source, images, base, "").items():
        yield known[name], _instances(item, known[name], faults)


def _reviewed(format: str, source: str, images: Iterable[ImageRecord], base: str, prefix: str) -> dict[str, Reviewed]:
    """The images of another tool's file by their file names in `images`."""
    read = REVIEW_FORMATS[format].read
    assert read is not None, "that is what makes it a review format"
    names = ImageNames((record.file_name for record in images), base, prefix)
    reviewed: dict[str, Reviewed] = {}
    for item in read(source):
        name = names.find(item.name, item.where)
        if name in reviewed:
            raise UserError(f"{item.where}: image {shown(name)} occurs twice; also at {reviewed[name].where}")
        reviewed[name] = item
    if not reviewed:
        raise UserError(f"{source}: holds no annotated image, so there is nothing to bring back")
    return reviewed


def _instances(item: Reviewed, record: ImageRecord, faults: Faults) -> tuple[Instance, ...] | None:
    """The corrected instances of an image; None when it has regions and none of them can be used."""
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
            instance, notes = _instance(region, item.percent, record)
        except BadItem as error:
            faults.bad(where, error)
            continue
        faults.repaired(where, notes)
        instances.append(_with_words(instance, record))
    if item.regions and not instances:
        message = f"none of its {len(item.regions)} regions can be used; it keeps the labels of the base"
        faults.bad(item.where, BadItem("no region usable", message))
        return None
    return tuple(instances)


def _with_words(instance: Instance, record: ImageRecord) -> Instance:
    """The instance with transcription and language from the base when it was not changed: not every tool keeps them."""
    for old in record.instances:
        same = old.ignore == instance.ignore and len(old.polygon) == len(instance.polygon)
        if same and np.abs(old.polygon - instance.polygon).max() < 0.05:
            return replace(instance, text=instance.text if instance.text is not None else old.text, language=old.language)
    return instance


def _instance(region: Region, percent: bool, record: ImageRecord) -> tuple[Instance, Notes]:
    """The instance of a region, and what was repaired. BadItem for one that cannot be used."""
    if region.fault is not None:
        raise BadItem("region", region.fault)
    if not isinstance(region.label, str) or not region.label.strip():
        raise BadItem("label", f"its label is {shown(region.label)}; give it '{TEXT}' or 'ignore'")
    parts = [region.points, *region.more_parts]
    if percent:
        parts = [_from_percent(points, record) for points in parts]
    label = region.label.strip().lower()
    ignore = label != TEXT
    entry = {
        "segmentation": parts,
        "category_id": CATEGORY["id"],
        "ignore": int(ignore),
        # An ignore region that became text keeps its mark in some tools.
        "text": region.text if not ignore and region.text != UNREADABLE else None,
    }
    instance, notes = checked_instance(entry, {CATEGORY["id"]: True}, record.height, record.width)
    if label not in (TEXT, *_KNOWN_IGNORE):
        notes.append(("other label", f"its label {shown(region.label)} is not '{TEXT}', so it is an ignore region"))
    return instance, notes


_KNOWN_IGNORE = (IGNORE, UNREADABLE, "occluded")
"""Labels that plainly mean an ignore region; any other one is listed."""


def _from_percent(points: Any, record: ImageRecord) -> Any:
    """Percent of width and height as pixels; what is not a list of usable numbers is returned for the check to refuse."""
    if not isinstance(points, list) or not are_numbers(points):
        return points
    sides = (record.width, record.height)
    pixels = [v * sides[i % 2] / 100 for i, v in enumerate(points)]
    # 100 percent may come out slightly beyond the border.
    return [float(sides[i % 2]) if abs(v - sides[i % 2]) < 1e-3 else v for i, v in enumerate(pixels)]

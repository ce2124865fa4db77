"""From the labels of a data set to records that training can use: repaired, clipped, and every change counted."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import pyarrow as pa

from i3cl.data.formats.checks import BadItem, checked_file_name
from i3cl.data.formats.records import (
    IMAGE_SCHEMA,
    ImageRecord,
    Instance,
    Problem,
    record_from_row,
    record_table,
)
from i3cl.data.formats.rings import repair
from i3cl.data.importers.base import Folder, Importer, Item, LabelledImage
from i3cl.data.loading.images import image_size
from i3cl.errors import UserError


@dataclass(frozen=True, eq=False, slots=True)
class Outcome:
    """The result of reading one image: a record, or why there is none."""

    record: ImageRecord | None
    """None: the image or its labels cannot be read; the reason is the only problem."""
    problems: tuple[Problem, ...] = ()
    """Of kind 'image' when it was left out; 'degenerate', 'outside' for instances left out; 'repeated', 'crossing', 'clipped'
    for instances repaired."""
    keywords: tuple[str, ...] = ()
    """Texts known to be in a weakly labelled image."""


def read_image(importer: Importer, folder: Folder, item: Item, image_id: int, source: str, *, upright: bool = False) -> Outcome:
    """Read one image's labels and header and make a record of them. Never raises UserError: a fault is in the outcome.

    image_id: for the record; source: the data set's name, for ``ImageRecord.source``; upright: the
    size of the picture turned as its EXIF orientation says, else as stored.
    """
    try:
        # Readers of the result refuse file names that are not portable, or not text.
        checked_file_name(item.file_name)
        labelled = importer.read(folder, item)
        height, width = image_size(folder.path(item.file_name), upright=upright)
    except BadItem as error:
        return Outcome(None, (Problem("image", printable(item.file_name), f"{printable(folder.root)}: {error.message}"),))
    except UserError as error:
        return Outcome(None, (Problem("image", item.file_name, printable(str(error))),))
    record, problems = to_record(labelled, image_id, height, width, source)
    return Outcome(record, tuple(problems), labelled.keywords)


def printable(text: str) -> str:
    """The text with escapes for bytes that are not UTF-8: file names are bytes and need not be text."""
    return text.encode("utf-8", "backslashreplace").decode()


def to_record(labelled: LabelledImage, image_id: int, height: int, width: int, source: str) -> tuple[ImageRecord, list[Problem]]:
    """The record of an image of height x width pixels, and what was repaired or left out."""
    instances: list[Instance] = []
    problems: list[Problem] = []
    for number, found in enumerate(labelled.instances or (), 1):
        where = f"{labelled.file_name}: instance {number}"
        polygon, notes = repair(found.polygon, height, width)
        problems += [Problem(kind, where, message, left_out=polygon is None) for kind, message in notes]
        if polygon is not None:
            instances.append(Instance(polygon, found.ignore, text=found.text, language=found.language))
    return ImageRecord(image_id, labelled.file_name, height, width, tuple(instances), source), problems


# ---------------------------------------------------------------------------------------------- between machines


def outcomes_table(outcomes: Sequence[Outcome], positions: Sequence[int]) -> pa.Table:
    """Outcomes as a table for Ray Data; `positions` are their places in the order of the set."""
    blank = ImageRecord(-1, "", 0, 0)
    table = record_table([outcome.record or blank for outcome in outcomes], "")
    problems = [json.dumps([asdict(p) for p in outcome.problems]) for outcome in outcomes]
    keywords = [list(outcome.keywords) for outcome in outcomes]
    table = table.append_column("problems", pa.array(problems, pa.string()))
    table = table.append_column("keywords", pa.array(keywords, pa.list_(pa.string())))
    return table.append_column("position", pa.array(positions, pa.int64()))


def outcomes_of(table: pa.Table) -> list[tuple[int, Outcome]]:
    """(position, outcome) pairs; the inverse of ``outcomes_table``."""
    return [
        (
            row["position"],
            Outcome(
                record_from_row({name: row[name] for name in IMAGE_SCHEMA.names}) if row["image_id"] >= 0 else None,
                tuple(Problem(**p) for p in json.loads(row["problems"])),
                tuple(row["keywords"]),
            ),
        )
        for row in table.to_pylist()
    ]

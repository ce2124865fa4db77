"""From what a data set says to records that training can use: clipped, repaired, and every change counted."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
import pyarrow as pa
import shapely
from numpy.typing import NDArray

from i3cl import geometry
from i3cl.data.formats.checks import BadItem, checked_file_name
from i3cl.data.formats.records import (
    IMAGE_SCHEMA,
    ImageRecord,
    Instance,
    Problem,
    record_from_row,
    record_table,
)
from i3cl.data.importers.base import Folder, Importer, Item, LabelledImage, degenerate
from i3cl.data.loading.images import image_size
from i3cl.errors import UserError


@dataclass(frozen=True, eq=False, slots=True)
class Outcome:
    """What became of one image."""

    record: ImageRecord | None
    """None: the image or its labels cannot be read; the reason is the only problem."""
    problems: tuple[Problem, ...] = ()
    """Of kind 'image' when it was left out; 'degenerate', 'outside' for instances left out; 'repeated', 'crossing', 'clipped'
    for instances mended."""
    keywords: tuple[str, ...] = ()
    """Of a weakly labelled image."""


def read_image(importer: Importer, folder: Folder, item: Item, image_id: int, source: str) -> Outcome:
    """One image's labels and header, read and made into a record; never raises UserError.

    image_id: the record's; source: the data set's name, for ``ImageRecord.source``.
    """
    try:
        # What no reader of the result would take: it has to be portable, and text.
        checked_file_name(item.file_name)
        labelled = importer.read(folder, item)
        height, width = image_size(folder.path(item.file_name))
    except BadItem as error:
        return Outcome(None, (Problem("image", _printable(item.file_name), f"{_printable(folder.root)}: {error.message}"),))
    except UserError as error:
        return Outcome(None, (Problem("image", item.file_name, _printable(str(error))),))
    record, problems = to_record(labelled, image_id, height, width, source)
    return Outcome(record, tuple(problems), labelled.keywords)


def _printable(text: str) -> str:
    """Names of files are bytes, and need not be text."""
    return text.encode("utf-8", "backslashreplace").decode()


def to_record(labelled: LabelledImage, image_id: int, height: int, width: int, source: str) -> tuple[ImageRecord, list[Problem]]:
    """The record of an image of height x width pixels, and what was mended or left out of it."""
    instances: list[Instance] = []
    problems: list[Problem] = []
    for number, found in enumerate(labelled.instances or (), 1):
        where = f"{labelled.file_name}: instance {number}"
        polygon, notes = mend(found.polygon, height, width)
        problems += [Problem(kind, where, message, left_out=polygon is None) for kind, message in notes]
        if polygon is not None:
            instances.append(Instance(polygon, found.ignore, text=found.text, language=found.language))
    return ImageRecord(image_id, labelled.file_name, height, width, tuple(instances), source), problems


def mend(polygon: NDArray[np.float32], height: int, width: int) -> tuple[NDArray[np.float32] | None, list[tuple[str, str]]]:
    """A simple ring inside the image of height x width pixels, or None, and (kind, message) of everything done to it.

    Vertices that repeat the one before are dropped. Of a crossing ring of four points, nearly always two points in the wrong
    order, the convex hull is taken; of a longer one the largest part. What leaves the image is cut off.
    """
    if degenerate(polygon):
        return None, [("degenerate", f"{len(polygon)} points without area")]
    notes: list[tuple[str, str]] = []
    kept = (polygon != np.roll(polygon, 1, axis=0)).any(axis=1)
    if not kept.all():
        polygon = polygon[kept]
        notes.append(("repeated", f"{int((~kept).sum())} repeated points dropped"))
    if not shapely.is_valid(shapely.Polygon(polygon)):
        shape = shapely.convex_hull(shapely.MultiPoint(polygon)) if len(polygon) == 4 else geometry.to_shapely([polygon])[0]
        ring = geometry.largest_ring(shape)
        assert ring is not None, "a ring with area has a part with area"
        polygon = geometry.clockwise(ring)
        notes.append(("crossing", "the ring crossed itself; untangled"))
    low, high = polygon.min(axis=0), polygon.max(axis=0)
    if low[0] >= 0 and low[1] >= 0 and high[0] <= width and high[1] <= height:
        return polygon, notes
    inside = geometry.clip_polygon(polygon, width, height)
    if inside is None or degenerate(inside):
        return None, [("outside", f"nothing of it is inside the image of {width} x {height}")]
    return inside, [*notes, ("clipped", f"partly outside the image of {width} x {height}; clipped to it")]


# ---------------------------------------------------------------------------------------------- between machines


def outcomes_table(outcomes: Sequence[Outcome], positions: Sequence[int]) -> pa.Table:
    """Outcomes as a table that Ray Data can carry; `positions` are their places in the order of the set."""
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

"""Exporting labels or predictions in one of the formats of registry.py."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np
import shapely

from i3cl import geometry, storage
from i3cl.data.exports.common import ExportOptions
from i3cl.data.exports.registry import FORMATS, REVIEW_FORMATS
from i3cl.data.exports.sources import read_labels
from i3cl.data.formats.records import ImageRecord

logger = logging.getLogger(__name__)

_SLIVER = 2.0
"""Pixels; a polygon with a shorter short side is too thin for a person to see or to grab."""
_NESTED = 0.9
"""Share of a polygon inside another one from which it counts as nested."""
_SHOWN = 5
"""Number of such polygons that are named."""


def export_labels(
    format: str,
    source: str,
    out: str,
    *,
    score: float | None = None,
    member: str | None = None,
    skip_bad: bool = False,
    join: bool = False,
    options: ExportOptions = ExportOptions(),  # noqa: B008
) -> str:
    """Write `source` (anything that ``read_labels`` takes) to `out` in one of ``FORMATS``; return what was written, in words.

    score: instances with a score up to it are left out; None: the format's own threshold, 0.45 for art, none for the others.
    join: join entries of one file. Polygons that a reviewer would trip over (slivers, one inside another) are logged and stay:
    what comes back from a review replaces all labels. UserError from the readers and writers.
    """
    chosen = FORMATS[format]
    if format != "coco":  # which gives back all that it reads
        storage.refuse_to_overwrite(out, source)
    threshold = chosen.score if score is None else score
    records: Iterable[ImageRecord] = read_labels(source, member=member, score=threshold, skip_bad=skip_bad, join=join)
    awkward = _Awkward()
    if format in REVIEW_FORMATS:
        records = awkward.watch(records)
    written = chosen.write(out, records, options)
    awkward.report()
    return written


@dataclass
class _Awkward:
    """Counts polygons that are hard to review."""

    slivers: int = 0
    nested: int = 0
    examples: list[str] = field(default_factory=list)

    def watch(self, records: Iterable[ImageRecord]) -> Iterator[ImageRecord]:
        """The records, unchanged, while their polygons are counted."""
        for record in records:
            self._look_at(record)
            yield record

    def _look_at(self, record: ImageRecord) -> None:
        polygons = [instance.polygon for instance in record.instances]
        for number, polygon in enumerate(polygons, 1):
            if geometry.short_side(polygon) < _SLIVER:
                self.slivers += 1
                self._example(f"{record.file_name}: polygon {number} is less than {_SLIVER:g} px wide")
        if len(polygons) < 2:
            return
        shapes = geometry.to_shapely(polygons)
        inner, outer = shapely.STRtree(shapes).query(shapes)
        # Of two that nearly coincide only the smaller one is named.
        area = shapely.area(shapes)
        pairs = (area[inner] < area[outer]) | ((area[inner] == area[outer]) & (inner > outer))
        inner, outer = inner[pairs], outer[pairs]
        inside = shapely.area(shapely.intersection(shapes[inner], shapes[outer])) >= _NESTED * np.maximum(area[inner], 1e-9)
        first = dict(zip(inner[inside].tolist()[::-1], outer[inside].tolist()[::-1], strict=True))
        for number in sorted(first):
            self.nested += 1
            self._example(f"{record.file_name}: polygon {number + 1} lies inside polygon {first[number] + 1}")

    def _example(self, line: str) -> None:
        if len(self.examples) < _SHOWN:
            self.examples.append(line)

    def report(self) -> None:
        """Log the counts and the first examples; nothing when there are none."""
        if not self.examples:
            return
        logger.info(
            "for the reviewer: %d polygons lie inside another one, %d are less than %g px wide",
            self.nested,
            self.slivers,
            _SLIVER,
        )
        for example in self.examples:
            logger.info("  %s", example)
        if self.slivers + self.nested > len(self.examples):
            logger.info("  ...")

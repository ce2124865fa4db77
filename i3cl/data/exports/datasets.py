"""Our own data sets as an export: COCO json and Parquet shards."""

from __future__ import annotations

from collections.abc import Iterable

from i3cl.data.exports.common import ExportOptions, Format, with_size
from i3cl.data.formats.coco import write_coco
from i3cl.data.formats.records import ImageRecord
from i3cl.data.formats.table import write_shards


def _write_coco(out: str, records: Iterable[ImageRecord], options: ExportOptions) -> str:
    write_coco(out, with_size(records))
    return "COCO json"


def _write_parquet(out: str, records: Iterable[ImageRecord], options: ExportOptions) -> str:
    return f"{write_shards(out, with_size(records))} images"


COCO = Format(_write_coco)
PARQUET = Format(_write_parquet)

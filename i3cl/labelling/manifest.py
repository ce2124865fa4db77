"""The images of a labelling job as one Arrow table, cut into shards by position."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from i3cl.data.formats.records import Dataset
from i3cl.errors import UserError

SCHEMA = pa.schema([("image_id", pa.int64()), ("file_name", pa.string()), ("height", pa.int32()), ("width", pa.int32())])
_CHUNK = 16384
"""Records that exist as Python objects at the same time."""


@dataclass(frozen=True)
class Manifest:
    """The images to label, in some tens of bytes each."""

    table: pa.Table
    """``SCHEMA``, in the order of the data set; sizes are those that the annotation file says."""
    digest: str
    """SHA-256 of ids and file names in this order."""

    def __len__(self) -> int:
        return int(self.table.num_rows)

    def shards(self, rows: int) -> int:
        """Number of shards of `rows` images; the last may be smaller."""
        return -(-len(self) // rows)

    def shard_size(self, shard: int, rows: int) -> int:
        """Images of one shard."""
        return min(rows, len(self) - shard * rows)

    def blocks(self, tasks: Sequence[tuple[str, int, int]], rows: int, together: int) -> Iterator[pa.Table]:
        """Tables of at most `together` rows, one for each shard: part, group, and the columns of its images as lists.

        tasks: (part, group, shard). A shard is one row, so that nothing later can split it.
        """
        for start in range(0, len(tasks), together):
            chosen = tasks[start : start + together]
            slices = [self.table.slice(shard * rows, rows) for _, _, shard in chosen]
            offsets = pa.array(np.cumsum([0, *(len(s) for s in slices)]), pa.int32())
            images = pa.concat_tables(slices).combine_chunks()
            columns = {name: pa.ListArray.from_arrays(offsets, pa.concat_arrays(images[name].chunks)) for name in SCHEMA.names}
            parts = pa.array([part for part, _, _ in chosen], pa.string())
            groups = pa.array([group for _, group, _ in chosen], pa.int32())
            yield pa.table({"part": parts, "group": groups, **columns})


def make_manifest(dataset: Dataset) -> Manifest:
    """The manifest of a data set, whose records are read once and a few at a time.

    UserError when there is no image, or when two have the same id.
    """
    digest = hashlib.sha256()
    tables = []
    for table in _tables(dataset):
        digest.update(np.ascontiguousarray(table["image_id"].to_numpy()).tobytes())
        digest.update("\0".join(table["file_name"].to_pylist()).encode() + b"\0")
        tables.append(table)
    if not tables:
        raise UserError(f"{dataset.name}: has no images")
    manifest = Manifest(pa.concat_tables(tables).combine_chunks(), digest.hexdigest())
    ids, counts = np.unique(manifest.table["image_id"].to_numpy(), return_counts=True)
    if len(ids) < len(manifest):
        raise UserError(f"{dataset.name}: image id {ids[counts > 1][0]} occurs twice; give every image its own id")
    return manifest


def _tables(dataset: Dataset) -> Iterator[pa.Table]:
    columns: list[list] = [[], [], [], []]
    for record in dataset.records:
        for column, value in zip(columns, (record.id, record.file_name, record.height, record.width), strict=True):
            column.append(value)
        if len(columns[0]) == _CHUNK:
            yield pa.table(columns, schema=SCHEMA)
            columns = [[], [], [], []]
    if columns[0]:
        yield pa.table(columns, schema=SCHEMA)

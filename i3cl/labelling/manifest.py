"""The images of a labelling job as one Arrow table, cut into shards by position.

A job may grow: new images come behind those that it has, in shards of their own, so that no shard that is done changes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from i3cl.data.formats.records import Dataset, TableRecords
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
    grown: tuple[int, ...] = ()
    """Images of the job at its beginning and that joined each time it grew; empty for a job that has not grown."""

    def __len__(self) -> int:
        return int(self.table.num_rows)

    def spans(self, rows: int) -> list[tuple[int, int]]:
        """First position and number of images of every shard of at most `rows` images."""
        return shard_spans(self.grown or (len(self),), rows)

    def shard(self, span: tuple[int, int]) -> pa.Table:
        """The images of one shard."""
        return self.table.slice(*span)

    def block(self, tasks: Sequence[tuple[str, int, int]], spans: Sequence[tuple[int, int]]) -> pa.Table:
        """A table of one row for each shard: part, group, and the columns of its images as lists.

        tasks: (part, group, shard); spans: of all shards.
        """
        slices = [self.shard(spans[shard]) for _, _, shard in tasks]
        offsets = pa.array(np.cumsum([0, *(len(s) for s in slices)]), pa.int32())
        images = pa.concat_tables(slices).combine_chunks()
        columns = {name: pa.ListArray.from_arrays(offsets, pa.concat_arrays(images[name].chunks)) for name in SCHEMA.names}
        parts = pa.array([part for part, _, _ in tasks], pa.string())
        groups = pa.array([group for _, group, _ in tasks], pa.int32())
        return pa.table({"part": parts, "group": groups, **columns})


def shard_spans(grown: Sequence[int], rows: int) -> list[tuple[int, int]]:
    """First position and number of images of every shard.

    Args:
        grown: Images that the job began with and that joined it each time. None of them shares a shard with those before.
        rows: Images of a shard at most.
    """
    ends = np.cumsum(grown).tolist()
    return [
        (first, min(rows, end - first)) for end, count in zip(ends, grown, strict=True) for first in range(end - count, end, rows)
    ]


def joined(there: Manifest, given: Manifest, name: str) -> Manifest:
    """The manifest of a job after the images of `given` have joined it; `there` itself when it has them all.

    UserError when an image of the job is not among the given ones, or an id belongs to another file now.

    name: of the given data set, for messages.
    """
    ids, given_ids = there.table["image_id"].to_numpy(), given.table["image_id"].to_numpy()
    order = np.argsort(given_ids)
    place = order[np.searchsorted(given_ids, ids, sorter=order).clip(max=len(order) - 1)]
    absent = given_ids[place] != ids
    if absent.any():
        example = there.table["file_name"][int(np.flatnonzero(absent)[0])].as_py()
        raise UserError(
            f"{name}: lacks {int(absent.sum())} of the {len(there)} images that the job has, e.g. {example}; images may join a "
            "job, but none may leave it: give another name=… or put them back"
        )
    same = pc.equal(there.table["file_name"], given.table["file_name"].take(pa.array(place))).to_numpy()
    if not same.all():
        first = int(np.flatnonzero(~same)[0])
        before, now = (table["file_name"][k].as_py() for table, k in ((there.table, first), (given.table, int(place[first]))))
        raise UserError(
            f"{name}: image id {ids[first]} is {now} and was {before} when the job began; keep the ids of earlier images "
            "(`i3cl prepare import folder` into the same --out does)"
        )
    fresh = np.ones(len(given), bool)
    fresh[place] = False
    if not fresh.any():
        return there
    table = pa.concat_tables([there.table, given.table.filter(pa.array(fresh))]).combine_chunks()
    return make_manifest_of(table, (*(there.grown or (len(there),)), int(fresh.sum())))


def make_manifest(dataset: Dataset) -> Manifest:
    """The manifest of a data set, whose records are read once and a few at a time.

    UserError when there is no image, or when two have the same id.
    """
    tables = list(_tables(dataset))
    if not tables:
        raise UserError(f"{dataset.name}: has no images")
    manifest = make_manifest_of(pa.concat_tables(tables).combine_chunks())
    ids, counts = np.unique(manifest.table["image_id"].to_numpy(), return_counts=True)
    if len(ids) < len(manifest):
        raise UserError(f"{dataset.name}: image id {ids[counts > 1][0]} occurs twice; give every image its own id")
    return manifest


def make_manifest_of(table: pa.Table, grown: tuple[int, ...] = ()) -> Manifest:
    """The manifest of images in a table of ``SCHEMA`` whose ids differ. grown: as in `Manifest`."""
    return Manifest(table, _digest(table), grown)


def _digest(table: pa.Table) -> str:
    digest = hashlib.sha256()
    for start in range(0, len(table), _CHUNK):
        some = table.slice(start, _CHUNK)
        ids: NDArray[np.int64] = some["image_id"].to_numpy()
        digest.update(np.ascontiguousarray(ids).tobytes())
        digest.update("\0".join(some["file_name"].to_pylist()).encode() + b"\0")
    return digest.hexdigest()


def _tables(dataset: Dataset) -> Iterator[pa.Table]:
    if isinstance(dataset.records, TableRecords):
        if len(dataset):
            yield dataset.records.columns(SCHEMA.names).cast(SCHEMA)
        return
    columns: list[list] = [[], [], [], []]
    for record in dataset.records:
        for column, value in zip(columns, (record.id, record.file_name, record.height, record.width), strict=True):
            column.append(value)
        if len(columns[0]) == _CHUNK:
            yield pa.table(columns, schema=SCHEMA)
            columns = [[], [], [], []]
    if columns[0]:
        yield pa.table(columns, schema=SCHEMA)

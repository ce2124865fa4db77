"""The record of an image and its instances, and many of them as a data set or an Arrow table."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, overload

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from i3cl import storage

logger = logging.getLogger(__name__)

_SHOWN = 20
"""Number of problems of a data set that are listed one by one."""


@dataclass(frozen=True, eq=False, slots=True)
class Instance:
    """One text instance or ignore region."""

    polygon: NDArray[np.float32]
    """(N, 2) float32 x, y pixels of the image, N >= 3, not closed."""
    ignore: bool = False
    """Don't care: neither taught nor counted, and not a negative."""
    lossweight: float = 1.0
    """Weight of its losses, >= 0."""
    score: float | None = None
    """Fused score of a pseudo label, 0-1."""
    votes: int | None = None
    """Ensemble members that saw a pseudo label."""
    text: str | None = None
    """Transcription where the source has one; detection does not need it, people who review do."""
    language: str | None = None
    """Language or script as the source names it, e.g. 'Latin'."""
    outlineweight: float = 1.0
    """Factor >= 0, beside lossweight, of the box and mask losses alone; 0: teaches that here is text, but not its outline."""
    problem: tuple[str, float] | None = None
    """What an audit of labels says against it, and how strongly (0-1). For review: COCO json has it, Parquet does not."""


@dataclass(frozen=True, eq=False, slots=True)
class ImageRecord:
    """One image and its instances."""

    id: int
    file_name: str
    """Relative to the images root, forward slashes, never outside it."""
    height: int
    """Pixels, as stored (EXIF orientation not applied)."""
    width: int
    instances: tuple[Instance, ...] = ()
    source: str | None = None
    """Data set that the image comes from, e.g. 'art'."""


@dataclass(frozen=True, slots=True)
class Problem:
    """Something in an annotation file that was left out or repaired."""

    kind: str
    """Short name to count by, e.g. 'polygon', 'clipped'."""
    where: str
    """File and id."""
    message: str
    left_out: bool = True
    """False: the item was repaired and kept."""

    def __str__(self) -> str:
        return f"{'left out' if self.left_out else 'repaired'}: {self.where}: {self.message}"


@dataclass(frozen=True, eq=False, slots=True)
class Dataset:
    """The contents of one annotation file."""

    name: str
    images_root: str
    records: Sequence[ImageRecord]
    """A tuple; for a Parquet table ``TableRecords``, which makes each record when it is asked for."""
    problems: Sequence[Problem] = ()
    annotations: str = ""
    """Path or URL of that file; empty for a set that was put together otherwise."""

    def __len__(self) -> int:
        return len(self.records)

    def subset(self, positions: NDArray[np.int64], name: str) -> Dataset:
        """The images at (N,) int64 positions as a data set of their own; those of a table stay a table."""
        if isinstance(self.records, TableRecords):
            return replace(self, name=name, records=TableRecords(self.records.take(positions)))
        return replace(self, name=name, records=tuple(self.records[k] for k in positions.tolist()))

    def path(self, record: ImageRecord) -> str:
        """Path or URL of a record's image."""
        return storage.join(self.images_root, record.file_name)

    def summary(self) -> str:
        """One line: images, instances, ignore regions, and the problems counted by kind."""
        if isinstance(self.records, TableRecords):
            instances, ignored = self.records.counts()
        else:
            instances = sum(len(r.instances) for r in self.records)
            ignored = sum(i.ignore for r in self.records for i in r.instances)
        line = f"{self.name}: {len(self.records)} images, {instances - ignored} instances"
        line += f", {ignored} ignore regions"
        left_out = Counter(p.kind for p in self.problems if p.left_out)
        repaired = Counter(p.kind for p in self.problems if not p.left_out)
        for title, counts in (("left out", left_out), ("repaired", repaired)):
            if counts:
                line += f"; {title}: " + ", ".join(f"{n} {kind}" for kind, n in counts.most_common())
        return line

    def list_problems(self) -> None:
        """Log the first problems one by one, and ``summary``; nothing when there are none."""
        if not self.problems:
            return
        for problem in self.problems[:_SHOWN]:
            logger.info("%s", problem)
        if len(self.problems) > _SHOWN:
            logger.info("... and %d more", len(self.problems) - _SHOWN)
        logger.info("%s", self.summary())


# ------------------------------------------------------------------------------------------------------ Arrow tables

INSTANCE_TYPE = pa.struct(
    [
        ("polygon", pa.list_(pa.float32())),
        ("ignore", pa.bool_()),
        ("lossweight", pa.float32()),
        ("score", pa.float32()),
        ("votes", pa.int32()),
        ("text", pa.string()),
        ("language", pa.string()),
        ("outlineweight", pa.float32()),
    ]
)
IMAGE_SCHEMA = pa.schema(
    [
        ("image_id", pa.int64()),
        ("file_name", pa.string()),
        ("path", pa.string()),
        ("height", pa.int32()),
        ("width", pa.int32()),
        ("instances", pa.list_(INSTANCE_TYPE)),
        ("source", pa.string()),
    ]
)
"""One row per image; `polygon` is flat x0, y0, x1, y1, ...; `path` is images root and `file_name` joined."""


def record_table(records: Sequence[ImageRecord], images_root: str) -> pa.Table:
    """Records as a table of ``IMAGE_SCHEMA``; `images_root` is what the column `path` begins with."""
    columns: dict[str, list[Any]] = {
        "image_id": [r.id for r in records],
        "file_name": [r.file_name for r in records],
        "path": [storage.join(images_root, r.file_name) for r in records],
        "height": [r.height for r in records],
        "width": [r.width for r in records],
        "instances": [
            [
                {
                    "polygon": np.asarray(i.polygon, np.float32).ravel(),
                    "ignore": i.ignore,
                    "lossweight": i.lossweight,
                    "score": i.score,
                    "votes": i.votes,
                    "text": i.text,
                    "language": i.language,
                    "outlineweight": i.outlineweight,
                }
                for i in r.instances
            ]
            for r in records
        ],
        "source": [r.source for r in records],
    }
    return pa.table(columns, schema=IMAGE_SCHEMA)


def from_table(table: pa.Table) -> list[ImageRecord]:
    """Records of a table of ``IMAGE_SCHEMA``; the inverse of ``record_table``."""
    return [record_from_row(row) for batch in table.to_batches() for row in batch.to_pylist()]


def record_from_row(row: Mapping[str, Any]) -> ImageRecord:
    """The record of one row of ``IMAGE_SCHEMA``; takes lists or arrays, None or NaN, as Python and Ray Data give them."""
    instances = row["instances"] if row["instances"] is not None else ()
    return ImageRecord(
        int(row["image_id"]),
        str(row["file_name"]),
        int(row["height"]),
        int(row["width"]),
        tuple(
            Instance(
                np.array(i["polygon"], np.float32).reshape(-1, 2),
                bool(i["ignore"]),
                float(i["lossweight"]),
                None if _absent(i["score"]) else float(i["score"]),
                None if _absent(i["votes"]) else int(i["votes"]),
                i["text"],
                i["language"],
                1.0 if _absent(i.get("outlineweight")) else float(i["outlineweight"]),
            )
            for i in instances
        ),
        row["source"],
    )


def _absent(value: Any) -> bool:
    return value is None or value != value


_AT_ONCE = 256
"""Number of records that iteration makes at a time."""


class TableRecords(Sequence[ImageRecord]):
    """The rows of an Arrow table of ``IMAGE_SCHEMA`` as a sequence of records, each made when it is asked for.

    A table in a memory-mapped file costs memory only where it is being read. A slice is another such sequence. Do not send
    one to another process: the whole table would be sent.
    """

    def __init__(self, table: pa.Table, rows: range | None = None) -> None:
        self.table = table
        self._rows = range(table.num_rows) if rows is None else rows
        self._batches: list[pa.RecordBatch] = table.to_batches()
        self._ends = np.cumsum([batch.num_rows for batch in self._batches], dtype=np.int64)

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, index: int) -> ImageRecord: ...
    @overload
    def __getitem__(self, index: slice) -> TableRecords: ...
    def __getitem__(self, index: int | slice) -> ImageRecord | TableRecords:
        if isinstance(index, slice):
            return TableRecords(self.table, self._rows[index])
        row = self._rows[index]
        batch = int(np.searchsorted(self._ends, row, "right"))
        found = self._batches[batch].slice(row - int(self._ends[batch]) + self._batches[batch].num_rows, 1)
        return record_from_row(found.to_pylist()[0])

    def __iter__(self) -> Iterator[ImageRecord]:
        for start in range(0, len(self), _AT_ONCE):
            yield from from_table(self.take(np.arange(start, min(start + _AT_ONCE, len(self)))))

    def columns(self, names: Sequence[str]) -> pa.Table:
        """Some columns of all rows; no record is made."""
        chosen = self.table.select(names)
        return chosen if self._rows == range(self.table.num_rows) else chosen.take(pa.array(self._rows))

    def take(self, indices: NDArray[np.int64]) -> pa.Table:
        """The rows at (N,) int64 positions, in their order, as a table of their own.

        Table.take would first join all chunks of a nested column in memory.
        """
        rows = np.asarray(indices, np.int64) * self._rows.step + self._rows.start
        batch_of = np.searchsorted(self._ends, rows, "right")
        order = np.argsort(batch_of, kind="stable")
        batches, starts = np.unique(batch_of[order], return_index=True)
        parts = []
        for batch, chosen in zip(batches.tolist(), np.split(order, starts[1:]), strict=True) if len(rows) else ():
            first = int(self._ends[batch]) - self._batches[batch].num_rows
            parts.append(self._batches[batch].take(pa.array(rows[chosen] - first)))
        return pa.Table.from_batches(parts, self.table.schema).take(pa.array(np.argsort(order)))

    def counts(self) -> tuple[int, int]:
        """Number of instances, and how many of them are ignore regions; reads no other column."""
        if len(self) != self.table.num_rows:
            return sum(len(r.instances) for r in self), sum(i.ignore for r in self for i in r.instances)
        chunks = [chunk.flatten() for chunk in self.table["instances"].chunks]
        return sum(map(len, chunks)), sum(pc.sum(pc.struct_field(c, "ignore")).as_py() or 0 for c in chunks)

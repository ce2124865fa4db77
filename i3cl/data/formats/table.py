"""Data sets as Parquet, for sets too large for one json: written and checked in a stream, read from a memory map.

Opening a table copies it once, batch by batch, checked, repaired and uncompressed, into a temporary file that is mapped into
memory. Reading a row then costs only the pages of that row, and nothing has to be checked again. The file has no name from the
start, so nothing is left behind. It takes about as much space in TMPDIR as a json would take in memory.
"""

from __future__ import annotations

import os
import posixpath
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from itertools import count, islice
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import shapely
from numpy.typing import NDArray

from i3cl import storage
from i3cl.data.formats.checks import (
    CATEGORY,
    LARGEST,
    MAX_SIDE,
    BadItem,
    Faults,
    PresentFiles,
    checked_instance,
    identity_of,
    image_head,
    is_companion,
    may_hide_text,
    named,
    nothing_read,
    same_file,
    set_name,
)
from i3cl.data.formats.parts import check_finished
from i3cl.data.formats.records import (
    IMAGE_SCHEMA,
    INSTANCE_TYPE,
    Dataset,
    ImageRecord,
    Instance,
    TableRecords,
    record_table,
)
from i3cl.errors import UserError

_WRITE = "write it with: prepare.py export parquet"
_ROWS = 1024
"""Number of rows in memory at a time."""
_FILE_SCHEMA = pa.schema([field for field in IMAGE_SCHEMA if field.name != "path"])
"""Columns of a Parquet file; the images root is given when it is read, so `path` is not among them."""
_REQUIRED = ("image_id", "file_name", "height", "width")
_ODD_NAME = r"^[/~]|\\|//|(^|/)\.\.?(/|$)|^[A-Za-z]:|[\x00-\x1f]|/$|^\s*$"
"""File names that ``checks.image_head`` must look at; all others are certainly fine."""


# ---------------------------------------------------------------------------------------------------- writing


def write_shards(out: str, records: Iterable[ImageRecord], rows_per_shard: int = 8192) -> int:
    """Write records as a folder of Parquet files, atomically; return the number of records.

    At most 1024 records are in memory at a time. ValueError when two records share an id; UserError when `out` exists.
    """
    seen: set[int] = set()
    stream = iter(records)
    size = min(_ROWS, rows_per_shard)
    with storage.atomic_directory(out) as folder:
        group = list(islice(stream, size))
        for shard in count():
            with pq.ParquetWriter(folder / f"{shard:05d}.parquet", _FILE_SCHEMA, compression="zstd") as writer:
                for _ in range(rows_per_shard // size):
                    for record in group:
                        if record.id in seen:
                            raise ValueError(f"two records have the id {record.id}")
                        seen.add(record.id)
                    writer.write_table(record_table(group, "").drop_columns(["path"]))
                    group = list(islice(stream, size))
                    if not group:
                        break
            if not group:
                break
    return len(seen)


def write_parquet(path: str, records: Sequence[ImageRecord], images_root: str) -> None:
    """Write records as one Parquet file of ``IMAGE_SCHEMA``, atomically; ``read_coco`` reads it."""
    with storage.atomic_file(path) as out:
        pq.write_table(record_table(records, images_root), out)


# ---------------------------------------------------------------------------------------------------- reading


def read_table(
    path: str,
    images_root: str,
    *,
    skip_bad: bool,
    check_files: bool,
    lossweight: float | None,
    same_files: bool = False,
) -> Dataset:
    """A Parquet file or folder as a data set whose ``records`` are ``TableRecords``; arguments and errors as ``read_coco``."""
    parts = _parts(path)
    ids, names = _keys(parts)
    reader = _Reader(path, images_root, Faults(skip_bad), PresentFiles(images_root) if check_files else None)
    reader.repeated_id = _others(ids) != np.arange(len(ids))
    if not same_files:
        # Each entry of a file may lack words that the other one has, so with skip_bad none of them is used.
        reader.same_file = {row: int(ids[other]) for row, other in _doubles(names, ~reader.repeated_id)}

    def checked() -> Iterator[pa.RecordBatch]:
        row = 0
        for batch in _batches(parts, None):
            table = reader.check(batch, row)
            row += batch.num_rows
            yield from (table if lossweight is None else _with_lossweight(table, lossweight)).to_batches()

    table = _mapped(checked())
    return Dataset(set_name(path), images_root, TableRecords(table), tuple(reader.faults.problems), path)


def _keys(parts: Sequence[str]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(rows,) image ids, 0 where null, and (rows,) 64-bit hashes of the normalised file names: names would fill memory."""
    ids: list[NDArray[np.int64]] = [np.zeros(0, np.int64)]
    names: list[NDArray[np.int64]] = [np.zeros(0, np.int64)]
    for batch in _batches(parts, ("image_id", "file_name")):
        ids.append(batch.column(0).fill_null(0).to_numpy(zero_copy_only=False))
        hashes = (hash(posixpath.normpath(name or "")) for name in batch.column(1).to_pylist())
        names.append(np.fromiter(hashes, np.int64, batch.num_rows))
    return np.concatenate(ids), np.concatenate(names)


def _others(keys: NDArray[np.int64]) -> NDArray[np.int64]:
    """(rows,) for each row the first row with the same key."""
    _, first, inverse = np.unique(keys, return_index=True, return_inverse=True)
    return first[inverse]


def _doubles(names: NDArray[np.int64], usable: NDArray[np.bool_]) -> Iterator[tuple[int, int]]:
    """(row, another usable row with the same name) for every usable row whose name occurs again."""
    rows = np.flatnonzero(usable)
    first = _others(names[rows])
    again = np.flatnonzero(first != np.arange(len(rows)))
    for later in again.tolist():
        yield int(rows[later]), int(rows[first[later]])
    for earlier, at in zip(*np.unique(first[again], return_index=True), strict=True):
        yield int(rows[earlier]), int(rows[again[at]])


def is_table(path: str) -> bool:
    """Whether a Parquet file or folder holds images with labels, by the columns of its first part. UserError without any part."""
    part = _parts(path)[0]
    try:
        with storage.open_arrow(part) as source, pq.ParquetFile(source) as file:
            return "instances" in file.schema_arrow.names
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{part}: not a Parquet file ({' '.join(str(error).split())[:200]}); write it again") from None


def _parts(path: str) -> list[str]:
    if storage.is_file(path):
        return [path]
    if not storage.exists(path):
        raise UserError(f"{path}: no such file or folder; check the path")
    if not storage.is_complete(path):
        raise UserError(f"{path}: its upload was stopped half-way; run the command that writes it again")
    files = storage.list_files(path)
    check_finished(path, {name for name in files if "/" not in name})
    found = sorted(n for n in files if n.endswith(".parquet") and not is_companion(n))
    names = [name for name in found if not posixpath.basename(name).startswith("_")]
    if not names:
        raise UserError(f"{path}: holds no Parquet file; give a COCO json, or a folder written by: prepare.py export parquet")
    return [storage.join(path, name) for name in names]


def _batches(parts: Sequence[str], columns: Sequence[str] | None) -> Iterator[pa.RecordBatch]:
    """Batches of `columns` (all of _FILE_SCHEMA by default), cast to its types, one at a time."""
    for part in parts:
        try:
            with storage.open_arrow(part) as source, pq.ParquetFile(source) as file:
                there = file.schema_arrow.names
                for name in _REQUIRED:
                    if name not in there:
                        raise UserError(f"{part}: not a Parquet table of images (no column {name}); {_WRITE}")
                wanted = [name for name in columns or _FILE_SCHEMA.names if name in there]
                for batch in file.iter_batches(_ROWS, columns=wanted):
                    batch.validate(full=True)
                    made = {name: _column(batch, name) for name in columns or _FILE_SCHEMA.names}
                    yield pa.RecordBatch.from_pydict(made, schema=pa.schema([_FILE_SCHEMA.field(n) for n in made]))
        except (OSError, pa.ArrowException) as error:
            reason = " ".join(str(error).split())[:200]
            raise UserError(f"{part}: not a Parquet table of images ({reason}); {_WRITE}") from None


def _column(batch: pa.RecordBatch, name: str) -> pa.Array:
    kind = _FILE_SCHEMA.field(name).type
    if name not in batch.schema.names:
        empty: list[Any] = [[] if name == "instances" else None] * batch.num_rows
        return pa.array(empty, kind)
    column = batch.column(name)
    if column.type == kind:
        return column
    if name != "instances":
        return column.cast(kind)
    inner = column.type.value_type if pa.types.is_list(column.type) or pa.types.is_large_list(column.type) else None
    if inner is None or not pa.types.is_struct(inner) or inner.get_field_index("polygon") < 0:
        raise pa.ArrowInvalid("column instances is not a list of instances")
    # Other writers have fewer fields or wider numbers; Arrow casts no structs with other fields.
    keys = [field.name for field in INSTANCE_TYPE]
    rows = column.to_pylist()
    return pa.array([row and [i and {key: i.get(key) for key in keys} for i in row] for row in rows], kind)


class _Reader:
    """Checks batches: all rows at once by their columns, and one by one only those that are not certainly right."""

    repeated_id: NDArray[np.bool_]
    """(all rows,) whether an earlier row has the same id."""

    def __init__(self, path: str, images_root: str, faults: Faults, present: PresentFiles | None) -> None:
        self.path, self.images_root, self.faults, self.present = path, images_root, faults, present
        self.prefix = storage.join(images_root, "x")[:-1]
        self.same_file: dict[int, int] = {}
        """Row -> id of another row with the same file."""

    def check(self, batch: pa.RecordBatch, start: int) -> pa.Table:
        """The batch's right and repaired rows as a table of ``IMAGE_SCHEMA``; start: number of the batch's first row."""
        right = _plain_heads(batch)
        right &= _plain_instances(batch, right)
        right &= ~self.repeated_id[start : start + batch.num_rows]
        doubled = [row - start for row in self.same_file if start <= row < start + batch.num_rows]
        right[doubled] = False
        if self.present is not None:
            for row in np.flatnonzero(right):
                right[row] = self.present.has(batch.column("file_name")[row].as_py())
        plain = pa.Table.from_batches([batch] if right.all() else [batch.filter(pa.array(right))])
        paths = pc.binary_join_element_wise(self.prefix, plain["file_name"], "")
        plain = plain.add_column(2, IMAGE_SCHEMA.field("path"), paths)
        if right.all():
            return plain
        odd = np.flatnonzero(~right)
        records = [self._record(batch.slice(row, 1).to_pylist()[0], start + row) for row in odd.tolist()]
        kept = [record for record in records if record is not None]
        rows = np.concatenate([np.flatnonzero(right), odd[[record is not None for record in records]]])
        together = pa.concat_tables([plain, record_table(kept, self.images_root)])
        return together.take(pa.array(np.argsort(rows)))

    def _record(self, row: dict[str, Any], number: int) -> ImageRecord | None:
        image = {"id": row["image_id"], **row}
        where = f"{self.path}: {named('image', image, number)}"
        try:
            identity = identity_of(image)
            if self.repeated_id[number]:
                raise BadItem("duplicate image id", "occurs twice; give every image its own id")
            name, height, width, source = image_head(image)
            if self.present is not None and not self.present.has(name):
                path = storage.join(self.images_root, name)
                raise BadItem("missing image", f"{path} is not there; correct the images root or the file name")
            if number in self.same_file:
                raise same_file(self.same_file[number], name)
        except BadItem as error:
            self.faults.bad(where, error)
            return None
        instances: list[Instance] = []
        left_out: list[str] = []
        for position, entry in enumerate(row["instances"] or (), 1):
            here = f"{where}, instance {position}"
            try:
                if entry is None:
                    raise BadItem("type", "is null; write an instance")
                if entry["polygon"] is None:
                    raise BadItem("polygon", "has no polygon; write x0, y0, x1, y1, ...")
                entry = {**entry, "segmentation": [entry["polygon"]], "category_id": CATEGORY["id"]}
                instance, notes = checked_instance(entry, {CATEGORY["id"]: True}, height, width)
                instances.append(instance)
                self.faults.repaired(here, notes)
            except BadItem as error:
                self.faults.bad(here, error)
                left_out.append(error.kind)
        if may_hide_text(left_out, len(instances)):
            self.faults.bad(where, nothing_read(len(left_out)))
            return None
        return ImageRecord(identity, name, height, width, tuple(instances), source)


def _plain_heads(batch: pa.RecordBatch) -> NDArray[np.bool_]:
    """(rows,) True where everything but the instances is certainly right."""
    right = np.ones(batch.num_rows, bool)
    for name in _REQUIRED:
        right &= batch.column(name).is_valid().to_numpy(zero_copy_only=False)
    for name in ("height", "width"):
        side = batch.column(name).fill_null(0).to_numpy(zero_copy_only=False)
        right &= (side >= 1) & (side <= MAX_SIDE)
    odd = pc.match_substring_regex(batch.column("file_name"), _ODD_NAME)
    return right & ~odd.fill_null(True).to_numpy(zero_copy_only=False)


def _plain_instances(batch: pa.RecordBatch, usable: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """(rows,) True where all instances are certainly right; `usable`: rows whose height and width may be trusted."""
    lists = batch.column("instances")
    right = lists.is_valid().to_numpy(zero_copy_only=False) & usable
    row_of = np.repeat(np.arange(len(lists)), pc.list_value_length(lists).fill_null(0).to_numpy(zero_copy_only=False))
    instances = lists.flatten()
    polygons, ignore, lossweight, score, votes, _, _, outlineweight = instances.flatten()
    good = polygons.is_valid().to_numpy(zero_copy_only=False) & ignore.is_valid().to_numpy(zero_copy_only=False)
    limits = (
        (lossweight, 0, LARGEST, True),
        (outlineweight, 0, LARGEST, False),
        (score, 0, 1, False),
        (votes, 0, 2**31 - 1, False),
    )
    for column, low, high, wanted in limits:
        value = column.to_numpy(zero_copy_only=False).astype(np.float64)
        valid = column.is_valid().to_numpy(zero_copy_only=False)
        good &= np.where(valid, (value >= low) & (value <= high), not wanted)

    length = pc.list_value_length(polygons).fill_null(0).to_numpy(zero_copy_only=False).astype(np.int64)
    numbers = polygons.flatten().to_numpy(zero_copy_only=False)
    shape = (length >= 6) & (length % 2 == 0)
    numbers = numbers[np.repeat(shape, length)].astype(np.float64)
    good &= shape
    chosen = np.flatnonzero(shape)
    corners = length[chosen] // 2
    if len(chosen):
        points = numbers.reshape(-1, 2)
        ends = np.cumsum(corners)
        starts = ends - corners
        sides = [batch.column(name).fill_null(0).to_numpy(zero_copy_only=False)[row_of[chosen]] for name in ("width", "height")]
        limit = np.repeat(np.stack(sides, 1), corners, axis=0)
        # False for NaN too.
        inside = ((points >= 0) & (points <= limit)).all(1)
        fine = np.logical_and.reduceat(inside, starts)
        following = np.arange(1, len(points) + 1)
        following[ends - 1] = starts
        fine &= np.logical_and.reduceat((points != points[following]).any(1), starts)
        x, y = (points - np.repeat(points[starts], corners, axis=0)).T
        with np.errstate(invalid="ignore", over="ignore"):
            doubled = np.add.reduceat(x * y[following] - x[following] * y, starts)
        fine &= np.abs(doubled) > 2e-6
        # Only rings that passed so far: the check for crossings takes no infinite numbers.
        passed = np.flatnonzero(fine)
        kept = np.repeat(fine, corners)
        rings = shapely.linearrings(points[kept], indices=np.repeat(np.arange(len(passed)), corners[passed]))
        fine[passed] = shapely.is_valid(shapely.polygons(rings))
        good[chosen] &= fine
    right[row_of[~good]] = False
    return right


def _with_lossweight(table: pa.Table, lossweight: float) -> pa.Table:
    """The table with one lossweight for all instances."""
    chunks = []
    for chunk in table["instances"].chunks:
        inner = chunk.flatten()
        fields = inner.flatten()
        fields[INSTANCE_TYPE.get_field_index("lossweight")] = pa.array(np.full(len(inner), lossweight, np.float32))
        lengths = pc.list_value_length(chunk).to_numpy(zero_copy_only=False)
        offsets = pa.array(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32))
        chunks.append(pa.ListArray.from_arrays(offsets, pa.StructArray.from_arrays(fields, fields=list(INSTANCE_TYPE))))
    position = table.schema.get_field_index("instances")
    return table.set_column(position, table.schema.field(position), pa.chunked_array(chunks, table.schema.field(position).type))


def _mapped(batches: Iterable[pa.RecordBatch]) -> pa.Table:
    """The batches as a table of ``IMAGE_SCHEMA`` in an unnamed file of TMPDIR."""
    handle, path = tempfile.mkstemp(prefix="i3cl-table-", suffix=".arrow")
    os.close(handle)
    try:
        with pa.OSFile(path, "wb") as sink, pa.ipc.new_file(sink, IMAGE_SCHEMA) as writer:
            for batch in batches:
                try:
                    writer.write_batch(batch)
                except OSError as error:
                    reason = " ".join(str(error).split())[:200]
                    raise UserError(f"{path}: cannot be written ({reason}); set TMPDIR to a folder with room") from None
        return pa.ipc.open_file(pa.memory_map(path)).read_all()
    finally:
        os.unlink(path)

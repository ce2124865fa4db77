"""The table of predictions: one row per image, ensemble member and view, written once and read often."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from i3cl import storage
from i3cl.data.formats.parts import parts_of
from i3cl.errors import UserError

PREDICTION_SCHEMA = pa.schema(
    [
        ("image_id", pa.int64()),
        ("file_name", pa.string()),
        ("height", pa.int32()),
        ("width", pa.int32()),
        ("member", pa.string()),
        ("view", pa.string()),
        ("polygons", pa.list_(pa.list_(pa.float32()))),
        ("scores", pa.list_(pa.float32())),
        ("error", pa.string()),
        ("granularity", pa.string()),
        ("kind", pa.string()),
    ]
)
"""Polygons are flat x0, y0, x1, y1, ... in original pixels, with one score (0-1) each. `error` is null unless the image could not
be read, or this member cannot take it. `granularity` is 'line' where a polygon encloses a line, else 'word' or null. `kind` is
that of the detector (label.members.NAME.use), null where it is not known: members of one kind make the same mistakes."""
_LATER = ("granularity", "kind")
"""Columns that earlier versions did not write."""
_ROWS = 1024
"""Rows in memory at a time: a row may hold hundreds of polygons."""


def prediction_table(rows: Iterable[Mapping[str, Any]]) -> pa.Table:
    """A table of ``PREDICTION_SCHEMA`` from dicts with its column names; `view`, `error`, `granularity` and `kind` may be absent.

    Polygons may be (N, 2) or flat. ValueError for a row whose numbers of scores and polygons differ.
    """
    columns: dict[str, list[Any]] = {name: [] for name in PREDICTION_SCHEMA.names}
    for row in rows:
        polygons, scores = row["polygons"], row["scores"]
        if len(polygons) != len(scores):
            raise ValueError(f"image {row['image_id']}: {len(polygons)} polygons, {len(scores)} scores")
        flat = {"polygons": [_flat(p) for p in polygons], "scores": [float(s) for s in scores]}
        for name, column in columns.items():
            column.append(flat[name] if name in flat else row.get(name))
    return pa.table(columns, schema=PREDICTION_SCHEMA)


def read_batches(url: str, columns: Sequence[str] | None = None) -> Iterator[pa.RecordBatch]:
    """Record batches of a Parquet file or a folder of *.parquet parts; one at a time is in memory.

    url: local or s3://; columns: names of ``PREDICTION_SCHEMA``, all by default. UserError when there is no part, when one does
    not hold predictions, or when the folder is not finished (``parts_of``).
    """
    schema = _schema(columns)
    parts = parts_of(url)
    if not parts:
        raise UserError(f"{url}: holds no Parquet part; run the labelling first or correct the path")
    for part in parts:
        yield from _read_part(part, schema)


def _schema(columns: Sequence[str] | None) -> pa.Schema:
    return PREDICTION_SCHEMA if columns is None else pa.schema([PREDICTION_SCHEMA.field(n) for n in columns])


def read_predictions(url: str | Sequence[str]) -> Iterator[list[dict[str, Any]]]:
    """All rows of one image after another, however they are spread over the parts of a folder, or over several parts.

    A row is a dict of the columns, its polygons (N, 2) float32 arrays and its scores an (N,) float32 array.
    An image is yielded as soon as its last row is read, so memory holds only the images that are not complete yet. A row that a
    repeated task has written twice counts once. Raises what ``read_batches`` raises.
    """
    urls = [url] if isinstance(url, str) else url
    left: Counter[int] = Counter()
    for each in urls:
        for batch in read_batches(each, ["image_id"]):
            left.update(batch["image_id"].to_pylist())
    pending: dict[int, dict[tuple[str, str], dict[str, Any]]] = {}
    for each in urls:
        for batch in read_batches(each):
            for row in _rows(batch, each):
                image_id = row["image_id"]
                pending.setdefault(image_id, {}).setdefault((row["member"], row["view"]), row)
                left[image_id] -= 1
                if not left[image_id]:
                    yield list(pending.pop(image_id).values())


def member_predictions(url: str, member: str) -> dict[int, tuple[list[NDArray[np.float32]], NDArray[np.float32]]]:
    """One member's polygons and scores by image id, from its first view; images that could not be read are left out."""
    found: dict[int, tuple[list[NDArray[np.float32]], NDArray[np.float32]]] = {}
    for rows in read_predictions(url):
        for row in rows:
            if row["member"] == member and row["error"] is None:
                found.setdefault(row["image_id"], (row["polygons"], row["scores"]))
    return found


def polygons_of(row: Mapping[str, Any]) -> list[NDArray[np.float32]]:
    """The (N, 2) float32 polygons of one row, which may hold them flat."""
    return [np.asarray(polygon, np.float32).reshape(-1, 2) for polygon in row["polygons"]]


def _read_part(path: str, wanted: pa.Schema) -> Iterator[pa.RecordBatch]:
    try:
        with storage.open_arrow(path) as source, pq.ParquetFile(source) as file:
            there = [name for name in wanted.names if name in file.schema_arrow.names]
            missing = [name for name in wanted.names if name not in there and name not in _LATER]
            if missing:
                raise UserError(f"{path}: no column {missing[0]}; is it a part of predictions?")
            for batch in file.iter_batches(_ROWS, columns=there):
                if batch.num_rows:
                    columns = [batch[n] if n in there else pa.nulls(batch.num_rows, wanted.field(n).type) for n in wanted.names]
                    yield pa.RecordBatch.from_arrays(columns, wanted.names).cast(wanted)
    except (OSError, pa.ArrowException) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"{path}: cannot be read as predictions ({reason}); label again") from error


def _rows(batch: pa.RecordBatch, url: str) -> Iterator[dict[str, Any]]:
    """The batch's rows, with polygons as slices of its arrays: no number becomes a Python object."""
    heads = batch.drop_columns(["polygons", "scores"]).to_pylist()
    lists, numbers = batch["polygons"], batch["scores"]
    outer, inner = lists.offsets.to_numpy(), lists.values.offsets.to_numpy()
    points = lists.values.values.to_numpy(zero_copy_only=False)
    ends, scores = numbers.offsets.to_numpy(), numbers.values.to_numpy(zero_copy_only=False)
    lengths = np.diff(inner)
    fits = (
        not any(batch[name].null_count for name in ("image_id", "file_name", "height", "width", "member"))
        and np.array_equal(np.diff(outer), np.diff(ends))
        and not ((lengths % 2 == 1) | (lengths < 6)).any()
        and bool(np.isfinite(points).all())
        and bool(((scores >= 0) & (scores <= 1)).all())
    )
    if not fits:
        raise UserError(f"{url}: polygons and scores do not fit together; label again")
    for i, head in enumerate(heads):
        polygons = [points[inner[k] : inner[k + 1]].reshape(-1, 2) for k in range(outer[i], outer[i + 1])]
        yield head | {"polygons": polygons, "scores": scores[ends[i] : ends[i + 1]]}


def _flat(polygon: Any) -> NDArray[np.float32]:
    return np.asarray(polygon, np.float32).ravel()

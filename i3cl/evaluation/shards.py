"""Evaluation of corpora that no process should hold: a Ray Data map over the truth's Parquet row groups.

A task reads some images' truth and their predictions and returns their per-image counts; the driver adds those up and never
sees a polygon.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from i3cl import storage
from i3cl.data.formats import predictions
from i3cl.data.formats.records import IMAGE_SCHEMA, from_table
from i3cl.errors import UserError
from i3cl.evaluation.formats.read import (
    Found,
    found_of_row,
    sample_of,
    truth_of_record,
)
from i3cl.evaluation.metrics.batch import measure
from i3cl.evaluation.metrics.protocols import Counts, Rules

Shard = dict[str, Any]
"""A part file of the truth and one of its row groups: {"part": path, "row_group": number}."""


def truth_shards(truth: str) -> list[Shard]:
    """The row groups of a Parquet truth, a file or a folder of parts. UserError when there is none."""
    parts = [truth]
    if not storage.is_file(truth):
        parts = [storage.join(truth, name) for name in storage.list_dir(truth) if name.endswith(".parquet")]
    shards: list[Shard] = []
    for part in parts:
        try:
            with storage.open_arrow(part) as source, pq.ParquetFile(source) as file:
                missing = [f.name for f in IMAGE_SCHEMA if f.name not in file.schema_arrow.names]
                groups = file.num_row_groups
        except (OSError, pa.ArrowException) as error:
            raise UserError(f"{part}: not a Parquet table of images ({str(error)[:120]}); use write_parquet") from None
        if missing:
            raise UserError(f"{part}: no column {missing[0]}; write it with write_parquet")
        shards += [{"part": part, "row_group": k} for k in range(groups)]
    if not shards:
        raise UserError(f"{truth}: holds no Parquet part; --ray needs truth as Parquet")
    return shards


def count_shard(
    shard: Shard, results: str, member: str, rules: Sequence[Rules], threshold: float | None
) -> tuple[list[Counts], int]:
    """The counts of a shard's images by each of the rules, and how many of them the results do not hold."""
    with storage.open_arrow(shard["part"]) as source, pq.ParquetFile(source) as file:
        records = from_table(file.read_row_group(shard["row_group"], columns=IMAGE_SCHEMA.names).cast(IMAGE_SCHEMA))
    found = _found(results, member, [record.id for record in records])
    samples = [sample_of(truth_of_record(record), found.get(record.id)) for record in records]
    batch = measure(samples, rules[0].repair)
    counts = [Counts(r, threshold) for r in rules]
    for each in counts:
        each.update(batch)
    return counts, sum(record.id not in found for record in records)


def _found(results: str, member: str, ids: list[int]) -> dict[int, Found]:
    """Predictions of the images, reading only row groups whose ids may be among them."""
    import pyarrow.dataset as ds

    if not ids:
        return {}
    filesystem, inside = storage.filesystem(results)
    column = ds.field("image_id")
    # The range besides the list: it is what the statistics of a row group can be held against.
    wanted = (column >= min(ids)) & (column <= max(ids)) & column.isin(ids) & (ds.field("member") == member)
    table = ds.dataset(inside, filesystem=filesystem, format="parquet").to_table(
        columns=predictions.PREDICTION_SCHEMA.names, filter=wanted
    )
    found: dict[int, Found] = {}
    for batch in table.cast(predictions.PREDICTION_SCHEMA).to_batches(max_chunksize=1024):
        for row in batch.to_pylist():
            if row["error"] is None:
                found.setdefault(row["image_id"], found_of_row(row))
    return found


def count_all(
    truth: str,
    results: str,
    member: str | None,
    rules: Sequence[Rules],
    threshold: float | None,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[list[Counts], int]:
    """Counts of the whole truth over Ray, and the number of images that the results do not hold.

    truth, results: Parquet, as `write_parquet` and the predictions table have it. Ray must be connected. progress: called with
    shards done and all. UserError for predictions of images that the truth does not have.
    """
    import ray

    shards = truth_shards(truth)
    member = _check_ids(truth, results, member)

    def work(shard: Shard) -> list[Shard]:
        counts, missing = count_shard(shard, results, member, rules, threshold)
        rows = [each.table.tobytes() for each in counts]
        return [{"names": counts[0].names, "rows": rows, "missing": missing}]

    totals = [Counts(r, threshold) for r in rules]
    missing = 0
    data = ray.data.from_items(shards, override_num_blocks=len(shards)).flat_map(work)
    for done, row in enumerate(data.iter_rows(), start=1):
        for total, table in zip(totals, row["rows"]):
            total.add_rows(list(row["names"]), np.frombuffer(table, np.float64))
        missing += int(row["missing"])
        if progress is not None:
            progress(done, len(shards))
    return totals, missing


def _check_ids(truth: str, results: str, member: str | None) -> str:
    """The member to score. UserError when there are several, or images are in the results only."""
    import pyarrow.dataset as ds

    filesystem, inside = storage.filesystem(truth)
    known = ds.dataset(inside, filesystem=filesystem, format="parquet").to_table(columns=["image_id"])["image_id"]
    unique = pc.unique(known)
    if len(unique) != len(known):
        raise UserError(f"{truth}: {len(known) - len(unique)} image ids occur twice; give every image its own id")
    members: set[str] = set()
    strangers = 0
    for batch in predictions.read_batches(results, ["image_id", "member"]):
        members.update(batch["member"].unique().to_pylist())
        strangers += len(batch) - (pc.sum(pc.is_in(batch["image_id"], unique)).as_py() or 0)
    if strangers:
        raise UserError(
            f"{results}: {strangers} rows are of images that the truth does not have; choose the truth they belong to"
        )
    if member is None and len(members) == 1:
        return next(iter(members))
    if member is None or member not in members:
        raise UserError(f"{results}: holds {', '.join(sorted(members))}; choose one with --member NAME")
    return member

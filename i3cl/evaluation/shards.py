"""Evaluation of corpora that no process should hold: Ray tasks over the truth's Parquet row groups.

The driver reads the image ids of both sides once and sees no polygon. A task reads the truth of some images and their
predictions, from the parts that hold them, and returns nine totals.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from i3cl import claims, storage
from i3cl.data.formats.coco import read_coco
from i3cl.data.formats.parts import parts_of
from i3cl.data.formats.predictions import PREDICTION_SCHEMA, read_batches
from i3cl.data.formats.records import IMAGE_SCHEMA, from_table
from i3cl.data.formats.table import is_table as holds_labels
from i3cl.errors import UserError
from i3cl.evaluation.formats.coco import detections_of_record, truth_of_record
from i3cl.evaluation.formats.pairing import image_of
from i3cl.evaluation.formats.sets import ImageDetections, ImageTruth, PolygonSet
from i3cl.evaluation.formats.table import chosen_member, detections_of_row, unfinished_warning
from i3cl.evaluation.metrics.batch import measure_polygons
from i3cl.evaluation.metrics.metric import COLUMNS, Counts, DetectionMetric, Summary, summarise
from i3cl.evaluation.metrics.protocols import Rules
from i3cl.evaluation.scoring import combine

_READERS = 16
"""Parts whose ids are read at the same time: on S3 a read is mostly waiting."""


@dataclass(frozen=True)
class Shard:
    """Images that a task scores."""

    part: str
    """Part file of the truth."""
    row_group: int
    results: list[str] = field(default_factory=list)
    """Part files of the results that hold these images."""
    given: str | None = None
    """Where the results are not Parquet: JSON of image id -> flat polygons, and their scores."""


def truth_shards(truth: str) -> list[Shard]:
    """The row groups of a Parquet truth, a file or a folder of parts, without their results. UserError when there is none."""
    parts = parts_of(truth)
    with ThreadPoolExecutor(_READERS) as pool:
        groups = list(pool.map(_row_groups, parts))
    shards = [Shard(part, k) for part, number in zip(parts, groups) for k in range(number)]
    if not shards:
        raise UserError(f"{truth}: holds no Parquet part; --ray needs truth as Parquet")
    return shards


def _row_groups(part: str) -> int:
    try:
        with storage.open_arrow(part) as source, pq.ParquetFile(source) as file:
            missing = [f.name for f in IMAGE_SCHEMA if f.name not in file.schema_arrow.names and f.name != "path"]
            groups = file.num_row_groups
    except (OSError, pa.ArrowException) as error:
        reason = str(error)[:120]
        raise UserError(f"{part}: not a Parquet table of images ({reason}); give --truth as prepare.py writes it") from None
    if missing:
        raise UserError(f"{part}: no column {missing[0]}; give --truth as prepare.py writes it")
    return groups


def count_shard(shard: Shard, member: str | None, rules: Sequence[Rules], threshold: float | None) -> tuple[list[Counts], int]:
    """The counts of a shard's images by each of the rules, and how many of them the results do not hold.

    member: as `plan` returns it.
    """
    with storage.open_arrow(shard.part) as source, pq.ParquetFile(source) as file:
        names = [name for name in IMAGE_SCHEMA.names if name in file.schema_arrow.names]
        table = file.read_row_group(shard.row_group, columns=names)
    if "path" not in names:
        table = table.append_column("path", pa.array([""] * len(table), pa.string()))
    records = from_table(table.select(IMAGE_SCHEMA.names).cast(IMAGE_SCHEMA))
    found = _found(shard, member, [record.id for record in records])
    truths = [truth_of_record(record) for record in records]
    if rules[0].hash_is_dont_care:
        for truth in truths:
            truth.spare_hashes()
    images = [image_of(truth, found.get(record.id)) for truth, record in zip(truths, records, strict=True)]
    batch = measure_polygons(images, rules[0].repair)
    counts = []
    for each in rules:
        metric = DetectionMetric(each)
        metric.update(batch)
        counts.append(metric.counts(threshold))
    return counts, sum(record.id not in found for record in records)


def _found(shard: Shard, member: str | None, ids: list[int]) -> dict[int, ImageDetections]:
    """Detections of the images. Of predictions, only row groups whose ids may be among them are read."""
    found: dict[int, ImageDetections] = {}
    if shard.given is not None:
        for identity, (polygons, scores) in json.loads(shard.given).items():
            rings = [np.asarray(polygon, np.float64).reshape(-1, 2) for polygon in polygons]
            found[int(identity)] = ImageDetections("", rings, np.array(scores, np.float64))
        return found
    if not ids:
        return found
    if member is None:
        chosen = set(ids)
        for part in shard.results:
            # Checked and repaired as when they are read as a whole.
            records = read_coco(part, "", check_files=False).records
            found |= {record.id: detections_of_record(record) for record in records if record.id in chosen}
        return found
    wanted, low, high = pa.array(ids, pa.int64()), min(ids), max(ids)
    for part in shard.results:
        with storage.open_arrow(part) as source, pq.ParquetFile(source) as file:
            groups = [k for k in range(file.num_row_groups) if _may_hold(file.metadata.row_group(k), low, high)]
            for batch in file.iter_batches(1024, row_groups=groups, columns=PREDICTION_SCHEMA.names):
                batch = batch.filter(pc.and_(pc.is_in(batch["image_id"], wanted), pc.equal(batch["member"], member)))
                for row in batch.to_pylist():
                    if row["error"] is None:
                        found.setdefault(row["image_id"], detections_of_row(row))
    return found


def _may_hold(group: Any, low: int, high: int) -> bool:
    """Whether ids from low to high may be in a row group, by its statistics."""
    for k in range(group.num_columns):
        column = group.column(k)
        if column.path_in_schema == "image_id" and column.statistics is not None and column.statistics.has_min_max:
            return bool(column.statistics.max >= low and column.statistics.min <= high)
    return True


def count_all(
    truth: str,
    results: str | PolygonSet[ImageDetections],
    member: str | None,
    rules: Sequence[Rules],
    threshold: float | None,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[list[Summary], int, list[str]]:
    """Scores the whole truth over Ray, which must be connected.

    Args:
        truth: Parquet of images and their labels, a file or a folder.
        results: Parquet of predictions or of labels with scores, a folder or a file; else what `read_results` gives.
        member: Which member of predictions; needed when there are several.
        rules: Rule sets to count by.
        threshold: Detections above this score count; None: all of them.
        progress: Called with the shards done and all shards.

    Returns:
        The score by each of the rules, the number of images that the results do not hold, and warnings.

    Raises:
        UserError: Results are of images that the truth does not have, or image sizes differ.
    """
    import ray

    warnings: list[str] = []
    if isinstance(results, str):
        shards, member = plan(truth, results, member)
        warnings = unfinished_warning(results)
    else:
        shards, warnings = plan_given(truth, results)

    def work(row: dict[str, Any]) -> list[dict[str, Any]]:
        # A user's mistake travels as a value: Ray would wrap the exception and try again.
        try:
            parts = [str(part) for part in row["results"] if part]
            shard = Shard(str(row["part"]), int(row["row_group"]), parts, str(row["given"]) or None)
            counts, missing = count_shard(shard, member, rules, threshold)
        except UserError as error:
            return [{"totals": b"", "images": 0, "missing": 0, "mistake": str(error)}]
        totals = np.stack([each.table.sum(axis=0) for each in counts])
        return [{"totals": totals.tobytes(), "images": len(counts[0].names), "missing": missing, "mistake": ""}]

    totals = np.zeros((len(rules), len(COLUMNS)))
    images = missing = 0
    # Every item has the same columns and types, also where no part holds a shard's images.
    rows = [{"part": s.part, "row_group": s.row_group, "results": s.results or [""], "given": s.given or ""} for s in shards]
    data = ray.data.from_items(rows, override_num_blocks=len(rows)).flat_map(work)
    for done, row in enumerate(data.iter_rows(), start=1):
        if row["mistake"]:
            raise UserError(row["mistake"])
        totals += np.frombuffer(row["totals"], np.float64).reshape(totals.shape)
        images, missing = images + int(row["images"]), missing + int(row["missing"])
        if progress is not None:
            progress(done, len(shards))
    summaries = [summarise(total, images, each, threshold) for total, each in zip(totals, rules)]
    return summaries, missing, warnings


def plan_given(truth: str, results: PolygonSet[ImageDetections]) -> tuple[list[Shard], list[str]]:
    """The shards with the detections of their images, tied to them as without Ray, and warnings.

    UserError as `scoring.combine`.
    """
    shards = truth_shards(truth)
    with ThreadPoolExecutor(_READERS) as pool:
        heads = [table.to_pylist() for table in pool.map(_shard_heads, shards)]
    images = [
        ImageTruth(head["file_name"], id=head["image_id"], height=head["height"], width=head["width"])
        for shard in heads
        for head in shard
    ]
    paired, warnings = combine(PolygonSet(truth, "COCO", images), results)
    missing = set(paired.missing)
    given: list[Shard] = []
    every = iter(paired.images)
    for shard, rows in zip(shards, heads, strict=True):
        own = {}
        for head, image in zip(rows, every):
            if image.name not in missing:
                own[head["image_id"]] = [[p.ravel().tolist() for p in image.detections], np.asarray(image.scores).tolist()]
        given.append(replace(shard, given=json.dumps(own)))
    return given, warnings


def plan(truth: str, results: str, member: str | None) -> tuple[list[Shard], str | None]:
    """The shards with the result parts of their images, and the member to score. Every part's ids are read once.

    The member is None where the results are labels with scores, not predictions.

    Raises:
        UserError: Ids occur twice, results are of other images, or it is not clear which member is meant.
    """
    shards = truth_shards(truth)
    with ThreadPoolExecutor(_READERS) as pool:
        per_shard = list(pool.map(_shard_ids, shards))
        parts = parts_of(results) or [results]
        labels = bool(claims.parts(results)) and holds_labels(results)
        heads = list(pool.map(_label_ids if labels else _part_ids, parts))
    known = np.concatenate([np.zeros(0, np.int64), *per_shard])
    order = np.argsort(known, kind="stable")
    ordered = known[order]
    twice = len(known) - len(np.unique(known))
    if twice:
        raise UserError(f"{truth}: {twice} image ids occur twice; give every image its own id")
    shard_of = np.repeat(np.arange(len(shards)), [len(ids) for ids in per_shard])[order]
    members: set[str] = set()
    strangers = 0
    holders: list[set[int]] = [set() for _ in shards]
    for number, (ids, names) in enumerate(heads):
        members |= names
        place = np.minimum(np.searchsorted(ordered, ids), max(len(ordered) - 1, 0))
        there = ordered[place] == ids if len(ordered) else np.zeros(len(ids), bool)
        strangers += int((~there).sum())
        for shard in np.unique(shard_of[place[there]]).tolist():
            holders[shard].add(number)
    if strangers:
        raise UserError(
            f"{results}: {strangers} images are not in the truth {truth}; choose the truth that the results belong to"
        )
    chosen = None if labels and member is None else chosen_member(results, members, member)
    filled = [Shard(s.part, s.row_group, [parts[k] for k in sorted(held)]) for s, held in zip(shards, holders)]
    return filled, chosen


def _shard_heads(shard: Shard, columns: Sequence[str] = ("image_id", "file_name", "height", "width")) -> pa.Table:
    with storage.open_arrow(shard.part) as source, pq.ParquetFile(source) as file:
        return file.read_row_group(shard.row_group, columns=list(columns))


def _shard_ids(shard: Shard) -> NDArray[np.int64]:
    column = _shard_heads(shard, ["image_id"])["image_id"]
    return column.combine_chunks().to_numpy(zero_copy_only=False).astype(np.int64)


def _label_ids(part: str) -> tuple[NDArray[np.int64], set[str]]:
    """Distinct image ids of a part of labels, which have no members."""
    with storage.open_arrow(part) as source, pq.ParquetFile(source) as file:
        return np.unique(file.read(columns=["image_id"])["image_id"].to_numpy().astype(np.int64)), set()


def _part_ids(part: str) -> tuple[NDArray[np.int64], set[str]]:
    """Distinct image ids and members of a part of the results."""
    ids, members = [np.zeros(0, np.int64)], set()
    for batch in read_batches(part, ["image_id", "member"]):
        ids.append(batch["image_id"].to_numpy(zero_copy_only=False))
        members.update(batch["member"].unique().to_pylist())
    return np.unique(np.concatenate(ids)), members

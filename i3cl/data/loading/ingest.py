"""From data sets to training batches: the mixture, the order of the whole run, and decoding through Ray Data.

The order of every image of a run is a pure function of the seed, so a run that continues at step k sees exactly the images
that it would have seen, on any number of workers of the same total batch. Decoding and augmentation run as Ray Data tasks
wherever the cluster has free CPUs; a worker receives finished uint8 pixels and polygons, never bitmaps of masks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa

from i3cl import storage
from i3cl.config import DataSettings, SourceSettings
from i3cl.data.formats.coco import read_coco
from i3cl.data.formats.records import (
    Dataset,
    TableRecords,
    record_from_row,
    record_table,
)
from i3cl.data.loading.images import ImageError, decode_image
from i3cl.data.loading.transforms import Sample, TrainTransform
from i3cl.errors import UserError
from i3cl.runtime.cluster import quiet

_SEGMENT = 2048
"""Images of one worker that are handed to Ray Data at a time."""


def read_source(source: SourceSettings, data_root: str, skip_bad: bool = False, check_files: bool = True) -> Dataset:
    """One data set with its paths under `data_root` and its lossweight override applied.

    check_files: look whether every image file is there, and list what skip_bad left out; the driver does it once, before
    workers read the same set.
    """
    annotations, images = (storage.absolute(storage.join(data_root, p)) for p in (source.annotations, source.images))
    dataset = read_coco(annotations, images, skip_bad=skip_bad, check_files=check_files, lossweight=source.lossweight)
    if skip_bad and check_files:
        dataset.list_problems()
    return dataset


@dataclass(frozen=True)
class Mixture:
    """Several data sets as one table, with how often an epoch visits each row."""

    table: pa.Table
    """IMAGE_SCHEMA rows of all sources, one after the other; those of Parquet sources stay in their memory map."""
    weights: np.ndarray
    """(rows,) float64: expected visits per epoch."""

    @property
    def epoch_images(self) -> int:
        """Images in one epoch, at least 1."""
        return max(1, round(float(self.weights.sum())))

    def rows(self, numbers: np.ndarray) -> pa.Table:
        """The rows of (N,) int64 numbers, copied out of the table."""
        return self._records.take(numbers)

    @cached_property
    def _records(self) -> TableRecords:
        return TableRecords(self.table)

    def order(self, first: int, count: int, seed: int) -> np.ndarray:
        """(count,) int64 rows at positions first ... first + count - 1 of the endless run."""
        size = self.epoch_images
        parts = []
        position = first
        while position < first + count:
            epoch, offset = divmod(position, size)
            rows = self._epoch(epoch, seed)[offset : offset + first + count - position]
            parts.append(rows)
            position += len(rows)
        return np.concatenate(parts) if parts else np.zeros(0, np.int64)

    def _epoch(self, epoch: int, seed: int) -> np.ndarray:
        random = np.random.default_rng((seed, 1, epoch))
        visits = np.floor(self.weights).astype(np.int64)
        chosen = np.repeat(np.arange(len(visits)), visits)
        fraction = self.weights - visits
        missing = self.epoch_images - len(chosen)
        if missing > 0:
            extra = random.choice(len(visits), size=missing, replace=False, p=fraction / fraction.sum())
            chosen = np.concatenate([chosen, extra])
        return random.permutation(chosen)


def mix(sources: Sequence[SourceSettings], data_root: str, skip_bad: bool = False, check_files: bool = True) -> Mixture:
    """Read and mix the training sets; `check_files` as `read_source`. UserError when there is none, or none with an image."""
    if not sources:
        raise UserError("data.train: names no data set; add {annotations: …, images: …}")
    tables, weights = [], []
    for source in sources:
        dataset = read_source(source, data_root, skip_bad, check_files)
        records = dataset.records
        tables.append(records.table if isinstance(records, TableRecords) else record_table(records, dataset.images_root))
        weights.append(np.full(len(dataset.records), source.weight))
    table = pa.concat_tables(tables)
    if not table.num_rows:
        raise UserError(f"{sources[0].annotations}: has no images to train on")
    return Mixture(table, np.concatenate(weights))


def training_batches(
    mixture: Mixture,
    settings: DataSettings,
    *,
    steps: range,
    batch: int,
    shares: Sequence[int],
    of: int,
    seed: int,
    workers: int = 1,
) -> Iterator[list[Sample]]:
    """One list of `batch` augmented samples for every step of `steps` and every one of `shares`, in this order.

    shares: the parts 0 … of - 1 of a step that this worker takes. Position p = (step * of + share) * batch + i of the run's
    order; its augmentation is drawn from (seed, p), so neither the number of prefetching tasks, nor a restart, nor who takes
    which share changes a pixel. workers: that share the cluster's memory for decoding.
    """
    step = np.asarray(steps, np.int64)[:, None, None] * of
    share = np.asarray(shares, np.int64)[None, :, None]
    positions = ((step + share) * batch + np.arange(batch, dtype=np.int64)).reshape(-1)
    load = _Loader(settings, seed)
    for start in range(0, len(positions), _SEGMENT // batch * batch or batch):
        part = positions[start : start + (_SEGMENT // batch * batch or batch)]
        base = int(part[0])
        order = mixture.order(base, int(part[-1]) - base + 1, seed)
        rows = mixture.rows(order[part - base]).append_column("position", pa.array(part))
        source = _through_ray_data if settings.ray_data else _through_threads
        yield from source(rows, load, batch, settings, workers)


class _Loader:
    """Decodes and augments one batch of rows. Pixels travel as bytes with their shape: Arrow has no ragged tensors."""

    def __init__(self, settings: DataSettings, seed: int) -> None:
        self.transform = TrainTransform(settings.transform)
        self.skip_bad = settings.skip_bad
        self.seed = seed

    def sample(self, row: dict[str, Any]) -> Sample:
        record = record_from_row(row)
        random = np.random.default_rng((self.seed, 2, int(row["position"])))
        try:
            image = decode_image(row["path"])
        except ImageError:
            if not self.skip_bad:
                raise
            # A batch keeps its size, so that workers keep step: an unreadable image becomes an empty grey one.
            image = np.full((64, 64, 3), 127, np.uint8)
            record = replace(record, height=64, width=64, instances=())
        return self.transform(image, record, random)

    def __call__(self, rows: pa.Table) -> pa.Table:
        samples = [self.sample(row) for row in rows.to_pylist()]
        pixels = pa.array([sample.image.tobytes() for sample in samples], pa.large_binary())
        return record_table([sample.record for sample in samples], "").append_column("pixels", pixels)


def _as_sample(row: dict[str, Any]) -> Sample:
    record = record_from_row(row)
    return Sample(np.frombuffer(row["pixels"], np.uint8).reshape(record.height, record.width, 3), record)


def _through_ray_data(rows: pa.Table, load: _Loader, batch: int, settings: DataSettings, workers: int) -> Iterator[list[Sample]]:
    import ray.data
    from ray.data import DataContext, ExecutionResources

    quiet(DataContext.get_current())
    options = DataContext.get_current().execution_options
    options.preserve_order = True
    # Every worker runs its own pipeline: each may take its share of the cluster, not all of it.
    store = ray.cluster_resources().get("object_store_memory", 1 << 30)
    options.resource_limits = ExecutionResources(cpu=settings.decode_tasks, object_store_memory=store / 4 / workers)
    rows_per_task = batch * 2
    blocks = [rows.slice(i, rows_per_task).combine_chunks() for i in range(0, len(rows), rows_per_task)]
    dataset = ray.data.from_arrow(blocks).map_batches(load, batch_size=None, batch_format="pyarrow")
    for table in dataset.iter_batches(batch_size=batch, batch_format="pyarrow", prefetch_batches=settings.prefetch):
        assert isinstance(table, pa.Table)
        yield [_as_sample(row) for row in table.to_pylist()]


def _through_threads(rows: pa.Table, load: _Loader, batch: int, settings: DataSettings, workers: int) -> Iterator[list[Sample]]:
    prefetch = settings.prefetch
    with ThreadPoolExecutor(max_workers=settings.decode_tasks) as pool:
        listed = rows.to_pylist()
        pending = [pool.submit(load.sample, row) for row in listed[: batch * (prefetch + 1)]]
        for start in range(0, len(listed), batch):
            ready = [future.result() for future in pending[:batch]]
            ahead = start + batch * (prefetch + 1)
            pending = pending[batch:] + [pool.submit(load.sample, row) for row in listed[ahead : ahead + batch]]
            yield ready

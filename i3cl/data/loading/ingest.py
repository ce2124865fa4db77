"""From data sets to training batches: the mixture, the order of the whole run, and decoding through Ray Data.

The order of a run's images depends on the seed alone, so a run that continues at step k sees exactly the images that it would
have seen, on any number of workers with the same total batch. Decoding and augmentation run as Ray Data tasks wherever the
cluster has free CPUs; a worker receives finished uint8 pixels and polygons, never bitmaps of masks.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import cv2
import numpy as np
import pyarrow as pa

from i3cl import claims, storage
from i3cl.config import DataSettings, SourceSettings
from i3cl.data.formats.checks import set_name
from i3cl.data.formats.coco import read_coco
from i3cl.data.formats.records import (
    IMAGE_SCHEMA,
    Dataset,
    ImageRecord,
    TableRecords,
    record_from_row,
    record_table,
)
from i3cl.data.loading.images import ImageError, decode_image
from i3cl.data.loading.shared_table import shared_table
from i3cl.data.loading.transforms import TrainingImage, TrainTransform
from i3cl.errors import UserError
from i3cl.runtime.cluster import quiet

_READING = 1
"""To be raised when annotations are read into other rows than before, so that copies of an earlier version are not used."""
_SEGMENT = 2048
"""Images that one worker hands to Ray Data at a time."""


def read_source(source: SourceSettings, data_root: str, skip_bad: bool = False, check_files: bool = True) -> Dataset:
    """Read one data set, with its paths under `data_root` and its override of lossweight applied.

    check_files: check that every image file exists, and list what skip_bad left out; the driver does this once, before the
    workers read the same set.
    """
    annotations, images = (storage.absolute(storage.join(data_root, p)) for p in (source.annotations, source.images))
    dataset = read_coco(annotations, images, skip_bad=skip_bad, check_files=check_files, lossweight=source.lossweight)
    if skip_bad and check_files:
        dataset.list_problems()
    return dataset


def source_names(sources: Sequence[SourceSettings]) -> list[str]:
    """One name per training set, all different: its own, or its annotation file's, with the folder where files share a name."""
    files = [source.name or set_name(source.annotations) for source in sources]
    names: list[str] = []
    for source, file in zip(sources, files, strict=True):
        name = file
        if files.count(file) > 1 and not source.name:
            folder = source.annotations.rstrip("/").rpartition("/")[0].rpartition("/")[2]
            name = f"{folder}-{file}" if folder else file
        number = 1
        while (unique := name if number == 1 else f"{name}-{number}") in names:
            number += 1
        names.append(unique)
    return names


@dataclass(frozen=True)
class Mixture:
    """Several data sets as one table, with how often an epoch visits each row or how many images of a share each set fills."""

    table: pa.Table
    """IMAGE_SCHEMA rows of all sources, one source after the other; rows of Parquet sources stay memory-mapped."""
    weights: np.ndarray
    """(rows,) float64: expected visits per epoch."""
    sizes: tuple[int, ...] = ()
    """Rows of each source; may be left out where there is one source."""
    per_step: tuple[int, ...] = ()
    """Images of each source in a worker's share of a step; empty: the sources are mixed by `weights`."""

    @property
    def epoch_images(self) -> int:
        """Images in one epoch of a mixture by weight, at least 1."""
        return max(1, round(float(self.weights.sum())))

    def steps(self, epochs: int, images_per_step: int) -> int:
        """Steps of `images_per_step` images in `epochs` passes over the mixture (with per_step: over the first source)."""
        if not self.per_step:
            return math.ceil(epochs * self.epoch_images / images_per_step)
        return math.ceil(epochs * self.sizes[0] * sum(self.per_step) / (images_per_step * self.per_step[0]))

    def rows(self, numbers: np.ndarray) -> pa.Table:
        """The rows with the numbers (N,) int64, copied out of the table."""
        return self._records.take(numbers)

    def sources(self, numbers: np.ndarray) -> np.ndarray:
        """(N,) int64: the source of each of the rows of (N,) int64 `numbers`."""
        return np.searchsorted(np.cumsum(self.sizes), numbers, "right") if self.sizes else np.zeros_like(numbers)

    @cached_property
    def _records(self) -> TableRecords:
        return TableRecords(self.table)

    def order(self, first: int, count: int, seed: int) -> np.ndarray:
        """(count,) int64 rows at positions first ... first + count - 1 of the endless run."""
        if self.per_step:
            return self._composed(first, count, seed)
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

    def _composed(self, first: int, count: int, seed: int) -> np.ndarray:
        """As `order`: share s of the run takes the places s x n ... s x n + n - 1 of a source's endless passes, n = per_step."""
        share, place = np.divmod(np.arange(first, first + count, dtype=np.int64), sum(self.per_step))
        rows = np.empty(count, np.int64)
        start_place = start_row = 0
        for source, (images, size) in enumerate(zip(self.per_step, self.sizes, strict=True)):
            mine = np.flatnonzero((place >= start_place) & (place < start_place + images))
            passes, offset = np.divmod(share[mine] * images + place[mine] - start_place, size)
            for number in np.unique(passes).tolist():
                now = passes == number
                order = np.random.default_rng((seed, 3, source, number)).permutation(size)
                rows[mine[now]] = start_row + order[offset[now]]
            start_place, start_row = start_place + images, start_row + size
        return rows


def mix(
    sources: Sequence[SourceSettings],
    data_root: str,
    skip_bad: bool = False,
    check_files: bool = True,
    batch: int | None = None,
) -> Mixture:
    """Read and mix the training sets.

    Args:
        sources: data.train.
        data_root: put before relative paths.
        skip_bad: as `read_source`.
        check_files: as `read_source`.
        batch: images of a share (train.batch), which the sources' per_step must fill; None: not checked.

    Raises:
        UserError: there is no source, none has an image, one with per_step has none, or per_step does not add up to `batch`.
    """
    if not sources:
        raise UserError("data.train: names no data set; add {annotations: …, images: …}")
    per_step = tuple(source.per_step for source in sources if source.per_step is not None)
    if per_step and batch is not None and sum(per_step) != batch:
        numbers = " + ".join(map(str, per_step))
        raise UserError(
            f"data.train: per_step adds up to {numbers} = {sum(per_step)} images but train.batch is {batch}; make them equal"
        )
    tables, weights = [], []
    for source in sources:
        # Whoever does not check the files is one of several workers that read what the driver has checked.
        read = _source_table if check_files else _shared_source_table
        tables.append(read(source, data_root, skip_bad, check_files))
        weights.append(np.full(tables[-1].num_rows, source.weight))
        if source.per_step and not tables[-1].num_rows:
            raise UserError(f"{source.annotations}: has no images, but its per_step is {source.per_step}; leave the set out")
    table = pa.concat_tables(tables)
    if not table.num_rows:
        raise UserError(f"{sources[0].annotations}: has no images to train on")
    return Mixture(table, np.concatenate(weights), tuple(table.num_rows for table in tables), per_step)


def _source_table(source: SourceSettings, data_root: str, skip_bad: bool, check_files: bool) -> pa.Table:
    dataset = read_source(source, data_root, skip_bad, check_files)
    records = dataset.records
    return records.table if isinstance(records, TableRecords) else record_table(records, dataset.images_root)


def _shared_source_table(source: SourceSettings, data_root: str, skip_bad: bool, check_files: bool) -> pa.Table:
    annotations, images = (storage.absolute(storage.join(data_root, p)) for p in (source.annotations, source.images))
    # All on which the rows depend.
    content = [annotations, claims.version(annotations), images, skip_bad, source.lossweight]
    return shared_table(
        repr([_READING, *content, IMAGE_SCHEMA.to_string()]), lambda: _source_table(source, data_root, skip_bad, check_files)
    )


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
) -> Iterator[list[TrainingImage]]:
    """One list of `batch` augmented images for every step and, within it, every share that this worker takes.

    Image i of a share is at position p = (step * of + share) * batch + i of the run's order, and its augmentation is drawn from
    (seed, p): neither the number of prefetching tasks, nor a restart, nor which worker takes a share changes a pixel.

    Args:
        mixture: what `mix` made of data.train.
        settings: how to decode and augment.
        steps: the steps to come.
        batch: images of a share.
        shares: numbers of this worker's shares, 0 … of - 1.
        of: shares of a step.
        seed: of the order and the augmentation.
        workers: processes that divide the cluster's memory for decoding among them.

    Raises:
        UserError: an image cannot be used and bad ones are not skipped.
    """
    step = np.asarray(steps, np.int64)[:, None, None] * of
    share = np.asarray(shares, np.int64)[None, :, None]
    positions = ((step + share) * batch + np.arange(batch, dtype=np.int64)).reshape(-1)
    load = _Loader(settings, seed)
    for start in range(0, len(positions), _SEGMENT // batch * batch or batch):
        part = positions[start : start + (_SEGMENT // batch * batch or batch)]
        base = int(part[0])
        order = mixture.order(base, int(part[-1]) - base + 1, seed)
        numbers = order[part - base]
        rows = mixture.rows(numbers).append_column("position", pa.array(part))
        rows = rows.append_column("data_set", pa.array(mixture.sources(numbers), pa.int32()))
        source = _through_ray_data if settings.ray_data else _through_threads
        yield from source(rows, load, batch, settings, workers)


class _Loader:
    """Decodes and augments one batch of rows. Pixels travel as bytes and a shape: Arrow has no ragged tensors."""

    def __init__(self, settings: DataSettings, seed: int) -> None:
        self.transforms = [TrainTransform(settings.transform_of(i)) for i in range(len(settings.train))]
        self.weights = [source.loss_scale for source in settings.train]
        self.skip_bad = settings.skip_bad
        self.upright = settings.upright
        self.seed = seed

    def sample(self, row: dict[str, Any]) -> TrainingImage:
        """The augmented image of a row; one that cannot be used raises ImageError or, with skip_bad, has a `problem`."""
        record = record_from_row(row)
        source = int(row["data_set"])
        random = np.random.default_rng((self.seed, 2, int(row["position"])))
        try:
            found = self.transforms[source](decode_image(row["path"], upright=self.upright), record, random)
        except ImageError as error:
            if not self.skip_bad:
                raise
            return _blank(record, source, str(error))
        return replace(found, source=source, weight=self.weights[source])

    def checked(self, row: dict[str, Any]) -> TrainingImage:
        """As `sample`, with a user's mistake as the image's `problem` whether or not bad images are skipped."""
        try:
            return self.sample(row)
        except UserError as error:
            return _blank(record_from_row(row), int(row["data_set"]), str(error))

    def __call__(self, rows: pa.Table) -> pa.Table:
        # An error that left a task would reach the user as the task's traceback, without the message.
        cv2.setNumThreads(1)
        samples = [self.checked(row) for row in rows.to_pylist()]
        table = record_table([sample.record for sample in samples], "")
        table = table.append_column("pixels", pa.array([sample.image.tobytes() for sample in samples], pa.large_binary()))
        table = table.append_column("data_set", pa.array([sample.source for sample in samples], pa.int32()))
        table = table.append_column("weight", pa.array([sample.weight for sample in samples], pa.float64()))
        return table.append_column("problem", pa.array([sample.problem for sample in samples], pa.string()))


def _blank(record: ImageRecord, source: int, problem: str) -> TrainingImage:
    """What stands in for an image that cannot be used: a batch keeps its size, so that workers keep step."""
    image = np.full((64, 64, 3), 127, np.uint8)
    return TrainingImage(image, replace(record, height=64, width=64, instances=()), source=source, weight=0.0, problem=problem)


def _received(row: dict[str, Any], skip_bad: bool) -> TrainingImage:
    """The image of a row that `_Loader` made in another process. UserError for its `problem` unless bad images are skipped."""
    problem = row["problem"]
    if problem is not None and not skip_bad:
        raise UserError(problem)
    record = record_from_row(row)
    pixels = np.frombuffer(row["pixels"], np.uint8).reshape(record.height, record.width, 3)
    return TrainingImage(pixels, record, source=row["data_set"], weight=row["weight"], problem=problem)


def _through_ray_data(
    rows: pa.Table, load: _Loader, batch: int, settings: DataSettings, workers: int
) -> Iterator[list[TrainingImage]]:
    import ray.data
    from ray.data import DataContext, ExecutionResources

    quiet(DataContext.get_current())
    options = DataContext.get_current().execution_options
    options.preserve_order = True
    # Every worker runs a pipeline of its own and may take only its part of the cluster's memory.
    store = ray.cluster_resources().get("object_store_memory", 1 << 30)
    options.resource_limits = ExecutionResources(cpu=settings.decode_tasks, object_store_memory=store / 4 / workers)
    rows_per_task = max(batch * 2, 16)
    blocks = [rows.slice(i, rows_per_task).combine_chunks() for i in range(0, len(rows), rows_per_task)]
    dataset = ray.data.from_arrow(blocks).map_batches(load, batch_size=None, batch_format="pyarrow")
    for table in dataset.iter_batches(batch_size=batch, batch_format="pyarrow", prefetch_batches=settings.prefetch):
        assert isinstance(table, pa.Table)
        yield [_received(row, settings.skip_bad) for row in table.to_pylist()]


def _through_threads(
    rows: pa.Table, load: _Loader, batch: int, settings: DataSettings, workers: int
) -> Iterator[list[TrainingImage]]:
    prefetch = settings.prefetch
    with ThreadPoolExecutor(max_workers=settings.decode_tasks) as pool:
        listed = rows.to_pylist()
        pending = [pool.submit(load.sample, row) for row in listed[: batch * (prefetch + 1)]]
        for start in range(0, len(listed), batch):
            ready = [future.result() for future in pending[:batch]]
            ahead = start + batch * (prefetch + 1)
            pending = pending[batch:] + [pool.submit(load.sample, row) for row in listed[ahead : ahead + batch]]
            yield ready

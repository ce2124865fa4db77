"""The process that labels: all members of a group on one device, fed by threads that decode ahead."""

from __future__ import annotations

import os
import time
import uuid
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from i3cl import observe, storage
from i3cl.config import ViewSettings
from i3cl.data.formats.predictions import prediction_table
from i3cl.data.loading.images import ImageError, decode_image
from i3cl.detections import Detections
from i3cl.labelling.ledger import Attempt, Failure, Ledger

DEATHS = 2
"""An image that a worker had alone in hand when it ended, this often, is not tried again."""

Decoded = NDArray[np.uint8] | str
"""(H, W, 3) RGB, or why there is none."""
Views = dict[tuple[str, str], Detections]
"""(member, view) -> what was found in one image."""


@dataclass(frozen=True)
class Plan:
    """What an actor must know besides its shards."""

    out: str
    images_root: str
    groups: tuple[dict[str, str], ...]
    """Members that are in memory together: name -> checkpoint directory."""
    views: tuple[ViewSettings, ...]
    batch: int
    prefetch: int
    """Batches decoded ahead."""
    threads: int
    """Of the network."""
    decode_threads: int
    attempts: int
    """Times a shard is begun as a whole."""
    title: str = ""
    """Of the job, in log lines."""


@dataclass(frozen=True)
class Entry:
    """One image of a shard; the sizes are the annotation file's word."""

    image_id: int
    file_name: str
    height: int
    width: int


class Shard:
    """One part in the making."""

    def __init__(self, row: dict[str, Any]) -> None:
        self.part: str = row["part"]
        self.group: int = row["group"]
        columns = (row["image_id"], row["file_name"], row["height"], row["width"])
        # Neighbours of one size share a pass of the network.
        self.entries = sorted((Entry(*values) for values in zip(*columns, strict=True)), key=lambda e: (e.height, e.width))
        self.rows: list[dict[str, Any]] = []
        self.failures: list[Failure] = []
        self.left = len(self.entries)


def view_name(view: ViewSettings) -> str:
    """'default', 's800', 's800-flip', ...: the view's name in the predictions."""
    scale = "default" if view.short_side is None else f"s{view.short_side}"
    return scale + ("-flip" if view.flip else "")


class Labeller:
    """Called by Ray Data with tables of ``Manifest.blocks``; writes the parts itself and returns counts only."""

    def __init__(self, plan: Plan) -> None:
        import cv2
        import torch

        torch.set_num_threads(plan.threads)
        cv2.setNumThreads(1)
        self.plan = plan
        self.ledger = Ledger(plan.out)
        self.name = uuid.uuid4().hex
        self.pool = ThreadPoolExecutor(plan.decode_threads, "decode")
        self.writer = ThreadPoolExecutor(1, "write")
        self.group = -1
        self.models: dict[str, Any] = {}
        self.busy = 0.0
        self._use(0)
        self.ready = time.time()

    def __call__(self, block: pa.Table) -> pa.Table:
        """Label the block's shards that are not done yet; a row a shard: part, images, errors, and the actor's clock."""
        shards = [Shard(row) for row in block.to_pylist()]
        todo = [shard for shard in shards if not self.ledger.is_finished(shard.part)]
        busy = self.busy
        for group in sorted({shard.group for shard in todo}):
            self._use(group)
            suspects: list[tuple[Shard, Attempt]] = []
            writes = []
            fresh = self._begin([shard for shard in todo if shard.group == group], suspects)
            for shard, entries, images in self._ahead(fresh):
                self._label(shard, entries, [image.result() for image in images])
                if not shard.left:
                    writes.append(self.writer.submit(self._write, shard))
            for write in writes:
                write.result()
            # Last and alone: should one of them end this process, nothing else is lost with it.
            for shard, attempt in suspects:
                self._label_carefully(shard, attempt)
                self._write(shard)
        count = len(shards)
        for shard in shards:
            if shard not in todo:
                shard.failures = list(self.ledger.part_failures(shard.part))
        labelled, errors = sum(len(shard.entries) for shard in todo), sum(len(shard.failures) for shard in todo)
        seconds = self.busy - busy
        text = f"{self.plan.title}: {labelled} images, {errors} errors, the network worked {seconds:.1f} s"
        observe.note(text, stage=self.plan.title, images=labelled, errors=errors, busy_seconds=seconds)
        return pa.table(
            {
                "part": [shard.part for shard in shards],
                "images": [len(shard.entries) for shard in shards],
                "errors": [len(shard.failures) for shard in shards],
                "actor": [self.name] * count,
                "ready": [self.ready] * count,
                "ended": [time.time()] * count,
                "busy": [(self.busy - busy) / count] * count,
            }
        )

    def _use(self, group: int) -> None:
        """Hold the members of this group, and no others."""
        from i3cl.inference.predictor import load

        if group != self.group:
            self.models = {}
            self.models = {name: load(checkpoint) for name, checkpoint in self.plan.groups[group].items()}
            self.group = group

    def _begin(self, shards: Iterable[Shard], suspects: list[tuple[Shard, Attempt]]) -> Iterator[Shard]:
        """The shards one after the other, each noted as begun just before its first image is read."""
        for shard in shards:
            attempt = self.ledger.begin(shard.part)
            if attempt.number > self.plan.attempts:
                suspects.append((shard, attempt))
            else:
                yield shard

    def _ahead(self, shards: Iterable[Shard]) -> Iterator[tuple[Shard, list[Entry], list[Future[Decoded]]]]:
        """Batches of the shards with their images, of which `prefetch` batches are being decoded meanwhile."""
        queue: deque[tuple[Shard, list[Entry], list[Future[Decoded]]]] = deque()
        for shard in shards:
            for start in range(0, len(shard.entries), self.plan.batch):
                entries = shard.entries[start : start + self.plan.batch]
                queue.append((shard, entries, [self.pool.submit(self._read, entry) for entry in entries]))
                if len(queue) > self.plan.prefetch:
                    yield queue.popleft()
        while queue:
            yield queue.popleft()

    def _read(self, entry: Entry) -> Decoded:
        try:
            return decode_image(storage.join(self.plan.images_root, entry.file_name))
        except ImageError as error:
            return str(error)
        except MemoryError:
            return f"{entry.file_name}: does not fit into memory"

    def _label(self, shard: Shard, entries: list[Entry], images: list[Decoded]) -> None:
        """Add a batch's rows to its shard."""
        readable = [image for image in images if not isinstance(image, str)]
        found = iter(self._detect(readable))
        for entry, image in zip(entries, images, strict=True):
            result = image if isinstance(image, str) else next(found)
            if isinstance(result, str):
                self._fail(shard, entry, result if isinstance(image, str) else f"{entry.file_name}: {result}")
            else:
                for (member, view), detections in result.items():
                    shard.rows.append(_row(entry, member, view, detections))
        shard.left -= len(entries)

    def _label_carefully(self, shard: Shard, attempt: Attempt) -> None:
        """Image by image, each noted before it is touched, so that the one that ends the process is known next time."""
        for entry in shard.entries:
            deaths = attempt.deaths.get(entry.image_id, 0)
            if deaths >= DEATHS:
                self._fail(shard, entry, f"{entry.file_name}: killed the worker {deaths} times when it was alone in hand")
                shard.left -= 1
                continue
            self.ledger.hold(shard.part, attempt, entry.image_id)
            self._label(shard, [entry], [self._read(entry)])

    def _detect(self, images: list[NDArray[np.uint8]]) -> list[Views | str]:
        """What every member sees in every view of each image, or why an image cannot pass the network."""
        import torch

        started = time.perf_counter()
        try:
            return list(self._detect_batch(images))
        except (RuntimeError, ValueError, MemoryError) as error:
            # An error of the device itself leaves the process unusable.
            if isinstance(error, torch.AcceleratorError) and not isinstance(error, torch.OutOfMemoryError):
                raise
            if len(images) == 1:
                return [f"the network cannot take it ({type(error).__name__}: {' '.join(str(error).split())[:200]})"]
            reason = error
        finally:
            self.busy += time.perf_counter() - started
        if isinstance(reason, torch.OutOfMemoryError):
            torch.cuda.empty_cache()
        return [result for image in images for result in self._detect([image])]

    def _detect_batch(self, images: list[NDArray[np.uint8]]) -> list[Views]:
        from i3cl.inference.predictor import detect_arrays

        results: list[Views] = [{} for _ in images]
        if not images:
            return results
        for member, model in self.models.items():
            for view in self.plan.views:
                assert model.recipe is not None
                for result, detections in zip(results, detect_arrays(model, images, model.recipe, view), strict=True):
                    result[member, view_name(view)] = detections
        return results

    def _fail(self, shard: Shard, entry: Entry, reason: str) -> None:
        shard.failures.append(Failure(entry.image_id, entry.file_name, reason))
        for member in self.models:
            for view in self.plan.views:
                shard.rows.append(_row(entry, member, view_name(view), None, reason))

    def _write(self, shard: Shard) -> None:
        assert shard.left == 0 and len(shard.rows) == len(shard.entries) * len(self.models) * len(self.plan.views)
        self.ledger.write(shard.part, prediction_table(shard.rows), shard.failures)


def _row(entry: Entry, member: str, view: str, found: Detections | None, error: str | None = None) -> dict[str, Any]:
    return {
        "image_id": entry.image_id,
        "file_name": entry.file_name,
        "height": found.height if found else 0,
        "width": found.width if found else 0,
        "member": member,
        "view": view,
        "polygons": found.polygons if found else [],
        "scores": found.scores if found else [],
        "error": error,
    }


def automatic_threads(threads: int, actors: int, on_gpu: bool, cores: int) -> int:
    """Torch threads of an actor: `threads` when it is set, else as label.threads says. cores: of one machine."""
    if threads:
        return threads
    if on_gpu:
        return 1
    # Actors of one thread each use cores better than one actor of many threads, but each holds all members in memory.
    return max(1, cores // actors) if actors else -(-cores // 8)


def machine_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1

"""The process that labels: it holds all members of a group on one device and decodes images ahead in threads."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from i3cl import observe, storage
from i3cl.config import MemberSettings, ViewSettings
from i3cl.data.formats.predictions import prediction_table
from i3cl.data.loading.images import ImageError, decode_image
from i3cl.detections import Detections
from i3cl.errors import UserError
from i3cl.inference.recipe import Given
from i3cl.labelling.ledger import Attempt, Failure, Ledger
from i3cl.members.member import OURS, Granularity, Member, Place, granularity_of, kind_of

DEATHS = 2
"""An image on which a worker has died this often while working on it alone is not tried again."""

Decoded = NDArray[np.uint8] | str
"""(H, W, 3) RGB, or the reason why there are no pixels."""
Views = dict[tuple[str, str], Detections | str]
"""(member, view) -> what was found in one image, or the reason why this member cannot take it."""
Answer = tuple[list[Decoded], list[Views]]
"""The images of a batch, and what was found in those that could be read."""


@dataclass(frozen=True)
class Plan:
    """What an actor needs to know besides its shards."""

    out: str
    images_root: str
    groups: Mapping[int, dict[str, MemberSettings]]
    """Number in the job -> members that are in memory at the same time, by name."""
    views: tuple[ViewSettings, ...]
    batch: int
    prefetch: int
    """Batches decoded ahead."""
    threads: int
    """Torch threads."""
    decode_threads: int
    attempts: int
    """Times that a shard is started as a whole."""
    title: str = ""
    """Name of the job in log lines."""
    device: str = "cpu"
    """'cuda' or 'cpu', for every network. Never chosen by what an actor can see: cluster.gpu=false leaves visible GPUs alone."""
    given: Given = field(default_factory=dict)
    """What takes the place of the checkpoints' own test size and tiles."""
    upright: bool = False
    """Turn images as their EXIF orientation says."""
    together: int = 1
    """Batches that are worked on at the same time: while the network has one, another is prepared or its outlines are traced."""


@dataclass(frozen=True)
class Entry:
    """One image of a shard; its size is what the annotation file says."""

    image_id: int
    file_name: str
    height: int
    width: int


class Shard:
    """One part that is being made."""

    def __init__(self, row: dict[str, Any]) -> None:
        self.part: str = row["part"]
        self.group: int = row["group"]
        columns = (row["image_id"], row["file_name"], row["height"], row["width"])
        # Images of similar size share a pass of the network.
        self.entries = sorted((Entry(*values) for values in zip(*columns, strict=True)), key=lambda e: (e.height, e.width))
        self.rows: list[dict[str, Any]] = []
        self.failures: list[Failure] = []
        self.left = len(self.entries)


def view_name(view: ViewSettings) -> str:
    """'default', 's800', 's800-flip', ...: the view's name in the predictions."""
    scale = "default" if view.short_side is None else f"s{view.short_side}"
    return scale + ("-flip" if view.flip else "")


def view_of(name: str) -> ViewSettings:
    """The view of that name."""
    scale, _, flip = name.partition("-")
    return ViewSettings(short_side=None if scale == "default" else int(scale[1:]), flip=bool(flip))


class Turn:
    """The right to use the device. One thread has it at a time; `seconds` counts for how long somebody had it."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._lock = threading.Lock()
        self._since = 0.0

    def __enter__(self) -> None:
        self._lock.acquire()
        self._since = time.perf_counter()

    def __exit__(self, *error: object) -> None:
        self.seconds += time.perf_counter() - self._since
        self._lock.release()


class Labeller:
    """Called with tables of ``Manifest.block``. It writes the parts itself and returns only counts."""

    def __init__(self, plan: Plan) -> None:
        import cv2
        import torch

        torch.set_num_threads(plan.threads)
        cv2.setNumThreads(1)
        self.plan = plan
        self.ledger = Ledger(plan.out)
        self.pool = ThreadPoolExecutor(plan.decode_threads, "decode")
        self.workers = ThreadPoolExecutor(plan.together, "label")
        self.writer = ThreadPoolExecutor(1, "write")
        self.turn = Turn()
        self.group = -1
        self.members: dict[str, Member] = {}
        self.granularity: dict[str, Granularity] = {}
        self._use(min(plan.groups))
        self.ready = time.time()

    def __call__(self, block: pa.Table) -> pa.Table:
        """Label those shards of the block that are not done yet.

        Returns one row for each shard: part, images, errors, and the times of this actor.
        """
        shards = [Shard(row) for row in block.to_pylist()]
        todo = [shard for shard in shards if not self.ledger.is_finished(shard.part)]
        busy = self.turn.seconds
        for group in sorted({shard.group for shard in todo}):
            self._use(group)
            suspects: list[tuple[Shard, Attempt]] = []
            writes = []
            fresh = self._begin([shard for shard in todo if shard.group == group], suspects)
            for shard, entries, answer in self._in_work(self._ahead(fresh)):
                self._add(shard, entries, *answer.result())
                if not shard.left:
                    writes.append(self.writer.submit(self._write, shard))
            for write in writes:
                write.result()
            # Last and alone: if one of them kills this process, nothing else is lost with it.
            for shard, attempt in suspects:
                self._label_carefully(shard, attempt)
                self._write(shard)
        count = len(shards)
        for shard in shards:
            if shard not in todo:
                shard.failures = list(self.ledger.part_failures(shard.part))
        labelled, errors = sum(len(shard.entries) for shard in todo), sum(len(shard.failures) for shard in todo)
        seconds = self.turn.seconds - busy
        text = f"{self.plan.title}: {labelled} images, {errors} errors, the network worked {seconds:.1f} s"
        observe.note(text, stage=self.plan.title, images=labelled, errors=errors, busy_seconds=seconds)
        return pa.table(
            {
                "part": [shard.part for shard in shards],
                "images": [len(shard.entries) for shard in shards],
                "errors": [len(shard.failures) for shard in shards],
                "ready": [self.ready] * count,
                "ended": [time.time()] * count,
                "busy": [seconds / count] * count,
            }
        )

    def _use(self, group: int) -> None:
        """Load the members of this group and drop all others."""
        if group != self.group:
            self.members = {}
            place = Place(self.plan.device, self.plan.threads, self.plan.given, self.turn)
            for name, member in self.plan.groups[group].items():
                key = f"label.members.{name}"
                try:
                    self.members[name] = kind_of(member.use, key).load(member, place)
                except UserError as error:
                    raise error if member.use == OURS else UserError(f"{key}.{error}") from None
                self.granularity[name] = granularity_of(member, key)
            self.group = group

    def _views(self, member: str) -> tuple[ViewSettings, ...]:
        """The views in which a member predicts. One that takes none sees the image as it is, under the name of the first."""
        return self.plan.views if self.members[member].takes_views else self.plan.views[:1]

    def _begin(self, shards: Iterable[Shard], suspects: list[tuple[Shard, Attempt]]) -> Iterator[Shard]:
        """Yield the shards; each is recorded as started just before its first image is read."""
        for shard in shards:
            attempt = self.ledger.begin(shard.part)
            if attempt.number > self.plan.attempts:
                suspects.append((shard, attempt))
            else:
                yield shard

    def _ahead(self, shards: Iterable[Shard]) -> Iterator[tuple[Shard, list[Entry], list[Future[Decoded]]]]:
        """Batches of the shards with their images, while the next `prefetch` batches are being decoded."""
        queue: deque[tuple[Shard, list[Entry], list[Future[Decoded]]]] = deque()
        for shard in shards:
            for start in range(0, len(shard.entries), self.plan.batch):
                entries = shard.entries[start : start + self.plan.batch]
                queue.append((shard, entries, [self.pool.submit(self._read, entry) for entry in entries]))
                if len(queue) > self.plan.prefetch:
                    yield queue.popleft()
        while queue:
            yield queue.popleft()

    def _in_work(
        self, batches: Iterable[tuple[Shard, list[Entry], list[Future[Decoded]]]]
    ) -> Iterator[tuple[Shard, list[Entry], Future[Answer]]]:
        """The batches in their order, each with what comes of it, while `together` of them are in work."""
        queue: deque[tuple[Shard, list[Entry], Future[Answer]]] = deque()
        for shard, entries, images in batches:
            queue.append((shard, entries, self.workers.submit(self._answer, images)))
            if len(queue) >= self.plan.together:
                yield queue.popleft()
        while queue:
            yield queue.popleft()

    def _answer(self, decoding: Sequence[Future[Decoded]]) -> Answer:
        images = [image.result() for image in decoding]
        return images, self._detect([image for image in images if not isinstance(image, str)])

    def _read(self, entry: Entry) -> Decoded:
        try:
            return decode_image(storage.join(self.plan.images_root, entry.file_name), upright=self.plan.upright)
        except ImageError as error:
            return str(error)
        except MemoryError:
            return f"{entry.file_name}: does not fit into memory"

    def _add(self, shard: Shard, entries: list[Entry], images: list[Decoded], views: list[Views]) -> None:
        """Add the rows of a batch to its shard.

        images: of all entries; views: of those that could be read.
        """
        found = iter(views)
        for entry, image in zip(entries, images, strict=True):
            if isinstance(image, str):
                self._fail(shard, entry, image)
                continue
            reasons = []
            for (member, view), result in next(found).items():
                if isinstance(result, str):
                    reasons.append(f"{entry.file_name}: {member}: {result}")
                    shard.rows.append(self._row(entry, member, view, None, reasons[-1]))
                else:
                    shard.rows.append(self._row(entry, member, view, result))
            if reasons:
                shard.failures.append(Failure(entry.image_id, entry.file_name, reasons[0]))
        shard.left -= len(entries)

    def _label_carefully(self, shard: Shard, attempt: Attempt) -> None:
        """Label image by image, each recorded before it is read, so that the next process knows which one killed this one."""
        for entry in shard.entries:
            deaths = attempt.deaths.get(entry.image_id, 0)
            if deaths >= DEATHS:
                self._fail(shard, entry, f"{entry.file_name}: killed the worker {deaths} times while it was labelled alone")
                shard.left -= 1
                continue
            self.ledger.hold(shard.part, attempt, entry.image_id)
            image = self._read(entry)
            self._add(shard, [entry], [image], self._detect([] if isinstance(image, str) else [image]))

    def _detect(self, images: list[NDArray[np.uint8]]) -> list[Views]:
        """What every member finds in every view of each image."""
        results: list[Views] = [{} for _ in images]
        for member in self.members if images else ():
            for view in self._views(member):
                for result, found in zip(results, self._member(member, images, view), strict=True):
                    result[member, view_name(view)] = found
        return results

    def _member(
        self, name: str, images: list[NDArray[np.uint8]], view: ViewSettings, again: bool = False
    ) -> list[Detections | str]:
        """One member's detections in each image, or the reason why it cannot take the image.

        Images that it cannot take together are tried in halves. again: this one was tried alone before, and memory ran out.
        """
        import torch

        member = self.members[name]
        # What code of others may raise is not known.
        caught = (RuntimeError, ValueError, MemoryError) if self._is_ours(name) else Exception
        try:
            with nullcontext() if member.takes_turns else self.turn:
                return list(checked(member(images, view), images))
        except caught as error:
            # After an error of the device itself this process can do nothing more.
            if isinstance(error, torch.AcceleratorError) and not isinstance(error, torch.OutOfMemoryError):
                raise
            # Text alone: the error holds the whole failed pass in memory.
            reason = f"the network cannot take it ({type(error).__name__}: {' '.join(str(error).split())[:200]})"
            full = isinstance(error, torch.OutOfMemoryError)
        if full:
            torch.cuda.empty_cache()
        if len(images) > 1:
            half = len(images) // 2
            return self._member(name, images[:half], view) + self._member(name, images[half:], view)
        # Once more with all memory free: an error row is for good, and the memory may have been full of something else.
        return self._member(name, images, view, again=True) if full and not again else [reason]

    def _is_ours(self, name: str) -> bool:
        return self.plan.groups[self.group][name].use == OURS

    def _fail(self, shard: Shard, entry: Entry, reason: str) -> None:
        shard.failures.append(Failure(entry.image_id, entry.file_name, reason))
        for member in self.members:
            for view in self._views(member):
                shard.rows.append(self._row(entry, member, view_name(view), None, reason))

    def _row(self, entry: Entry, member: str, view: str, found: Detections | None, error: str | None = None) -> dict[str, Any]:
        row: dict[str, Any] = {"image_id": entry.image_id, "file_name": entry.file_name, "member": member, "view": view}
        row |= {"error": error, "granularity": self.granularity[member], "kind": self.plan.groups[self.group][member].use}
        # Not `if found`: an image without text has been seen too, and keeps its size.
        if found is None:
            return {**row, "height": 0, "width": 0, "polygons": [], "scores": []}
        return {**row, "height": found.height, "width": found.width, "polygons": found.polygons, "scores": found.scores}

    def _write(self, shard: Shard) -> None:
        assert shard.left == 0 and len(shard.rows) == len(shard.entries) * sum(
            len(self._views(member)) for member in self.members
        )
        self.ledger.write(shard.part, prediction_table(shard.rows), shard.failures)


def checked(found: Sequence[Detections], images: Sequence[NDArray[np.uint8]]) -> Sequence[Detections]:
    """A member's answer. ValueError when it is not one `Detections` for each image, in that image's frame."""
    if len(found) != len(images):
        raise ValueError(f"{len(found)} results for {len(images)} images")
    for each, image in zip(found, images, strict=True):
        if not isinstance(each, Detections):
            raise ValueError(f"a result is {type(each).__name__}, not Detections")
        if (each.height, each.width) != image.shape[:2]:
            raise ValueError(f"detections of {each.width} x {each.height} px for an image of {image.shape[1]} x {image.shape[0]}")
    return found


def automatic_threads(threads: int, actors: int, on_gpu: bool, cores: int) -> int:
    """Torch threads of an actor: `threads` when it is set, otherwise the automatic value of label.threads.

    cores: of one machine.
    """
    if threads:
        return threads
    if on_gpu:
        return 1
    # Many actors of one thread use the cores better than one actor of many threads, but each holds all members in memory.
    return max(1, cores // actors) if actors else -(-cores // 8)

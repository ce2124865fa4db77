"""The actors of a labelling job: a pool that follows the cluster, and a queue from which they take shards.

Ray Data keeps the pool: it starts an actor on every GPU that appears, restarts those that die, and asks an autoscaler for more.
Its rows are tickets. For each, an actor takes a few shards from the queue, labels them, and returns what it did. So a fast actor
takes more shards than a slow one, and a job of ten million images is one table in the queue.

At the end, when shards are left that others still hold, an idle actor takes the oldest of them a second time once it is late: a
shard that two have labelled is one file. An actor that is silent for much longer is killed and starts again, so neither a slow
GPU nor one that hangs holds a job up.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import pyarrow as pa

from i3cl import observe
from i3cl.labelling.actor import Labeller, Plan
from i3cl.labelling.manifest import Manifest

REPORT = pa.schema(
    [
        ("part", pa.string()),
        ("images", pa.int64()),
        ("errors", pa.int64()),
        ("actor", pa.string()),
        ("created", pa.float64()),
        ("ready", pa.float64()),
        ("ended", pa.float64()),
        ("busy", pa.float64()),
    ]
)
"""What an actor returns for a ticket: a row for each shard that it was the first to finish, or one row without a part. Times are
seconds since the epoch, `busy` seconds in which its networks worked."""

LATE = 2.0
"""A shard that takes this many times as long as the median one is labelled by a second actor too, when one is idle."""
SILENT = 10.0
"""An actor that takes this many times as long as the median one is killed, after `silent_seconds` at the earliest."""
_UNKNOWN = 600.0
"""Seconds after which a shard is late while no shard is finished yet."""
_PATIENCE = 10.0
"""Seconds that an idle actor waits for a shard before it returns its ticket."""
_ASK_EVERY = 0.5
_WATCH_EVERY = 2.0
_TICKETS = 4_000
"""Tickets of one pipeline at most: Ray Data makes an object of each before it begins."""


@dataclass
class _Lease:
    actor: str
    started: float
    shards: int
    """How many the actor took together; they all come back at the same time."""


@dataclass
class ShardQueue:
    """Which shards are left, and who has which. Without Ray; `labelled` runs it as an actor."""

    manifest: Manifest
    tasks: Sequence[tuple[str, int, int]]
    """(part, group, shard), the shards to label."""
    rows: int
    """Images of a shard."""
    together: int
    """Shards that an actor takes at a time, but for the last ones."""
    silent_seconds: float = 120.0
    """Nobody is killed for silence before."""

    def __post_init__(self) -> None:
        self._todo: dict[int, deque[tuple[str, int, int]]] = {}
        for task in self.tasks:
            self._todo.setdefault(task[1], deque()).append(task)
        self._task = {task[0]: task for task in self.tasks}
        self._left = set(self._task)
        self._leases: dict[str, list[_Lease]] = {}
        self._durations: dict[int, deque[float]] = {}
        self._seen: set[str] = set()
        self._working: set[str] = set()
        self._pace: dict[str, float] = {}
        """Seconds that each actor took for its last shard."""
        self._handles: dict[str, Any] = {}
        self._spans = self.manifest.spans(self.rows)
        self._lock = threading.Lock()

    def take(self, actor: str, group: int, handle: Any = None) -> pa.Table | bool:
        """Shards for an actor, as a table of ``Manifest.blocks``.

        Args:
            actor: Its name, the same after a restart.
            group: The group of members that it holds; it gets shards of that group as long as there are any.
            handle: Its Ray handle, to end it with when it is silent.

        Returns:
            The table; False: there is nothing now, ask again; True: all shards are labelled.
        """
        with self._lock:
            self._seen.add(actor)
            if handle is not None:
                self._handles[actor] = handle
            # Whoever asks again has lost what it had: it was restarted.
            self._give_back(actor)
            self._working.discard(actor)
            if not self._left:
                return True
            chosen = self._next(actor, group) or self._late(actor)
            for part, _, _ in chosen:
                self._leases.setdefault(part, []).append(_Lease(actor, time.monotonic(), len(chosen)))
                self._working.add(actor)
        if not chosen:
            return False
        return next(self.manifest.blocks(chosen, self._spans, len(chosen)))

    def done(self, actor: str, parts: Sequence[str]) -> list[str]:
        """Take note of finished parts; returns those that nobody has finished before."""
        with self._lock:
            self._working.discard(actor)
            first = [part for part in parts if part in self._left]
            for part in parts:
                own = [lease for lease in self._leases.get(part, []) if lease.actor == actor]
                if own and part in self._left:
                    seconds = (time.monotonic() - own[0].started) / own[0].shards
                    self._durations.setdefault(self._task[part][1], deque(maxlen=200)).append(seconds)
                    self._pace[actor] = seconds
                self._left.discard(part)
                self._leases.pop(part, None)
            return first

    def silent(self) -> list[str]:
        """Actors that have had a shard for too long. Their shards go to others."""
        with self._lock:
            found = {
                lease.actor
                for part, leases in self._leases.items()
                for lease in leases
                if self._age(part, lease, SILENT, self.silent_seconds) > 0
            }
            for actor in found:
                self._give_back(actor)
            return sorted(found)

    def watch(self) -> None:
        """From now on, kill silent actors. Ray starts them again, and with them their tickets."""
        threading.Thread(target=self._watch, daemon=True).start()

    def end(self) -> None:
        """Kill the actors that still work on shards which others have finished. The others end with their tickets."""
        with self._lock:
            left = [self._handles[actor] for actor in self._working if actor in self._handles]
        for handle in left:
            _kill(handle, restart=False)

    def _watch(self) -> None:
        while True:
            time.sleep(_WATCH_EVERY)
            for actor in self.silent():
                handle = self._handles.get(actor)
                if handle is not None:
                    observe.note(f"actor {actor[:8]} was silent for too long and starts again", stage="labelling")
                    _kill(handle, restart=True)

    def _next(self, actor: str, group: int) -> list[tuple[str, int, int]]:
        tasks = self._todo.get(group)
        if not tasks:
            tasks = max(self._todo.values(), key=len, default=deque())
        if not tasks:
            return []
        # Fewer at a time towards the end, so that all actors end together.
        wanted = min(self.together, sum(map(len, self._todo.values())) // (2 * max(1, len(self._seen))))
        # And fewer for one that is slower than most.
        own, durations = self._pace.get(actor), self._durations.get(group)
        if own and durations:
            wanted = int(wanted * min(1.0, median(durations) / own))
        wanted = max(1, wanted)
        chosen: list[tuple[str, int, int]] = []
        while tasks and len(chosen) < wanted:
            task = tasks.popleft()
            # One that was given back may have been finished all the same.
            if task[0] in self._left:
                chosen.append(task)
        return chosen or self._next(actor, group)

    def _late(self, actor: str) -> list[tuple[str, int, int]]:
        """The shard that is late by most, if one is and only one actor has it."""
        late = {
            part: self._age(part, leases[0], LATE, 1.0)
            for part, leases in self._leases.items()
            if len(leases) == 1 and leases[0].actor != actor
        }
        part = max(late, key=late.__getitem__, default=None)
        return [] if part is None or late[part] <= 0 else [self._task[part]]

    def _age(self, part: str, lease: _Lease, factor: float, least: float) -> float:
        """By how many seconds a lease is older than `factor` times the median, but at least `least`; below 0: it is not yet."""
        durations = self._durations.get(self._task[part][1])
        usual = median(durations) * lease.shards if durations else _UNKNOWN / factor
        return time.monotonic() - lease.started - max(factor * usual, least)

    def _give_back(self, actor: str) -> None:
        # The last one first, so that they stand in their order again.
        for part, leases in reversed(list(self._leases.items())):
            kept = [lease for lease in leases if lease.actor != actor]
            if len(kept) == len(leases):
                continue
            if kept:
                self._leases[part] = kept
            else:
                del self._leases[part]
                self._todo.setdefault(self._task[part][1], deque()).appendleft(self._task[part])


def _kill(handle: Any, *, restart: bool) -> None:
    import ray

    ray.kill(handle, no_restart=not restart)


class PoolActor:
    """Ray Data calls it with tickets."""

    def __init__(self, plan: Plan, queue: Any, labeller: type[Labeller]) -> None:
        import ray

        self.created = time.time()
        self.labeller, self.queue = labeller(plan), queue
        context = ray.get_runtime_context()
        self.name, self.handle = context.get_actor_id() or "", context.current_actor

    def __call__(self, tickets: pa.Table) -> pa.Table:
        """Label the next shards of the queue; a table of ``REPORT``."""
        import ray

        patience = time.monotonic() + _PATIENCE
        while True:
            block = ray.get(self.queue.take.remote(self.name, self.labeller.group, self.handle))
            if isinstance(block, pa.Table):
                reports = self.labeller(block)
                first = set(ray.get(self.queue.done.remote(self.name, reports["part"].to_pylist())))
                rows = [row for row in reports.to_pylist() if row["part"] in first]
                return self._report(rows or [self._idle()])
            if block or time.monotonic() > patience:
                return self._report([self._idle()])
            time.sleep(_ASK_EVERY)

    def _idle(self) -> dict[str, Any]:
        return {"part": None, "images": 0, "errors": 0, "ready": self.labeller.ready, "ended": time.time(), "busy": 0.0}

    def _report(self, rows: Sequence[dict[str, Any]]) -> pa.Table:
        return pa.Table.from_pylist([row | {"actor": self.name, "created": self.created} for row in rows], REPORT)


@dataclass(frozen=True)
class Pool:
    """How many actors there are, and what each of them has."""

    least: int
    """Actors that the job begins with."""
    most: int
    """Up to so many join when GPUs do."""
    cpus: float
    gpus: float
    silent_seconds: float
    """As in `ShardQueue`."""


def labelled(
    plan: Plan,
    manifest: Manifest,
    tasks: Sequence[tuple[str, int, int]],
    rows: int,
    together: int,
    pool: Pool,
    labeller: type[Labeller] = Labeller,
) -> Iterator[dict[str, Any]]:
    """Run the actors until all tasks are done; yields their reports, rows of ``REPORT``, as they come.

    Args:
        plan: What the actors need to know.
        manifest: The images.
        tasks: (part, group, shard), the shards to label.
        rows: Images of a shard.
        together: Shards that an actor takes at a time, but for the last ones.
        pool: How many actors.
        labeller: What labels.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    # Beside the driver: with that machine the job ends anyway.
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    remote: Any = ray.remote(ShardQueue)
    # Calls of many actors are answered side by side, because each of them copies images out of the table.
    made = remote.options(num_cpus=0, max_concurrency=8, scheduling_strategy=here)
    queue = made.remote(ray.put(manifest), list(tasks), rows, together, pool.silent_seconds)
    ray.get(queue.watch.remote())
    left = {part for part, _, _ in tasks}
    while left:
        for report in _tickets(plan, queue, pool, min(_TICKETS, 2 * len(tasks) + 8 * pool.most), labeller):
            yield report
            left.discard(report["part"])
            if not left:
                break
    # A job that ends early leaves its actors to finish their shards. The queue goes with the last actor that asks it.
    ray.get(queue.end.remote())


def _tickets(plan: Plan, queue: Any, pool: Pool, count: int, labeller: type[Labeller]) -> Iterator[dict[str, Any]]:
    import ray.data
    from ray.data import ActorPoolStrategy, DataContext

    from i3cl.runtime.cluster import quiet

    context = DataContext.get_current()
    quiet(context)
    # Actors for all new GPUs at once, not one after the other.
    context.autoscaling_config.actor_pool_util_upscaling_threshold = 0.6
    pipeline = ray.data.from_items(list(range(count)), override_num_blocks=count).map_batches(
        PoolActor,
        fn_constructor_args=(plan, queue, labeller),
        batch_size=1,
        batch_format="pyarrow",
        # Two tickets each, so that tickets wait: that is when Ray Data starts another actor.
        compute=ActorPoolStrategy(min_size=1, initial_size=pool.least, max_size=pool.most, max_tasks_in_flight_per_actor=2),
        num_cpus=pool.cpus,
        num_gpus=pool.gpus,
    )
    for batch in pipeline.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
        yield from batch.to_pylist()  # type: ignore[union-attr]

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
from collections import Counter, deque
from collections.abc import Generator, Sequence
from contextlib import closing
from dataclasses import dataclass
from statistics import median
from typing import Any

import pyarrow as pa

from i3cl import observe
from i3cl.config import LabelSettings
from i3cl.labelling.actor import Labeller, Plan
from i3cl.labelling.layout import Layout
from i3cl.labelling.manifest import Manifest

Report = dict[str, Any]
"""What an actor says of a shard that it was the first to finish, or now and then when it had nothing to do: part (None then),
images, errors, actor (name), created, ready, ended (seconds since the epoch) and busy (seconds in which its networks worked)."""

LATE = 2.0
"""A shard that takes this many times as long as the median one is labelled by a second actor too, when one is idle."""
SILENT = 10.0
"""An actor that takes this many times as long as the median one is killed, after `silent_seconds` at the earliest."""
_PATIENCE = 10.0
"""Seconds that an idle actor waits for a shard before it returns its ticket."""
_ASK_EVERY = 0.5
_WATCH_EVERY = 2.0
_TICKETS = 4_000
"""Tickets of one pipeline at most: Ray Data makes an object of each before it begins."""


Task = tuple[str, int, int]
"""Part, number of the group of members, number of the shard."""


@dataclass
class _Lease:
    """What an actor has taken and not finished."""

    started: float
    tasks: list[Task]


@dataclass
class ShardQueue:
    """Which shards are left, and who has which. Without Ray; `labelled` runs it as an actor."""

    manifest: Manifest
    tasks: Sequence[Task]
    """The shards to label."""
    rows: int
    """Images of a shard."""
    together: int
    """Shards that an actor takes at a time, but for the last ones."""
    silent_seconds: float = 120.0
    """Nobody is killed for silence before."""

    def __post_init__(self) -> None:
        self._todo: dict[int, deque[Task]] = {}
        for task in self.tasks:
            self._todo.setdefault(task[1], deque()).append(task)
        self._left = {part for part, _, _ in self.tasks}
        self._leases: dict[str, _Lease] = {}
        """Actor -> lease; one that hangs keeps it when others have finished its shards."""
        self._durations: dict[int, deque[float]] = {}
        """Group -> seconds that its latest shards took."""
        self._pace: dict[str, float] = {}
        """Actor -> seconds that it took for its last shard."""
        self._handles: dict[str, Any] = {}
        self._news: list[Report] = []
        self._ended = False
        self._spans = self.manifest.spans(self.rows)
        self._lock = threading.Lock()

    def take(self, actor: str, group: int, handle: Any = None) -> pa.Table | bool:
        """Shards for an actor, as a table of ``Manifest.block``.

        Args:
            actor: Its name, the same after a restart.
            group: The group of members that it holds; it gets shards of that group as long as there are any.
            handle: Its Ray handle, to end it with when it is silent.

        Returns:
            The table; False: there is nothing now, ask again; True: all shards are labelled.
        """
        with self._lock:
            # Whoever asks again has lost what it had: it was restarted.
            self._give_back(actor)
            if not self._left or self._ended:
                return True
            self._handles[actor] = handle
            chosen = self._next(actor, group) or self._late(actor)
            if not chosen:
                return False
            self._leases[actor] = _Lease(time.monotonic(), chosen)
        return self.manifest.block(chosen, self._spans)

    def report(self, actor: str, reports: Sequence[Report]) -> None:
        """Take note of what an actor has finished. Reports of shards that somebody has finished before are dropped."""
        with self._lock:
            lease = self._leases.pop(actor, None)
            if lease is not None:
                seconds = (time.monotonic() - lease.started) / len(lease.tasks)
                self._durations.setdefault(lease.tasks[0][1], deque(maxlen=200)).append(seconds)
                self._pace[actor] = seconds
            first = [row for row in reports if row["part"] is None or row["part"] in self._left]
            self._left.difference_update(row["part"] for row in first)
            self._news += first

    def news(self) -> tuple[list[Report], bool]:
        """Reports since the last call, and whether all shards are finished."""
        with self._lock:
            news, self._news = self._news, []
            return news, not self._left

    def silent(self) -> list[str]:
        """Actors that have had their shards for too long. What nobody has finished goes to others."""
        with self._lock:
            found = [a for a, lease in self._leases.items() if self._over(lease, SILENT, self.silent_seconds) > 0]
            for actor in found:
                self._give_back(actor)
            return sorted(found)

    def watch(self) -> None:
        """From now on, kill silent actors. Ray starts them again, and with them their tickets."""
        threading.Thread(target=self._watch, daemon=True).start()

    def end(self) -> None:
        """Hand out nothing more and kill all actors: Ray Data ends idle ones only when nobody has a handle of them."""
        with self._lock:
            self._ended = True
            self._leases.clear()
            left, self._handles = list(self._handles.values()), {}
        for handle in left:
            _kill(handle, restart=False)

    def _watch(self) -> None:
        while True:
            time.sleep(_WATCH_EVERY)
            for actor in self.silent():
                observe.note(f"actor {actor[:8]} was silent for too long and starts again", stage="labelling")
                handle = self._handles.get(actor)
                if handle is not None:
                    _kill(handle, restart=True)

    def _next(self, actor: str, group: int) -> list[Task]:
        tasks = self._todo.get(group) or max(self._todo.values(), key=len)
        if not tasks:
            return []
        # Fewer at a time towards the end, so that all actors end together.
        wanted = min(self.together, sum(map(len, self._todo.values())) // (2 * len(self._handles)))
        # And fewer for one that is slower than most.
        usual = self._usual(group)
        if usual is not None and actor in self._pace:
            wanted = int(wanted * min(1.0, usual / max(self._pace[actor], 1e-9)))
        chosen: list[Task] = []
        while tasks and len(chosen) < max(1, wanted):
            task = tasks.popleft()
            # One that was given back may have been finished all the same.
            if task[0] in self._left:
                chosen.append(task)
        return chosen or self._next(actor, group)

    def _late(self, actor: str) -> list[Task]:
        """The shard that is late by most, if one is and only one actor has it."""
        holders = Counter(task for lease in self._leases.values() for task in lease.tasks)
        late = [
            (self._over(lease, LATE, 1.0), task)
            for lease in self._leases.values()
            for task in lease.tasks
            if holders[task] == 1 and task[0] in self._left
        ]
        by, task = max(late, default=(0.0, ("", 0, 0)))
        return [task] if by > 0 else []

    def _usual(self, group: int) -> float | None:
        """Seconds that a shard takes; None while none is finished."""
        durations = self._durations.get(group)
        return median(durations) if durations else None

    def _over(self, lease: _Lease, factor: float, least: float) -> float:
        """Seconds beyond `factor` times the usual, but at least `least` seconds; 0 or less: it is in time.

        While nothing is finished nobody is late: how long a shard takes is not known.
        """
        usual = self._usual(lease.tasks[0][1])
        if usual is None:
            return 0.0
        return time.monotonic() - lease.started - max(factor * usual * len(lease.tasks), least)

    def _give_back(self, actor: str) -> None:
        lease = self._leases.pop(actor, None)
        held = {task for each in self._leases.values() for task in each.tasks}
        # The last one first, so that they stand in their order again.
        for task in reversed(lease.tasks if lease is not None else []):
            if task[0] in self._left and task not in held:
                self._todo[task[1]].appendleft(task)


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
        """Label the next shards of the queue and report them to it; the ticket comes back."""
        import ray

        patience = time.monotonic() + _PATIENCE
        while True:
            block = ray.get(self.queue.take.remote(self.name, self.labeller.group, self.handle))
            if isinstance(block, pa.Table):
                rows = self.labeller(block).to_pylist()
            elif block or time.monotonic() > patience:
                # For its hours, which cost money in any case.
                nothing: Report = {"part": None, "images": 0, "errors": 0, "busy": 0.0}
                rows = [nothing | {"ready": self.labeller.ready, "ended": time.time()}]
            else:
                time.sleep(_ASK_EVERY)
                continue
            reports = [row | {"actor": self.name, "created": self.created} for row in rows]
            ray.get(self.queue.report.remote(self.name, reports))
            return tickets


def labelled(
    plan: Plan,
    manifest: Manifest,
    tasks: Sequence[Task],
    label: LabelSettings,
    spread: Layout,
    labeller: type[Labeller] = Labeller,
) -> Generator[Report]:
    """Run the actors until all tasks are done; yields their reports as they come.

    Close the generator when you leave it early: then the actors end, and lose the shards that they have not finished.

    Args:
        plan: What the actors need to know.
        manifest: The images.
        tasks: The shards to label.
        label: Of which rows_per_block and silent_seconds count.
        spread: How many actors, and what each of them has.
        labeller: What labels.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    # Beside the driver: with that machine the job ends anyway.
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    remote: Any = ray.remote(ShardQueue)
    # Calls of many actors are answered side by side, because each of them copies images out of the table.
    made = remote.options(num_cpus=0, max_concurrency=8, scheduling_strategy=here)
    queue = made.remote(ray.put(manifest), list(tasks), label.rows_per_block, spread.shards_per_task, label.silent_seconds)
    ray.get(queue.watch.remote())
    count, over = min(_TICKETS, 2 * len(tasks) + 8 * spread.most), False
    try:
        while not over:
            with closing(_tickets(plan, queue, spread, count, labeller)) as tickets:
                for _ in tickets:
                    # From the queue, because what a ticket brings back may be lost with its worker.
                    reports, over = ray.get(queue.news.remote())
                    yield from reports
                    if over:
                        break
    finally:
        ray.get(queue.end.remote())


def _tickets(plan: Plan, queue: Any, spread: Layout, count: int, labeller: type[Labeller]) -> Generator[Any]:
    """Something each time that tickets have come back."""
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
        compute=ActorPoolStrategy(min_size=1, initial_size=spread.actors, max_size=spread.most, max_tasks_in_flight_per_actor=2),
        num_cpus=spread.cpus_per_actor,
        num_gpus=spread.gpus_per_actor,
    )
    # Not iter_batches: when the loop ends early, its threads would still ask Ray after ray.shutdown, which ends the process.
    yield from pipeline.iter_internal_ref_bundles()

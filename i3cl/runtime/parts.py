"""Work cut into parts: in this process when there is little of it, otherwise as Ray tasks. With progress and time left."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

from i3cl import observe
from i3cl.errors import UserError
from i3cl.runtime.cluster import connect
from i3cl.runtime.pace import Pace, duration
from i3cl.runtime.resources import cluster_cores

T = TypeVar("T")

IN_PROCESS = 2
"""Up to this many parts, starting Ray would take longer than the work."""


def fan_out(
    title: str,
    task: Callable[..., T],
    calls: Sequence[tuple[Any, ...]],
    *,
    in_process: int = IN_PROCESS,
    unit: str = "part",
    progress: bool = True,
) -> Iterator[tuple[int, T]]:
    """Call ``task(*call)`` for each of `calls`, anywhere and in any order; yield (index of the call, result) as they finish.

    Args:
        title: Begins the lines of progress.
        task: A function that Ray can send to another process. It may be called again for a call whose machine was lost, so
            what it writes must appear whole or not at all.
        calls: Arguments, one tuple for each call. Small ones: they travel.
        in_process: Up to this many calls are made here, one after the other; more become Ray tasks of one CPU, as many at a
            time as the cluster has cores.
        unit: What a call is called in the lines of progress.
        progress: Whether there are any.

    Raises:
        UserError: The one that `task` raised, also in another process; nothing is tried again then.
    """
    pace = Pace(len(calls))
    for index, result in _here(task, calls) if len(calls) <= in_process else _on_ray(task, calls):
        pace.done += 1
        if progress and pace.done < pace.total:
            text = f"{title}: {unit} {pace.done} of {pace.total}, {pace.left()}"
            observe.say(text, stage=title, done=pace.done, total=pace.total)
        yield index, result


def run_parts(
    title: str, parts: Sequence[int], images: int, work: Callable[[int], list[str]], in_process: int = IN_PROCESS
) -> list[str]:
    """Call `work` for every number in `parts`, as `fan_out` does; return the problems that the calls named.

    images: in all parts together, for the speed shown at the end.
    """
    pace = Pace(images)
    problems: list[str] = []
    for _, named in fan_out(title, work, [(part,) for part in parts], in_process=in_process):
        problems += named
    if parts:
        speed = images / max(pace.seconds, 1e-9)
        observe.say(f"{title}: {images} images in {duration(pace.seconds)} ({speed:.1f}/s)", stage=title, images=images)
    return problems


def _here(task: Callable[..., T], calls: Sequence[tuple[Any, ...]]) -> Iterator[tuple[int, T]]:
    for index, call in enumerate(calls):
        yield index, task(*call)


def _on_ray(task: Callable[..., T], calls: Sequence[tuple[Any, ...]]) -> Iterator[tuple[int, T]]:
    connect()
    import ray

    remote: Any = ray.remote(num_cpus=1, max_retries=3)(_outcome)
    shared = ray.put(task)
    waiting = list(reversed(list(enumerate(calls))))
    running: dict[Any, int] = {}
    while waiting or running:
        # Asked each time: a cluster may grow.
        while waiting and len(running) < cluster_cores():
            index, call = waiting.pop()
            running[remote.remote(shared, call)] = index
        (ready,), _ = ray.wait(list(running), num_returns=1)
        mistake, result = ray.get(ready)
        if mistake is not None:
            # The few tasks that still run are not cancelled: one that ends in that moment would take this process down with it
            # (Ray 2.60). They end by themselves, or with this process.
            raise UserError(mistake)
        yield running.pop(ready), result


def _outcome(task: Callable[..., T], call: tuple[Any, ...]) -> tuple[str | None, T | None]:
    """A user's mistake travels as a value: Ray would wrap the exception in the trace of the other process."""
    try:
        return None, task(*call)
    except UserError as error:
        return str(error), None

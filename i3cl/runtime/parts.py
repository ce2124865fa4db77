"""Work cut into parts: in this process when there is little of it, else as Ray Data tasks. With progress and time left."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from functools import partial
from typing import Any

from i3cl.errors import UserError
from i3cl.runtime.cluster import connect, quiet
from i3cl.runtime.pace import duration

IN_PROCESS = 2
"""Up to this many parts, starting Ray would take longer than the work."""


def run_parts(
    title: str, parts: list[int], images: int, work: Callable[[int], list[str]], in_process: int = IN_PROCESS
) -> list[str]:
    """Call `work` for every number in `parts`, anywhere and in any order; return the problems that it named.

    images: in all parts together, for the speed shown. work: must leave its own result behind, whole or not at all, and may
    be called again for a part whose machine was lost. UserError that it raises ends the run here too.
    """
    problems: list[str] = []
    started = time.monotonic()
    if len(parts) <= in_process:
        for done, part in enumerate(parts, 1):
            problems += work(part)
            _progress(title, done, len(parts), started)
    else:
        connect()
        import ray.data

        quiet(ray.data.DataContext.get_current())
        rows = ray.data.from_items([{"part": part} for part in parts], override_num_blocks=len(parts))
        tasks = rows.map_batches(partial(_task, work), batch_size=1, num_cpus=1)
        for done, batch in enumerate(tasks.iter_batches(batch_size=1), 1):
            mistake, named = str(batch["mistake"][0]), str(batch["problems"][0])
            if mistake:
                raise UserError(mistake)
            problems += json.loads(named)
            _progress(title, done, len(parts), started)
    spent = time.monotonic() - started
    if parts:
        print(f"{title}: {images} images in {duration(spent)} ({images / max(spent, 1e-9):.1f}/s)", flush=True)
    return problems


def _task(work: Callable[[int], list[str]], batch: dict[str, Any]) -> dict[str, list[str]]:
    # The user's mistake travels as a value: Ray would wrap the exception and try again. Lists of texts travel as JSON, because
    # blocks of empty lists have no type that fits the others.
    problems: list[str] = []
    mistakes: list[str] = []
    for part in batch["part"]:
        try:
            problems.append(json.dumps(work(int(part))))
            mistakes.append("")
        except UserError as error:
            problems.append("[]")
            mistakes.append(str(error))
    return {"problems": problems, "mistake": mistakes}


def _progress(title: str, done: int, parts: int, started: float) -> None:
    left = (time.monotonic() - started) / done * (parts - done)
    if done < parts:
        print(f"{title}: part {done} of {parts}, {duration(left)} left", flush=True)

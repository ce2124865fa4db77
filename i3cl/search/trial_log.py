"""What happened to every trial: one JSON file, written whole, from which a killed sweep continues.

It is written at each change, but so seldom that it takes no more than a fiftieth of the time: with thousands of short trials a
kill may lose those of the last seconds, which run again.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from i3cl import storage
from i3cl.runtime.pace import Sparing

_SHARE = 0.02
"""Of the time, for writing the file."""
State = Literal["running", "finished", "stopped", "broken"]


@dataclass
class Trial:
    """One choice of settings and its result."""

    number: int
    """From 1, in the order of their start."""
    values: dict[str, Any]
    """Settings key -> value."""
    state: State = "running"
    """stopped: ended by ASHA or by the budget before its last validation. broken: see `reason`."""
    metrics: dict[str, float] = field(default_factory=dict)
    """Those of the last report: hmean, recall, precision, labels, ..."""
    curve: list[tuple[int, float]] = field(default_factory=list)
    """(step, hmean) of every report."""
    seconds: float = 0.0
    reason: str | None = None
    present: bool = False
    """Whether its values are those that the settings had before the search."""
    copy: int = 0
    """How many trials before it have the same values."""


class TrialLog:
    """The trials of a sweep in <run>/trials.json, and the hours that the sweep has taken over all its sessions."""

    def __init__(self, run: str) -> None:
        self.path = storage.join(run, "trials.json")
        self.trials: list[Trial] = []
        self._before = 0.0
        self._started = time.monotonic()
        self._sparing = Sparing(_SHARE)
        self.owed = False
        """Whether something has happened that is not in the file yet."""
        if storage.exists(self.path):
            content = json.loads(storage.read_text(self.path))
            self._before = content["hours"]
            self.trials = [Trial(**{**row, "curve": [tuple(point) for point in row["curve"]]}) for row in content["trials"]]

    @property
    def hours(self) -> float:
        """Wall-clock hours of this session and all before it."""
        return self._before + (time.monotonic() - self._started) / 3600

    def begin(self, values: Mapping[str, Any], present: bool, copy: int = 0) -> Trial:
        """The trial of these values: the one that a killed session left running, or a new one."""
        for trial in self.trials:
            if trial.state == "running" and trial.values == dict(values) and trial.copy == copy:
                return trial
        trial = Trial(len(self.trials) + 1, dict(values), present=present, copy=copy)
        self.trials.append(trial)
        return trial

    def write(self, *, always: bool = True) -> None:
        """Write the file; not `always`: unless that would take too much of the time, and then it is `owed`."""
        self.owed = not self._sparing(self._write, always=always)

    def _write(self) -> None:
        content = {"hours": round(self.hours, 5), "trials": [asdict(trial) for trial in self.trials]}
        storage.write_text_atomic(self.path, json.dumps(content) + "\n")

    def done(self) -> list[Trial]:
        """Trials that are not running."""
        return [trial for trial in self.trials if trial.state != "running"]

    def measured(self) -> list[Trial]:
        """Trials that reported an hmean, without the broken ones."""
        return [t for t in self.trials if t.state != "broken" and "hmean" in t.metrics]

    def best(self) -> Trial | None:
        """The finished trial with the highest hmean; the first of equal ones."""
        finished = [t for t in self.measured() if t.state == "finished"]
        return max(finished, key=lambda t: (t.metrics["hmean"], -t.number), default=None)

    def front(self) -> set[int]:
        """Numbers of the finished trials on the Pareto front of hmean and labels."""
        points = [(t.metrics["hmean"], t.metrics.get("labels", 0.0), t.number) for t in self.measured() if t.state == "finished"]
        return {
            number
            for f, labels, number in points
            if not any((a >= f and b >= labels) and (a > f or b > labels) for a, b, _ in points)
        }

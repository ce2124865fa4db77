"""How fast a labelling job is and what it costs, over all its runs."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from i3cl import storage
from i3cl.runtime.pace import duration

COST, ESTIMATE = "cost.json", "estimate.json"
"""Files beside the predictions."""
_GONE = 120.0
"""Seconds without a report after which an actor counts as gone."""


@dataclass
class _Actor:
    created: float
    ready: float
    last: float
    busy: float = 0.0


@dataclass
class Meter:
    """Counts one run of a job, and forecasts its end. Times are seconds since the epoch."""

    total: int
    """Images x groups of the whole job."""
    done: int
    """How many of them were done before this run."""
    errors: int
    """How many of them have no predictions."""
    gpus_per_actor: float
    price_per_hour: float
    started: float = field(default_factory=time.time)
    worked: int = 0
    """Images of this run."""
    _seen: dict[str, _Actor] = field(default_factory=dict)

    def add(self, report: dict[str, Any]) -> None:
        """Add an actor's report, as `i3cl.labelling.pool.Report` has it."""
        self.worked += report["images"]
        self.errors += report["errors"]
        actor = self._seen.setdefault(report["actor"], _Actor(report["created"], report["ready"], report["ended"]))
        actor.last = max(actor.last, report["ended"])
        actor.busy += report["busy"]

    @property
    def startup(self) -> float:
        """Seconds until the first actor was ready."""
        return max(0.0, min((a.ready for a in self._seen.values()), default=time.time()) - self.started)

    @property
    def rate(self) -> float:
        """Images per second from the moment the first actor was ready until the last report; 0 before the first report."""
        if not self._seen:
            return 0.0
        first = min(a.ready for a in self._seen.values())
        last = max(a.last for a in self._seen.values())
        return self.worked / max(last - first, 1e-9)

    @property
    def busy_share(self) -> float:
        """Share of the actors' time since they were ready in which a network worked."""
        spent = sum(a.last - a.ready for a in self._seen.values())
        return min(1.0, sum(a.busy for a in self._seen.values()) / spent) if spent > 0 else 0.0

    @property
    def actors(self) -> int:
        """Actors that have reported something lately."""
        last = max((a.last for a in self._seen.values()), default=0.0)
        return sum(a.last > last - _GONE for a in self._seen.values())

    @property
    def hours(self) -> float:
        """Hours that the actors have existed, all together, until their last reports."""
        return sum(max(0.0, a.last - a.created) for a in self._seen.values()) / 3600

    def line(self) -> str:
        """Progress, time left, and money when there is a price."""
        done = self.done + self.worked
        text = f"{done}/{self.total} images"
        if self.rate:
            left = (self.total - done) / self.rate
            text += f"  {self.rate:.1f}/s  {duration(left)} left"
            if self.price_per_hour:
                to_come = self._money(left * self.actors / 3600)
                text += f"  money {self._money(self.hours):.2f} spent, {to_come:.2f} to come"
        return text + (f"  {self.errors} errors" if self.errors else "")

    def numbers(self) -> dict[str, float]:
        """The state of the job: total, done, remaining and errors in images; images_per_second, busy_share (0-1), actors."""
        done = self.done + self.worked
        counts = {"total": self.total, "done": done, "remaining": self.total - done, "errors": self.errors}
        return {**counts, "images_per_second": self.rate, "busy_share": self.busy_share, "actors": self.actors}

    def entry(self) -> dict[str, Any]:
        """This run as an entry of cost.json."""
        seconds = time.time() - self.started
        hours = self.hours
        return {
            "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(self.started)),
            "images": self.worked,
            "seconds": round(seconds, 1),
            "startup_seconds": round(self.startup, 1),
            "images_per_second": round(self.rate, 3),
            "busy_share": round(self.busy_share, 4),
            "actor_hours": round(hours, 6),
            "gpu_hours": round(hours * self.gpus_per_actor, 6),
            "money": round(self._money(hours), 6),
        }

    def _money(self, hours: float) -> float:
        return hours * (self.gpus_per_actor or 1.0) * self.price_per_hour


class CostFile:
    """cost.json: one entry for each run, and their sum. A run that is killed leaves the last entry that it wrote."""

    def __init__(self, path: str) -> None:
        self.path = path
        there = storage.read_text_if_there(path)
        self.runs: list[dict[str, Any]] = [] if there is None else json.loads(there)["runs"]

    def total(self, meter: Meter) -> dict[str, Any]:
        """The earlier runs and this one, as `summary` has them."""
        return summary([*self.runs, meter.entry()])

    def write(self, meter: Meter) -> dict[str, Any]:
        """Write the earlier runs and this one; returns the content."""
        content = self.total(meter)
        storage.write_text_atomic(self.path, json.dumps(content, indent=1) + "\n")
        return content


def summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """The runs and their sum. The speed leaves out start-up and runs that labelled nothing."""
    keys = ("images", "seconds", "startup_seconds", "actor_hours", "gpu_hours", "money")
    total = {key: round(sum(run[key] for run in runs), 6) for key in keys}
    working = sum(run["images"] / run["images_per_second"] for run in runs if run["images_per_second"])
    images = total["images"]
    total["images_per_second"] = round(images / working, 3) if working else 0.0
    total["busy_share"] = round(sum(r["busy_share"] * r["actor_hours"] for r in runs) / (total["actor_hours"] or 1.0), 4)
    total["money_per_1000_images"] = round(1000 * total["money"] / images, 6) if images else 0.0
    return {**total, "runs": runs}


def line(cost: dict[str, Any], priced: bool) -> str:
    """One line for people."""
    text = f"{cost['images_per_second']:.1f} images/s after {duration(cost['startup_seconds'])} of start-up"
    text += f", actors busy {cost['busy_share']:.0%}, "
    text += f"{cost['gpu_hours']:.3f} GPU-hours" if cost["gpu_hours"] else f"{cost['actor_hours']:.3f} actor-hours"
    if priced:
        text += f", money {cost['money']:.2f}, {cost['money_per_1000_images']:.3f} per 1,000 images"
    return text


def compared(estimate: Mapping[str, Any], cost: Mapping[str, Any]) -> str:
    """One line: what was forecast, and what the job has taken. estimate, cost: what the two files hold."""
    unit, name = ("gpu_hours", "GPU-hours") if cost["gpu_hours"] else ("actor_hours", "actor-hours")
    return (
        f"estimated: {duration(estimate['seconds'])}, {estimate[unit]:.3f} {name}; "
        f"taken: {duration(cost['seconds'])}, {cost[unit]:.3f} {name}"
    )

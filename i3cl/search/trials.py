"""The Ray Tune side of a trial, and what the driver does as trials report."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ray import tune

from i3cl import observe
from i3cl.config import Settings, with_overrides
from i3cl.runtime.pace import duration
from i3cl.search.ledger import Ledger, Trial
from i3cl.search.space import COPY, SHARE


@dataclass(frozen=True)
class Job:
    """What every trial needs to know."""

    settings: Settings
    """With absolute paths."""
    run: str
    search_part: str
    """COCO json of the images on which trials are measured."""


def values_of(config: dict[str, Any]) -> dict[str, Any]:
    """The settings of a trial's config, without the sampler's own parameters."""
    return {key: value for key, value in config.items() if not key.endswith((SHARE, COPY))}


class SelectTrial(tune.Trainable):
    """Reads the stored predictions once and answers for one setting after the other; the actor is used again."""

    def setup(self, config: dict[str, Any], job: Job) -> None:  # type: ignore[override]  # by tune.with_parameters
        from i3cl.data.formats.coco import read_coco
        from i3cl.search.objectives import StoredLabels

        validation = job.settings.data.validation
        assert validation is not None and job.settings.search.predictions is not None
        truth = read_coco(job.search_part, validation.images, check_files=False)
        self.job = job
        self.labels = StoredLabels.read(job.settings.search.predictions, truth.records, job.settings.evaluate)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        self.config = new_config
        return True

    def step(self) -> dict[str, Any]:
        settings = with_overrides(self.job.settings, values_of(self.config), "search.space")
        metrics, _ = self.labels.measure(settings.label)
        return {**metrics, "done": True}

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """A trial of seconds has no state worth keeping."""

    def load_checkpoint(self, checkpoint: Any) -> None:
        """As save_checkpoint."""


def student_trial(config: dict[str, Any], job: Job) -> None:
    """One student, a Ray Train run of its own, whose validations are this trial's reports."""
    from ray.tune.integration.ray_train import TuneReportCallback

    from i3cl.search.objectives import train_student
    from i3cl.search.sweep import student_folder

    values = values_of(config)
    train_student(
        values, for_student(job.settings, job.search_part), student_folder(job.run, values, config[COPY]), [TuneReportCallback()]
    )


def for_student(settings: Settings, search_part: str) -> Settings:
    """`settings` with the search part as validation, all of it at every checkpoint."""
    assert settings.data.validation is not None
    source = {**settings.data.validation.model_dump(), "annotations": search_part}
    return with_overrides(settings, {"data.validation": source, "train.validate_images": 0}, "search")


class GpuHours(tune.Stopper):
    """Ends the sweep when its trials have used `limit` GPU-hours (None: never), `spent` of them in sessions before."""

    def __init__(self, limit: float | None, gpus: float, spent: float) -> None:
        self.limit, self.gpus, self.spent = limit, gpus, spent
        self.seconds: dict[str, float] = {}

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        self.seconds[trial_id] = result["time_total_s"]
        return False

    def stop_all(self) -> bool:
        used = self.spent + sum(self.seconds.values()) * self.gpus / 3600
        return self.limit is not None and used >= self.limit


class Watch(tune.Callback):
    """Keeps the ledger and the page up to date and prints a line a trial. Lives in the driver."""

    def __init__(
        self,
        settings: Settings,
        wanted: int,
        present: dict[str, Any],
        ledger: Ledger,
        page: Callable[[], None],
        every: float,
    ) -> None:
        self.wanted = wanted
        self.settings, self.present, self.ledger, self.page, self.every = settings, present, ledger, page, every
        self.trials: dict[str, Trial] = {}
        self.unexplained: list[tuple[Trial, Any]] = []
        self._shown = 0.0
        self._started = time.monotonic()
        self._before = len(ledger.done())

    def __getstate__(self) -> dict[str, Any]:
        # Tune saves its callbacks with its own state, which this sweep never reads.
        return {}

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._of(trial)

    def on_trial_result(self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any) -> None:
        row = self._of(trial)
        row.metrics = {k: float(v) for k, v in result.items() if k in _KEPT}
        row.seconds = round(float(result["time_total_s"]), 2)
        row.curve.append((int(result.get("step", result["training_iteration"])), float(result["hmean"])))

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        row = self._of(trial)
        whole = self.settings.search.objective == "select" or (row.curve and row.curve[-1][0] >= self.settings.train.steps)
        row.state = "finished" if row.metrics and whole else "stopped"
        self._over(row)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        row = self._of(trial)
        row.state = "broken"
        self.ledger.write()
        self.unexplained.append((row, trial))

    def _explain(self) -> None:
        """Give broken trials their reason: Tune writes it down after it has told the callbacks."""
        for row, trial in list(self.unexplained):
            if trial.error_file and os.path.isfile(trial.error_file):
                with open(trial.error_file, encoding="utf-8") as file:
                    row.reason = _reason(file.read())
                self.unexplained.remove((row, trial))
                self._over(row)

    def on_step_end(self, iteration: int, trials: list[Any], **info: Any) -> None:
        self._explain()
        if time.monotonic() - self._shown > self.every:
            self._shown = time.monotonic()
            self.page()

    def close(self) -> None:
        """The last state, after the last trial. What the budget cut off is stopped."""
        self._explain()
        for row in self.ledger.trials:
            if row.state == "running" and row in self.trials.values():
                row.state = "stopped"
        self.ledger.write()

    def _of(self, trial: Any) -> Trial:
        if trial.trial_id not in self.trials:
            found = values_of(trial.config)
            # Tune hands them back in an order of its own.
            values = {key: found[key] for key in self.present}
            self.trials[trial.trial_id] = self.ledger.begin(values, values == self.present, trial.config[COPY])
            self.ledger.write()
            self._count()
        return self.trials[trial.trial_id]

    def _count(self) -> None:
        best = self.ledger.best()
        states = [trial.state for trial in self.ledger.trials]
        observe.search(states, best.metrics["hmean"] if best else None)

    def _over(self, row: Trial) -> None:
        self.ledger.write()
        self._count()
        done = len(self.ledger.done())
        pace = (time.monotonic() - self._started) / max(1, done - self._before)
        left = max(0, self.wanted - done)
        best = self.ledger.best()
        result = f"F {row.metrics['hmean']:.4f}" if row.metrics else row.reason
        values = " ".join(f"{_last(k)}={v:.3g}" if isinstance(v, float) else f"{_last(k)}={v}" for k, v in row.values.items())
        shown = f"best F {best.metrics['hmean']:.4f} (trial {best.number})" if best else "none finished"
        numbers: dict[str, Any] = {"trial": row.number, "state": row.state, "done": done, "total": self.wanted, **row.metrics}
        observe.say(
            f"{self.settings.name}: trial {row.number} {row.state}: {result}  {values}  "
            f"[{done}/{self.wanted}, {shown}, {duration(pace * left)} left]",
            stage="search",
            **numbers,
        )


_KEPT = ("hmean", "recall", "precision", "threshold", "labels", "ignored", "mean_weight", "hmean_large", "loss")


def _last(key: str) -> str:
    return key.rsplit(".", 1)[-1]


def _reason(text: str) -> str:
    """The last line of a traceback that says something."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    last = lines[-1] if lines else "no reason given"
    # A user's mistake speaks for itself; of other errors the kind matters too.
    return last.removeprefix("i3cl.errors.SettingsError: ").removeprefix("i3cl.errors.UserError: ")[:400]

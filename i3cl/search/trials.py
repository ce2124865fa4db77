"""The trials as Ray Tune runs them, and what the driver does when they report."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ray import tune

from i3cl import observe
from i3cl.config import Settings, with_overrides
from i3cl.labelling.fused import FusedStore
from i3cl.runtime.pace import Pace, Sparing
from i3cl.search.space import COPY, SHARE
from i3cl.search.trial_log import Trial, TrialLog


@dataclass(frozen=True)
class Job:
    """What every trial needs to know."""

    settings: Settings
    """With absolute paths."""
    run: str
    search_part: str
    """COCO json of the images on which trials are measured."""
    store: FusedStore | None
    """Of search.unlabelled, when students are searched."""


def values_of(config: dict[str, Any]) -> dict[str, Any]:
    """The settings of a trial's config, without the sampler's own parameters."""
    return {key: value for key, value in config.items() if not key.endswith((SHARE, COPY))}


class SelectTrial(tune.Trainable):
    """Reads the stored predictions once and scores one choice of settings after the other: Tune uses the actor again."""

    def setup(self, config: dict[str, Any], job: Job) -> None:  # type: ignore[override]  # by tune.with_parameters
        """Read the truth and the stored predictions."""
        from i3cl.data.formats.coco import read_coco
        from i3cl.search.objectives import StoredLabels

        validation = job.settings.data.validation
        assert validation is not None and job.settings.search.predictions is not None
        truth = read_coco(job.search_part, validation.images, check_files=False)
        self.job = job
        self.labels = StoredLabels.read(job.settings.search.predictions, truth.records, job.settings.evaluate)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Take the settings of the next trial."""
        self.config = new_config
        return True

    def step(self) -> dict[str, Any]:
        """Score the pseudo labels of the present settings: the whole trial."""
        settings = with_overrides(self.job.settings, values_of(self.config), "search.space")
        metrics, _ = self.labels.score(settings.label)
        return {**metrics, "done": True}

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """A trial of seconds has no state worth keeping."""

    def load_checkpoint(self, checkpoint: Any) -> None:
        """As save_checkpoint."""


def student_trial(config: dict[str, Any], job: Job) -> None:
    """One student: a Ray Train run of its own, whose validations are this trial's reports."""
    from ray.tune.integration.ray_train import TuneReportCallback

    from i3cl.search.objectives import student_folder, train_student

    assert job.store is not None
    values = values_of(config)
    folder = student_folder(job.run, values, config[COPY])
    train_student(values, for_student(job.settings, job.search_part), folder, [TuneReportCallback()], job.store)


def for_student(settings: Settings, search_part: str) -> Settings:
    """`settings` with the search part as validation, all of it at every checkpoint."""
    assert settings.data.validation is not None
    source = {**settings.data.validation.model_dump(), "annotations": search_part}
    return with_overrides(settings, {"data.validation": source, "train.validate_images": 0}, "search")


class GpuHours(tune.Stopper):
    """Ends the sweep when its trials have used `limit` GPU-hours (None: never), `spent` of them in earlier sessions."""

    def __init__(self, limit: float | None, gpus: float, spent: float) -> None:
        self.limit, self.gpus, self.spent = limit, gpus, spent
        self.seconds: dict[str, float] = {}

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        """Note how long a trial has run; no single trial is stopped."""
        self.seconds[trial_id] = result["time_total_s"]
        return False

    def stop_all(self) -> bool:
        """Whether the GPU-hours are used up."""
        used = self.spent + sum(self.seconds.values()) * self.gpus / 3600
        return self.limit is not None and used >= self.limit


class Watch(tune.Callback):
    """Keeps the trial log and the page up to date and prints a line for each trial. Lives in the driver."""

    def __init__(
        self,
        settings: Settings,
        wanted: int,
        present: dict[str, Any],
        log: TrialLog,
        page: Callable[[], None],
        every: float,
    ) -> None:
        self.wanted = wanted
        self.settings, self.present, self.log, self.page = settings, present, log, page
        self.trials: dict[str, Trial] = {}
        self.unexplained: list[tuple[Trial, Any]] = []
        self._page_due = Sparing(_PAGE_SHARE, every)
        self._pace = Pace(wanted, done=len(log.done()))

    def __getstate__(self) -> dict[str, Any]:
        # Tune saves its callbacks with its own state, which this sweep never reads.
        return {}

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Enter the trial into the log."""
        self._of(trial)

    def on_trial_result(self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any) -> None:
        """Keep the numbers that a trial reports."""
        row = self._of(trial)
        row.metrics = {k: float(v) for k, v in result.items() if k in _KEPT}
        row.seconds = round(float(result["time_total_s"]), 2)
        row.curve.append((int(result.get("step", result["training_iteration"])), float(result["hmean"])))

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Note how a trial ended."""
        row = self._of(trial)
        whole = self.settings.search.objective == "select" or (row.curve and row.curve[-1][0] >= self.settings.train.steps)
        row.state = "finished" if row.metrics and whole else "stopped"
        self._over(row)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Note that a trial failed; its reason follows."""
        row = self._of(trial)
        row.state = "broken"
        self.log.write(always=False)
        self.unexplained.append((row, trial))

    def _explain(self) -> None:
        """Give broken trials their reason, which Tune writes to a file after it has called the callbacks."""
        for row, trial in list(self.unexplained):
            if trial.error_file and os.path.isfile(trial.error_file):
                with open(trial.error_file, encoding="utf-8") as file:
                    row.reason = _reason(file.read())
                self.unexplained.remove((row, trial))
                self._over(row)

    def on_step_end(self, iteration: int, trials: list[Any], **info: Any) -> None:
        """Look for reasons of failed trials, and write the log and the page now and then."""
        self._explain()
        if self.log.owed:
            self.log.write(always=False)
        self._page_due(self.page)

    def close(self) -> None:
        """Write the last state, after the last trial. Trials that the budget interrupted count as stopped."""
        self._explain()
        for row in self.log.trials:
            if row.state == "running" and row in self.trials.values():
                row.state = "stopped"
        self.log.write()

    def _of(self, trial: Any) -> Trial:
        if trial.trial_id not in self.trials:
            found = values_of(trial.config)
            # Tune returns them in another order.
            values = {key: found[key] for key in self.present}
            self.trials[trial.trial_id] = self.log.begin(values, values == self.present, trial.config[COPY])
            self.log.write(always=False)
            self._count()
        return self.trials[trial.trial_id]

    def _count(self) -> None:
        best = self.log.best()
        states = [trial.state for trial in self.log.trials]
        observe.search(states, best.metrics["hmean"] if best else None)

    def _over(self, row: Trial) -> None:
        self.log.write(always=False)
        self._count()
        self._pace.done = done = len(self.log.done())
        best = self.log.best()
        result = f"F {row.metrics['hmean']:.4f}" if row.metrics else row.reason
        values = " ".join(f"{_last(k)}={v:.3g}" if isinstance(v, float) else f"{_last(k)}={v}" for k, v in row.values.items())
        shown = f"best F {best.metrics['hmean']:.4f} (trial {best.number})" if best else "none finished"
        numbers: dict[str, Any] = {"trial": row.number, "state": row.state, "done": done, "total": self.wanted, **row.metrics}
        observe.say(
            f"{self.settings.name}: trial {row.number} {row.state}: {result}  {values}  "
            f"[{done}/{self.wanted}, {shown}, {self._pace.left()}]",
            stage="search",
            **numbers,
        )


_PAGE_SHARE = 0.05
"""Of the time, for drawing the page."""
_KEPT = ("hmean", "recall", "precision", "threshold", "labels", "ignored", "mean_weight", "hmean_large", "loss")


def _last(key: str) -> str:
    return key.rsplit(".", 1)[-1]


def _reason(text: str) -> str:
    """The last line of a traceback that says something."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    last = lines[-1] if lines else "no reason given"
    # A user's mistake needs no name of a class; of other errors the class says something too.
    return re.sub(r"^i3cl\.errors\.\w+: ", "", last)[:400]

"""A sweep: Ray Tune runs the trials, Optuna proposes them, the ledger remembers them, a page shows them."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import yaml

from i3cl import observe, storage
from i3cl.config import Settings, load_settings, with_overrides
from i3cl.data.formats.coco import write_coco
from i3cl.data.formats.records import Dataset, ImageRecord
from i3cl.data.loading.ingest import read_source
from i3cl.data.tools.splits import split_of
from i3cl.errors import UserError
from i3cl.evaluation.metrics.metric import Counts
from i3cl.runtime.cluster import connect
from i3cl.search.ledger import Ledger, Trial
from i3cl.search.objectives import (
    StoredLabels,
    measure_student,
    scores,
    student_metrics,
    train_student,
    verdict,
)
from i3cl.search.space import SHARE, Space, Suggest, named
from i3cl.training.launch import claim, located, use_gpu

_IDENTITY = ("model", "data", "train", "label", "evaluate", "selftrain", "search")
_PAGE_EVERY = 10.0
"""Seconds between two writings of the page while trials run."""


@dataclass(frozen=True)
class Outcome:
    """What a sweep found."""

    run: str
    """Its directory: trials.json, dashboard.html, best.yaml, summary.json, tune/ (Ray Tune's own logs)."""
    summary: dict[str, Any]
    """As in summary.json."""


def search(settings: Settings, config: str | None = None) -> Outcome:
    """Run or continue the sweep of `settings.search` in <storage>/<name>/.

    config: the YAML file that `settings` came from; best.yaml extends it. UserError for an unusable space, missing predictions,
    a directory that holds another sweep, and when no trial finished.
    """
    settings = _located(settings)
    space = Space.of(settings)
    parts = _Parts.of(settings)
    run = storage.join(settings.storage, settings.name)
    claim(run, settings, _IDENTITY)
    # A student's validation, on which trials are compared, is the search part only.
    search_part = storage.join(run, "search_part.json")
    write_coco(search_part, parts.search.records)
    ledger = Ledger(run)
    left = _left(settings, space, ledger)
    if left > 0:
        connect()
        _tune(settings, space, ledger, run, search_part, left)
    best = ledger.best()
    if best is None:
        reason = next((t.reason for t in ledger.trials if t.reason), "the budget ended before the first")
        raise UserError(f"{run}: no trial finished ({reason})")
    summary = _judge(settings, space, ledger, best, parts, run, search_part, config)
    storage.write_text_atomic(storage.join(run, "summary.json"), json.dumps(summary, indent=1) + "\n")
    write_page(run, settings, ledger, summary)
    return Outcome(run, summary)


def write_page(run: str, settings: Settings, ledger: Ledger, summary: Mapping[str, Any] | None = None) -> None:
    """<run>/dashboard.html of the trials so far; with a summary the sweep is over and the page stops reloading itself."""
    from i3cl.report.search import render_search

    space = Space(settings.search.space)
    front = ledger.front() if settings.search.label_count else set()
    rows = [asdict(trial) | {"front": trial.number in front} for trial in ledger.trials]
    page = render_search(
        settings.name, settings.search.objective, rows, _wanted(settings, space), importance(ledger, space), summary
    )
    storage.write_text_atomic(storage.join(run, "dashboard.html"), page)


def importance(ledger: Ledger, space: Space) -> dict[str, float]:
    """Settings key -> its share of what sets the best quarter of the trials apart, 0-1, by PED-ANOVA (arXiv 2304.10255).

    Empty before eight trials have finished.
    """
    import optuna

    measured = ledger.measured()
    if len(measured) < 8:
        return {}
    study = optuna.create_study(direction="maximize")
    for trial in measured:
        study.add_trial(
            optuna.trial.create_trial(
                params=space.parameters(trial.values), distributions=space.distributions(), value=trial.metrics["hmean"]
            )
        )
    evaluator = optuna.importance.PedAnovaImportanceEvaluator(target_quantile=0.25)
    shares = optuna.importance.get_param_importances(study, evaluator=evaluator)
    return {name.removesuffix(SHARE): float(share) for name, share in shares.items()}


# ------------------------------------------------------------------------------------------------------------ preparation


def _located(settings: Settings) -> Settings:
    """With absolute paths: a trial's working directory is not the driver's."""
    places: dict[str, Any] = {}
    for key in ("predictions", "unlabelled"):
        given = getattr(settings.search, key)
        places[f"search.{key}"] = storage.absolute(given) if given else None
    return with_overrides(located(settings), places, "search")


@dataclass(frozen=True)
class _Parts:
    search: Dataset
    held_out: Dataset

    @classmethod
    def of(cls, settings: Settings) -> _Parts:
        given = settings.search
        if settings.data.validation is None:
            raise UserError("data.validation: names no labelled images; trials are measured on a part of them")
        if given.objective == "select" and given.predictions is None:
            raise UserError("search.predictions: names no folder; make one with jobs/label.py predict on the labelled images")
        if given.objective == "student" and (given.unlabelled is None or settings.label.source is None):
            raise UserError("search.unlabelled, label.source: a student needs the stored predictions and the images they are of")
        truth = read_source(settings.data.validation, settings.data_root, settings.data.skip_bad)
        shares = {"apart": given.holdout, "rest": 1 - given.holdout}
        parts: dict[str, list[ImageRecord]] = {"apart": [], "rest": []}
        for record in truth.records:
            parts[split_of(record.file_name, shares, given.seed)].append(record)
        apart, rest = parts["apart"], parts["rest"]
        if not apart or not rest:
            raise UserError(f"{truth.name}: {len(truth)} images are too few for two parts; change search.holdout")
        return cls(Dataset(truth.name, truth.images_root, rest), Dataset(truth.name, truth.images_root, apart))


def _wanted(settings: Settings, space: Space) -> int:
    """Trials of the whole sweep: search.trials, or fewer where the grid ends before."""
    if settings.search.sampler != "grid":
        return settings.search.trials
    # The present settings come first and are no point of the grid.
    return min(settings.search.trials, 1 + math.prod(len(values) for values in space.grid().values()))


def _left(settings: Settings, space: Space, ledger: Ledger) -> int:
    """Trials still to do, within the hours."""
    hours = settings.search.max_hours
    if hours is not None and ledger.hours >= hours:
        return 0
    return _wanted(settings, space) - len(ledger.done())


def _study(settings: Settings, space: Space, ledger: Ledger) -> tuple[Any, Any]:
    """Optuna's sampler and a storage with a study that knows every trial of the sessions before."""
    import optuna

    given = settings.search
    if given.sampler == "tpe":
        # Constant liar: trials that run side by side shall not try the same place.
        sampler: Any = optuna.samplers.TPESampler(seed=given.seed, constant_liar=True)
    elif given.sampler == "random":
        sampler = optuna.samplers.RandomSampler(seed=given.seed)
    else:
        sampler = optuna.samplers.GridSampler(space.grid(), seed=given.seed)
    kept = optuna.storages.InMemoryStorage()
    directions: list[Any] = ["maximize", "maximize"] if given.label_count else ["maximize"]
    study = optuna.create_study(storage=kept, sampler=sampler, study_name="sweep", directions=directions)
    for trial in ledger.done():
        values = [trial.metrics[name] for name in _metrics(settings)] if trial.metrics else None
        study.add_trial(
            optuna.trial.create_trial(
                state=optuna.trial.TrialState.COMPLETE if values else optuna.trial.TrialState.FAIL,
                params=space.parameters(trial.values),
                distributions=space.distributions(),
                values=values,
            )
        )
    return sampler, kept


def _metrics(settings: Settings) -> list[str]:
    return ["hmean", "labels"] if settings.search.label_count else ["hmean"]


def _first_points(settings: Settings, space: Space, ledger: Ledger) -> list[dict[str, Any]]:
    """What is tried before the sampler proposes: trials cut off by a kill; at first the present settings, then start_from's."""
    points = [trial.values for trial in ledger.trials if trial.state == "running"]
    if not ledger.trials:
        points = [space.present(settings)]
        if settings.search.start_from:
            points.append(space.present(load_settings(settings.search.start_from)))
    return [space.parameters(values) for values in points]


# ------------------------------------------------------------------------------------------------------------------ trials


def _tune(settings: Settings, space: Space, ledger: Ledger, run: str, search_part: str, left: int) -> None:
    import optuna
    import ray
    from ray import tune
    from ray.tune.schedulers import ASHAScheduler, FIFOScheduler
    from ray.tune.search.optuna import OptunaSearch

    from i3cl.search import trials

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    given = settings.search
    job = trials.Job(settings, run, search_part)
    gpus = 0.0
    scheduler: Any = FIFOScheduler()
    if given.objective == "select":
        trainable: Any = tune.with_resources(tune.with_parameters(trials.SelectTrial, job=job), {"CPU": 1})
        together = given.parallel or max(1, _cores())
    else:
        trainable = tune.with_resources(tune.with_parameters(trials.student_trial, job=job), {"CPU": 0.1})
        gpus = float(settings.cluster.workers) if use_gpu(settings) else 0.0
        room = ray.cluster_resources()["GPU"] if gpus else _cores()
        together = given.parallel or max(1, int(room // settings.cluster.workers))
        validations = -(-settings.train.steps // settings.train.checkpoint_every)
        if not given.label_count and validations > given.grace:
            scheduler = ASHAScheduler(
                time_attr="training_iteration",
                metric="hmean",
                mode="max",
                max_t=validations,
                grace_period=given.grace,
                reduction_factor=given.reduction,
            )
    sampler, kept = _study(settings, space, ledger)
    names = _metrics(settings)
    algorithm = OptunaSearch(
        space=Suggest(space, [trial.values for trial in ledger.done()]),
        metric=names if len(names) > 1 else names[0],
        mode=["max"] * len(names) if len(names) > 1 else "max",
        points_to_evaluate=_first_points(settings, space, ledger),
        sampler=sampler,
        study_name="sweep",
        storage=kept,
    )
    watch = trials.Watch(
        settings,
        _wanted(settings, space),
        space.present(settings),
        ledger,
        lambda: write_page(run, settings, ledger),
        _PAGE_EVERY,
    )
    hours_left = None if given.max_hours is None else max(0.0, given.max_hours - ledger.hours)
    spent = sum(trial.seconds for trial in ledger.done()) * gpus / 3600
    observe.say(
        f"{settings.name}: {left} trials, {together} at a time; live page: {storage.join(run, 'dashboard.html')}; "
        f"tensorboard --logdir {storage.join(run, 'tune')}",
        trials=left,
        parallel=together,
    )
    tune.Tuner(
        trainable,
        tune_config=tune.TuneConfig(
            num_samples=left,
            max_concurrent_trials=together,
            search_alg=algorithm,
            scheduler=scheduler,
            time_budget_s=None if hours_left is None else hours_left * 3600,
            reuse_actors=given.objective == "select",
        ),
        run_config=tune.RunConfig(
            # A name for every session: what was done before is in the ledger, not in Tune's state.
            name=time.strftime("%Y%m%d-%H%M%S"),
            **storage.for_ray(storage.join(run, "tune")),
            callbacks=[watch],
            stop=trials.GpuHours(given.max_gpu_hours, gpus, spent),
            verbose=0,
        ),
    ).fit()
    watch.close()


def _cores() -> int:
    """CPUs for trials: a local Ray counts more than the machine has."""
    import ray

    nodes = [node for node in ray.nodes() if node["Alive"]]
    here = os.cpu_count() or 1
    return here if len(nodes) == 1 else int(ray.cluster_resources().get("CPU", 1))


def student_folder(run: str, values: Mapping[str, Any], copy: int) -> str:
    """Where the student of these values trains: named by them, so that a trial begun before a kill goes on."""
    return storage.join(run, "students", named(values, copy))


# ----------------------------------------------------------------------------------------------------------------- verdict


def _judge(
    settings: Settings,
    space: Space,
    ledger: Ledger,
    best: Trial,
    parts: _Parts,
    run: str,
    search_part: str,
    config: str | None,
) -> dict[str, Any]:
    """The winner and the present settings on the images that no trial saw."""
    present = space.present(settings)
    if settings.search.objective == "select":
        assert settings.search.predictions is not None
        labels = StoredLabels.read(settings.search.predictions, parts.held_out.records, settings.evaluate)
        (found, found_counts), (default, default_counts) = (
            labels.measure(with_overrides(settings, dict(values), "search.space").label) for values in (best.values, present)
        )
    else:
        found_counts, default_counts = _students(settings, parts, run, search_part, best, present)
        found, default = scores(found_counts), scores(default_counts)
    job = "label.py select" if settings.search.objective == "select" else "selftrain.py"
    path = storage.join(run, "best.yaml")
    _write_best(path, settings, best.values, config)
    return {
        "trials": {state: sum(t.state == state for t in ledger.trials) for state in ("finished", "stopped", "broken")},
        "best": {"trial": best.number, "values": best.values, "search_part": best.metrics, "held_out": found},
        "default": {"values": present, "held_out": default},
        "images": {"search": len(parts.search), "held_out": len(parts.held_out)},
        "bootstrap": verdict(found_counts, default_counts, settings.search.seed),
        "hours": round(ledger.hours, 3),
        "front": sorted(ledger.front()) if settings.search.label_count else [],
        "next": _next(job, path, settings.name),
    }


def _next(job: str, path: str, name: str) -> str:
    """The command that goes on with the winner. Recipes are read from disk only."""
    fetch = f"fetch {path}, then " if storage.is_remote(path) else ""
    return f"{fetch}python jobs/{job} --config {path.rsplit('/', 1)[-1] if fetch else path} name={name}-best"


def _students(
    settings: Settings, parts: _Parts, run: str, search_part: str, best: Trial, present: Mapping[str, Any]
) -> tuple[Counts, Counts]:
    """Counts of the winner's student and of the present settings', trained to the end, on the held-out images.

    Each one's score threshold is the best on the search part, as its last validation there found it.
    """
    from i3cl.labelling.predict import predict
    from i3cl.search import trials

    connect()
    thresholds, checkpoints = {}, {}
    for name, values, copy in (("best", best.values, best.copy), ("default", present, 0)):
        folder = student_folder(run, values, copy)
        if not storage.is_complete(storage.join(folder, "student", "best")):
            observe.say(f"{settings.name}: training the student of the {name} settings to its end")
            train_student(values, trials.for_student(settings, search_part), folder, ())
        thresholds[name] = student_metrics(folder)["threshold"]
        checkpoints[name] = storage.join(folder, "student", "best")
    predictions = predict(parts.held_out, checkpoints, settings, storage.join(run, "held_out"), "held-out images")
    first, second = (
        measure_student(name, predictions, parts.held_out.records, settings, thresholds[name]) for name in ("best", "default")
    )
    return first, second


def _write_best(path: str, settings: Settings, values: Mapping[str, Any], config: str | None) -> None:
    """The winner's values as a recipe that extends the sweep's own, or, where that is no neighbour on disk, as a whole recipe."""
    tree: dict[str, Any] = {}
    for key, value in values.items():
        branch = tree
        *above, last = key.split(".")
        for part in above:
            branch = branch.setdefault(part, {})
        branch[last] = list(value) if isinstance(value, tuple) else value
    if config is not None and not storage.is_remote(path):
        tree = {"extends": os.path.relpath(config, os.path.dirname(path)), **tree}
    else:
        whole = with_overrides(settings, dict(values), "search.space").model_dump(mode="json")
        tree = {key: value for key, value in whole.items() if key != "search"}
    storage.write_text_atomic(path, yaml.safe_dump(tree, sort_keys=False, allow_unicode=True))

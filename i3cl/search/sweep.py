"""A sweep: Optuna proposes trials, Ray Tune runs them, the trial log remembers them."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import yaml

from i3cl import observe, storage
from i3cl.claims import claim_run
from i3cl.config import Settings, load_settings, with_overrides
from i3cl.data.formats.coco import write_coco
from i3cl.data.formats.records import Dataset, ImageRecord
from i3cl.data.loading.ingest import read_source
from i3cl.data.tools.splits import split_of
from i3cl.errors import UserError
from i3cl.evaluation.metrics.metric import Counts
from i3cl.inference.recipe import AS_TRAINED
from i3cl.labelling.fused import FusedStore
from i3cl.labelling.scoring import score_checkpoints
from i3cl.runtime.cluster import connect
from i3cl.runtime.resources import cluster_cores, cluster_gpus, use_gpu
from i3cl.search.objectives import (
    StoredLabels,
    scores,
    student_counts,
    student_folder,
    student_metrics,
    train_student,
    verdict,
)
from i3cl.search.space import SHARE, Space, Suggest
from i3cl.search.trial_log import Trial, TrialLog
from i3cl.training.launch import located

_IDENTITY = ("model", "data", "train", "label", "evaluate", "selftrain", "search")
_PAGE_EVERY = 10.0
"""Seconds between two versions of the page while trials run."""
Page = Callable[[str, Settings, "TrialLog", Mapping[str, Any] | None], None]
"""Writes the page of a sweep: (run directory, settings, trials so far, the verdict or None while trials run)."""


@dataclass(frozen=True)
class Outcome:
    """What a sweep found."""

    run: str
    """Its directory: trials.json, dashboard.html, best.yaml, summary.json, tune/ (Ray Tune's own logs)."""
    summary: dict[str, Any]
    """As in summary.json."""


def search(settings: Settings, config: str | None = None, page: Page | None = None) -> Outcome:
    """Run or continue the sweep of `settings.search` in <storage>/<name>/.

    Args:
        settings: The whole recipe.
        config: The YAML file that `settings` came from; best.yaml extends it.
        page: Writes the page of the sweep, again and again while trials run.

    Raises:
        UserError: The space cannot be used, predictions are missing, the directory holds another sweep, or no trial finished.
    """
    page = page or (lambda run, settings, log, summary: None)
    settings = _located(settings)
    space = Space.of(settings)
    parts = _Parts.of(settings)
    run = storage.join(settings.storage, settings.name)
    claim_run(run, settings, _IDENTITY)
    # A student's validation, on which trials are compared, is the search part only.
    search_part = storage.join(run, "search_part.json")
    write_coco(search_part, parts.search.records)
    log = TrialLog(run)
    left = _left(settings, space, log)
    if left > 0:
        connect()
        _tune(settings, space, log, run, search_part, left, page)
    best = log.best()
    if best is None:
        reason = next((t.reason for t in log.trials if t.reason), "the budget ended before the first")
        raise UserError(f"{run}: no trial finished ({reason})")
    summary = _judge(settings, space, log, best, parts, run, search_part, config)
    storage.write_text_atomic(storage.join(run, "summary.json"), json.dumps(summary, indent=1) + "\n")
    page(run, settings, log, summary)
    return Outcome(run, summary)


def importance(log: TrialLog, space: Space) -> dict[str, float]:
    """How much each settings key matters: its share, 0-1, in what separates the best quarter of the trials from the others.

    By PED-ANOVA (arXiv 2304.10255). Empty before eight trials have finished.
    """
    import optuna

    measured = log.measured()
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
    """The settings with absolute paths, because a trial's working directory is not the driver's."""
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
            raise UserError(
                "search.unlabelled, label.source: a student needs stored predictions and the images that they belong to"
            )
        truth = read_source(settings.data.validation, settings.data_root, settings.data.skip_bad)
        shares = {"apart": given.holdout, "rest": 1 - given.holdout}
        parts: dict[str, list[ImageRecord]] = {"apart": [], "rest": []}
        for record in truth.records:
            parts[split_of(record.file_name, shares, given.seed)].append(record)
        apart, rest = parts["apart"], parts["rest"]
        if not apart or not rest:
            raise UserError(f"{truth.name}: {len(truth)} images are too few for two parts; change search.holdout")
        return cls(Dataset(truth.name, truth.images_root, rest), Dataset(truth.name, truth.images_root, apart))


def wanted_trials(settings: Settings, space: Space) -> int:
    """Trials of the whole sweep: search.trials, or fewer when the grid has fewer points."""
    if settings.search.sampler != "grid":
        return settings.search.trials
    # The present settings come first and are not a point of the grid.
    return min(settings.search.trials, 1 + math.prod(len(values) for values in space.grid().values()))


def _left(settings: Settings, space: Space, log: TrialLog) -> int:
    """Trials still to run; 0 when search.max_hours are used up."""
    hours = settings.search.max_hours
    if hours is not None and log.hours >= hours:
        return 0
    return wanted_trials(settings, space) - len(log.done())


def _study(settings: Settings, space: Space, log: TrialLog) -> tuple[Any, Any]:
    """Optuna's sampler, and a storage with a study that knows every trial of earlier sessions."""
    import optuna

    given = settings.search
    if given.sampler == "tpe":
        # Constant liar: trials that run at the same time should not try the same place.
        sampler: Any = optuna.samplers.TPESampler(seed=given.seed, constant_liar=True)
    elif given.sampler == "random":
        sampler = optuna.samplers.RandomSampler(seed=given.seed)
    else:
        sampler = optuna.samplers.GridSampler(space.grid(), seed=given.seed)
    kept = optuna.storages.InMemoryStorage()
    directions: list[Any] = ["maximize", "maximize"] if given.label_count else ["maximize"]
    study = optuna.create_study(storage=kept, sampler=sampler, study_name="sweep", directions=directions)
    for trial in log.done():
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


def _first_points(settings: Settings, space: Space, log: TrialLog) -> list[dict[str, Any]]:
    """What is tried before the sampler proposes anything.

    Trials that a kill interrupted; in a new sweep the present settings, then those of search.start_from.
    """
    points = [trial.values for trial in log.trials if trial.state == "running"]
    if not log.trials:
        points = [space.present(settings)]
        if settings.search.start_from:
            points.append(space.present(load_settings(settings.search.start_from)))
    return [space.parameters(values) for values in points]


# ------------------------------------------------------------------------------------------------------------------ trials


def _tune(settings: Settings, space: Space, log: TrialLog, run: str, search_part: str, left: int, page: Page) -> None:
    import optuna
    from ray import tune
    from ray.tune.schedulers import ASHAScheduler, FIFOScheduler
    from ray.tune.search.optuna import OptunaSearch

    from i3cl.search import trials

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    given = settings.search
    job = trials.Job(settings, run, search_part, _store(settings, run) if given.objective == "student" else None)
    gpus = 0.0
    scheduler: Any = FIFOScheduler()
    if given.objective == "select":
        trainable: Any = tune.with_resources(tune.with_parameters(trials.SelectTrial, job=job), {"CPU": 1})
        together = given.parallel or cluster_cores()
    else:
        trainable = tune.with_resources(tune.with_parameters(trials.student_trial, job=job), {"CPU": 0.1})
        gpus = float(settings.cluster.workers) if use_gpu(settings.cluster.gpu) else 0.0
        room = cluster_gpus() if gpus else cluster_cores()
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
    sampler, kept = _study(settings, space, log)
    names = _metrics(settings)
    algorithm = OptunaSearch(
        space=Suggest(space, [trial.values for trial in log.done()]),
        metric=names if len(names) > 1 else names[0],
        mode=["max"] * len(names) if len(names) > 1 else "max",
        points_to_evaluate=_first_points(settings, space, log),
        sampler=sampler,
        study_name="sweep",
        storage=kept,
    )
    watch = trials.Watch(
        settings,
        wanted_trials(settings, space),
        space.present(settings),
        log,
        lambda: page(run, settings, log, None),
        _PAGE_EVERY,
    )
    hours_left = None if given.max_hours is None else max(0.0, given.max_hours - log.hours)
    spent = sum(trial.seconds for trial in log.done()) * gpus / 3600
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
            # Each session has a name of its own: earlier results are in the trial log, not in Tune's state.
            name=time.strftime("%Y%m%d-%H%M%S"),
            **storage.for_ray(storage.join(run, "tune")),
            callbacks=[watch],
            stop=trials.GpuHours(given.max_gpu_hours, gpus, spent),
            verbose=0,
        ),
    ).fit()
    watch.close()


# ----------------------------------------------------------------------------------------------------------------- verdict


def _judge(
    settings: Settings,
    space: Space,
    log: TrialLog,
    best: Trial,
    parts: _Parts,
    run: str,
    search_part: str,
    config: str | None,
) -> dict[str, Any]:
    """Compare the winner with the present settings on the images that no trial saw."""
    present = space.present(settings)
    if settings.search.objective == "select":
        assert settings.search.predictions is not None
        labels = StoredLabels.read(settings.search.predictions, parts.held_out.records, settings.evaluate)
        (found, found_counts), (default, default_counts) = (
            labels.score(with_overrides(settings, dict(values), "search.space").label) for values in (best.values, present)
        )
    else:
        found_counts, default_counts = _students(settings, parts, run, search_part, best, present)
        found, default = scores(found_counts), scores(default_counts)
    job = "label.py select" if settings.search.objective == "select" else "selftrain.py"
    path = storage.join(run, "best.yaml")
    _write_best(path, settings, best.values, config)
    return {
        "trials": {state: sum(t.state == state for t in log.trials) for state in ("finished", "stopped", "broken")},
        "best": {"trial": best.number, "values": best.values, "search_part": best.metrics, "held_out": found},
        "default": {"values": present, "held_out": default},
        "images": {"search": len(parts.search), "held_out": len(parts.held_out)},
        "bootstrap": verdict(found_counts, default_counts, settings.search.seed),
        "hours": round(log.hours, 3),
        "front": sorted(log.front()) if settings.search.label_count else [],
        "next": _next(job, path, settings.name),
    }


def _next(job: str, path: str, name: str) -> str:
    """The command that uses the winner. Recipes are read only from disk."""
    fetch = f"fetch {path}, then " if storage.is_remote(path) else ""
    return f"{fetch}python jobs/{job} --config {path.rsplit('/', 1)[-1] if fetch else path} name={name}-best"


def _students(
    settings: Settings, parts: _Parts, run: str, search_part: str, best: Trial, present: Mapping[str, Any]
) -> tuple[Counts, Counts]:
    """Counts on the held-out images of two students trained to their end: the winner's and that of the present settings.

    Each is counted at the score threshold that its last validation found best on the search part.
    """
    from i3cl.search import trials

    connect()
    thresholds, checkpoints = {}, {}
    store: FusedStore | None = None
    for name, values, copy in (("best", best.values, best.copy), ("default", present, 0)):
        folder = student_folder(run, values, copy)
        if not storage.is_complete(storage.join(folder, "student", "best")):
            observe.say(f"{settings.name}: training the student of the {name} settings to its end")
            store = store or _store(settings, run)
            train_student(values, trials.for_student(settings, search_part), folder, (), store)
        thresholds[name] = student_metrics(folder)["threshold"]
        checkpoints[name] = storage.join(folder, "student", "best")
    out = storage.join(run, "held_out")
    predictions = score_checkpoints(parts.held_out, checkpoints, settings, out, "held-out images", AS_TRAINED).predictions
    first, second = (
        student_counts(name, predictions, parts.held_out.records, settings, thresholds[name]) for name in ("best", "default")
    )
    return first, second


def _store(settings: Settings, run: str) -> FusedStore:
    """Where the students of a sweep find what the first of them has fused."""
    assert settings.search.unlabelled is not None
    return FusedStore.of(settings.search.unlabelled, storage.join(run, "fused"))


def _write_best(path: str, settings: Settings, values: Mapping[str, Any], config: str | None) -> None:
    """Write the winner's values as a recipe.

    It extends the sweep's own recipe; on S3, where that cannot be reached, it is a whole recipe.
    """
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

"""One training run on Ray Train: start or continue it, show its progress, keep its best checkpoint."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from i3cl import observe, storage
from i3cl.claims import claim_run, inputs_of
from i3cl.config import Settings, with_overrides
from i3cl.data.loading.ingest import mix, read_source
from i3cl.errors import UserError, inside
from i3cl.model.shipped import folder_of, is_shipped, names
from i3cl.runtime.cluster import connect
from i3cl.runtime.pace import Pace
from i3cl.runtime.resources import cluster_gpus, machine_cores, use_gpu

_RAY_TRAIN = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "1",
    # Ray counts a lost machine as alive for up to 20 s; an attempt to start workers on it must time out soon.
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "30",
    # Some clouds announce the end of a spot machine 30 s before.
    "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "2",
}
"""Environment variables for the process that runs Ray Train's controller; what the user has set stays."""
IDENTITY = ("model", "data", "train", "evaluate")
"""Sections of the settings in which two trainings must agree to be the same run."""
MADE_FROM = "made_from.json"
"""File of a finished checkpoint: settings key -> file and sha256 of the annotation files and weights that it was made from."""
INITIAL = ("none", "timm", "package")
"""Values of model.backbone.weights that do not name a file."""


@dataclass(frozen=True)
class TrainResult:
    """Where a finished training is, and how good it is."""

    run: str
    """Run directory."""
    checkpoint: str
    """Directory of the best checkpoint by F (the latest one without a validation set)."""
    metrics: dict[str, Any]
    """Of that checkpoint: step, hmean, recall, precision, threshold, losses."""


def train(settings: Settings) -> TrainResult:
    """Train `settings` in <storage>/<name>/, or continue it, or return at once when it is done.

    Raises:
        UserError: the directory holds a run with other settings, or training cannot go on: a loss became NaN (with step,
            part and images), an image cannot be used, or memory ran out.
    """
    return train_all([settings])[0]


def train_all(runs: list[Settings]) -> list[TrainResult]:
    """Train several runs, at the same time where the cluster has room (cluster.parallel_runs); results in the order given.

    Otherwise as `train`.
    """
    runs = [located(settings) for settings in runs]
    todo = [settings for settings in runs if not _done(settings)]
    for settings in todo:
        _check_data(settings)
    for settings in runs:
        claim_run(_run(settings), settings, IDENTITY, None if _begun(settings) else _weights(settings))
    if todo:
        connect()
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        together = _together(todo)
        # On the driver's machine, which is the head of a cluster: a machine with GPUs may be taken away.
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        remote = ray.remote(num_cpus=0, max_retries=0)(fit).options(scheduling_strategy=here)
        for start in range(0, len(todo), together):
            group = todo[start : start + together]
            with ExitStack() as progress:
                for settings in group:
                    progress.enter_context(Progress(settings.name, storage.join(_run(settings), "metrics.jsonl")))
                stopped = ray.get([remote.remote(_with_threads(settings, len(group))) for settings in group])
            for settings, message in zip(group, stopped, strict=True):
                if message:
                    raise UserError(f"{_run(settings)}: training stopped: {message}")
    return [_result(settings) for settings in runs]


def located(settings: Settings) -> Settings:
    """The settings with absolute paths, and with a run's name in train.start_from replaced by that run's best checkpoint.

    A worker's working directory is not the driver's, so relative paths would mean something else there.
    """
    root = storage.absolute(settings.storage)
    start, weights = settings.train.start_from, settings.model.backbone.weights
    changes: dict[str, Any] = {"storage": root, "data_root": storage.absolute(settings.data_root)}
    if start and not is_shipped(start):
        changes["train.start_from"] = storage.join(root, start, "best") if _is_run(start) else storage.absolute(start)
    if weights not in INITIAL:
        changes["model.backbone.weights"] = storage.absolute(weights)
    return with_overrides(settings, changes, settings.name)


def _is_run(start: str) -> bool:
    """Whether train.start_from names a run, not a path (which has a slash) or a weights file in the working folder."""
    return "/" not in start and not start.endswith((".pth", ".pt", ".safetensors"))


def _run(settings: Settings) -> str:
    return storage.join(settings.storage, settings.name)


def _done(settings: Settings) -> bool:
    return storage.is_complete(storage.join(_run(settings), "best"))


def _begun(settings: Settings) -> bool:
    """Whether a run has a checkpoint to continue from, so that the weights it started from are not read again."""
    return _done(settings) or _last_step(_run(settings)) > 0


def _weights(settings: Settings) -> dict[str, tuple[str, str]]:
    """Settings key -> name and place of the weights files that a located run starts from."""
    start, backbone = settings.train.start_from, settings.model.backbone.weights
    found = {"train.start_from": (start, folder_of(start))} if start else {}
    return found if backbone in INITIAL else found | {"model.backbone.weights": (backbone, backbone)}


def _result(settings: Settings) -> TrainResult:
    best = storage.join(_run(settings), "best")
    return TrainResult(_run(settings), best, json.loads(storage.read_text(storage.join(best, "metrics.json"))))


def _check_data(settings: Settings) -> None:
    """Read the annotations once in the driver, so that a fault in them is reported before any worker starts."""
    from i3cl.model.backbone import check_backbone  # torch and timm take seconds to import, and a finished run needs neither

    mix(settings.data.train, settings.data_root, settings.data.skip_bad, batch=settings.train.batch)
    if settings.data.validation is not None:
        read_source(settings.data.validation, settings.data_root, settings.data.skip_bad)
    check_backbone(settings.model.backbone)
    weights = settings.model.backbone.weights
    if weights not in INITIAL and not storage.exists(weights):
        raise UserError(f"model.backbone.weights: {weights} does not exist; put the file there or set another path, timm or none")
    _check_start(settings)


def _check_start(settings: Settings) -> None:
    """UserError when the checkpoint that a located run starts from does not exist, with the command that makes it."""
    start = settings.train.start_from
    if not start or is_shipped(start) or (storage.is_file(start) or storage.is_complete(start)):
        return
    run, last = os.path.split(start)
    folder, name = os.path.split(run)
    if last != "best" or folder != settings.storage:
        raise UserError(
            f"train.start_from: {start} does not exist; give a run's name, a checkpoint directory, a weights file or a detector "
            f"of the package ({', '.join(names())})"
        )
    state = "has not finished" if storage.exists(run) else "has not begun"
    recipe = Path("configs", *name.split("-", 1)).as_posix() + ".yaml"
    if not os.path.isfile(recipe):
        recipe = "RECIPE.yaml"
    command = f"python jobs/train.py --config {recipe} name={name} storage={settings.storage}"
    raise UserError(f"train.start_from: the run {name} {state} ({start} is not there); first train it: {command}")


def _together(runs: list[Settings]) -> int:
    """How many of the runs train at the same time."""
    cluster = runs[0].cluster
    if cluster.parallel_runs:
        return cluster.parallel_runs
    room = cluster_gpus() if use_gpu(cluster.gpu) else machine_cores()
    return int(min(len(runs), max(1, room // cluster.workers)))


def _with_threads(settings: Settings, together: int) -> Settings:
    """Runs that share a machine's cores must not each take all of them."""
    if settings.cluster.threads or use_gpu(settings.cluster.gpu):
        return settings
    threads = max(1, machine_cores() // (settings.cluster.workers * together))
    return settings.model_copy(update={"cluster": settings.cluster.model_copy(update={"threads": threads})})


def fit(settings: Settings, callbacks: Sequence[Any] = ()) -> str | None:
    """Run or continue one training to its end and copy its best checkpoint to <run>/best.

    For a process that has joined Ray; everybody else calls `train`.

    Args:
        settings: as `located` returns them.
        callbacks: for Ray Train.

    Returns:
        None, or a line for the user when training cannot go on.
    """
    import ray.train

    from i3cl.training.loop import STOPPED

    run = _run(settings)
    note = storage.join(run, STOPPED)
    storage.remove_tree(note)
    while True:
        step = _last_step(run)
        try:
            result = _trainer(settings, callbacks).fit()
            break
        except ray.train.WorkerGroupError as error:
            if mistake := inside(error, UserError):
                storage.remove_tree(note)
                return str(mistake)
            # Ray counts the failures over a whole run; on machines that vanish, a long run has many. Only failures without
            # progress in between count here.
            if _last_step(run) <= step:
                raise
    stopped = (result.return_value or {}).get("stopped")
    if stopped:
        storage.remove_tree(note)
        return stopped
    ranked = result.best_checkpoints or []
    if settings.data.validation and ranked:
        checkpoint, metrics = max(ranked, key=lambda pair: (pair[1].get("hmean", -1.0), pair[1].get("step", 0)))
    else:
        checkpoint, metrics = result.checkpoint, result.metrics or {}
    keep_best(run, checkpoint, metrics)
    return None


def keep_best(run: str, checkpoint: Any, metrics: Mapping[str, Any]) -> None:
    """Make a checkpoint of Ray Train the result of a run, <run>/best, with its metrics and what it was made from."""
    with storage.atomic_directory(storage.join(run, "best")) as folder:
        checkpoint.to_directory(str(folder))
        (folder / "metrics.json").write_text(json.dumps(metrics, indent=1))
        (folder / MADE_FROM).write_text(json.dumps(inputs_of(run) or {}, indent=1) + "\n")


def _last_step(run: str) -> int:
    """Step of the latest checkpoint of a run; 0 if there is none."""
    names = storage.list_dir(storage.join(run, "ray"))
    return max((int(name.removeprefix("step_")) for name in names if name.startswith("step_")), default=0)


def _trainer(settings: Settings, callbacks: Sequence[Any]) -> Any:
    """Ray Train's trainer for a run."""
    import ray.train
    from ray.train.torch import TorchTrainer

    from i3cl.training.loop import train_worker

    cluster = settings.cluster
    workers: int | tuple[int, int] = cluster.workers
    if cluster.min_workers is not None and cluster.min_workers < cluster.workers:
        workers = (cluster.min_workers, cluster.workers)
    for key, value in _RAY_TRAIN.items():
        os.environ.setdefault(key, value)
    run = _run(settings)
    on_gpu = use_gpu(cluster.gpu)
    return TorchTrainer(
        train_worker,  # type: ignore[arg-type]  # its return value is read below
        train_loop_config={"settings": settings.model_dump(mode="json"), "run": run},
        scaling_config=ray.train.ScalingConfig(
            num_workers=workers,  # type: ignore[arg-type]  # a pair is documented
            use_gpu=on_gpu,
            resources_per_worker={"CPU": cluster.cpus_per_worker} | ({"GPU": 1} if on_gpu else {}),
        ),
        run_config=ray.train.RunConfig(
            name="ray",
            **storage.for_ray(run),
            callbacks=list(callbacks),
            failure_config=ray.train.FailureConfig(max_failures=cluster.max_failures),
            checkpoint_config=ray.train.CheckpointConfig(
                num_to_keep=settings.train.keep,
                checkpoint_score_attribute="hmean" if settings.data.validation else None,
                checkpoint_score_order="max",
            ),
        ),
    )


class Progress:
    """A thread that prints new rows of a run's metrics file, with the time left."""

    def __init__(self, name: str, path: str, every: float = 2.0) -> None:
        self.name, self.path = name, path
        # On S3 every look is a request, and the file changes at most twice a minute (MetricsLog.flush).
        self.every = 5 * every if storage.is_remote(path) else every
        self._version: str | None = None
        self.where = observe.place(os.path.dirname(path), "train")
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._follow, daemon=True)
        self._seen = 0
        self._pace: Pace | None = None

    def __enter__(self) -> Progress:
        observe.say(f"{self.name}: starting training workers", **self.where)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self._show()

    def _follow(self) -> None:
        while not self._stop.wait(self.every):
            self._show()

    def _show(self) -> None:
        version = storage.version(self.path)
        if version is None or version == self._version:
            return
        self._version = version
        rows = [json.loads(line) for line in storage.read_text(self.path).splitlines()]
        fresh = [row for row in rows if row["step"] > self._seen or (row["step"] == 0 and self._seen == 0)]
        for row in fresh:
            for note in row.get("notes", ()):
                observe.say(f"{self.name}: {note}", **self.where)
            if "loss" in row:
                self._print(row)
            self._seen = max(self._seen, row["step"])
        # The first rows may all come from an earlier session; counted in, they would make the pace look far too fast.
        if fresh and self._pace is None:
            self._pace = Pace(0, done=self._seen)

    def _print(self, row: dict[str, Any]) -> None:
        left = ""
        if self._pace is not None:
            self._pace.done, self._pace.total = row["step"], row["steps"]
            left = f"  {self._pace.left()}".rstrip()
        parts = " ".join(f"{k.removeprefix('loss_')} {v:.3f}" for k, v in row.items() if k.startswith("loss_"))
        sources = " ".join(f"{k.removeprefix('loss/')} {v:.3f}" for k, v in row.items() if k.startswith("loss/"))
        parts += f"; {sources}" if sources else ""
        score = f"  F {row['hmean']:.3f} (R {row['recall']:.3f} P {row['precision']:.3f})" if "hmean" in row else ""
        observe.say(
            f"{self.name}: step {row['step']}/{row['steps']}  loss {row['loss']:.3f} ({parts})  "
            f"{row['images_per_second']:.1f} images/s{score}{left}",
            **self.where,
            **row,
        )

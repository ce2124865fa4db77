"""What a run reports while it works: metrics for Prometheus through Ray, and log lines for people or for log collectors.

A metric goes to the metrics endpoint of the caller's Ray node, under its name in METRICS with `ray_` before it. In a process that
has not joined Ray, nothing happens and Ray is not imported. Lines go through Python's logging; a command shows them as they are,
or each as one JSON object with I3CL_LOG=json in the environment. docs/observe.md lists both.
"""

from __future__ import annotations

import json
import logging
import math
import os
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, redirect_stdout
from dataclasses import dataclass
from io import TextIOBase, TextIOWrapper
from typing import Any, Literal, TextIO

RUN = "I3CL_RUN"
"""Environment variable: name of the run that the job was started for. It reaches every worker of the job."""
FORMAT = "I3CL_LOG"
"""Environment variable: 'json' for lines as JSON; anything else for plain lines."""
REFRESH = 5.0
"""Seconds after which gauges are set again: Ray forgets a gauge that was not set for two of its report intervals (20 s)."""


# ----------------------------------------------------------------------------------------------------------------- metrics


@dataclass(frozen=True)
class Metric:
    """One metric; its labels are `run`, `stage` and the one that `label` names."""

    name: str
    kind: Literal["gauge", "counter", "histogram"]
    description: str
    label: str = ""
    bounds: tuple[float, ...] = ()
    """Upper ends of a histogram's buckets."""


METRICS = {
    metric.name: metric
    for metric in (
        Metric(
            "i3cl_train_images_per_second", "gauge", "Images trained per second by all workers, since the last line of the log"
        ),
        Metric(
            "i3cl_train_loss",
            "gauge",
            "Mean loss since the last line of the log; part=loss is the sum of all parts, part=loss/NAME the loss of one "
            "training set where there are several",
            "part",
        ),
        Metric("i3cl_train_learning_rate", "gauge", "Learning rate of the last step"),
        Metric("i3cl_train_step", "gauge", "Steps done"),
        Metric("i3cl_train_steps", "gauge", "Steps of the whole training"),
        Metric("i3cl_train_data_wait_ratio", "gauge", "Share of the time in which worker 0 waited for a batch, 0-1"),
        Metric("i3cl_train_hmean_ratio", "gauge", "F of the last validation, 0-1"),
        Metric("i3cl_train_recall_ratio", "gauge", "Recall of the last validation, 0-1"),
        Metric("i3cl_train_precision_ratio", "gauge", "Precision of the last validation, 0-1"),
        Metric("i3cl_train_workers", "gauge", "Workers that train together"),
        Metric("i3cl_train_starts_total", "counter", "Number of times the workers started; all but the first are restarts"),
        Metric(
            "i3cl_train_checkpoint_seconds",
            "histogram",
            "Time for which a checkpoint held up training; its count is the number of checkpoints written",
            bounds=(0.5, 1, 2, 5, 10, 20, 60, 120, 300, 600),
        ),
        Metric(
            "i3cl_label_images_total",
            "counter",
            "Images processed by the ensemble; with several passes, an image counts once per pass",
        ),
        Metric("i3cl_label_errors_total", "counter", "Images that could not be labelled"),
        Metric("i3cl_label_images_per_second", "gauge", "Images per second since the first actor was ready"),
        Metric("i3cl_label_remaining_images", "gauge", "Images still to label"),
        Metric("i3cl_label_remaining_seconds", "gauge", "Estimated time left"),
        Metric("i3cl_label_actors", "gauge", "Actors that have reported lately"),
        Metric("i3cl_label_busy_ratio", "gauge", "Share of the actors' time in which a network was working, 0-1"),
        Metric("i3cl_pseudo_labels_total", "counter", "Pseudo labels written: kind=kept, or kind=ignored (don't-care)", "kind"),
        Metric("i3cl_search_trials", "gauge", "Trials of the sweep by state: running, finished, stopped, broken", "state"),
        Metric("i3cl_search_best_hmean_ratio", "gauge", "Best F of a finished trial, 0-1"),
        Metric("i3cl_evaluation_hmean_ratio", "gauge", "F on the validation set of the model that the stage names, 0-1"),
        Metric("i3cl_evaluation_recall_ratio", "gauge", "Recall of the same model, 0-1"),
        Metric("i3cl_evaluation_precision_ratio", "gauge", "Precision of the same model, 0-1"),
        Metric("i3cl_circle_stage", "gauge", "1 while the self-training run is in this stage, 0 after it"),
        Metric("i3cl_circle_stage_seconds", "gauge", "Time that a stage took, set when it is over"),
    )
}
"""All metrics, by name."""


def place(directory: str, stage: str) -> dict[str, str]:
    """Return run and stage of what is made in a directory: the job's run, and the path below the run's directory.

    For the run's directory itself the stage is `stage`.
    """
    path = f"/{directory.strip('/')}/"
    run = os.environ.get(RUN) or path.rsplit("/", 2)[-2]
    _, inside, below = path.rpartition(f"/{run}/")
    return {"run": run, "stage": (below if inside else path.rsplit("/", 2)[-2]).rstrip("/") or stage}


def training(run: str, rank: int, row: Mapping[str, Any]) -> None:
    """Report a row of a training's metrics file: rank 0 sets the metrics, and every worker writes the row to its log.

    run: the directory of the training.
    """
    where = place(run, "train")
    text = f"rank {rank}: step {row['step']}/{row['steps']}  loss {row['loss']:.3f}  {row['images_per_second']:.1f} images/s"
    note(f"{text}  {row['data_wait']:.0%} of the time without data", **where, rank=rank, **row)
    if rank:
        return
    for name in ("images_per_second", "learning_rate", "step", "steps"):
        _put(f"i3cl_train_{name}", row[name], **where)
    _put("i3cl_train_data_wait_ratio", row["data_wait"], **where)
    for name in ("hmean", "recall", "precision"):
        if name in row:
            _put(f"i3cl_train_{name}_ratio", row[name], **where)
    for name, value in row.items():
        if name.startswith("loss"):
            _put("i3cl_train_loss", value, part=name.removeprefix("loss_"), **where)


def training_started(run: str, workers: int) -> None:
    """Report that the workers of a training started, or started again after an interruption. run: its directory."""
    _put("i3cl_train_starts_total", 1, **place(run, "train"))
    _put("i3cl_train_workers", workers, **place(run, "train"))


def checkpoint(run: str, seconds: float) -> None:
    """Report that a training wrote a checkpoint. run: its directory; seconds: how long that held up training."""
    _put("i3cl_train_checkpoint_seconds", seconds, **place(run, "train"))


def labelling(stage: str, images: int, errors: int, job: Mapping[str, float]) -> None:
    """Report that `images` more were processed, of which `errors` failed. job: the job's progress, from `Meter.numbers`."""
    where = {"run": os.environ.get(RUN, ""), "stage": stage}
    _put("i3cl_label_images_total", images, **where)
    _put("i3cl_label_errors_total", errors, **where)
    _put("i3cl_label_images_per_second", job["images_per_second"], **where)
    _put("i3cl_label_remaining_images", job["remaining"], **where)
    if job["images_per_second"]:
        _put("i3cl_label_remaining_seconds", job["remaining"] / job["images_per_second"], **where)
    _put("i3cl_label_actors", job["actors"], **where)
    _put("i3cl_label_busy_ratio", job["busy_share"], **where)


def labelling_ended(stage: str) -> None:
    """Report that a labelling job is over: its gauges disappear, its totals stay."""
    _refreshed.drop("i3cl_label_", os.environ.get(RUN, ""), stage)


def pseudo_labels(out: str, kept: int, ignored: int) -> None:
    """Report that a set of pseudo labels was written to `out`."""
    where = {**place(out, ""), "stage": "select"}
    _put("i3cl_pseudo_labels_total", kept, kind="kept", **where)
    _put("i3cl_pseudo_labels_total", ignored, kind="ignored", **where)


def search(trials: Sequence[str], best: float | None) -> None:
    """Report the progress of a sweep. trials: their states; best: the highest hmean, 0-1, None before a trial has finished."""
    where = {"run": os.environ.get(RUN, ""), "stage": "search"}
    for state in ("running", "finished", "stopped", "broken"):
        _put("i3cl_search_trials", trials.count(state), state=state, **where)
    if best is not None:
        _put("i3cl_search_best_hmean_ratio", best, **where)


def evaluation(model: str, *, hmean: float, recall: float, precision: float) -> None:
    """Report the results of a model on the validation set, 0-1."""
    for name, value in (("hmean", hmean), ("recall", recall), ("precision", precision)):
        _put(f"i3cl_evaluation_{name}_ratio", value, run=os.environ.get(RUN, ""), stage=model)


@contextmanager
def stage(name: str) -> Iterator[None]:
    """Mark a stage of a self-training run: a gauge is 1 inside, and lines that name no stage carry this one."""
    where = {"run": os.environ.get(RUN, ""), "stage": name}
    before, _context["stage"] = _context["stage"], name
    started = time.monotonic()
    _inside.append(where)
    joined()
    try:
        yield
    finally:
        _context["stage"] = before
        _inside.remove(where)
        _put("i3cl_circle_stage", 0, **where)
        _put("i3cl_circle_stage_seconds", time.monotonic() - started, **where)


def joined() -> None:
    """Show the current stage, after this process has joined a cluster."""
    for where in _inside:
        _put("i3cl_circle_stage", 1, **where)


_inside: list[dict[str, str]] = []
"""Stages that have begun and not ended."""


def _joined() -> Any:
    """Return the ray module when this process has joined a cluster, else None."""
    ray = sys.modules.get("ray")
    return ray if ray is not None and ray.is_initialized() else None


_made: dict[str, Any] = {}
_lock = threading.Lock()


def _put(name: str, value: float, **labels: str) -> None:
    """Set a gauge, add to a counter, or add a value to a histogram."""
    if _joined() is None:
        return
    metric = METRICS[name]
    with _lock:
        if name not in _made:
            _made[name] = _make(metric)
    if metric.kind == "gauge":
        _made[name].set(float(value), labels)
        _refreshed.keep(name, float(value), labels)
    elif metric.kind == "histogram":
        _made[name].observe(float(value), labels)
    elif value > 0:
        _made[name].inc(value, labels)


def _make(metric: Metric) -> Any:
    from ray.util import metrics

    labels = ("run", "stage", *([metric.label] if metric.label else []))
    if metric.kind == "gauge":
        return metrics.Gauge(metric.name, metric.description, labels)
    if metric.kind == "counter":
        return metrics.Counter(metric.name, metric.description, labels)
    return metrics.Histogram(metric.name, metric.description, list(metric.bounds), labels)


class _Refreshed:
    """The last value of every gauge; a thread sets it again for as long as this process is part of a cluster."""

    def __init__(self) -> None:
        self._values: dict[tuple[str, frozenset[tuple[str, str]]], float] = {}
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None

    def keep(self, name: str, value: float, labels: Mapping[str, str]) -> None:
        with self._lock:
            self._values[name, frozenset(labels.items())] = value
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, daemon=True, name="i3cl-metrics")
                self._thread.start()

    def drop(self, prefix: str, run: str, stage: str) -> None:
        of_it = {("run", run), ("stage", stage)}
        with self._lock:
            self._values = {k: v for k, v in self._values.items() if not (k[0].startswith(prefix) and of_it <= k[1])}

    def _run(self) -> None:
        while True:
            time.sleep(REFRESH)
            with self._lock:
                if _joined() is None:
                    self._values.clear()
                    self._thread = None
                    return
                for (name, labels), value in self._values.items():
                    _made[name].set(value, dict(labels))


_refreshed = _Refreshed()


# ------------------------------------------------------------------------------------------------------------------- lines


_log = logging.getLogger("i3cl")
_context = {"stage": ""}
_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime"}
"""Names that a log record uses itself. A field with such a name gets an underscore after it on its way to the handler."""


def begin(run: str, stage: str) -> None:
    """Set the run that this process and its workers work for from now on, and the stage of lines that name none."""
    os.environ[RUN] = run
    _context["stage"] = stage


def wants_json() -> bool:
    """Whether the user asked for lines as JSON."""
    return os.environ.get(FORMAT, "").lower() == "json"


def say(message: str, *, stage: str = "", level: str = "INFO", **fields: Any) -> None:
    """Log a line of progress, with fields that only the JSON form shows. A field `run` replaces the job's own run."""
    _say(message, stage=stage, level=level, **fields)


def note(message: str, *, stage: str = "", level: str = "INFO", **fields: Any) -> None:
    """Log a line in a Ray worker, for its log file; do nothing in any other process."""
    if _in_worker():
        _say(message, stage=stage, level=level, **fields)


def _say(message: str, *, stage: str, level: str, **fields: Any) -> None:
    fields = {"time": _stamp(time.time()), **_where(stage=stage, level=level, **fields)}
    extra = {f"{key}_" if key in _STANDARD else key: value for key, value in fields.items()}
    # stacklevel: Ray's JSON form shows file and line of whoever called `say` or `note`.
    _log.log(logging.getLevelNamesMapping()[level], "%s", message, extra=extra, stacklevel=3)


def complain(message: str) -> None:
    """Write the error that ends a job to stderr; as JSON where that is wanted."""
    _Lines().handle(logging.makeLogRecord({"levelno": logging.ERROR, "levelname": "ERROR", "msg": message}))


@contextmanager
def console() -> Iterator[None]:
    """Show the package's log lines on stdout and stderr, as every command does.

    With I3CL_LOG=json, whatever is printed on stdout becomes JSON too, one object per line. A character that the terminal cannot
    show, as in a file name that is not UTF-8, is written as an escape.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    lines, before = _Lines(), (_log.level, _log.propagate)
    _log.addHandler(lines)
    _log.setLevel(logging.INFO)
    _log.propagate = False
    try:
        with _printed_as_json() if wants_json() else nullcontext():
            yield
    finally:
        _log.removeHandler(lines)
        _log.setLevel(before[0])
        _log.propagate = before[1]


def worker_lines() -> None:
    """In a Ray worker of a command, send log lines to the worker's stdout. JSON lines are left to Ray's LoggingConfig."""
    if os.environ.get(RUN) and not wants_json() and _in_worker():
        _log.addHandler(_Lines())
        _log.setLevel(logging.INFO)
        _log.propagate = False


class _Lines(logging.Handler):
    """Writes INFO lines to stdout and WARNING and above to stderr, plain or as JSON, and flushes each.

    Uses whatever sys.stdout and sys.stderr are at that moment. Unlike other handlers it lets errors of a write pass, as print
    does, because a closed pipe must end the job.
    """

    def emit(self, record: logging.LogRecord) -> None:
        stream = sys.stderr if record.levelno >= logging.WARNING else sys.stdout
        text = _json(record) if wants_json() else record.getMessage()
        # print, because Ray Train redirects print, but not sys.stdout, to the training's log file.
        print(text, file=stream.target if isinstance(stream, _JsonLines) else stream, flush=True)


def _json(record: logging.LogRecord) -> str:
    # Ray adds a time of its own, whose name begins with an underscore, to every record.
    fields = {key.removesuffix("_"): value for key, value in vars(record).items() if key not in _STANDARD and key[0] != "_"}
    where = _where(**{"stage": "", **fields, "level": record.levelname})
    line = {"time": _stamp(record.created), **where, "message": record.getMessage().strip()}
    first = ("time", "level", "run", "stage", "message")
    return json.dumps({key: line[key] for key in first} | line, ensure_ascii=False)


def _stamp(seconds: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds)) + f".{int(seconds % 1 * 1000):03d}Z"


@contextmanager
def _printed_as_json() -> Iterator[None]:
    lines = _JsonLines(sys.stdout)
    with redirect_stdout(lines):
        try:
            yield
        finally:
            lines.finish()


class _JsonLines(TextIOBase):
    """A text stream that writes every line to `target` as a JSON object."""

    def __init__(self, target: TextIO) -> None:
        self.target = target
        # print writes a text and its line end separately, and several threads print.
        self._begun = threading.local()

    def writable(self) -> bool:
        return True

    def write(self, text: str) -> int:
        *lines, self._begun.text = (getattr(self._begun, "text", "") + text).split("\n")
        for line in lines:
            if line.strip():
                record = logging.makeLogRecord({"levelno": logging.INFO, "levelname": "INFO", "msg": line})
                print(_json(record), file=self.target, flush=True)
        return len(text)

    def finish(self) -> None:
        if getattr(self._begun, "text", "").strip():
            self.write("\n")


def _where(*, stage: str, level: str, **more: Any) -> dict[str, Any]:
    """The fields that every line has, and those of this one."""
    run = more.pop("run", "") or os.environ.get(RUN, "")
    return {
        "level": level,
        "run": run,
        "stage": stage or _context["stage"],
        **{key: _plain(value) for key, value in more.items()},
    }


def _plain(value: Any) -> Any:
    """Return the value as JSON can hold it, which has no NaN and no infinity."""
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    return value if isinstance(value, bool | int | str | None) else str(value)


def _in_worker() -> bool:
    ray = _joined()
    return ray is not None and ray.get_runtime_context().worker.mode == ray.WORKER_MODE

"""The whole circle: data, teachers, pseudo labels, student, evaluation, report. Every stage is done once and kept."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import numpy as np

from i3cl import observe, storage
from i3cl.config import Settings, TeacherSettings, with_overrides
from i3cl.data.formats.coco import read_coco
from i3cl.data.formats.predictions import member_predictions
from i3cl.data.formats.records import Dataset
from i3cl.data.loading.ingest import read_source
from i3cl.errors import UserError
from i3cl.evaluation.metrics.model_score import Measured, Score, score_predictions
from i3cl.labelling.predict import predict
from i3cl.labelling.pseudo import make_pseudo_labels, pseudo_path, with_pseudo_labels
from i3cl.runtime.pace import duration
from i3cl.training.launch import TrainResult, claim, train_all


class Stages:
    """Remembers in the run directory which stages are done and how long each took."""

    def __init__(self, run: str) -> None:
        self.path = storage.join(run, "stages.json")
        self.seconds: dict[str, float] = json.loads(storage.read_text(self.path)) if storage.exists(self.path) else {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        observe.say(f"\n== {name}", stage=name)
        started = time.monotonic()
        with observe.stage(name):
            yield
        spent = time.monotonic() - started
        # A stage that was done before returns at once: keep the time that it really took.
        self.seconds[name] = round(max(spent, self.seconds.get(name, 0.0)), 1)
        storage.write_text_atomic(self.path, json.dumps(self.seconds, indent=1))
        observe.say(f"== {name}: {duration(spent)}", stage=name, seconds=spent)


def selftrain(settings: Settings) -> dict[str, Any]:
    """Teachers -> pseudo labels -> student in <storage>/<name>/; returns what summary.json holds.

    UserError for missing data sets or checkpoints. The same call continues a run that was stopped.
    """
    if not settings.selftrain.teachers:
        raise UserError("selftrain.teachers: names no teacher; add {name: a, overrides: {train.seed: 1}}")
    run = storage.join(storage.absolute(settings.storage), settings.name)
    stages = Stages(run)
    if settings.synthetic is not None:
        with stages("data"):
            settings = use_synthetic(settings, storage.join(run, "data"))
    if settings.label.source is None:
        raise UserError("label.source: names no unlabelled images; add {annotations: …, images: …}")
    if settings.data.validation is None:
        raise UserError("data.validation: names no data set; teachers and student are compared on it")
    unlabelled = read_source(settings.label.source, settings.data_root, settings.data.skip_bad, check_files=False)
    validation = read_source(settings.data.validation, settings.data_root, settings.data.skip_bad)

    # More rounds and a control may be added to a run that is done.
    once = {"rounds": 1, "min_gain": 0.0, "control": False}
    same = settings.model_copy(update={"selftrain": settings.selftrain.model_copy(update=once)})
    claim(run, same, ("synthetic", "model", "data", "train", "label", "evaluate", "selftrain"))
    with stages("teachers"):
        names = [teacher.name for teacher in settings.selftrain.teachers]
        variants = [_variant(settings, teacher, i) for i, teacher in enumerate(settings.selftrain.teachers)]
        teachers = dict(zip(names, train_all(variants), strict=True))
    with stages("labels"):
        predictions = predict(
            unlabelled,
            {name: t.checkpoint for name, t in teachers.items()},
            settings,
            storage.join(run, "predictions", "unlabelled"),
            "labels",
        )
        pseudo = pseudo_path(run, predictions, settings.label)
        counts = make_pseudo_labels(predictions, settings.label, pseudo, unlabelled.images_root)
        observe.say(
            f"labels: {counts['instances']} instances on {counts['images_with_labels']} of {counts['images']} images, "
            f"mean weight {counts['mean_weight']:.2f}",
            **counts,
        )
        if not counts["instances"]:
            raise UserError("label.select: no prediction passed the thresholds; lower label.select.low or train longer")
    with stages("student"):
        student = train_all([_student(settings, teachers, pseudo, unlabelled.images_root)])[0]
    control = None
    if settings.selftrain.control:
        with stages("control"):
            control = train_all([_control(settings, teachers)])[0]
    models = {name: t.checkpoint for name, t in teachers.items()} | {settings.selftrain.student.name: student.checkpoint}
    with stages("evaluation"):
        found = predict(validation, models, settings, storage.join(run, "predictions", "validation"), "evaluation")
        measured = {
            name: score_predictions(name, validation.records, member_predictions(found, name), settings.evaluate)
            for name in models
        }
        for name, each in measured.items():
            _show(name, each.score)
        pseudo_measured = None
        if settings.selftrain.unlabelled_truth is not None:
            truth = read_source(settings.selftrain.unlabelled_truth, settings.data_root, settings.data.skip_bad)
            pseudo_measured = _measure_labels(truth, read_coco(pseudo, unlabelled.images_root), settings)
    control_measured = None
    if control is not None:
        # Apart from the others' predictions, so that a run which is done predicts nothing again.
        with stages("evaluation of the control"):
            name = _control_name(settings)
            folder = storage.join(run, "predictions", "control")
            own = predict(validation, {name: control.checkpoint}, settings, folder, "control")
            control_measured = score_predictions(name, validation.records, member_predictions(own, name), settings.evaluate)
            _show(name, control_measured.score)
    summary: dict[str, Any] = {
        "teachers": [_brief(measured[name].score) for name in teachers],
        "student": _brief(measured[settings.selftrain.student.name].score),
        "pseudo_labels": {
            "images": counts["images_with_labels"],
            "instances": counts["instances"],
            "mean_weight": counts["mean_weight"],
            "ignored": counts["ignored"],
        },
        "seconds": stages.seconds,
    }
    if control_measured is not None:
        summary["control"] = _brief(control_measured.score)
    if settings.selftrain.rounds > 1:
        summary["rounds"] = _more_rounds(settings, stages, run, teachers, student, measured, unlabelled, validation)
    if pseudo_measured is not None:
        summary["pseudo_labels"] |= {k: v for k, v in _brief(pseudo_measured.score).items() if k != "name"}
    with stages("report"):
        from i3cl.report.circle import write_circle_report

        runs = {name: t.run for name, t in teachers.items()} | {settings.selftrain.student.name: student.run}
        write_circle_report(
            storage.join(run, "report.html"),
            settings,
            measured,
            pseudo_measured,
            stages.seconds,
            validation,
            found,
            pseudo,
            unlabelled.images_root,
            runs,
            [row for row in [summary.get("control"), *summary.get("rounds", [])[1:]] if row is not None],
        )
    storage.write_text_atomic(storage.join(run, "summary.json"), json.dumps(summary, indent=1) + "\n")
    return summary


def _more_rounds(
    settings: Settings,
    stages: Stages,
    run: str,
    teachers: dict[str, TrainResult],
    student: TrainResult,
    measured: dict[str, Measured],
    unlabelled: Dataset,
    validation: Dataset,
) -> list[dict[str, Any]]:
    """Rounds from the second on, in round-2/, round-3/, ...; a row of the student's scores for every round, the first included.

    Stops before selftrain.rounds when a student's F is not above the best so far by more than selftrain.min_gain.
    """
    circle = settings.selftrain
    members = dict(teachers)
    rows = [_brief(measured[circle.student.name].score) | {"name": f"{circle.student.name}, round 1", "round": 1}]
    best = max(measured[name].score.hmean for name in teachers)
    while len(rows) < circle.rounds:
        if not rises(rows[-1]["hmean"], best, circle.min_gain):
            reached = rows[-1]["hmean"]
            observe.say(f"rounds: F {reached:.3f} is no gain over {best:.3f}; no further round", hmean=reached, best=best)
            break
        best = rows[-1]["hmean"]
        number = len(rows) + 1
        members[circle.student.name if number == 2 else f"{circle.student.name}-{number - 1}"] = student
        # Everything of a round lies in its own folder, under the names of the first round.
        own = settings.model_copy(update={"storage": run, "name": f"round-{number}"})
        folder = storage.join(run, f"round-{number}")
        with stages(f"round {number}: labels"):
            checkpoints = {name: model.checkpoint for name, model in members.items()}
            predictions = storage.join(folder, "predictions", "unlabelled")
            predict(unlabelled, checkpoints, own, predictions, f"labels of round {number}")
            pseudo = pseudo_path(folder, predictions, own.label)
            counts = make_pseudo_labels(predictions, own.label, pseudo, unlabelled.images_root)
            if not counts["instances"]:
                raise UserError("label.select: no prediction passed the thresholds; lower label.select.low or train longer")
        with stages(f"round {number}: student"):
            student = train_all([_student(own, members, pseudo, unlabelled.images_root)])[0]
        with stages(f"round {number}: evaluation"):
            name = circle.student.name
            out = storage.join(folder, "predictions", "validation")
            found = predict(validation, {name: student.checkpoint}, own, out, f"evaluation of round {number}")
            score = score_predictions(name, validation.records, member_predictions(found, name), own.evaluate).score
            _show(f"{name}-{number}", score)
        rows.append(
            _brief(score)
            | {"name": f"{name}, round {number}", "round": number}
            | {f"pseudo_{key}": counts[key] for key in ("instances", "mean_weight")}
        )
    return rows


def _show(name: str, score: Score) -> None:
    observe.evaluation(name, hmean=score.hmean, recall=score.recall, precision=score.precision)


def rises(hmean: float, best: float, min_gain: float) -> bool:
    """Whether an F is worth another round."""
    return hmean > best + min_gain


def _measure_labels(truth: Dataset, labels: Dataset, settings: Settings) -> Measured:
    """The pseudo labels as the student gets them, all of them: their thresholds are chosen already."""
    found = {}
    for record in labels.records:
        kept = [i for i in record.instances if not i.ignore]
        found[record.id] = ([i.polygon for i in kept], np.array([i.score for i in kept], np.float32))
    return score_predictions("pseudo labels", truth.records, found, settings.evaluate.model_copy(update={"score_threshold": 0.0}))


def use_synthetic(settings: Settings, folder: str) -> Settings:
    """Make the synthetic data set in `folder` (once) and return settings that use it."""
    from i3cl.data.synthetic.plain_set import write_synthetic_set

    assert settings.synthetic is not None
    write_synthetic_set(settings.synthetic, folder)

    def source(name: str, images: str) -> dict[str, Any]:
        return {"annotations": storage.join(folder, f"{name}.json"), "images": storage.join(folder, images)}

    return with_overrides(
        settings,
        {
            "data.train": [source("labelled", "labelled")],
            "data.validation": source("validation", "validation"),
            "label.source": source("unlabelled", "unlabelled"),
            "selftrain.unlabelled_truth": source("unlabelled_truth", "unlabelled"),
        },
        "synthetic",
    )


def _variant(settings: Settings, model: TeacherSettings, index: int, changes: dict[str, Any] | None = None) -> Settings:
    """The settings of one of the circle's models; each has its own seed, so that teachers disagree where they are unsure."""
    run = storage.join(storage.absolute(settings.storage), settings.name)
    own = {"train.seed": settings.train.seed * 100 + index + 1, **(changes or {}), **model.overrides}
    return with_overrides(settings, {**own, "storage": run, "name": model.name}, f"selftrain, overrides of {model.name}")


def _student(settings: Settings, teachers: dict[str, TrainResult], pseudo: str, images_root: str) -> Settings:
    circle = settings.selftrain
    changes: dict[str, Any] = {"data.train": with_pseudo_labels(settings, pseudo, images_root)}
    if circle.student_starts_from_best_teacher:
        best = max(teachers.values(), key=lambda t: t.metrics.get("hmean", 0.0))
        changes["train.start_from"] = best.checkpoint
    return _variant(settings, circle.student, len(teachers), changes)


def _control_name(settings: Settings) -> str:
    return f"{settings.selftrain.student.name}-control"


def _control(settings: Settings, teachers: dict[str, TrainResult]) -> Settings:
    """The student's recipe, start and seed without the pseudo labels."""
    student = _student(settings, teachers, "", "")
    labelled = [s.model_dump() for s in settings.data.train]
    return with_overrides(student, {"data.train": labelled, "name": _control_name(settings)}, "selftrain.control")


def _brief(score: Score) -> dict[str, Any]:
    return {key: round(value, 4) if isinstance(value, float) else value for key, value in asdict(score).items() if key != "rules"}


def print_table(summary: dict[str, Any]) -> None:
    """The circle's result as a table: teachers, pseudo labels, student; with I3CL_LOG=json a line each."""
    from rich.console import Console
    from rich.table import Table

    table = Table("", "recall", "precision", "F", "F, large")
    rows = [*summary["teachers"], {"name": "pseudo labels", **summary["pseudo_labels"]}, summary["student"]]
    rows += [summary["control"]] if "control" in summary else []
    rows += summary.get("rounds", [])[1:]
    best = max((row["hmean"] for row in rows if row["name"] != "pseudo labels"), default=0.0)
    for row in rows:
        if observe.wants_json():
            observe.say(f"result: {row['name']}", **row)
        if "hmean" not in row:
            table.add_row(row["name"], *["no truth"] * 4)
            continue
        numbers = [f"{row[key]:.3f}" for key in ("recall", "precision", "hmean", "hmean_large")]
        mark = "bold" if row["hmean"] == best and row["name"] != "pseudo labels" else None
        table.add_row(row["name"], *numbers, style=mark)
    if not observe.wants_json():
        Console().print(table)
    labels = summary["pseudo_labels"]
    print(f"pseudo labels: {labels['instances']} instances on {labels['images']} images, mean weight {labels['mean_weight']:.2f}")

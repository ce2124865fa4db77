"""The whole circle: data, teachers, pseudo labels, student, evaluation, report. Each stage is done once and its result kept."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

from i3cl import observe, storage
from i3cl.claims import claim_run, recorded
from i3cl.config import MemberSettings, Settings, TeacherSettings, with_overrides
from i3cl.data.formats.coco import read_coco
from i3cl.data.formats.records import Dataset
from i3cl.data.loading.ingest import read_source
from i3cl.data.synthetic.recipe import use_synthetic
from i3cl.errors import UserError
from i3cl.evaluation.metrics.model_score import Measured, Score
from i3cl.inference.recipe import AS_TRAINED
from i3cl.labelling.label import PseudoLabels, label_images, unlabelled_images
from i3cl.labelling.pseudo import with_pseudo_labels, without_pseudo_labels
from i3cl.labelling.scoring import Gain, calibrate, gain, score_checkpoints, score_labels
from i3cl.runtime.pace import duration
from i3cl.training.launch import TrainResult, train_all


class Stages:
    """Keeps in the run directory how long each stage took, over all runs of the same command."""

    def __init__(self, run: str) -> None:
        self.path = storage.join(run, "stages.json")
        self.seconds: dict[str, float] = json.loads(storage.read_text_if_there(self.path) or "{}")

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Run the block as a stage of this name, with a line before and after it."""
        observe.say(f"\n== {name}", stage=name)
        started = time.monotonic()
        with observe.stage(name):
            yield
        spent = time.monotonic() - started
        # A stage that was done before returns at once: keep the time that it took then.
        self.seconds[name] = round(max(spent, self.seconds.get(name, 0.0)), 1)
        storage.write_text_atomic(self.path, json.dumps(self.seconds, indent=1))
        observe.say(f"== {name}: {duration(spent)}", stage=name, seconds=spent)


def selftrain(settings: Settings) -> dict[str, Any]:
    """Teachers -> pseudo labels -> student in <storage>/<name>/; returns what summary.json holds.

    Without a labelled set, `i3cl.circle_unlabelled` is the circle. UserError for missing data sets or checkpoints. The same
    call continues a run that was stopped.
    """
    if not settings.selftrain.teachers:
        raise UserError("selftrain.teachers: names no teacher; add {name: a, overrides: {train.seed: 1}}")
    run = storage.join(storage.absolute(settings.storage), settings.name)
    stages = Stages(run)
    if settings.synthetic is not None:
        with stages("data"):
            settings = use_synthetic(settings, storage.join(run, "data"))
    unlabelled = unlabelled_images(settings)
    if settings.data.validation is None:
        raise UserError("data.validation: names no data set; teachers and student are compared on it")
    from_files = [name for name, member in settings.selftrain.members.items() if member.results]
    if settings.selftrain.calibrate and from_files:
        raise UserError(
            f"selftrain.calibrate: {from_files[0]} has results of the unlabelled images and none of data.validation, on which "
            "the ensemble would be calibrated; set selftrain.calibrate=false label.agreement=true"
        )
    validation = read_source(settings.data.validation, settings.data_root, settings.data.skip_bad)

    # More rounds and a control may be added to a finished run.
    once = {"rounds": 1, "min_gain": 0.0, "control": True}
    same = settings.model_copy(update={"selftrain": settings.selftrain.model_copy(update=once)})
    claim_run(run, same, ("synthetic", "model", "data", "train", "label", "evaluate", "selftrain"))
    with stages("teachers"):
        names = [teacher.name for teacher in settings.selftrain.teachers]
        variants = [_variant(settings, teacher, i) for i, teacher in enumerate(settings.selftrain.teachers)]
        teachers = dict(zip(names, train_all(variants), strict=True))
    checkpoints = {name: t.checkpoint for name, t in teachers.items()} | settings.selftrain.members
    if settings.selftrain.calibrate:
        with stages("calibration"):
            settings = _calibrated(settings, validation, checkpoints, run)
    with stages("labels"):
        labels = label_images(unlabelled, checkpoints, settings, run, "labels", given=AS_TRAINED)
        labels.say()
        counts = labels.counts
    with stages("student"):
        student = train_all([_student(settings, teachers, labels)])[0]
    control = None
    if settings.selftrain.control:
        with stages("control"):
            control = train_all([_control(settings, teachers)])[0]
    models = {name: t.checkpoint for name, t in teachers.items()} | {settings.selftrain.student.name: student.checkpoint}
    shown = {f"checkpoint {name}": path for name, path in models.items()}
    shown |= {"pseudo labels": labels.path, "validation images": validation.annotations}
    if control is not None:
        shown[f"checkpoint {_control_name(settings)}"] = control.checkpoint
    with stages("evaluation"):
        folder = storage.join(run, "predictions", "validation")
        scores = score_checkpoints(validation, models, settings, folder, "evaluation", AS_TRAINED)
        measured = scores.members
        for name, each in measured.items():
            _show(name, each.score)
        pseudo_measured = None
        if settings.selftrain.unlabelled_truth is not None:
            truth = read_source(settings.selftrain.unlabelled_truth, settings.data_root, settings.data.skip_bad)
            kept = read_coco(labels.path, labels.images_root)
            pseudo_measured = score_labels("pseudo labels", truth, kept, settings.evaluate)
    control_measured, gained = None, None
    if control is not None:
        # In a folder of its own, so that adding a control to a finished run predicts nothing else again.
        with stages("evaluation of the control"):
            name = _control_name(settings)
            folder = storage.join(run, "predictions", "control")
            checkpoint = {name: control.checkpoint}
            control_scores = score_checkpoints(validation, checkpoint, settings, folder, "control", AS_TRAINED)
            control_measured = control_scores.members[name]
            _show(name, control_measured.score)
            gained = gain(validation, (scores, settings.selftrain.student.name), (control_scores, name), settings.evaluate)
    summary: dict[str, Any] = {
        "teachers": [brief(measured[name].score) for name in teachers],
        "student": brief(measured[settings.selftrain.student.name].score),
        "pseudo_labels": {
            "images": counts["images_with_labels"],
            "instances": counts["instances"],
            "mean_weight": counts["mean_weight"],
            "ignored": counts["ignored"],
        },
        "seconds": stages.seconds,
    }
    if control_measured is not None and gained is not None:
        summary["control"] = brief(control_measured.score)
        summary["student_minus_control"] = {key: round(value, 4) for key, value in asdict(gained).items()}
    summary["verdict"] = verdict(gained, settings)
    if settings.selftrain.rounds > 1:
        summary["rounds"] = _more_rounds(settings, stages, run, teachers, student, measured, unlabelled, validation, shown)
    if pseudo_measured is not None:
        summary["pseudo_labels"] |= {k: v for k, v in brief(pseudo_measured.score).items() if k != "name"}
    summary["made_from"] = {role: recorded(path) for role, path in shown.items()}
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
            scores.predictions,
            labels.path,
            labels.images_root,
            runs,
            [row for row in [summary.get("control"), *summary.get("rounds", [])[1:]] if row is not None],
            summary["verdict"],
            {role: record["sha256"] for role, record in summary["made_from"].items()},
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
    shown: dict[str, str],
) -> list[dict[str, Any]]:
    """The rounds from the second on, in round-2/, round-3/, ...; returns the student's scores of every round, the first included.

    Their students and labels are added to `shown` (role -> path). Stops before selftrain.rounds when a student's F is not above
    the best so far by more than selftrain.min_gain.
    """
    circle = settings.selftrain
    members = dict(teachers)
    rows = [brief(measured[circle.student.name].score) | {"name": f"{circle.student.name}, round 1", "round": 1}]
    best = max(measured[name].score.hmean for name in teachers)
    while len(rows) < circle.rounds:
        if not rises(rows[-1]["hmean"], best, circle.min_gain):
            reached = rows[-1]["hmean"]
            observe.say(f"rounds: F {reached:.3f} is not better than {best:.3f}; no further round", hmean=reached, best=best)
            break
        best = rows[-1]["hmean"]
        number = len(rows) + 1
        members[student_in_round(circle.student.name, number)] = student
        # Each round has its own folder, with the same file names as the first round.
        own = settings.model_copy(update={"storage": run, "name": f"round-{number}"})
        folder = storage.join(run, f"round-{number}")
        with stages(f"round {number}: labels"):
            checkpoints = {name: model.checkpoint for name, model in members.items()} | circle.members
            if circle.calibrate:
                own = _calibrated(own, validation, checkpoints, folder)
            earlier = run if number == 2 else storage.join(run, f"round-{number - 1}")
            title = f"labels of round {number}"
            labels = label_images(unlabelled, checkpoints, own, folder, title, given=AS_TRAINED, earlier=earlier)
        with stages(f"round {number}: student"):
            student = train_all([_student(own, members, labels)])[0]
        with stages(f"round {number}: evaluation"):
            name = circle.student.name
            out = storage.join(folder, "predictions", "validation")
            checkpoint, heading = {name: student.checkpoint}, f"evaluation of round {number}"
            score = score_checkpoints(validation, checkpoint, own, out, heading, AS_TRAINED).members[name].score
            _show(f"{name}-{number}", score)
        shown |= {f"checkpoint {name}, round {number}": student.checkpoint, f"pseudo labels, round {number}": labels.path}
        rows.append(
            brief(score)
            | {"name": f"{name}, round {number}", "round": number}
            | {f"pseudo_{key}": labels.counts[key] for key in ("instances", "mean_weight")}
        )
    return rows


def student_in_round(name: str, number: int) -> str:
    """The name under which the student of the round before labels in round `number`, from 2 on."""
    return name if number == 2 else f"{name}-{number - 1}"


def _show(name: str, score: Score) -> None:
    observe.evaluation(name, hmean=score.hmean, recall=score.recall, precision=score.precision)


def rises(hmean: float, best: float, min_gain: float) -> bool:
    """Whether an F is good enough for another round."""
    return hmean > best + min_gain


def _variant(settings: Settings, model: TeacherSettings, index: int, changes: dict[str, Any] | None = None) -> Settings:
    """The settings of one of the circle's models. Each has its own seed, so that teachers disagree where they are unsure."""
    run = storage.join(storage.absolute(settings.storage), settings.name)
    own = {"train.seed": settings.train.seed * 100 + index + 1, **(changes or {}), **model.overrides}
    return with_overrides(settings, {**own, "storage": run, "name": model.name}, f"selftrain, overrides of {model.name}")


def _student(settings: Settings, teachers: dict[str, TrainResult], labels: PseudoLabels | None) -> Settings:
    """The student's settings. labels: None leaves the labelled sources alone."""
    circle = settings.selftrain
    changes: dict[str, Any] = {}
    if labels is not None:
        changes["data.train"] = with_pseudo_labels(settings, labels.path, labels.images_root)
    if circle.student_starts_from_best_teacher:
        best = max(teachers.values(), key=lambda t: t.metrics.get("hmean", 0.0))
        changes["train.start_from"] = best.checkpoint
    return _variant(settings, circle.student, len(teachers), changes)


def _control_name(settings: Settings) -> str:
    return f"{settings.selftrain.student.name}-control"


def _control(settings: Settings, teachers: dict[str, TrainResult]) -> Settings:
    """The student's recipe, start and seed without the pseudo labels."""
    student = _student(settings, teachers, None)
    changes = {"data.train": without_pseudo_labels(settings), "name": _control_name(settings)}
    return with_overrides(student, changes, "selftrain.control")


def _calibrated(settings: Settings, validation: Dataset, members: Mapping[str, str | MemberSettings], run: str) -> Settings:
    out = storage.join(run, "predictions", "calibration")
    scores = score_checkpoints(validation, members, settings, out, "calibration", AS_TRAINED, every_view=True)
    return calibrate(validation, scores, settings, storage.join(run, "calibration.json"))


def verdict(gained: Gain | None, settings: Settings) -> str:
    """In words, what the pseudo labels brought: student minus control with its interval, and what to try when it is nothing.

    gained: None when no control was trained.
    """
    if gained is None:
        return "No control was trained (selftrain.control=false), so what the pseudo labels brought is not known."
    text = (
        f"Student minus control: {100 * gained.difference:+.1f} points of F, 95 % interval {100 * gained.low:+.1f} to "
        f"{100 * gained.high:+.1f}."
    )
    if gained.low > 0:
        return f"{text} The pseudo labels made the detector better."
    lost = (
        "The pseudo labels made it worse."
        if gained.high < 0
        else "This cannot be told from zero, so nothing shows that the pseudo labels help."
    )
    return f"{text} {lost} {_levers(settings)}"


def _levers(settings: Settings) -> str:
    """What most often helps and is not in use, the most likely first."""
    circle = settings.selftrain
    untried = [
        (not circle.members, "let a detector that learned elsewhere label too (selftrain.members.scene=lite0-scene)"),
        (circle.pseudo_per_step is None, "put pseudo-labelled images on top of the labelled ones (selftrain.pseudo_per_step)"),
        (not settings.train.average_decay, "average the weights (train.average_decay)"),
        (not circle.pseudo_transform, "augment pseudo-labelled images strongly (selftrain.pseudo_transform)"),
        (not circle.calibrate, "choose thresholds by precision (selftrain.calibrate)"),
        (settings.label.select.outline_high == 0, "teach outlines only where members agree (label.select.outline_high)"),
        (len(settings.label.views) < 2, "label with a second view (label.views)"),
    ]
    likely = [lever for unused, lever in untried if unused]
    if not likely:
        return "Likely levers: better teachers, and more unlabelled images from the same source."
    return f"Likely levers: {'; '.join(likely[:3])}."


def brief(score: Score) -> dict[str, Any]:
    """The numbers of a score, rounded, for summary.json."""
    return {key: round(value, 4) if isinstance(value, float) else value for key, value in asdict(score).items() if key != "rules"}


def print_table(summary: dict[str, Any]) -> None:
    """Show the circle's result as a table: teachers, pseudo labels, student; with I3CL_LOG=json as one line for each."""
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
    text = f"pseudo labels: {labels['instances']} instances on {labels['images']} images, mean weight {labels['mean_weight']:.2f}"
    observe.say(text, **{key: labels[key] for key in ("instances", "images", "mean_weight")})
    observe.say(summary["verdict"], **summary.get("student_minus_control", {}))

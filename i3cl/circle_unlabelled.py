"""Self-training on photographs of which not one is labelled: members -> agreement -> pseudo labels -> student, round after round.

There is no truth to choose thresholds or checkpoints by. What the members' scores mean is learned from how often they confirm
each other (label.agreement), and the student's last checkpoint counts. How good it is, agreement cannot say: a page of images to
check by eye yields an honest estimate (`i3cl label checked`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import numpy as np

from i3cl import observe, storage
from i3cl.circle import Stages, brief, student_in_round
from i3cl.claims import claim_run, recorded
from i3cl.config import MemberSettings, Settings, with_overrides
from i3cl.data.formats.predictions import member_predictions
from i3cl.data.formats.records import Dataset
from i3cl.data.loading.ingest import read_source
from i3cl.errors import UserError
from i3cl.inference.recipe import AS_TRAINED
from i3cl.labelling.label import PseudoLabels, label_images, unlabelled_images
from i3cl.labelling.predict import predict
from i3cl.labelling.pseudo import with_pseudo_labels
from i3cl.labelling.scoring import gain, score_checkpoints
from i3cl.report.check import write_check_page
from i3cl.training.launch import TrainResult, train_all

_CHECKED = 50
"""Images of the page that a person checks, at most a quarter of all. Nothing learns from them: F on images whose pseudo labels a
student has learned would be too high."""
_START = "start"
"""Name of the detector that the student began from, in the comparison."""


def selftrain_without_labels(settings: Settings) -> dict[str, Any]:
    """The circle in <storage>/<name>/; returns what summary.json holds. The same call continues a run that was stopped.

    UserError without selftrain.members or label.source, and as `predict` and `train_all`.
    """
    circle = settings.selftrain
    if circle.teachers:
        raise UserError("data.train: names no labelled set, so selftrain.teachers have nothing to learn from; leave them out")
    if not circle.members:
        raise UserError(
            "selftrain.members: names no detector, and data.train no labelled set; add selftrain.members.NAME=CHECKPOINT "
            "(lite0-scene comes with the package) or .use=ppocr"
        )
    run = storage.join(storage.absolute(settings.storage), settings.name)
    stages = Stages(run)
    images, checked = _apart(unlabelled_images(settings))
    once = settings.model_copy(update={"selftrain": circle.model_copy(update={"rounds": 1})})
    claim_run(run, once, ("model", "data", "train", "label", "evaluate", "selftrain"))

    members: dict[str, str | MemberSettings] = dict(circle.members)
    rounds: list[dict[str, Any]] = []
    student: TrainResult | None = None
    earlier: str | None = None
    for number in range(1, circle.rounds + 1):
        if student is not None:
            members[student_in_round(circle.student.name, number)] = student.checkpoint
        folder = run if number == 1 else storage.join(run, f"round-{number}")
        text = "" if number == 1 else f"round {number}: "
        with stages(f"{text}labels"):
            labels = label_images(images, members, settings, folder, f"{text}labels", given=AS_TRAINED, earlier=earlier)
            labels.say()
        earlier = folder
        with stages(f"{text}student"):
            student = train_all([_student(settings, folder, labels, student)])[0]
        rounds.append({"labels": labels.counts, "student": student.checkpoint, "pseudo_labels": labels.path})
    assert student is not None

    summary: dict[str, Any] = {"rounds": rounds, "student": student.checkpoint}
    with stages("what the student finds"):
        own = settings.model_copy(update={"label": settings.label.model_copy(update={"views": settings.label.views[:1]})})
        out = storage.join(run, "predictions", "checked")
        name = circle.student.name
        title = "images to check"
        predict(checked, {name: student.checkpoint}, own, out, title, AS_TRAINED)
        page = storage.join(run, "check.html")
        write_check_page(page, checked, member_predictions(out, name), f"Is this right? {settings.name}", settings.data.upright)
        summary["check_page"] = page
    if settings.data.validation is not None:
        with stages("evaluation"):
            summary |= _measured(settings, run, student)
    shown: dict[str, str] = {"student": student.checkpoint, "pseudo labels": rounds[-1]["pseudo_labels"]}
    shown |= {} if not images.annotations else {"unlabelled images": images.annotations}
    summary["made_from"] = {role: recorded(path) for role, path in shown.items()}
    summary["verdict"] = _verdict(summary)
    summary["seconds"] = stages.seconds
    storage.write_text_atomic(storage.join(run, "summary.json"), json.dumps(summary, indent=1) + "\n")
    return summary


def _student(settings: Settings, folder: str, labels: PseudoLabels, before: TrainResult | None) -> Settings:
    """The student's settings: pseudo labels alone, on the recipe's weights or those of the student of the round before."""
    student = settings.selftrain.student
    changes: dict[str, Any] = {
        **student.overrides,
        "storage": folder,
        "name": student.name,
        "data.train": with_pseudo_labels(settings, labels.path, labels.images_root),
        # Nobody knows the truth: the last checkpoint counts.
        "data.validation": None,
    }
    if before is not None:
        changes["train.start_from"] = before.checkpoint
    return with_overrides(settings, changes, f"selftrain, overrides of {student.name}")


def _apart(images: Dataset) -> tuple[Dataset, Dataset]:
    """The images to learn from, and those to check: drawn by chance but always the same, and not learned from."""
    count = min(_CHECKED, len(images) // 4)
    order = np.random.default_rng(len(images)).permutation(len(images))
    kept, drawn = np.sort(order[count:]), np.sort(order[:count])
    return images.subset(kept, images.name), images.subset(drawn, f"{count} images of {images.name}")


def _measured(settings: Settings, run: str, student: TrainResult) -> dict[str, Any]:
    """Student, start and their difference on data.validation, whose truth nothing else has used."""
    assert settings.data.validation is not None
    truth = read_source(settings.data.validation, settings.data_root, settings.data.skip_bad)
    models = {settings.selftrain.student.name: student.checkpoint}
    if settings.train.start_from:
        models[_START] = settings.train.start_from
    scores = score_checkpoints(truth, models, settings, storage.join(run, "predictions", "validation"), "evaluation", AS_TRAINED)
    result: dict[str, Any] = {"measured": {name: brief(each.score) for name, each in scores.members.items()}}
    if _START in models:
        found = gain(truth, (scores, settings.selftrain.student.name), (scores, _START), settings.evaluate)
        result["student_minus_start"] = {key: round(value, 4) for key, value in asdict(found).items()}
    return result


def _verdict(summary: Mapping[str, Any]) -> str:
    """What is known of the student, and what is not."""
    difference = summary.get("student_minus_start")
    if difference is not None:
        points = [100 * difference[key] for key in ("difference", "low", "high")]
        return (
            f"Student minus start: {points[0]:+.1f} points of F, 95 % interval {points[1]:+.1f} to {points[2]:+.1f}, "
            "on data.validation, whose truth was used for nothing else."
        )
    return (
        "How good the student is cannot be said without truth: members that agree may err together. Check the images of "
        f"{summary['check_page']} by eye and give its answers to `i3cl label checked`; that yields an estimate with an interval."
    )


def print_summary(summary: Mapping[str, Any]) -> None:
    """Show the result of `selftrain_without_labels`."""
    for number, each in enumerate(summary["rounds"], 1):
        observe.say(f"round {number}: {each['labels']['instances']} labels, student {each['student']}")
    for name, row in summary.get("measured", {}).items():
        observe.say(f"{name}: R {row['recall']:.3f}  P {row['precision']:.3f}  F {row['hmean']:.3f}", **row)
    observe.say(summary["verdict"])
    observe.say(f"images to check: {summary['check_page']}")

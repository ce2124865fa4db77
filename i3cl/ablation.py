"""What each part of the network and of the training brings: variants of one recipe, several seeds each, one table.

All variants start from the same initial weights and train the same number of steps on the same data. The last checkpoint counts,
so that no variant is chosen on the images that it is measured on.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from statistics import mean, stdev
from typing import Any

from i3cl import storage
from i3cl.circle import use_synthetic
from i3cl.config import Settings, with_overrides
from i3cl.data.formats.predictions import member_predictions
from i3cl.data.loading.ingest import read_source
from i3cl.errors import UserError
from i3cl.evaluation.metrics.model_score import score_predictions
from i3cl.labelling.predict import predict
from i3cl.labelling.pseudo import make_pseudo_labels, with_pseudo_labels
from i3cl.training.launch import claim, train_all

COLUMNS = ("recall", "precision", "hmean", "hmean_large")


def ablation(variants: Mapping[str, Settings], seeds: Sequence[int]) -> dict[str, Any]:
    """Train every variant with every seed in <storage>/<name>/VARIANT-SEED, measure it, and write ablation.json and .txt.

    variants: the first is the baseline, whose name, storage, validation and unlabelled images count for all. A variant whose
    selftrain.teachers names another one learns from that one's pseudo labels of the same seed too. Returns what the json holds:
    for each variant the runs' scores and their mean and standard deviation. What is done already is not done again.
    UserError for missing data sets and for a teacher that is no variant, or a student itself.
    """
    base = next(iter(variants.values()))
    run = storage.join(storage.absolute(base.storage), base.name)
    if base.synthetic is not None:
        variants = {name: use_synthetic(settings, storage.join(run, "data")) for name, settings in variants.items()}
        base = next(iter(variants.values()))
    if base.data.validation is None:
        raise UserError("data.validation: names no data set; the variants are compared on it")
    teacher_of = {name: _teacher(name, variants) for name, settings in variants.items() if settings.selftrain.teachers}
    validation = read_source(base.data.validation, base.data_root, base.data.skip_bad)

    for name, settings in variants.items():
        claim(storage.join(run, name), settings, ("synthetic", "data", "label", "selftrain"))

    def run_of(name: str, seed: int, changes: dict[str, Any]) -> Settings:
        own = {"storage": run, "name": f"{name}-{seed}", "train.seed": seed, "data.validation": None}
        return with_overrides(variants[name], {**own, **changes}, name)

    runs = {(name, seed): run_of(name, seed, {}) for name in variants if name not in teacher_of for seed in seeds}
    results = dict(zip(runs, train_all(list(runs.values())), strict=True))
    students = {}
    for name, teacher in teacher_of.items():
        for seed in seeds:
            sources = _with_pseudo_labels(variants[name], run, f"{teacher}-{seed}", results[teacher, seed].checkpoint)
            students[name, seed] = run_of(name, seed, {"data.train": sources})
    results |= zip(students, train_all(list(students.values())), strict=True)

    scores: dict[str, list[dict[str, Any]]] = {name: [] for name in variants}
    for seed in seeds:
        members = {name: results[name, seed].checkpoint for name in variants}
        out = storage.join(run, "predictions", f"validation-{seed}")
        found = predict(validation, members, base, out, f"evaluation, seed {seed}")
        for name in variants:
            score = score_predictions(name, validation.records, member_predictions(found, name), base.evaluate).score
            scores[name].append({"seed": seed, **{k: v for k, v in asdict(score).items() if k != "name"}})
    summary = {
        "steps": base.train.steps,
        "images": len(validation.records),
        "variants": {name: {**_spread(rows), "runs": rows} for name, rows in scores.items()},
    }
    storage.write_text_atomic(storage.join(run, "ablation.json"), json.dumps(summary, indent=1) + "\n")
    storage.write_text_atomic(storage.join(run, "ablation.txt"), table(summary))
    return summary


def table(summary: Mapping[str, Any]) -> str:
    """The summary as lines of text: a variant a line, mean ± standard deviation over its seeds in per cent."""
    names = {"recall": "recall", "precision": "precision", "hmean": "F", "hmean_large": "F, large"}
    width = max(map(len, summary["variants"]))
    lines = [" " * width + "".join(f"{names[column]:>14}" for column in COLUMNS)]
    for name, row in summary["variants"].items():
        cells = [f"{100 * row[column]['mean']:.1f} ± {100 * row[column]['std']:.1f}" for column in COLUMNS]
        lines.append(f"{name:{width}}" + "".join(f"{cell:>14}" for cell in cells))
    rows = next(iter(summary["variants"].values()))["runs"]
    seeds = ", ".join(str(row["seed"]) for row in rows)
    lines.append(f"{summary['steps']} steps each; seeds {seeds}; {summary['images']} images; {rows[0]['rules']}")
    return "\n".join(lines) + "\n"


def _teacher(name: str, variants: Mapping[str, Settings]) -> str:
    teacher = variants[name].selftrain.teachers[0].name
    if teacher not in variants or variants[teacher].selftrain.teachers:
        plain = [other for other, settings in variants.items() if not settings.selftrain.teachers]
        raise UserError(f"{name}: selftrain.teachers: {teacher} is no variant without a teacher; there are {', '.join(plain)}")
    return teacher


def _with_pseudo_labels(student: Settings, run: str, teacher: str, checkpoint: str) -> list[dict[str, Any]]:
    """The student's sources and the pseudo labels that one teacher makes of the unlabelled images, once."""
    if student.label.source is None:
        raise UserError("label.source: names no unlabelled images; add {annotations: …, images: …}")
    unlabelled = read_source(student.label.source, student.data_root, student.data.skip_bad)
    found = predict(unlabelled, {teacher: checkpoint}, student, storage.join(run, "predictions", teacher), f"labels of {teacher}")
    pseudo = storage.join(run, f"pseudo-{teacher}.json")
    counts = make_pseudo_labels(found, student.label, pseudo)
    if not counts["instances"]:
        raise UserError(f"label.select: no prediction of {teacher} passed the thresholds; lower label.select.low or train longer")
    return with_pseudo_labels(student, pseudo, unlabelled.images_root)


def _spread(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """Mean and sample standard deviation (0 for a single seed) of each column."""
    columns = {column: [row[column] for row in rows] for column in COLUMNS}
    return {c: {"mean": mean(values), "std": stdev(values) if len(values) > 1 else 0.0} for c, values in columns.items()}

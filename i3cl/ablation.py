"""What each part of the network and of the training gains: variants of one recipe, several seeds each, one table.

All variants start from the same initial weights and train for the same number of steps on the same data. The last checkpoint
counts, so that no variant is chosen on the images on which it is scored.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from statistics import mean, stdev
from typing import Any

from i3cl import storage
from i3cl.claims import claim_run
from i3cl.config import Settings, with_overrides
from i3cl.data.loading.ingest import read_source
from i3cl.data.synthetic.recipe import use_synthetic
from i3cl.errors import UserError
from i3cl.inference.recipe import AS_TRAINED
from i3cl.labelling.label import label_images, unlabelled_images
from i3cl.labelling.pseudo import with_pseudo_labels
from i3cl.labelling.scoring import score_checkpoints
from i3cl.training.launch import train_all

COLUMNS = ("recall", "precision", "hmean", "hmean_large")


def ablation(variants: Mapping[str, Settings], seeds: Sequence[int]) -> dict[str, Any]:
    """Train every variant with every seed, score them all, and write ablation.json and ablation.txt.

    The runs are in <storage>/<name>/VARIANT-SEED. What is done already is not done again.

    Args:
        variants: The first is the baseline; its name, storage, validation and unlabelled images count for all. A variant whose
            selftrain.teachers names another variant learns also from that one's pseudo labels of the same seed.
        seeds: Of train.seed.

    Returns:
        What the json holds: for each variant the scores of its runs, and their mean and standard deviation.

    Raises:
        UserError: A data set is missing, or a teacher is not a variant or is itself pseudo-labelled.
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
        claim_run(storage.join(run, name), settings, ("synthetic", "data", "label", "selftrain"))

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
        found = score_checkpoints(validation, members, base, out, f"evaluation, seed {seed}", AS_TRAINED).members
        for name in variants:
            scores[name].append({"seed": seed, **{k: v for k, v in asdict(found[name].score).items() if k != "name"}})
    summary = {
        "steps": base.train.steps,
        "images": len(validation.records),
        "variants": {name: {**_spread(rows), "runs": rows} for name, rows in scores.items()},
    }
    storage.write_text_atomic(storage.join(run, "ablation.json"), json.dumps(summary, indent=1) + "\n")
    storage.write_text_atomic(storage.join(run, "ablation.txt"), table(summary))
    return summary


def table(summary: Mapping[str, Any]) -> str:
    """The summary as text: one line for each variant, mean ± standard deviation over its seeds in per cent."""
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
        raise UserError(
            f"{name}: selftrain.teachers: {teacher} must name a variant that is not itself pseudo-labelled; available: "
            f"{', '.join(plain)}"
        )
    return teacher


def _with_pseudo_labels(student: Settings, run: str, teacher: str, checkpoint: str) -> list[dict[str, Any]]:
    """The student's data.train: its own sources and the pseudo labels that one teacher makes of the unlabelled images, once."""
    labels = label_images(
        unlabelled_images(student),
        {teacher: checkpoint},
        student,
        run,
        f"labels of {teacher}",
        part=teacher,
        name=f"pseudo-{teacher}",
        given=AS_TRAINED,
    )
    return with_pseudo_labels(student, labels.path, labels.images_root)


def _spread(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """Mean and sample standard deviation (0 for a single seed) of each column."""
    columns = {column: [row[column] for row in rows] for column in COLUMNS}
    return {c: {"mean": mean(values), "std": stdev(values) if len(values) > 1 else 0.0} for c, values in columns.items()}

"""A study: arms x seeds from one recipe, measured on the same images, with paired intervals of their differences.

The arms, their training sets and thresholds stand in the recipe before the run (`study` in the settings). Every training, every
set of labels and every prediction is done once; the same command continues a study that was stopped.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import mean, stdev
from typing import Any

import numpy as np

from i3cl import storage
from i3cl.claims import claim_run, recorded
from i3cl.config import ArmSettings, MemberSettings, Settings, SourceSettings, with_overrides
from i3cl.data.formats.coco import read_coco, write_coco
from i3cl.data.formats.predictions import member_predictions
from i3cl.data.formats.records import Dataset, ImageRecord
from i3cl.data.loading.ingest import read_source
from i3cl.data.synthetic.recipe import use_synthetic
from i3cl.errors import UserError
from i3cl.evaluation.analysis.intervals import Rows, seeds_difference
from i3cl.evaluation.metrics.metric import Counts, DetectionMetric
from i3cl.evaluation.metrics.model_score import image_of_record
from i3cl.evaluation.metrics.protocols import iou_rules
from i3cl.inference.recipe import AS_TRAINED
from i3cl.labelling.label import PseudoLabels, label_images, unlabelled_images
from i3cl.labelling.scoring import Scores, score_checkpoints, score_labels
from i3cl.training.launch import TrainResult, train_all

logger = logging.getLogger(__name__)

COLUMNS = {"recall": "recall", "precision": "precision", "hmean": "F", "hmean_large": "F, large"}
"""Numbers of a run -> heading in the table."""


@dataclass(frozen=True)
class Part:
    """The data of one seed."""

    labelled: list[dict[str, Any]]
    """Entries of data.train whose labels are known."""
    unlabelled: SourceSettings | None
    """Images without labels."""
    hidden: SourceSettings | None
    """True labels of the images of data.train that are among the unlabelled ones; None: nothing is hidden."""


def study(settings: Settings) -> dict[str, Any]:
    """Train every arm with every seed in <storage>/<name>/seed-SEED/ARM, measure all, and write study.json and study.txt.

    Returns:
        What study.json holds: `arms` (name -> mean and standard deviation of recall, precision, hmean and hmean_large, and the
        runs), `comparisons` (a, b, difference of F, low and high of its 95 % interval, one difference per seed) and `labels`.

    Raises:
        UserError: Arms or data sets are missing, or the folder holds another study.
    """
    if not settings.study.arms:
        raise UserError("study.arms: names no arm; see configs/study/")
    run = storage.join(storage.absolute(settings.storage), settings.name)
    if settings.synthetic is not None:
        settings = use_synthetic(settings, storage.join(run, "data"))
    if settings.data.validation is None:
        raise UserError("data.validation: names no data set; the arms' thresholds are chosen on it")
    # More seeds may join later; arms may not.
    sections = ("synthetic", "model", "data", "train", "label", "evaluate", "study")
    claim_run(run, settings, sections, free=[("study", "seeds")])
    validation = read_source(settings.data.validation, settings.data_root, settings.data.skip_bad)
    parts, test = _split(settings, run)

    results: dict[tuple[str, int], TrainResult] = {}
    labels: dict[tuple[str, int], PseudoLabels] = {}
    arms = list(settings.study.arms.items())
    while arms:
        # All arms that wait for nothing are trained side by side, for all seeds.
        ready = [(name, arm) for name, arm in arms if all((other, s) in results for other in _needs(arm) for s in parts)]
        arms = [item for item in arms if item not in ready]
        runs = {}
        for name, arm in ready:
            for seed, part in parts.items():
                if arm.labels_from or arm.members:
                    members = {other: results[other, seed].checkpoint for other in arm.labels_from} | arm.members
                    labels[name, seed] = _label(settings, run, name, arm, seed, part, members)
                runs[name, seed] = _training(settings, run, name, arm, seed, part, results, labels.get((name, seed)))
        results |= zip(runs, train_all(list(runs.values())), strict=True)

    scored = {seed: _score(settings, run, seed, results, validation, test) for seed in parts}
    shown = {f"checkpoint {name}, seed {seed}": result.checkpoint for (name, seed), result in results.items()}
    shown |= {f"pseudo labels of {name}, seed {seed}": made.path for (name, seed), made in labels.items()}
    shown |= {"validation images": validation.annotations} | ({} if test is None else {"test images": test.annotations})
    summary = {
        "images": len(validation if test is None else test),
        "steps": settings.train.steps,
        "arms": {name: _spread([scored[seed][name].row for seed in parts]) for name in settings.study.arms},
        "comparisons": [_comparison(a, b, scored) for a, b in settings.study.compare],
        "labels": _label_rows(settings, labels, parts),
        "made_from": {role: recorded(path) for role, path in shown.items()},
    }
    storage.write_text_atomic(storage.join(run, "study.json"), json.dumps(summary, indent=1) + "\n")
    storage.write_text_atomic(storage.join(run, "study.txt"), table(summary))
    return summary


def table(summary: Mapping[str, Any]) -> str:
    """The summary as lines of text: one line per arm, mean ± standard deviation over its seeds in per cent, then differences."""
    width = max(map(len, summary["arms"]))
    lines = [" " * width + "".join(f"{heading:>14}" for heading in COLUMNS.values())]
    for name, row in summary["arms"].items():
        cells = [f"{100 * row[column]['mean']:.1f} ± {100 * row[column]['std']:.1f}" for column in COLUMNS]
        lines.append(f"{name:{width}}" + "".join(f"{cell:>14}" for cell in cells))
    for row in summary["comparisons"]:
        each = ", ".join(f"{100 * value:+.1f}" for value in row["per_seed"])
        lines.append(
            f"{row['a']} - {row['b']}: {100 * row['difference']:+.1f} points of F, 95 % interval "
            f"{100 * row['low']:+.1f} to {100 * row['high']:+.1f} (per seed {each})"
        )
    runs = next(iter(summary["arms"].values()))["runs"]
    seeds = ", ".join(str(row["seed"]) for row in runs)
    lines.append(f"seeds {seeds}; {summary['images']} images; {runs[0]['rules']}")
    return "\n".join(lines) + "\n"


@dataclass(frozen=True)
class _Scored:
    """One arm with one seed."""

    row: dict[str, Any]
    counts: Counts


def _needs(arm: ArmSettings) -> list[str]:
    return [*([arm.start_from] if arm.start_from else []), *arm.labels_from]


def _split(settings: Settings, run: str) -> tuple[dict[int, Part], Dataset | None]:
    """The data of every seed, and the test set; None: data.validation is the test set."""
    wanted, train = settings.study, settings.data.train
    if wanted.labelled is None and not wanted.test:
        part = Part([source.model_dump() for source in train], settings.label.source, None)
        return dict.fromkeys(wanted.seeds, part), None
    if len(train) != 1:
        raise UserError(f"data.train: names {len(train)} data sets; a study that splits needs exactly one")
    source = train[0]
    # By file name, so that the split does not depend on the order of the annotation file.
    records = sorted(read_source(source, settings.data_root, settings.data.skip_bad).records, key=lambda r: r.file_name)
    if len(records) <= wanted.test + (wanted.labelled or 0):
        raise UserError(f"study.labelled, study.test: together {wanted.test + (wanted.labelled or 0)} of {len(records)} images")
    order = np.random.default_rng([wanted.split_seed, 1]).permutation(len(records))
    images = storage.absolute(storage.join(settings.data_root, source.images))
    test = None
    if wanted.test:
        path = storage.join(run, "test.json")
        _write_once(path, [records[i] for i in sorted(order[: wanted.test])])
        test = read_coco(path, images)
    pool, known = order[wanted.test :], {storage.join(source.images, record.file_name) for record in records}
    parts = {seed: _seed_part(settings, run, seed, [records[i] for i in pool], images, known) for seed in wanted.seeds}
    return parts, test


def _seed_part(settings: Settings, run: str, seed: int, pool: Sequence[ImageRecord], images: str, known: set[str]) -> Part:
    """Draw the labelled images of a seed; the others lose their labels and join the images of label.source.

    known: file names, from data_root on, of all images of data.train; label.source may hold them too, but test images must not be
    labelled and none may be there twice.
    """
    source, folder = settings.data.train[0], storage.join(run, f"seed-{seed}")
    count = settings.study.labelled or len(pool)
    order = np.random.default_rng([seed, 2]).permutation(len(pool))
    labelled, hidden = ([pool[i] for i in sorted(chosen)] for chosen in (order[:count], order[count:]))
    _write_once(storage.join(folder, "labelled.json"), labelled)
    kept = source.model_dump() | {"annotations": storage.join(folder, "labelled.json"), "images": images}
    if not hidden:
        return Part([kept], settings.label.source, None)
    # One set has one images root: file names are given from data_root on, and ids are numbered again.
    root = storage.absolute(settings.data_root)
    truth = [(source.images, record) for record in hidden]
    others: list[tuple[str, ImageRecord]] = []
    if settings.label.source is not None:
        folder_name = settings.label.source.images
        own = unlabelled_images(settings).records
        others = [(folder_name, record) for record in own if storage.join(folder_name, record.file_name) not in known]
    records = []
    for number, (folder_name, record) in enumerate([*truth, *others], 1):
        name = storage.join(folder_name, record.file_name)
        if "://" in name or name.startswith("/") or ".." in name.split("/"):
            raise UserError(f"{folder_name}: a study that hides labels needs image folders below data_root")
        records.append(ImageRecord(number, name, record.height, record.width, record.instances if number <= len(truth) else ()))
    _write_once(storage.join(folder, "hidden.json"), records[: len(truth)])
    _write_once(storage.join(folder, "unlabelled.json"), [ImageRecord(r.id, r.file_name, r.height, r.width) for r in records])
    return Part(
        [kept],
        SourceSettings(annotations=storage.join(folder, "unlabelled.json"), images=root),
        SourceSettings(annotations=storage.join(folder, "hidden.json"), images=root),
    )


def _write_once(path: str, records: Sequence[ImageRecord]) -> None:
    # A file that is written again would look like other labels to the trainings that have read it.
    if not storage.is_file(path):
        write_coco(path, records)


def _arm(settings: Settings, name: str, arm: ArmSettings, changes: Mapping[str, Any]) -> Settings:
    return with_overrides(settings, {**arm.overrides, **changes}, f"study.arms.{name}.overrides")


def _label(
    settings: Settings, run: str, name: str, arm: ArmSettings, seed: int, part: Part, members: Mapping[str, str | MemberSettings]
) -> PseudoLabels:
    """The pseudo labels that an arm learns from, made once."""
    if part.unlabelled is None:
        raise UserError(f"study.arms.{name}.labels_from: there are no unlabelled images; set label.source or study.labelled")
    own = _arm(settings, name, arm, {"label.source": part.unlabelled.model_dump()})
    folder = storage.join(run, f"seed-{seed}")
    title = f"labels for {name}, seed {seed}"
    predictions = "unlabelled-" + "-".join(members)
    return label_images(
        unlabelled_images(own), members, own, folder, title, part=predictions, name=f"pseudo-{name}", given=AS_TRAINED
    )


def _training(
    settings: Settings,
    run: str,
    name: str,
    arm: ArmSettings,
    seed: int,
    part: Part,
    results: Mapping[tuple[str, int], TrainResult],
    labels: PseudoLabels | None,
) -> Settings:
    sources: list[dict[str, Any]] = []
    for chosen in arm.train:
        options = chosen.model_dump(exclude={"use"})
        if chosen.use == "labelled":
            # The share in the mixture is the arm's; all else of the recipe's sources stays.
            sources += [source | options | {"weight": source["weight"] * chosen.weight} for source in part.labelled]
        elif chosen.use == "pseudo":
            assert labels is not None
            sources.append({"annotations": labels.path, "images": labels.images_root, **options})
        else:
            assert part.hidden is not None
            sources.append(part.hidden.model_dump() | options)
    changes: dict[str, Any] = {
        "storage": storage.join(run, f"seed-{seed}"),
        "name": name,
        "train.seed": settings.train.seed + 1000 * seed + list(settings.study.arms).index(name),
        "data.train": sources,
        # The last checkpoint counts, so that no arm is chosen on the images that its threshold comes from.
        "data.validation": None,
    }
    if arm.start_from:
        changes["train.start_from"] = results[arm.start_from, seed].checkpoint
    return _arm(settings, name, arm, changes)


def _score(
    settings: Settings,
    run: str,
    seed: int,
    results: Mapping[tuple[str, int], TrainResult],
    validation: Dataset,
    test: Dataset | None,
) -> dict[str, _Scored]:
    members = {name: results[name, seed].checkpoint for name in settings.study.arms}
    folder = storage.join(run, f"seed-{seed}", "predictions")
    out = storage.join(folder, "validation")
    chosen = score_checkpoints(validation, members, settings, out, f"validation, seed {seed}", AS_TRAINED)
    measured, data = chosen, validation
    if test is not None:
        out = storage.join(folder, "test")
        measured, data = score_checkpoints(test, members, settings, out, f"test, seed {seed}", AS_TRAINED), test
    return {
        name: _scored(name, seed, chosen.members[name].score.threshold, measured, data, settings, checkpoint)
        for name, checkpoint in members.items()
    }


def _scored(
    name: str, seed: int, threshold: float, measured: Scores, data: Dataset, settings: Settings, checkpoint: str
) -> _Scored:
    found = member_predictions(measured.predictions, name)
    metric = DetectionMetric(iou_rules(settings.evaluate.iou, settings.evaluate.matching))
    metric.update([image_of_record(record, *found.get(record.id, ((), np.zeros(0)))) for record in data.records])
    counts = metric.counts(threshold)
    score = counts.summary("chosen on the validation images")
    row = {
        "seed": seed,
        "recall": score.recall,
        "precision": score.precision,
        "hmean": score.hmean,
        "hmean_large": measured.members[name].score.hmean_large,
        "threshold": threshold,
        "rules": score.rules.rpartition("; score")[0],
        "checkpoint": checkpoint,
    }
    return _Scored(row, counts)


def _spread(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Mean and sample standard deviation (0 for a single seed) of each column, and the rows."""
    columns = {column: [row[column] for row in rows] for column in COLUMNS}
    spread = {c: {"mean": mean(values), "std": stdev(values) if len(values) > 1 else 0.0} for c, values in columns.items()}
    return {**spread, "runs": list(rows)}


def _comparison(a: str, b: str, scored: Mapping[int, Mapping[str, _Scored]]) -> dict[str, Any]:
    rows: dict[str, list[Rows]] = {name: [each[name].counts.ratios for each in scored.values()] for name in (a, b)}
    difference, interval = seeds_difference(rows[a], rows[b])
    per_seed = [each[a].row["hmean"] - each[b].row["hmean"] for each in scored.values()]
    return {"a": a, "b": b, "difference": difference, **asdict(interval), "per_seed": per_seed}


def _label_rows(
    settings: Settings, labels: Mapping[tuple[str, int], PseudoLabels], parts: Mapping[int, Part]
) -> list[dict[str, Any]]:
    """How many pseudo labels each arm got and, where the true labels are hidden, how right they are."""
    rows = []
    for (name, seed), made in labels.items():
        row: dict[str, Any] = {"arm": name, "seed": seed, **made.counts}
        hidden = parts[seed].hidden
        if hidden is not None:
            truth = read_source(hidden, settings.data_root, settings.data.skip_bad)
            score = score_labels(name, truth, read_coco(made.path, made.images_root), settings.evaluate).score
            row |= {key: getattr(score, key) for key in ("recall", "precision", "hmean")}
        rows.append(row)
    return rows

"""An evaluation from its options to what is printed and written. Nothing here prints: the command line does."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from i3cl.errors import UserError
from i3cl.evaluation import outcome, scoring
from i3cl.evaluation.analysis.advice import diagnose
from i3cl.evaluation.formats.files import is_table
from i3cl.evaluation.formats.pairing import Paired
from i3cl.evaluation.formats.read import read_results, read_truth
from i3cl.evaluation.formats.sets import ImageDetections, ImageTruth, PointOrder, PolygonSet
from i3cl.evaluation.metrics.batch import EvalImage, Repair
from i3cl.evaluation.metrics.deteval import Merge
from i3cl.evaluation.metrics.matching import Matching
from i3cl.evaluation.metrics.protocols import AP_PROTOCOLS, Rules, rules_of
from i3cl.evaluation.scoring import Scored


@dataclass(frozen=True)
class Options:
    """What `jobs/evaluate.py` can be told about files; every field is the option of that name."""

    truth: str
    results: str
    protocol: str = "icdar"
    against: str | None = None
    member: str | None = None
    truth_format: str | None = None
    truth_split: str = "test"
    point_order: PointOrder = "xy"
    threshold: float | None = None
    choose_threshold_on: Sequence[str] | None = None
    sweep: bool = False
    details: bool = False
    diagnose: bool = False
    iou: float | None = None
    matching: Matching | None = None
    tr: float | None = None
    tp: float | None = None
    merge: Merge | None = None
    repair: Repair | None = None
    pre_steps: Literal["none", "adelaidet"] = "none"
    max_detections: int | None = None
    report: bool = False
    """A page will be written, which needs the details."""
    skip_bad: bool = False


@dataclass(eq=False)
class Evaluation:
    """What came out."""

    lines: list[str] = field(default_factory=list)
    """For people."""
    warnings: list[str] = field(default_factory=list)
    values: dict[str, Any] = field(default_factory=dict)
    """Everything, for JSON."""
    scored: Scored | None = None
    """None for average precision and over Ray."""
    rival: Scored | None = None
    """The score of `Options.against`."""


def evaluate_files(options: Options) -> Evaluation:
    """Scores results against truth by a protocol. UserError for everything that the user can correct."""
    _check(options)
    if options.protocol in AP_PROTOCOLS:
        return _average_precision(options)
    rules = _rules(options)
    truths = read_truth(
        options.truth,
        format_name=options.truth_format,
        split=options.truth_split,
        skip_bad=options.skip_bad,
        hash_is_dont_care=rules[0].hash_is_dont_care,
    )
    result = Evaluation()
    results = _results(options.results, options)
    result.lines += _formats(truths, results)
    paired, result.warnings = scoring.combine(truths, results)
    other = None
    if options.against:
        other, more = scoring.combine(truths, _results(options.against, options))
        result.warnings += more
    if options.pre_steps == "adelaidet":
        paired, other = _prepared(paired, result), _prepared(other, result) if other else None

    chosen = _threshold(paired, other, rules, options, result)
    scored = scoring.score(chosen.images, rules, chosen.threshold, chosen.choice)
    result.scored = scored
    names = {image.name for image in chosen.images}
    missing = sum(name in names for name in paired.missing)
    result.lines += outcome.lines(scored)
    result.values = outcome.as_json(scored, missing, result.warnings)
    result.values |= {"truth": options.truth, "results": options.results}
    result.values |= {"truth_format": truths.format, "results_format": results.format}

    if options.sweep:
        rows = result.values["sweep"] = scoring.sweep(scored.batch, rules[0])
        result.lines.append("threshold  R       P       F       (a threshold chosen here is chosen on the scored images)")
        for row in rows[::5]:
            result.lines.append(f"{row['threshold']:9.2f}  {row['recall']:.4f}  {row['precision']:.4f}  {row['hmean']:.4f}")
    if options.details or options.report:
        result.values |= outcome.details(scored)
    if options.details:
        result.lines += outcome.detail_lines(result.values)
    advice = diagnose(chosen.images, rules[0], chosen.threshold) if options.diagnose else scoring.advice(scored)
    result.values["advice"] = [vars(a) for a in advice]
    result.lines += [f"advice: {each.text}" for each in advice]

    if chosen.rivals is not None:
        rival = result.rival = scoring.score(chosen.rivals, rules, chosen.threshold, chosen.choice)
        compared = outcome.against_json(scored, rival)
        result.values["against"] = {"results": options.against, **compared, "b": outcome.as_json(rival)}
        result.lines += [f"against {options.against}:", *(f"  {line}" for line in outcome.lines(rival))]
        result.lines += outcome.against_lines(compared)
    return result


def evaluate_over_ray(options: Options, progress: Callable[[int, int], None] | None = None) -> Evaluation:
    """As `evaluate_files`, for Parquet of any size; counts only. Ray must be connected.

    Results that are not Parquet are read in this process. progress: called with the parts done and all parts.
    """
    from i3cl.evaluation.shards import count_all

    check_over_ray(options)
    rules = _rules(options)
    results = options.results if is_table(options.results) else _results(options.results, options)
    summaries, missing, warnings = count_all(options.truth, results, options.member, rules, options.threshold, progress)
    first = summaries[0]
    result = Evaluation(warnings=warnings)
    result.lines = [f"{each.name}, {each.label}: {outcome.numbers(s)}" for each, s in zip(rules, summaries)]
    result.lines += [
        f"  rules: {rules[0].text}",
        f"  {first.images} images ({missing} without a result count as empty), {first.truths} truths, "
        f"{first.dont_cares} don't-care, {first.detections} detections kept, {first.dropped} dropped, "
        f"{first.repaired} polygons repaired",
    ]
    result.values = {"protocol": options.protocol, **outcome.summary_json(first, rules[0]), "missing_images": missing}
    result.values["variants"] = [
        {"name": each.label, **outcome.summary_json(s, each)} for each, s in zip(rules[1:], summaries[1:])
    ]
    result.values["warnings"] = warnings
    return result


def check_over_ray(options: Options) -> None:
    """UserError for options that --ray does not have and for a truth that is not Parquet, before Ray is started."""
    from i3cl.evaluation.shards import truth_shards

    _check(options)
    for option in ("report", "against", "choose_threshold_on", "sweep", "details", "diagnose"):
        if getattr(options, option):
            name = option.replace("_", "-")
            raise UserError(f"--ray: gives counts only and does not go with --{name}; leave one of the two out")
    # What only the reading of whole files does; left out without a word, the numbers would be others.
    if options.pre_steps != "none" or options.truth_format is not None or options.point_order != "xy":
        raise UserError("--ray: does not go with --pre-steps, --truth-format and --point-order; leave them or --ray out")
    if options.protocol in AP_PROTOCOLS:
        raise UserError(f"--ray: does not go with --protocol {options.protocol}; leave --ray out")
    if options.protocol == "mmocr" and options.threshold is None:
        raise UserError("--ray with mmocr: give --threshold; its sweep over the test images is not spread")
    _rules(options)
    truth_shards(options.truth)


def _check(options: Options) -> None:
    if options.threshold is not None and not 0 <= options.threshold <= 1:
        raise UserError(f"--threshold {options.threshold:g}: write a number from 0 to 1")


def _rules(options: Options) -> tuple[Rules, ...]:
    return rules_of(
        options.protocol,
        iou=options.iou,
        matching=options.matching,
        merge=options.merge,
        recall_threshold=options.tr,
        precision_threshold=options.tp,
        repair=options.repair,
    )


def _results(path: str, options: Options) -> PolygonSet[ImageDetections]:
    member = options.member if path == options.results else None
    return read_results(path, member=member, point_order=options.point_order, skip_bad=options.skip_bad)


def _formats(truths: PolygonSet[ImageTruth], results: PolygonSet[ImageDetections]) -> list[str]:
    """How both were understood: a wrong guess must be seen."""
    return [f"truth:   {truths.format}", f"results: {results.format}"]


def _prepared(paired: Paired, result: Evaluation) -> Paired:
    images, dropped = scoring.adelaidet_steps(paired.images)
    result.lines.append(
        f"pre-steps adelaidet: {dropped} detections with a score up to 0.1 or a self-intersecting ring left out; "
        "coordinates cut to whole pixels"
    )
    return replace(paired, images=images)


@dataclass(frozen=True)
class _Chosen:
    images: list[EvalImage]
    """Those to score."""
    rivals: list[EvalImage] | None
    threshold: float | None
    choice: str | None


def _threshold(paired: Paired, other: Paired | None, rules: tuple[Rules, ...], options: Options, result: Evaluation) -> _Chosen:
    """The images to score, and the score threshold with where it comes from."""
    images, rivals = paired.images, other.images if other else None
    part = options.choose_threshold_on
    if not part:
        return _Chosen(images, rivals, options.threshold, None)
    if options.threshold is not None:
        raise UserError("--threshold and --choose-threshold-on exclude each other; give one")
    if len(part) == 2:
        chosen_on, warnings = scoring.load(
            *part,
            truth_format=options.truth_format,
            truth_split=options.truth_split,
            member=options.member,
            point_order=options.point_order,
            skip_bad=options.skip_bad,
            hash_is_dont_care=rules[0].hash_is_dont_care,
        )
        result.warnings += warnings
        validation = chosen_on.images
        where = f"the {len(validation)} images of {part[0]}"
    elif len(part) == 1:
        validation, images = scoring.split_off(images, part[0])
        if rivals is not None:
            names = {image.name for image in images}
            rivals = [image for image in rivals if image.name in names]
        where = f"{len(validation)} images that are not scored here"
    else:
        raise UserError("--choose-threshold-on: give a share, a list file, or TRUTH RESULTS")
    threshold, hmean = scoring.best_threshold(validation, rules[0])
    return _Chosen(images, rivals, threshold, f"best F on {where}: {hmean:.4f} there")


def _average_precision(options: Options) -> Evaluation:
    if options.max_detections is not None and options.max_detections < 1:
        raise UserError(f"--max-detections {options.max_detections}: write a number from 1")
    truths = read_truth(options.truth, format_name=options.truth_format, split=options.truth_split, skip_bad=options.skip_bad)
    results = _results(options.results, options)
    paired, warnings = scoring.combine(truths, results)
    iou = 0.5 if options.iou is None else options.iou
    values = scoring.average_precision(paired, options.protocol, options.max_detections, iou)
    lines = _formats(truths, results)
    if options.protocol == "coco":
        for kind in ("mask", "bbox"):
            lines.append(f"coco, {kind}: " + "  ".join(f"{name} {value:.4f}" for name, value in values[kind].items()))
    else:
        lines.append(f"rctw: AP {values['AP']:.4f}")
    lines += [
        f"  rules: {values['rules']}",
        f"  {values['images']} images, {values['truths']} truths, {values['dont_cares']} don't-care, "
        f"{values['detections']} detections",
    ]
    return Evaluation(lines, warnings, values | {"warnings": warnings})

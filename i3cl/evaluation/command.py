"""The evaluate job: from its options to what it prints and writes."""

from __future__ import annotations

import argparse
import json
import sys
import time
from typing import Any

from i3cl import storage
from i3cl.config import Settings
from i3cl.errors import UserError
from i3cl.evaluation import run
from i3cl.evaluation.formats.read import Paired, read_results, read_truth
from i3cl.evaluation.metrics.protocols import AP_PROTOCOLS, Rules, rules_of


def evaluate_files(settings: Settings, options: argparse.Namespace) -> None:
    """Scores --results against --truth by --protocol. UserError for anything that the user can mend."""
    if options.threshold is not None and not 0 <= options.threshold <= 1:
        raise UserError(f"--threshold {options.threshold:g}: write a number from 0 to 1")
    if options.protocol in AP_PROTOCOLS:
        _average_precision(settings, options)
        return
    rules = rules_of(
        options.protocol,
        iou=options.iou,
        matching=options.matching,
        merge=options.merge,
        recall_threshold=options.tr,
        precision_threshold=options.tp,
        repair=options.repair,
    )
    if options.ray:
        _over_ray(options, rules)
        return

    truths = read_truth(
        options.truth,
        format_name=options.truth_format,
        split=options.truth_split,
        skip_bad=settings.data.skip_bad,
        hash_is_dont_care=rules[0].hash_is_dont_care,
    )
    paired, warnings = run.combine(truths, _results(options.results, options, settings))
    other = None
    if options.against:
        other, more = run.combine(truths, _results(options.against, options, settings))
        warnings += more
    for warning in warnings:
        print(f"warning: {warning}", file=sys.stderr)
    if options.pre_steps == "adelaidet":
        paired, other = _prepared(paired), _prepared(other) if other else None

    samples, rivals, threshold, choice = _threshold(paired, other, rules, options, settings)
    scored = run.score(samples, rules, threshold, choice)
    kept = {sample.name for sample in samples}
    scored.missing, scored.warnings = [name for name in paired.missing if name in kept], warnings
    print("\n".join(run.lines(scored)))
    outcome = run.as_json(scored)
    outcome["truth"], outcome["results"] = options.truth, options.results

    if options.sweep:
        outcome["sweep"] = run.sweep(scored.batch, rules[0])
        print("threshold  R       P       F       (chosen here it would be chosen on the images that it is measured on)")
        for row in outcome["sweep"][::5]:
            print(f"{row['threshold']:9.2f}  {row['recall']:.4f}  {row['precision']:.4f}  {row['hmean']:.4f}")
    if options.details or options.report:
        outcome |= run.details(scored)
        if options.details:
            print("\n".join(run.detail_lines(outcome)))
    advice = run.diagnose(samples, rules[0], threshold) if options.diagnose else run.advice(scored)
    outcome["advice"] = [vars(a) for a in advice]
    for each in advice:
        print(f"advice: {each.text}")

    rival = None
    if rivals is not None:
        rival = run.score(rivals, rules, threshold, choice)
        outcome["against"] = {"results": options.against, **run.against(scored, rival), "b": run.as_json(rival)}
        print(f"against {options.against}:")
        print("\n".join(f"  {line}" for line in run.lines(rival)))
        c = outcome["against"]
        verdict = "a real difference" if c["p_value"] < 0.05 else "within what chance does"
        print(
            f"  difference of F {c['difference']:+.4f} (95 % interval {c['interval_95'][0]:+.4f} to {c['interval_95'][1]:+.4f}, "
            f"permutation p = {c['p_value']:.4f}): {verdict}"
        )
    if options.json:
        storage.write_text_atomic(options.json, json.dumps(outcome, indent=1) + "\n")
        print(f"numbers: {options.json}")
    if options.report:
        from i3cl.report.evaluation import write_evaluation_report

        write_evaluation_report(options.report, scored, outcome, rival, options.images)
        print(f"report: {options.report}")


def _results(path: str, options: argparse.Namespace, settings: Settings) -> Any:
    member = options.member if path == options.results else None
    return read_results(path, member=member, point_order=options.point_order, skip_bad=settings.data.skip_bad)


def _prepared(paired: Paired) -> Paired:
    samples, dropped = run.adelaidet_steps(paired.samples)
    print(
        f"pre-steps adelaidet: {dropped} detections with a score up to 0.1 or a self-intersecting ring left out; "
        "coordinates cut to whole pixels"
    )
    return Paired(samples, paired.missing, paired.how, paired.found)


def _threshold(
    paired: Paired, other: Paired | None, rules: tuple[Rules, ...], options: argparse.Namespace, settings: Settings
) -> tuple[Any, Any, float | None, str | None]:
    """Images to score, the rival's, and the score threshold with where it comes from."""
    samples, rivals = paired.samples, other.samples if other else None
    part = options.choose_threshold_on
    if not part:
        return samples, rivals, options.threshold, None
    if options.threshold is not None:
        raise UserError("--threshold and --choose-threshold-on exclude each other; give one")
    if len(part) == 2:
        chosen_on, warnings = run.load(
            *part,
            truth_format=options.truth_format,
            truth_split=options.truth_split,
            member=options.member,
            point_order=options.point_order,
            skip_bad=settings.data.skip_bad,
            hash_is_dont_care=rules[0].hash_is_dont_care,
        )
        for warning in warnings:
            print(f"warning: {warning}", file=sys.stderr)
        validation = chosen_on.samples
        where = f"the {len(validation)} images of {part[0]}"
    elif len(part) == 1:
        validation, samples = run.split_off(samples, part[0])
        if rivals is not None:
            names = {sample.name for sample in samples}
            rivals = [sample for sample in rivals if sample.name in names]
        where = f"{len(validation)} images that are not scored here"
    else:
        raise UserError("--choose-threshold-on: give a share, a list file, or TRUTH RESULTS")
    threshold, hmean = run.best_threshold(validation, rules[0])
    return samples, rivals, threshold, f"best F on {where}: {hmean:.4f} there"


def _average_precision(settings: Settings, options: argparse.Namespace) -> None:
    paired, warnings = run.load(
        options.truth,
        options.results,
        truth_format=options.truth_format,
        truth_split=options.truth_split,
        member=options.member,
        point_order=options.point_order,
        skip_bad=settings.data.skip_bad,
    )
    for warning in warnings:
        print(f"warning: {warning}", file=sys.stderr)
    if options.max_detections is not None and options.max_detections < 1:
        raise UserError(f"--max-detections {options.max_detections}: write a number from 1")
    outcome = run.average_precision(paired, options.protocol, options.max_detections, 0.5 if options.iou is None else options.iou)
    if options.protocol == "coco":
        for kind in ("mask", "bbox"):
            print(f"coco, {kind}: " + "  ".join(f"{name} {value:.4f}" for name, value in outcome[kind].items()))
    else:
        print(f"rctw: AP {outcome['AP']:.4f}")
    print(f"  rules: {outcome['rules']}")
    print(
        f"  {outcome['images']} images, {outcome['truths']} truths, {outcome['dont_cares']} don't-care, "
        f"{outcome['detections']} detections"
    )
    if options.json:
        storage.write_text_atomic(options.json, json.dumps(outcome | {"warnings": warnings}, indent=1) + "\n")
        print(f"numbers: {options.json}")


def _over_ray(options: argparse.Namespace, rules: tuple[Rules, ...]) -> None:
    from i3cl.evaluation.shards import count_all, truth_shards
    from i3cl.runtime.cluster import connect, quiet
    from i3cl.runtime.pace import duration

    for option in ("report", "against", "choose_threshold_on", "sweep", "details", "diagnose"):
        if getattr(options, option):
            raise UserError(f"--ray: has counts only, no --{option.replace('_', '-')}; leave one of the two out")
    if rules[0].name == "mmocr" and options.threshold is None:
        raise UserError("--ray with mmocr: give --threshold; its sweep over the test images is not spread")
    truth_shards(options.truth)
    connect()
    import ray

    quiet(ray.data.DataContext.get_current())
    started = said = time.monotonic()

    def progress(done: int, every: int) -> None:
        nonlocal said
        now = time.monotonic()
        if now - said > 10 or done == every:
            left = (now - started) / done * (every - done)
            print(f"{done} of {every} parts, {duration(left)} left", flush=True)
            said = now

    counts, missing = count_all(options.truth, options.results, options.member, rules, options.threshold, progress)
    for each in counts:
        s = each.summary()
        print(f"{each.rules.name}, {each.rules.label}: R {s.recall:.4f}  P {s.precision:.4f}  F {s.hmean:.4f}")
    print(f"  rules: {counts[0].rules.text}")
    s = counts[0].summary()
    print(
        f"  {s.images} images ({missing} without a result count as empty), {s.truths} truths, {s.dont_cares} don't-care, "
        f"{s.detections} detections kept, {s.dropped} dropped, {s.repaired} polygons repaired"
    )
    if options.json:
        outcome = {"protocol": options.protocol, **run.summary_json(counts[0]), "missing_images": missing}
        outcome["variants"] = [{"name": c.rules.label, **run.summary_json(c)} for c in counts[1:]]
        storage.write_text_atomic(options.json, json.dumps(outcome, indent=1) + "\n")
        print(f"numbers: {options.json}")


def evaluate_checkpoints(settings: Settings, options: argparse.Namespace) -> None:
    """Scores label.members on data.validation by polygon IoU and COCO mask AP."""
    from i3cl.data.formats.predictions import member_predictions
    from i3cl.data.loading.ingest import read_source
    from i3cl.evaluation.metrics.score import measure
    from i3cl.labelling.predict import predict

    if settings.data.validation is None:
        raise UserError(
            "data.validation: names no labelled images; add {annotations: FILE.json, images: FOLDER}, "
            "or score files with --truth and --results"
        )
    if not settings.label.members:
        raise UserError("label.members: names no checkpoint; add label.members.NAME=CHECKPOINT_DIRECTORY")
    truth = read_source(settings.data.validation, settings.data_root, settings.data.skip_bad)
    out = storage.join(storage.absolute(settings.storage), settings.name, "predictions", "validation")
    predictions = predict(truth, settings.label.members, settings, out, "evaluate")
    result = {}
    for name in settings.label.members:
        score = measure(name, truth.records, member_predictions(predictions, name), settings.evaluate).score
        result[name] = vars(score)
        print(
            f"{name}: R {score.recall:.4f}  P {score.precision:.4f}  F {score.hmean:.4f}  (short side >= "
            f"{settings.evaluate.small_side:g} px: F {score.hmean_large:.4f})  mask AP50 {score.mask_ap50:.4f}"
        )
        print(f"  {score.rules}")
    if options.json:
        storage.write_text_atomic(options.json, json.dumps(result, indent=1) + "\n")

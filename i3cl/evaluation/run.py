"""One result against one truth, from files to numbers: what `jobs/evaluate.py` prints and writes."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import shapely

from i3cl.errors import UserError
from i3cl.evaluation.analysis import error_kinds as errors
from i3cl.evaluation.analysis import intervals as stats
from i3cl.evaluation.analysis.advice import Advice, diagnose
from i3cl.evaluation.formats.read import (
    Paired,
    PointOrder,
    Source,
    named,
    pair,
    read_images_of,
    read_results,
    read_truth,
)
from i3cl.evaluation.metrics.average_precision import RULES as AP_RULES
from i3cl.evaluation.metrics.average_precision import polygon_ap
from i3cl.evaluation.metrics.batch import Batch, Sample, measure
from i3cl.evaluation.metrics.protocols import (
    MMOCR_THRESHOLDS,
    Counts,
    Rules,
    Summary,
    Verdicts,
    judge,
)

SWEEP = tuple(round(0.01 * k, 2) for k in range(100))
"""Score thresholds that a sweep tries."""


@dataclass(eq=False)
class Scored:
    """One result by one protocol."""

    protocol: str
    samples: Sequence[Sample]
    batch: Batch
    verdicts: Verdicts
    """By the first rules."""
    counts: list[Counts]
    """One for each of the protocol's rules; the first is the score."""
    threshold: float | None
    """Detections above this score count; None: all."""
    choice: str
    """Where the threshold comes from."""
    missing: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    @property
    def summary(self) -> Summary:
        return self.counts[0].summary()

    @cached_property
    def interval(self) -> stats.Interval:
        """95 % of F over images."""
        return stats.hmean_interval(self.counts[0].ratios)


def load(
    truth: str,
    results: str,
    *,
    truth_format: str | None = None,
    truth_split: str = "test",
    member: str | None = None,
    point_order: PointOrder = "xy",
    skip_bad: bool = False,
    hash_is_dont_care: bool = False,
) -> tuple[Paired, list[str]]:
    """Truth and results of files, image by image, and the warnings. UserError as `read_truth`, `read_results`, `pair`."""
    truths = read_truth(
        truth, format_name=truth_format, split=truth_split, skip_bad=skip_bad, hash_is_dont_care=hash_is_dont_care
    )
    found = read_results(results, member=member, point_order=point_order, skip_bad=skip_bad)
    return combine(truths, found)


def combine(truths: Source, found: Source) -> tuple[Paired, list[str]]:
    """Ties results to their images; returns them with what there is to warn of."""
    paired = pair(truths, found)
    warnings = [*truths.warnings, *found.warnings]
    for source in (truths, found):
        if source.left_out:
            warnings.append(f"{source.path}: {len(source.left_out)} bad items left out, first: {source.left_out[0]}")
    if paired.missing:
        few = ", ".join(paired.missing[:3]) + (", ..." if len(paired.missing) > 3 else "")
        warnings.append(
            f"{found.path}: {len(paired.missing)} of {len(paired.samples)} images have no result and count as empty ({few})"
        )
    if paired.how == "number in the name" and found.format != "COCO results":
        warnings.append(
            f"{found.path}: images are tied to the truth by the number in their names; other parts of the names differ"
        )
    return paired, warnings


def score(samples: Sequence[Sample], rules: Sequence[Rules], threshold: float | None = None, choice: str | None = None) -> Scored:
    """Measures the images once and scores them by all the rules.

    UserError where the protocol cannot score an image at all (CTW1500 v1: detections on an image without truth).
    """
    if rules[0].name == "ctw1500-v1":
        for sample in samples:
            if len(sample.detections) and not len(sample.truths):
                raise UserError(f"{sample.name}: has detections but no truth; ctw1500-v1 knows no such image, use ctw1500-v2")
    batch = measure(samples, rules[0].repair)
    counts: list[Counts] = []
    if rules[0].name == "mmocr" and threshold is None:
        every = [Counts(rules[0], t) for t in MMOCR_THRESHOLDS]
        for each in every:
            each.update(batch)
        f = [each.summary().hmean for each in every]
        best = int(np.argmax(f))
        threshold = every[best].threshold
        counts = [every[best], *(each for each in every if each is not every[best])]
        choice = "best of 0.3, 0.4 ... 0.9, chosen on these very images: optimistic against a fixed threshold"
    else:
        counts = [Counts(r, threshold) for r in rules]
        for each in counts:
            each.update(batch)
    choice = choice or ("all detections count" if threshold is None else "fixed")
    return Scored(rules[0].name, samples, batch, judge(batch, rules[0], threshold), counts, threshold, choice)


def sweep(batch: Batch, rules: Rules, thresholds: Sequence[float] = SWEEP) -> list[dict[str, float]]:
    """Threshold, recall, precision and hmean at each threshold."""
    rows = []
    for threshold in thresholds:
        counts = Counts(rules, threshold)
        counts.update(batch)
        s = counts.summary()
        rows.append({"threshold": threshold, "recall": s.recall, "precision": s.precision, "hmean": s.hmean})
    return rows


def best_threshold(samples: Sequence[Sample], rules: Rules) -> tuple[float, float]:
    """The threshold of the highest F on these images, the lowest of equals, and this F."""
    best = max(sweep(measure(samples, rules.repair), rules), key=lambda row: (row["hmean"], -row["threshold"]))
    return best["threshold"], best["hmean"]


def split_off(samples: Sequence[Sample], part: str) -> tuple[list[Sample], list[Sample]]:
    """Images to choose a threshold on, and the others.

    part: a share such as 0.2 (by a hash of the names, so the same images every time), or a file that lists images.
    """
    try:
        share = float(part)
    except ValueError:
        chosen = named(samples, read_images_of(part))
        source = f"{part} names"
    else:
        if not 0 < share < 1:
            raise UserError(f"--choose-threshold-on {part}: write a share between 0 and 1, a list file, or TRUTH RESULTS")
        chosen = [int(hashlib.sha256(s.name.encode()).hexdigest()[:8], 16) / 2**32 < share for s in samples]
        source = f"a share of {part} gives"
    if not any(chosen) or all(chosen):
        raise UserError(
            f"--choose-threshold-on: {source} {sum(chosen)} of {len(samples)} images; some must remain on either side"
        )
    return [s for s, c in zip(samples, chosen) if c], [s for s, c in zip(samples, chosen) if not c]


def adelaidet_steps(samples: Sequence[Sample]) -> tuple[list[Sample], int]:
    """What AdelaiDet-style evaluators do first: score > 0.1, whole pixels, self-intersecting polygons dropped.

    Returns the images and the number of detections left out.
    """
    result, dropped = [], 0
    for sample in samples:
        rings = [np.trunc(np.asarray(p, np.float64)) for p in sample.detections]
        keep = np.array(
            [s > 0.1 and bool(shapely.Polygon(p).is_valid) for p, s in zip(rings, sample.scores)], dtype=bool
        ).reshape(-1)
        dropped += int((~keep).sum())
        kept = np.flatnonzero(keep)
        result.append(replace(sample, detections=[rings[k] for k in kept], scores=np.asarray(sample.scores)[kept]))
    return result, dropped


# ------------------------------------------------------------------------------------------------------------- outcome


def as_json(scored: Scored) -> dict[str, Any]:
    """Everything about a score as JSON-able values: recall, precision, hmean, counts, rules, interval, variants."""
    first = scored.counts[0]
    result: dict[str, Any] = {"protocol": scored.protocol, **summary_json(first)}
    result["threshold_choice"] = scored.choice
    if scored.threshold is not None:
        result["rules"] += f"; score threshold {scored.threshold:.4g} ({scored.choice})"
    result["hmean_interval_95"] = [scored.interval.low, scored.interval.high]
    result["missing_images"] = len(scored.missing)
    result["variants"] = [{"name": variant_name(c), **summary_json(c)} for c in scored.counts[1:]]
    result["warnings"] = scored.warnings
    return result


def variant_name(counts: Counts) -> str:
    """'IoU 0.7', or for mmocr 'score >= 0.4'."""
    return f"score >= {counts.threshold:.1f}" if counts.rules.name == "mmocr" else counts.rules.label


def summary_json(counts: Counts) -> dict[str, Any]:
    """Numbers, counts and rules of one rule set."""
    summary = asdict(counts.summary())
    hits = {name: summary.pop(name) for name in ("recall_hits", "precision_hits")}
    if counts.rules.method == "iou":
        summary["true_positives"] = round(hits["recall_hits"])
    else:
        summary.update(hits)
    return {**summary, "threshold": counts.threshold, "rules": counts.rules.text, "rule_set": asdict(counts.rules)}


def lines(scored: Scored) -> list[str]:
    """The score for people: first the number to publish, then its rules and counts, then the variants."""
    result = []
    for k, counts in enumerate(scored.counts):
        s = counts.summary()
        numbers = f"R {s.recall:.4f}  P {s.precision:.4f}  F {s.hmean:.4f}"
        if k == 0:
            hits = f"{s.recall_hits:g} true positives, " if counts.rules.method == "iou" else ""
            limit = "none" if scored.threshold is None else f"{scored.threshold:.4g}"
            result += [
                f"{scored.protocol}, {counts.rules.label}: {numbers}  "
                f"(95 % interval of F over images {scored.interval.low:.4f}-{scored.interval.high:.4f})",
                f"  rules: {counts.rules.text}",
                f"  score threshold: {limit} ({scored.choice})",
                f"  {s.images} images, {hits}{s.truths} truths, {s.dont_cares} don't-care, "
                f"{s.invalid_truths} truths without area, "
                f"{s.detections} detections kept, {s.dropped} dropped in don't-care regions, {s.skipped} skipped as invalid, "
                f"{s.repaired} polygons repaired",
            ]
        else:
            result.append(f"  {variant_name(counts)}: {numbers}")
    return result


def details(scored: Scored) -> dict[str, Any]:
    """Kinds of error and breakdown as JSON-able values."""
    kinds = errors.kinds(scored.batch, scored.verdicts, scored.counts[0].rules.iou)
    groups = errors.breakdown(scored.samples, scored.batch, scored.verdicts)
    return {"errors": kinds.counts() | {"fractured": kinds.fractured}, "breakdown": [asdict(g) for g in groups]}


def detail_lines(values: dict[str, Any]) -> list[str]:
    """`details` for people."""
    kinds = values["errors"]
    result = ["truths:      " + ", ".join(f"{n} {kind}" for kind, n in kinds["truths"].items())]
    result.append("detections:  " + ", ".join(f"{n} {kind}" for kind, n in kinds["detections"].items()))
    result.append(
        f"{kinds['fractured']} truths are covered by two or more detections together (those whose largest piece scores too)"
    )
    for group in values["breakdown"]:
        recall = "     -" if group["recall"] is None else f"{group['recall']:.4f}"
        precision = "     -" if group["precision"] is None else f"{group['precision']:.4f}"
        result.append(
            f"  {group['by']:10} {group['name']:24} R {recall} of {group['truths']:6}   P {precision} of {group['detections']:6}"
        )
    return result


def advice(scored: Scored) -> list[Advice]:
    """What may be wrong with the results; looked for when F is under 0.3."""
    return diagnose(scored.samples, scored.counts[0].rules, scored.threshold) if scored.summary.hmean < 0.3 else []


def against(a: Scored, b: Scored) -> dict[str, Any]:
    """A minus B on the same images."""
    order = {name: k for k, name in enumerate(b.counts[0].names)}
    rows = b.counts[0].ratios[[order[name] for name in a.counts[0].names]]
    comparison = stats.compare(a.counts[0].ratios, rows)
    return {
        "hmean_a": a.summary.hmean,
        "hmean_b": b.summary.hmean,
        "difference": comparison.difference,
        "interval_95": [comparison.interval.low, comparison.interval.high],
        "p_value": comparison.p_value,
    }


# --------------------------------------------------------------------------------------------------- average precision


def average_precision(paired: Paired, protocol: str, max_detections: int | None = None, iou: float = 0.5) -> dict[str, Any]:
    """AP of protocol 'coco' (masks and boxes) or 'rctw' (polygons), with counts and rules.

    max_detections: best detections used per image, COCO's maxDets; None: as many as the fullest image has, at least 100.
    """
    samples = paired.samples
    counts = {
        "images": len(samples),
        "truths": sum(int((~s.ignore).sum()) for s in samples),
        "dont_cares": sum(int(s.ignore.sum()) for s in samples),
        "detections": sum(len(s.detections) for s in samples),
        "missing_images": len(paired.missing),
    }
    if protocol == "rctw":
        value = polygon_ap(measure(samples), iou)
        return {"protocol": protocol, "AP": value, **counts, "rules": AP_RULES.format(iou=iou)}

    from i3cl.evaluation.metrics.coco_ap import ImageRecord, coco_box_ap, coco_mask_ap

    fullest = max((len(s.detections) for s in samples), default=0)
    limit = max(100, fullest) if max_detections is None else max_detections
    records = []
    for sample, found in zip(samples, paired.found):
        height, width = _frame(sample)
        proper = [k for k, p in enumerate(sample.truths) if len(p) >= 3]
        masks = None
        if found is not None and found.segmentations is not None:
            masks = [s if isinstance(s, dict) and s.get("size") == [height, width] else None for s in found.segmentations]
        records.append(
            ImageRecord(
                height,
                width,
                [sample.truths[k] for k in proper],
                sample.ignore[proper],
                sample.detections,
                sample.scores,
                masks,
            )
        )
    rules = f"COCO AP over IoU 0.50:0.95, one class, all areas, at most {limit} detections an image; don't-care truths are crowds"
    return {
        "protocol": protocol,
        "mask": coco_mask_ap(records, limit),
        "bbox": coco_box_ap(records, limit),
        **counts,
        "max_detections": limit,
        "rules": rules,
    }


def _frame(sample: Sample) -> tuple[int, int]:
    """Height and width of the image; where the truth does not say, as far as the polygons reach."""
    if sample.height and sample.width:
        return sample.height, sample.width
    polygons = [p for p in (*sample.truths, *sample.detections) if len(p)]
    if not polygons:
        return 1, 1
    far = np.ceil(np.concatenate(polygons).max(axis=0)).astype(int)
    return max(1, min(int(far[1]), 20_000)), max(1, min(int(far[0]), 20_000))

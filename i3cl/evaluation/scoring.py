"""One result against one truth, from files to numbers."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import shapely

from i3cl.errors import UserError
from i3cl.evaluation.analysis.advice import Advice, diagnose
from i3cl.evaluation.analysis.intervals import Comparison, Interval, compare, hmean_interval
from i3cl.evaluation.formats.coco import RESULTS
from i3cl.evaluation.formats.pairing import Paired, listed_names, on_list, pair
from i3cl.evaluation.formats.read import read_results, read_truth
from i3cl.evaluation.formats.sets import ImageDetections, ImageTruth, PointOrder, PolygonSet
from i3cl.evaluation.metrics.batch import Batch, EvalImage, measure_polygons
from i3cl.evaluation.metrics.judge import Verdicts, judge
from i3cl.evaluation.metrics.metric import Counts, DetectionMetric, Summary
from i3cl.evaluation.metrics.protocols import MMOCR_THRESHOLDS, Rules
from i3cl.evaluation.metrics.rctw_ap import RULES as RCTW_RULES
from i3cl.evaluation.metrics.rctw_ap import polygon_ap

SWEEP = tuple(round(0.01 * k, 2) for k in range(100))
"""Score thresholds that a sweep tries."""


@dataclass(eq=False)
class Scored:
    """One result by one protocol."""

    protocol: str
    images: Sequence[EvalImage]
    batch: Batch
    verdicts: Verdicts
    """By the first rules."""
    counts: list[Counts]
    """One for each of the protocol's rules; the first is the score."""
    threshold: float | None
    """Detections above this score count; None: all of them."""
    choice: str
    """Where the threshold comes from."""

    @cached_property
    def summary(self) -> Summary:
        """The score to publish."""
        return self.counts[0].summary(self.choice)

    @cached_property
    def interval(self) -> Interval:
        """95 % interval of F over images."""
        return hmean_interval(self.counts[0].ratios)


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
    return combine(truths, read_results(results, member=member, point_order=point_order, skip_bad=skip_bad))


def combine(truths: PolygonSet[ImageTruth], found: PolygonSet[ImageDetections]) -> tuple[Paired, list[str]]:
    """Ties results to their images; returns them with the warnings."""
    paired = pair(truths, found)
    warnings = [*truths.warnings, *found.warnings]
    for path, left_out in ((truths.path, truths.left_out), (found.path, found.left_out)):
        if left_out:
            warnings.append(f"{path}: {len(left_out)} bad items left out, first: {left_out[0]}")
    if paired.missing:
        few = ", ".join(paired.missing[:3]) + (", ..." if len(paired.missing) > 3 else "")
        warnings.append(
            f"{found.path}: {len(paired.missing)} of {len(paired.images)} images have no result and count as empty ({few})"
        )
    if paired.how == "number in the name" and found.format != RESULTS:
        warnings.append(
            f"{found.path}: images are tied to the truth by the number in their names; other parts of the names differ"
        )
    return paired, warnings


def score(
    images: Sequence[EvalImage], rules: Sequence[Rules], threshold: float | None = None, choice: str | None = None
) -> Scored:
    """Measures the images once and scores them by all the rules.

    Args:
        images: Truth and detections.
        rules: A protocol's rule sets; the first gives the score.
        threshold: Detections above this score count; None: all of them, with mmocr the best of its sweep.
        choice: Where the threshold comes from, in words.

    Raises:
        UserError: The protocol cannot score an image at all (CTW1500 v1: detections on an image without truth).
    """
    if rules[0].name == "ctw1500-v1":
        for image in images:
            if len(image.detections) and not len(image.truths):
                raise UserError(f"{image.name}: has detections but no truth; ctw1500-v1 knows no such image, use ctw1500-v2")
    batch = measure_polygons(images, rules[0].repair)
    counts: list[Counts] = []
    if rules[0].name == "mmocr" and threshold is None:
        every = [_metric(batch, rules[0]).counts(t) for t in MMOCR_THRESHOLDS]
        best = every[int(np.argmax([each.summary().hmean for each in every]))]
        threshold = best.threshold
        counts = [best, *(each for each in every if each is not best)]
        choice = "best of 0.3, 0.4 ... 0.9, chosen on these very images: optimistic against a fixed threshold"
    else:
        counts = [_metric(batch, each).counts(threshold) for each in rules]
    choice = choice or ("all detections count" if threshold is None else "fixed")
    return Scored(rules[0].name, images, batch, judge(batch, rules[0], threshold), counts, threshold, choice)


def _metric(batch: Batch, rules: Rules) -> DetectionMetric:
    metric = DetectionMetric(rules)
    metric.update(batch)
    return metric


def sweep(batch: Batch, rules: Rules, thresholds: Sequence[float] = SWEEP) -> list[dict[str, float]]:
    """Threshold, recall, precision and hmean at each threshold."""
    metric = _metric(batch, rules)
    rows = []
    for threshold in thresholds:
        s = metric.summary(threshold)
        rows.append({"threshold": threshold, "recall": s.recall, "precision": s.precision, "hmean": s.hmean})
    return rows


def best_threshold(images: Sequence[EvalImage], rules: Rules) -> tuple[float, float]:
    """The threshold of the highest F on these images, the lowest of equals, and this F."""
    rows = sweep(measure_polygons(images, rules.repair), rules)
    best = max(rows, key=lambda row: (row["hmean"], -row["threshold"]))
    return best["threshold"], best["hmean"]


def split_off(images: Sequence[EvalImage], part: str) -> tuple[list[EvalImage], list[EvalImage]]:
    """Images to choose a threshold on, and the others.

    part: a share such as 0.2 (by a hash of the names, so the same images every time), or a file that lists images.
    """
    try:
        share = float(part)
    except ValueError:
        chosen = on_list(images, listed_names(part))
        source = f"{part} names"
    else:
        if not 0 < share < 1:
            raise UserError(f"--choose-threshold-on {part}: write a share between 0 and 1, a list file, or TRUTH RESULTS")
        chosen = [int(hashlib.sha256(i.name.encode()).hexdigest()[:8], 16) / 2**32 < share for i in images]
        source = f"a share of {part} gives"
    if not any(chosen) or all(chosen):
        raise UserError(f"--choose-threshold-on: {source} {sum(chosen)} of {len(images)} images; some must remain on either side")
    return [i for i, c in zip(images, chosen) if c], [i for i, c in zip(images, chosen) if not c]


def adelaidet_steps(images: Sequence[EvalImage]) -> tuple[list[EvalImage], int]:
    """The first steps of AdelaiDet-style evaluators: score > 0.1, whole pixels, self-intersecting polygons dropped.

    Returns the images and the number of detections left out.
    """
    result, dropped = [], 0
    for image in images:
        rings = [np.trunc(np.asarray(p, np.float64)) for p in image.detections]
        keep = np.array([s > 0.1 and bool(shapely.Polygon(p).is_valid) for p, s in zip(rings, image.scores)], dtype=bool).reshape(
            -1
        )
        dropped += int((~keep).sum())
        kept = np.flatnonzero(keep).tolist()
        masks = [image.masks[k] for k in kept] if image.masks is not None else None
        scores = np.asarray(image.scores)[kept]
        result.append(replace(image, detections=[rings[k] for k in kept], scores=scores, masks=masks))
    return result, dropped


def advice(scored: Scored) -> list[Advice]:
    """Likely mistakes in the results; looked for when F is under 0.3."""
    return diagnose(scored.images, scored.counts[0].rules, scored.threshold) if scored.summary.hmean < 0.3 else []


def against(a: Scored, b: Scored) -> Comparison:
    """A minus B on the same images."""
    order = {name: k for k, name in enumerate(b.counts[0].names)}
    return compare(a.counts[0].ratios, b.counts[0].ratios[[order[name] for name in a.counts[0].names]])


def average_precision(paired: Paired, protocol: str, max_detections: int | None = None, iou: float = 0.5) -> dict[str, Any]:
    """AP of protocol 'coco' (masks and boxes) or 'rctw' (polygons), with counts and rules.

    max_detections: best detections used per image, COCO's maxDets; None: as many as the fullest image has, at least 100.
    """
    images = paired.images
    counts = {
        "images": len(images),
        "truths": sum(int((~i.ignore).sum()) for i in images),
        "dont_cares": sum(int(i.ignore.sum()) for i in images),
        "detections": sum(len(i.detections) for i in images),
        "missing_images": len(paired.missing),
    }
    if protocol == "rctw":
        return {
            "protocol": protocol,
            "AP": polygon_ap(measure_polygons(images), iou),
            **counts,
            "rules": RCTW_RULES.format(iou=iou),
        }

    from i3cl.evaluation.metrics.coco_ap import coco_box_ap, coco_mask_ap

    fullest = max((len(i.detections) for i in images), default=0)
    limit = max(100, fullest) if max_detections is None else max_detections
    return {
        "protocol": protocol,
        "mask": coco_mask_ap(images, limit),
        "bbox": coco_box_ap(images, limit),
        **counts,
        "max_detections": limit,
        "rules": f"COCO AP over IoU 0.50:0.95, one class, all areas, at most {limit} detections per image; "
        "don't-care truths are crowds",
    }

"""A score as JSON-able values and as lines for people."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from i3cl.evaluation.analysis.error_kinds import breakdown, kinds
from i3cl.evaluation.metrics.metric import Counts, Summary
from i3cl.evaluation.metrics.protocols import Rules
from i3cl.evaluation.scoring import Scored, against


def as_json(scored: Scored, missing: int = 0, warnings: Sequence[str] = ()) -> dict[str, Any]:
    """Everything about a score: recall, precision, hmean, counts, rules, interval, variants."""
    result: dict[str, Any] = {"protocol": scored.protocol, **summary_json(scored.summary, scored.counts[0].rules)}
    result["threshold_choice"] = scored.choice
    result["hmean_interval_95"] = [scored.interval.low, scored.interval.high]
    result["missing_images"] = missing
    result["variants"] = [{"name": variant_name(c), **summary_json(c.summary(), c.rules)} for c in scored.counts[1:]]
    result["warnings"] = list(warnings)
    return result


def variant_name(counts: Counts) -> str:
    """'IoU 0.7', or for mmocr 'score >= 0.4'."""
    return f"score >= {counts.threshold:.1f}" if counts.rules.name == "mmocr" else counts.rules.label


def summary_json(summary: Summary, rules: Rules) -> dict[str, Any]:
    """Numbers, counts and rules of one rule set."""
    values = asdict(summary)
    hits = {name: values.pop(name) for name in ("recall_hits", "precision_hits")}
    hits = {"true_positives": summary.true_positives} if rules.method == "iou" else hits
    return {**values, **hits, "rule_set": asdict(rules)}


def numbers(summary: Summary) -> str:
    """'R 0.7014  P 0.8038  F 0.7492'."""
    return f"R {summary.recall:.4f}  P {summary.precision:.4f}  F {summary.hmean:.4f}"


def lines(scored: Scored) -> list[str]:
    """The score for people: first the number to publish, then its rules and counts, then the variants."""
    rules, s = scored.counts[0].rules, scored.summary
    hits = f"{s.true_positives} true positives, " if rules.method == "iou" else ""
    limit = "none" if scored.threshold is None else f"{scored.threshold:.4g}"
    return [
        f"{scored.protocol}, {rules.label}: {numbers(s)}  "
        f"(95 % interval of F over images {scored.interval.low:.4f}-{scored.interval.high:.4f})",
        f"  rules: {rules.text}",
        f"  score threshold: {limit} ({scored.choice})",
        f"  {s.images} images, {hits}{s.truths} truths, {s.dont_cares} don't-care, "
        f"{s.invalid_truths} truths without area, "
        f"{s.detections} detections kept, {s.dropped} dropped in don't-care regions, {s.skipped} skipped as invalid, "
        f"{s.repaired} polygons repaired",
        *(f"  {variant_name(counts)}: {numbers(counts.summary())}" for counts in scored.counts[1:]),
    ]


def details(scored: Scored) -> dict[str, Any]:
    """Kinds of error and breakdown as JSON-able values."""
    found = kinds(scored.batch, scored.verdicts, scored.counts[0].rules.iou)
    groups = breakdown(scored.images, scored.batch, scored.verdicts)
    return {"errors": found.counts() | {"fractured": found.fractured}, "breakdown": [asdict(g) for g in groups]}


def detail_lines(values: dict[str, Any]) -> list[str]:
    """`details` for people."""
    found = values["errors"]
    result = ["truths:      " + ", ".join(f"{n} {kind}" for kind, n in found["truths"].items())]
    result.append("detections:  " + ", ".join(f"{n} {kind}" for kind, n in found["detections"].items()))
    result.append(
        f"{found['fractured']} truths are covered by two or more detections together (those whose largest piece scores too)"
    )
    for group in values["breakdown"]:
        recall = "     -" if group["recall"] is None else f"{group['recall']:.4f}"
        precision = "     -" if group["precision"] is None else f"{group['precision']:.4f}"
        result.append(
            f"  {group['by']:10} {group['name']:24} R {recall} of {group['truths']:6}   P {precision} of {group['detections']:6}"
        )
    return result


def against_json(a: Scored, b: Scored) -> dict[str, Any]:
    """A minus B on the same images as JSON-able values."""
    comparison = against(a, b)
    return {
        "hmean_a": a.summary.hmean,
        "hmean_b": b.summary.hmean,
        "difference": comparison.difference,
        "interval_95": [comparison.interval.low, comparison.interval.high],
        "p_value": comparison.p_value,
    }


def against_lines(values: dict[str, Any]) -> list[str]:
    """`against_json` for people."""
    verdict = "a real difference" if values["p_value"] < 0.05 else "within what chance does"
    low, high = values["interval_95"]
    return [
        f"  difference of F {values['difference']:+.4f} (95 % interval {low:+.4f} to {high:+.4f}, "
        f"permutation p = {values['p_value']:.4f}): {verdict}"
    ]

"""The rule sets that circulate, by name.

A protocol is one or more `Rules`; the first gives the number to publish. Everything that makes scripts disagree is a field of
`Rules`, and `Rules.text` says all of it in one line, to stand beside the numbers. To add a protocol, add it to `PROTOCOLS`.

What all rules share:

1. A detection is dropped when more than half of its area lies in one don't-care truth: |G n D| / |D| > 0.5. Several
   don't-cares are not summed. A detection without area is not dropped.
2. Kept detections and care truths are matched one to one (DetEval: also one to many and many to one).
3. Totals are summed over the images first: R = recall hits / truths, P = precision hits / kept detections,
   F = 2 R P / (R + P). Each is 0 when its denominator is 0.

Self-intersecting polygons are repaired, truths and detections alike. Nobody can find a truth without area, so it counts as a
don't-care.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from i3cl.errors import UserError
from i3cl.evaluation.metrics.batch import Repair
from i3cl.evaluation.metrics.deteval import Merge
from i3cl.evaluation.metrics.matching import MATCHINGS, Matching

Method = Literal["iou", "deteval", "tiou"]


@dataclass(frozen=True)
class Rules:
    """One way to score."""

    name: str
    """Protocol."""
    method: Method = "iou"
    iou: float = 0.5
    """A pair matches above this IoU."""
    at_least: bool = False
    """>= instead of >."""
    union_margin: float = 0.0
    """Square pixels added to the union."""
    matching: Matching = "first"
    dont_care: bool = True
    """There is a don't-care class; false: every truth counts."""
    dont_care_margin: float = 0.0
    """Square pixels added to a detection's area when its share in a don't-care region is taken."""
    skip_invalid: bool = False
    """Self-intersecting detections and those without area count neither way."""
    recall_threshold: float = 0.7
    """DetEval's tr."""
    precision_threshold: float = 0.6
    """DetEval's tp."""
    merge: Merge = "python"
    """DetEval: threshold of the truths that one detection may merge: tp (Python script) or tr (MATLAB)."""
    repair: Repair = "make_valid"
    scores_at_least: bool = False
    """Detections at the score threshold count too, compared in single precision (mmocr)."""
    no_truth_is_full_recall: bool = False
    """A data set without a care truth has recall 1, and precision 1 or 0 (mmocr); else both are 0."""
    hash_is_dont_care: bool = False
    """The transcription '#' is a don't-care mark besides '###' (Total-Text)."""

    def __post_init__(self) -> None:
        if self.matching not in MATCHINGS:
            raise ValueError(f"matching must be one of {', '.join(MATCHINGS)}, not {self.matching!r}")
        if not 0 <= self.iou <= 1:
            raise ValueError(f"iou must lie in 0-1, not {self.iou}")

    @property
    def text(self) -> str:
        """The rules in one line."""
        sign = ">=" if self.at_least else ">"
        if self.method == "deteval":
            parts = [
                f"DetEval tr {self.recall_threshold:g} tp {self.precision_threshold:g}",
                f"merge rule of the {'Python' if self.merge == 'python' else 'MATLAB'} script",
                "shares rounded to 2 decimals, splits and merges count 0.8",
            ]
        else:
            margin = f" with {self.union_margin:+g} in the union" if self.union_margin else ""
            title = "TIoU of pairs with polygon IoU" if self.method == "tiou" else "polygon IoU"
            parts = [
                f"{title} {sign} {self.iou:g}{margin}",
                f"matching '{self.matching}' ({MATCHINGS[self.matching]})",
            ]
        if self.dont_care:
            share = f"|G n D| / (|D| {self.dont_care_margin:+g})" if self.dont_care_margin else "|G n D| / |D|"
            parts.append(f"a detection with {share} > 0.5 in one don't-care region is dropped")
        else:
            parts.append("no don't-care class")
        parts.append("invalid detections are skipped" if self.skip_invalid else "detections without area are false positives")
        parts.append(f"self-intersections repaired by {self.repair}; totals over all images")
        if self.no_truth_is_full_recall:
            parts.append("recall is 1 when there is no truth")
        return "; ".join(parts)

    @property
    def label(self) -> str:
        """Short name of the variant, e.g. 'IoU 0.7'."""
        if self.method == "deteval":
            return f"DetEval {self.recall_threshold:g}/{self.precision_threshold:g}"
        return f"{'TIoU' if self.method == 'tiou' else 'IoU'} {self.iou:g}"


_ICDAR = Rules("icdar")
_PASCAL = Rules(
    "totaltext-iou",
    at_least=True,
    union_margin=1.0,
    matching="best_gt",
    dont_care_margin=1.0,
    hash_is_dont_care=True,
)
_DETEVAL = Rules("totaltext-deteval", "deteval", dont_care_margin=1.0, hash_is_dont_care=True)

MMOCR_THRESHOLDS = tuple(np.arange(0.3, 0.9, 0.1).tolist())
"""0.3 ... 0.9 as floating-point arithmetic gives them."""

PROTOCOLS: dict[str, tuple[Rules, ...]] = {
    "icdar": (_ICDAR, replace(_ICDAR, iou=0.7)),
    # The task pages: of several detections of one truth the one with the highest IoU counts.
    "art": tuple(replace(_ICDAR, name="art", matching="greedy", iou=iou) for iou in (0.5, 0.7)),
    "lsvt": tuple(replace(_ICDAR, name="lsvt", matching="greedy", iou=iou) for iou in (0.5, 0.7)),
    "ctw1500-v1": (Rules("ctw1500-v1", matching="best_gt", dont_care=False, skip_invalid=True),),
    "ctw1500-v2": (Rules("ctw1500-v2"),),
    "totaltext-deteval": (_DETEVAL, replace(_DETEVAL, recall_threshold=0.8, precision_threshold=0.4)),
    "totaltext-iou": (_PASCAL,),
    "tiou": (Rules("tiou", "tiou"),),
    "mmocr": (
        Rules(
            "mmocr",
            dont_care_margin=1e-5,
            repair="buffer0",
            scores_at_least=True,
            no_truth_is_full_recall=True,
        ),
    ),
}
AP_PROTOCOLS = ("coco", "rctw")
"""Average precision: `rctw_ap.py` and `coco_ap.py`."""


def iou_rules(iou: float = 0.5, matching: Matching = "first") -> Rules:
    """The ICDAR rules with this IoU threshold (0-1) and matching. ValueError for a value that does not exist."""
    return replace(_ICDAR, iou=iou, matching=matching)


def rules_of(
    name: str,
    *,
    iou: float | None = None,
    matching: Matching | None = None,
    merge: Merge | None = None,
    recall_threshold: float | None = None,
    precision_threshold: float | None = None,
    repair: Repair | None = None,
) -> tuple[Rules, ...]:
    """The rule sets of a protocol with options changed. UserError for a name or an option that it does not have."""
    if name not in PROTOCOLS:
        known = ", ".join([*PROTOCOLS, *AP_PROTOCOLS])
        raise UserError(f"--protocol {name}: no such protocol; choose one of {known}")
    rules = PROTOCOLS[name]
    is_deteval = rules[0].method == "deteval"
    for option, value in (("--iou", iou), ("--matching", matching)):
        if value is not None and is_deteval:
            raise UserError(f"{option}: {name} has no such option; it takes --tr, --tp and --merge")
    for option, other in (("--merge", merge), ("--tr", recall_threshold), ("--tp", precision_threshold)):
        if other is not None and not is_deteval:
            raise UserError(f"{option}: {name} has no such option; only totaltext-deteval has")
    for option, share in (("--iou", iou), ("--tr", recall_threshold), ("--tp", precision_threshold)):
        if share is not None and not 0 <= share <= 1:
            raise UserError(f"{option} {share:g}: write a number from 0 to 1")
    if iou is not None:
        rules = (replace(rules[0], iou=iou),)
    if recall_threshold is not None or precision_threshold is not None:
        first = rules[0]
        rules = (
            replace(
                first,
                recall_threshold=first.recall_threshold if recall_threshold is None else recall_threshold,
                precision_threshold=first.precision_threshold if precision_threshold is None else precision_threshold,
            ),
        )
    if matching is not None:
        rules = tuple(replace(r, matching=matching) for r in rules)
    if merge is not None:
        rules = tuple(replace(r, merge=merge) for r in rules)
    if repair is not None:
        rules = tuple(replace(r, repair=repair) for r in rules)
    return rules

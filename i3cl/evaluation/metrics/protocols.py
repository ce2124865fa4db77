"""The rule sets that circulate, by name, and the counting that they share.

A protocol is one or more `Rules`; the first is the number to publish. Everything that makes scripts disagree is a field of
`Rules`, and `Rules.text` says all of it in one line, to stand beside the numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from i3cl.errors import UserError
from i3cl.evaluation.metrics import deteval, tiou
from i3cl.evaluation.metrics.batch import Batch, Repair
from i3cl.evaluation.metrics.iou import MATCHINGS, Matching, match_pairs

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
    merge: deteval.Merge = "python"
    """DetEval: threshold of the truths that one detection may merge: tp (Python script) or tr (MATLAB)."""
    repair: Repair = "make_valid"
    scores_at_least: bool = False
    """Detections at the score threshold count too, compared in single precision (mmocr)."""
    no_truth_is_full_recall: bool = False
    """A data set without a care truth has recall 1, and precision 1 or 0 (mmocr); else both are 0."""
    hash_is_dont_care: bool = False
    """The transcription '#' is a don't-care mark besides '###' (Total-Text)."""

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
"""Average precision: `average_precision.py` and `coco_ap.py`."""


def rules_of(
    name: str,
    *,
    iou: float | None = None,
    matching: Matching | None = None,
    merge: deteval.Merge | None = None,
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


# ------------------------------------------------------------------------------------------------------------ verdicts


@dataclass(frozen=True, eq=False)
class Verdicts:
    """What became of every truth and detection of a batch."""

    care: NDArray[np.bool_]
    """(N,) truths that count."""
    kept: NDArray[np.bool_]
    """(M,) detections that count."""
    dropped: NDArray[np.bool_]
    """(M,) detections above the score threshold that lie in a don't-care region."""
    skipped: NDArray[np.bool_]
    """(M,) detections above the score threshold that are invalid and count neither way."""
    below: NDArray[np.bool_]
    """(M,) detections that the score threshold leaves out."""
    truth_credit: NDArray[np.float64]
    """(N,) what each truth adds to recall: 0 or 1 by IoU, between them by DetEval and TIoU."""
    detection_credit: NDArray[np.float64]
    """(M,) what each detection adds to precision."""


def judge(batch: Batch, rules: Rules, threshold: float | None = None) -> Verdicts:
    """Scores every polygon of a batch by the rules; detections above `threshold` count, None: all."""
    everything = np.ones(len(batch.ignore), bool)
    care = ~batch.ignore & (batch.truth_area > 0) if rules.dont_care else everything
    if threshold is None:
        above = np.ones(len(batch.scores), bool)
    elif rules.scores_at_least:
        above = batch.scores.astype(np.float32) >= np.float32(threshold)
    else:
        above = batch.scores > threshold
    inside = ~care[batch.truth] & (batch.intersection > 0.5 * (batch.detection_area[batch.detection] + rules.dont_care_margin))
    dropped = np.zeros(len(batch.scores), bool)
    dropped[batch.detection[inside]] = True
    dropped &= above
    invalid = batch.detection_repaired | (batch.detection_area == 0)
    skipped = invalid & above & ~dropped if rules.skip_invalid else np.zeros(len(batch.scores), bool)
    kept = above & ~dropped & ~skipped

    truth_credit, detection_credit = np.zeros(len(batch.ignore)), np.zeros(len(batch.scores))
    if rules.method == "deteval":
        deteval.credit(
            batch,
            care,
            kept,
            rules.recall_threshold,
            rules.precision_threshold,
            rules.merge,
            truth_credit,
            detection_credit,
        )
    else:
        iou = batch.iou(rules.union_margin)
        match = iou >= rules.iou if rules.at_least else iou > rules.iou
        match &= care[batch.truth] & kept[batch.detection]
        pairs = match_pairs(batch.truth[match], batch.detection[match], iou[match], rules.matching)
        truth = np.array([t for t, _ in pairs], np.int64)
        detection = np.array([d for _, d in pairs], np.int64)
        if rules.method == "tiou":
            truth_credit[truth], detection_credit[detection] = tiou.tightness(batch, truth, detection)
        else:
            truth_credit[truth] = detection_credit[detection] = 1.0
    return Verdicts(care, kept, dropped, skipped, above ^ True, truth_credit, detection_credit)


# -------------------------------------------------------------------------------------------------------------- counts

_COLUMNS = (
    "recall_hits",
    "precision_hits",
    "truths",
    "dont_cares",
    "detections",
    "dropped",
    "skipped",
    "invalid_truths",
    "repaired",
)


@dataclass(frozen=True)
class Summary:
    """The score of a data set."""

    recall: float
    precision: float
    hmean: float
    recall_hits: float
    """What the truths add up to: by IoU the true positives."""
    precision_hits: float
    """What the detections add up to: by IoU the true positives."""
    truths: int
    """Care truths, the denominator of recall."""
    dont_cares: int
    """Truths that count neither way, those without area included."""
    detections: int
    """Kept detections, the denominator of precision."""
    dropped: int
    """Detections that lie in a don't-care region."""
    skipped: int
    """Invalid detections that the rules leave out."""
    invalid_truths: int
    """Truths without area or with fewer than 3 points."""
    repaired: int
    """Self-intersecting polygons, truths and detections, that were repaired before measuring."""
    images: int


@dataclass(eq=False)
class Counts:
    """Per-image counts, to be summed: small, mergeable in any order, and all that intervals need.

    >>> counts = Counts(PROTOCOLS["icdar"][0])
    >>> counts.update(batch)                            # doctest: +SKIP
    >>> counts.merge(counts_of_another_part)            # doctest: +SKIP
    >>> counts.summary().hmean                          # doctest: +SKIP
    """

    rules: Rules
    threshold: float | None = None
    """Detections above this score count; None: all."""
    names: list[str] = field(default_factory=list)
    parts: list[NDArray[np.float64]] = field(default_factory=list)

    def update(self, batch: Batch) -> Verdicts:
        """Adds the images of a batch; every image of the truth must come once, those without a detection too."""
        verdicts = judge(batch, self.rules, self.threshold)
        number = len(batch.names)
        above = ~verdicts.below

        def of_truths(values: NDArray) -> NDArray[np.float64]:
            return np.bincount(batch.truth_image, values.astype(np.float64), number).astype(np.float64)

        def of_detections(values: NDArray) -> NDArray[np.float64]:
            return np.bincount(batch.detection_image, values.astype(np.float64), number).astype(np.float64)

        columns = {
            "recall_hits": of_truths(verdicts.truth_credit),
            "precision_hits": of_detections(verdicts.detection_credit),
            "truths": of_truths(verdicts.care),
            "dont_cares": of_truths(~verdicts.care),
            "detections": of_detections(verdicts.kept),
            "dropped": of_detections(verdicts.dropped),
            "skipped": of_detections(verdicts.skipped),
            "invalid_truths": of_truths(batch.truth_area == 0),
            "repaired": of_truths(batch.truth_repaired & (batch.truth_area > 0))
            + of_detections(batch.detection_repaired & above & (batch.detection_area > 0)),
        }
        self.names += batch.names
        self.parts.append(np.stack([columns[name] for name in _COLUMNS], axis=1))
        return verdicts

    def add_rows(self, names: Sequence[str], rows: NDArray[np.float64]) -> None:
        """Adds images counted elsewhere: (I, 9) rows as `table` gives them."""
        self.names += list(names)
        self.parts.append(np.asarray(rows, np.float64).reshape(-1, len(_COLUMNS)))

    def merge(self, other: Counts) -> None:
        """Adds the images of another. ValueError when its rules or threshold differ or an image is in both."""
        if (self.rules, self.threshold) != (other.rules, other.threshold):
            raise ValueError("counts by different rules cannot be merged")
        shared = set(self.names) & set(other.names)
        if shared:
            raise ValueError(f"image {min(shared)!r} was given twice")
        self.names += other.names
        self.parts += other.parts

    @property
    def table(self) -> NDArray[np.float64]:
        """(I, 9) one row an image, columns as in `_COLUMNS`."""
        self.parts = [np.concatenate([np.zeros((0, len(_COLUMNS))), *self.parts])]
        return self.parts[0]

    @property
    def ratios(self) -> NDArray[np.float64]:
        """(I, 4) recall hits, truths, precision hits, detections: what R, P and F are made of."""
        return self.table[:, [0, 2, 1, 4]]

    def image_hmean(self) -> NDArray[np.float64]:
        """(I,) F of each image, for display: 1 where there is neither truth nor detection. Its mean is no score."""
        recall_hits, truths, precision_hits, detections = self.ratios.T
        recall = np.where(truths > 0, recall_hits / np.maximum(truths, 1), 1.0)
        alone = np.where(truths > 0, 0.0, 1.0)
        precision = np.where(detections > 0, precision_hits / np.maximum(detections, 1), alone)
        return hmean(recall, precision)

    def summary(self) -> Summary:
        """Totals over all images, then R, P and F of them."""
        total = dict(zip(_COLUMNS, self.table.sum(axis=0).tolist()))
        recall, precision, f = rates(
            np.array([total["recall_hits"], total["truths"], total["precision_hits"], total["detections"]]),
            self.rules.no_truth_is_full_recall,
        )
        hits = {name: total.pop(name) for name in ("recall_hits", "precision_hits")}
        return Summary(
            float(recall),
            float(precision),
            float(f),
            **hits,
            **{name: round(value) for name, value in total.items()},
            images=len(self.names),
        )


def rates(
    totals: NDArray[np.float64], no_truth_is_full_recall: bool = False
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """R, P and F, each (...), of (..., 4) totals: recall hits, truths, precision hits, detections."""
    recall_hits, truths, precision_hits, detections = np.moveaxis(np.asarray(totals, np.float64), -1, 0)
    recall = np.where(truths > 0, recall_hits / np.where(truths > 0, truths, 1), 0.0)
    precision = np.where(detections > 0, precision_hits / np.where(detections > 0, detections, 1), 0.0)
    if no_truth_is_full_recall:
        recall = np.where(truths > 0, recall, 1.0)
        precision = np.where((truths == 0) & (detections == 0), 1.0, precision)
    return recall, precision, hmean(recall, precision)


def hmean(recall: NDArray[np.float64], precision: NDArray[np.float64]) -> NDArray[np.float64]:
    """2 R P / (R + P), 0 where both are 0."""
    both = recall + precision
    return 2 * recall * precision / np.where(both > 0, both, 1.0)

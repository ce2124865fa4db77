"""What went wrong and with which words: kinds of error, and recall and precision by size, shape and language."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import shapely
from numpy.typing import NDArray

from i3cl.evaluation.metrics.batch import Batch, EvalImage
from i3cl.evaluation.metrics.judge import Verdicts
from i3cl.geometry import short_side

TRUTH_KINDS = {
    "found": "scored",
    "fragmented": "split: two or more detections lie in the word and cover it together",
    "merged": "taken together with another word by one detection",
    "loose": "the best detection overlaps with IoU above 0.3 only",
    "missed": "nothing overlaps with IoU above 0.3",
}
DETECTION_KINDS = {
    "right": "scored",
    "fragment": "one part of a fragmented word",
    "merging": "covers two or more words",
    "duplicate": "matches a word that another detection has taken",
    "loose": "overlaps a word with IoU above 0.3 only",
    "false": "overlaps no word with IoU above 0.3",
}
_LOOSE = 0.3
_INSIDE = 0.5
"""Share of a fragment that lies in the word, and of a merged word that lies in the detection."""
_COVERED = 0.5
"""Share of a word that its fragments cover together."""


@dataclass(frozen=True, eq=False)
class Kinds:
    """The kind of every truth and detection of a batch; '' for those that do not count."""

    truth: NDArray[np.object_]
    detection: NDArray[np.object_]
    fractured: int
    """Care truths in two or more pieces, also those whose largest piece scores."""

    def counts(self) -> dict[str, dict[str, int]]:
        """{'truths': kind -> number, 'detections': kind -> number}."""
        truths, detections = Counter(self.truth.tolist()), Counter(self.detection.tolist())
        return {
            "truths": {kind: truths[kind] for kind in TRUTH_KINDS},
            "detections": {kind: detections[kind] for kind in DETECTION_KINDS},
        }


def kinds(batch: Batch, verdicts: Verdicts, iou_threshold: float = 0.5) -> Kinds:
    """Sorts everything that did not score into the first kind of `TRUTH_KINDS` or `DETECTION_KINDS` that fits."""
    used = verdicts.care[batch.truth] & verdicts.kept[batch.detection]
    g, d, iou = batch.truth[used], batch.detection[used], batch.iou()[used]
    sigma, tau = batch.truth_share()[used], batch.detection_share()[used]
    n, m = len(batch.ignore), len(batch.scores)

    # A piece lies in the word and is not the whole of it.
    piece = (tau >= _INSIDE) & (sigma < 0.9)
    pieces = np.bincount(g[piece], minlength=n)
    covered = np.bincount(g[piece], sigma[piece], n)
    # Pieces stand side by side: detections on top of each other are duplicates.
    in_pieces = (pieces >= 2) & (covered >= _COVERED) & (covered <= 1.25)
    swallowed = sigma >= _INSIDE
    merging = np.bincount(d[swallowed], minlength=m) >= 2
    merged = np.zeros(n, bool)
    merged[g[swallowed & merging[d]]] = True
    best_truth, best_detection = np.zeros(n), np.zeros(m)
    np.maximum.at(best_truth, g, iou)
    np.maximum.at(best_detection, d, iou)
    fragment = np.zeros(m, bool)
    fragment[d[piece & in_pieces[g]]] = True

    found, right = verdicts.truth_credit > 0, verdicts.detection_credit > 0
    truth = _first_of(
        [~verdicts.care, found, in_pieces, merged, best_truth > _LOOSE], ["", "found", "fragmented", "merged", "loose"], "missed"
    )
    detection = _first_of(
        [~verdicts.kept, right, fragment, merging, best_detection > iou_threshold, best_detection > _LOOSE],
        ["", "right", "fragment", "merging", "duplicate", "loose"],
        "false",
    )
    return Kinds(truth, detection, int(np.count_nonzero(in_pieces & verdicts.care)))


def _first_of(conditions: list[NDArray[np.bool_]], names: list[str], otherwise: str) -> NDArray[np.object_]:
    return np.select(conditions, [np.full(len(conditions[0]), name, dtype=object) for name in names], otherwise)


@dataclass(frozen=True)
class Group:
    """Recall and precision of one kind of word."""

    by: str
    name: str
    recall: float | None
    """None without truths."""
    truths: int
    precision: float | None
    """None where detections have no such property, or there are none."""
    detections: int


_SIZES = ((0.0, "short side < 10 px"), (10.0, "10-20 px"), (20.0, "20-40 px"), (40.0, "40 px and more"))
_ASPECTS = ((0.0, "long / short side < 2"), (2.0, "2-5"), (5.0, "5-10"), (10.0, "10 and more"))
_CURVES = ((0.0, "straight"), (0.03, "slightly curved"), (0.1, "curved"))
"""By 1 - area / area of the convex hull."""


def breakdown(images: Sequence[EvalImage], batch: Batch, verdicts: Verdicts) -> list[Group]:
    """Recall by the truths' own size, aspect, curvature and language, precision by the detections' own."""
    truth_sides = _sides([p for s in images for p in s.truths])
    detection_sides = _sides([p for s in images for p in s.detections])
    groups: list[Group] = []
    for title, buckets, of_truth, of_detection in (
        ("size", _SIZES, truth_sides[:, 0], detection_sides[:, 0]),
        ("aspect", _ASPECTS, _ratio(truth_sides), _ratio(detection_sides)),
        ("curvature", _CURVES, _curvature(batch.truths), _curvature(batch.detections)),
    ):
        edges = np.array([edge for edge, _ in buckets])
        truth_bucket = np.searchsorted(edges, of_truth, side="right") - 1
        detection_bucket = np.searchsorted(edges, of_detection, side="right") - 1
        for k, (_, name) in enumerate(buckets):
            groups.append(_group(title, name, verdicts, truth_bucket == k, detection_bucket == k))
    languages = [lang for s in images for lang in (s.languages or [None] * len(s.truths))]
    for name in sorted({lang for lang in languages if lang}):
        groups.append(_group("language", name, verdicts, np.array([lang == name for lang in languages]), None))
    return groups


def _group(by: str, name: str, verdicts: Verdicts, truths: NDArray[np.bool_], detections: NDArray[np.bool_] | None) -> Group:
    truths = truths & verdicts.care
    number = int(truths.sum())
    recall = float(verdicts.truth_credit[truths].sum() / number) if number else None
    if detections is None:
        return Group(by, name, recall, number, None, 0)
    detections = detections & verdicts.kept
    kept = int(detections.sum())
    precision = float(verdicts.detection_credit[detections].sum() / kept) if kept else None
    return Group(by, name, recall, number, precision, kept)


def _sides(polygons: Sequence[NDArray[np.floating]]) -> NDArray[np.float64]:
    """(N, 2) short and long side of the smallest rotated rectangle, pixels."""
    sides = np.zeros((len(polygons), 2))
    for k, polygon in enumerate(polygons):
        if len(polygon):
            extent = np.linalg.norm(np.ptp(polygon, axis=0))
            short = short_side(polygon)
            sides[k] = short, max(short, _long_side(polygon) if extent else 0.0)
    return sides


def _long_side(polygon: NDArray[np.floating]) -> float:
    import cv2

    return float(max(cv2.minAreaRect(np.asarray(polygon, np.float32))[1]))


def _ratio(sides: NDArray[np.float64]) -> NDArray[np.float64]:
    return sides[:, 1] / np.maximum(sides[:, 0], 1e-9)


def _curvature(shapes: NDArray[np.object_]) -> NDArray[np.float64]:
    hull = shapely.area(shapely.convex_hull(shapes)) if len(shapes) else np.zeros(0)
    area = shapely.area(shapes) if len(shapes) else np.zeros(0)
    return np.clip(1 - area / np.maximum(hull, 1e-9), 0, 1)

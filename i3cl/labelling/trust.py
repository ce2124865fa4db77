"""How far fused labels can be trusted, measured where the truth is known, and the images on which the members disagree most."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from i3cl import claims, storage
from i3cl.config import EvaluateSettings, LabelSettings, Settings
from i3cl.data.formats.coco import write_coco
from i3cl.data.formats.records import Dataset, ImageRecord, Instance
from i3cl.data.tools.splits import hash_images
from i3cl.errors import UserError
from i3cl.evaluation.analysis.intervals import difference_interval
from i3cl.evaluation.formats.table import check_image_sizes
from i3cl.evaluation.metrics.judge import DROPPED, assign
from i3cl.evaluation.metrics.metric import DetectionMetric
from i3cl.evaluation.metrics.model_score import image_of_record
from i3cl.evaluation.metrics.protocols import iou_rules
from i3cl.geometry import short_side
from i3cl.labelling.calibration import (
    Calibration,
    ReliabilityBin,
    active_members,
    cross_calibrated,
    fit_calibration,
    reliability,
)
from i3cl.labelling.fused import FusedImage, fused_images
from i3cl.labelling.fusion import FusedInstances, fuse_images

_SIDES = (0.0, 6.0, 10.0, 16.0, 24.0, 40.0, np.inf)
"""Pixels; limits of the rows of the size table."""
_UNRELATED = 32
"""Bits in which the perceptual hashes of unrelated images differ."""


@dataclass(frozen=True)
class Rate:
    """Precision and recall of a part of the fused instances."""

    name: str
    count: int
    """Instances in the part."""
    precision: float
    """Share of them that is right, without don't-care ones; nan when there are none."""
    recall: float
    """Share of all truths (in the table by size: of the truths of that size) that they find; nan without truths."""


@dataclass(frozen=True)
class Contest:
    """One member, or the ensemble, at the score threshold of its best F."""

    name: str
    recall: float
    precision: float
    hmean: float
    threshold: float


@dataclass(frozen=True)
class Trust:
    """The result of `measure_trust`."""

    images: int
    truths: int
    by_threshold: list[Rate]
    by_votes: list[Rate]
    by_size: list[Rate]
    members: list[Contest]
    """By descending F."""
    ensemble: Contest
    gain: tuple[float, float, float]
    """F of the ensemble minus F of the best member: measured, and the 2.5 and 97.5 percentiles of a bootstrap over images."""
    raw: list[ReliabilityBin]
    """With the fused score as expected precision."""
    calibrated: list[ReliabilityBin]
    """With the expected precision of calibrations that have not seen the image."""
    calibration: Calibration
    """Learned from all images."""
    disputed: list[FusedImage]
    """All images, the most disputed first."""


def dispute(fused: FusedInstances, members: int) -> float:
    """Sum over the instances of score x (1 - votes / members): high where sure members are contradicted."""
    return float((fused.scores * (1 - np.minimum(fused.votes / max(members, 1), 1))).sum())


def measure_trust(predictions: str, truth: Sequence[ImageRecord], settings: LabelSettings, evaluate: EvaluateSettings) -> Trust:
    """Compare fused labels of stored predictions with the truth of the same images. Images without predictions count as missed.

    UserError when no image of the truth has predictions, or when nothing was found in any of them.
    """
    check_image_sizes(predictions, truth)
    known = {record.id: record for record in truth}
    images = {item.image_id: item for item in fused_images(predictions, settings) if item.image_id in known}
    if not images:
        raise UserError(f"{predictions}: has no image of the truth; predictions and --truth must belong to the same data set")
    names = active_members({part.member for item in images.values() for part in item.members}, settings.fusion)
    nothing = FusedInstances([], np.zeros(0), np.zeros(0, np.int64), np.zeros(0))
    fused = {i: images[i].fused if i in images else nothing for i in known}

    rows: list[NDArray[np.float64]] = []
    truth_sides: list[float] = []
    found_sides: list[float] = []
    for record in truth:
        own = fused[record.id]
        verdict = assign(*_truths(record), own.polygons, evaluate.iou, evaluate.matching)
        sides = np.array([short_side(polygon) for polygon in own.polygons])
        columns = [np.full(len(own), record.id), own.scores, own.votes, sides, verdict]
        rows.append(np.stack(columns, axis=1).reshape(-1, 5).astype(np.float64))
        truth_sides += [short_side(i.polygon) for i in record.instances if not i.ignore]
        matched = {int(k) for k, score in zip(verdict, own.scores) if k >= 0 and score >= settings.select.low}
        found_sides += [short_side(record.instances[k].polygon) for k in matched]
    image, score, votes, side, verdict = np.concatenate(rows).T
    counted = verdict != DROPPED
    image, score, votes, side = image[counted], score[counted], votes[counted], side[counted]
    right = verdict[counted] >= 0
    if not len(score):
        raise UserError(f"{predictions}: no member found anything in the images of the truth; train longer")

    def rate(name: str, chosen: NDArray[np.bool_]) -> Rate:
        precision = float(right[chosen].mean()) if chosen.any() else float("nan")
        found = np.count_nonzero(right & chosen) / len(truth_sides) if truth_sides else float("nan")
        return Rate(name, int(chosen.sum()), precision, found)

    by_size = []
    for low, high in pairwise(_SIDES):
        part = rate("", (side >= low) & (side < high) & (score >= settings.select.low))
        there, hit = (sum(low <= s < high for s in sides) for sides in (truth_sides, found_sides))
        label = f"{low:g}-{high:g} px" if np.isfinite(high) else f"from {low:g} px"
        by_size.append(Rate(label, part.count, part.precision, hit / there if there else float("nan")))
    # A member that finds lines has no words of its own to be scored.
    of_words = {part.member for item in images.values() for part in item.members if not part.lines}
    alone = {name: _alone(name, images, known, settings) for name in names if name in of_words}
    counts = {name: _contest(name, truth, found, evaluate) for name, found in alone.items()}
    members = sorted((contest for contest, _ in counts.values()), key=lambda contest: -contest.hmean)
    ensemble, own_counts = _contest("ensemble", truth, fused, evaluate)
    interval = difference_interval(own_counts, counts[members[0].name][1])
    calibration = fit_calibration(score, right, names, settings.fusion)
    return Trust(
        images=len(known),
        truths=len(truth_sides),
        by_threshold=[rate(f"{t:.2f}", score >= t) for t in np.arange(0.1, 1, 0.1)],
        by_votes=[rate(f"{k} of {len(names)}", votes == k) for k in range(1, len(names) + 1)],
        by_size=by_size,
        members=members,
        ensemble=ensemble,
        gain=(ensemble.hmean - members[0].hmean, interval.low, interval.high),
        raw=reliability(score, right),
        calibrated=reliability(cross_calibrated(score, right, image), right),
        calibration=calibration,
        disputed=sorted(images.values(), key=lambda item: (-dispute(item.fused, len(names)), item.image_id)),
    )


def diverse_order(disputed: Sequence[FusedImage], members: int, images_root: str, *, upright: bool = False) -> list[FusedImage]:
    """The same images in the order of `spread`: disputed ones first, but none that looks like an earlier one.

    Images are compared by 64-bit perceptual hashes. One that cannot be read counts as unlike all others.
    """
    records = tuple(ImageRecord(item.image_id, item.file_name, item.height, item.width) for item in disputed)
    hashes, names = hash_images(Dataset("disputed", images_root, records), upright=upright)
    hash_of = dict(zip(names, hashes))
    readable = np.array([record.file_name in hash_of for record in records], bool)
    every = np.array([hash_of.get(record.file_name, np.uint64(0)) for record in records], np.uint64)
    order = spread(np.array([dispute(item.fused, members) for item in disputed]), every, readable)
    return [disputed[k] for k in order]


def spread(values: NDArray[np.float64], hashes: NDArray[np.uint64], comparable: NDArray[np.bool_]) -> list[int]:
    """Greedy order: each place takes the image with the largest value x distance to the nearest image that was taken before.

    Args:
        values: (N,) what a review of the image is worth, >= 0.
        hashes: (N,) 64-bit perceptual hashes.
        comparable: (N,) False for images without a hash, whose distance to others is 1.

    Returns:
        All N positions. The distance is the number of differing bits / 32, at most 1: unrelated images differ in about 32. Ties
        go by value, then by position.
    """
    near = np.ones(len(values))
    left = np.ones(len(values), bool)
    # By value, so that the first of equal products has the larger value.
    ranked = np.argsort(-values, kind="stable")
    order: list[int] = []
    for _ in range(len(values)):
        products = np.where(left[ranked], values[ranked] * near[ranked], -1.0)
        taken = int(ranked[products.argmax()])
        order.append(taken)
        left[taken] = False
        if comparable[taken]:
            distance = np.minimum(np.bitwise_count(hashes ^ hashes[taken]) / _UNRELATED, 1.0)
            near = np.minimum(near, np.where(comparable, distance, 1.0))
    return order


def _truths(record: ImageRecord) -> tuple[list[NDArray[np.float32]], NDArray[np.bool_]]:
    return [i.polygon for i in record.instances], np.array([i.ignore for i in record.instances], bool)


def _alone(
    name: str, images: Mapping[int, FusedImage], known: Mapping[int, ImageRecord], settings: LabelSettings
) -> dict[int, FusedInstances]:
    """What one member finds by itself, with its views fused."""
    parts = [[p for p in images[i].members if p.member == name] if i in images else [] for i in known]
    return dict(zip(known, fuse_images(parts, settings.fusion)))


def _contest(
    name: str, truth: Sequence[ImageRecord], found: Mapping[int, FusedInstances], evaluate: EvaluateSettings
) -> tuple[Contest, NDArray[np.float64]]:
    """Its best F, and (images, 4) counts at that threshold as `Counts.ratios` has them."""
    metric = DetectionMetric(iou_rules(evaluate.iou, evaluate.matching))
    metric.update([image_of_record(record, found[record.id].polygons, found[record.id].scores) for record in truth])
    best = metric.summary("best")
    assert best.threshold is not None
    contest = Contest(name, best.recall, best.precision, best.hmean, best.threshold)
    return contest, metric.counts(best.threshold).ratios


def exif_of_predictions(predictions: str, settings: Settings) -> Literal["stored", "upright"]:
    """The data.exif with which stored predictions were made; that of the settings where the folder does not say it.

    UserError when the recipe or the command line gives another one.
    """
    job = claims.read(storage.join(predictions, "job.json"))
    made: Literal["stored", "upright"] | None = job.get("data.exif") if isinstance(job, dict) else None
    if made is None:
        return settings.data.exif
    if "exif" in settings.data.model_fields_set and settings.data.exif != made:
        raise UserError(
            f"{predictions}: was made with data.exif={made}, not {settings.data.exif}; predict again, or give data.exif={made} "
            "and truth in those pixels"
        )
    return made


def write_disputed(path: str, disputed: Sequence[FusedImage]) -> None:
    """Write the images in this order as COCO json, the fused instances with score and votes, for review in a labelling tool."""
    records = [
        ImageRecord(
            item.image_id,
            item.file_name,
            item.height,
            item.width,
            tuple(
                Instance(polygon, score=float(score), votes=int(votes))
                for polygon, score, votes in zip(item.fused.polygons, item.fused.scores, item.fused.votes)
            ),
        )
        for item in disputed
    ]
    write_coco(path, records, info={"description": "fused instances, the most disputed image first"})

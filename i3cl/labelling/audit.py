"""An audit of given labels: where an ensemble that has not seen an image contradicts the labels of that image."""

from __future__ import annotations

import csv
import io
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from i3cl import storage
from i3cl.config import AuditSettings, LabelSettings
from i3cl.data.formats.coco import write_coco
from i3cl.data.formats.predictions import read_batches
from i3cl.data.formats.records import ImageRecord, Instance
from i3cl.errors import UserError
from i3cl.evaluation.formats.table import check_image_sizes
from i3cl.geometry import overlaps, polygon_box, short_side
from i3cl.labelling.calibration import active_members
from i3cl.labelling.fused import FusedImage, fused_images
from i3cl.labelling.fusion import FusedInstances, MemberPrediction, Ring

Kind = Literal["missing", "unsupported", "loose"]

KINDS: dict[Kind, str] = {
    "missing": "the ensemble is confident of a word that no label covers",
    "unsupported": "no member sees a word where the label is, not even with a low score",
    "loose": "the members agree on an outline, and the label has another one",
}
"""Kind of problem -> what it means."""

_COVERED = 0.5
"""Share of a polygon that others have to cover: labels may be lines where members find words, or the reverse."""
_ALIKE = 0.3
"""IoU from which a detection supports a label even if the label is much larger."""
_SIZES = (6.0, 10.0, 16.0, 24.0, 40.0)
"""Pixels of the short side; limits of the ranges in which labels are compared."""
_NEAR = 0.05
"""Difference of fused scores up to which instances are comparable."""


@dataclass(frozen=True)
class Contradiction:
    """One problem of an image's labels."""

    kind: Kind
    score: float
    """0-1, the share of comparable cases in which labels and ensemble agree: how unusual the contradiction is."""
    label: int | None
    """Index of the label in the image's record; None for a missing one."""
    polygon: Ring
    """(P, 2) pixels: the label, or the outline of the missing word."""
    found: Ring | None = None
    """The ensemble's outline of a missing or loose word."""
    votes: int = 0
    """Members that found it; 0 for an unsupported label."""
    found_score: float | None = None
    """Fused score of a missing or loose word."""


@dataclass(frozen=True)
class AuditedImage:
    """An image with its given labels and what contradicts them."""

    record: ImageRecord
    problems: tuple[Contradiction, ...]
    """By descending score."""

    @property
    def score(self) -> float:
        """Sum of the problems' scores; the ranking goes by it."""
        return sum(problem.score for problem in self.problems)


@dataclass(frozen=True)
class Audit:
    """The result of `audit_labels`."""

    images: int
    """Images that were compared."""
    labels: int
    """Labels of these images, without ignore regions."""
    ranking: list[AuditedImage]
    """Images with a problem, the most contradicted first."""
    unpredicted: list[str]
    """Labelled images without predictions; they were not compared."""
    unreadable: list[str]
    """Labelled images that could not be read when they were predicted; they were not compared either."""

    def counts(self) -> dict[Kind, int]:
        """Number of problems of each kind."""
        counted = Counter(problem.kind for item in self.ranking for problem in item.problems)
        return {kind: counted[kind] for kind in KINDS}


def audit_labels(predictions: Sequence[str], truth: Sequence[ImageRecord], settings: LabelSettings) -> Audit:
    """Compare given labels with predictions of members that have not seen the image.

    Args:
        predictions: Folders of predictions, one for each fold; no image may be in two of them.
        truth: The labelled images.
        settings: `fusion` and `audit` count.

    Raises:
        UserError: An image is in two folders, is another file or has another size there, or none has predictions.
    """
    known = {record.id: record for record in truth}
    unreadable = _check_folds(predictions, known)
    compared: dict[int, _Compared] = {}
    for folder in predictions:
        for item in fused_images(folder, settings):
            record = known.get(item.image_id)
            if record is not None:
                compared[record.id] = _compare(record, item, settings)
    if not compared:
        raise UserError(f"{', '.join(predictions)}: no image of the labelled set could be read there; predict its images first")
    ranking = []
    for i, problems in zip(compared, _problems(list(compared.values()), settings.audit)):
        if problems:
            ranking.append(AuditedImage(known[i], tuple(sorted(problems, key=lambda p: -p.score))))
    unreadable -= set(compared)
    missed = set(known) - set(compared) - unreadable
    return Audit(
        images=len(compared),
        labels=sum(len(case.care) for case in compared.values()),
        ranking=sorted(ranking, key=lambda item: (-item.score, item.record.id)),
        unpredicted=[known[i].file_name for i in known if i in missed],
        unreadable=[known[i].file_name for i in known if i in unreadable],
    )


def _check_folds(predictions: Sequence[str], known: dict[int, ImageRecord]) -> set[int]:
    """Ids of the labelled images that could not be read. UserError as for `audit_labels`."""
    owner: dict[int, str] = {}
    unreadable: set[int] = set()
    for folder in predictions:
        check_image_sizes(folder, known.values())
        names: dict[int, str] = {}
        for batch in read_batches(folder, ["image_id", "file_name", "error"]):
            for row in batch.to_pylist():
                names[row["image_id"]] = row["file_name"]
                if row["error"] is not None:
                    unreadable.add(row["image_id"])
        for image_id, name in names.items():
            record = known.get(image_id)
            if record is None:
                continue
            if record.file_name != name:
                raise UserError(
                    f"{folder}: image {image_id} is {name} there and {record.file_name} in the labelled set; give the set "
                    "whose images were predicted, or a split of it"
                )
            if image_id in owner:
                raise UserError(
                    f"{folder}: {name} is also predicted in {owner[image_id]}; each image must be predicted once, by members "
                    "that were trained without it"
                )
        owner |= dict.fromkeys(names, folder)
    return unreadable & set(known)


@dataclass(frozen=True)
class _Compared:
    """An image's labels beside what was found in it."""

    labels: list[Ring]
    care: NDArray[np.int64]
    """(n,) indices of the labels that are not ignore regions."""
    size: NDArray[np.int64]
    """(n,) index of the range of sizes in which each of them is."""
    support: NDArray[np.float64]
    """(n,) the highest score at which a member finds each of them."""
    fused: FusedInstances
    covered: NDArray[np.bool_]
    """(m,) whether labels cover the fused instance."""
    same: list[tuple[int, int, float]]
    """Label, fused instance and their IoU where both mean the same word and the members agree on its outline."""


def _compare(record: ImageRecord, item: FusedImage, settings: LabelSettings) -> _Compared:
    labels = [label.polygon for label in record.instances]
    care = np.array([k for k, label in enumerate(record.instances) if not label.ignore], np.int64)
    fused = item.fused
    pairs = overlaps(labels, fused.polygons)
    covered = np.zeros(len(fused))
    np.add.at(covered, pairs.second, pairs.intersection)
    same = []
    iou = pairs.dense_iou()
    if iou.size:
        for k in care.tolist():
            j = int(iou[k].argmax())
            # The label that overlaps the instance most is the one that it contradicts; a neighbour touches it only.
            alike = iou[k, j] >= settings.audit.loose_low and iou[:, j].argmax() == k
            if alike and fused.agreement[j] >= settings.audit.agreement:
                same.append((k, j, float(iou[k, j])))
    active = set(active_members({part.member for part in item.members}, settings.fusion))
    support = _support(labels, [part for part in item.members if part.member in active])
    return _Compared(
        labels=labels,
        care=care,
        size=np.digitize([short_side(labels[k]) for k in care.tolist()], _SIZES),
        support=support[care],
        fused=fused,
        covered=covered >= _COVERED * pairs.area_second,
        same=same,
    )


def _problems(cases: Sequence[_Compared], limits: AuditSettings) -> Iterator[list[Contradiction]]:
    """The problems of each image. A score is the share of comparable cases in which labels and ensemble agree.

    So a contradiction counts little where contradictions are common: for small words that are often missed, and for scores at
    which many detections are false alarms.
    """
    scores = np.concatenate([case.fused.scores for case in cases])
    covered = np.concatenate([case.covered for case in cases])
    size, support = (np.concatenate(parts) for parts in zip(*((case.size, case.support) for case in cases)))
    outlines = np.sort([iou for case in cases for _, _, iou in case.same])

    def confirmed(score: float) -> float:
        near = covered[np.abs(scores - score) <= _NEAR]
        # With few such instances the score itself is the best guess.
        return float((near.sum() + 2 * score) / (len(near) + 2))

    ranges = range(len(_SIZES) + 1)
    usual = [(np.count_nonzero(support[size == k] >= limits.support) + 1) / (np.count_nonzero(size == k) + 2) for k in ranges]
    for case in cases:
        fused = case.fused
        problems = []
        for j in np.flatnonzero(~case.covered & (fused.scores >= limits.confident)).tolist():
            votes, ring, found = int(fused.votes[j]), fused.polygons[j], float(fused.scores[j])
            problems.append(Contradiction("missing", confirmed(found), None, ring, ring, votes, found))
        for k, j, iou in case.same:
            if iou < limits.loose_high:
                better = len(outlines) - int(np.searchsorted(outlines, iou, "right"))
                score = (better + 1) / (len(outlines) + 2)
                votes, found = int(fused.votes[j]), float(fused.scores[j])
                problems.append(Contradiction("loose", score, k, case.labels[k], fused.polygons[j], votes, found))
        loose = {problem.label for problem in problems}
        for k, own_size, own_support in zip(case.care.tolist(), case.size.tolist(), case.support.tolist()):
            if own_support < limits.support and k not in loose:
                problems.append(Contradiction("unsupported", usual[own_size] * (1 - own_support), k, case.labels[k]))
        yield problems


def _support(labels: Sequence[Ring], members: Sequence[MemberPrediction]) -> NDArray[np.float64]:
    """(N,) the highest score at which one view of one member covers half of each label or has a similar outline; else 0."""
    support = np.zeros(len(labels))
    for part in members:
        scores = np.asarray(part.scores, np.float64)
        pairs = overlaps(labels, [np.asarray(polygon, np.float32) for polygon in part.polygons])
        share = pairs.intersection / np.maximum(pairs.area_first[pairs.first], 1e-9)
        alike = pairs.iou >= _ALIKE
        np.maximum.at(support, pairs.first[alike], scores[pairs.second[alike]])
        order = np.lexsort((-scores[pairs.second], pairs.first))
        first, second, share = pairs.first[order], pairs.second[order], share[order]
        for k in np.unique(first).tolist():
            own = slice(*np.searchsorted(first, [k, k + 1]).tolist())
            enough = np.flatnonzero(np.cumsum(share[own]) >= _COVERED)
            if len(enough):
                support[k] = max(support[k], scores[second[own]][enough[0]])
    return support


# ---------------------------------------------------------------------------------------------------- writing


def write_audit(path: str, audit: Audit) -> None:
    """Write the images with a problem as COCO json, in the order of the ranking, for correction in a labelling tool.

    An image has all its given labels; those in question have `problem` and `problem_score`. Missing words are added with their
    score and votes.
    """
    write_coco(path, map(_for_review, audit.ranking), info={"description": "audited labels, the most contradicted image first"})


def _for_review(item: AuditedImage) -> ImageRecord:
    labels = list(item.record.instances)
    added = []
    for problem in item.problems:
        mark = (problem.kind, problem.score)
        if problem.label is None:
            added.append(Instance(problem.polygon, score=problem.found_score, votes=problem.votes, problem=mark))
        else:
            labels[problem.label] = replace(labels[problem.label], problem=mark)
    return replace(item.record, instances=(*labels, *added))


def write_audit_table(path: str, audit: Audit) -> None:
    """Write one row for each problem, the strongest first: image, problem, score, box (x0 y0 x1 y1 in pixels)."""
    rows = [(item, problem) for item in audit.ranking for problem in item.problems]
    rows.sort(key=lambda row: -row[1].score)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["image", "problem", "score", "box"])
    for item, problem in rows:
        box = " ".join(f"{value:.1f}" for value in polygon_box(problem.polygon))
        writer.writerow([item.record.file_name, problem.kind, f"{problem.score:.4f}", box])
    storage.write_text_atomic(path, text.getvalue())

"""An audit of given labels: where an ensemble that has not seen an image contradicts the labels of that image."""

from __future__ import annotations

import csv
import io
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from i3cl import storage
from i3cl.config import LabelSettings
from i3cl.data.formats.coco import write_coco
from i3cl.data.formats.predictions import read_batches
from i3cl.data.formats.records import ImageRecord, Instance
from i3cl.errors import UserError
from i3cl.evaluation.formats.table import check_image_sizes
from i3cl.geometry import overlaps, polygon_box, short_side
from i3cl.labelling.calibration import active_members
from i3cl.labelling.fusion import FusedInstances, MemberPrediction, Ring
from i3cl.labelling.pseudo import fused_images

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
"""Pixels of the short side; limits of the sizes whose labels are found equally well."""


@dataclass(frozen=True)
class Contradiction:
    """One problem of an image's labels."""

    kind: Kind
    score: float
    """0-1, how strong the evidence is."""
    label: int | None
    """Index of the label in the image's record; None for a missing one."""
    polygon: Ring
    """(P, 2) pixels: the label, or the outline of the missing word."""
    found: Ring | None = None
    """The ensemble's outline of a missing or loose word."""
    votes: int = 0
    """Members that found it; 0 for an unsupported label."""


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
    drafts: dict[int, tuple[list[Contradiction], NDArray[np.float64]]] = {}
    for folder in predictions:
        for item in fused_images(folder, settings):
            record = known.get(item.image_id)
            if record is not None:
                active = set(active_members({part.member for part in item.members}, settings.fusion))
                support = _support(record, [part for part in item.members if part.member in active])
                drafts[record.id] = _missing_and_loose(record, item.fused, settings), support
    if not drafts:
        raise UserError(f"{', '.join(predictions)}: no image of the labelled set could be read there; predict its images first")

    # A label that nobody finds says little in a size of which most labels are not found.
    care = {i: [k for k, label in enumerate(known[i].instances) if not label.ignore] for i in drafts}
    size_of = {i: np.digitize([short_side(label.polygon) for label in known[i].instances], _SIZES) for i in drafts}
    there, seen = np.zeros(len(_SIZES) + 1), np.zeros(len(_SIZES) + 1)
    for i, (_, support) in drafts.items():
        np.add.at(there, size_of[i][care[i]], 1)
        np.add.at(seen, size_of[i][care[i]], support[care[i]] >= settings.audit.support)
    usually_found = (seen + 1) / (there + 2)

    ranking = []
    for i, (problems, support) in drafts.items():
        labels = known[i].instances
        loose = {problem.label for problem in problems}
        for k in care[i]:
            if k not in loose and support[k] < settings.audit.support:
                score = float(usually_found[size_of[i][k]] * (1 - support[k]))
                problems.append(Contradiction("unsupported", score, k, labels[k].polygon))
        if problems:
            ranking.append(AuditedImage(known[i], tuple(sorted(problems, key=lambda p: -p.score))))
    unreadable -= set(drafts)
    missed = set(known) - set(drafts) - unreadable
    return Audit(
        images=len(drafts),
        labels=sum(map(len, care.values())),
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
                    f"{folder}: {name} is also predicted in {owner[image_id]}; each image must be predicted once, by members that "
                    "were trained without it"
                )
        owner |= dict.fromkeys(names, folder)
    return unreadable & set(known)


def _missing_and_loose(record: ImageRecord, fused: FusedInstances, settings: LabelSettings) -> list[Contradiction]:
    limits = settings.audit
    labels = [label.polygon for label in record.instances]
    pairs = overlaps(labels, fused.polygons)
    covered = np.zeros(len(fused))
    np.add.at(covered, pairs.second, pairs.intersection)
    covered /= np.maximum(pairs.area_second, 1e-9)
    problems = [
        Contradiction("missing", float(fused.scores[j]), None, fused.polygons[j], fused.polygons[j], int(fused.votes[j]))
        for j in np.flatnonzero((covered < _COVERED) & (fused.scores >= limits.confident)).tolist()
    ]
    iou = pairs.dense_iou()
    if not iou.size:
        return problems
    for k, j in enumerate(iou.argmax(axis=1).tolist()):
        best = float(iou[k, j])
        sure = fused.scores[j] >= limits.confident and fused.agreement[j] >= limits.agreement
        # The label that overlaps the instance most is the one that it contradicts; a neighbour touches it only.
        if sure and not record.instances[k].ignore and iou[:, j].argmax() == k and limits.loose_low <= best < limits.loose_high:
            distance = (limits.loose_high - best) / (limits.loose_high - limits.loose_low)
            score = float(np.clip(distance * fused.agreement[j], 0, 1))
            problems.append(Contradiction("loose", score, k, labels[k], fused.polygons[j], int(fused.votes[j])))
    return problems


def _support(record: ImageRecord, members: Sequence[MemberPrediction]) -> NDArray[np.float64]:
    """(N,) for each label the highest score at which one view of one member covers half of it or has a similar outline, else 0."""
    support = np.zeros(len(record.instances))
    labels = [label.polygon for label in record.instances]
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
            added.append(Instance(problem.polygon, score=problem.score, votes=problem.votes, problem=mark))
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

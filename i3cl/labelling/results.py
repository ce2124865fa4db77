"""Members whose findings come from files: what another program found in the images of a labelling job."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from i3cl import claims, storage
from i3cl.config import MemberSettings
from i3cl.data.exports.corrections import read_instances
from i3cl.data.exports.registry import REVIEW_FORMATS
from i3cl.data.formats.checks import Faults
from i3cl.data.formats.records import Dataset
from i3cl.data.formats.table import is_table as holds_labels
from i3cl.errors import UserError
from i3cl.evaluation.analysis.advice import diagnose
from i3cl.evaluation.formats.coco import RESULTS, truth_of_record
from i3cl.evaluation.formats.files import is_table
from i3cl.evaluation.formats.pairing import pair
from i3cl.evaluation.formats.read import read_results
from i3cl.evaluation.formats.sets import PolygonSet
from i3cl.evaluation.formats.table import members_of
from i3cl.evaluation.metrics.batch import EvalImage
from i3cl.evaluation.metrics.protocols import iou_rules

FORMATS = ("auto", *REVIEW_FORMATS)
"""What label.members.NAME.format may be. auto: what `i3cl evaluate` recognises, and LabelMe's and PaddleOCR's files."""
_OUTSIDE = 0.2
"""Share of the polygons whose middle may lie outside of their images."""
_SURE = 0.5
"""Score from which what other members found counts as found, when a member is compared with them."""
_WRONG = ("swapped", "boxes", "scale", "flipped", "offset", "image ids")
"""Kinds of advice that mean a fault of the file and not of the detector."""

Found = tuple[Sequence[NDArray[np.floating]], NDArray[np.floating]]
"""Polygons (P, 2) in pixels and scores (N,) 0-1."""


@dataclass(frozen=True)
class Results:
    """What one member's files hold for the images of a job."""

    found: Mapping[int, Found]
    """Image id -> findings. Images that the files do not name are not in it."""
    notes: list[str]
    """For people: what was left out, and how many images have no findings."""


def results_hash(settings: MemberSettings) -> str:
    """SHA-256 of the content of a member's files. UserError when one is not there."""
    for path in settings.results:
        if not storage.exists(path):
            raise UserError(f"{path}: no such file or folder; correct label.members.NAME.results")
    return claims.files_hash([path for given in settings.results for path in _files(given)])


def _files(path: str) -> list[str]:
    """The file itself, the parts of a predictions folder, or all files of another folder, always in the same order."""
    return claims.parts(path) or [storage.join(path, name) for name in sorted(storage.list_files(path))]


def read_member(name: str, settings: MemberSettings, images: Dataset, skip_bad: bool = False) -> Results:
    """The findings of a member's files for the images of a job.

    Args:
        name: Of the member; which member of a predictions table is meant, where that holds several.
        settings: Its `results`, and their `format`.
        images: Of the job. Each file's images are found among them by name, COCO results by id.
        skip_bad: Leave out what cannot be used and list it.

    Raises:
        UserError: A file cannot be read or names none of the images, two files name the same image, an image has another size
            there, or, without `skip_bad`, an item cannot be used.
    """
    if settings.format not in FORMATS:
        raise UserError(f"label.members.{name}.format: {settings.format} is not one of {', '.join(FORMATS)}")
    found: dict[int, Found] = {}
    notes: list[str] = []
    source: dict[int, str] = {}
    for path in settings.results:
        form = _format(path) if settings.format == "auto" else settings.format
        faults = Faults(skip_bad)
        own = _evaluated(name, path, images, skip_bad, notes) if form == "auto" else _reviewed(form, path, images, faults)
        notes += [f"{problem.where}: {problem.message}" for problem in faults.problems]
        for image_id, findings in own.items():
            if image_id in found:
                both = f"{source[image_id]} and {path}"
                raise UserError(f"{both}: both hold image {image_id}; give every image's results once")
            found[image_id], source[image_id] = findings, path
    absent = len(images) - len(found)
    if absent:
        notes.append(
            f"{absent} of {len(images)} images are not in the results; there, {name} neither supports nor contradicts others"
        )
    return Results(found, notes)


def _format(path: str) -> str:
    """LabelMe's and PaddleOCR's files by their looks; 'auto' for all that the evaluator recognises itself."""
    if storage.is_dir(path):
        names = storage.list_files(path)
        # A folder that `predict` wrote has json files, too.
        plain = not any(n.endswith((".txt", ".parquet")) for n in names) and "images.json" not in names
        return "labelme" if plain and any(n.endswith(".json") for n in names) else "auto"
    with storage.open_read(path) as file:
        line = file.readline(1 << 20)
    return "paddle" if b"\t[" in line and not line.lstrip().startswith((b"[", b"{")) else "auto"


def _evaluated(name: str, path: str, images: Dataset, skip_bad: bool, notes: list[str]) -> dict[int, Found]:
    """Any file that the evaluator reads."""
    member = name if is_table(path) and not holds_labels(path) and len(members_of(path)) > 1 else None
    results = read_results(path, member=member, skip_bad=skip_bad)
    truth = PolygonSet(
        images.annotations or images.name, "COCO", [truth_of_record(replace(r, instances=())) for r in images.records]
    )
    paired = pair(truth, results, others=True)
    notes += [*results.warnings, *results.left_out]
    if paired.others:
        notes.append(f"{path}: {len(paired.others)} of its images are not in {images.name}, e.g. {paired.others[0]}; left out")
    missing = set(paired.missing)
    ids = [record.id for record in images.records]
    found: dict[int, Found] = {}
    for image_id, image in zip(ids, paired.images, strict=True):
        # A COCO results list cannot say that an image was searched in vain.
        if image.name not in missing or results.format == RESULTS:
            found[image_id] = list(image.detections), np.asarray(image.scores)
    if results.format == RESULTS and missing:
        notes.append(f"{path}: {len(missing)} of {len(images)} images have no detection, e.g. {paired.missing[0]}")
    return found


def _reviewed(form: str, path: str, images: Dataset, faults: Faults) -> dict[int, Found]:
    """A file of a labelling tool. What it marks as ignore is left out; the others have the score 1."""
    found: dict[int, Found] = {}
    for record, instances in read_instances(form, path, images.records, images.annotations or images.name, faults):
        if instances is not None:
            kept = [i for i in instances if not i.ignore]
            found[record.id] = [i.polygon for i in kept], np.array([1.0 if i.score is None else i.score for i in kept])
    return found


def result_row(image: Mapping[str, Any], member: str, view: str, granularity: str, results: Results) -> dict[str, Any]:
    """The row of one image for the predictions table; an image that the files do not name is an error.

    image: with the columns of a manifest.
    """
    own = results.found.get(image["image_id"])
    error = None if own else f"{image['file_name']}: {member}: not in the results"
    polygons, scores = own or ([], [])
    row = {**image, "member": member, "view": view, "granularity": granularity, "error": error}
    return {**row, "polygons": polygons, "scores": scores}


def check_frame(name: str, results: Results, images: Dataset, others: Mapping[int, Sequence[Found]]) -> None:
    """Refuse findings that lie in another frame than the images: scaled, swapped, shifted, of other images.

    others: image id -> what other members have found there, for some images; what they are sure of is the evaluator's truth here.

    UserError with the evaluator's advice.
    """
    sizes = {record.id: record for record in images.records}
    middles = [(sizes[i], polygon.mean(axis=0)) for i, (polygons, _) in results.found.items() for polygon in polygons]
    outside = sum(not (0 <= x <= record.width and 0 <= y <= record.height) for record, (x, y) in middles)
    trial = []
    for image_id, members in others.items():
        if image_id in results.found:
            record, (polygons, scores) = sizes[image_id], results.found[image_id]
            sure = [p for own, own_scores in members for p, score in zip(own, own_scores, strict=True) if score >= _SURE]
            trial.append(
                EvalImage(
                    record.file_name,
                    sure,
                    np.zeros(len(sure), bool),
                    polygons,
                    scores,
                    height=record.height,
                    width=record.width,
                    file_name=record.file_name,
                )
            )
    advice = [each for each in diagnose(trial, iou_rules(0.5, "first")) if each.kind in _WRONG] if trial else []
    if advice:
        raise UserError(f"label.members.{name}.results: compared with the other members, {advice[0].text}")
    if outside > _OUTSIDE * len(middles):
        raise UserError(
            f"label.members.{name}.results: {outside} of {len(middles)} polygons lie outside of their images; "
            "write pixels of the images as they are stored"
        )
    if middles and all((np.abs(p) <= 1.5).all() for polygons, _ in results.found.values() for p in polygons):
        raise UserError(f"label.members.{name}.results: coordinates look relative to the image (0-1); write pixels")

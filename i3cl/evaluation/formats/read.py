"""Truths and results of any format, recognised by their content.

Truth: COCO json or Parquet; ArT/LSVT json; text files (a folder, or a flat zip); any importer's source by name. Results: the
predictions table; a folder that `predict` wrote; COCO results json; ArT submission json; a COCO data set with scores, json or
Parquet; text files. A fault is one line with file and line.
"""

from __future__ import annotations

from collections.abc import Mapping

from i3cl import storage
from i3cl.data.formats.checks import Faults
from i3cl.data.formats.table import is_table as holds_labels
from i3cl.data.importers import parse
from i3cl.errors import UserError
from i3cl.evaluation.formats.art import art_results, art_truth, is_art
from i3cl.evaluation.formats.coco import coco_as_results, coco_results, coco_truth, is_predicted, predicted_results
from i3cl.evaluation.formats.files import is_table, text_files
from i3cl.evaluation.formats.imported import imported_truth
from i3cl.evaluation.formats.sets import ImageDetections, ImageTruth, PointOrder, PolygonSet
from i3cl.evaluation.formats.table import FORMAT, table_results
from i3cl.evaluation.formats.text import text_results, text_truth


def read_results(
    path: str, *, member: str | None = None, point_order: PointOrder = "xy", skip_bad: bool = False
) -> PolygonSet[ImageDetections]:
    """Detections of any format above.

    Args:
        path: A file or folder, local or s3://.
        member: Which member of a predictions table; needed when it holds several.
        point_order: 'yx' for files that write y first, as the official Total-Text ones.
        skip_bad: Leave bad items out and list them.

    Raises:
        UserError: It cannot be read; without `skip_bad` also at the first bad item.
    """
    faults = Faults(skip_bad)
    predicted = is_predicted(path)
    files = None if predicted else text_files(path)
    if predicted:
        found = predicted_results(path, faults)
    elif files is None and is_table(path):
        found = coco_as_results(path, skip_bad) if holds_labels(path) else table_results(path, member)
    elif files is None or _only_json(files):
        label, data = _json_file(path, files)
        content = parse.parse_json(data, label)
        if isinstance(content, list):
            found = coco_results(label, content, faults)
        elif isinstance(content, dict) and "images" in content and "annotations" in content:
            _check_unpacked(label, files)
            found = coco_as_results(path, skip_bad)
        elif is_art(content):
            found = art_results(label, content, faults)
        else:
            raise UserError(f"{label}: neither a COCO results list nor an ArT submission (res_N: [...])")
    else:
        found = text_results(path, files, faults)
    if member is not None and found.format != FORMAT:
        raise UserError(f"--member {member}: {path} is not a predictions table; leave the option out")
    if point_order == "yx":
        for image in found.images:
            image.polygons = [polygon[:, ::-1] for polygon in image.polygons]
    found.left_out += [f"{problem.where}: {problem.message}" for problem in faults.problems]
    return found


def read_truth(
    path: str,
    *,
    format_name: str | None = None,
    split: str = "test",
    skip_bad: bool = False,
    hash_is_dont_care: bool = False,
) -> PolygonSet[ImageTruth]:
    """Truth of any format above.

    Args:
        path: A file or folder, local or s3://.
        format_name: An importer's data set ('totaltext', 'mlt19', ...) whose source `path` is; None: recognised by content.
        split: Which part of that data set, 'train' or 'test'.
        skip_bad: Leave bad items out and list them.
        hash_is_dont_care: The transcription '#' marks don't-care besides '###', as in Total-Text.

    Raises:
        UserError: It cannot be read or holds no image; without `skip_bad` also at the first bad item.
    """
    faults = Faults(skip_bad)
    files = None if format_name is not None or is_table(path) else text_files(path)
    if format_name is not None:
        truth = imported_truth(path, format_name, split, skip_bad, faults)
    elif is_table(path):
        truth = coco_truth(path, skip_bad)
    elif files is None or _only_json(files):
        label, data = _json_file(path, files)
        content = parse.parse_json(data, label)
        if isinstance(content, dict) and "images" in content:
            _check_unpacked(label, files)
            truth = coco_truth(path, skip_bad)
        elif is_art(content):
            truth = art_truth(label, content, faults)
        else:
            raise UserError(f"{label}: neither a COCO data set nor ArT/LSVT labels (gt_N: [...]); name it with --truth-format")
    else:
        truth = text_truth(path, files, faults)
    if hash_is_dont_care:
        for image in truth.images:
            image.spare_hashes()
    truth.left_out += [f"{problem.where}: {problem.message}" for problem in faults.problems]
    if not truth.images:
        raise UserError(f"{path}: holds no image; check the path")
    return truth


def _only_json(files: Mapping[str, bytes]) -> bool:
    return len(files) == 1 and next(iter(files)).lower().endswith(".json")


def _json_file(path: str, files: Mapping[str, bytes] | None) -> tuple[str, bytes]:
    """Where a json lies, in words, and its content: the file itself, or the only one in a zip."""
    if files is None:
        return path, storage.read_bytes(path)
    name, data = next(iter(files.items()))
    return f"{path}: {name}", data


def _check_unpacked(label: str, files: Mapping[str, bytes] | None) -> None:
    if files is not None:
        raise UserError(f"{label}: a COCO data set in a zip; unpack it first")

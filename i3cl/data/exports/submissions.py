"""Results for evaluation servers and tools: the ArT submission, RRC text files, COCO results."""

from __future__ import annotations

import re
import zipfile
from collections.abc import Iterable
from pathlib import PurePosixPath

from pycocotools import mask as mask_codec

from i3cl import storage
from i3cl.data.exports.common import ExportOptions, Format, dumps
from i3cl.data.exports.sources import detections_of
from i3cl.data.formats.records import ImageRecord
from i3cl.errors import UserError

ART_SCORE = 0.45
"""Threshold of the I3CL authors' own submissions; it is not known whether the server tries thresholds itself."""


def write_art(out: str, records: Iterable[ImageRecord], options: ExportOptions) -> str:
    """Write the ICDAR2019-ArT Task 1 json: one key ``res_<n>`` per image, clockwise rings in whole pixels.

    <n> is the digits after the last '_' of the image's name. UserError when a name has none, or two names have the same.
    """
    seen: dict[str, str] = {}
    with storage.atomic_file(out) as file:
        for record in records:
            found = re.search(r"(?:^|_)(\d+)$", PurePosixPath(record.file_name).stem)
            if not found:
                raise UserError(f"{record.file_name}: has no number after its last '_'; ArT names images gt_<number>.jpg")
            key = f"res_{found[1]}"
            _only_once(key, record, seen)
            # No threshold here: read_labels has applied it.
            file.write(f"{',' if len(seen) > 1 else '{'}\n{dumps(key)}: {dumps(detections_of(record).to_art(-1.0))}".encode())
        file.write(b"\n}\n" if seen else b"{}\n")
    return f"{len(seen)} images"


def write_icdar(out: str, records: Iterable[ImageRecord], options: ExportOptions) -> str:
    """Write RRC text results: a flat zip of ``res_<image>.txt`` with one line x1,y1,...,xn,yn[,confidence] per text.

    UserError when two images in different folders have the same name: the zip has no folders.
    """
    seen: dict[str, str] = {}
    with storage.atomic_file(out) as file, zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for record in records:
            name = f"res_{PurePosixPath(record.file_name).stem}.txt"
            _only_once(name, record, seen)
            # A fixed date: the same labels give the same file.
            archive.writestr(zipfile.ZipInfo(name), detections_of(record).to_icdar_text(options.confidence), zipfile.ZIP_DEFLATED)
    return f"{len(seen)} images"


def write_coco_results(out: str, records: Iterable[ImageRecord], options: ExportOptions) -> str:
    """Write COCO results with run-length masks: image_id, category_id, bbox, segmentation, score."""
    images = results = 0
    with storage.atomic_file(out) as file:
        for record in records:
            images += 1
            for result in detections_of(record).to_coco():
                rle = mask_codec.merge(mask_codec.frPyObjects(result["segmentation"], record.height, record.width))
                result["segmentation"] = {"size": rle["size"], "counts": rle["counts"].decode()}
                file.write((("[" if not results else ",") + "\n" + dumps(result)).encode())
                results += 1
        file.write(b"\n]\n" if results else b"[]\n")
    return f"{images} images"


def _only_once(key: str, record: ImageRecord, seen: dict[str, str]) -> None:
    if key in seen:
        raise UserError(f"{record.file_name} and {seen[key]}: both would be {key}; rename one, or export the folders one by one")
    seen[key] = record.file_name


ART = Format(write_art, score=ART_SCORE)
ICDAR = Format(write_icdar)
COCO_RESULTS = Format(write_coco_results)

"""The formats by name."""

from __future__ import annotations

from i3cl.data.exports import cvat, label_studio, labelme, paddle
from i3cl.data.exports.common import with_size
from i3cl.data.exports.sources import read_labels
from i3cl.data.exports.submissions import write_art, write_coco_results, write_icdar
from i3cl.data.formats.coco import write_coco
from i3cl.data.formats.table import write_shards

FORMATS = ("art", "coco", "coco-results", "cvat", "icdar", "label-studio", "labelme", "paddle", "parquet")
_ART_SCORE = 0.45
"""What the I3CL authors submit with: whether the server sweeps thresholds is not known."""


def export_labels(
    format: str,
    source: str,
    out: str,
    *,
    score: float | None = None,
    member: str | None = None,
    prefix: str = "",
    confidence: bool = True,
    names: tuple[str, str] = ("label", "image"),
    skip_bad: bool = False,
) -> str:
    """Write `source` (as ``read_labels`` takes it) to `out` in one of ``FORMATS``; return a line that says what was written.

    score: instances with a score up to it are left out; None: 0.45 for art, none for the others. prefix: before the file names
    (label-studio, cvat, labelme, paddle). confidence: of icdar. names: from_name and to_name of label-studio. UserError as the
    readers and writers.
    """
    threshold = _ART_SCORE if score is None and format == "art" else score
    records = read_labels(source, member=member, score=threshold, skip_bad=skip_bad)
    if format == "coco":
        write_coco(out, with_size(records))
        return "COCO json"
    if format == "parquet":
        return f"{write_shards(out, with_size(records))} images"
    if format == "label-studio":
        count = label_studio.write(out, records, prefix, *names)
        return f"labelling interface of the project: {label_studio.labelling_config(*names)}\n{count} tasks"
    if format == "icdar":
        count = write_icdar(out, records, confidence)
    elif format == "art":
        count = write_art(out, records)
    elif format == "coco-results":
        count = write_coco_results(out, records)
    else:
        count = {"cvat": cvat.write, "labelme": labelme.write, "paddle": paddle.write}[format](out, records, prefix)
    return f"{count} images"

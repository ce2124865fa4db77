"""The table of formats that labels can be exported to and corrected in. A new one is a file of its own and one line here."""

from __future__ import annotations

from i3cl.data.exports.common import Format
from i3cl.data.exports.cvat import CVAT
from i3cl.data.exports.datasets import COCO, PARQUET
from i3cl.data.exports.label_studio import LABEL_STUDIO
from i3cl.data.exports.labelme import LABELME
from i3cl.data.exports.paddle import PADDLE
from i3cl.data.exports.submissions import ART, COCO_RESULTS, ICDAR

FORMATS: dict[str, Format] = {
    "art": ART,
    "coco": COCO,
    "coco-results": COCO_RESULTS,
    "cvat": CVAT,
    "icdar": ICDAR,
    "label-studio": LABEL_STUDIO,
    "labelme": LABELME,
    "paddle": PADDLE,
    "parquet": PARQUET,
}
"""By the name that ``prepare.py export`` takes."""
REVIEW_FORMATS = {name: format for name, format in FORMATS.items() if format.read is not None}
"""Those that people can correct labels in: ``prepare.py import-corrections`` takes them."""

"""A page of images to check by eye, and the honest estimate that its answers yield where no truth is known."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from markupsafe import Markup
from numpy.typing import NDArray

from i3cl import storage
from i3cl.data.formats.records import Dataset
from i3cl.data.loading.images import ImageError, decode_image
from i3cl.errors import UserError
from i3cl.evaluation.analysis.intervals import Interval, rate_intervals
from i3cl.evaluation.metrics.metric import rates
from i3cl.report.html import embedded, render_page, svg_points

_SIDE = 960
"""Pixels; longer sides are scaled down. Small words must stay readable."""
_FEWEST = 10
"""Checked images from which an estimate is made."""


def write_check_page(
    path: str,
    images: Dataset,
    found: Mapping[int, tuple[Sequence[NDArray[np.floating]], NDArray[np.floating]]],
    title: str,
    upright: bool = False,
    threshold: float = 0.5,
) -> None:
    """Write one self-contained HTML file to a local path or s3:// URL.

    Args:
        path: Of the page.
        images: All are shown, except those that cannot be read.
        found: Image id -> polygons (P, 2) in pixels and scores (N,) 0-1.
        title: Heading.
        upright: Turn the images as their EXIF orientation says.
        threshold: What has a score above it is shown, and is what the estimate is about.
    """
    pictures = []
    for record in images.records:
        try:
            image = decode_image(images.path(record), upright=upright)
        except ImageError:
            # It was counted and named when it was predicted.
            continue
        polygons, scores = found.get(record.id, ((), np.zeros(0)))
        shown = [svg_points(polygon) for polygon, score in zip(polygons, scores, strict=True) if score > threshold]
        pictures.append(embedded(record.file_name, image, _SIDE) | {"polygons": shown})
    shown_id = hashlib.sha256(json.dumps([[p["caption"], p["polygons"]] for p in pictures]).encode()).hexdigest()[:16]
    # In a script element only "</" could end the text early.
    about = json.dumps({"title": title, "threshold": threshold, "id": shown_id}).replace("<", "\\u003c")
    page = render_page("check.html.j2", {}, title=title, images=pictures, threshold=threshold, about=Markup(about))
    storage.write_text_atomic(path, page)


@dataclass(frozen=True)
class Estimate:
    """Recall, precision and F of what the page showed, with 95 % intervals by bootstrap over its images."""

    images: int
    recall: float
    recall_interval: Interval
    precision: float
    precision_interval: Interval
    hmean: float
    hmean_interval: Interval
    threshold: float


def estimate(path: str) -> Estimate:
    """The estimate from the answers that the page has saved.

    UserError when the file holds something else, or fewer than 10 images are checked.
    """
    try:
        content: Any = json.loads(storage.read_text(path))
        rows = []
        for each in content["images"].values():
            found, wrong, missed = int(each["found"]), len(set(each["wrong"])), int(each["missed"])
            if not 0 <= wrong <= found or missed < 0:
                raise ValueError(f"{wrong} wrong of {found} found, {missed} missed")
            right = found - wrong
            rows.append([right, right + missed, right, found])
        threshold = float(content["threshold"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{path}: not the answers of a check page ({reason}); press “Save answers” there") from None
    if len(rows) < _FEWEST:
        raise UserError(f"{path}: {len(rows)} images are checked; an estimate needs {_FEWEST} or more")
    counts = np.array(rows, np.float64)
    recall, precision, hmean = (float(value) for value in rates(counts.sum(axis=0)))
    limits = rate_intervals(counts)
    return Estimate(len(rows), recall, limits[0], precision, limits[1], hmean, limits[2], threshold)

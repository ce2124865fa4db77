"""The page of an evaluation: one result, or one against another, in one HTML file that loads nothing."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from markupsafe import Markup
from numpy.typing import NDArray

from i3cl import storage
from i3cl.data.loading.images import check_size, decode_image
from i3cl.errors import UserError
from i3cl.evaluation.analysis.error_kinds import DETECTION_KINDS, TRUTH_KINDS, kinds
from i3cl.evaluation.metrics.batch import EvalImage
from i3cl.evaluation.outcome import details
from i3cl.evaluation.scoring import Scored, sweep
from i3cl.report.curves import PALETTE, precision_recall_figure
from i3cl.report.html import embedded, render_page, svg_points

logger = logging.getLogger(__name__)

WORST = 12
"""Images shown: those that cost the most, or that differ the most between two results."""
_LONG_SIDE = 560
"""Pixels of a picture in the page."""


def write_evaluation_report(
    path: str,
    scored: Scored,
    outcome: Mapping[str, Any],
    rival: Scored | None = None,
    images: str | None = None,
    *,
    upright: bool = False,
) -> None:
    """Writes the page to a local path or s3:// URL, whole or not at all.

    Args:
        path: Where the page goes.
        scored: The result that it shows.
        outcome: The values of `evaluation.command.evaluate_files`.
        rival: The result that it is compared with.
        images: Root of the pictures. Without it, and for an image that cannot be read or has another size than its truth says,
            the polygons are drawn on an empty ground.
        upright: Turn the pictures as their EXIF orientation says.
    """
    storage.write_text_atomic(path, render_evaluation_report(scored, outcome, rival, images, upright=upright))


def render_evaluation_report(
    scored: Scored,
    outcome: Mapping[str, Any],
    rival: Scored | None = None,
    images: str | None = None,
    *,
    upright: bool = False,
) -> str:
    """The page as text."""
    return render_page(
        "evaluation.html.j2",
        {"percent": lambda value: "-" if value is None else f"{100 * value:.1f}"},
        outcome=outcome,
        rival=None if rival is None else outcome["against"] | {"details": details(rival)},
        curve=_curve(scored, rival),
        truth_kinds=TRUTH_KINDS,
        detection_kinds=DETECTION_KINDS,
        pictures=_pictures(scored, rival, images, upright),
        colours={"A": PALETTE[0], "B": PALETTE[1]},
    )


def _curve(scored: Scored, rival: Scored | None) -> Markup | None:
    """Precision over recall, where there are scores to sweep."""
    curves = {}
    for name, each in (("A", scored), ("B", rival)):
        if each is None or len(np.unique(each.batch.scores)) < 3:
            continue
        rows = sweep(each.batch, each.counts[0].rules, np.linspace(0, 0.98, 50).round(2).tolist())
        rows = [row for row in rows if row["recall"] > 0]
        best = max(rows, key=lambda row: row["hmean"], default=None)
        if best is not None:
            recall, precision = ([row[key] for row in rows] for key in ("recall", "precision"))
            curves[name] = (recall, precision, (best["recall"], best["precision"]))
    return Markup(precision_recall_figure(curves, {"A": PALETTE[0], "B": PALETTE[1]})) if curves else None


def _pictures(scored: Scored, rival: Scored | None, images: str | None, upright: bool) -> list[dict[str, Any]]:
    first = scored.counts[0]
    lost = first.ratios[:, 1] - first.ratios[:, 0] + first.ratios[:, 3] - first.ratios[:, 2]
    f, other_f = first.image_hmean(), None
    if rival is not None:
        at = {name: k for k, name in enumerate(rival.counts[0].names)}
        order = [at[name] for name in first.names]
        theirs = rival.counts[0].ratios[order]
        other_lost = theirs[:, 1] - theirs[:, 0] + theirs[:, 3] - theirs[:, 2]
        other_f = rival.counts[0].image_hmean()[order]
        lost = np.abs(lost - other_lost)
    chosen = [k for k in np.argsort(-lost, kind="stable")[:WORST].tolist() if lost[k] > 0]
    shown: list[dict[str, Any]] = []
    for k in chosen:
        image = scored.images[k]
        caption = f"{image.name}: F {100 * f[k]:.1f}"
        layers = [_layer(scored, k, "A")]
        if rival is not None and other_f is not None:
            caption += f" (A), {100 * other_f[k]:.1f} (B)"
            layers.append(_layer(rival, at[image.name], "B"))
        shown.append(
            {
                **_ground(image, images, [p for layer in layers for p in layer["rings"]], upright),
                "caption": caption,
                "truths": _truths(scored, k),
                "layers": layers,
            }
        )
    return shown


def _truths(scored: Scored, k: int) -> list[dict[str, str]]:
    image, rows = scored.images[k], np.flatnonzero(scored.batch.truth_image == k)
    care, found = scored.verdicts.care[rows], scored.verdicts.truth_credit[rows] > 0
    return [
        {"points": svg_points(p), "state": "ignored" if not c else "found" if hit else "missed"}
        for p, c, hit in zip(image.truths, care, found)
        if len(p) >= 3
    ]


def _layer(scored: Scored, k: int, name: str) -> dict[str, Any]:
    image, rows = scored.images[k], np.flatnonzero(scored.batch.detection_image == k)
    found = kinds(scored.batch, scored.verdicts, scored.counts[0].rules.iou).detection[rows]
    shown = [(p, kind, score) for p, kind, score in zip(image.detections, found, image.scores.tolist()) if kind]
    return {
        "name": name,
        "rings": [polygon for polygon, _, _ in shown],
        "polygons": [
            {"points": svg_points(polygon), "right": kind == "right", "text": f"{name}: {kind}, score {score:.2f}"}
            for polygon, kind, score in shown
        ],
    }


def _ground(image: EvalImage, images: str | None, detections: Sequence[NDArray[np.floating]], upright: bool) -> dict[str, Any]:
    """The picture as a data URL with its size, or an empty ground as large as the polygons reach."""
    if images is not None:
        name = image.file_name or image.name
        try:
            picture = decode_image(storage.read_bytes(storage.join(images, name)), upright=upright)
            if image.height and image.width:
                check_size(name, picture.shape[:2], (image.height, image.width))
        except (UserError, ValueError, OSError) as error:
            reason = " ".join(str(error).split())[:160]
            logger.warning("%s: shown without its picture (%s)", name, reason)
        else:
            return embedded(name, picture, _LONG_SIDE)
    far = np.concatenate([np.ones((1, 2)), *(p for p in (*image.truths, *detections) if len(p))]).max(axis=0)
    height, width = (image.height, image.width) if image.height and image.width else (far[1] * 1.03, far[0] * 1.03)
    return {"url": None, "height": float(height), "width": float(width)}

"""The report of a run: one HTML file that loads nothing."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import jinja2
import numpy as np
from markupsafe import Markup
from numpy.typing import ArrayLike, NDArray
from PIL import Image

from i3cl import storage
from i3cl.geometry import Polygon, as_polygon
from i3cl.report.curves import PALETTE, loss_figure, precision_recall_figure, series
from i3cl.report.draw import IGNORED, fit, weight_colour

TRUTH = "truth"
"""The name of the outlines that are the truth; they are drawn as a green surface under the others."""

_LONG_SIDE = 480
_JPEG_QUALITY = 80
_TRUTH_COLOUR = "#22b455"
_LOSS_TITLES = {
    "loss": "Loss",
    "loss_rpn_cls": "Proposal classification loss",
    "loss_rpn_box": "Proposal box loss",
    "loss_cls": "Classification loss",
    "loss_box": "Box loss",
    "loss_mask": "Mask loss",
}


@dataclass(frozen=True)
class Result:
    """One row of the headline table; shares are 0-1."""

    name: str
    kind: Literal["teacher", "pseudo", "student", "other"]
    """The best F is marked among all models; pseudo labels are measured on other pictures."""
    recall: float
    precision: float
    hmean: float
    threshold: float | None = None
    """Score above which detections counted."""
    hmean_without_small: float | None = None
    """F with small words as don't-care."""
    mask_ap: float | None = None
    """COCO mask AP, mean over IoU 0.50-0.95."""


@dataclass(frozen=True)
class Curve:
    """Precision over recall of one model, in the order of the thresholds."""

    recall: ArrayLike
    """(N,), 0-1."""
    precision: ArrayLike
    """(N,), 0-1."""
    best: tuple[float, float] | None = None
    """Recall and precision at the best F."""


@dataclass(frozen=True)
class OutlinedPicture:
    """A validation picture and what each model found in it."""

    caption: str
    image: NDArray[np.uint8]
    """(H, W, 3) RGB."""
    outlines: Mapping[str, Sequence[Polygon]]
    """Name (TRUTH or that of a result) -> (N, 2) polygons in pixels of `image`."""


@dataclass(frozen=True)
class WeightedPicture:
    """A picture and its pseudo labels."""

    caption: str
    image: NDArray[np.uint8]
    """(H, W, 3) RGB."""
    polygons: Sequence[Polygon]
    """(N, 2), pixels of `image`."""
    weights: Sequence[float | None]
    """Loss weight of each polygon, 0-1; None for ignored regions."""


@dataclass(frozen=True)
class ReportData:
    """Everything a report shows. An empty field leaves its section out."""

    title: str
    facts: Sequence[tuple[str, str]] = ()
    """The few settings worth reading first, as label and value."""
    verdict: str = ""
    """The outcome in words; it stands above everything, in place of a sentence made from `results`."""
    results: Sequence[Result] = ()
    small_side: float = 10.0
    """Pixels; words with a shorter short side are the small ones of Result.hmean_without_small."""
    curves: Mapping[str, Curve] = field(default_factory=dict)
    """Name of a result -> its curve."""
    metrics: Mapping[str, Sequence[Mapping[str, Any]]] = field(default_factory=dict)
    """Name of a result -> the rows of its log: {"step": ..., "loss": ..., "loss_mask": ..., "hmean": ...}."""
    validation: Sequence[OutlinedPicture] = ()
    pseudo_labels: Sequence[WeightedPicture] = ()
    seconds: Mapping[str, float] = field(default_factory=dict)
    """Stage -> seconds, in the order they ran."""
    settings: str = ""
    """The resolved settings as YAML."""


def render_report(data: ReportData) -> str:
    """The report as one HTML page: styles, curves and pictures inside, no scripts, nothing to load.

    ValueError for a picture that is not uint8 RGB, a broken polygon, a weight outside 0-1, and for numbers of
    polygons and weights that differ.
    """
    colours = _colours(data)
    return render_page(
        "report.html.j2",
        {"duration": _duration},
        data=data,
        colours=colours,
        summary=data.verdict or _summary(data.results),
        best=_best(data.results),
        curves=_curves(data, colours),
        losses=_charts(data, colours, _LOSS_TITLES),
        layers=_layers(data.validation),
        truth=TRUTH,
        solid={TRUTH} | {result.name for result in data.results if result.kind == "student"},
        pictures=[_outlined(picture) for picture in data.validation],
        weighted=[_weighted(picture) for picture in data.pseudo_labels],
        scale=[_hex(weight_colour(step / 10)) for step in range(11)],
        ignored=_hex(IGNORED),
        longest=max(data.seconds.values(), default=0.0),
        total=sum(data.seconds.values()),
    )


def render_page(template_name: str, filters: Mapping[str, Callable[[Any], str]], **values: Any) -> str:
    """A template of this folder, filled with the escaped `values`; a value that it needs and does not get is an error."""
    template = resources.files("i3cl.report").joinpath(template_name).read_text("utf-8")
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters.update(filters)
    return environment.from_string(template).render(**values)


def write_report(path: str | Path, data: ReportData) -> None:
    """The report as a file at a local path or s3:// URL; a reader sees it whole or not at all.

    ValueError as for render_report, UserError when the place cannot be written.
    """
    storage.write_text_atomic(str(path), render_report(data))


# ----------------------------------------------------------------------------------- what the page is made of


def _colours(data: ReportData) -> dict[str, str]:
    """One hex colour for a name through the whole page: green truth, blue student, the rest in order."""
    students = [result.name for result in data.results if result.kind == "student"]
    names = [result.name for result in data.results] + list(data.curves) + list(data.metrics)
    names += [name for picture in data.validation for name in picture.outlines]
    names = [name for name in dict.fromkeys(names) if name != TRUTH]
    ordered = students[:1] + [name for name in names if name not in students[:1]]
    # Blue stays the student's, so that the teachers keep their colours when it comes.
    first = 0 if students else 1
    colours = {name: PALETTE[(place + first) % len(PALETTE)] for place, name in enumerate(ordered)}
    return colours | {TRUTH: _TRUTH_COLOUR}


def _best(results: Sequence[Result]) -> Result | None:
    return max((r for r in results if r.kind != "pseudo"), key=lambda r: r.hmean, default=None)


def _summary(results: Sequence[Result]) -> str:
    """The outcome in one sentence; empty when there is no model."""
    student = next((r for r in results if r.kind == "student"), None)
    teacher = _best([r for r in results if r.kind == "teacher"])
    if student is None:
        return f"The best teacher, {teacher.name}, reaches F {100 * teacher.hmean:.1f} %." if teacher else ""
    reached = f"The student reaches F {100 * student.hmean:.1f} %"
    if teacher is None:
        return f"{reached}."
    points = round(100 * student.hmean, 1) - round(100 * teacher.hmean, 1)
    side = "above" if points > 0 else "below"
    place = "level with" if abs(points) < 0.05 else f"{abs(points):.1f} points {side}"
    return f"{reached}, {place} its best teacher, {teacher.name} ({100 * teacher.hmean:.1f} %)."


def _curves(data: ReportData, colours: Mapping[str, str]) -> list[tuple[str, Markup]]:
    """Title and SVG of precision over recall and of F over the steps, as far as there are any."""
    charts = []
    if data.curves:
        curves = {name: (curve.recall, curve.precision, curve.best) for name, curve in data.curves.items()}
        charts.append(("Precision over recall", Markup(precision_recall_figure(curves, colours))))
    return charts + _charts(data, colours, {"hmean": "F over training"})


def _charts(data: ReportData, colours: Mapping[str, str], titles: Mapping[str, str]) -> list[tuple[str, Markup]]:
    """Title and SVG of the metrics, key -> title, that some run logged."""
    return [
        (title, Markup(loss_figure(data.metrics, key, colours, legend=key == "hmean")))
        for key, title in titles.items()
        if any(len(series(rows, key)[0]) for rows in data.metrics.values())
    ]


def _layers(pictures: Sequence[OutlinedPicture]) -> list[str]:
    """Names of the outlines over all pictures, the truth first."""
    names = list(dict.fromkeys(name for picture in pictures for name in picture.outlines))
    return sorted(names, key=lambda name: name != TRUTH)


def _outlined(picture: OutlinedPicture) -> dict[str, Any]:
    outlines = {name: [svg_points(polygon) for polygon in found] for name, found in picture.outlines.items()}
    return embedded(picture.caption, picture.image) | {"outlines": outlines}


def _weighted(picture: WeightedPicture) -> dict[str, Any]:
    if len(picture.polygons) != len(picture.weights):
        raise ValueError(f"{picture.caption}: {len(picture.weights)} weights for {len(picture.polygons)} polygons")
    labels = [
        {
            "points": svg_points(polygon),
            "colour": _hex(weight_colour(weight)),
            "text": "ignored" if weight is None else f"weight {weight:.2f}",
        }
        for polygon, weight in zip(picture.polygons, picture.weights, strict=True)
    ]
    return embedded(picture.caption, picture.image) | {"labels": labels}


def embedded(caption: str, image: NDArray[np.uint8], long_side: int = _LONG_SIDE) -> dict[str, Any]:
    """The picture as a data URL, scaled to at most `long_side` pixels, with the size whose pixels the outlines use."""
    stream = io.BytesIO()
    Image.fromarray(fit(image, long_side)).save(stream, "JPEG", quality=_JPEG_QUALITY, optimize=True)
    url = "data:image/jpeg;base64," + base64.b64encode(stream.getvalue()).decode("ascii")
    return {"caption": caption, "url": url, "height": image.shape[0], "width": image.shape[1]}


def svg_points(polygon: Polygon) -> str:
    """The points of an SVG polygon, pixels to one decimal."""
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in as_polygon(polygon))


def _hex(colour: tuple[int, int, int]) -> str:
    return "#{:02x}{:02x}{:02x}".format(*colour)


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"

"""Curves as SVG for a page: without background, with lines and letters in the page's own colour."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import matplotlib
import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import ArrayLike, NDArray

PALETTE = ("#2f7fe0", "#e07b1a", "#9a5fd0", "#d64f84", "#8a8f2a", "#2a9d8f", "#7a7f87")
"""Hex colours that can be told apart on light and on dark ground."""

Point = tuple[float, float]
# Stands for the page's text colour until the SVG is done; no curve has it.
INK = "#010203"
_MOST_POINTS = 500


def precision_recall_figure(
    curves: Mapping[str, tuple[ArrayLike, ArrayLike, Point | None]], colours: Mapping[str, str] | None = None
) -> str:
    """Precision over recall of every named model, as SVG.

    curves: name -> ((N,) recall, (N,) precision, (recall, precision) of the best F or None), all 0-1, in the
    order of the thresholds. colours: name -> hex colour; the palette in order when absent. ValueError when
    the two arrays of a curve differ in length.
    """
    figure, axes = new_axes(4.7, 4.4)
    _iso_f(axes)
    colours = colours or _default_colours(list(curves))
    labels: list[str] = []
    lines: list[Artist] = []
    for name, (recall, precision, best) in curves.items():
        x, y = np.asarray(recall, float), np.asarray(precision, float)
        if x.shape != y.shape or x.ndim != 1:
            raise ValueError(f"{name}: recall and precision have shapes {x.shape} and {y.shape}, not one length")
        kept = _thinned(len(x))
        lines += axes.plot(x[kept], y[kept], color=colours[name], linewidth=1.8)
        labels.append(name)
        if best is not None:
            axes.plot(*best, "o", color=colours[name], markersize=6, clip_on=False)
            labels[-1] += f"  {100 * _f(*best):.1f}"
    axes.set(xlim=(0, 1), ylim=(0, 1.005), xlabel="Recall", ylabel="Precision", aspect="equal")
    axes.set_xticks(np.arange(0, 1.01, 0.2))
    axes.set_yticks(np.arange(0, 1.01, 0.2))
    _legend(axes, lines, labels, "lower left", title="F at the best threshold, %")
    return to_svg(figure)


def loss_figure(
    metrics: Mapping[str, Sequence[Mapping[str, Any]]],
    key: str = "loss",
    colours: Mapping[str, str] | None = None,
    legend: bool = True,
) -> str:
    """One metric of every named run over its optimiser steps, as SVG.

    metrics: name -> rows {"step": ..., "loss": ..., "loss_mask": ..., "hmean": ...}; rows without `key` or
    with a value that is not finite are left out. Keys that begin with "loss" are drawn pale under their
    running mean, other keys (0-1) as points on a line.
    """
    is_loss = key.startswith("loss")
    figure, axes = new_axes(3.6, 2.5) if is_loss else new_axes(4.7, 3.6)
    colours = colours or _default_colours(list(metrics))
    labels: list[str] = []
    lines: list[Artist] = []
    highest: list[float] = []
    for name, rows in metrics.items():
        x, y = series(rows, key)
        if not len(x):
            continue
        kept = _thinned(len(x))
        if is_loss:
            axes.plot(x[kept], y[kept], color=colours[name], linewidth=0.8, alpha=0.3)
            lines += axes.plot(x[kept], _running_mean(y)[kept], color=colours[name], linewidth=1.8)
            highest.append(float(np.percentile(y, 98)))
        else:
            lines += axes.plot(x, y, "o-", color=colours[name], linewidth=1.8, markersize=3.5)
        labels.append(name)
    axes.set_xlabel("Step")
    # One wild step at the start would flatten everything after it.
    top = 1.15 * max(highest, default=1.0) if is_loss else 1.0
    axes.set_ylim(0, top if top > 0 else 1.0)
    axes.set_xlim(left=0)
    axes.locator_params(nbins=5)
    if legend:
        _legend(axes, lines, labels, "best")
    return to_svg(figure)


def series(rows: Sequence[Mapping[str, Any]], key: str) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """(N,) steps and (N,) values of the rows that have a step and a finite number under `key`."""
    pairs = [
        (float(row["step"]), float(row[key]))
        for row in rows
        if isinstance(row.get("step"), int | float) and isinstance(row.get(key), int | float) and math.isfinite(row[key])
    ]
    return np.array([x for x, _ in pairs]), np.array([y for _, y in pairs])


def _default_colours(names: Sequence[str]) -> dict[str, str]:
    return {name: PALETTE[place % len(PALETTE)] for place, name in enumerate(names)}


def _f(recall: float, precision: float) -> float:
    return 2 * recall * precision / (recall + precision) if recall + precision > 0 else 0.0


def _thinned(count: int) -> NDArray[np.int64]:
    """At most _MOST_POINTS indices with both ends: more points than pixels only make the page heavy."""
    return np.unique(np.linspace(0, max(count - 1, 0), min(count, _MOST_POINTS)).round().astype(np.int64))


def _running_mean(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Exponential mean over about a twentieth of the series, corrected for the zero that it starts from."""
    keep = 1 - 1 / max(1.0, len(values) / 20)
    mean, weight, means = 0.0, 0.0, []
    for value in values:
        mean, weight = keep * mean + (1 - keep) * value, keep * weight + (1 - keep)
        means.append(mean / weight)
    return np.array(means)


def new_axes(width: float, height: float) -> tuple[Figure, Axes]:
    """Inches at 72 pixels each."""
    figure = Figure(figsize=(width, height), layout="constrained", facecolor="none")
    axes = figure.add_subplot(facecolor="none")
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(INK)
    axes.tick_params(colors=INK, labelsize=8, length=3)
    for axis in (axes.xaxis, axes.yaxis):
        axis.label.set(color=INK, fontsize=9)
    axes.grid(color=INK, alpha=0.12, linewidth=0.6)
    axes.set_axisbelow(True)
    return figure, axes


def _iso_f(axes: Axes) -> None:
    for f in (0.4, 0.6, 0.8):
        x = np.linspace(f / (2 - f), 1, 60)
        axes.plot(x, f * x / (2 * x - f), color=INK, alpha=0.3, linewidth=0.7, linestyle=(0, (4, 3)))
        axes.text(0.99, f / (2 - f) + 0.02, f"F {100 * f:.0f}", color=INK, alpha=0.6, fontsize=7, ha="right")


def _legend(
    axes: Axes,
    lines: Sequence[Artist],
    labels: Sequence[str],
    where: Literal["best", "lower left"],
    title: str | None = None,
) -> None:
    if not lines:
        return
    numbers = [str(place) for place in range(len(lines))]
    legend = axes.legend(lines, numbers, loc=where, fontsize=8, frameon=False, title=title)
    legend.get_title().set(color=INK, fontsize=8)
    # Set afterwards and verbatim: matplotlib drops names that start with "_" and reads "$" as mathematics.
    for text, label in zip(legend.get_texts(), labels, strict=True):
        text.set(parse_math=False, color=INK)
        text.set_text(label)


def to_svg(figure: Figure) -> str:
    """The figure's <svg> element, without the ids that would clash with another figure's in one page."""
    stream = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "i3cl"}):
        figure.savefig(stream, format="svg", metadata={key: None for key in ("Creator", "Date", "Format", "Type")})
    text = stream.getvalue()
    text = re.sub(r'<g id="[^"]*">', "<g>", text[text.index("<svg") :])
    text = re.sub(r"font-family: [^;]*;", "font-family: system-ui, sans-serif;", text)
    return text.replace(INK, "currentColor")

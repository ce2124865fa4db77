"""The page of a sweep: how far it is, what was best, which settings matter. Written again and again while the sweep runs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from itertools import combinations
from typing import Any

import matplotlib
import numpy as np
from markupsafe import Markup
from numpy.typing import NDArray

from i3cl import storage
from i3cl.config import Settings
from i3cl.report.curves import INK, PALETTE, new_axes, to_svg
from i3cl.report.html import render_page
from i3cl.search.space import Space
from i3cl.search.sweep import importance, wanted_trials
from i3cl.search.trial_log import TrialLog

_COLOURS = matplotlib.colormaps["viridis"]
_RELOAD = 5
"""Seconds after which the page of a running sweep loads itself again."""
_BINS = 7
_LINES = 300
_ROWS = 25

Row = Mapping[str, Any]
"""number, values, state, metrics, curve [(step, hmean)], seconds, reason, present, front."""


def render_search(
    name: str,
    objective: str,
    rows: Sequence[Row],
    wanted: int,
    importance: Mapping[str, float],
    summary: Mapping[str, Any] | None,
) -> str:
    """The sweep as one self-contained HTML page.

    wanted: trials in all; importance: settings key -> share, 0-1; summary: the verdict, None while the sweep runs.
    """
    measured = [row for row in rows if "hmean" in row["metrics"] and row["state"] != "broken"]
    ranked = sorted(measured, key=lambda row: -row["metrics"]["hmean"])
    keys = list(rows[0]["values"]) if rows else []
    charts = []
    if measured:
        charts.append(("Best so far", Markup(_progress(measured)), False))
        if importance:
            charts.append(("What sets the best quarter apart", Markup(_importance(importance)), False))
        if len(keys) > 1:
            charts.append(("Every trial, from its settings to its F", Markup(_parallel(keys, measured)), True))
        order = sorted(keys, key=lambda key: -importance.get(key, 0.0))
        numeric = [key for key in order if len(_levels([row["values"][key] for row in measured])) > 1][:3]
        if len(measured) >= 6:
            charts += [
                (f"{_short(x)} and {_short(y)}", Markup(_heat(x, y, measured)), False) for x, y in combinations(numeric, 2)
            ]
        if any(len(row["curve"]) > 1 for row in measured):
            charts.append(("F while students train", Markup(_learning(measured)), False))
    return render_page(
        "search.html.j2",
        {"value": _value},
        name=name,
        objective=objective,
        keys=keys,
        rows=ranked[:_ROWS],
        broken=[row for row in rows if row["state"] == "broken"],
        counts={state: sum(row["state"] == state for row in rows) for state in ("finished", "stopped", "broken", "running")},
        wanted=wanted,
        best=ranked[0] if ranked else None,
        first=next((row for row in measured if row["present"]), None),
        charts=charts,
        summary=summary,
        reload=_RELOAD,
    )


def write_search_page(run: str, settings: Settings, log: TrialLog, summary: Mapping[str, Any] | None = None) -> None:
    """Write <run>/dashboard.html of the trials so far; with a summary the sweep is over and the page stops reloading itself."""
    space = Space(settings.search.space)
    front = log.front() if settings.search.label_count else set()
    rows = [asdict(trial) | {"front": trial.number in front} for trial in log.trials]
    given, wanted = settings.search, wanted_trials(settings, space)
    page = render_search(settings.name, given.objective, rows, wanted, importance(log, space), summary)
    storage.write_text_atomic(storage.join(run, "dashboard.html"), page)


def _progress(rows: Sequence[Row]) -> str:
    ordered = sorted(rows, key=lambda row: row["number"])
    x = np.array([row["number"] for row in ordered])
    y = np.array([row["metrics"]["hmean"] for row in ordered])
    figure, axes = new_axes(4.7, 3.2)
    axes.scatter(x, y, s=12, color=PALETTE[0], alpha=0.45, linewidths=0)
    axes.step(x, np.maximum.accumulate(y), where="post", color=PALETTE[1], linewidth=1.8)
    for row in ordered:
        if not row["present"]:
            continue
        level = row["metrics"]["hmean"]
        axes.axhline(level, color=INK, linewidth=0.9, linestyle=(0, (4, 3)))
        axes.text(x[-1], level, "present settings", color=INK, fontsize=7, ha="right", va="bottom")
    axes.set(xlabel="Trial", ylabel="F")
    # The worst trials do not matter and would squeeze the others together.
    low = float(np.percentile(y, 25))
    axes.set_ylim(max(0.0, low - 0.5 * (float(y.max()) - low) - 0.01), float(y.max()) + 0.01)
    return to_svg(figure)


def _importance(shares: Mapping[str, float]) -> str:
    names = sorted(shares, key=lambda name: shares[name])
    figure, axes = new_axes(4.7, 0.6 + 0.3 * len(names))
    axes.barh(range(len(names)), [shares[name] for name in names], color=PALETTE[0], height=0.6)
    axes.set_yticks(range(len(names)), [_short(name) for name in names])
    axes.set_xlabel("Share")
    return to_svg(figure)


def _parallel(keys: Sequence[str], rows: Sequence[Row]) -> str:
    figure, axes = new_axes(9.6, 3.4)
    axes.grid(False)
    best_last = sorted(rows, key=lambda row: row["metrics"]["hmean"])[-_LINES:]
    scores = np.array([row["metrics"]["hmean"] for row in best_last])
    columns, labels = [], []
    for key in keys:
        column = [row["values"][key] for row in best_last]
        places, low, high = _places(column)
        columns.append(places)
        labels.append((low, high))
    columns.append(_unit(scores))
    labels.append((f"{scores.min():.3f}", f"{scores.max():.3f}"))
    for place, (line, shade) in enumerate(zip(np.array(columns).T, _unit(scores))):
        last = place == len(best_last) - 1
        axes.plot(
            line, color=PALETTE[1] if last else _COLOURS(float(shade)), linewidth=2.4 if last else 0.9, alpha=1 if last else 0.5
        )
    for x, (low, high) in enumerate(labels):
        axes.axvline(x, color=INK, linewidth=0.8, alpha=0.5)
        axes.text(x, -0.05, low, color=INK, fontsize=7, ha="center", va="top")
        axes.text(x, 1.03, high, color=INK, fontsize=7, ha="center", va="bottom")
    axes.set_xticks(range(len(labels)), [*map(_short, keys), "F"])
    axes.tick_params(axis="x", pad=18)
    axes.set_yticks([])
    axes.spines[["left", "bottom"]].set_visible(False)
    axes.set_ylim(-0.02, 1.02)
    return to_svg(figure)


def _heat(x_key: str, y_key: str, rows: Sequence[Row]) -> str:
    """Mean F over cells of two settings, with the trials as points."""
    xs, x_low, x_high = _places([row["values"][x_key] for row in rows])
    ys, y_low, y_high = _places([row["values"][y_key] for row in rows])
    scores = np.array([row["metrics"]["hmean"] for row in rows])
    sums, counts = np.zeros((_BINS, _BINS)), np.zeros((_BINS, _BINS))
    cells = [np.minimum((v * _BINS).astype(int), _BINS - 1) for v in (ys, xs)]
    np.add.at(sums, tuple(cells), scores)
    np.add.at(counts, tuple(cells), 1)
    mean = np.ma.masked_where(counts == 0, sums / np.maximum(counts, 1))
    figure, axes = new_axes(4.7, 3.6)
    axes.grid(False)
    edges = np.linspace(0, 1, _BINS + 1)
    # The worst quarter shares one colour: the question is where the good trials are.
    mesh = axes.pcolormesh(edges, edges, mean, cmap=_COLOURS, vmin=float(np.percentile(scores, 25)), vmax=float(scores.max()))
    axes.scatter(xs, ys, s=9, facecolors="none", edgecolors="white", linewidths=0.5)
    best = int(scores.argmax())
    axes.plot(xs[best], ys[best], "*", color=PALETTE[1], markersize=13, markeredgecolor="white", markeredgewidth=0.6)
    axes.set(xlabel=_short(x_key), ylabel=_short(y_key))
    axes.set_xticks([0, 1], [x_low, x_high])
    axes.set_yticks([0, 1], [y_low, y_high])
    bar = figure.colorbar(mesh, ax=axes)
    bar.ax.tick_params(colors=INK, labelsize=7)
    bar.outline.set_visible(False)
    return to_svg(figure)


def _learning(rows: Sequence[Row]) -> str:
    figure, axes = new_axes(4.7, 3.2)
    best_last = sorted(rows, key=lambda row: row["metrics"]["hmean"])[-_LINES:]
    shades = _unit(np.array([row["metrics"]["hmean"] for row in best_last]))
    for row, shade in zip(best_last, shades):
        steps, scores = zip(*row["curve"])
        axes.plot(steps, scores, "o-", color=_COLOURS(float(shade)), linewidth=1.2, markersize=3)
    axes.set(xlabel="Step", ylabel="F")
    return to_svg(figure)


def _places(column: Sequence[Any]) -> tuple[NDArray[np.float64], str, str]:
    """Positions of one key's values on an axis from 0 to 1, and the labels of its two ends."""
    levels = _levels(column)
    if levels and all(_is_number(v) for v in levels):
        values = np.array([float(v) for v in column])
        # Ranges over orders of magnitude, such as learning rates, need a logarithmic axis.
        if values.min() > 0 and values.max() / values.min() > 30:
            return _unit(np.log(values)), f"{values.min():.2g}", f"{values.max():.2g}"
        return _unit(values), f"{values.min():.3g}", f"{values.max():.3g}"
    ranks = {str(level): rank for rank, level in enumerate(levels)}
    return _unit(np.array([float(ranks[str(v)]) for v in column])), _value(levels[0]), _value(levels[-1])


def _levels(column: Sequence[Any]) -> list[Any]:
    """The distinct values: numbers in ascending order, others by name."""
    different = list({str(v): v for v in column}.values())
    return sorted(different, key=lambda v: (0, v, "") if _is_number(v) else (1, 0, str(v)))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _unit(values: NDArray[np.float64]) -> NDArray[np.float64]:
    low, high = float(values.min()), float(values.max())
    return (values - low) / (high - low) if high > low else np.full(values.shape, 0.5)


def _short(key: str) -> str:
    """The last two parts of a settings key."""
    return ".".join(key.split(".")[-2:])


def _value(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)

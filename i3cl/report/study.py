"""The picture of a study: F of every arm and seed, and the differences with their intervals."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any

from matplotlib.figure import Figure

from i3cl import storage
from i3cl.report.curves import PALETTE


def write_study_figure(path: str, summary: Mapping[str, Any]) -> None:
    """Write a PNG. summary: as `i3cl.study.study` returns it."""
    arms, comparisons = summary["arms"], summary["comparisons"]
    figure = Figure(figsize=(9, 1.6 + 0.45 * max(len(arms), 2 * len(comparisons))), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    for place, row in enumerate(arms.values()):
        colour = PALETTE[place % len(PALETTE)]
        values = [100 * run["hmean"] for run in row["runs"]]
        left.plot(values, [place] * len(values), "o", color=colour, alpha=0.5, markersize=6)
        left.plot([100 * row["hmean"]["mean"]], [place], "|", color=colour, markersize=22, markeredgewidth=3)
    left.set_yticks(range(len(arms)), list(arms))
    left.invert_yaxis()
    left.set_xlabel("F, per cent: each seed, and the mean")
    for place, row in enumerate(comparisons):
        low, high = 100 * row["low"], 100 * row["high"]
        colour = PALETTE[5] if low > 0 else PALETTE[6]
        right.plot([low, high], [place, place], color=colour, linewidth=3, solid_capstyle="round")
        right.plot([100 * row["difference"]], [place], "o", color=colour, markersize=8)
    right.axvline(0, color="#7a7f87", linewidth=1)
    right.set_yticks(range(len(comparisons)), [f"{row['a']} - {row['b']}" for row in comparisons])
    right.set_ylim(len(comparisons) - 0.5, -0.5)
    right.set_xlabel("difference of F, points, with its 95 % interval")
    for axes in (left, right):
        axes.grid(axis="x", alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=120)
    storage.write_bytes_atomic(path, stream.getvalue())

"""Curves as SVG."""

from __future__ import annotations

import xml.etree.ElementTree as xml
from typing import Any

import numpy as np
import pytest

from i3cl.report.curves import loss_figure, precision_recall_figure, series

HOSTILE = "_<script>$x_$&"


def texts(svg: str) -> list[str]:
    """The texts of a well-formed SVG."""
    return [element.text or "" for element in xml.fromstring(svg).iter() if element.tag.endswith("text")]


def test_precision_recall_names_every_curve_and_its_best_f() -> None:
    recall = np.linspace(0, 0.9, 100)
    svg = precision_recall_figure({"a": (recall, 1 - recall, (0.5, 0.5)), "b": (recall, 1 - recall, None)})
    found = " ".join(texts(svg))
    assert "a  50.0" in found or "a 50.0" in found
    assert "b" in texts(svg)
    assert {"Recall", "Precision"} <= set(texts(svg))


def test_names_are_shown_verbatim() -> None:
    recall = np.linspace(0, 0.9, 10)
    assert HOSTILE in texts(precision_recall_figure({HOSTILE: (recall, recall, None)}))
    assert HOSTILE in texts(loss_figure({HOSTILE: [{"step": 1, "loss": 1.0}, {"step": 2, "loss": 0.5}]}))


def test_curves_follow_the_page_and_the_given_colours() -> None:
    recall = np.linspace(0, 1, 10)
    svg = precision_recall_figure({"a": (recall, recall, (1.0, 1.0))}, {"a": "#12abcd"})
    assert svg.startswith("<svg") and "#12abcd" in svg and "currentColor" in svg
    assert "#010203" not in svg and 'g id="' not in svg
    assert svg == precision_recall_figure({"a": (recall, recall, (1.0, 1.0))}, {"a": "#12abcd"})


def test_long_series_stay_light() -> None:
    recall = np.linspace(0, 1, 200_000)
    assert len(precision_recall_figure({"a": (recall, 1 - recall**2, None)})) < 60_000
    rows = [{"step": step, "loss": float(step % 17)} for step in range(50_000)]
    assert len(loss_figure({"a": rows})) < 60_000


def test_empty_curves_draw_empty_axes() -> None:
    assert "Recall" in texts(precision_recall_figure({}))
    assert "Step" in texts(loss_figure({}))
    assert "Recall" in texts(precision_recall_figure({"a": ([], [], (0.0, 0.0))}))


def test_loss_figure_takes_the_rows_that_have_the_key() -> None:
    rows: list[dict[str, Any]] = [
        {"step": 1, "loss": 2.0},
        {"step": 2, "loss": float("nan")},
        {"step": 3, "hmean": 0.5},
        {"step": 4, "loss": None},
        {"loss": 1.0},
        {"step": 5, "loss": 1.0, "hmean": 0.6},
    ]
    steps, values = series(rows, "loss")
    assert steps.tolist() == [1, 5] and values.tolist() == [2, 1]
    assert "a" in texts(loss_figure({"a": rows, "b": []}, "hmean"))
    assert "b" not in texts(loss_figure({"a": rows, "b": []}, "hmean"))
    assert "a" not in texts(loss_figure({"a": rows}, legend=False))


def test_lengths_must_agree() -> None:
    with pytest.raises(ValueError, match="recall and precision"):
        precision_recall_figure({"a": ([0, 1], [1], None)})

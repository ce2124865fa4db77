"""The HTML report."""

from __future__ import annotations

import base64
import dataclasses
import io
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from i3cl.report.html import (
    TRUTH,
    OutlinedPicture,
    ReportData,
    Result,
    WeightedPicture,
    render_report,
    write_report,
)

SQUARE = np.array([(10, 10), (40, 10), (40, 30), (10, 30)], np.float32)
SECTIONS = {"results", "curves", "losses", "validation", "pseudo-labels", "time", "settings"}
VOID = {"meta", "link", "br", "input"}


class Page(HTMLParser):
    """Tags, attributes, ids and text of a page; fails on tags that do not close."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data

    @property
    def sections(self) -> set[str]:
        return {str(a["id"]) for tag, a in self.tags if tag in ("section", "details")}


@pytest.fixture(scope="module")
def text(report: ReportData) -> str:
    return render_report(report)


def test_all_sections(text: str) -> None:
    page = Page(text)
    assert page.sections == SECTIONS
    for words in (
        "The student reaches F",
        "above its best teacher",
        "efficientnet_lite0",
        "small",
        "Mask AP",
        "3 min 25 s",
    ):
        assert words in page.text


def test_nothing_is_loaded_and_nothing_runs(text: str) -> None:
    for tag, attributes in Page(text).tags:
        assert tag not in ("script", "iframe", "object", "embed", "base")
        for name, value in attributes.items():
            assert not name.startswith("on")
            if name in ("src", "href", "xlink:href", "srcset", "data", "action"):
                assert re.match(r"data:|#", value or "")
    assert "@import" not in text
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)\)", text))


def test_pictures_are_inside(text: str, report: ReportData) -> None:
    urls = [str(a["href"]) for tag, a in Page(text).tags if tag == "image"]
    assert len(urls) == len(report.validation) + len(report.pseudo_labels)
    for url in urls:
        picture = Image.open(io.BytesIO(base64.b64decode(url.removeprefix("data:image/jpeg;base64,"))))
        assert picture.format == "JPEG" and picture.size == (256, 256)


def test_best_f_is_marked_among_models_only(text: str) -> None:
    assert text.count('class="best"') == 1
    row = text[text.index('class="best"') :]
    assert "student" in row[: row.index("</tr>")]
    results = [Result("t", "teacher", 0.5, 0.5, 0.5), Result("p", "pseudo", 0.9, 0.9, 0.9)]
    row = render_report(ReportData("r", results=results)).split('class="best"')[1]
    assert ">t" in row[: row.index("</tr>")]


def test_large_pictures_are_shrunk_but_keep_the_pixels_of_their_outlines() -> None:
    image = np.zeros((900, 1800, 3), np.uint8)
    text = render_report(ReportData("r", validation=[OutlinedPicture("p", image, {TRUTH: [SQUARE]})]))
    url = re.search(r"data:image/jpeg;base64,([^\"]*)", text)
    assert url and Image.open(io.BytesIO(base64.b64decode(url[1]))).size == (480, 240)
    assert 'viewBox="0 0 1800 900"' in text and 'points="10.0,10.0 40.0,10.0' in text


def test_24_noisy_pictures_stay_under_3_megabytes() -> None:
    rng = np.random.default_rng(0)
    smooth = rng.integers(0, 256, (24, 60, 80, 3), np.uint8)
    pictures = [OutlinedPicture("p", np.asarray(Image.fromarray(small).resize((1280, 960))), {}) for small in smooth]
    assert len(render_report(ReportData("r", validation=pictures))) < 3e6


@pytest.mark.parametrize(
    ("field", "empty", "gone"),
    [
        ("results", (), {"results"}),
        ("validation", (), {"validation"}),
        ("pseudo_labels", (), {"pseudo-labels"}),
        ("seconds", {}, {"time"}),
        ("settings", "", {"settings"}),
        ("metrics", {}, {"losses"}),
        ("curves", {}, set()),
    ],
)
def test_what_is_missing_leaves_its_section_out(report: ReportData, field: str, empty: Any, gone: set[str]) -> None:
    page = Page(render_report(dataclasses.replace(report, **{field: empty})))
    assert page.sections == SECTIONS - gone


def test_empty_report_and_partial_tables() -> None:
    page = Page(render_report(ReportData("only a title")))
    assert page.sections == set() and "only a title" in page.text
    text = render_report(ReportData("r", results=[Result("t", "teacher", 0.5, 0.5, 0.5)]))
    assert "The best teacher, t, reaches F 50.0 %" in text
    assert "Mask AP" not in text and "aside" not in text and "threshold" not in text


@pytest.mark.parametrize(
    ("student", "words"),
    [(0.6, "10.0 points above"), (0.4, "10.0 points below"), (0.5, "level with"), (0.50001, "level with")],
)
def test_summary(student: float, words: str) -> None:
    results = [Result("t", "teacher", 0.5, 0.5, 0.5), Result("s", "student", student, student, student)]
    assert words in render_report(ReportData("r", results=results))


def test_hostile_names_are_only_text(report: ReportData) -> None:
    evil = "</style><script>alert(1)</script>\"' onload=x {{ 7*7 }} $a_$"
    picture = report.validation[0]
    data = ReportData(
        title=evil,
        facts=[(evil, evil)],
        results=[Result(evil, "teacher", 0.5, 0.5, 0.5)],
        curves={evil: report.curves["student"]},
        metrics={evil: report.metrics["student"]},
        validation=[OutlinedPicture(evil, picture.image, {evil: [SQUARE]})],
        pseudo_labels=[WeightedPicture(evil, picture.image, [SQUARE], [None])],
        seconds={evil: 1.0},
        settings=evil,
    )
    text = render_report(data)
    test_nothing_is_loaded_and_nothing_runs(text)
    page = Page(text)
    assert page.sections == SECTIONS
    assert page.text.count(evil) >= 9


def test_colours_of_a_name_are_the_same_everywhere(report: ReportData) -> None:
    without = dataclasses.replace(report, results=[r for r in report.results if r.kind == "teacher"])
    swatch = re.compile(r'style="background:(#\w+)"></span>(teacher-a)')
    assert set(swatch.findall(render_report(report))) == set(swatch.findall(render_report(without)))
    assert len(set(swatch.findall(render_report(report)))) == 1


def test_weights_are_told_by_colour_and_text() -> None:
    picture = WeightedPicture("p", np.zeros((50, 50, 3), np.uint8), [SQUARE, SQUARE], [0.25, None])
    text = render_report(ReportData("r", pseudo_labels=[picture]))
    assert "<title>weight 0.25</title>" in text and "<title>ignored</title>" in text


BROKEN: dict[str, Callable[[], ReportData]] = {
    "1 weights for 0": lambda: ReportData("r", pseudo_labels=[WeightedPicture("p", np.zeros((5, 5, 3), np.uint8), [], [1.0])]),
    "between 0 and 1": lambda: ReportData(
        "r", pseudo_labels=[WeightedPicture("p", np.zeros((5, 5, 3), np.uint8), [SQUARE], [2.0])]
    ),
    "uint8 RGB": lambda: ReportData("r", validation=[OutlinedPicture("p", np.zeros((5, 5), np.uint8), {})]),
}


@pytest.mark.parametrize("message", BROKEN)
def test_broken_data_leaves_the_old_report(tmp_path: Path, message: str) -> None:
    path = tmp_path / "report.html"
    path.write_text("old")
    with pytest.raises(ValueError, match=message):
        write_report(path, BROKEN[message]())
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_written_whole_into_a_new_folder(tmp_path: Path, report: ReportData, text: str) -> None:
    path = tmp_path / "new" / "report.html"
    write_report(path, report)
    assert path.read_text("utf-8") == text
    assert list(path.parent.iterdir()) == [path]

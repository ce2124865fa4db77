"""Lines and labels without Ray; that the dashboard and the page name the metrics that there are."""

from __future__ import annotations

import json
import logging
import os
import re
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from i3cl import observe
from i3cl.cli import command_line
from i3cl.errors import UserError

ROOT = Path(__file__).parents[1]
DASHBOARD = json.loads((ROOT / "cluster" / "grafana" / "i3cl.json").read_text())
ROW = {"step": 2, "steps": 4, "loss": 1.5, "loss_mask": 0.5, "learning_rate": 1e-3, "images_per_second": 3.0, "data_wait": 0.1}


@pytest.fixture(autouse=True)
def no_run(monkeypatch):
    monkeypatch.setitem(observe._context, "stage", "")
    for name in (observe.RUN, observe.FORMAT):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


@pytest.fixture
def as_json(monkeypatch):
    monkeypatch.setenv(observe.FORMAT, "json")


def expressions() -> list[str]:
    return [target["expr"] for panel in DASHBOARD["panels"] for target in panel.get("targets", ())]


def test_without_ray_nothing_happens_and_ray_is_not_imported():
    code = f"""
import logging, sys
from i3cl import observe
observe.training("/runs/a", 0, {ROW!r})
observe.training_started("/runs/a", 2)
observe.checkpoint("/runs/a", 1.0)
observe.labelling("labels", 4, 1, {{"images_per_second": 0.0, "remaining": 4, "actors": 2, "busy_share": 0.5}})
observe.labelling_ended("labels")
observe.pseudo_labels("/runs/a/pseudo.json", 3, 0)
observe.search(["running", "broken"], None)
observe.evaluation("a", hmean=0.5, recall=0.5, precision=0.5)
observe.note("only for workers")
with observe.stage("student"):
    observe.say("a library is silent")
    with observe.console():
        observe.say("hello")
logging.getLogger("i3cl.any").warning("silent again")
assert "ray" not in sys.modules and not observe._made
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stdout, done.stderr) == (0, "hello\n", "")


@pytest.mark.parametrize(
    "run, directory, expected",
    [
        ("toy", "/runs/toy", ("toy", "train")),
        ("toy", "s3://bucket/runs/toy/", ("toy", "train")),
        ("toy", "/runs/toy/teacher-a", ("toy", "teacher-a")),
        ("toy", "/toy/runs/toy/round-2/student", ("toy", "round-2/student")),
        ("toy", "/elsewhere/other", ("toy", "other")),
        ("", "/runs/plain", ("plain", "train")),
    ],
)
def test_labels_of_a_directory(monkeypatch, run, directory, expected):
    monkeypatch.setenv(observe.RUN, run)
    assert tuple(observe.place(directory, "train").values()) == expected


def test_a_line_for_people_is_the_message_alone(capsys):
    with observe.console():
        observe.say("\n== labels", stage="labels", seconds=1.5)
    assert capsys.readouterr().out == "\n== labels\n"


def test_a_module_logs_info_on_stdout_and_warnings_on_stderr(capsys):
    logger = logging.getLogger("i3cl.data.formats.records")
    with observe.console():
        logger.info("%d images", 3)
        logger.debug("for nobody")
        logger.warning("a.jpg: left out")
    logger.info("after it")
    assert capsys.readouterr() == ("3 images\n", "a.jpg: left out\n")


def test_a_module_logs_as_json(as_json, capsys):
    observe.begin("toy", "train")
    with observe.console():
        logging.getLogger("i3cl.data").info("read", extra={"images": 3})
        logging.getLogger("i3cl.data").warning("a.jpg: left out", extra={"stage": "labels"})
    out, err = map(json.loads, capsys.readouterr())
    assert (out["level"], out["run"], out["stage"], out["message"], out["images"]) == ("INFO", "toy", "train", "read", 3)
    assert (err["level"], err["stage"], err["message"]) == ("WARNING", "labels", "a.jpg: left out")
    assert list(out) == ["time", "level", "run", "stage", "message", "images"]


@pytest.mark.parametrize("form", ["json", "text"])
def test_a_name_that_is_not_utf8_is_shown_with_an_escape(form):
    code = """
import os, sys
from i3cl import observe
with observe.console():
    observe.say(os.fsdecode(b"z\\xe9.jpg"))
    print(os.fsdecode(b"z\\xe8.jpg"))
    observe.say("\\u6587", level="WARNING")
"""
    environment = {**os.environ, "PYTHONIOENCODING": "ascii:strict", observe.FORMAT: form, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines() + done.stderr.splitlines()
    if form == "json":
        assert [json.loads(line)["message"] for line in lines] == ["z\udce9.jpg", "z\udce8.jpg", "\u6587"]
    else:
        assert lines == [r"z\udce9.jpg", r"z\udce8.jpg", r"\u6587"]


def test_a_line_as_json(as_json, monkeypatch, capsys):
    observe.begin("toy", "selftrain")
    with observe.console():
        observe.say("\n== labels", stage="labels", seconds=1.5, images=3, loss=float("nan"), name="a", module="b")
        with observe.stage("student"):
            observe.say("inside")
        observe.say("of another", run="other")
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    first = lines[0]
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", first.pop("time"))
    assert first == {
        "level": "INFO", "run": "toy", "stage": "labels", "message": "== labels", "seconds": 1.5, "images": 3, "loss": "nan",
        "name": "a", "module": "b",
    }  # fmt: skip
    assert [(line["run"], line["stage"]) for line in lines[1:]] == [("toy", "student"), ("other", "selftrain")]


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=20), max_size=5))
def test_everything_printed_becomes_json(texts):
    patch = pytest.MonkeyPatch()
    with patch.context() as env:
        env.setenv(observe.FORMAT, "json")
        stream = _Collect()
        env.setattr(sys, "stdout", stream)
        with observe.console():
            for text in texts:
                print(text, end="")
            print("last", end="")
    lines = [json.loads(line) for line in stream.text.split("\n") if line]
    whole = ("".join(texts) + "last").split("\n")
    assert [line["message"] for line in lines] == [line.strip() for line in whole if line.strip()]


class _Collect:
    def __init__(self) -> None:
        self.text = ""

    def write(self, text: str) -> int:
        # A line end inside a message must be escaped: json.loads would fail on the halves.
        self.text += text
        return len(text)

    def flush(self) -> None:
        pass


def test_lines_of_several_threads_do_not_mix(as_json, capsys):
    with observe.console():
        threads = [threading.Thread(target=lambda k=k: [print("x" * 50, k) for _ in range(50)]) for k in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        observe.say("whole", images=4)
    messages = [json.loads(line)["message"] for line in capsys.readouterr().out.splitlines()]
    assert sorted(messages) == sorted([f"{'x' * 50} {k}" for k in range(4) for _ in range(50)] + ["whole"])


@pytest.mark.parametrize("form", ["json", "text"])
def test_a_job_prints_nothing_but_json(form, monkeypatch, capsys):
    monkeypatch.setenv(observe.FORMAT, form)

    def work(settings, options):
        print("numbers: a.json")
        raise UserError("a.json: is no file; give another")

    with pytest.raises(SystemExit) as stop:
        command_line.run(work, "", argv=["name=toy"], prog="evaluate.py")
    assert stop.value.code == 2
    out, err = capsys.readouterr()
    if form == "text":
        assert (out, err) == ("numbers: a.json\n", "evaluate.py: a.json: is no file; give another\n")
        return
    (said,), (error,) = ([json.loads(line) for line in text.splitlines()] for text in (out, err))
    assert (said["run"], said["stage"], said["level"], said["message"]) == ("toy", "evaluate", "INFO", "numbers: a.json")
    assert (error["level"], error["message"]) == ("ERROR", "evaluate.py: a.json: is no file; give another")


def test_names_follow_the_rules_of_prometheus():
    for metric in observe.METRICS.values():
        assert re.fullmatch(r"i3cl_[a-z0-9_]+", metric.name)
        assert (metric.kind == "counter") == metric.name.endswith("_total")
        assert (metric.kind == "histogram") == bool(metric.bounds) and list(metric.bounds) == sorted(metric.bounds)
        assert not metric.description.endswith(".")


def test_the_dashboard_shows_every_metric_and_no_other():
    used = set(re.findall(r"\bray_(i3cl_\w+)", " ".join(expressions())))
    plain = {re.sub("_(count|sum|bucket)$", "", name) for name in used}
    assert plain == set(observe.METRICS)
    for expression in expressions():
        if "ray_i3cl_" in expression:
            assert expression.count('run=~"$run", stage=~"$stage"') == expression.count("ray_i3cl_")


def test_the_dashboard_is_one_that_grafana_takes():
    panels = DASHBOARD["panels"]
    assert [v["name"] for v in DASHBOARD["templating"]["list"]] == ["datasource", "run", "stage"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    cells = [
        (x, y)
        for p in panels
        for x in range(p["gridPos"]["x"], p["gridPos"]["x"] + p["gridPos"]["w"])
        for y in range(p["gridPos"]["y"], p["gridPos"]["y"] + p["gridPos"]["h"])
    ]
    assert len(cells) == len(set(cells)) and max(x for x, _ in cells) < 24
    for panel in panels:
        if panel["type"] != "row":
            assert {d["datasource"]["uid"] for d in [panel, *panel["targets"]]} == {"${datasource}"}


def test_the_page_lists_every_metric():
    rows = dict(re.findall(r"^\| `(i3cl_\w+)` \| ([^|]+?) \|", (ROOT / "docs" / "observe.md").read_text(), re.M))
    assert rows == {metric.name: metric.kind for metric in observe.METRICS.values()}

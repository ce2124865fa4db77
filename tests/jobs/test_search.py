"""Sweeps as a user starts them: over stored predictions, killed and continued; over real students."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml

from i3cl.config import load_settings, to_yaml, with_overrides
from i3cl.data.formats.coco import read_coco
from i3cl.data.formats.predictions import prediction_table

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def predictions(tiny_set, tmp_path_factory) -> Path:
    """Two members that see most of the truth, a little displaced, and some text that is not there."""
    rng = np.random.default_rng(0)
    rows = []
    for record in read_coco(str(tiny_set / "set.json"), str(tiny_set / "images")).records:
        for member in ("a", "b"):
            polygons = [i.polygon + rng.normal(0, 1, 2) for i in record.instances if rng.random() < 0.8]
            seen = len(polygons)
            polygons += [p + 20 for p in polygons[:2]]
            polygons = [p.clip(0, 96) for p in polygons if (p.clip(0, 96).max(0) - p.clip(0, 96).min(0) > 2).all()]
            scores = [rng.uniform(0.4, 1) if k < seen else rng.uniform(0, 0.6) for k in range(len(polygons))]
            head = {"image_id": record.id, "file_name": record.file_name, "height": 96, "width": 96, "member": member}
            rows.append({**head, "view": "default", "polygons": polygons, "scores": scores})
    folder = tmp_path_factory.mktemp("search") / "predictions"
    folder.mkdir()
    pq.write_table(prediction_table(rows), folder / "part-000.parquet")
    return folder


def start(config: Path, *overrides: str) -> subprocess.Popen[str]:
    log = config.with_suffix(".log").open("w")
    command = [sys.executable, str(ROOT / "jobs" / "search.py"), "--config", str(config), *overrides]
    return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, cwd=ROOT, text=True, start_new_session=True)


def finish(process: subprocess.Popen[str], config: Path, seconds: float = 300) -> str:
    code = process.wait(seconds)
    text = config.with_suffix(".log").read_text()
    assert code == 0, text
    return text


def trials(run: Path) -> list[dict]:
    path = run / "trials.json"
    return json.loads(path.read_text())["trials"] if path.exists() else []


@pytest.mark.slow
def test_a_sweep_over_thresholds_is_killed_and_continues(tiny_settings, predictions, tmp_path):
    config = tmp_path / "sweep.yaml"
    space = {
        "label.select.low": {"uniform": [0.05, 0.8]},
        "label.select.high": {"uniform": [0.05, 0.95], "above": "label.select.low"},
        "label.select.ignore": {"uniform": [0, 0.8], "below": "label.select.low"},
        # Nothing checks this list before a trial does: the second choice is an impossible value.
        "label.select.min_weight": {"choice": [0.2, 7]},
    }
    search = {"search.predictions": str(predictions), "search.trials": 30, "search.space": space}
    places = {"storage": str(tmp_path / "runs"), "name": "sweep"}
    config.write_text(to_yaml(with_overrides(tiny_settings, {**search, **places}, "test")))
    run = tmp_path / "runs" / "sweep"

    process = start(config)
    deadline = time.monotonic() + 180
    while sum(t["state"] != "running" for t in trials(run)) < 6:
        assert process.poll() is None and time.monotonic() < deadline, config.with_suffix(".log").read_text()
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    before = [t for t in trials(run) if t["state"] != "running"]
    assert 6 <= len(before) < 30

    finish(start(config), config)
    after = trials(run)
    assert len(after) == 30 and all(t["state"] != "running" for t in after)
    assert [t for t in after if t["number"] in {b["number"] for b in before}] == before, "what was done is not done again"
    broken = [t for t in after if t["state"] == "broken"]
    assert broken and all("min_weight" in t["reason"] and t["values"]["label.select.min_weight"] == 7 for t in broken)
    assert [t["values"]["label.select.low"] for t in after if t["present"]] == [0.4]

    summary = json.loads((run / "summary.json").read_text())
    best = max((t for t in after if t["state"] == "finished"), key=lambda t: t["metrics"]["hmean"])
    assert summary["best"]["search_part"]["hmean"] == best["metrics"]["hmean"]
    assert summary["images"]["search"] + summary["images"]["held_out"] == 12
    assert load_settings(run / "best.yaml").label.select.low == pytest.approx(best["values"]["label.select.low"])
    assert yaml.safe_load((run / "best.yaml").read_text())["extends"] == "../../sweep.yaml"
    page = (run / "dashboard.html").read_text()
    assert "http-equiv" not in page and page.count("<svg") >= 4 and "impossible" not in page
    assert list((run / "tune").rglob("events.out.tfevents*")), "TensorBoard has the trials"

    text = finish(start(config), config)
    assert "held-out F" in text and trials(run) == after, "a finished sweep only answers"


@pytest.mark.slow
def test_a_sweep_over_students_trains_them(tiny_settings, predictions, tmp_path):
    config = tmp_path / "students.yaml"
    changes = {
        "train.steps": 4,
        "train.checkpoint_every": 2,
        "label.select.min_votes": 1,
        "search.objective": "student",
        "search.unlabelled": str(predictions),
        "search.sampler": "grid",
        "search.parallel": 2,
        "search.space": {"selftrain.pseudo_weight": {"choice": [1.0, 0.5]}},
        "storage": str(tmp_path / "runs"),
        "name": "students",
    }
    config.write_text(to_yaml(with_overrides(tiny_settings, changes, "test")))
    text = finish(start(config), config, 500)
    run = tmp_path / "runs" / "students"
    rows = trials(run)
    assert len(rows) == 3 and {t["state"] for t in rows} <= {"finished", "stopped"}, text
    assert any(t["curve"][-1][0] == 4 for t in rows)
    summary = json.loads((run / "summary.json").read_text())
    assert set(summary["best"]["held_out"]) == {"recall", "precision", "hmean"}
    assert len(list((run / "students").iterdir())) == 3, "equal values at the same time must not share a folder"


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ([], ["search.space"]),
        (["search.space={label.select.low: {uniform: [0, 1]}}"], ["data.validation"]),
        (
            ["search.space={label.select.low: {uniform: [0, 1]}}", "data.validation={annotations: a, images: b}"],
            ["search.predictions"],
        ),
    ],
)
def test_what_is_missing_is_one_line(overrides, words, tmp_path):
    command = [sys.executable, str(ROOT / "jobs" / "search.py"), f"storage={tmp_path}", *overrides]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2 and len(done.stderr.strip().splitlines()) == 1
    assert all(word in done.stderr for word in words), done.stderr

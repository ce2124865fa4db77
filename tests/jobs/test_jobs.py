"""The real scripts as subprocesses: usage, dry runs, good and bad input, killed runs that continue."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from i3cl.config import to_yaml, with_overrides

ROOT = Path(__file__).parents[2]
JOBS = sorted(p.stem for p in (ROOT / "jobs").glob("*.py"))


def job(name: str, *arguments: str, timeout: float = 300) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(ROOT / "jobs" / f"{name}.py"), *arguments],
        capture_output=True,
        text=True,
        timeout=timeout,
        cwd=ROOT,
    )


def recipe(settings, path: Path, **overrides) -> str:
    path.write_text(to_yaml(with_overrides(settings, overrides, "test")))
    return str(path)


@pytest.mark.parametrize("name", JOBS)
def test_help(name):
    done = job(name, "--help")
    assert done.returncode == 0, done.stderr
    assert "usage" in done.stdout


def test_dry_run_prints_the_resolved_settings():
    done = job("train", "--config", "configs/quickstart.yaml", "--dry-run", "train.steps=7")
    assert done.returncode == 0
    assert yaml.safe_load(done.stdout)["train"]["steps"] == 7


@pytest.mark.parametrize(
    ("name", "arguments", "words"),
    [
        ("train", ["--config", "configs/nothing.yaml"], ["configs/nothing.yaml", "no such settings file"]),
        ("train", ["train.lerning_rate=1"], ["train.lerning_rate", "train.learning_rate?"]),
        ("selftrain", [], ["selftrain.members", "data.train"]),
        ("label", ["predict"], ["label.source"]),
        ("label", ["select", "name=nothing"], ["predictions"]),
        ("evaluate", [], ["data.validation"]),
        ("predict", ["--checkpoint", "nowhere", "--images", "README.md"], ["nowhere"]),
        ("predict", ["--checkpoint", "nowhere", "--images", "nothing.jpg"], ["nothing.jpg"]),
    ],
)
def test_a_users_mistake_ends_with_status_2_and_one_line(name, arguments, words):
    done = job(name, *arguments)
    assert done.returncode == 2, (done.stdout, done.stderr)
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1, done.stderr
    assert all(word in lines[0] for word in words), lines[0]


def test_a_missing_image_is_named_before_training_starts(tiny_settings, tiny_set, tmp_path):
    shutil.copytree(tiny_set / "images", tmp_path / "images")
    (tmp_path / "images" / "4.jpg").unlink()
    config = recipe(
        tiny_settings,
        tmp_path / "c.yaml",
        **{
            "storage": str(tmp_path / "runs"),
            "data.train": [{"annotations": str(tiny_set / "set.json"), "images": str(tmp_path / "images")}],
        },
    )
    done = job("train", "--config", config)
    assert done.returncode == 2, done.stderr
    assert "4.jpg" in done.stderr and len(done.stderr.strip().splitlines()) == 1


@pytest.fixture(scope="module")
def circle(tiny_settings, tiny_set, tmp_path_factory):
    """The whole circle on the tiny set, run once for the tests below: two teachers at a time, a student on two workers."""
    folder = tmp_path_factory.mktemp("circle")
    source = {"annotations": str(tiny_set / "set.json"), "images": str(tiny_set / "images")}
    config = recipe(
        tiny_settings,
        folder / "c.yaml",
        **{
            "name": "circle",
            "storage": str(folder / "runs"),
            "data.ray_data": True,
            "train.steps": 6,
            "train.checkpoint_every": 3,
            "label.select.low": 0.0,
            "label.select.ignore": 0.0,
            "label.select.high": 0.9,
            "label.fusion.min_score": 0.0,
            "label.views": [{}, {"flip": True}],
            "model.score_threshold": 0.0,
            "model.detections_per_image": 5,
            "selftrain.unlabelled_truth": source,
            "selftrain.control": False,
            # One process that loads torch per labelling in place of two.
            "label.actors": 1,
            "selftrain.teachers": [
                {"name": "a", "overrides": {"train.seed": 1}},
                {"name": "b", "overrides": {"train.seed": 2}},
            ],
            "selftrain.student": {"name": "student", "overrides": {"cluster.workers": 2, "train.batch": 1}},
        },
    )
    done = job("selftrain", "--config", config, timeout=500)
    assert done.returncode == 0, done.stderr
    return folder, config, done.stdout


def test_circle_leaves_summary_report_and_table(circle):
    folder, _, printed = circle
    run = folder / "runs" / "circle"
    summary = json.loads((run / "summary.json").read_text())
    assert [t["name"] for t in summary["teachers"]] == ["a", "b"]
    for row in [*summary["teachers"], summary["student"]]:
        assert {"name", "recall", "precision", "hmean"} <= row.keys()
    labels = summary["pseudo_labels"]
    assert labels["images"] > 0 and labels["instances"] > 0 and 0 < labels["mean_weight"] <= 1
    assert {"teachers", "labels", "student", "evaluation", "report"} <= summary["seconds"].keys()
    assert str(run / "report.html") in printed
    assert "step 6/6" in printed and "images/s" in printed
    report = (run / "report.html").read_text()
    assert "student" in report and 'src="http' not in report
    assert (run / "student" / "best" / "weights.safetensors").is_file()


def test_pseudo_labels_are_coco_with_weights(circle, tiny_set):
    from i3cl.data.formats.coco import read_coco

    folder, _, _ = circle
    dataset = read_coco(str(folder / "runs" / "circle" / "pseudo.json"), str(tiny_set / "images"))
    instances = [i for r in dataset.records for i in r.instances if not i.ignore]
    assert instances and all(0 < i.lossweight <= 1 and i.score is not None and i.votes in (1, 2) for i in instances)


def test_views_are_for_labels_and_scores_come_from_the_first_one(circle):
    folder, _, _ = circle
    jobs = {name: folder / "runs" / "circle" / "predictions" / name / "job.json" for name in ("unlabelled", "validation")}
    views = {name: json.loads(path.read_text())["views"] for name, path in jobs.items()}
    assert views == {"unlabelled": ["default", "default-flip"], "validation": ["default"]}


def test_the_same_command_does_no_stage_twice(circle):
    folder, config, _ = circle
    weights = folder / "runs" / "circle" / "student" / "best" / "weights.safetensors"
    before = weights.stat().st_mtime_ns
    started = time.monotonic()
    done = job("selftrain", "--config", config)
    assert done.returncode == 0, done.stderr
    assert "step 1" not in done.stdout and weights.stat().st_mtime_ns == before
    assert time.monotonic() - started < 60


def test_other_settings_under_the_same_name_are_refused(circle):
    _, config, _ = circle
    done = job("selftrain", "--config", config, "train.steps=7")
    assert done.returncode == 2
    assert "train.steps: 6 there, 7 here" in done.stderr


def test_select_again_needs_no_prediction_and_its_labels_do_not_slip_under_the_student(circle):
    folder, config, _ = circle
    done = job("label", "select", "--config", config, "label.select.high=0.0")
    assert done.returncode == 0, done.stderr
    assert "mean_weight 1.000" in done.stdout
    done = job("train", "--config", str(folder / "runs" / "circle" / "student" / "settings.yaml"))
    assert done.returncode == 2 and len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert "was begun with other labels" in done.stderr and "pseudo.json (data.train.1.annotations)" in done.stderr


@pytest.mark.slow
def test_rounds_and_a_control_join_a_finished_circle(circle):
    folder, config, _ = circle
    run = folder / "runs" / "circle"
    first = (run / "student" / "best" / "weights.safetensors").stat().st_mtime_ns
    more = ["selftrain.rounds=2", "selftrain.control=true", "selftrain.min_gain=-1"]
    done = job("selftrain", "--config", config, *more, timeout=500)
    assert done.returncode == 0, done.stderr
    summary = json.loads((run / "summary.json").read_text())
    assert [row["round"] for row in summary["rounds"]] == [1, 2] and "hmean" in summary["control"]
    job_file = json.loads((run / "round-2" / "predictions" / "unlabelled" / "job.json").read_text())
    assert "student" in str(job_file) and (run / "round-2" / "student" / "best" / "weights.safetensors").is_file()
    assert (run / "student" / "best" / "weights.safetensors").stat().st_mtime_ns == first, "round 1 is not done again"
    again = job("selftrain", "--config", config, *more, timeout=200)
    assert again.returncode == 0 and "starting" not in again.stdout


def test_predict_and_evaluate_with_the_students_checkpoint(circle, tiny_set, tmp_path):
    folder, config, _ = circle
    checkpoint = str(folder / "runs" / "circle" / "student" / "best")
    done = job("predict", "--checkpoint", checkpoint, "--images", str(tiny_set / "images"), "--out", str(tmp_path / "out"))
    assert done.returncode == 0, done.stderr
    assert len(json.loads((tmp_path / "out" / "art.json").read_text())) == 12
    assert len(list((tmp_path / "out" / "pictures").iterdir())) == 12
    assert "test size 96/96 from the checkpoint" in done.stdout
    one = str(tiny_set / "images" / "0.jpg")
    done = job("predict", "--checkpoint", checkpoint, "--images", one, "--out", str(tmp_path / "one"), "data.test_short_side=64")
    assert "test size 64/96 (data.test_short_side as given, the rest from the checkpoint)" in done.stdout
    done = job(
        "evaluate",
        "--config",
        config,
        "name=evaluation",
        f"label.members.student={checkpoint}",
        "--json",
        str(tmp_path / "e.json"),
    )
    assert done.returncode == 0, done.stderr
    assert "test size 96/96 (data.test_short_side, data.test_long_side, data.test_upscale as given)" in done.stdout
    score = json.loads((tmp_path / "e.json").read_text())["student"]
    kept = json.loads((folder / "runs" / "circle" / "summary.json").read_text())["student"]
    assert score["hmean"] == pytest.approx(kept["hmean"], abs=1e-4)


@pytest.mark.slow
def test_a_corrupt_image_costs_one_line_not_the_job(circle, tiny_settings, tiny_set, tmp_path):
    from i3cl.data.formats.predictions import read_predictions

    folder, _, _ = circle
    shutil.copytree(tiny_set / "images", tmp_path / "images")
    (tmp_path / "images" / "2.jpg").write_bytes(b"\xff\xd8\xff garbage")
    config = recipe(
        tiny_settings,
        tmp_path / "c.yaml",
        **{
            "storage": str(tmp_path / "runs"),
            "label.source.images": str(tmp_path / "images"),
            "label.members": {"a": str(folder / "runs" / "circle" / "a" / "best")},
        },
    )
    done = job("label", "predict", "--config", config)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("skipped") == 1 and "2.jpg" in done.stdout
    rows = [row for rows in read_predictions(str(tmp_path / "runs" / "tiny" / "predictions" / "unlabelled")) for row in rows]
    assert len(rows) == 12 and sum(row["error"] is not None for row in rows) == 1


def wait_for(condition, seconds: float, what: str) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            pytest.fail(f"no {what} in {seconds} s")
        time.sleep(0.2)


def workers_of(driver: int) -> list[int]:
    """Ids of the training workers under a job: children of the Ray node that it started, no other run's."""
    parents, names = {}, {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rsplit(")", 1)[1].split()
                names[int(entry.name)] = (entry / "cmdline").read_bytes().decode(errors="replace")
            except (FileNotFoundError, ProcessLookupError):
                continue
            parents[int(entry.name)] = int(fields[1])
    nodes = {pid for pid, parent in parents.items() if parent == driver}
    return [pid for pid, parent in parents.items() if parent in nodes and "RayTrainWorker" in names[pid]]


@pytest.mark.slow
def test_killed_worker_and_killed_run_continue_where_they_stopped(tiny_settings, tmp_path):
    config = recipe(
        tiny_settings,
        tmp_path / "c.yaml",
        **{
            "name": "killed",
            "storage": str(tmp_path / "runs"),
            "train.steps": 80,
            "train.checkpoint_every": 10,
            "train.validate_images": 1,
        },
    )
    run = tmp_path / "runs" / "killed"

    def steps() -> list[int]:
        if not (run / "metrics.jsonl").exists():
            return [0]
        rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        return [row["step"] for row in rows if "loss" in row]

    process = subprocess.Popen(
        [sys.executable, str(ROOT / "jobs" / "train.py"), "--config", config],
        stdout=subprocess.DEVNULL,
        start_new_session=True,
        cwd=ROOT,
    )
    try:
        wait_for(lambda: steps()[-1] > 12, 200, "step 12")
        before = workers_of(process.pid)
        assert len(before) == 1
        os.kill(before[0], signal.SIGKILL)
        wait_for(lambda: workers_of(process.pid) not in ([], before), 120, "new worker")
        killed_at = steps()[-1]
        wait_for(lambda: steps()[-1] > killed_at + 3, 120, "progress of the new worker")
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    reached = steps()[-1]
    assert 12 < reached < 80
    done = job("train", "--config", config, timeout=400)
    assert done.returncode == 0, done.stderr
    assert steps() == list(range(1, 81)), "a step is missing or stands twice"
    shown = [int(line.split("step ")[1].split("/")[0]) for line in done.stdout.splitlines() if "/80" in line]
    assert reached - 20 <= min(shown), "more was done again than one checkpoint interval"

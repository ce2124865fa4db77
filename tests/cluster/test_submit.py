"""`ray job submit --working-dir . -- python jobs/…` against a real head with a token: what travels, what runs, how it ends."""

from __future__ import annotations

import json
import shutil
import time
import zipfile
from pathlib import Path

import pytest

from i3cl.config import to_yaml, with_overrides
from i3cl.errors import UserError
from i3cl.runtime.cluster import travelling

ROOT = Path(__file__).parents[2]
STEPS = 60
"""Of the training that is stopped: enough that a fast machine is not done before the stop arrives."""


def info(cluster, submission: str) -> dict:
    """What the job API says about a submission."""
    import urllib.request

    request = urllib.request.Request(
        f"{cluster.dashboard}/api/jobs/{submission}", headers={"Authorization": f"Bearer {cluster.token.read_text()}"}
    )
    with urllib.request.urlopen(request, timeout=30) as answer:
        return json.load(answer)


def recipe(settings, laptop, **overrides) -> str:
    """A recipe of the laptop, which travels with the code."""
    name = f"{overrides['name']}.yaml"
    settings = with_overrides(settings, {**overrides, "name": Path(overrides["name"]).name}, "test")
    (laptop.folder / name).write_text(to_yaml(settings))
    return name


def rows(run: Path) -> list[dict]:
    """What a training has measured so far."""
    return [row for row in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()) if "loss" in row]


def test_the_package_holds_the_code_and_nothing_else(tmp_path):
    """What Ray itself packs of a working folder full of data: measured, and compared with what git keeps."""
    from ray._private.ray_constants import get_runtime_env_default_excludes
    from ray._private.runtime_env.packaging import create_package

    kept = ("i3cl", "jobs", "configs", "cluster", "tests")
    for name in kept:
        shutil.copytree(ROOT / name, tmp_path / "here" / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in (".gitignore", ".rayignore", "pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, tmp_path / "here" / name)
    code = {str(p.relative_to(tmp_path / "here")) for p in (tmp_path / "here").rglob("*") if p.is_file()}
    # Jobs have no use for a dashboard, nor for what tests compare with.
    code -= {"cluster/grafana/i3cl.json", "tests/evaluation/golden/expected.json", "tests/model/small.json"}
    junk = [
        "runs/a/best/weights.safetensors", "runs/a/metrics.jsonl", "data/art/train.json", "data/art/1.jpg", ".venv/bin/python",
        ".git/objects/1", "weights/resnext151.pth", "i3cl/__pycache__/job.pyc", ".mypy_cache/3.11/x.json", "photos/2.JPG",
        "photos/train.json", "photos/3.png", "art.zip", "i3cl.egg-info/PKG-INFO", ".env", "docs/quickstart.jpg",
        "table.parquet", "out.log",
    ]  # fmt: skip
    for name in junk:
        file = tmp_path / "here" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        with open(file, "wb") as stream:
            stream.truncate(300 << 20)  # without blocks on the disk
    package = tmp_path / "package.zip"
    create_package(str(tmp_path / "here"), package, include_gitignore=True, excludes=get_runtime_env_default_excludes())
    assert package.stat().st_size < 25 << 20, "the code, and the detector that comes with it"
    with zipfile.ZipFile(package) as archive:
        assert {name for name in archive.namelist() if not name.endswith("/")} == code


def test_keys_do_not_travel():
    given = {"AWS_SECRET_ACCESS_KEY": "s", "AWS_ACCESS_KEY_ID": "k", "AWS_SESSION_TOKEN": "t", "RAY_AUTH_TOKEN": "r"}
    plain = {"AWS_ENDPOINT_URL": "http://a", "AWS_REGION": "b", "GLOO_SOCKET_IFNAME": "eth0", "NCCL_DEBUG": "INFO"}
    assert travelling({**given, **plain, "HOME": "/root"}) == plain


def test_outputs_below_the_uploaded_code_are_refused():
    from i3cl import storage

    lost = "/tmp/ray/session_1/runtime_resources/working_dir_files/_ray_pkg_1/runs/x"
    for write in (storage.make_dirs, lambda p: storage.write_text_atomic(p, ""), lambda p: storage.atomic_file(p).__enter__()):
        with pytest.raises(UserError, match=r"^runs/x: .*files are lost; give .*s3://"):
            write(lost)


def test_a_mistake_ends_with_its_line_and_status_2(laptop, cluster):
    """Ray's command makes 1 of it; the job API keeps the 2."""
    done = laptop.submit(
        "jobs/prepare.py", "synthetic", "--config", "configs/quickstart.yaml", "--out", "runs/x",
        options=("--submission-id", "mistake"),
    )  # fmt: skip
    assert done.returncode == 1, done.stdout + done.stderr
    seen = info(cluster, "mistake")
    assert (seen["status"], seen["driver_exit_code"]) == ("FAILED", 2)
    last = seen["message"].strip().splitlines()[-1]
    assert last.startswith("prepare.py synthetic: runs/x") and "files are lost" in last
    assert done.stdout.count(last) == 2  # in the log that passed through, and in Ray's own summary


@pytest.fixture(scope="module")
def trained(laptop, cluster, tiny_settings, tmp_path_factory):
    """A training that was stopped in the middle and submitted again: folder, both submissions, what was there in between."""
    shared = tmp_path_factory.mktemp("shared")
    seen = shared / "seen"
    seen.mkdir()
    config = recipe(
        tiny_settings,
        laptop,
        **{
            "name": "stopped",
            "storage": str(shared / "runs"),
            "data.ray_data": True,
            "train.steps": STEPS,
            "train.checkpoint_every": 6,
            "train.log_every": 2,
            "cluster.workers": 2,
        },
    )
    # GLOO_SOCKET_IFNAME is one of those that a job passes on itself: the same key in both places must be no conflict.
    environment = {"I3CL_SEEN": str(seen), "GLOO_SOCKET_IFNAME": "lo", "AWS_REGION": "eu-central-1"}
    options = ("--runtime-env-json", json.dumps({"env_vars": environment}))
    command = ("jobs/train.py", "--config", config)
    first = laptop.submit(*command, options=(*options, "--submission-id", "first", "--no-wait"))
    assert first.returncode == 0, first.stdout + first.stderr
    run = shared / "runs" / "stopped"
    deadline = time.monotonic() + 180
    while not list((run / "ray").glob("step_*")):
        assert time.monotonic() < deadline and info(cluster, "first")["status"] in ("PENDING", "RUNNING"), laptop.ray(
            "job", "logs", "first"
        ).stdout
        time.sleep(0.2)
    stop = laptop.ray("job", "stop", "first")
    between = rows(run)
    second = laptop.submit(*command, options=(*options, "--submission-id", "second"))
    return run, stop, between, second, seen


def test_a_stopped_training_continues_with_the_same_submission(trained, laptop, cluster):
    run, stop, between, second, _ = trained
    assert stop.returncode == 0 and info(cluster, "first")["status"] == "STOPPED", stop.stdout + stop.stderr
    log = laptop.ray("job", "logs", "first").stdout
    assert "train.py: interrupted; the same command continues where it stopped" in log
    assert "Traceback" not in log, log
    assert 6 <= between[-1]["step"] < STEPS
    assert second.returncode == 0, second.stdout + second.stderr
    assert info(cluster, "second")["driver_exit_code"] == 0
    after = rows(run)
    assert [row["step"] for row in after] == list(range(2, STEPS + 1, 2))
    assert after[:3] == between[:3], "what was done before the checkpoint was done again"
    assert (run / "best" / "weights.safetensors").is_file()


def test_the_log_passes_through_to_the_submitter(trained):
    run, _, _, second, _ = trained
    assert f"stopped: step {STEPS}/{STEPS}" in second.stdout
    assert f": {run / 'best'}\n" in second.stdout


def test_the_uploaded_code_is_what_runs(trained):
    """In the driver, in training workers and in Ray Data's processes."""
    seen = [note.read_text() for note in trained[4].iterdir()]
    assert all("/runtime_resources/working_dir_files/" in note for note in seen), seen
    for role in ("train.py ", "RayTrainWorker", "Map"):
        assert any(role in note for note in seen), f"{role}: {seen}"


def test_ray_shows_no_key_of_the_nodes(trained, cluster, laptop, secret):
    shown = json.dumps([info(cluster, "first"), info(cluster, "second")]) + laptop.ray("job", "list").stdout
    assert "GLOO_SOCKET_IFNAME" in shown and secret not in shown and "SECRET" not in shown
    assert cluster.token.read_text() not in shown


@pytest.fixture(scope="module")
def every(laptop, tiny_settings, tiny_set, tiny_checkpoints, tmp_path_factory) -> Path:
    """A recipe for all jobs, `every.yaml` and `grid/` of the laptop; the folder that it writes to."""
    shared = tmp_path_factory.mktemp("every")
    (laptop.folder / "grid").mkdir()
    changes = {
        "name": "every",
        "storage": str(shared / "runs"),
        "train.steps": 2,
        "train.checkpoint_every": 2,
        "label.members": tiny_checkpoints,
        "label.select": {"ignore": 0.0, "low": 0.0, "high": 0.9},
        "label.fusion.min_score": 0.0,
        "model.score_threshold": 0.0,
        "model.detections_per_image": 4,
        "selftrain.teachers": [{"name": n, "overrides": {"train.seed": s}} for s, n in ((1, "a"), (2, "b"))],
        "search.space": {"label.select.high": {"uniform": [0.5, 0.95]}},
        "search.trials": 3,
        "synthetic": {"labelled": 4, "unlabelled": 4, "validation": 4, "side": 96},
    }
    recipe(tiny_settings, laptop, **changes)
    arms = {"plain": {}, "intra": {"overrides": {"model.intra": True}}}
    study = {"seeds": [0], "arms": arms, "compare": [["intra", "plain"]]}
    recipe(tiny_settings, laptop, **{**changes, "name": "grid", "selftrain.teachers": [], "synthetic": None, "study": study})
    return shared


_VALIDATION = "label.source={annotations: %s/set.json, images: %s/images}"


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("command", "result"),
    [
        ("prepare.py synthetic --config every.yaml --out SHARED/made", "made/labelled.json"),
        ("train.py --config every.yaml synthetic=null", "runs/every/best/weights.safetensors"),
        ("label.py all --config every.yaml name=labels", "runs/labels/pseudo.json"),
        ("evaluate.py --config every.yaml name=scored", None),
        ("label.py predict --config every.yaml name=val SOURCE", "runs/val/predictions/unlabelled/done.json"),
        (
            "search.py --config every.yaml name=sweep search.predictions=SHARED/runs/val/predictions/unlabelled",
            "runs/sweep/best.yaml",
        ),
        ("predict.py --checkpoint CHECKPOINT --images SET/images --out SHARED/predicted", "predicted/art.json"),
        (
            "selftrain.py --config every.yaml name=circle synthetic=null train.steps=6 train.checkpoint_every=3",
            "runs/circle/report.html",
        ),
        ("study.py --config grid.yaml", "runs/grid/study.json"),
        ("benchmark.py step --runs 1 --side 64", None),
    ],
    ids=lambda value: value.split()[0] if value and ".py" in value else "",
)
def test_every_job_runs_when_submitted(laptop, every, tiny_set, tiny_checkpoints, command, result):
    places = {"SHARED": every, "SET": tiny_set, "CHECKPOINT": tiny_checkpoints["a"]}
    words = []
    for word in command.split():
        for name, path in places.items():
            word = word.replace(name, str(path))
        words.append(_VALIDATION % (tiny_set, tiny_set) if word == "SOURCE" else word)
    done = laptop.submit(f"jobs/{words[0]}", *words[1:], timeout=600)
    assert done.returncode == 0, done.stdout[-3000:]
    if result:
        assert (every / result).exists(), sorted(every.rglob("*"))

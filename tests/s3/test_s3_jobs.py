"""The real jobs with everything on S3 behind a bad network: data, run directory, checkpoints, predictions."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import pytest
import torch
from s3.proxy import Faults

from i3cl import storage
from i3cl.config import Settings, to_yaml, with_overrides
from i3cl.data.formats.predictions import read_batches
from i3cl.model.weights_file import read_tensors
from i3cl.training.loop import prepare

ROOT = Path(__file__).parents[2]
# Less than what single requests bear: a job of hundreds must meet every kind of fault and still be quick.
BAD = Faults(errors=0.1, drops=0.05, slow=0.03, slow_seconds=2.0)
STEPS, FIRST = 4, 2


def job(name: str, *arguments: str, log: Path) -> subprocess.Popen[bytes]:
    with open(log, "ab") as file:
        command = [sys.executable, str(ROOT / "jobs" / f"{name}.py"), *arguments]
        return subprocess.Popen(command, stdout=file, stderr=file, cwd=ROOT, start_new_session=True)


def upload(local: Path, url: str) -> str:
    for path in local.rglob("*"):
        if path.is_file():
            storage.write_bytes_atomic(storage.join(url, path.relative_to(local).as_posix()), path.read_bytes())
    return url


def on_s3(settings: Settings, url: str, **changes: object) -> Settings:
    """The tiny recipe with its data and its run under `url`."""
    source = {"annotations": f"{url}/data/set.json", "images": f"{url}/data/images"}
    unlabelled = {**source, "annotations": f"{url}/data/unlabelled.json"}
    places = {"storage": f"{url}/runs", "data.train": [source], "data.validation": source, "label.source": unlabelled}
    return with_overrides(settings, places | changes, "test")


@pytest.mark.slow
def test_training_through_a_bad_network_killed_and_continued(bucket, tiny_settings, tiny_set, tmp_path):
    """Stopped after its first checkpoint, the run ends with the weights of one that never met S3 nor a fault, bit for bit."""
    upload(tiny_set, f"{bucket.url}/data")
    short = {"train.steps": STEPS, "train.checkpoint_every": FIRST, "cluster.threads": 1}
    settings = on_s3(tiny_settings, bucket.url, **short)
    config, log = tmp_path / "tiny.yaml", tmp_path / "log"
    config.write_text(to_yaml(settings))
    snapshot = f"{bucket.url.removeprefix('s3://').partition('/')[2]}/runs/tiny/ray/checkpoint_manager_snapshot.json"
    bucket.proxy.reset(BAD)
    first = job("train", "--config", str(config), log=log)
    while not bucket.proxy.keys["PUT", snapshot] and first.poll() is None:
        time.sleep(0.1)
    time.sleep(0.5)
    assert first.poll() is None, log.read_text()
    os.killpg(first.pid, signal.SIGKILL)
    first.wait()
    second = job("train", "--config", str(config), log=log)
    assert second.wait(300) == 0, log.read_text()
    assert bucket.proxy.broken.total() > 10
    bucket.proxy.reset()

    torch.manual_seed(settings.train.seed)
    torch.set_num_threads(1)
    whole = prepare(with_overrides(tiny_settings, short, "test"), torch.device("cpu"), 0, 1, str(tmp_path / "local"))
    rows: list[dict[str, float]] = []
    whole.run(lambda metrics, step: rows.append(metrics))
    with storage.local_copy(f"{bucket.url}/runs/tiny/best") as folder:
        metrics = json.loads((folder / "metrics.json").read_text())
        best = {name: tensor.clone() for name, tensor in read_tensors(folder / "weights.safetensors").items()}
    assert metrics["step"] == STEPS and metrics["loss"] == rows[-1]["loss"]
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(tensor, best[name]), name
    lines = storage.read_text(f"{bucket.url}/runs/tiny/metrics.jsonl").splitlines()
    assert [json.loads(line)["step"] for line in lines if "loss" in json.loads(line)] == list(range(1, STEPS + 1))
    assert any(name.startswith("events") for name in storage.list_dir(f"{bucket.url}/runs/tiny/tensorboard"))


@pytest.mark.slow
def test_training_goes_on_while_a_checkpoint_is_uploaded(bucket, tiny_settings, tiny_set, tmp_path, monkeypatch):
    """S3 answers the first checkpoint only after it has the log of the second one."""
    upload(tiny_set, f"{bucket.url}/data")
    settings = on_s3(tiny_settings, bucket.url, **{"train.steps": STEPS, "train.checkpoint_every": FIRST, "cluster.threads": 1})
    config, log = tmp_path / "tiny.yaml", tmp_path / "log"
    config.write_text(to_yaml(settings))
    plan, logs, went_on = bucket.proxy.plan, Counter(), threading.Event()
    answers: list[bool] = []

    def hold_first(asked, key):
        if key.endswith("runs/tiny/metrics.jsonl") and asked == "PUT":
            logs[key] += 1
            if logs[key] == STEPS // FIRST:
                went_on.set()
        if f"step_{FIRST:07d}/" in key and asked == "PUT":
            answers.append(went_on.wait(60))
        return plan(asked, key)

    monkeypatch.setattr(bucket.proxy, "plan", hold_first)
    process = job("train", "--config", str(config), log=log)
    assert process.wait(300) == 0, log.read_text()
    assert answers and all(answers), f"training waited for the upload: {logs}"
    with storage.local_copy(f"{bucket.url}/runs/tiny/best") as folder:
        assert json.loads((folder / "metrics.json").read_text())["step"] in (FIRST, STEPS)


@pytest.mark.slow
def test_labelling_through_a_bad_network(bucket, tiny_settings, tiny_set, tiny_checkpoints, tmp_path):
    """Predict and select: every image once, none with an error, and the pseudo labels are there."""
    upload(tiny_set, f"{bucket.url}/data")
    members = {name: upload(Path(path), f"{bucket.url}/models/{name}") for name, path in tiny_checkpoints.items()}
    settings = on_s3(tiny_settings, bucket.url, **{"label.members": members, "label.actors": 2, "label.attempts": 3})
    config, log = tmp_path / "tiny.yaml", tmp_path / "log"
    config.write_text(to_yaml(settings))
    bucket.proxy.reset(BAD)
    assert job("label", "all", "--config", str(config), log=log).wait(300) == 0, log.read_text()
    assert bucket.proxy.broken.total() > 10
    out = f"{bucket.url}/runs/tiny/predictions/unlabelled"
    rows = [row for batch in read_batches(out) for row in batch.to_pylist()]
    assert Counter((row["image_id"], row["member"]) for row in rows) == {(k, m): 1 for k in range(1, 13) for m in "ab"}
    assert all(row["error"] is None for row in rows)
    labels = json.loads(storage.read_text(f"{bucket.url}/runs/tiny/pseudo.json"))
    assert {image["id"] for image in labels["images"]} <= set(range(1, 13))
    # One GET an image: nothing is looked at before it is read.
    assert sum(count for (kind, key), count in bucket.proxy.keys.items() if kind == "HEAD" and "/images/" in key) == 0

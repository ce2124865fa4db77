"""Metrics and logs of a real Ray head: every name in the dashboard exists, dead workers' gauges go, worker logs are JSON."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.request import urlopen

import pytest

from cluster.nodes import LocalCluster

ROOT = Path(__file__).parents[2]
NEEDS_GPU = {"ray_node_gpus_utilization", "ray_node_gram_used", "ray_node_gram_available"}

DRIVER = """
import sys
from i3cl import observe
from i3cl.runtime import cluster
observe.REFRESH = 0.5
observe.begin("toy", "selftrain")
console = observe.console()
console.__enter__()
circle = observe.stage("teachers")
circle.__enter__()
cluster.connect()
import ray

@ray.remote(num_cpus=1, max_restarts=0)
class Worker:
    def train(self, step):
        from i3cl import observe
        observe.REFRESH = 0.5
        row = {"step": step, "steps": 4, "loss": 1.5, "loss_mask": 0.5, "learning_rate": 1e-3, "images_per_second": 3.0}
        row |= {"data_wait": 0.1, "hmean": 0.5, "recall": 0.4, "precision": 0.6}
        observe.training_started("/runs/toy/teacher-a", 1)
        observe.training("/runs/toy/teacher-a", 0, row)
        observe.checkpoint("/runs/toy/teacher-a", 2.0)
        observe.say("said in a worker", stage="teacher-a")
        return True

worker = Worker.remote()
ray.get(worker.train.remote(2))
numbers = {"images_per_second": 2.0, "remaining": 4, "actors": 2, "busy_share": 0.5}
observe.labelling("labels", 4, 1, numbers)
observe.pseudo_labels("/runs/toy/pseudo.json", 3, 2)
observe.search(["running", "finished", "finished"], 0.5)
with observe.stage("evaluation"):
    observe.evaluation("teacher-a", hmean=0.5, recall=0.4, precision=0.6)
print("emitted")
sys.stdin.readline()
ray.kill(worker)
observe.labelling_ended("labels")
print("killed")
sys.stdin.readline()
"""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory) -> Iterator[LocalCluster]:
    quick = {"RAY_metrics_report_interval_ms": "1000", "PYTHONPATH": str(ROOT), "I3CL_LOG": "json"}
    with LocalCluster(tmp_path_factory.mktemp("cluster"), environment=quick) as started:
        yield started


def until(condition: Callable[[], Any], seconds: float, what: str) -> Any:
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, f"waited {seconds} s for {what}"
        time.sleep(0.3)
    return found


def scrape(folder: Path) -> str:
    """What Prometheus would read from all targets that Ray announces, as soon as all of them answer."""

    def read() -> str | None:
        (group,) = json.loads((folder / "prom_metrics_service_discovery.json").read_text())
        try:
            return "\n".join(urlopen(f"http://{target}/metrics", timeout=10).read().decode() for target in group["targets"])
        except URLError:  # announced, but not yet listening
            return None

    return until(read, 180, "the targets to answer")


def names(text: str) -> set[str]:
    return set(re.findall(r"^(ray_\w+)", text, re.M))


def test_metrics_and_logs_on_a_cluster(cluster):
    folder = cluster.temporary
    dashboard = json.loads((ROOT / "cluster" / "grafana" / "i3cl.json").read_text())
    shown = set(re.findall(r"\bray_\w+", json.dumps([panel.get("targets") for panel in dashboard["panels"]])))
    driver = subprocess.Popen(
        [sys.executable, "-c", DRIVER],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=cluster.environment,
    )
    assert driver.stdin and driver.stdout
    try:
        first = json.loads(driver.stdout.readline())
        assert (first["run"], first["cpus"]) == ("toy", 2) and first["message"].startswith("Ray: ")
        assert json.loads(driver.stdout.readline())["message"] == "emitted"
        until(lambda: shown - NEEDS_GPU <= names(scrape(folder)), 90, f"all metrics of the dashboard: {sorted(shown)}")

        # Ray alone would forget a gauge after two report intervals, 2 s here.
        time.sleep(3)
        text = scrape(folder)
        assert {name for name in shown if name.startswith("ray_i3cl_")} <= names(text)
        loss = next(line for line in text.splitlines() if line.startswith("ray_i3cl_train_loss{") and 'part="mask"' in line)
        assert 'run="toy"' in loss and 'stage="teacher-a"' in loss and loss.endswith(" 0.5")
        assert re.search(r'^ray_i3cl_search_trials{.*run="toy".*state="finished".*} 2.0$', text, re.M)
        # Ray was joined inside the first, and the second is over.
        assert re.search(r'^ray_i3cl_circle_stage{.*stage="teachers".*} 1.0$', text, re.M)
        assert re.search(r'^ray_i3cl_circle_stage{.*stage="evaluation".*} 0.0$', text, re.M)
        assert re.search(r'^ray_i3cl_pseudo_labels_total{.*kind="ignored".*} 2.0$', text, re.M)

        driver.stdin.write("\n")
        driver.stdin.flush()
        assert json.loads(driver.stdout.readline())["message"] == "killed"
        gone = {"ray_i3cl_train_step", "ray_i3cl_label_remaining_images"}
        until(lambda: not gone & names(scrape(folder)), 60, "the gauges of a dead worker and of an ended job to go")
        left = names(scrape(folder))
        assert {"ray_i3cl_train_starts_total", "ray_i3cl_label_images_total", "ray_i3cl_evaluation_hmean_ratio"} <= left
    finally:
        driver.kill()
        driver.wait()

    logs = (folder / "session_latest" / "logs").glob("worker-*.err")
    lines = [json.loads(line) for log in logs for line in log.read_text().splitlines() if '"run": "toy"' in line]
    assert {line["message"] for line in lines} == {
        "rank 0: step 2/4  loss 1.500  3.0 images/s  10% of the time without data",
        "said in a worker",
    }
    for line in lines:
        assert (line["run"], line["stage"], line["level"]) == ("toy", "teacher-a", "INFO")
        assert all(line[key] for key in ("time", "job_id", "worker_id", "node_id", "actor_id"))

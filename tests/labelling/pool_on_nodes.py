"""python pool_on_nodes.py SCENE FOLDER: a labelling pool on nodes with fake GPUs; prints what it took as JSON.

Stand-ins sleep in place of networks, so that many actors fit on two cores. Everything else is the product's: Ray Data's pool, the
queue, the ledger.

SCENE: steady; joins (two GPUs, six more after a while); leaves (eight GPUs, four of them go); slow (one actor takes four times as
long); asleep (one actor never comes back); together (two jobs of four actors on eight GPUs).
"""

import json
import os
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import ray
from ray.cluster_utils import Cluster

from i3cl.data.formats.records import Dataset, ImageRecord
from i3cl.labelling import pool
from i3cl.labelling.ledger import Ledger, part_name
from i3cl.labelling.manifest import make_manifest

ROWS = 8


@dataclass
class Scene:
    out: str
    seconds: float
    """Of an image."""
    slow: float = 1.0
    """Factor of one of the actors."""
    asleep: bool = False


class Sleeper:
    """In the place of `Labeller`."""

    group = 0

    def __init__(self, scene):
        self.scene, self.ledger, self.ready = scene, Ledger(scene.out), time.time()
        self.first = scene.slow > 1 or scene.asleep
        if self.first:
            # One of the actors, whichever comes first.
            try:
                os.close(os.open(f"{scene.out}-first", os.O_CREAT | os.O_EXCL))
            except FileExistsError:
                self.first = False

    def __call__(self, block):
        scene, rows = self.scene, block.to_pylist()
        for row in rows:
            if self.first and scene.asleep:
                time.sleep(3600)
            time.sleep(scene.seconds * len(row["image_id"]) * (scene.slow if self.first else 1.0))
            self.ledger.write(row["part"], pa.table({"image_id": row["image_id"]}), [])
        images = [len(row["image_id"]) for row in rows]
        table = {"part": [row["part"] for row in rows], "images": images, "errors": [0] * len(rows)}
        times = {"ready": [self.ready] * len(rows), "ended": [time.time()] * len(rows), "busy": [0.0] * len(rows)}
        return pa.table(table | times)


def run(scene, images, most, silent=120.0):
    """Label so many images; returns reports and seconds from the moment the first actor was ready."""
    manifest = make_manifest(Dataset("set", "/i", [ImageRecord(k, f"{k}.jpg", 5, 5) for k in range(images)]))
    tasks = [(part_name(0, k), 0, k) for k in range(len(manifest.spans(ROWS)))]
    gpus = int(ray.cluster_resources().get("GPU", 0))
    sizes = pool.Pool(min(gpus, most), most, 0.5, 1.0, silent)
    reports = list(pool.labelled(scene, manifest, tasks, ROWS, 4, sizes, Sleeper))
    parts = [r["part"] for r in reports if r["part"]]
    assert sorted(parts) == [part for part, _, _ in tasks], "every shard is reported once"
    assert Ledger(scene.out).finished() == set(parts)
    # A shard that was labelled again has been written by a stand-in that is not ready as early.
    return reports, time.time() - min(r["ready"] for r in reports)


def main():
    name, folder = sys.argv[1], Path(sys.argv[2])
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "object_store_memory": 100 << 20})
    node = {"object_store_memory": 80 << 20, "num_cpus": 4}
    sizes = {"steady": (4,), "joins": (2,), "leaves": (4, 4), "slow": (8,), "asleep": (4,), "together": (8,)}[name]
    nodes = [cluster.add_node(num_gpus=gpus, **node) for gpus in sizes]
    cluster.wait_for_nodes()
    ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
    before = ray.cluster_resources().get("GPU", 0)
    scene = Scene(str(folder / "out"), 0.1)
    (folder / "out").mkdir()
    images, most, silent, jobs = {
        "steady": (800, 100, 120.0, 1),
        "joins": (2000, 100, 120.0, 1),
        "leaves": (2000, 100, 120.0, 1),
        "slow": (2000, 100, 120.0, 1),
        "asleep": (800, 100, 8.0, 1),
        "together": (800, 4, 120.0, 2),
    }[name]
    scene.slow, scene.asleep = 4.0 if name == "slow" else 1.0, name == "asleep"
    (folder / "other").mkdir()
    scenes = [scene, Scene(str(folder / "other"), 0.1)][:jobs]
    found, started = {}, time.time()
    threads = [
        threading.Thread(target=lambda each=each: found.update({each.out: run(each, images, most, silent)})) for each in scenes
    ]
    for thread in threads:
        thread.start()
    if name in ("joins", "leaves"):
        # When every actor has been working for a while.
        while len(Ledger(scene.out).finished()) * ROWS < images / 4:
            time.sleep(0.2)
        if name == "joins":
            cluster.add_node(num_gpus=6, **node)
        else:
            cluster.remove_node(nodes[1])
    changed = time.time()
    for thread in threads:
        thread.join()
    reports, seconds = found[scene.out]
    work = images * 0.1
    # GPU-seconds from the moment the first actor was ready.
    until = max(0.0, changed - (started + (time.time() - started - seconds)))
    ideal = {
        "steady": work / 4,
        "joins": until + (work - 2 * until) / 8,
        "leaves": until + (work - 8 * until) / 4,
        "slow": work / (7 + 1 / 4),
        "asleep": work / 3,
        "together": work / 4,
    }[name]
    seconds = max(each for _, each in found.values())
    shares = {}
    for row in reports:
        shares[row["actor"]] = shares.get(row["actor"], 0) + row["images"]
    for _ in range(40):
        gpus = [ray.available_resources().get("GPU", 0), ray.cluster_resources().get("GPU", 0)]
        if gpus[0] == gpus[1]:
            break
        time.sleep(0.5)
    print(
        json.dumps(
            {
                "gpus": before,
                "actors": len(shares),
                "seconds": seconds,
                "ideal": ideal,
                "free": gpus,
                "shares": sorted(shares.values()),
            }
        )
    )
    ray.shutdown()
    cluster.shutdown()


if __name__ == "__main__":
    main()

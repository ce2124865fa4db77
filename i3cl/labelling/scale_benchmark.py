"""Labelling at a scale that this machine does not have: GPUs that are only pretended, actors that sleep in place of networks.

Everything else is the product's: Ray Data's pool, the queue of shards, the ledger, the list of images. `i3cl.scale` measures each
of these in a process of its own.
"""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from i3cl import storage
from i3cl.config import LabelSettings, SourceSettings
from i3cl.data.formats.records import INSTANCE_TYPE, Dataset, ImageRecord
from i3cl.data.loading.ingest import read_source
from i3cl.labelling.layout import Layout
from i3cl.labelling.ledger import Ledger, part_name
from i3cl.labelling.manifest import Manifest, make_manifest
from i3cl.labelling.pool import labelled

_SECONDS = 0.1
"""That a stand-in sleeps for each image."""
_SHARD = 256
"""Images of a shard of a long list, as label.rows_per_block has them."""


@dataclass(frozen=True)
class Scene:
    """A cluster, a job on it, and what happens meanwhile."""

    text: str
    gpus: tuple[int, ...]
    """Of each node."""
    images: int
    limit: float
    """Of the time divided by the ideal one."""
    jobs: int = 1
    most: int = 100
    """As label.actors."""
    slow: float = 1.0
    """Factor of one actor's times."""
    asleep: bool = False
    """Whether one actor never comes back."""
    joins: int = 0
    """GPUs of a node that joins when a quarter of the images is done."""
    leaves: bool = False
    """Whether the last node leaves then."""
    silent: float = 120.0
    """As label.silent_seconds."""
    rows: int = 8
    """Images of a shard."""
    staggered: bool = False
    """Whether ideal counts each GPU from when its actor was ready: two cores take a while to start so many processes."""

    def ideal(self, until: float) -> float:
        """Seconds that the job would take without any loss. until: seconds after its start at which the cluster changed."""
        work, gpus = self.images * _SECONDS, sum(self.gpus)
        if self.joins:
            return until + (work - gpus * until) / (gpus + self.joins)
        if self.leaves:
            return until + (work - gpus * until) / sum(self.gpus[:-1])
        speed = min(gpus, self.most) - 1 + (0.0 if self.asleep else 1 / self.slow)
        return work / speed


SCENES = {
    "steady": Scene("4 GPUs", (4,), 800, 1.25),
    "joins": Scene("2 GPUs, 6 more when a quarter is done", (2,), 4000, 1.25, joins=6),
    "leaves": Scene("8 GPUs, 4 of them leave when a quarter is done", (4, 4), 2000, 1.25, leaves=True),
    "slow": Scene("8 GPUs, one of them four times slower", (8,), 2000, 1.2, slow=4.0),
    "asleep": Scene("4 GPUs, one actor never comes back", (4,), 800, 1.3, asleep=True, silent=8.0),
    "together": Scene("two jobs of 4 actors on 8 GPUs", (8,), 800, 1.3, jobs=2, most=4),
    "many": Scene("64 GPUs of 8 machines, each from when its actor is ready", (8,) * 8, 38_400, 1.25, rows=40, staggered=True),
}


@dataclass(frozen=True)
class Told:
    """What a stand-in is told in place of a plan."""

    out: str
    slow: float
    asleep: bool


class Sleeper:
    """In the place of `Labeller`."""

    group = 0

    def __init__(self, told: Told) -> None:
        self.told, self.ledger, self.ready = told, Ledger(told.out), time.time()
        self.odd = told.slow > 1 or told.asleep
        if self.odd:
            # One of the actors, whichever comes first.
            try:
                os.close(os.open(f"{told.out}-first", os.O_CREAT | os.O_EXCL))
            except FileExistsError:
                self.odd = False

    def __call__(self, block: pa.Table) -> pa.Table:
        """Sleep for each image and write the parts."""
        rows = block.to_pylist()
        if self.odd and self.told.asleep:
            time.sleep(3600)
        for row in rows:
            time.sleep(_SECONDS * len(row["image_id"]) * (self.told.slow if self.odd else 1.0))
            self.ledger.write(row["part"], pa.table({"image_id": row["image_id"]}), [])
        counts = {"part": [row["part"] for row in rows], "images": [len(row["image_id"]) for row in rows]}
        times = {"ready": [self.ready] * len(rows), "ended": [time.time()] * len(rows), "busy": [0.0] * len(rows)}
        return pa.table(counts | {"errors": [0] * len(rows)} | times)


def listed(images: int) -> Manifest:
    """So many images that are not there."""
    return make_manifest(Dataset("set", "/i", [ImageRecord(k, f"{k}.jpg", 5, 5) for k in range(images)]))


def _job(scene: Scene, out: str) -> tuple[list[dict[str, Any]], float]:
    """Label a scene's images; the actors' reports, and the seconds from the moment the first actor was ready."""
    import ray

    manifest = listed(scene.images)
    tasks = [(part_name(0, k), 0, k) for k in range(len(manifest.spans(scene.rows)))]
    gpus = int(ray.cluster_resources().get("GPU", 0))
    spread = Layout(min(gpus, scene.most), scene.most, 1, 1, 0.5, 1.0, 4)
    label = LabelSettings(rows_per_block=scene.rows, silent_seconds=scene.silent)
    told: Any = Told(out, scene.slow, scene.asleep)
    stand_in: Any = Sleeper
    reports = list(labelled(told, manifest, tasks, label, spread, stand_in))
    parts = sorted(row["part"] for row in reports if row["part"])
    if parts != [part for part, _, _ in tasks] or Ledger(out).finished() != set(parts):
        raise RuntimeError(f"{out}: not every shard is there and reported exactly once")
    return reports, time.time() - min(row["ready"] for row in reports)


def play(scene: Scene, folder: Path) -> dict[str, Any]:
    """Play a scene on a cluster of its own, in this process.

    Returns:
        seconds, ideal (seconds), ratio of both; actors, that reported something; shares, images of each of them, sorted; free,
        GPUs that nobody holds at the end, of gpus.
    """
    import ray
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "object_store_memory": 100 << 20})
    node: dict[str, Any] = {"object_store_memory": 80 << 20, "num_cpus": 4}
    nodes = [cluster.add_node(num_gpus=gpus, **node) for gpus in scene.gpus]
    cluster.wait_for_nodes()
    ray.init(address=cluster.address, log_to_driver=False, logging_level=logging.ERROR)
    outs = [str(folder / f"job-{number}") for number in range(scene.jobs)]
    found: dict[str, tuple[list[dict[str, Any]], float]] = {}
    threads = [threading.Thread(target=lambda out=out: found.update({out: _job(scene, out)})) for out in outs]
    for out, thread in zip(outs, threads, strict=True):
        os.makedirs(out)
        thread.start()
    if scene.joins or scene.leaves:
        while len(Ledger(outs[0]).finished()) * scene.rows < scene.images / 4:
            time.sleep(0.2)
        if scene.joins:
            cluster.add_node(num_gpus=scene.joins, **node)
        else:
            cluster.remove_node(nodes[-1])
    changed = time.time()
    for thread in threads:
        thread.join()
    if len(found) < scene.jobs:
        raise RuntimeError("a job ended with an error, see above")
    begun = time.time() - found[outs[0]][1]
    seconds, ideal = max(each for _, each in found.values()), scene.ideal(max(0.0, changed - begun))
    shares: Counter[str] = Counter()
    for row in found[outs[0]][0]:
        shares[row["actor"]] += row["images"]
    if scene.staggered:
        ready = {row["actor"]: row["ready"] - begun for row in found[outs[0]][0]}
        ideal = _shared_end(scene.images * _SECONDS, list(ready.values()))
    gpus = ray.cluster_resources().get("GPU", 0)
    deadline = time.time() + 20
    while (free := ray.available_resources().get("GPU", 0)) < gpus and time.time() < deadline:
        time.sleep(0.5)
    ray.shutdown()
    cluster.shutdown()
    counts = {"actors": len(shares), "shares": sorted(shares.values()), "free": free, "gpus": gpus}
    return {"seconds": round(seconds, 1), "ideal": round(ideal, 1), "ratio": round(seconds / ideal, 3), **counts}


def _shared_end(work: float, ready: Sequence[float]) -> float:
    """When workers that begin at these seconds have done so many seconds of work together."""
    starts = sorted(ready)
    for count in range(1, len(starts) + 1):
        end = (work + sum(starts[:count])) / count
        if count == len(starts) or end <= starts[count]:
            return end
    raise ValueError("no worker was ever ready")


def read_list(images: int, folder: Path) -> dict[str, Any]:
    """Write a Parquet list of so many images, read it in this process as a labelling job does, and cut it into shards.

    Returns:
        seconds to read and cut; peak memory of this process in GB, the libraries included.
    """
    _write_list_elsewhere(images, folder)
    started = time.perf_counter()
    source = SourceSettings(annotations=str(folder), images="/images")
    manifest = make_manifest(read_source(source, "", False, check_files=False))
    shards = len(manifest.spans(_SHARD))
    seconds = time.perf_counter() - started
    return {"seconds": round(seconds, 1), "gigabytes": peak_memory(), "shards": shards}


def peak_memory() -> float:
    """GB that this process has had at most."""
    # Not getrusage, which counts what the parent process had as well.
    with open("/proc/self/status", encoding="ascii") as file:
        return round(next(int(row.split()[1]) for row in file if row.startswith("VmHWM")) / 1e6, 2)


def begin(images: int, folder: Path) -> dict[str, Any]:
    """Begin a job of so many images on eight pretended GPUs, and leave it when the first shard is done.

    Returns:
        seconds from the start to the first shard, the list of images included; waited, those of them after the first actor was
        ready; gigabytes, peak memory of the driver.
    """
    import ray

    _write_list_elsewhere(images, folder / "list")
    (folder / "out").mkdir()
    ray.init(num_cpus=4, num_gpus=8, object_store_memory=2 << 30, log_to_driver=False, logging_level=logging.ERROR)
    started = time.time()
    source = SourceSettings(annotations=str(folder / "list"), images="/images")
    manifest = make_manifest(read_source(source, "", False, check_files=False))
    tasks = [(part_name(0, k), 0, k) for k in range(len(manifest.spans(_SHARD)))]
    told: Any = Told(str(folder / "out"), 1.0, False)
    stand_in: Any = Sleeper
    spread = Layout(8, 8, 1, 1, 0.5, 1.0, 1)
    with closing(labelled(told, manifest, tasks, LabelSettings(rows_per_block=_SHARD), spread, stand_in)) as reports:
        first = next(reports)
        ended = time.time()
    ray.shutdown()
    waited = ended - first["ready"] - _SHARD * _SECONDS
    return {"seconds": round(ended - started, 1), "waited": round(waited, 1), "gigabytes": peak_memory(), "shards": len(tasks)}


def _write_list_elsewhere(images: int, folder: Path) -> None:
    """As `write_list`, in a process of its own, because its memory would count."""
    code = f"from i3cl.labelling import scale_benchmark as s; s.write_list({images}, {str(folder)!r})"
    subprocess.run([sys.executable, "-c", code], check=True)


def write_list(images: int, folder: str) -> None:
    """Write a list of unlabelled images as Parquet parts of at most a million rows."""
    os.makedirs(folder, exist_ok=True)
    for number, start in enumerate(range(0, images, 1_000_000)):
        ids = np.arange(start + 1, min(images, start + 1_000_000) + 1)
        columns: dict[str, Any] = {
            "image_id": ids,
            "file_name": pa.array([f"batch_{i // 10_000:04d}/photograph_{i:08d}.jpg" for i in ids.tolist()]),
            "height": np.full(len(ids), 720, np.int32),
            "width": np.full(len(ids), 1280, np.int32),
            "instances": pa.array([[]] * len(ids), pa.list_(INSTANCE_TYPE)),
        }
        pq.write_table(pa.table(columns), storage.join(folder, f"part-{number:05d}.parquet"))

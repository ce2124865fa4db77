"""Break a training and a labelling job on a small cluster on this machine, and print what each fault cost.

    python cluster/faults.py                 # all faults; root and iproute2 give every node an address of its own
    python cluster/faults.py --job labelling

Time to recover is counted from the fault until the job is further than it was. Work redone: steps that were done again, or
images of shards that were begun and not finished.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Self

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from cluster.nodes import RAY, LocalCluster, Node, descendants, namespaces_refused  # noqa: E402
from i3cl.config import Settings, load_settings, to_yaml  # noqa: E402
from i3cl.data.formats.predictions import read_batches  # noqa: E402

RECIPE = str(ROOT / "configs" / "faults.yaml")
PATIENCE = 240.0
"""Seconds after which a job counts as lost."""
NOTICE = 30
"""Seconds between the announcement of a spot machine's end and its end; clouds give 30 to 120."""


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    job: str
    fault: str
    seconds: float
    """Until the job was further than it had been."""
    redone: str
    how: str
    """What carried it on."""


class Job:
    """A job beside the head of a cluster of two nodes with a worker each. The head holds none, as in the launch files."""

    script: str
    """Of jobs/, with its first arguments."""
    changes: list[str]
    """Settings on top of the recipe."""
    variables: Mapping[str, str] = {}

    def __init__(self, folder: Path, network: bool) -> None:
        self.folder = folder
        self.settings: Settings = load_settings(RECIPE, self.changes)
        self.log = folder / f"{self.settings.name}.log"
        self.cluster = LocalCluster(folder, head_cpus=0, network=network)
        self.driver: subprocess.Popen[bytes] | None = None
        self.workers: list[Node] = []

    def __enter__(self) -> Self:
        self.cluster.__enter__()
        try:
            self.workers = [self.cluster.add_node(), self.cluster.add_node()]
            self.submit()
            self.warm_up()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def warm_up(self) -> None:
        """Wait until the job works."""
        raise NotImplementedError

    def close(self) -> None:
        """End the driver and the cluster."""
        end(self.driver)
        self.cluster.close()

    def submit(self) -> None:
        """Start the job, the same line each time."""
        name, *first = self.script.split()
        command = [sys.executable, str(ROOT / "jobs" / name), *first, "--config", RECIPE, *self.changes]
        self.driver = self.cluster.run(command, self.log, **self.variables)

    def check(self, reached: bool, deadline: float, wish: str) -> bool:
        """`reached`; RuntimeError when the job has ended or the time is over before."""
        assert self.driver is not None
        if not reached and (self.driver.poll() is not None or time.monotonic() > deadline):
            raise RuntimeError(f"{wish}: {self.log.read_text()[-3000:]}")
        return reached


class Training(Job):
    """A training run under faults: `python jobs/train.py`."""

    script = "train.py"

    def __init__(self, folder: Path, network: bool, *overrides: str) -> None:
        self.changes = [f"storage={folder}/runs", "name=train", *source_arguments(folder), *overrides]
        self.variables = {"GLOO_SOCKET_IFNAME": "eth0"} if network else {}
        super().__init__(folder, network)
        self.interval = self.settings.train.checkpoint_every
        self.metrics = folder / "runs" / "train" / "metrics.jsonl"

    def warm_up(self) -> None:
        self.wait_for_step(2 * self.interval + 3)

    def rows(self) -> list[dict]:
        """What the run has written so far."""
        if not self.metrics.exists():
            return []
        return [row for row in map(json.loads, self.metrics.read_text().splitlines()) if "loss" in row]

    def step(self) -> int:
        """The last step that is on record."""
        return max((row["step"] for row in self.rows()), default=0)

    def wait_for_step(self, step: int) -> int:
        """Wait for a step; return the lowest that was on record meanwhile."""
        deadline = time.monotonic() + PATIENCE
        lowest = self.step()
        while not self.check((now := self.step()) >= step, deadline, f"step {step} was not reached"):
            lowest = min(lowest, now)
            time.sleep(0.1)
        return lowest

    def strike(self, fault: str, how: str, blow: Callable[[], None]) -> Row:
        """Wait for the middle between two checkpoints, strike, wait until the run is further than it was."""
        target = (self.step() // self.interval + 1) * self.interval + self.interval // 2
        self.wait_for_step(target)
        struck = time.monotonic()
        blow()
        seen = self.step()
        lowest = self.wait_for_step(seen + 1)
        return Row("training", fault, time.monotonic() - struck, f"{redone(seen, lowest)} steps", how)

    def announce(self, fault: str, how: str) -> Row:
        """As `strike` with `warn`, but counted from the last step before the workers leave the machine: until then they train."""
        self.wait_for_step((self.step() // self.interval + 1) * self.interval + self.interval // 2)
        leaving = self.workers[-1]
        self.warn()
        deadline = time.monotonic() + PATIENCE
        while not self.check(not trains_on(leaving), deadline, f"{leaving.name} was not left"):
            time.sleep(0.1)
        seen, last = self.step(), self.metrics.stat().st_mtime
        lowest = self.wait_for_step(seen + 1)
        return Row("training", fault, time.time() - last, f"{redone(seen, lowest)} steps", how)

    # ------------------------------------------------------------------------------------------------------ faults

    def kill_worker(self) -> None:
        """The process of one training worker."""
        os.kill(process_of(self.workers[0], "TrainWorker"), signal.SIGKILL)

    def remove_node(self) -> None:
        """The machine of one training worker, without a word."""
        self.workers.pop().kill()

    def warn(self) -> None:
        """Announce the end of a machine, as a cloud does for a spot machine, and take it away NOTICE seconds later."""
        node = self.workers.pop()
        command = ["drain-node", f"--address={self.cluster.address}", f"--node-id={self.cluster.alive()[node.name]}"]
        command += ["--reason=DRAIN_NODE_REASON_PREEMPTION", "--reason-message=spot", f"--deadline-remaining-seconds={NOTICE}"]
        log = self.folder / "drain.log"
        if self.cluster.run([RAY, *command], log).wait(60):
            raise RuntimeError(f"ray drain-node: {log.read_text()[-500:]}")
        threading.Timer(NOTICE, node.kill).start()

    def cut_link(self) -> None:
        """The network of one machine; the machine itself is taken away a minute later."""
        node = self.workers.pop()
        self.cluster.cut(node)
        threading.Timer(60, node.kill).start()

    def restart_head(self) -> None:
        """Head and driver vanish; everything is started anew and the same line submitted again."""
        end(self.driver)
        for node in self.cluster.nodes:
            if node.process.poll() is None:
                node.kill()
        self.cluster.start_head()
        self.workers = [self.cluster.add_node(), self.cluster.add_node()]
        self.submit()

    def replace_node(self) -> float:
        """A new machine joins; seconds until the run uses it."""
        started = time.monotonic()
        self.workers.append(self.cluster.add_node())
        while not self.check(trains_on(self.workers[-1]), started + PATIENCE, "the run did not grow"):
            time.sleep(0.5)
        self.wait_for_step(self.step() + 1)
        return time.monotonic() - started


class Labelling(Job):
    """A labelling job under faults: `python jobs/label.py predict` with one member."""

    script = "label.py predict"

    def __init__(self, folder: Path, network: bool, checkpoint: str) -> None:
        data = folder / "data"
        self.changes = [f"storage={folder}/runs", "name=label", f"label.members.a={checkpoint}"]
        self.changes += [f"label.source={{annotations: {data}/unlabelled.json, images: {data}/unlabelled}}"]
        super().__init__(folder, network)
        self.out = folder / "runs" / "label" / "predictions" / "unlabelled"

    def warm_up(self) -> None:
        self.wait_for_parts(2)

    def parts(self) -> set[str]:
        """Shards that are done."""
        return {path.name for path in self.out.glob("part-*.parquet")}

    def wait_for_parts(self, count: int) -> None:
        """Wait until so many shards are done."""
        deadline = time.monotonic() + PATIENCE
        while not self.check(len(self.parts()) >= count, deadline, f"{count} shards were not done"):
            time.sleep(0.05)

    def strike(self, fault: str, how: str, blow: Callable[[], None]) -> Row:
        """Wait for another shard, strike, wait until every shard that was begun is done."""
        self.wait_for_parts(len(self.parts()) + 1)
        time.sleep(0.3)
        begun = {path.name.removesuffix(".json") for path in (self.out / "_work" / "tries").glob("part-*.json")}
        struck = time.monotonic()
        blow()
        lost = begun - self.parts()
        deadline = struck + PATIENCE
        while (left := lost - self.parts()) and time.monotonic() < deadline:
            time.sleep(0.05)
        if left:
            raise RuntimeError(f"{left} were not done: {self.log.read_text()[-3000:]}")
        images = len(lost) * self.settings.label.rows_per_block
        return Row("labelling", fault, time.monotonic() - struck, f"at most {images} images", how)

    def finish(self) -> tuple[int, int, int]:
        """Wait for the end: images, images that are missing, rows too many."""
        assert self.driver is not None
        if self.driver.wait(PATIENCE * 2):
            raise RuntimeError(f"labelling failed: {self.log.read_text()[-3000:]}")
        rows: Counter[int] = Counter()
        for batch in read_batches(str(self.out), ["image_id"]):
            rows.update(batch["image_id"].to_pylist())
        wanted = {image["id"] for image in json.loads((self.folder / "data" / "unlabelled.json").read_text())["images"]}
        return len(wanted), len(wanted - rows.keys()), sum(rows.values()) - len(rows)

    # ------------------------------------------------------------------------------------------------------ faults

    def kill_worker(self) -> None:
        """The process of one labelling actor."""
        os.kill(process_of(self.workers[0], "MapWorker"), signal.SIGKILL)

    def remove_node(self) -> None:
        """One machine, without a word; a new one joins."""
        self.workers.pop().kill()
        self.workers.append(self.cluster.add_node())

    def kill_driver(self) -> None:
        """The job itself; the same line is submitted again."""
        end(self.driver)
        self.submit()


def redone(seen: int, lowest: int) -> int:
    """Steps done again when `seen` was on record and `lowest` afterwards, the first after the checkpoint if that is earlier."""
    return 0 if lowest == seen else seen - lowest + 1


def process_of(node: Node, word: str) -> int:
    """Process id of a Ray worker on a node, by a word of its title."""
    for pid in descendants(node.process.pid):
        try:
            title = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[0].decode(errors="replace")
        except FileNotFoundError:
            continue
        if word in title:
            return pid
    raise LookupError(f"{node.name}: no process {word}")


def trains_on(node: Node) -> bool:
    """Whether a training worker lives on a node."""
    try:
        return bool(process_of(node, "TrainWorker"))
    except LookupError:
        return False


def end(driver: subprocess.Popen[bytes] | None) -> None:
    """Kill a job with all its processes."""
    if driver is not None and driver.poll() is None:
        os.killpg(driver.pid, signal.SIGKILL)
        driver.wait()


def make_data(folder: Path) -> None:
    """The recipe's synthetic images in folder/data, made by a local Ray of its own."""
    command = [sys.executable, str(ROOT / "jobs" / "prepare.py"), "synthetic", "--config", RECIPE, "--out", str(folder / "data")]
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=environment)


def source_arguments(folder: Path) -> list[str]:
    """Overrides that name the data of `make_data`."""
    data = folder / "data"
    return [
        f"data.train=[{{annotations: {data}/labelled.json, images: {data}/labelled}}]",
        f"data.validation={{annotations: {data}/validation.json, images: {data}/validation}}",
    ]


def break_training(folder: Path, network: bool) -> Iterator[Row]:
    """Every fault of a training, one after the other in one run, a row each."""
    with Training(folder, network) as run:
        restart = "Ray Train restarts the workers from the last checkpoint"
        yield run.strike("worker killed", restart, run.kill_worker)
        yield run.strike("machine lost", "one worker goes on with both shares of a step", run.remove_node)
        seconds = run.replace_node()
        how = "Ray looks once a minute, then restarts on two workers from the last checkpoint"
        yield Row("training", "machine joins", seconds, "0 to 10 steps", how)
        yield run.announce("spot notice", "checkpoint at once; the worker that stays goes on")
        run.replace_node()
        if network:
            yield run.strike("link cut", "the head gives the machine up after 8 s", run.cut_link)
        yield run.strike("head lost", "new head, the same line submitted again", run.restart_head)
        steps = [row["step"] for row in run.rows()]
        assert steps == list(range(1, len(steps) + 1)), "a step is missing or stands twice"


def break_labelling(folder: Path, network: bool, checkpoint: str) -> Iterator[Row]:
    """Every fault of a labelling job, one after the other, a row each."""
    with Labelling(folder, network, checkpoint) as job:
        yield job.strike("worker killed", "Ray Data replaces the actor; it begins the shard anew", job.kill_worker)
        yield job.strike("machine lost", "its shards go to the other machine", job.remove_node)
        yield job.strike("driver lost", "the same line again goes on with the shards that are not there", job.kill_driver)
        images, missing, double = job.finish()
        print(f"labelling: {images} images, {missing} missing, {double} twice", flush=True)
        assert not missing and not double


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--job", choices=("training", "labelling"), help="only this one")
    parser.add_argument("--folder", type=Path, help="keep everything here; default: a temporary folder that is removed")
    options = parser.parse_args()
    refused = namespaces_refused()
    print(f"nodes: {'processes on the loopback, no link to cut: ' + refused if refused else 'network namespaces'}", flush=True)
    with tempfile.TemporaryDirectory(prefix="i3cl-faults-") as temporary:
        folder = options.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        make_data(folder)
        rows = []
        for job in [options.job] if options.job else ["training", "labelling"]:
            if job == "training":
                faults = break_training(folder, not refused)
            else:
                faults = break_labelling(folder, not refused, make_checkpoint(folder))
            for row in faults:
                rows.append(row)
                print(f"{row.job}: {row.fault}: {row.seconds:.0f} s, {row.redone} done again", flush=True)
    print("\n| job | fault | time to recover | work redone | how |\n|---|---|---|---|---|")
    for row in rows:
        print(f"| {row.job} | {row.fault} | {row.seconds:.0f} s | {row.redone} | {row.how} |")


def make_checkpoint(folder: Path) -> str:
    """A member for the labelling job: the network of the recipe with its initial weights."""
    import torch

    from i3cl.model.checkpoint import save_checkpoint
    from i3cl.model.network import I3CL

    torch.manual_seed(0)
    settings = load_settings(RECIPE, ["model.score_threshold=0.0", "model.detections_per_image=4"])
    save_checkpoint(I3CL(settings.model), folder / "member", to_yaml(settings))
    return str(folder / "member")


if __name__ == "__main__":
    main()

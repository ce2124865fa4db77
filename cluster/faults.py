"""Break a training and a labelling job on a small cluster on this machine, and print what each fault cost.

    python cluster/faults.py                 # all faults; with root and iproute2, every node has its own address
    python cluster/faults.py --job labelling

Time to recover is measured from the fault until the job is further than before. Work redone: repeated steps, or images of
unfinished shards.
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
from abc import ABC, abstractmethod
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
"""Seconds between the notice that a spot machine will end and its end; clouds give 30 to 120."""


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    job: str
    fault: str
    seconds: float
    """Time until the job was further than before."""
    redone: str
    how: str
    """How the job continued."""


class Job(ABC):
    """A job on a cluster of a head, which runs the driver, and two nodes with one worker each, as in the launch files."""

    script: str
    """Name of the file in jobs/, with its first arguments."""
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

    @abstractmethod
    def warm_up(self) -> None:
        """Wait until the job is working."""

    def close(self) -> None:
        """End the driver and the cluster."""
        end(self.driver)
        self.cluster.close()

    def submit(self) -> None:
        """Start the job, with the same command each time."""
        name, *first = self.script.split()
        command = [sys.executable, str(ROOT / "jobs" / name), *first, "--config", RECIPE, *self.changes]
        self.driver = self.cluster.run(command, self.log, **self.variables)

    def check(self, reached: bool, deadline: float, wish: str) -> bool:
        """Return `reached`; RuntimeError when it is False although the job has ended or the time is over."""
        assert self.driver is not None
        if not reached and (self.driver.poll() is not None or time.monotonic() > deadline):
            raise RuntimeError(f"{wish}: {self.log.read_text()[-3000:]}")
        return reached


class Training(Job):
    """A training run with faults: `python jobs/train.py`."""

    script = "train.py"

    def __init__(self, folder: Path, network: bool, *overrides: str) -> None:
        self.changes = [f"storage={folder}/runs", "name=train", *source_arguments(folder), *overrides]
        self.variables = {"GLOO_SOCKET_IFNAME": "eth0"} if network else {}
        super().__init__(folder, network)
        self.interval = self.settings.train.checkpoint_every
        self.metrics = folder / "runs" / "train" / "metrics.jsonl"

    def warm_up(self) -> None:
        """Wait for the middle after the second checkpoint."""
        self.wait_for_step(2 * self.interval + 3)

    def rows(self) -> list[dict]:
        """Return the rows that the run has written so far."""
        if not self.metrics.exists():
            return []
        return [row for row in map(json.loads, self.metrics.read_text().splitlines()) if "loss" in row]

    def step(self) -> int:
        """Return the last step that is recorded."""
        return max((row["step"] for row in self.rows()), default=0)

    def wait_for_step(self, step: int) -> int:
        """Wait for a step; return the lowest last step seen while waiting, which falls when steps are redone."""
        deadline = time.monotonic() + PATIENCE
        lowest = self.step()
        while not self.check((now := self.step()) >= step, deadline, f"step {step} was not reached"):
            lowest = min(lowest, now)
            time.sleep(0.1)
        return lowest

    def strike(self, fault: str, how: str, blow: Callable[[], None]) -> Row:
        """Wait for the middle between two checkpoints, cause the fault, and wait until the run is further than before."""
        target = (self.step() // self.interval + 1) * self.interval + self.interval // 2
        self.wait_for_step(target)
        struck = time.monotonic()
        blow()
        seen = self.step()
        lowest = self.wait_for_step(seen + 1)
        return Row("training", fault, time.monotonic() - struck, f"{redone(seen, lowest)} steps", how)

    def announce(self, fault: str, how: str) -> Row:
        """Like `strike` with `warn`, but measured from the last step before training leaves the machine."""
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
        """Kill the process of one training worker."""
        os.kill(process_of(self.workers[0], "TrainWorker"), signal.SIGKILL)

    def remove_node(self) -> None:
        """Kill the machine of one training worker, without notice."""
        self.workers.pop().kill()

    def warn(self) -> None:
        """Announce the end of a machine, as a cloud does for a spot machine, and kill the machine NOTICE seconds later."""
        node = self.workers.pop()
        command = ["drain-node", f"--address={self.cluster.address}", f"--node-id={self.cluster.alive()[node.name]}"]
        command += ["--reason=DRAIN_NODE_REASON_PREEMPTION", "--reason-message=spot", f"--deadline-remaining-seconds={NOTICE}"]
        log = self.folder / "drain.log"
        if self.cluster.run([RAY, *command], log).wait(60):
            raise RuntimeError(f"ray drain-node: {log.read_text()[-500:]}")
        threading.Timer(NOTICE, node.kill).start()

    def cut_link(self) -> None:
        """Cut the network of one machine; kill the machine itself a minute later."""
        node = self.workers.pop()
        self.cluster.cut(node)
        threading.Timer(60, node.kill).start()

    def restart_head(self) -> None:
        """Kill everything, head and driver too; restart the cluster and submit the same job again."""
        end(self.driver)
        for node in self.cluster.nodes:
            if node.process.poll() is None:
                node.kill()
        self.cluster.start_head()
        self.workers = [self.cluster.add_node(), self.cluster.add_node()]
        self.submit()

    def replace_node(self) -> float:
        """Add a machine; return the seconds until the run uses it."""
        started = time.monotonic()
        self.workers.append(self.cluster.add_node())
        while not self.check(trains_on(self.workers[-1]), started + PATIENCE, "the run did not grow"):
            time.sleep(0.5)
        self.wait_for_step(self.step() + 1)
        return time.monotonic() - started


class Labelling(Job):
    """A labelling job with faults: `python jobs/label.py predict` with one member."""

    script = "label.py predict"

    def __init__(self, folder: Path, network: bool, checkpoint: str) -> None:
        data = folder / "data"
        self.changes = [f"storage={folder}/runs", "name=label", f"label.members.a={checkpoint}"]
        self.changes += [f"label.source={{annotations: {data}/unlabelled.json, images: {data}/unlabelled}}"]
        super().__init__(folder, network)
        self.out = folder / "runs" / "label" / "predictions" / "unlabelled"

    def warm_up(self) -> None:
        """Wait until two shards are finished."""
        self.wait_for_parts(2)

    def parts(self) -> set[str]:
        """Return the names of the finished shards."""
        return {path.name for path in self.out.glob("part-*.parquet")}

    def wait_for_parts(self, count: int) -> None:
        """Wait until `count` shards are finished."""
        deadline = time.monotonic() + PATIENCE
        while not self.check(len(self.parts()) >= count, deadline, f"{count} shards were not done"):
            time.sleep(0.05)

    def strike(self, fault: str, how: str, blow: Callable[[], None]) -> Row:
        """Wait for another shard, cause the fault, and wait until every shard that had been started is finished."""
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
        """Wait for the end; return the numbers of images, of missing images and of surplus rows."""
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
        """Kill the process of one labelling actor."""
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
    """Return the process id of a Ray worker on a node, found by a word of its title."""
    for pid in descendants(node.process.pid):
        try:
            title = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[0].decode(errors="replace")
        except FileNotFoundError:
            continue
        if word in title:
            return pid
    raise LookupError(f"{node.name}: no process {word}")


def trains_on(node: Node) -> bool:
    """Whether a training worker runs on a node."""
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
    """Make the recipe's synthetic images in folder/data, with a local Ray."""
    command = [sys.executable, str(ROOT / "jobs" / "prepare.py"), "synthetic", "--config", RECIPE, "--out", str(folder / "data")]
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=environment)


def source_arguments(folder: Path) -> list[str]:
    """Return the overrides that select the data of `make_data`."""
    data = folder / "data"
    return [
        f"data.train=[{{annotations: {data}/labelled.json, images: {data}/labelled}}]",
        f"data.validation={{annotations: {data}/validation.json, images: {data}/validation}}",
    ]


def break_training(folder: Path, network: bool) -> Iterator[Row]:
    """Cause every fault in one training run, one after another; yield a row for each."""
    with Training(folder, network) as run:
        restart = "Ray Train restarts the workers from the last checkpoint"
        yield run.strike("worker killed", restart, run.kill_worker)
        yield run.strike("machine lost", "one worker continues and computes both shares of a step", run.remove_node)
        seconds = run.replace_node()
        how = "Ray checks once a minute, then restarts with two workers from the last checkpoint"
        yield Row("training", "machine joins", seconds, "0 to 10 steps", how)
        yield run.announce("spot notice", "checkpoint at once; the remaining worker continues")
        run.replace_node()
        if network:
            yield run.strike("link cut", "the head gives up on the machine after 8 s", run.cut_link)
        yield run.strike("head lost", "new head, the same job submitted again", run.restart_head)
        steps = [row["step"] for row in run.rows()]
        assert steps == list(range(1, len(steps) + 1)), "a step is missing or occurs twice"


def break_labelling(folder: Path, network: bool, checkpoint: str) -> Iterator[Row]:
    """Cause every fault in one labelling job, one after another; yield a row for each."""
    with Labelling(folder, network, checkpoint) as job:
        yield job.strike("worker killed", "Ray Data replaces the actor, which restarts the shard", job.kill_worker)
        yield job.strike("machine lost", "the other machine takes its shards", job.remove_node)
        yield job.strike("driver lost", "the same command continues with the missing shards", job.kill_driver)
        images, missing, double = job.finish()
        print(f"labelling: {images} images, {missing} missing, {double} twice", flush=True)
        assert not missing and not double


def main() -> None:
    """Break what the arguments choose and print what each fault cost."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--job", choices=("training", "labelling"), help="only this job")
    parser.add_argument(
        "--folder", type=Path, help="folder in which everything is kept; default: a temporary folder, which is removed"
    )
    options = parser.parse_args()
    refused = namespaces_refused()
    print(
        f"nodes: {'processes on the loopback, without a link that can be cut: ' + refused if refused else 'network namespaces'}",
        flush=True,
    )
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
                print(f"{row.job}: {row.fault}: {row.seconds:.0f} s, {row.redone} redone", flush=True)
    print("\n| job | fault | time to recover | work redone | how |\n|---|---|---|---|---|")
    for row in rows:
        print(f"| {row.job} | {row.fault} | {row.seconds:.0f} s | {row.redone} | {row.how} |")


def make_checkpoint(folder: Path) -> str:
    """Make a member for the labelling job: the network of the recipe with its initial weights; return its path."""
    import torch

    from i3cl.model.checkpoint import save_checkpoint
    from i3cl.model.network import I3CL

    torch.manual_seed(0)
    settings = load_settings(RECIPE, ["model.score_threshold=0.0", "model.detections_per_image=4"])
    save_checkpoint(I3CL(settings.model), folder / "member", to_yaml(settings))
    return str(folder / "member")


if __name__ == "__main__":
    main()

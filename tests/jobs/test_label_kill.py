"""Whatever is killed and when, the same line again labels every image exactly once."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import pytest

from i3cl.config import to_yaml, with_overrides
from i3cl.data.formats.coco import write_coco
from i3cl.data.formats.predictions import read_batches
from i3cl.data.formats.records import ImageRecord

ROOT = Path(__file__).parents[2]
VIEWS = [{"short_side": 64}, {"short_side": 64, "flip": True}]


@dataclass
class Kill:
    """What one kill met and left."""

    kind: str
    second: float
    """Since the first start."""
    parts: int
    """Done when it struck."""
    begun: int
    """Shards that were begun and not done: they are redone."""

    def __str__(self) -> str:
        return f"{self.kind:<8}{self.second:>8.0f} s{self.parts:>8} done{self.begun:>4} to redo"


def processes() -> dict[int, tuple[int, str]]:
    """Process id -> parent, command line."""
    found = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parent = int((entry / "stat").read_text().rsplit(")", 1)[1].split()[1])
                found[int(entry.name)] = (parent, (entry / "cmdline").read_bytes().decode(errors="replace"))
            except (FileNotFoundError, ProcessLookupError):
                continue
    return found


def below(driver: int, word: str) -> list[int]:
    """Descendants of a job's process, no other's, the first word of whose command line holds `word`."""
    table = processes()
    family = {driver}
    while more := {pid for pid, (parent, _) in table.items() if parent in family} - family:
        family |= more
    return [pid for pid in family - {driver} if word in table[pid][1].split("\0")[0]]


class Victim:
    """A labelling job that is killed and started again until it ends by itself."""

    def __init__(self, config: str, out: Path, log: Path) -> None:
        self.config, self.out, self.log = config, out, log
        self.kills: list[Kill] = []
        self.starts = 0
        self.first = time.monotonic()
        self.process: subprocess.Popen | None = None

    def start(self) -> subprocess.Popen:
        self.starts += 1
        with open(self.log, "a") as log:
            self.process = subprocess.Popen(
                [sys.executable, str(ROOT / "jobs" / "label.py"), "predict", "--config", self.config],
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                cwd=ROOT,
            )
        return self.process

    def parts(self) -> set[str]:
        return {p.name for p in self.out.glob("part-*.parquet")}

    def begun(self) -> int:
        return len({p.stem for p in (self.out / "_work" / "tries").glob("part-*")} - self.parts())

    def wait_for_parts(self, count: int, seconds: float = 400) -> bool:
        """Wait until so many parts are there; False when the job ended before."""
        assert self.process is not None
        deadline = time.monotonic() + seconds
        while len(self.parts()) < count:
            if self.process.poll() is not None:
                return False
            if time.monotonic() > deadline:
                pytest.fail(f"no {count} parts in {seconds} s: {self.log.read_text()[-2000:]}")
            time.sleep(0.05)
        return True

    def kill(self, kind: str) -> None:
        assert self.process is not None
        word = {"worker": "MapWorker", "raylet": "raylet/raylet"}.get(kind)
        victims = below(self.process.pid, word) if word else [self.process.pid]
        assert victims, f"no {kind} to kill"
        os.kill(victims[0], signal.SIGKILL)
        self.kills.append(Kill(kind, time.monotonic() - self.first, len(self.parts()), self.begun()))
        if kind == "driver":
            self.process.wait()
        if kind == "raylet":
            try:
                self.process.wait(60)
            except subprocess.TimeoutExpired:
                self.stop()

    def stop(self) -> None:
        if self.process is not None and self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


def images(folder: Path, count: int) -> str:
    """`count` 96-pixel images under twenty contents, one of them empty; the annotation file that lists them all."""
    (folder / "images").mkdir()
    records = []
    for i in range(count):
        path = folder / "images" / f"{i}.jpg"
        if i < 20:
            cv2.imwrite(str(path), np.random.default_rng(i).integers(0, 255, (96, 96, 3), np.uint8))
        else:
            os.link(folder / "images" / f"{i % 20}.jpg", path)
        records.append(ImageRecord(i + 1, path.name, 96, 96))
    # Through the links this empties every image of that content.
    (folder / "images" / "7.jpg").write_bytes(b"")
    write_coco(str(folder / "set.json"), records)
    return str(folder / "set.json")


def label_under_fire(
    settings, checkpoints, folder: Path, count: int, rows: int, kinds: list[str], seed: int, others: dict | None = None
) -> Victim:
    """Label `count` images while `kinds` are killed one after the other, at random points; check every row.

    others: members that take no views.
    """
    others = others or {}
    overrides = {
        "name": "killed",
        "storage": str(folder / "runs"),
        "label.source": {"annotations": images(folder, count), "images": str(folder / "images")},
        "label.members": {**checkpoints, **others},
        "label.views": VIEWS,
        "label.rows_per_block": rows,
        "label.actors": 1,
        "label.threads": 1,
    }
    config = folder / "c.yaml"
    config.write_text(to_yaml(with_overrides(settings, overrides, "test")))
    out = folder / "runs" / "killed" / "predictions" / "unlabelled"
    victim = Victim(str(config), out, folder / "log.txt")
    draw = random.Random(seed)
    total = -(-count // rows)
    victim.start()
    try:
        for number, kind in enumerate(kinds):
            if victim.process is None or victim.process.poll() is not None:
                victim.start()
            # Every kill finds new work done, and leaves some for the next.
            ahead = max(1, (total - len(victim.parts())) // (len(kinds) - number + 1))
            assert victim.wait_for_parts(len(victim.parts()) + draw.randint(1, ahead)), victim.log.read_text()[-2000:]
            time.sleep(draw.random() * 0.5)
            victim.kill(kind)
        if victim.process is None or victim.process.poll() is not None:
            victim.start()
        assert victim.process is not None
        assert victim.process.wait(300) == 0, victim.log.read_text()[-2000:]
    finally:
        victim.stop()
    rows_seen: Counter[tuple[int, str, str]] = Counter()
    for batch in read_batches(str(out), ["image_id", "member", "view"]):
        rows_seen.update(zip(*(batch[name].to_pylist() for name in ("image_id", "member", "view")), strict=True))
    wanted = {(i + 1, m, v) for i in range(count) for m in checkpoints for v in ("s64", "s64-flip")}
    wanted |= {(i + 1, m, "s64") for i in range(count) for m in others}
    assert set(rows_seen) == wanted, f"{len(wanted - set(rows_seen))} rows lost"
    assert set(rows_seen.values()) == {1}, "a row stands twice"
    expected = 1 + sum(i % 20 == 7 for i in range(20, count))
    errors = (out / "errors.csv").read_text().splitlines()[1:]
    assert len(errors) == expected and all("the file is empty" in line for line in errors)
    left = sorted(name for name in os.listdir(out) if not name.startswith("part-"))
    assert left == ["_manifest.parquet", "cost.json", "done.json", "errors.csv", "job.json"], "a stray file is left"
    return victim


@pytest.mark.slow
def test_a_killed_worker_and_a_killed_node_lose_and_repeat_nothing(tiny_settings, tiny_checkpoints, tmp_path):
    victim = label_under_fire(tiny_settings, tiny_checkpoints, tmp_path, 300, 10, ["worker", "raylet"], seed=1)
    assert victim.starts == 2
    assert [kill.kind for kill in victim.kills] == ["worker", "raylet"]


@pytest.mark.slow
def test_a_worker_that_is_killed_while_a_foreign_member_labels_loses_nothing(tiny_settings, tmp_path):
    pytest.importorskip("rapidocr", reason="needs the package rapidocr (extra ppocr)")
    others = {"lines": {"use": "ppocr", "options": {"limit_side_len": 64}}}
    victim = label_under_fire(tiny_settings, {}, tmp_path, 300, 10, ["worker", "driver"], seed=3, others=others)
    assert [kill.kind for kill in victim.kills] == ["worker", "driver"]


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_ten_kills(tiny_settings, tiny_checkpoints, tmp_path, capsys):
    kinds = ["worker", "driver", "raylet"] * 3 + ["worker"]
    random.Random(7).shuffle(kinds)
    victim = label_under_fire(tiny_settings, tiny_checkpoints, tmp_path, 2000, 10, kinds, seed=2)
    with capsys.disabled():
        print("", *victim.kills, f"{victim.starts} starts, {time.monotonic() - victim.first:.0f} s", sep="\n")
    assert len(victim.kills) == 10

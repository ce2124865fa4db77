"""The table of `i3cl benchmark scale`: what must hold for ten million images, 64 GPUs or a thousand trials.

Each row is measured in a process of its own and has a limit. Networks are replaced by sleep, GPUs are pretended, training workers
read their annotations and train nothing, trials report numbers that nobody measured; all else is the product's. Rows that count
requests need a folder on S3.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from uuid import uuid4

import numpy as np

from i3cl import claims, storage
from i3cl.config import Settings, SourceSettings
from i3cl.data.formats.predictions import PREDICTION_SCHEMA
from i3cl.data.formats.records import ImageRecord, Instance
from i3cl.data.formats.table import write_shards
from i3cl.data.loading.ingest import mix
from i3cl.errors import UserError
from i3cl.labelling.ledger import Failure, Ledger, part_name
from i3cl.labelling.pseudo import bundles
from i3cl.labelling.scale_benchmark import SCENES, Scene, begin, play, read_list

_LISTS = (2_000, 400_000, 10_000_000)
_LOADED = "loaded"
"""What a stand-in for a training worker prints when it has its table."""


@dataclass(frozen=True)
class Found:
    """What was measured for a row."""

    told: str
    """In words, with units."""
    limit: str
    passed: bool
    numbers: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Row:
    """One row of the table."""

    text: str
    measure: Callable[[str], Found]
    """Is given the path of an empty folder."""
    on_s3: bool = False
    """Whether that folder has to be on S3."""


def _scene(scene: Scene) -> Row:
    def measure(folder: str) -> Found:
        found = play(scene, Path(folder))
        told = f"{found['seconds']:.0f} s, ideal {found['ideal']:.0f} s: {found['ratio']:.2f}"
        return Found(told, f"{scene.limit:.2f}", found["ratio"] <= scene.limit, found)

    return Row(scene.text, measure)


def _list(images: int) -> Row:
    def measure(folder: str) -> Found:
        found = read_list(images, Path(folder, "list"))
        passed = found["seconds"] <= 120 and found["gigabytes"] <= 3
        return Found(f"{found['seconds']:.1f} s, {found['gigabytes']:.2f} GB", "120 s, 3 GB", passed, found)

    return Row(f"list of {images:,} images read and cut into shards", measure)


def beginning(folder: str, images: int = 10_000_000) -> Found:
    """How long a large job takes to its first shard, and how much memory its driver."""
    found = begin(images, Path(folder))
    told = f"{found['waited']:.0f} s after the first actor was ready, {found['gigabytes']:.2f} GB"
    return Found(told, "120 s, 3 GB", found["waited"] <= 120 and found["gigabytes"] <= 3, found)


def tables(folder: str, images: int = 400_000, workers: int = 8) -> Found:
    """By how much more memory training workers of one machine take for the annotations of so many images than for a thousand."""
    for name, count in (("few", 1000), ("set", images)):
        rows = (
            ImageRecord(k, f"{k // 1000:03d}/{k:06d}.jpg", 720, 1280, tuple(Instance(_box(9 * word)) for word in range(3)))
            for k in range(count)
        )
        write_shards(os.path.join(folder, name), rows)
    started = time.perf_counter()
    pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "env": {**os.environ, "TMPDIR": folder}}
    few, *others = (
        subprocess.Popen([sys.executable, "-c", f"from i3cl import scale; scale.stand_in({given!r})"], **pipes)
        for given in (os.path.join(folder, "few"), *[os.path.join(folder, "set")] * workers)
    )
    try:
        for process in (few, *others):
            assert process.stdout is not None
            if process.stdout.readline().strip() != _LOADED:
                raise RuntimeError("a worker ended with an error")
        seconds = time.perf_counter() - started
        # Shares of memory that several processes map, so that it counts once.
        more = sum(_held(process.pid) - _held(few.pid) for process in others) / 1e6
    finally:
        for process in (few, *others):
            process.communicate()
    numbers = {"gigabytes": round(more, 3), "seconds": round(seconds, 1)}
    return Found(f"{more:.2f} GB, {seconds:.0f} s", "0.45 GB", more <= 0.45, numbers)


def stand_in(annotations: str) -> None:
    """In the place of a training worker: read the annotations, take 8,192 images as batches do, say so, wait for the end."""
    # The images root does not exist: whoever listed it would end with an error.
    mixture = mix([SourceSettings(annotations=annotations, images="/not-there")], "", check_files=False)
    for start in range(0, 8192, 2048):
        mixture.rows(mixture.order(start, 2048, 0))
    print(_LOADED, flush=True)
    sys.stdin.read()


def _held(process: int) -> int:
    """Kilobytes of a process: its own and its share of what it has in common with others."""
    with open(f"/proc/{process}/smaps_rollup", encoding="ascii") as file:
        return next(int(row.split()[1]) for row in file if row.startswith("Pss:"))


def _box(left: int) -> Any:
    return np.array([[left, 4], [left + 8, 4], [left + 8, 12], [left, 12]], np.float32)


def trials(folder: str, count: int = 1000) -> Found:
    """What the driver of a sweep spends on so many trials that end at once."""
    from i3cl.search.space import COPY
    from i3cl.search.trial_log import TrialLog
    from i3cl.search.trials import Watch

    pages: list[int] = []
    settings = Settings.model_validate({"search": {"objective": "select", "space": {}}})
    watch = Watch(settings, count, {"label.select.low": 0.5}, TrialLog(folder), lambda: pages.append(1), every=10.0)
    started, written = time.perf_counter(), _written()
    for number in range(count):
        trial = SimpleNamespace(trial_id=str(number), config={"label.select.low": number / count, COPY: 0}, error_file=None)
        watch.on_trial_start(0, [], trial)
        result = {"hmean": number / 2000, "time_total_s": 0.3, "training_iteration": 1, "labels": 5}
        watch.on_trial_result(0, [], trial, result)
        watch.on_trial_complete(0, [], trial)
        watch.on_step_end(0, [])
    watch.close()
    seconds, megabytes = time.perf_counter() - started, (_written() - written) / 1e6
    done = len(TrialLog(folder).done())
    numbers = {"seconds": round(seconds, 2), "megabytes": round(megabytes, 2), "trials": done, "pages": len(pages)}
    passed = seconds <= 10 and megabytes <= 20 and done == count
    return Found(f"{seconds:.1f} s, {megabytes:.1f} MB written", "10 s, 20 MB", passed, numbers)


def _written() -> int:
    """Bytes that this process has written so far."""
    with open("/proc/self/io", encoding="ascii") as file:
        return next(int(row.split()[1]) for row in file if row.startswith("wchar:"))


def failures(url: str, parts: int = 400) -> Found:
    """Reading which images of many parts could not be labelled."""
    ledger = Ledger(url)
    empty = PREDICTION_SCHEMA.empty_table()
    _side_by_side(lambda k: ledger.write(part_name(0, k), empty, [Failure(k, f"{k}.jpg", "broken")]), parts)
    with storage.counted(url) as counts:
        started = time.perf_counter()
        found = Ledger(url).failures()
        seconds = time.perf_counter() - started
    if [failure.image_id for failure in found] != list(range(parts)):
        raise RuntimeError(f"{url}: not every failure was found")
    return Found(f"{seconds:.1f} s, {_requests(counts)}", "2 s", seconds <= 2, {"seconds": round(seconds, 2), **counts})


def grouping(url: str, parts: int = 6250) -> Found:
    """Requests until the parts of a job are grouped for its pseudo labels."""
    rows = 64
    job = {"images": {"count": parts * rows, "sha256": "x"}, "label.rows_per_block": rows, "groups": [["a"]], "members": {}}
    storage.write_text_atomic(storage.join(url, "job.json"), json.dumps(job))
    storage.write_text_atomic(storage.join(url, "done.json"), "{}")
    # None of them is opened: their names say which images they hold.
    _side_by_side(lambda k: storage.write_bytes_atomic(storage.join(url, part_name(0, k)), b"PAR1"), parts)
    with storage.counted(url) as counts:
        found = bundles(url)
    if found.images != parts * rows or sum(map(len, found.groups)) != parts:
        raise RuntimeError(f"{url}: not every part is in a group")
    passed = counts.total() <= 10 and len(found.groups) >= 2
    told = f"{_requests(counts)}, {len(found.groups)} groups"
    return Found(told, "10 requests", passed, {**counts, "groups": len(found.groups)})


def claimed(url: str, drivers: int = 20) -> Found:
    """Drivers that claim one folder at the same moment for different jobs: one of them may have it."""

    def claim(number: int) -> bool:
        try:
            claims.claim(storage.join(url, "job.json"), {"job": number}, "another job")
        except UserError:
            return False
        return True

    with ThreadPoolExecutor(drivers) as pool:
        won = sum(pool.map(claim, range(drivers)))
    return Found(f"{won} of {drivers} won", "1", won == 1, {"won": won})


def _side_by_side(work: Callable[[int], object], count: int) -> None:
    with ThreadPoolExecutor(32) as pool:
        list(pool.map(work, range(count)))


def _requests(counts: Mapping[str, int]) -> str:
    return f"{sum(counts.values())} requests"


ROWS = {
    **{name: _scene(scene) for name, scene in SCENES.items()},
    **{f"list-{images}": _list(images) for images in _LISTS},
    "begin": Row("job of 10,000,000 images up to its first shard", beginning),
    "tables": Row("8 training workers of one machine with 400,000 images of three words each", tables),
    "trials": Row("1,000 trials that end at once, in the driver of a sweep", trials),
    "failures": Row("400 parts with an image that could not be labelled, read on S3", failures, on_s3=True),
    "parts": Row("6,250 parts on S3 grouped for pseudo labels", grouping, on_s3=True),
    "claims": Row("20 drivers claim one folder on S3", claimed, on_s3=True),
}


def scale_report(only: Sequence[str], s3_folder: str | None, out: str, say: Callable[[str], None]) -> list[dict[str, Any]]:
    """Measure the rows, say each as it is there, and write them all to `out` as JSON lines.

    Args:
        only: Names of rows; empty for all, those on S3 only where `s3_folder` is given.
        s3_folder: An s3:// URL below which new folders are made, and removed afterwards.
        out: A local file.
        say: Is told one line of a Markdown table for each row.

    Raises:
        UserError: A name is not that of a row, or a row needs s3_folder.
    """
    for name in only:
        if name not in ROWS:
            raise UserError(f"--only: {name} is none of {', '.join(ROWS)}")
        if ROWS[name].on_s3 and not s3_folder:
            raise UserError(f"--only: {name} counts requests; add --s3 s3://bucket/folder")
    if s3_folder and not storage.is_remote(s3_folder):
        raise UserError(f"--s3: {s3_folder} is not an s3:// URL")
    rows = []
    for name in only or [name for name, row in ROWS.items() if s3_folder or not row.on_s3]:
        with tempfile.TemporaryDirectory(prefix="i3cl-scale-") as folder:
            place = storage.join(s3_folder, f"scale-{uuid4().hex[:12]}") if s3_folder and ROWS[name].on_s3 else folder
            environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
            environment |= {"RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}
            command = [sys.executable, "-m", "i3cl.scale", name, place]
            done = subprocess.run(command, capture_output=True, text=True, env=environment)
        found = [line for line in done.stdout.splitlines() if line.startswith('{"row"')]
        row = json.loads(found[0]) if found else {"row": name, "error": done.stderr.strip()[-300:] or "no answer"}
        rows.append(row)
        say(_line(row))
    storage.write_text_atomic(out, "".join(json.dumps(row) + "\n" for row in rows))
    return rows


def _line(row: dict[str, Any]) -> str:
    if "error" in row:
        return f"| {row['row']} | failed: {row['error']} | | |"
    return f"| {row['text']} | {row['told']} | {row['limit']} | {'yes' if row['passed'] else 'NO'} |"


def _measured(name: str, place: str) -> dict[str, Any]:
    row = ROWS[name]
    try:
        numbers = asdict(row.measure(place))
    finally:
        if row.on_s3:
            storage.remove_tree(place)
    return {"row": name, "text": row.text, **numbers.pop("numbers"), **numbers}


if __name__ == "__main__":
    print(json.dumps(_measured(sys.argv[1], sys.argv[2])), flush=True)

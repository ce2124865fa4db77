"""One copy of a table on a machine: made once, mapped by all, made again when its source changes, removed when it is old."""

import json
import multiprocessing
import os
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from i3cl.config import SourceSettings
from i3cl.data.formats.coco import write_coco
from i3cl.data.formats.records import ImageRecord, Instance
from i3cl.data.loading.ingest import mix
from i3cl.data.loading.shared_table import shared_table
from i3cl.errors import UserError


@pytest.fixture
def temporary(tmp_path, monkeypatch):
    (tmp_path / "tmp").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    monkeypatch.setattr(tempfile, "tempdir", None)
    yield tmp_path / "tmp"
    monkeypatch.setattr(tempfile, "tempdir", None)


def copies(temporary):
    return sorted(temporary.glob("i3cl-tables-*/*.arrow"))


def records(count, move=0.0):
    square = np.array([[1, 1], [9, 1], [9, 5.25], [1, 5.25]], np.float32) + np.float32(move)
    return [
        ImageRecord(k, f"{k}.jpg", 40, 60, (Instance(square), Instance(square + 10, ignore=True))) for k in range(1, count + 1)
    ]


def _ask(made, key):
    def make():
        # Long enough for the others to come in between.
        time.sleep(0.5)
        with open(made, "a") as file:
            file.write("made\n")
        return pa.table({"a": [1, 2, 3]})

    assert shared_table(key, make)["a"].to_pylist() == [1, 2, 3]


def test_of_many_processes_one_makes_it(temporary, tmp_path):
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_ask, args=(str(tmp_path / "made"), "key")) for _ in range(6)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0] * 6
    assert (tmp_path / "made").read_text() == "made\n" and len(copies(temporary)) == 1
    assert (temporary / f"i3cl-tables-{os.getuid()}").stat().st_mode & 0o077 == 0


def test_an_error_leaves_nothing_and_the_next_one_tries_again(temporary):
    def fails():
        raise UserError("no such set")

    with pytest.raises(UserError, match="no such set"):
        shared_table("key", fails)
    assert copies(temporary) == []
    assert shared_table("key", lambda: pa.table({"a": [1]}))["a"].to_pylist() == [1]


def test_a_damaged_copy_is_made_again(temporary):
    shared_table("key", lambda: pa.table({"a": [1]}))
    [copy] = copies(temporary)
    for content in (b"", copy.read_bytes()[:40]):
        copy.write_bytes(content)
        assert shared_table("key", lambda: pa.table({"a": [2]}))["a"].to_pylist() == [2]


def test_workers_see_what_the_driver_has_read(temporary, tmp_path):
    write_coco(str(tmp_path / "set.json"), records(5))
    source = SourceSettings(annotations="set.json", images="images", lossweight=0.5)
    (tmp_path / "images").mkdir()
    for k in range(1, 6):
        (tmp_path / "images" / f"{k}.jpg").write_bytes(b"")
    driver = mix([source], str(tmp_path))
    assert copies(temporary) == []
    worker, again = (mix([source], str(tmp_path), check_files=False) for _ in range(2))
    assert worker.table.equals(driver.table) and again.table.equals(driver.table) and len(copies(temporary)) == 1
    # Other labels in the same file, or another weight, are another table.
    write_coco(str(tmp_path / "set.json"), records(5, move=2.0))
    assert not mix([source], str(tmp_path), check_files=False).table.equals(driver.table)
    other = source.model_copy(update={"lossweight": 0.25})
    assert mix([other], str(tmp_path), check_files=False).table["instances"][0][0]["lossweight"].as_py() == 0.25
    assert len(copies(temporary)) == 3


def test_old_copies_go_and_those_in_use_stay_readable(temporary):
    table = shared_table("old", lambda: pa.table({"a": list(range(1000))}))
    [old] = copies(temporary)
    os.utime(old, (time.time() - 2 * 86400,) * 2)
    shared_table("new", lambda: pa.table({"a": [1]}))
    assert old not in copies(temporary) and len(copies(temporary)) == 1
    assert table["a"].to_pylist() == list(range(1000)), "it is mapped still"


def test_a_folder_of_somebody_else_is_not_used(temporary, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (temporary / f"i3cl-tables-{os.getuid()}").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="belongs to somebody else; set TMPDIR"):
        shared_table("key", lambda: pa.table({"a": [1]}))


def _memory(folder, results):
    from i3cl.data.loading import ingest

    def most():
        # Not getrusage, which counts what the parent process had as well.
        return next(int(row.split()[1]) for row in Path("/proc/self/status").read_text().splitlines() if row.startswith("VmHWM"))

    source = SourceSettings(annotations=f"{folder}/set.json", images=f"{folder}/images")
    before = most()
    mixture = ingest.mix([source], "", check_files=False)
    results.put((mixture.table.num_rows, (most() - before) / 1024))


def test_the_second_worker_costs_little_memory(temporary, tmp_path):
    """At 1.2 million instances every worker took 2.9 GB."""
    images = [{"id": k, "file_name": f"batch/{k}.jpg", "height": 40, "width": 60} for k in range(20_000)]
    box = {"category_id": 1, "iscrowd": 0, "segmentation": [[1, 1, 9, 1, 9, 5, 1, 5]], "bbox": [1, 1, 8, 4], "area": 32}
    annotations = [box | {"id": k, "image_id": k // 3} for k in range(60_000)]
    categories = [{"id": 1, "name": "text"}]
    whole = {"images": images, "annotations": annotations, "categories": categories}
    Path(tmp_path / "set.json").write_text(json.dumps(whole))
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    grown = []
    for _ in range(2):
        process = context.Process(target=_memory, args=(str(tmp_path), results))
        process.start()
        rows, megabytes = results.get(timeout=120)
        process.join(60)
        assert rows == 20_000
        grown.append(megabytes)
    assert grown[1] < 0.35 * grown[0], grown

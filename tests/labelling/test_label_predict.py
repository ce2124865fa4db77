"""Labelling without Ray: manifest, ledger, the actor's work on good, bad and deadly images, cost."""

from __future__ import annotations

import csv
import io
import json
import multiprocessing
import os
import threading
import time
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from i3cl.config import LabelSettings, Settings, ViewSettings, to_yaml, with_overrides
from i3cl.data.formats.predictions import read_predictions
from i3cl.data.formats.records import Dataset, ImageRecord
from i3cl.errors import UserError, inside
from i3cl.labelling import cost
from i3cl.labelling.actor import DEATHS, Labeller, Plan
from i3cl.labelling.identity import as_member
from i3cl.labelling.layout import layout
from i3cl.labelling.ledger import Failure, Ledger, part_name
from i3cl.labelling.manifest import make_manifest
from i3cl.labelling.predict import _Job, predict
from i3cl.members.ours import checkpoint_hash
from i3cl.model.checkpoint import save_checkpoint
from i3cl.model.network import I3CL

VIEWS = (ViewSettings(short_side=64), ViewSettings(short_side=64, flip=True))


def dataset(folder: Path, names: list[str], first: int = 1) -> Dataset:
    records = [ImageRecord(first + i, name, 96, 96 + i % 3) for i, name in enumerate(names)]
    return Dataset("set", str(folder), records)


def write_images(folder: Path, count: int) -> list[str]:
    folder.mkdir(exist_ok=True)
    names = [f"{i}.jpg" for i in range(count)]
    for i, name in enumerate(names):
        cv2.imwrite(str(folder / name), np.random.default_rng(i).integers(0, 255, (96, 96 + i % 3, 3), np.uint8))
    return names


def plan(images: Path, out: Path, checkpoints: dict[str, str], **changes) -> Plan:
    values = {
        "out": str(out),
        "images_root": str(images),
        "groups": {0: {name: as_member(checkpoint) for name, checkpoint in checkpoints.items()}},
        "views": VIEWS,
        "batch": 2,
        "prefetch": 2,
        "threads": 1,
        "decode_threads": 1,
        "attempts": 3,
    }
    return Plan(**{**values, **changes})


def blocks(data: Dataset, rows: int, together: int = 2, groups: int = 1):
    manifest = make_manifest(data)
    tasks = [(part_name(g, k), g, k) for g in range(groups) for k in range(len(manifest.spans(rows)))]
    return [manifest.block(tasks[k : k + together], manifest.spans(rows)) for k in range(0, len(tasks), together)]


def rows_of(out: Path) -> dict[int, dict[tuple[str, str], dict]]:
    return {rows[0]["image_id"]: {(r["member"], r["view"]): r for r in rows} for rows in read_predictions(str(out))}


# ------------------------------------------------------------------------------------------------------------- manifest


@settings(deadline=None)
@given(count=st.integers(1, 40), rows=st.integers(1, 12), together=st.integers(1, 5))
def test_every_image_stands_in_exactly_one_shard(count, rows, together):
    data = Dataset("set", "/images", [ImageRecord(i * 7, f"{i}.jpg", 5, 6) for i in range(count)])
    manifest = make_manifest(data)
    tables = blocks(data, rows, together)
    parts = [row for table in tables for row in table.to_pylist()]
    assert [row["part"] for row in parts] == [part_name(0, k) for k in range(len(manifest.spans(rows)))]
    assert [i for row in parts for i in row["image_id"]] == [i * 7 for i in range(count)]
    assert [name for row in parts for name in row["file_name"]] == [f"{i}.jpg" for i in range(count)]
    assert [len(row["image_id"]) for row in parts] == [count for _, count in manifest.spans(rows)]


def test_the_digest_knows_ids_names_and_order():
    def digest(*pairs):
        return make_manifest(Dataset("set", "/i", [ImageRecord(i, n, 5, 5) for i, n in pairs])).digest

    base = digest((1, "a"), (2, "b"))
    assert digest((1, "a"), (2, "b")) == base
    assert len({base, digest((2, "b"), (1, "a")), digest((1, "b"), (2, "a")), digest((1, "a")), digest((1, "ab"), (2, ""))}) == 5


def test_no_image_and_an_id_twice_are_refused():
    with pytest.raises(UserError, match="no images"):
        make_manifest(Dataset("set", "/i", []))
    with pytest.raises(UserError, match="id 3 occurs twice"):
        make_manifest(Dataset("set", "/i", [ImageRecord(3, "a", 5, 5), ImageRecord(3, "b", 5, 5)]))


def test_the_manifest_of_many_images_is_small():
    class Lazy:
        def __len__(self):
            return 100_000

        def __iter__(self):
            return (ImageRecord(i, f"folder/image_{i:07}.jpg", 720, 1280) for i in range(100_000))

    manifest = make_manifest(Dataset("set", "/i", Lazy()))
    assert len(manifest) == 100_000
    assert manifest.table.nbytes < 60 * len(manifest)


# --------------------------------------------------------------------------------------------------------------- ledger


def test_another_job_in_the_folder_is_refused_with_the_difference(tmp_path):
    ledger = Ledger(str(tmp_path / "out"))
    job = {"images": {"count": 3, "sha256": "x"}, "views": ["default"]}
    ledger.claim(job)
    ledger.claim(job)
    with pytest.raises(UserError, match=r"images\.sha256: x there, y here"):
        ledger.claim({**job, "images": {"count": 3, "sha256": "y"}})
    (tmp_path / "out" / "job.json").write_text("{")
    with pytest.raises(UserError, match="damaged"):
        ledger.claim(job)


def test_a_folder_of_other_parquet_files_is_refused(tmp_path):
    (tmp_path / "mine.parquet").write_bytes(b"x")
    with pytest.raises(UserError, match="something else"):
        Ledger(str(tmp_path)).claim({})


def test_attempts_and_the_image_in_hand_are_remembered(tmp_path):
    ledger = Ledger(str(tmp_path))
    assert ledger.begin("p").number == 1
    attempt = ledger.begin("p")
    assert (attempt.number, attempt.deaths) == (2, {})
    ledger.hold("p", attempt, 7)
    attempt = ledger.begin("p")
    assert (attempt.number, attempt.deaths) == (3, {7: 1})
    attempt = ledger.begin("p")
    assert attempt.deaths == {7: 1}, "an image that was let go is not blamed again"


def test_errors_count_only_with_their_part_and_work_files_go_at_the_end(tmp_path):
    import pyarrow as pa

    ledger = Ledger(str(tmp_path))
    ledger.write("part-00-000000.parquet", pa.table({"a": [1]}), [Failure(5, 'a "b",.jpg', "bad, very")])
    ledger.write("part-00-000001.parquet", pa.table({"a": [1]}), [Failure(9, "c.jpg", "bad")])
    ledger.write("part-01-000000.parquet", pa.table({"a": [1]}), [Failure(5, 'a "b",.jpg', "bad, very")])
    (tmp_path / "part-00-000001.parquet").unlink()
    (tmp_path / ".tmp-0123").write_bytes(b"half")
    assert ledger.finished() == {"part-00-000000.parquet", "part-01-000000.parquet"}
    ledger.finish({"images": 2}, ledger.failures())
    with open(tmp_path / "errors.csv", newline="") as file:
        assert list(csv.reader(file)) == [["image_id", "file_name", "reason"], ["5", 'a "b",.jpg', "bad, very"]]
    assert sorted(os.listdir(tmp_path)) == ["done.json", "errors.csv", "part-00-000000.parquet", "part-01-000000.parquet"]


# ---------------------------------------------------------------------------------------------------------------- actor


@pytest.mark.parametrize("together", [1, 2])
def test_a_network_works_while_outlines_are_traced(tmp_path, tiny_checkpoints, monkeypatch, together):
    """On a GPU: its network would otherwise wait for the CPU after every batch. On a CPU there is nothing to gain."""
    from i3cl.inference import predictor

    names = write_images(tmp_path / "images", 4)
    tasks = [(part_name(0, 0), 0, 0)]
    manifest = make_manifest(dataset(tmp_path / "images", names))
    out = tmp_path / "out"
    labeller = Labeller(plan(tmp_path / "images", out, {"a": tiny_checkpoints["a"]}, views=VIEWS[:1], together=together))
    ours, trace = labeller.members["a"].predictor, predictor._to_detections
    passes, second, met, inside = [], threading.Event(), [], []

    def network(tensors):
        passes.append(len(tensors))
        inside.append(labeller.turn._lock.locked())
        if len(passes) == 2:
            second.set()
        return ours.network.forward(tensors)

    def traced(*arguments):
        met.append(second.wait(20 if together == 2 else 0.1))
        return trace(*arguments)

    monkeypatch.setattr(type(ours.network), "__call__", lambda self, tensors: network(tensors))
    monkeypatch.setattr(predictor, "_to_detections", traced)
    began = time.perf_counter()
    labeller(manifest.block(tasks, manifest.spans(4)))
    assert passes == [2, 2] and all(inside), "one batch at a time has the device"
    assert met == ([True] * 4 if together == 2 else [False, False, True, True])
    assert 0 < labeller.turn.seconds < time.perf_counter() - began
    found = [row["file_name"] for rows in read_predictions(str(out)) for row in rows]
    assert found == ["0.jpg", "3.jpg", "1.jpg", "2.jpg"], "by size, whichever is ready first"


def test_the_actor_writes_every_image_member_and_view_once(tiny_checkpoints, tmp_path):
    names = write_images(tmp_path / "images", 7)
    data = dataset(tmp_path / "images", names)
    labeller = Labeller(plan(tmp_path / "images", tmp_path / "out", tiny_checkpoints))
    reports = [row for table in blocks(data, 3) for row in labeller(table).to_pylist()]
    assert [r["images"] for r in reports] == [3, 3, 1] and all(r["errors"] == 0 for r in reports)
    found = rows_of(tmp_path / "out")
    assert sorted(found) == [1, 2, 3, 4, 5, 6, 7]
    wanted = {(m, v) for m in ("a", "b") for v in ("s64", "s64-flip")}
    assert all(set(rows) == wanted for rows in found.values())
    assert all(
        r["error"] is None and (r["height"], r["width"]) == (96, 96 + (i - 1) % 3)
        for i, rows in found.items()
        for r in rows.values()
    )
    before = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "out").glob("*.parquet")}
    again = [row for table in blocks(data, 3) for row in labeller(table).to_pylist()]
    assert [r["images"] for r in again] == [3, 3, 1]
    assert before == {p.name: p.stat().st_mtime_ns for p in (tmp_path / "out").glob("*.parquet")}


def test_an_image_without_text_keeps_its_size(tiny_settings, tmp_path):
    """Evaluation and trust compare the sizes of predictions with those of the truth."""
    from i3cl.evaluation.formats.table import check_image_sizes

    blind = with_overrides(tiny_settings, {"model.backbone.weights": "none", "model.score_threshold": 0.999}, "test")
    save_checkpoint(I3CL(blind.model), tmp_path / "blind", to_yaml(blind))
    data = dataset(tmp_path / "images", write_images(tmp_path / "images", 2))
    labeller = Labeller(plan(tmp_path / "images", tmp_path / "out", {"blind": str(tmp_path / "blind")}))
    assert all(row["errors"] == 0 for table in blocks(data, 3) for row in labeller(table).to_pylist())
    rows = [row for each in rows_of(tmp_path / "out").values() for row in each.values()]
    assert rows and all(len(row["scores"]) == 0 and row["height"] == 96 for row in rows)
    check_image_sizes(str(tmp_path / "out"), data.records)


def test_members_apart_and_together_say_the_same(tiny_checkpoints, tmp_path):
    names = write_images(tmp_path / "images", 5)
    data = dataset(tmp_path / "images", names)
    together = Labeller(plan(tmp_path / "images", tmp_path / "one", tiny_checkpoints))
    groups = {k: {name: as_member(path)} for k, (name, path) in enumerate(tiny_checkpoints.items())}
    apart = Labeller(plan(tmp_path / "images", tmp_path / "two", {}, groups=groups, batch=3, prefetch=1))
    for table in blocks(data, 2):
        together(table)
    for table in blocks(data, 2, together=4, groups=2):
        apart(table)
    one, two = rows_of(tmp_path / "one"), rows_of(tmp_path / "two")
    assert one.keys() == two.keys()
    for image_id, rows in one.items():
        assert rows.keys() == two[image_id].keys()
        for key, row in rows.items():
            np.testing.assert_allclose(row["scores"], two[image_id][key]["scores"], atol=1e-4)


def png(mode: str, size=(40, 30)) -> bytes:
    data = io.BytesIO()
    Image.new(mode, size).save(data, "TIFF" if mode == "CMYK" else "PNG")
    return data.getvalue()


def bad_images(folder: Path) -> dict[str, bool]:
    """Name -> whether it can be read."""
    folder.mkdir(exist_ok=True)
    good = write_images(folder, 2)
    whole = (folder / good[0]).read_bytes()
    gif = io.BytesIO()
    Image.new("RGB", (40, 30)).save(gif, "GIF", save_all=True, append_images=[Image.new("RGB", (40, 30), "red")])
    bomb = bytearray(png("L", (8, 8)))
    bomb[16:24] = (60000).to_bytes(4, "big") * 2
    files = {
        "cut.jpg": (whole[: len(whole) // 3], False),
        "empty.jpg": (b"", False),
        "text.jpg": (b"this is no image", False),
        "bomb.png": (bytes(bomb), False),
        "cmyk.tif": (png("CMYK"), True),
        "deep.png": (png("I;16"), True),
        "moves.gif": (gif.getvalue(), True),
        "dot.png": (png("RGB", (1, 1)), True),
        "line.png": (png("RGB", (3000, 1)), True),
    }
    for name, (data, _) in files.items():
        (folder / name).write_bytes(data)
    (folder / "folder.jpg").mkdir(exist_ok=True)
    return {name: True for name in good} | {n: ok for n, (_, ok) in files.items()} | {"missing.jpg": False, "folder.jpg": False}


def test_bad_images_are_rows_with_an_error(tiny_checkpoints, tmp_path):
    kinds = bad_images(tmp_path / "images")
    data = dataset(tmp_path / "images", list(kinds))
    labeller = Labeller(plan(tmp_path / "images", tmp_path / "out", tiny_checkpoints))
    reports = [row for table in blocks(data, 5) for row in labeller(table).to_pylist()]
    found = rows_of(tmp_path / "out")
    assert len(found) == len(kinds)
    for record in data.records:
        rows = found[record.id].values()
        assert len(rows) == 4
        assert all((row["error"] is None) == kinds[record.file_name] for row in rows), record.file_name
    failures = Ledger(str(tmp_path / "out")).failures()
    assert {f.file_name for f in failures} == {name for name, good in kinds.items() if not good}
    assert all(f.file_name in f.reason and "\n" not in f.reason for f in failures)
    assert sum(r["errors"] for r in reports) == len(failures)


def test_an_image_that_the_network_refuses_costs_only_itself(tiny_checkpoints, tmp_path, monkeypatch):
    from i3cl.inference.predictor import Predictor

    names = write_images(tmp_path / "images", 5)
    real = Predictor.__call__

    def small_memory(predictor, images, view=None):
        if any(image.shape[1] == 98 for image in images):
            raise RuntimeError("out of memory\nin lines")
        return real(predictor, images, view)

    monkeypatch.setattr(Predictor, "__call__", small_memory)
    labeller = Labeller(plan(tmp_path / "images", tmp_path / "out", tiny_checkpoints, batch=5))
    for table in blocks(dataset(tmp_path / "images", names), 5):
        labeller(table)
    errors = {i: {r["error"] for r in rows.values()} for i, rows in rows_of(tmp_path / "out").items()}
    assert [i for i, error in sorted(errors.items()) if error != {None}] == [3]
    assert "2.jpg: a: the network cannot take it (RuntimeError: out of memory in lines)" in errors[3]


@pytest.mark.parametrize(("batch", "room", "tried"), [(5, 2, [5, 2, 3, 1, 2]), (1, 1, [1] * 6)])
def test_memory_that_runs_out_costs_no_good_image(tiny_checkpoints, tmp_path, monkeypatch, batch, room, tried):
    """The failed pass is dropped before the batch is tried again in halves; one image alone is tried twice."""
    import weakref

    import torch

    from i3cl.inference.predictor import Predictor

    names = write_images(tmp_path / "images", 5)
    real, sizes, held, alive = Predictor.__call__, [], [], []

    def small_memory(predictor, images, view=None):
        alive.append(sum(tensor() is not None for tensor in held))
        activations = torch.zeros(8)
        held.append(weakref.ref(activations))
        sizes.append(len(images))
        if len(images) > room or len(sizes) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return real(predictor, images, view)

    monkeypatch.setattr(Predictor, "__call__", small_memory)
    members = {"a": tiny_checkpoints["a"]}
    labeller = Labeller(plan(tmp_path / "images", tmp_path / "out", members, batch=batch, views=VIEWS[:1]))
    reports = [row for table in blocks(dataset(tmp_path / "images", names), 5) for row in labeller(table).to_pylist()]
    assert sum(row["errors"] for row in reports) == 0
    assert all(row["error"] is None for rows in rows_of(tmp_path / "out").values() for row in rows.values())
    assert set(alive) == {0}, "a failed pass was kept alive"
    assert sizes == tried


def _work(labeller: Labeller, tables: list) -> None:
    """A worker's life, in a process of its own, in which image 5.jpg is deadly."""
    read = labeller._read

    def deadly(entry):
        if entry.file_name == "5.jpg":
            os._exit(1)
        return read(entry)

    labeller._read = deadly  # type: ignore[method-assign]
    for table in tables:
        labeller(table)
    os._exit(0)


def test_an_image_that_kills_the_worker_is_found_and_left_out(tiny_checkpoints, tmp_path):
    names = write_images(tmp_path / "images", 8)
    tables = blocks(dataset(tmp_path / "images", names), 4)
    labeller = Labeller(plan(tmp_path / "images", tmp_path / "out", {"a": tiny_checkpoints["a"]}, views=VIEWS[:1]))
    labeller.pool.shutdown()
    ends = []
    while not ends or ends[-1] != 0:
        # The child has none of the parent's threads; it gets its own.
        process = multiprocessing.get_context("fork").Process(target=_fresh, args=(labeller, tables))
        process.start()
        process.join(60)
        ends.append(process.exitcode)
        assert len(ends) < 10, "the deadly image goes round for ever"
    assert ends == [1] * (3 + DEATHS) + [0]
    found = rows_of(tmp_path / "out")
    assert sorted(found) == list(range(1, 9))
    errors = {i: row["error"] for i, rows in found.items() for row in rows.values()}
    assert [i for i, error in errors.items() if error] == [6]
    assert errors[6] == "5.jpg: killed the worker 2 times while it was labelled alone"


def _fresh(labeller: Labeller, tables: list) -> None:
    from concurrent.futures import ThreadPoolExecutor

    labeller.pool, labeller.writer = ThreadPoolExecutor(1), ThreadPoolExecutor(1)
    _work(labeller, tables)


# ------------------------------------------------------------------------------------------------- settings, fingerprint


@pytest.mark.parametrize(
    ("label", "shards", "gpus", "cpus", "cores", "wanted"),
    [
        ({}, 100, 0, 2, 2, (2, 2, 1, 1, 1, 0)),
        ({}, 1000, 0, 16, 16, (8, 8, 2, 1, 2, 0)),
        ({}, 1000, 8, 64, 64, (8, 1000, 1, 4, 1, 1)),
        # Whole GPUs: more actors than there are GPUs wait for more of them.
        ({"actors": 64}, 1000, 8, 64, 64, (8, 64, 1, 4, 1, 1)),
        ({"actors": 4}, 1000, 8, 64, 64, (4, 4, 1, 4, 1, 1)),
        ({"actors_per_gpu": 2}, 1000, 1, 16, 16, (2, 1000, 1, 4, 1, 0.5)),
        ({"actors": 8}, 3, 0, 2, 2, (3, 3, 1, 1, 1, 0)),
        ({"threads": 1}, 3, 0, 2, 2, (2, 2, 1, 1, 1, 0)),
    ],
)
def test_automatic_layout(label, shards, gpus, cpus, cores, wanted):
    spread = layout(LabelSettings(**label), shards, gpus, cpus, cores)
    assert (
        spread.actors,
        spread.most,
        spread.threads,
        spread.decode_threads,
        spread.cpus_per_actor,
        spread.gpus_per_actor,
    ) == wanted
    assert 1 <= spread.shards_per_task <= 4


def test_a_checkpoint_is_known_by_its_weights_and_settings(tiny_checkpoints, tmp_path):
    assert checkpoint_hash(tiny_checkpoints["a"]) != checkpoint_hash(tiny_checkpoints["b"])
    assert checkpoint_hash(tiny_checkpoints["a"]) == checkpoint_hash(tiny_checkpoints["a"])
    with pytest.raises(UserError, match=r"not a checkpoint directory \(it has no settings.yaml\)"):
        checkpoint_hash(str(tmp_path))


def test_mistakes_are_told_before_anything_starts(tiny_checkpoints, tmp_path):
    data = dataset(tmp_path, ["a.jpg"])

    def call(members, **label):
        return predict(data, members, Settings(label=LabelSettings(**label)), str(tmp_path / "out"), "t")

    with pytest.raises(UserError, match=r"label\.members"):
        call({})
    with pytest.raises(UserError, match="every view once"):
        call(tiny_checkpoints, views=[{}, {}])
    with pytest.raises(
        UserError, match=r"label\.views: s6000 shows a the same picture as s5000, .*data\.test_long_side=6000 or more"
    ):
        call(tiny_checkpoints, views=[{"short_side": 5000}, {"short_side": 6000}])
    with pytest.raises(UserError, match=r"label\.views: s96 shows a the same picture as default"):
        call(tiny_checkpoints, views=[{}, {"short_side": 96, "flip": True}, {"short_side": 96}])
    with pytest.raises(UserError, match="not a checkpoint directory"):
        call({"a": str(tmp_path / "nowhere")})
    assert not (tmp_path / "out").exists()


def test_a_done_job_returns_at_once_and_knows_another_one(tiny_checkpoints, tmp_path):
    data = dataset(tmp_path, ["a.jpg"])
    out = str(tmp_path / "out")
    manifest = make_manifest(data)
    Ledger(out).claim(
        {
            "images": {"count": 1, "sha256": manifest.digest, "root": str(tmp_path)},
            "members": {name: checkpoint_hash(path) for name, path in tiny_checkpoints.items()},
            "views": ["default"],
            "label.rows_per_block": 64,
            "groups": [["a", "b"]],
        }
    )
    for name in ("done.json", part_name(0, 0)):
        (tmp_path / "out" / name).write_text("{}")
    (tmp_path / "out" / ".tmp-1").write_text("")
    assert predict(data, tiny_checkpoints, Settings(), out, "t") == out
    assert not (tmp_path / "out" / ".tmp-1").exists()
    other = Settings(label=LabelSettings(rows_per_block=32))
    with pytest.raises(UserError, match=r"label\.rows_per_block: 64 there, 32 here"):
        predict(data, tiny_checkpoints, other, out, "t")
    with pytest.raises(UserError, match=r"members\.b"):
        predict(data, {"a": tiny_checkpoints["a"]}, Settings(), out, "t")
    with pytest.raises(UserError, match=r"images"):
        predict(dataset(tmp_path, ["b.jpg"]), tiny_checkpoints, Settings(), out, "t")


def test_a_given_test_size_belongs_to_the_job_and_reaches_the_actors(tiny_checkpoints, tmp_path, monkeypatch):
    names = write_images(tmp_path / "images", 3)
    data, out = dataset(tmp_path / "images", names), str(tmp_path / "out")
    labelled, said = [], []

    def label(job, missing):
        """What the actors would do, in this process."""
        labelled.append(job.plan(layout(job.label, len(missing), 0, 1, 1)))
        said.append(job.sizes)
        labeller = Labeller(labelled[-1])
        labeller(job.manifest.block([(part, *job.parts[part]) for part in missing], job.spans))
        assert {str(p.predictor.size) for p in labeller.members.values()} == {"64/96"}

    monkeypatch.setattr(_Job, "_label", label)
    given = Settings.model_validate({"data": {"test_short_side": 64}})
    predict(data, tiny_checkpoints, given, out, "t")
    assert labelled[0].device == "cpu" and labelled[0].given == {"data.test_short_side": 64}
    assert said == ["test size 64/96 (data.test_short_side as given, the rest from the checkpoints)"]
    predict(data, tiny_checkpoints, given, out, "t")
    assert len(labelled) == 1, "the job is done"
    with pytest.raises(UserError, match=r"data\.test_short_side: 64 there, nothing here"):
        predict(data, tiny_checkpoints, Settings(), out, "t")
    with pytest.raises(UserError, match=r"data\.test_short_side: 64 there, 32 here"):
        predict(data, tiny_checkpoints, Settings.model_validate({"data": {"test_short_side": 32}}), out, "t")


def test_without_gpus_to_use_no_actor_asks_for_one_that_is_visible(tiny_checkpoints, tmp_path, monkeypatch):
    import torch

    def refuse(*arguments, **keywords):
        raise AssertionError("CUDA was asked for")

    names = write_images(tmp_path / "images", 2)
    data = dataset(tmp_path / "images", names)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "_lazy_init", refuse)
    settings = Settings.model_validate({"cluster": {"gpu": False}})
    job = _Job(
        data,
        make_manifest(data),
        {0: {n: as_member(c) for n, c in tiny_checkpoints.items()}},
        settings,
        Ledger(str(tmp_path / "out")),
        "t",
    )
    on_cpu, on_gpu = (job.plan(layout(settings.label, 1, gpus, 2, 2)) for gpus in (0, 1))
    assert (on_cpu.device, on_gpu.device) == ("cpu", "cuda")
    labeller = Labeller(on_cpu)
    assert labeller(blocks(data, 2)[0])["errors"].to_pylist() == [0]
    assert {p.predictor.device.type for p in labeller.members.values()} == {"cpu"}
    with pytest.raises((AssertionError, RuntimeError)):
        Labeller(on_gpu)


@pytest.mark.parametrize(
    ("failed", "seen", "total", "stops"),
    [
        (0, 1000, 1000, False),
        (10, 10, 1000, False),
        (101, 101, 1000, True),
        (40, 499, 1000, False),
        (60, 500, 1000, True),
        (50, 500, 1000, False),
        (1, 1, 5, True),
    ],
)
def test_too_many_errors_stop_a_job_early_but_not_too_early(tmp_path, failed, seen, total, stops):
    data = dataset(tmp_path, ["a.jpg"])
    ledger = Ledger(str(tmp_path / "out"))
    job = _Job(data, make_manifest(data), {0: {}}, Settings(label=LabelSettings(max_error_share=0.1)), ledger, "t")
    if stops:
        with pytest.raises(UserError, match=rf"{failed} of {seen} images cannot be labelled.*max_error_share"):
            job._check_share(failed, seen, total)
    else:
        job._check_share(failed, seen, total)


def test_a_job_stops_when_its_money_or_gpu_hours_are_used_up(tmp_path):
    data = dataset(tmp_path, ["a.jpg"])
    ledger = Ledger(str(tmp_path / "out"))

    def check(**limits):
        label = LabelSettings(price_per_hour=2.0, **limits)
        job = _Job(data, make_manifest(data), {0: {}}, Settings(label=label), ledger, "t")
        # An earlier run of one hour, and one and a half hours now.
        job.cost.runs = [cost.Meter(9, 0, 0, 1.0, 2.0).entry() | {"gpu_hours": 1.0, "money": 2.0}]
        meter = cost.Meter(total=1000, done=100, errors=0, gpus_per_actor=1.0, price_per_hour=2.0)
        meter.add(report("a", 100, 1020.0, 1000 + 5400, 8.0))
        job._check_limits(meter)

    check()
    check(max_money=5.1, max_gpu_hours=2.6)
    with pytest.raises(UserError, match=r"label\.max_money: 5 is used up, 200 of 1000 images are labelled; what is done stays"):
        check(max_money=5.0)
    with pytest.raises(UserError, match=r"label\.max_gpu_hours: 2\.5 is used up"):
        check(max_gpu_hours=2.5)


def test_a_users_mistake_is_found_inside_an_actors_error():
    inner = UserError("s3://b/x: permission denied")
    try:
        try:
            raise inner
        except UserError as error:
            raise RuntimeError("task failed") from error
    except RuntimeError as error:
        found = inside(error, UserError)
    assert found is not None and str(found) == str(inner)
    assert inside(RuntimeError("ours"), UserError) is None


# ----------------------------------------------------------------------------------------------------------------- cost


def report(actor: str, images: int, ready: float, ended: float, busy: float, errors: int = 0) -> dict:
    row = {"part": "p", "actor": actor, "images": images, "errors": errors, "ready": ready, "ended": ended, "busy": busy}
    return row | {"created": ready - 20}


def test_speed_use_and_money():
    meter = cost.Meter(total=1000, done=100, errors=0, gpus_per_actor=1.0, price_per_hour=3.6, started=1000.0)
    assert meter.rate == 0 and meter.busy_share == 0 and "100/1000" in meter.line()
    meter.add(report("a", 100, 1020.0, 1030.0, 8.0))
    meter.add(report("a", 100, 1020.0, 1040.0, 10.0, errors=2))
    meter.add(report("b", 200, 1020.0, 1040.0, 20.0))
    assert meter.startup == pytest.approx(20.0)
    assert meter.rate == pytest.approx(20.0)
    assert meter.busy_share == pytest.approx(38 / 40)
    assert "500/1000 images  20.0/s  25 s left" in meter.line() and "money 0.08 spent, 0.05 to come" in meter.line()
    assert meter.actors == 2 and meter.hours == pytest.approx(80 / 3600)
    assert "2 errors" in meter.line()


def test_cost_of_several_runs_adds_up(tmp_path):
    path = str(tmp_path / "cost.json")
    for start in (0.0, 500.0):
        meter = cost.Meter(200, 0, 0, 0.0, 2.0, started=start)
        meter.add(report("a", 100, start + 10, start + 20, 9.0))
        content = cost.CostFile(path).write(meter)
    assert len(content["runs"]) == 2 == len(json.loads(Path(path).read_text())["runs"])
    assert content["images"] == 200 and content["images_per_second"] == pytest.approx(10.0)
    assert content["gpu_hours"] == 0 and content["actor_hours"] > 0
    assert content["money_per_1000_images"] == pytest.approx(content["money"] * 5, rel=1e-4)
    assert "per 1,000 images" in cost.line(content, True) and "money" not in cost.line(content, False)
    assert cost.summary([])["money_per_1000_images"] == 0

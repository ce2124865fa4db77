"""Whole imports: records, counts, files, archives, Ray, and the job."""

from __future__ import annotations

import io
import json
import stat
import subprocess
import sys
import tarfile
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from importer_samples import QUAD, SAMPLES, flat, image, pairs, text
from PIL import Image

from i3cl import geometry, storage
from i3cl.data.formats.coco import read_coco
from i3cl.data.formats.records import record_table
from i3cl.data.formats.rings import degenerate, repair
from i3cl.data.importers import archives, import_set
from i3cl.data.importers.import_set import import_dataset
from i3cl.errors import UserError

ROOT = Path(__file__).parents[3]


@pytest.mark.parametrize("name", SAMPLES)
@pytest.mark.parametrize("parquet", [False, True])
def test_every_set_becomes_a_file_that_reads_back(name, parquet, tmp_path):
    if name in ("synthtext", "synthtext_plain", "totaltext_mat"):
        pytest.importorskip("scipy.io", reason="scipy writes this sample")
    dataset, write = SAMPLES[name]
    write(tmp_path / "in")
    summary = import_dataset(dataset, str(tmp_path / "in"), str(tmp_path / "out"), parquet=parquet)
    back = read_coco(summary.annotations, summary.images_root)
    assert not back.problems
    assert len(back) == summary.images > 0
    assert sum(len(r.instances) for r in back.records) == summary.instances + summary.dont_care
    assert {r.source for r in back.records} == {dataset}
    assert [r.id for r in back.records] == list(range(1, len(back) + 1))
    assert {(r.width, r.height) for r in back.records} == {(160, 120)}


def test_the_counts_of_a_set_with_every_kind_of_fault(tmp_path):
    image(tmp_path / "in/images/img_1.jpg", (100, 50))
    rows = [
        (QUAD, "fine"),
        ([(10, 10), (40, 10), (10, 30), (40, 30)], "swapped"),
        ([(-5, 10), (40, 10), (40, 30), (-5, 30)], "clipped"),
        ([(10, 10), (10, 10), (40, 10), (40, 30)], "repeated"),
        ([(200, 10), (240, 10), (240, 30), (200, 30)], "outside"),
        ([(7, 7)] * 4, "degenerate"),
        (QUAD, "###"),
    ]
    text(tmp_path / "in/gt/gt_img_1.txt", "\n".join(f"{flat(ring)},{word}" for ring, word in rows))
    summary = import_dataset("icdar2015", str(tmp_path / "in"), str(tmp_path / "out"))
    assert (summary.images, summary.instances, summary.dont_care) == (1, 4, 1)
    assert (summary.repaired, summary.rejected) == (3, 2)
    assert summary.kinds == {"crossing": 1, "clipped": 1, "repeated": 1, "outside": 1, "degenerate": 1}
    listed = [json.loads(line) for line in Path(summary.problems).read_text().splitlines()]
    assert [(p["where"], p["kind"], p["left_out"]) for p in listed] == [
        ("images/img_1.jpg: instance 2", "crossing", False),
        ("images/img_1.jpg: instance 3", "clipped", False),
        ("images/img_1.jpg: instance 4", "repeated", False),
        ("images/img_1.jpg: instance 5", "outside", True),
        ("images/img_1.jpg: instance 6", "degenerate", True),
    ]
    (record,) = read_coco(summary.annotations, summary.images_root).records
    assert [i.text for i in record.instances] == ["fine", "swapped", "clipped", "repeated", "###"]
    assert geometry.polygon_area(record.instances[1].polygon) == 600
    assert "rejected     2" in summary.lines()


numbers = st.one_of(st.integers(-30, 130), st.floats(-1e6, 1e6, width=32))


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(numbers, numbers), min_size=1, max_size=16))
def test_a_repaired_ring_is_simple_and_inside(points):
    ring = np.array(points, np.float32)
    before = ring.copy()
    repaired, notes = repair(ring, 60, 100)
    np.testing.assert_array_equal(ring, before)
    if repaired is None:
        assert notes
        return
    assert not degenerate(repaired)
    assert (repaired.min(axis=0) >= 0).all()
    assert (repaired.max(axis=0) <= [100, 60]).all()
    assert notes or (repaired == ring).all()


def test_sizes_come_from_the_stored_pixels(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    (tmp_path / "in").mkdir()
    for name in ("a.jpg", "b.tif", "c.png"):
        Image.new("RGB", (30, 20)).save(tmp_path / "in" / name, exif=exif)
    # A wrong ending says nothing.
    Image.new("RGB", (30, 20)).save(tmp_path / "in/d.jpg", format="PNG")
    summary = import_dataset("folder", str(tmp_path / "in"), str(tmp_path / "out"))
    records = read_coco(summary.annotations, summary.images_root).records
    assert [(r.width, r.height) for r in records] == [(30, 20)] * 4


def test_a_broken_item_stops_or_is_listed(tmp_path):
    write = SAMPLES["icdar2015"][1]
    write(tmp_path / "in")
    image(tmp_path / "in/train_images/img_0.jpg")
    text(tmp_path / "in/train_gt/gt_img_0.txt", "1,2,3\n")
    image(tmp_path / "in/train_images/img_2.jpg")
    text(tmp_path / "in/train_gt/gt_img_2.txt", f"{flat(QUAD)},x\n")
    (tmp_path / "in/train_images/img_2.jpg").write_bytes(b"no image")
    with pytest.raises(UserError, match=r"gt_img_0\.txt: line 1: 3 fields.*--skip-bad"):
        import_dataset("icdar2015", str(tmp_path / "in"), str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()
    text(tmp_path / "in/train_gt/gt_img_3.txt", f"{flat(QUAD)},x\n")
    summary = import_dataset("icdar2015", str(tmp_path / "in"), str(tmp_path / "out"), skip_bad=True)
    assert (summary.images, summary.rejected, summary.kinds) == (1, 3, {"image": 3})
    (record,) = read_coco(summary.annotations, summary.images_root).records
    assert (record.id, record.file_name) == (3, "train_images/img_1.jpg")
    reasons = " ".join(json.loads(line)["message"] for line in Path(summary.problems).read_text().splitlines())
    assert "3 fields" in reasons
    assert "img_2.jpg: not an image" in reasons
    assert "/img_3.jpg: no such file" in reasons


@pytest.mark.parametrize("name", ["c:d.jpg", "c\\d.jpg", "~d.jpg", "c\nd.jpg", "c\udcffd.jpg"])
def test_a_name_that_no_reader_takes_is_left_out(name, tmp_path):
    image(tmp_path / "in/a b.JPG")
    image(tmp_path / "new.jpg")
    (tmp_path / "new.jpg").rename(tmp_path / "in" / name)
    with pytest.raises(UserError, match=r"file_name .*--skip-bad") as caught:
        import_dataset("folder", str(tmp_path / "in"), str(tmp_path / "out"))
    assert "\n" not in str(caught.value)
    summary = import_dataset("folder", str(tmp_path / "in"), str(tmp_path / "out"), skip_bad=True)
    assert (summary.images, summary.kinds) == (1, {"image": 1})
    (record,) = read_coco(summary.annotations, summary.images_root).records
    assert record.file_name == "a b.JPG"


@pytest.mark.parametrize("parquet", [False, True])
def test_images_keep_their_ids_when_a_folder_grows(tmp_path, parquet):
    def ids(*names):
        for name in names:
            image(tmp_path / "in" / name)
        summary = import_dataset("folder", str(tmp_path / "in"), str(tmp_path / "out"), parquet=parquet)
        found = read_coco(summary.annotations, summary.images_root).records
        return {record.file_name: record.id for record in found}, summary

    first, summary = ids("b.jpg", "d.jpg")
    assert first == {"b.jpg": 1, "d.jpg": 2} and summary.fresh is None
    second, summary = ids("a.jpg", "c.jpg")
    assert second == {"b.jpg": 1, "d.jpg": 2, "a.jpg": 3, "c.jpg": 4}
    assert "images       4, 2 of them new" in summary.lines()
    (tmp_path / "in/d.jpg").unlink()
    third, summary = ids("e.jpg")
    assert third == {"b.jpg": 1, "a.jpg": 3, "c.jpg": 4, "e.jpg": 5} and summary.fresh == 1
    assert ids()[1].fresh == 0


def test_what_a_walk_leaves_out_is_counted_and_named(tmp_path):
    for name in ("a.jpg", "b.jfif", "c.jpe", "d.gif", "e.avif"):
        path = tmp_path / "in" / name
        path.parent.mkdir(exist_ok=True)
        Image.new("RGB", (30, 20)).save(path, format={".gif": "GIF", ".avif": "AVIF"}.get(path.suffix, "JPEG"))
    (tmp_path / "in/._a.jpg").write_bytes(b"\0\5\26\7")
    (tmp_path / "in/__MACOSX").mkdir()
    (tmp_path / "in/__MACOSX/a.jpg").write_bytes(b"x")
    text(tmp_path / "in/f.CR3", "raw")
    text(tmp_path / "in/g.txt", "read me")
    summary = import_dataset("folder", str(tmp_path / "in"), str(tmp_path / "out"))
    assert summary.images == 5 and summary.passed_over == ["f.CR3", "g.txt"]
    assert "passed over  2 files: 1 .cr3 (f.CR3), 1 .txt (g.txt)" in summary.lines()
    listed = [json.loads(line) for line in Path(summary.problems).read_text().splitlines()]
    assert [(p["kind"], p["where"]) for p in listed] == [("passed over", "f.CR3"), ("passed over", "g.txt")]


def test_nothing_usable_is_an_error_and_not_an_empty_set(tmp_path):
    text(tmp_path / "in/gt_img_0.txt", "1,2,3\n")
    with pytest.raises(UserError, match="no image of it can be used"):
        import_dataset("icdar2015", str(tmp_path / "in"), str(tmp_path / "out"), skip_bad=True)


def test_weak_labels_become_unlabelled_images_and_a_list_of_keywords(tmp_path):
    SAMPLES["lsvt_weak"][1](tmp_path / "in")
    summary = import_dataset("lsvt_weak", str(tmp_path / "in"), str(tmp_path / "out"))
    assert Path(summary.annotations).name == "unlabelled.json"
    assert json.loads(Path(summary.annotations).read_text())["info"]["labelled"] is False
    assert json.loads(Path(summary.keywords).read_text()) == {
        "file_name": "train_weak_images_0/gt_900.jpg",
        "keywords": ["永安药店"],
    }


def test_a_second_import_leaves_no_old_list_behind(tmp_path):
    text(tmp_path / "in/gt_img_0.txt", f"-5,1,20,1,20,9,-5,9,x\n{flat(QUAD)},y\n")
    image(tmp_path / "in/img_0.jpg")
    first = import_dataset("icdar2015", str(tmp_path / "in"), str(tmp_path / "out"))
    assert first.problems
    text(tmp_path / "in/gt_img_0.txt", f"{flat(QUAD)},x\n")
    second = import_dataset("icdar2015", str(tmp_path / "in"), str(tmp_path / "out"))
    assert second.problems is None
    assert not Path(first.problems).exists()


def test_ray_gives_what_this_process_gives(tmp_path, ray_cluster, monkeypatch):
    monkeypatch.setattr(import_set, "_BLOCK", 7)
    monkeypatch.setattr(import_set, "_CHUNK", 20)
    for number in range(30):
        image(tmp_path / f"in/img_{number}.jpg", (100 + number, 80))
        ring = QUAD if number % 5 else [(-9, 1), (20, 1), (20, 9), (-9, 9)]
        content = f"{flat(ring)},word {number}\n1,1,2,2,3,3,4,4,###\n" if number % 7 else "broken"
        text(tmp_path / f"in/gt_img_{number}.txt", content)
    # Not every name is text.
    (tmp_path / "in/img_29.jpg").rename(tmp_path / "in/img_29\udcff.jpg")
    (tmp_path / "in/gt_img_29.txt").rename(tmp_path / "in/gt_img_29\udcff.txt")
    results = []
    for through_ray in (False, True):
        summary = import_dataset(
            "icdar2015", str(tmp_path / "in"), str(tmp_path / "out"), parquet=True, skip_bad=True, through_ray=through_ray
        )
        table = record_table(read_coco(summary.annotations, summary.images_root).records, "")
        results.append((replace(summary), table, Path(summary.problems).read_text()))
    assert results[0] == results[1]
    assert results[0][0].images == 24
    assert len(storage.list_dir(results[0][0].annotations)) == 2


# ----------------------------------------------------------------------------------------------------- archives


def zipped(path: Path, members: dict[str, bytes], **attributes) -> str:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for name, data in members.items():
            info = zipfile.ZipInfo(name)
            info.compress_type = zipfile.ZIP_DEFLATED
            for key, value in attributes.items():
                setattr(info, key, value)
            file.writestr(info, data)
    return str(path)


def test_a_label_file_of_the_whole_set_takes_names_with_spaces_and_dots(tmp_path):
    image(tmp_path / "in" / "IMG 001.v2.jpg")
    entry = {"transcription": "A", "points": pairs(QUAD), "language": "Latin", "illegibility": False}
    text(tmp_path / "in" / "train_labels.json", json.dumps({"IMG 001.v2": [entry]}))
    summary = import_dataset("art", str(tmp_path / "in"), str(tmp_path / "out"))
    (record,) = read_coco(summary.annotations, summary.images_root).records
    assert record.file_name == "IMG 001.v2.jpg" and len(record.instances) == 1


@pytest.mark.parametrize("ending", ["zip", "tar.gz"])
def test_an_archive_of_a_source_is_unpacked_beside_the_result(ending, tmp_path):
    SAMPLES["icdar2015"][1](tmp_path / "in")
    archive = tmp_path / f"download.{ending}"
    if ending == "zip":
        with zipfile.ZipFile(archive, "w") as file:
            for path in (tmp_path / "in").rglob("*"):
                file.write(path, path.relative_to(tmp_path / "in"))
    else:
        with tarfile.open(archive, "w:gz") as tar:
            tar.add(tmp_path / "in", ".")
    summary = import_dataset("icdar2015", str(archive), str(tmp_path / "out"))
    assert len(read_coco(summary.annotations, summary.images_root)) == 1
    assert summary.images_root.startswith(str(tmp_path / "out"))


@pytest.mark.parametrize("name", ["../x", "/etc/x", "a/../../x", "a\\..\\x", "c:x", "a//x", "a\nb"])
def test_a_name_that_leaves_the_folder_is_refused(name, tmp_path):
    archive = zipped(tmp_path / "a.zip", {"fine.txt": b"1", name: b"2"})
    with pytest.raises(UserError, match="may leave the folder"):
        archives.unpack(archive, str(tmp_path / "out/source"))
    assert not (tmp_path / "out/source").exists()
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["a.zip", "out"]


def test_links_and_damage_are_refused(tmp_path):
    link = zipped(tmp_path / "link.zip", {"a": b"/etc/passwd"}, external_attr=(stat.S_IFLNK | 0o777) << 16)
    damaged = tmp_path / "damaged.zip"
    damaged.write_bytes(Path(zipped(tmp_path / "fine.zip", {"a": b"x" * 10_000})).read_bytes()[:60])
    tar = tmp_path / "link.tar"
    with tarfile.open(tar, "w") as file:
        info = tarfile.TarInfo("a")
        info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"
        file.addfile(info)
    cut = tmp_path / "cut.tgz"
    with tarfile.open(cut, "w:gz") as file:
        info = tarfile.TarInfo("a")
        info.size = 100_000
        file.addfile(info, io.BytesIO(np.random.default_rng(0).bytes(100_000)))
    cut.write_bytes(cut.read_bytes()[:50_000])
    for archive, words in ((link, "is a link"), (damaged, "cannot be unpacked"), (tar, "is a link"), (cut, "cannot be unpacked")):
        with pytest.raises(UserError, match=words):
            archives.unpack(str(archive), str(tmp_path / "out"))
        assert not (tmp_path / "out").exists()


def test_a_bomb_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(archives, "_FREE_OF_RATIO", 1 << 20)
    archive = zipped(tmp_path / "bomb.zip", {"a": bytes(40 << 20)})
    with pytest.raises(UserError, match="unpacks to more than"):
        archives.unpack(archive, str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------------------------------------------------- the job


def test_the_job_prints_a_table_or_one_line(tmp_path):
    SAMPLES["art"][1](tmp_path / "in")
    command = [sys.executable, "jobs/prepare.py", "import", "art", "--source", str(tmp_path / "in"), "--out", str(tmp_path / "o")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "images       2\ninstances    1\ndon't care   1\n" in done.stdout
    (tmp_path / "in/train_labels.json").write_text("{")
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert "train_labels.json: line 1 column 2: not valid JSON" in done.stderr

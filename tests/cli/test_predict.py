"""`predict`: every image keeps its own result, a stopped run continues, and nothing is left out silently."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest

from i3cl.cli import predict

ROOT = Path(__file__).parents[2]


@pytest.fixture
def call(tiny_checkpoints, monkeypatch, capsys):
    """Runs predict on paths in this process: (status, stdout, stderr)."""

    def run(*images: str | Path, out: Path, score: str = "0") -> tuple[int, str, str]:
        argv = ["predict.py", "--checkpoint", tiny_checkpoints["a"], "--images", *map(str, images), "--out", str(out)]
        monkeypatch.setattr(sys, "argv", [*argv, "--score", score])
        status = 0
        try:
            predict.main()
        except SystemExit as end:
            status = int(end.code or 0)
        return status, *capsys.readouterr()

    return run


def copies(tiny_set: Path, folder: Path, *names: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for index, name in enumerate(names):
        shutil.copy(tiny_set / "images" / f"{index}.jpg", folder / name)
    return folder


def read(out: Path, name: str):
    return json.loads((out / name).read_text())


def test_images_of_equal_numbers_and_equal_names_keep_apart(call, tiny_set, tmp_path):
    one = copies(tiny_set, tmp_path / "a", "IMG_0001.jpg", "shop 1.jpg", "Photo 2024-03-01 at 10.22.33 (1).jpeg")
    two = copies(tiny_set, tmp_path / "b", "IMG_0001.jpg")
    out = tmp_path / "out"
    assert call(one, two, one / "shop 1.jpg", out=out)[0] == 0
    names = {"a/IMG_0001.jpg", "a/shop 1.jpg", "a/Photo 2024-03-01 at 10.22.33 (1).jpeg", "b/IMG_0001.jpg"}
    assert set(read(out, "art.json")) == names
    images = {image["id"]: image["file_name"] for image in read(out, "images.json")}
    assert set(images.values()) == names and len(images) == 4
    counts = {name: 0 for name in names}
    for found in read(out, "coco.json"):
        counts[images[found["image_id"]]] += 1
    assert counts == dict.fromkeys(names, 4), "the tiny network finds four texts in every image"
    assert len([p for p in (out / "pictures").rglob("*") if p.is_file()]) == 4


def test_names_of_art_give_its_numbers(call, tiny_set, tmp_path):
    folder = copies(tiny_set, tmp_path / "images", "gt_7.jpg", "res_12.png", "30.jpg")
    assert call(folder, out=tmp_path / "out")[0] == 0
    assert set(read(tmp_path / "out", "art.json")) == {"res_7", "res_12", "res_30"}
    assert {found["image_id"] for found in read(tmp_path / "out", "coco.json")} == {7, 12, 30}


@pytest.mark.parametrize(
    ("names", "numbers"),
    [
        (["gt_1.jpg", "gt_2.jpg"], [1, 2]),
        (["a/gt_1.jpg", "b/gt_1.jpg"], None),  # two folders: whole names
        (["gt_1.jpg", "IMG_2.jpg"], None),
        (["shop 1.jpg"], None),
    ],
)
def test_numbers_come_from_names_of_art_only(names, numbers):
    assert predict.art_numbers([f"/data/{name}" for name in names], names) == numbers


def test_two_images_of_one_number_are_an_error_that_names_both(call, tiny_set, tmp_path):
    folder = copies(tiny_set, tmp_path / "images", "gt_1.jpg", "res_1.jpg")
    status, _, error = call(folder, out=tmp_path / "out")
    assert status == 2 and len(error.splitlines()) == 1
    assert "gt_1.jpg" in error and "res_1.jpg" in error


def test_pictures_of_equal_stems_keep_apart():
    assert predict.picture_names(["a.jpg", "a.png", "b.png"]) == ["a.jpg.jpg", "a.png.jpg", "b.jpg"]


def test_unusual_endings_are_read_and_what_is_left_out_is_named(call, tiny_set, tmp_path):
    from PIL import Image, features

    folder = copies(tiny_set, tmp_path / "photos", "a.jfif", "b.jpe", "c.JPG", "._c.jpg")
    Image.open(folder / "a.jfif").save(folder / "d.gif")
    (folder / "notes.txt").write_text("x")
    (folder / "sub").mkdir()
    expected = {"a.jfif", "b.jpe", "c.JPG", "d.gif"}
    if features.check("avif"):
        Image.open(folder / "a.jfif").save(folder / "e.avif")
        expected.add("e.avif")
    status, printed, _ = call(folder, out=tmp_path / "out")
    assert status == 0 and set(read(tmp_path / "out", "art.json")) == expected
    assert "left out 2" in printed and "notes.txt" in printed and "._c.jpg" in printed and "sub" in printed


def test_an_image_that_cannot_be_read_is_one_line(call, tiny_set, tmp_path):
    folder = copies(tiny_set, tmp_path / "photos", "a.jpg", "b.jpg")
    (folder / "b.jpg").write_bytes(b"\xff\xd8\xff garbage")
    status, printed, _ = call(folder, out=tmp_path / "out")
    assert status == 0 and printed.count("skipped") == 1 and "b.jpg" in printed and "1 images" in printed


def test_a_name_that_is_not_utf8_is_printed_escaped_and_its_result_written(tiny_checkpoints, tiny_set, tmp_path):
    folder = copies(tiny_set, tmp_path / "photos", "a.jpg")
    shutil.copy(folder / "a.jpg", os.fsdecode(os.fsencode(folder) + b"/z\xe9.jpg"))
    command = [sys.executable, str(ROOT / "jobs" / "predict.py"), "--checkpoint", tiny_checkpoints["a"], "--score", "0"]
    done = subprocess.run(
        [*command, "--images", str(folder), "--out", str(tmp_path / "out")],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONIOENCODING": "utf-8:strict", "LC_ALL": "C.UTF-8"},
    )
    assert done.returncode == 0, done.stderr
    assert "z\\udce9.jpg: 4 texts" in done.stdout
    assert set(read(tmp_path / "out", "art.json")) == {"a.jpg", "z\udce9.jpg"}


def test_a_finished_folder_is_not_predicted_again_and_a_new_image_is(call, tiny_set, tmp_path):
    folder = copies(tiny_set, tmp_path / "photos", "a.jpg", "b.jpg")
    assert call(folder, out=tmp_path / "out")[0] == 0
    before = (tmp_path / "out" / "coco.json").read_text()
    copies(tiny_set, folder, "c.jpg")
    status, printed, _ = call(folder, out=tmp_path / "out")
    assert status == 0 and "2 of 3 images have their result" in printed
    assert "3/3 c.jpg" in printed and "a.jpg:" not in printed
    assert before[1:-1] in (tmp_path / "out" / "coco.json").read_text()


def test_results_of_other_settings_are_not_mixed(call, tiny_set, tmp_path):
    folder = copies(tiny_set, tmp_path / "photos", "a.jpg")
    assert call(folder, out=tmp_path / "out")[0] == 0
    status, _, error = call(folder, out=tmp_path / "out", score="0.9")
    assert status == 2 and "another score" in error


@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_a_stopped_run_continues(tiny_checkpoints, tiny_set, tmp_path, number):
    folder, out = tmp_path / "photos", tmp_path / "out"
    folder.mkdir()
    for index in range(40):
        os.link(tiny_set / "images" / f"{index % 12}.jpg", folder / f"photo {index:02}.jpg")
    command = [sys.executable, str(ROOT / "jobs" / "predict.py"), "--checkpoint", tiny_checkpoints["a"], "--score", "0"]
    command += ["--images", str(folder), "--out", str(out)]
    with open(tmp_path / "log", "w") as log:
        # A test run in the background of a shell ignores SIGINT, and its children would too.
        restore = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, preexec_fn=restore)
    deadline = time.monotonic() + 400
    while "3/40" not in (tmp_path / "log").read_text():
        assert process.poll() is None and time.monotonic() < deadline, (tmp_path / "log").read_text()
        time.sleep(0.02)
    process.send_signal(number)
    assert process.wait(120) == 130
    assert "interrupted; the same command continues where it stopped" in (tmp_path / "log").read_text()
    stored = sum(len(part.read_text().splitlines()) for part in (out / "parts").glob("*.jsonl"))
    assert 3 <= stored < 40
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"{stored} of 40 images have their result" in done.stdout
    assert done.stdout.count(" texts\n") == 40 - stored
    assert len(read(out, "art.json")) == 40


def test_pipes_are_left_out_and_named(call, tiny_set, tmp_path):
    images = copies(tiny_set, tmp_path / "a", "x.jpg")
    os.mkfifo(images / "pipe.jpg")
    (images / "loop.jpg").symlink_to("loop.jpg")
    status, printed, _ = call(images, out=tmp_path / "out")
    assert status == 0 and set(read(tmp_path / "out", "art.json")) == {"x.jpg"}
    assert "left out 1 pipes, sockets or devices: pipe.jpg" in printed and "loop.jpg: symbolic links form a loop" in printed


def test_no_readable_image_is_a_mistake(call, tmp_path):
    (tmp_path / "x.jpg").write_text("<html>")
    status, _, said = call(tmp_path / "x.jpg", out=tmp_path / "out")
    assert status == 2 and "x.jpg: not an image in a known format" in said


@pytest.mark.parametrize("score", ["nan", "inf", "-1", "1.5"])
def test_scores_out_of_range_are_refused(call, tiny_set, tmp_path, score):
    status, _, said = call(tiny_set / "images" / "0.jpg", out=tmp_path / "out", score=score)
    assert status == 2 and f"--score {score}: give a number from 0 to 1" in said


def test_every_image_has_a_picture_of_its_own():
    names = ["a.jpg", "a.png", "a.jpg.jpg", "b.jpg", "b.jpg.png", "c.jpg"]
    assert len(set(predict.picture_names(names))) == 6 and predict.picture_names(["x/c.png"]) == ["x/c.jpg"]


@pytest.mark.parametrize(("name", "content"), [("job.json", "{"), ("000000.jsonl", '{"file": 1')])
def test_damaged_results_of_an_earlier_run_are_named(call, tiny_set, tmp_path, name, content):
    (tmp_path / "out/parts").mkdir(parents=True)
    (tmp_path / "out/parts" / name).write_text(content)
    status, _, said = call(tiny_set / "images" / "0.jpg", out=tmp_path / "out")
    assert status == 2 and f"{name}: is damaged or was not written by predict" in said


def test_an_empty_option_is_refused(call, tmp_path):
    status, _, said = call("", out=tmp_path / "out")
    assert status == 2 and "argument --images: is empty" in said

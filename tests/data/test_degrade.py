from __future__ import annotations

import json
from pathlib import Path

import cv2
import numpy as np
import pytest

from i3cl.data.formats.coco import read_coco, write_coco
from i3cl.data.formats.records import ImageRecord, Instance
from i3cl.data.synthetic.plain import make_image
from i3cl.data.tools.degrade import degrade, write_degraded
from i3cl.errors import UserError

KINDS = ("light", "noise", "sig")


@pytest.fixture
def labelled(tmp_path):
    records = []
    for index in range(3):
        made = make_image(index, 0, 96)
        name = ("a.jpg", "deep/b.png", "c.jpeg")[index]
        path = tmp_path / "images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        assert cv2.imwrite(str(path), made.image[:, :, ::-1])
        records.append(ImageRecord(index + 1, name, 96, 96, tuple(Instance(p, lossweight=0.5) for p in made.polygons)))
    write_coco(str(tmp_path / "set.json"), records)
    return read_coco(str(tmp_path / "set.json"), str(tmp_path / "images"))


@pytest.mark.parametrize("kind", KINDS)
def test_a_copy_depends_on_its_seed_alone_and_keeps_its_size(kind):
    image = make_image(0, 0, 128).image
    before = image.copy()
    first, again, other = (degrade(image, kind, seed) for seed in ((1, 2), (1, 2), (1, 3)))
    assert first.shape == image.shape and first.dtype == np.uint8
    assert np.array_equal(image, before), "the picture handed in is left alone"
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)
    assert np.abs(first.astype(int) - image).mean() > 1


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(1, 1), (1, 70), (3, 2), (33, 17)])
def test_any_size_works(kind, shape):
    image = np.full((*shape, 3), 200, np.uint8)
    assert degrade(image, kind, (0,)).shape == image.shape


def test_sigmoid_keeps_the_order_of_brightness():
    ramp = np.repeat(np.arange(256, dtype=np.uint8)[None, :, None], 3, axis=2)
    for seed in range(10):
        assert (np.diff(degrade(ramp, "sig", (seed,))[0, :, 0].astype(int)) >= 0).all()


@pytest.mark.parametrize(
    ("image", "kind"),
    [(np.zeros((4, 4), np.uint8), "sig"), (np.zeros((4, 4, 3)), "sig"), (np.zeros((0, 4, 3), np.uint8), "light")],
)
def test_no_picture_no_copy(image, kind):
    with pytest.raises(ValueError, match="uint8"):
        degrade(image, kind, (0,))


def test_unknown_kind():
    with pytest.raises(ValueError, match="light, noise or sig"):
        degrade(np.zeros((4, 4, 3), np.uint8), "fog", (0,))  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", KINDS)
def test_a_set_keeps_names_and_polygons(kind, labelled, tmp_path):
    out = tmp_path / "out"
    made = read_coco(write_degraded(kind, labelled, str(out)), str(out / "images"))
    assert [r.file_name for r in made.records] == ["a.jpg", "deep/b.png", "c.jpeg"]
    for old, new in zip(labelled.records, made.records, strict=True):
        assert [i.lossweight for i in new.instances] == [0.5] * len(old.instances)
        for a, b in zip(old.instances, new.instances, strict=True):
            assert np.array_equal(a.polygon, b.polygon)


def test_an_interrupted_set_continues(labelled, tmp_path):
    out = tmp_path / "out"
    write_degraded("noise", labelled, str(out))
    files = {name: (out / "images" / name).read_bytes() for name in ("a.jpg", "deep/b.png", "c.jpeg")}
    (out / "set.json").unlink()
    (out / "images" / "a.jpg").unlink()
    stamp = (out / "images" / "c.jpeg").stat().st_mtime_ns
    write_degraded("noise", labelled, str(out))
    assert (out / "images" / "c.jpeg").stat().st_mtime_ns == stamp, "what is there is not made again"
    assert {name: (out / "images" / name).read_bytes() for name in files} == files


def test_another_kind_in_the_same_folder_is_refused(labelled, tmp_path):
    write_degraded("sig", labelled, str(tmp_path / "out"))
    with pytest.raises(UserError, match="other degraded copies"):
        write_degraded("light", labelled, str(tmp_path / "out"))


def test_a_broken_image_is_named_or_left_out(labelled, tmp_path, caplog):
    caplog.set_level("INFO", "i3cl")
    (tmp_path / "images" / "a.jpg").write_bytes(b"no image")
    with pytest.raises(UserError, match=r"a\.jpg.*skip-bad"):
        write_degraded("sig", labelled, str(tmp_path / "out"))
    assert not (tmp_path / "out" / "set.json").exists()
    done = write_degraded("sig", labelled, str(tmp_path / "out"), skip_bad=True)
    assert [i["file_name"] for i in json.loads(Path(done).read_text())["images"]] == ["deep/b.png", "c.jpeg"]
    assert "a.jpg" in caplog.text


def test_a_seed_below_zero_is_named(labelled, tmp_path):
    with pytest.raises(UserError, match="--seed -1"):
        write_degraded("light", labelled, str(tmp_path / "out"), -1)


def test_an_ending_that_cannot_be_written_is_named(labelled, tmp_path):
    record = ImageRecord(9, "d.gif", 4, 4)
    mixed = type(labelled)("x", labelled.images_root, [record, *labelled.records])
    with pytest.raises(UserError, match=r"d\.gif.*--skip-bad"):
        write_degraded("sig", mixed, str(tmp_path / "out"))
    done = write_degraded("sig", mixed, str(tmp_path / "out"), skip_bad=True)
    assert [i["file_name"] for i in json.loads(Path(done).read_text())["images"]] == [r.file_name for r in labelled.records]

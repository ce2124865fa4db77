"""data.exif: pixels as stored or upright, and the same choice in every place that opens an image file."""

from __future__ import annotations

import ast
import io
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import ExifTags, Image, ImageOps

import i3cl
from i3cl.config import Settings, with_overrides
from i3cl.data.formats.coco import read_coco, write_coco
from i3cl.data.formats.predictions import member_predictions
from i3cl.data.formats.records import ImageRecord, Instance
from i3cl.data.importers.import_set import import_dataset
from i3cl.data.loading.images import decode_image, image_size
from i3cl.data.loading.ingest import mix, training_batches
from i3cl.data.tools.degrade import write_degraded
from i3cl.errors import UserError
from i3cl.inference.predictor import Predictor
from i3cl.report.sheet import contact_sheet

ROOT = Path(__file__).parents[2]
RED, GREEN, BLUE, GREY = (220, 30, 30), (30, 200, 30), (30, 30, 220), (128, 128, 128)
BACK = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}
"""Orientation -> what a camera does to the upright picture before it stores it."""
NOT_TURNED = {
    (
        "data/synthetic/backgrounds.py",
        "decode_image",
    ): "a background has no polygons, and a recipe must give the same set as before",
    ("data/tools/degrade.py", "decode_image"): "decodes bytes that were encoded in memory, without EXIF data",
    ("data/loading/any_image.py", "to_rgb"): "turns an array, which has no EXIF data, into RGB",
}
"""(file, function) of calls that may leave out `upright`, one for each entry -> why."""


def corners() -> Image.Image:
    """Upright, 48 x 32: red, green / blue, grey corners of 16 pixels on white."""
    pixels = np.full((32, 48, 3), 255, np.uint8)
    pixels[:16, :16], pixels[:16, -16:], pixels[-16:, :16], pixels[-16:, -16:] = RED, GREEN, BLUE, GREY
    return Image.fromarray(pixels)


def stored(picture: Image.Image, orientation: int, kind: str, **options) -> bytes:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    buffer = io.BytesIO()
    turned = picture.transpose(BACK[orientation]) if orientation in BACK else picture
    turned.save(buffer, kind, exif=exif, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_becomes_upright(orientation, kind, tmp_path):
    options = {"PNG": {}, "TIFF": {}, "JPEG": {"quality": 95}, "WEBP": {"lossless": True}}[kind]
    data = stored(corners(), orientation, kind, **options)
    (tmp_path / "a").write_bytes(data)
    upright = decode_image(data, upright=True)
    assert upright.shape == (32, 48, 3) and upright.flags.c_contiguous and upright.flags.writeable
    for (row, column), colour in zip([(8, 8), (8, 40), (24, 8), (24, 40)], [RED, GREEN, BLUE, GREY], strict=True):
        assert np.abs(upright[row, column].astype(int) - colour).max() < 12
    assert image_size(str(tmp_path / "a"), upright=True) == (32, 48)
    sideways = (48, 32) if orientation >= 5 else (32, 48)
    assert decode_image(data).shape[:2] == image_size(str(tmp_path / "a")) == sideways
    with Image.open(io.BytesIO(data)) as image:
        np.testing.assert_array_equal(i3cl_rgb(image), upright if kind != "JPEG" else i3cl_rgb(image))
        assert i3cl_rgb(image).shape == upright.shape


def i3cl_rgb(image: Image.Image) -> np.ndarray:
    from i3cl.data.loading.any_image import as_rgb

    return as_rgb(image, upright=True)


def test_an_impossible_or_broken_orientation_leaves_the_pixels_alone():
    for exif in (b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x63\0\0\0\0\0\0", b"Exif\0\0broken"):
        buffer = io.BytesIO()
        corners().save(buffer, "JPEG", exif=exif)
        assert decode_image(buffer.getvalue(), upright=True).shape == (32, 48, 3)
    assert ImageOps.exif_transpose(corners()).size == (48, 32)


# ------------------------------------------------------------------------------------------------------- round trip


@pytest.fixture(scope="module")
def sets(tmp_path_factory, tiny_set):
    """The same eight upright pictures with the same polygons twice: stored in eight orientations, and stored upright."""
    folder = tmp_path_factory.mktemp("exif")
    source = read_coco(str(tiny_set / "set.json"), str(tiny_set / "images")).records
    for name in ("turned", "plain"):
        (folder / name).mkdir()
    records = []
    for orientation in range(1, 9):
        record = source[orientation]
        with Image.open(tiny_set / "images" / record.file_name) as file:
            picture = file.crop((0, 0, 96, 64))
        name = f"{orientation}.png"
        (folder / "turned" / name).write_bytes(stored(picture, orientation, "PNG"))
        picture.save(folder / "plain" / name)
        kept = [i for i in record.instances if i.polygon[:, 1].max() <= 64] or [Instance(np.float32([[5, 5], [60, 9], [60, 30]]))]
        records.append(ImageRecord(orientation, name, 64, 96, tuple(kept)))
    write_coco(str(folder / "set.json"), records)
    return folder


def recipe(settings: Settings, sets: Path, images: str, exif: str | None, storage: Path, **changes) -> Settings:
    source = {"annotations": str(sets / "set.json"), "images": str(sets / images)}
    own = {"data.train": [source], "data.validation": source, "label.source": source, "storage": str(storage), "name": images}
    own |= {} if exif is None else {"data.exif": exif}
    return with_overrides(settings, {**own, **changes}, "test")


BOTH = (("turned", "upright"), ("plain", "stored"))


@pytest.mark.parametrize("ray_data", [False, True])
def test_training_sees_the_same_pixels_and_polygons(sets, tiny_settings, tmp_path, ray_cluster, ray_data):
    seen = []
    for images, exif in BOTH:
        data = recipe(tiny_settings, sets, images, exif, tmp_path, **{"data.ray_data": ray_data}).data
        batches = training_batches(mix(data.train, ""), data, steps=range(4), batch=2, shares=[0], of=1, seed=3)
        seen.append([image for batch in batches for image in batch])
    assert len(seen[0]) == 8
    for one, other in zip(*seen, strict=True):
        np.testing.assert_array_equal(one.image, other.image)
        assert len(one.record.instances) == len(other.record.instances) > 0
        for a, b in zip(one.record.instances, other.record.instances, strict=True):
            np.testing.assert_array_equal(a.polygon, b.polygon)
    data = recipe(tiny_settings, sets, "turned", "stored", tmp_path, **{"data.ray_data": ray_data}).data
    with pytest.raises(UserError, match=r"\d.png: the image is 64 x 96 but .*data.exif=upright"):
        list(training_batches(mix(data.train, ""), data, steps=range(4), batch=2, shares=[0], of=1, seed=3))


@pytest.mark.slow
def test_validation_prediction_labelling_and_reports_agree(
    sets, tiny_settings, tiny_checkpoints, tmp_path, ray_cluster, monkeypatch
):
    from i3cl.cli import label, predict
    from i3cl.labelling.scoring import score_checkpoints

    upright_checkpoint = tmp_path / "checkpoint"
    upright_checkpoint.mkdir()
    for file in Path(tiny_checkpoints["a"]).iterdir():
        if file.is_file():
            text = file.read_bytes()
            changed = text.replace(b"exif: stored", b"exif: upright") if file.name == "settings.yaml" else text
            assert file.name != "settings.yaml" or changed != text
            (upright_checkpoint / file.name).write_bytes(changed)

    found, scores, boxes, submissions, pages = [], [], [], [], []
    for images, exif in BOTH:
        records = read_coco(str(sets / "set.json"), str(sets / images)).records
        # The checkpoint's own recipe says in which frame it was trained.
        checkpoint = str(upright_checkpoint) if exif == "upright" else tiny_checkpoints["a"]
        own = Predictor.load(checkpoint, "cpu")
        found.append({r.file_name: d for r, d in own.detect_records(records, str(sets / images))})
        paths = [str(sets / images / r.file_name) for r in records]
        boxes.append(i3cl.detect(i3cl.load(checkpoint, "cpu"), paths, 0.0))
        explicit = i3cl.detect(i3cl.load(tiny_checkpoints["a"], "cpu"), paths, 0.0, upright=exif == "upright")
        assert [d.width for d in explicit] == [96] * 8
        # Without data.exif, labelling takes the checkpoint's own.
        given = recipe(tiny_settings, sets, images, None if exif == "upright" else exif, tmp_path)
        measured = score_checkpoints(given_truth(sets, images), {"m": checkpoint}, given, str(tmp_path / images / "v"), "test")
        assert json.loads((tmp_path / images / "v" / "job.json").read_text())["data.exif"] == exif
        scores.append(measured.members["m"].score)
        polygons = member_predictions(str(tmp_path / images / "v"), "m")
        submissions.append([polygons[r.id][0] for r in records])
        monkeypatch.setattr(
            sys,
            "argv",
            ["i3cl", "--checkpoint", checkpoint, "--images", *paths, "--out", str(tmp_path / f"p-{images}"), "--score", "0"],
        )
        predict.main()
        report = ["trust", "--predictions", str(tmp_path / images / "v"), "--out", str(tmp_path / f"t-{images}"), "--truth"]
        monkeypatch.setattr(sys, "argv", ["i3cl", *report, str(sets / "set.json"), "--images", str(sets / images)])
        label.main()
        pages.append((tmp_path / f"t-{images}" / "report.html").read_text())
    for name, one in found[0].items():
        other = found[1][name]
        assert (one.height, one.width) == (other.height, other.width) == (64, 96)
        np.testing.assert_array_equal(one.scores, other.scores)
        assert len(one.polygons) > 0
        for a, b in zip(one.polygons, other.polygons, strict=True):
            np.testing.assert_array_equal(a, b)
    assert [d.to_coco(0) for d in boxes[0]] == [d.to_coco(0) for d in boxes[1]]
    assert scores[0] == scores[1]
    assert pages[0] == pages[1]
    for a, b in zip(*submissions, strict=True):
        np.testing.assert_array_equal(np.concatenate(a), np.concatenate(b))
    for name in ("coco.json", "images.json"):
        assert (tmp_path / "p-turned" / name).read_text() == (tmp_path / "p-plain" / name).read_text()
    for picture in (tmp_path / "p-turned" / "pictures").iterdir():
        assert picture.read_bytes() == (tmp_path / "p-plain" / "pictures" / picture.name).read_bytes()
    with pytest.raises(UserError, match=r"different values \(a stored, b upright\)"):
        settings = recipe(tiny_settings, sets, "turned", None, tmp_path)
        members = {"a": tiny_checkpoints["a"], "b": str(upright_checkpoint)}
        score_checkpoints(given_truth(sets, "turned"), members, settings, str(tmp_path / "mixed"), "test")
    # The same folders, asked for the other frame.
    argv = [
        "i3cl",
        "--checkpoint",
        str(upright_checkpoint),
        "--images",
        *paths,
        "--out",
        str(tmp_path / "p-turned"),
        "--score",
        "0",
    ]
    monkeypatch.setattr(sys, "argv", [*argv, "data.exif=stored"])
    with pytest.raises(SystemExit):
        predict.main()
    turned = recipe(tiny_settings, sets, "turned", "stored", tmp_path)
    with pytest.raises(UserError, match=r"data.exif: upright there, stored here"):
        score_checkpoints(given_truth(sets, "turned"), {"m": str(upright_checkpoint)}, turned, str(tmp_path / "turned/v"), "test")


def given_truth(sets: Path, images: str):
    return read_coco(str(sets / "set.json"), str(sets / images))


def test_tools_agree(sets, tmp_path):
    sheets, copies = [], []
    for images, exif in BOTH:
        dataset = read_coco(str(sets / "set.json"), str(sets / images))
        sheets.append(contact_sheet(dataset, 8, upright=exif == "upright"))
        made = write_degraded("noise", dataset, str(tmp_path / images), upright=exif == "upright")
        copies.append({p.name: p.read_bytes() for p in Path(made).parent.joinpath("images").iterdir()})
        summary = import_dataset("folder", str(sets / images), str(tmp_path / f"i-{images}"), upright=exif == "upright")
        assert {(r.height, r.width) for r in read_coco(summary.annotations, summary.images_root).records} == {(64, 96)}
    np.testing.assert_array_equal(*sheets)
    assert copies[0] == copies[1] and len(copies[0]) == 8
    through_ray = import_dataset("folder", str(sets / "turned"), str(tmp_path / "stored"))
    sizes = [(r.height, r.width) for r in read_coco(through_ray.annotations, through_ray.images_root).records]
    assert sizes == [(64, 96)] * 4 + [(96, 64)] * 4


# ------------------------------------------------------------------------------------------------------- no caller forgets


def test_every_caller_passes_the_frame_on():
    """Whoever calls a function that takes `upright` gives it, or stands in NOT_TURNED with a reason."""
    files = {path: ast.parse(path.read_text(encoding="utf-8")) for path in sorted((ROOT / "i3cl").rglob("*.py"))}
    takes = set()
    for tree in files.values():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef):
                names = [a.arg for a in [*node.args.args, *node.args.kwonlyargs]]
                if "upright" in [a.arg for a in node.args.kwonlyargs] and "self" not in names:
                    takes.add(node.name)
    assert {"decode_image", "image_size", "as_rgb", "to_rgb"} <= takes
    takes.discard("detect")  # its default, None, takes the model's own
    missing = []
    for path, tree in files.items():
        called = {}
        for node in ast.walk(tree):
            if isinstance(node, ast.Call):
                called[node.func] = node
        for node in ast.walk(tree):
            name = node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else None
            if name not in takes:
                continue
            call = called.get(node)
            # A function that is handed on, to map() say, is called where nothing gives the frame.
            if call is None or not any(keyword.arg == "upright" for keyword in call.keywords):
                missing.append((path.relative_to(ROOT / "i3cl").as_posix(), name))
    assert sorted(missing) == sorted(NOT_TURNED)

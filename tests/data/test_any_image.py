"""Whatever a caller calls an image becomes RGB, and anything else an error that says what it is."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from i3cl.data.loading.any_image import as_images, as_rgb
from i3cl.data.loading.endings import is_image, left_out
from i3cl.errors import UserError

RGB = np.random.default_rng(0).integers(0, 256, (20, 30, 3)).astype(np.uint8)
GREY = RGB[..., 0]


def png(array: np.ndarray) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(array).save(stream, "PNG")
    return stream.getvalue()


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (RGB, RGB),
        (RGB[:, ::-1], RGB[:, ::-1]),  # not contiguous
        (png(RGB), RGB),
        (bytearray(png(RGB)), RGB),
        (Image.fromarray(RGB), RGB),
        (Image.fromarray(GREY), np.stack([GREY] * 3, 2)),
        (GREY, np.stack([GREY] * 3, 2)),
        (GREY[..., None], np.stack([GREY] * 3, 2)),
        (np.dstack([RGB, np.full((20, 30), 255, np.uint8)]), RGB),
        (np.dstack([RGB, np.zeros((20, 30), np.uint8)]), np.full_like(RGB, 255)),  # transparent: white
        (RGB.astype(np.uint16) * 257, RGB),
        (RGB / 255, RGB),
        ((RGB / 255).astype(np.float32), RGB),
    ],
)
def test_an_image_becomes_rgb(given, expected):
    found = as_rgb(given)
    assert found.dtype == np.uint8 and found.flags.c_contiguous
    np.testing.assert_array_equal(found, expected)


def test_a_path_a_string_and_a_url_are_read(tmp_path):
    (tmp_path / "a.png").write_bytes(png(RGB))
    for given in (tmp_path / "a.png", str(tmp_path / "a.png"), f"file://{tmp_path}/a.png"):
        np.testing.assert_array_equal(as_rgb(given), RGB)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (3, ["type int", "a path or URL"]),
        (None, ["None"]),
        ({"a": 1}, ["dict"]),
        (np.zeros((3, 20, 30), np.uint8), ["(3, 20, 30)", "channels last"]),
        (np.zeros((20, 30, 2), np.uint8), ["(20, 30, 2)"]),
        (np.zeros((0, 30, 3), np.uint8), ["(0, 30, 3)"]),
        (np.zeros((20, 30, 3), np.int64), ["int64", "uint8"]),
        (RGB.astype(np.float32), ["float32", "values from 0 to 255", "float 0-1"]),
        (np.full((20, 30), np.nan), ["not finite"]),
        (np.array(["x"]), ["shape (1,)"]),
        (b"not an image", ["not an image in a known format"]),
        (b"", ["empty"]),
        ("nowhere.jpg", ["nowhere.jpg", "no such file"]),
        ("https://host/a.jpg", ["https://host/a.jpg", "s3://"]),
    ],
)
def test_anything_else_says_what_it_is_and_what_is_taken(given, words):
    with pytest.raises(UserError) as caught:
        for image in as_images(given):
            as_rgb(image)
    message = str(caught.value)
    assert "\n" not in message and all(word in message for word in words), message


@pytest.mark.parametrize(
    ("given", "count"),
    [
        ("a.jpg", 1),
        (Path("a.jpg"), 1),
        (b"bytes", 1),
        (Image.fromarray(RGB), 1),
        (RGB, 1),
        (GREY, 1),
        (np.stack([RGB, RGB]), 2),
        (["a.jpg", RGB], 2),
        ((path for path in "abc"), 3),
        ([], 0),
    ],
)
def test_one_image_or_several(given, count):
    assert len(list(as_images(given))) == count


def test_detect_takes_them_all(tiny_checkpoints, tiny_set):
    import i3cl

    path = tiny_set / "images" / "0.jpg"
    model = i3cl.load(Path(tiny_checkpoints["a"]))
    pixels = np.array(Image.open(path))
    expected = i3cl.detect(model, [str(path)], 0.0)[0]
    assert len(expected) == 4
    for given in (path, str(path), [path], path.parent.glob("0.jpg"), path.read_bytes(), Image.open(path), pixels, pixels / 255):
        found = i3cl.detect(model, given, 0.0)
        assert len(found) == 1
        np.testing.assert_allclose(found[0].scores, expected.scores, atol=0.02)
    with pytest.raises(UserError, match="checkpoint: got an object of type int"):
        i3cl.load(3)


def test_endings():
    assert all(map(is_image, ["a.JPG", "b.jfif", "c.jpe", "d.gif", "sub/e.tiff"]))
    assert not any(map(is_image, ["._a.jpg", "sub/._a.jpg", "a.txt", "jpg"]))
    assert left_out([]) == ""
    assert left_out(["a.txt", "b.heic"]) == (
        "left out 2 without the ending of an image: a.txt, b.heic; photographs in .heic are read once the package pillow-heif is "
        "installed"
    )


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"score_threshold": float("nan")}, "score_threshold: got nan"),
        ({"score_threshold": "0.5"}, "score_threshold: got '0.5'"),
        ({"batch": 0}, "batch: got 0"),
    ],
)
def test_detect_refuses_thresholds_and_batches_that_make_no_sense(options, words, tiny_checkpoints):
    import i3cl

    with pytest.raises(UserError, match=words):
        i3cl.detect(i3cl.load(tiny_checkpoints["a"]), [], **options)


def test_a_name_is_no_model_and_a_device_is_checked(tiny_checkpoints):
    import i3cl

    with pytest.raises(UserError, match="model: got an object of type str"):
        i3cl.detect("lite0-scene", [])
    with pytest.raises(UserError, match="device: got 'gpu'"):
        i3cl.load(tiny_checkpoints["a"], device="gpu")

import io
import struct
import zlib

import cv2
import numpy as np
import pytest
from PIL import ExifTags, Image

from i3cl.data.loading import images
from i3cl.data.loading.images import ImageError, decode_image
from i3cl.errors import UserError


def picture(height: int = 30, width: int = 40) -> np.ndarray:
    """Smooth colours, so that lossy formats stay near."""
    y, x = np.mgrid[:height, :width]
    return np.stack([x * 255 // width, y * 255 // height, 255 - x * 255 // width], axis=2).astype(np.uint8)


def encode(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


PICTURE = Image.fromarray(picture())
JPEG = encode(PICTURE, "JPEG", quality=95)


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "PPM"])
def test_lossless_formats_are_exact(kind):
    pixels = decode_image(encode(PICTURE, kind))
    assert pixels.dtype == np.uint8 and pixels.flags.writeable
    np.testing.assert_array_equal(pixels, picture())


@pytest.mark.parametrize(
    "data",
    [
        JPEG,
        encode(PICTURE, "JPEG", quality=95, progressive=True),
        encode(PICTURE.convert("CMYK"), "JPEG", quality=95),
        encode(PICTURE, "WEBP", quality=95),
        encode(PICTURE, "MPO", quality=95),
        JPEG + b"\0" * 20,
        JPEG + b"trailing bytes that some cameras write" * 9,
    ],
)
def test_lossy_formats_are_near(data):
    pixels = decode_image(data)
    assert pixels.shape == (30, 40, 3)
    assert np.abs(pixels.astype(int) - picture()).mean() < 6


def test_grey_becomes_rgb():
    grey = picture()[..., 0]
    for data in (encode(Image.fromarray(grey), "PNG"), encode(Image.fromarray(grey), "JPEG", quality=95)):
        pixels = decode_image(data)
        assert pixels.shape == (30, 40, 3) and (pixels[..., 0] == pixels[..., 2]).all()
        assert np.abs(pixels[..., 0].astype(int) - grey).mean() < 3


def test_16_bit_keeps_its_brightness():
    deep = picture()[..., 0].astype(np.uint16) * 257
    encoded, png = cv2.imencode(".png", deep)
    assert encoded
    np.testing.assert_array_equal(decode_image(png.tobytes())[..., 1], picture()[..., 0])
    np.testing.assert_array_equal(decode_image(encode(Image.fromarray(deep), "TIFF"))[..., 1], picture()[..., 0])
    encoded, png = cv2.imencode(".png", picture()[..., ::-1].astype(np.uint16) * 257)
    assert encoded
    assert np.abs(decode_image(png.tobytes()).astype(int) - picture()).max() <= 1


def test_other_depths():
    grey = picture()[..., 0]
    for image in (
        Image.fromarray(grey.astype(np.int32)),
        Image.fromarray(grey.astype(np.float32)),
        Image.fromarray(grey.astype(np.float32) / 255),
    ):
        np.testing.assert_array_equal(decode_image(encode(image, "TIFF"))[..., 0], grey)
    black_and_white = decode_image(encode(Image.fromarray(grey > 100), "PNG"))
    np.testing.assert_array_equal(black_and_white[..., 0], (grey > 100) * 255)


def test_palette():
    palette = PICTURE.quantize(64)
    np.testing.assert_array_equal(decode_image(encode(palette, "PNG")), np.array(palette.convert("RGB")))


def test_transparency_lies_on_white():
    rgba = np.zeros((4, 4, 4), np.uint8)
    rgba[:2, :, 3] = 255
    rgba[2, :, 3] = 128
    pixels = decode_image(encode(Image.fromarray(rgba), "PNG"))
    assert (pixels[:2] == 0).all() and (pixels[3] == 255).all() and (abs(pixels[2].astype(int) - 127) <= 1).all()
    keyed = encode(Image.fromarray(np.zeros((4, 4), np.uint8)), "PNG", transparency=0)
    assert (decode_image(keyed) == 255).all()


def test_the_first_frame_of_an_animation():
    frames = [Image.new("RGB", (8, 6), colour) for colour in ("red", "blue")]
    for kind in ("GIF", "WEBP", "TIFF"):
        options = {"lossless": True} if kind == "WEBP" else {}
        data = encode(frames[0], kind, save_all=True, append_images=frames[1:], **options)
        np.testing.assert_array_equal(decode_image(data)[0, 0], [255, 0, 0])


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP"])
def test_pixels_come_as_stored(kind):
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[ExifTags.Base.Orientation] = orientation
        pixels = decode_image(encode(PICTURE, kind, exif=exif))
        assert pixels.shape == (30, 40, 3)
        assert np.abs(pixels.astype(int) - picture()).mean() < 6


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP"])
@pytest.mark.parametrize("keep", [0.5, 0.9])
def test_a_cut_off_file_is_refused(kind, keep):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8))
    data = encode(noise, kind)
    with pytest.raises(ImageError, match="cannot be decoded"):
        decode_image(data[: int(len(data) * keep)])


def test_a_cut_off_file_with_an_end_marker_in_its_thumbnail_is_refused():
    large = encode(Image.fromarray(picture(300, 400)), "JPEG", exif=b"Exif\0\0" + JPEG)
    assert decode_image(large).shape == (300, 400, 3)
    with pytest.raises(ImageError):
        decode_image(large[:-200])


def test_files(tmp_path):
    path = tmp_path / "a.jpg"
    path.write_bytes(JPEG)
    np.testing.assert_array_equal(decode_image(str(path)), decode_image(path))
    path.write_bytes(b"")
    with pytest.raises(ImageError, match=r"a\.jpg: the file is empty"):
        decode_image(str(path))
    path.write_bytes(b"<html>not found</html>" * 10)
    with pytest.raises(ImageError, match=r"a\.jpg: not an image in a known format"):
        decode_image(str(path))
    with pytest.raises(ImageError, match=r"none\.jpg: no such file"):
        decode_image(str(tmp_path / "none.jpg"))
    with pytest.raises(ImageError, match="is a folder"):
        decode_image(str(tmp_path))
    assert issubclass(ImageError, UserError)


def test_formats_that_start_programs_are_not_opened():
    with pytest.raises(ImageError, match="not an image in a known format"):
        decode_image(encode(PICTURE, "EPS"))


def test_too_many_pixels(tmp_path):
    with pytest.raises(ImageError, match="40 x 30 is more than 1000 pixels"):
        decode_image(JPEG, max_pixels=1000)
    # A small file whose header stands for 10 GB of pixels.
    header = b"IHDR" + struct.pack(">II", 60_000, 60_000) + b"\x08\x02\0\0\0"
    png = encode(PICTURE, "PNG")
    bomb = png[:12] + header + struct.pack(">I", zlib.crc32(header)) + png[33:]
    with pytest.raises(ImageError, match="3600000000 pixels"):
        decode_image(bomb)


def test_damage_anywhere_is_an_image_or_an_image_error():
    rng = np.random.default_rng(0)
    for kind in ("JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP", "PPM"):
        data = encode(PICTURE, kind)
        for _ in range(40):
            damaged = bytearray(data)
            for place in rng.integers(0, len(data), 3):
                damaged[place] = rng.integers(256)
            try:
                pixels = decode_image(bytes(damaged), max_pixels=10**7)
            except ImageError as error:
                assert "\n" not in str(error)
                continue
            assert pixels.dtype == np.uint8 and pixels.ndim == 3 and pixels.shape[2] == 3


def test_scale_is_the_smaller_ratio():
    assert images.test_scale(1000, 2000, 1185, 1950) == pytest.approx(0.975)
    assert images.test_scale(2000, 1000, 500, 5000) == pytest.approx(0.5)
    assert images.test_scale(100, 100, 200, 1000) == 2
    assert images.test_scale(100, 100, 200, 1000, upscale=False) == 1
    assert images.test_scale(400, 400, 200, 1000, upscale=False) == 0.5


def test_resize():
    image = picture(31, 41)
    assert images.resize(image, 1.0) is image
    for scale in (0.3, 0.7, 2.0):
        resized = images.resize(image, scale)
        assert resized.dtype == np.uint8
        assert resized.shape == (*images.scaled_size(31, 41, scale), 3) == (round(31 * scale), round(41 * scale), 3)
        # The same gradient at another size.
        assert abs(resized.astype(float).mean() - image.mean()) < 3
    assert images.resize(image, 0.001).shape == (1, 1, 3)


def test_shrinking_averages_what_it_covers():
    stripes = np.zeros((64, 64, 3), np.uint8)
    stripes[:, ::4] = 255
    shrunk = images.resize(stripes, 0.25)
    assert (abs(shrunk.astype(int) - 64) <= 1).all()

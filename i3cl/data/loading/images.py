"""Decoding image files of any kind into RGB, and resizing."""

from __future__ import annotations

import io
import logging
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, TiffImagePlugin

from i3cl.data.loading.endings import FORMATS as _FORMATS
from i3cl.errors import UserError

logger = logging.getLogger(__name__)

MAX_PIXELS = 178_956_970
"""Largest image that is decoded by default; the decoder itself refuses more."""
_UNDO = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}
"""EXIF orientation -> the operation that turns an upright image back into the stored one."""
_SIDEWAYS = (5, 6, 7, 8)
"""EXIF orientations in which width and height change places."""


class ImageError(UserError):
    """An image file that cannot be read; the message names it and says why."""


def check_size(name: str, found: tuple[int, ...], stated: tuple[int, int]) -> None:
    """ImageError unless an image's (height, width) in pixels is the one that its annotation states."""
    if tuple(found) != stated:
        turned = found[0] == stated[1] and found[1] == stated[0]
        hint = (
            " (turned: by an EXIF rotation?); set data.exif=upright if polygons are in the picture as viewers show it, "
            "data.exif=stored if they are in the pixels of the file, or correct the annotation"
        )
        raise ImageError(
            f"{name}: the image is {found[1]} x {found[0]} but its annotation says {stated[1]} x {stated[0]}"
            + (hint if turned else "; correct the annotation")
        )


def decode_image(source: str | Path | bytes, max_pixels: int = MAX_PIXELS, *, upright: bool = False) -> NDArray[np.uint8]:
    """(H, W, 3) uint8 RGB of an image file (local path, s3:// URL) or of its bytes.

    Grey, palette, CMYK and 16-bit images become 8-bit RGB, transparency is laid over white, and an animation gives its first
    frame.

    Args:
        source: the file, or its content.
        max_pixels: larger images are refused.
        upright: turn the picture as its EXIF orientation says, as viewers show it; otherwise pixels come as the file stores them.

    Raises:
        ImageError: the file is missing, empty, not an image, cut off, or has more than `max_pixels` pixels.
        AccessError: S3 refuses every request; that is not the image's fault.
        NoAnswer: S3 does not answer, as above.
    """
    if isinstance(source, bytes):
        name, data = "image", source
    else:
        # Here, so that bytes can be decoded where the libraries of S3 are not installed.
        from i3cl import storage

        name = str(source)
        try:
            data = storage.read_bytes(name)
        except storage.AccessError:
            raise
        except UserError as error:
            raise ImageError(str(error)) from error
    if not data:
        raise ImageError(f"{name}: the file is empty")
    try:
        with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
            if image.width * image.height > max_pixels:
                raise ImageError(f"{name}: {image.width} x {image.height} is more than {max_pixels} pixels")
            # The fast decoder does not report files that are cut off, so it only gets files that have their end.
            if image.format in ("JPEG", "MPO") and image.mode in ("RGB", "L") and _has_end(data):
                flags = cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION
                pixels = cv2.imdecode(np.frombuffer(data, np.uint8), flags)
                if pixels is not None and pixels.shape[:2] == (image.height, image.width):
                    stored = pixels.astype(np.uint8, copy=False)
                    return _turned(stored, _orientation(image)) if upright else stored
            return to_rgb(image, upright=upright)
    except ImageError:
        raise
    except Image.UnidentifiedImageError:
        raise ImageError(f"{name}: not an image in a known format ({', '.join(_FORMATS)})") from None
    except Exception as error:
        # Decoders raise nearly anything on broken files, and all of it means the same.
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ImageError(f"{name}: cannot be decoded ({reason})") from error


def image_size(path: str, max_pixels: int = MAX_PIXELS, *, upright: bool = False) -> tuple[int, int]:
    """Height and width in pixels of an image file (local path, s3:// URL), read from its header alone.

    The rest of the file may still be damaged.

    Args:
        path: of the file.
        max_pixels: larger images are refused.
        upright: the size of the picture turned as its EXIF orientation says, otherwise as the file stores it. PNG files may have
            their EXIF data at the end, so that the whole file is read.

    Raises:
        ImageError: the file is missing, not an image, or too large.
    """
    from i3cl import storage

    try:
        with storage.open_read(path) as file, Image.open(file, formats=_FORMATS) as image:
            width, height = image.size
            if isinstance(image, TiffImagePlugin.TiffImageFile):
                width, height = int(image.tag_v2[256]), int(image.tag_v2[257])
            if upright and 0 < width * height <= max_pixels and _orientation(image) in _SIDEWAYS:
                width, height = height, width
    except Image.UnidentifiedImageError:
        raise ImageError(f"{path}: not an image in a known format ({', '.join(_FORMATS)})") from None
    except (storage.AccessError, storage.NoAnswer):
        raise
    except UserError as error:
        raise ImageError(str(error)) from error
    except Exception as error:
        # As in decode_image: readers of headers raise nearly anything on broken files.
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ImageError(f"{path}: its header cannot be read ({reason})") from error
    if width < 1 or height < 1 or width * height > max_pixels:
        raise ImageError(f"{path}: {width} x {height}; expected 1 to {max_pixels} pixels")
    return height, width


def _has_end(data: bytes) -> bool:
    return data[-64:].rstrip(b"\0\r\n ").endswith(b"\xff\xd9")


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1-8; 1 where there is none or it makes no sense."""
    try:
        found = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:
        # Readers of EXIF data raise nearly anything on broken ones; viewers show such a picture as it is stored.
        logger.debug("EXIF data cannot be read", exc_info=True)
        return 1
    return found if isinstance(found, int) and 1 <= found <= 8 else 1


def _turned(pixels: NDArray[np.uint8], orientation: int) -> NDArray[np.uint8]:
    """Stored pixels (H, W, 3) as viewers show them."""
    if orientation in _SIDEWAYS:
        pixels = pixels.transpose(1, 0, 2)
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    return np.ascontiguousarray(pixels)


def to_rgb(image: Image.Image, *, upright: bool = False) -> NDArray[np.uint8]:
    """(H, W, 3) uint8 RGB of a Pillow image, in the frame that `decode_image` describes."""
    # Loading turns a TIFF upright and removes its orientation, which it does to no other format.
    tiff = image.format == "TIFF"
    before = _orientation(image) if tiff else 1
    image.load()
    if tiff:
        if not upright and before in _UNDO:
            image = image.transpose(_UNDO[before])
        return _rgb(image)
    return _turned(_rgb(image), _orientation(image)) if upright else _rgb(image)


def _rgb(image: Image.Image) -> NDArray[np.uint8]:
    if image.mode.startswith("I") or image.mode == "F":
        grey = np.asarray(image, dtype=np.float64)
        # 16-bit grey keeps its order of magnitude; a 32-bit image may hold 8-bit or 16-bit values.
        if image.mode.startswith("I;16") or (image.mode == "I" and grey.max(initial=0) > 255):
            grey = grey / 257
        elif image.mode == "F" and grey.max(initial=0) <= 1:
            grey = grey * 255
        pixels = np.clip(np.nan_to_num(np.round(grey)), 0, 255).astype(np.uint8)
        return np.repeat(pixels[..., None], 3, axis=2)
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        return np.array(Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB"))
    return np.array(image.convert("RGB"))


def test_scale(height: int, width: int, short_side: int, long_side: int, upscale: bool = True) -> float:
    """Factor by which an image becomes as large as both sides' limits, in pixels, allow.

    The smaller of the two ratios; at most 1 when `upscale` is false.
    """
    scale = min(short_side / min(height, width), long_side / max(height, width))
    return scale if upscale else min(scale, 1.0)


test_scale.__test__ = False  # type: ignore[attr-defined]  # not a test, despite its name


def resize(image: NDArray[np.uint8], scale: float) -> NDArray[np.uint8]:
    """The image times `scale`, sides rounded and at least 1 pixel.

    Bilinear, as for the published weights; below one half, where bilinear sampling skips source pixels and thin strokes break
    up, the average over the covered area.
    """
    height, width = scaled_size(image.shape[0], image.shape[1], scale)
    if (height, width) == image.shape[:2]:
        return image
    method = cv2.INTER_LINEAR if scale >= 0.5 else cv2.INTER_AREA
    return cv2.resize(image, (width, height), interpolation=method).astype(np.uint8, copy=False)


def scaled_size(height: int, width: int, scale: float) -> tuple[int, int]:
    """Height and width after ``resize``, pixels."""
    return max(1, round(height * scale)), max(1, round(width * scale))

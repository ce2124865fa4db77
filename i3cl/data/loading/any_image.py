"""RGB arrays from whatever a caller of the Python interface calls an image."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from i3cl.data.loading.images import MAX_PIXELS, ImageError, decode_image, to_rgb
from i3cl.errors import UserError

AnyImage = str | os.PathLike[str] | bytes | Image.Image | NDArray[Any]
"""A path or URL, the bytes of an image file, a Pillow image, or an array; see `as_rgb`."""
_TAKES = (
    "takes a path or URL, the bytes of an image file, a Pillow image, or an array (H, W) or (H, W, 1|3|4) of uint8, uint16 "
    "or float 0-1"
)


def as_images(images: AnyImage | Iterable[AnyImage]) -> Iterator[AnyImage]:
    """One image or several as an iterator, nothing read yet. An array of four dimensions is a batch of images.

    Raises:
        UserError: what was given is neither.
    """
    if isinstance(images, str | os.PathLike | bytes | bytearray | memoryview | Image.Image):
        return iter([images])  # type: ignore[list-item]  # a bytearray is turned into bytes by as_rgb
    if hasattr(images, "__array__"):
        return iter([images] if np.ndim(images) < 4 else images)  # type: ignore[arg-type,list-item]
    if isinstance(images, Iterable) and not isinstance(images, dict):
        return iter(images)
    raise UserError(
        f"images: takes one image or a list of images; got {describe(images)}. An image is {_TAKES.removeprefix('takes ')}"
    )


def as_rgb(image: AnyImage, *, upright: bool = False) -> NDArray[np.uint8]:
    """(H, W, 3) uint8 RGB of a path, an s3:// URL, the bytes of an image file, a Pillow image, or an array.

    An array is (H, W), (H, W, 1), (H, W, 3) or (H, W, 4) in RGB order: uint8 0-255, uint16 0-65535 or float 0-1. Transparency is
    laid over white.

    Args:
        image: the image.
        upright: as for `decode_image`; Pillow images that have an EXIF orientation are turned too, arrays never.

    Raises:
        UserError: the image cannot be read, or is something else; the message says what it got and what it takes.
    """
    if isinstance(image, str | os.PathLike):
        return decode_image(os.fspath(image), upright=upright)
    if isinstance(image, bytes | bytearray | memoryview):
        return decode_image(bytes(image), upright=upright)
    if isinstance(image, Image.Image):
        if image.width < 1 or image.height < 1 or image.width * image.height > MAX_PIXELS:
            raise ImageError(f"image: {image.width} x {image.height}; expected 1 to {MAX_PIXELS} pixels")
        try:
            return to_rgb(image, upright=upright)
        except Exception as error:  # Pillow decodes here, and raises nearly anything on a broken file
            raise ImageError(f"image: cannot be decoded ({' '.join(str(error).split())})") from error
    if hasattr(image, "__array__"):
        return _from_array(np.asarray(image), image)
    raise UserError(f"image: got {describe(image)}; it {_TAKES}")


def _from_array(array: NDArray[Any], given: object) -> NDArray[np.uint8]:
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (1, 3, 4)) or 0 in array.shape:
        hint = "; put the channels last" if array.ndim == 3 and array.shape[0] in (1, 3, 4) else ""
        raise UserError(f"image: got {describe(given)}; it {_TAKES}{hint}")
    if array.dtype == np.uint16:
        array = np.round(array / 257).astype(np.uint8)
    elif array.dtype.kind == "f":
        if not np.isfinite(array).all():
            raise UserError(f"image: got {describe(given)} with values that are not finite; it {_TAKES}")
        low, high = float(array.min()), float(array.max())
        if low < 0 or high > 1:
            raise UserError(f"image: got {describe(given)} with values from {low:g} to {high:g}; it {_TAKES}")
        array = np.round(array * 255).astype(np.uint8)
    elif array.dtype != np.uint8:
        raise UserError(f"image: got {describe(given)}; it {_TAKES}")
    if array.ndim == 2:
        array = array[..., None]
    if array.shape[2] == 4:
        return to_rgb(Image.fromarray(np.ascontiguousarray(array)))
    return np.ascontiguousarray(array if array.shape[2] == 3 else np.repeat(array, 3, axis=2))


def describe(value: object) -> str:
    """What a wrong argument is, in the words of a message."""
    if hasattr(value, "__array__"):
        array = np.asarray(value)
        return f"an array of shape {array.shape} and type {array.dtype}"
    return "None" if value is None else f"an object of type {type(value).__name__}"

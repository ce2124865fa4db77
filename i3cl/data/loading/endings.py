"""Which files are images: the one list of endings and of the formats that are decoded."""

from __future__ import annotations

import posixpath
from collections.abc import Sequence
from importlib.util import find_spec

from PIL import features

from i3cl.errors import UserError

HEIF_ENDINGS = (".heic", ".heif")
"""Photographs from telephones. They are read where the package pillow-heif is installed."""
_HEIF = find_spec("pillow_heif") is not None
_AVIF = features.check("avif")
IMAGE_ENDINGS = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm", ".pbm"),
    *((".avif",) if _AVIF else ()),
    *(HEIF_ENDINGS if _HEIF else ()),
)
"""Endings, in lower case, of the files that are read as images."""
# Listed because Pillow knows formats that start other programs.
FORMATS = (
    *("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF", "PPM"),
    *(("AVIF",) if _AVIF else ()),
    *(("HEIF",) if _HEIF else ()),
)
"""Pillow's names of the formats that are decoded."""

if _HEIF:
    import pillow_heif

    pillow_heif.register_heif_opener()


def is_image(name: str) -> bool:
    """Whether a file has the ending of an image and is not a companion file such as ``._photo.jpg``."""
    return name.lower().endswith(IMAGE_ENDINGS) and not posixpath.basename(name).startswith("._")


_KNOWN = {*IMAGE_ENDINGS, *HEIF_ENDINGS, ".avif", ".txt", ".json", ".xml", ".mat"}


def without_ending(name: str) -> str:
    """A file's name without its folders and without the ending of an image or label file; other endings are part of the name."""
    base, ending = posixpath.splitext(name.replace("\\", "/").rsplit("/", 1)[-1])
    return base if ending.lower() in _KNOWN else base + ending


def images_in(folder: str) -> list[str]:
    """Names of the images directly in a folder (local or s3://). UserError when there is none."""
    from i3cl import storage  # here, so that endings are known where the libraries of S3 are not installed

    found = [name for name in storage.list_dir(folder) if is_image(name)]
    if not found:
        raise UserError(f"{folder}: has no image ({', '.join(IMAGE_ENDINGS)})")
    return found


def left_out(names: Sequence[str], shown: int = 5) -> str:
    """One line that counts and names the files of a folder that are not read as images; "" when there are none."""
    if not names:
        return ""
    listed = ", ".join(names[:shown]) + (", ..." if len(names) > shown else "")
    heif = any(name.lower().endswith(HEIF_ENDINGS) for name in names)
    remedy = "; photographs in .heic are read once the package pillow-heif is installed" if heif else ""
    return f"left out {len(names)} without the ending of an image: {listed}{remedy}"

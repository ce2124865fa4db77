"""Degraded copies of a labelled set: bad light, noise, changed contrast. Pixels change, polygons do not.

The three kinds follow the extra training sets of the original recipes (light, noise, sig).
"""

from __future__ import annotations

import io
import json
import logging
import posixpath
import zlib
from collections.abc import Callable
from functools import partial
from typing import Literal

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from i3cl import storage
from i3cl.data.formats.coco import write_coco
from i3cl.data.formats.records import Dataset, ImageRecord
from i3cl.data.loading.images import ImageError, decode_image
from i3cl.errors import UserError
from i3cl.runtime.parts import IN_PROCESS, run_parts

logger = logging.getLogger(__name__)

Kind = Literal["light", "noise", "sig"]
Picture = NDArray[np.uint8]
"""(H, W, 3) RGB."""
_IMAGES_PER_PART = 128
_ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")
_NOT_WRITTEN = f"cannot be written in this format; use {', '.join(_ENDINGS)}"


def degrade(image: Picture, kind: Kind, seed: tuple[int, ...]) -> Picture:
    """A new (H, W, 3) uint8 RGB picture of the same size; the same arguments give the same pixels.

    seed: whole numbers from 0. ValueError for an unknown kind or a picture that is not uint8 RGB.
    """
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.size:
        raise ValueError(f"the picture must be (H, W, 3) uint8, not {image.shape} {image.dtype}")
    operations: dict[str, Callable[[np.random.Generator, Picture], Picture]] = {"light": _light, "noise": _noise, "sig": _sigmoid}
    if kind not in operations:
        raise ValueError(f"kind is light, noise or sig, not {kind!r}")
    return operations[kind](np.random.default_rng(np.random.SeedSequence(seed)), image)


def _light(rng: np.random.Generator, image: Picture) -> Picture:
    """Exposure (gamma and gain), a light that falls off across the picture, and a local lamp or shadow."""
    height, width = image.shape[:2]
    gamma = float(np.exp(rng.choice([-1, 1]) * rng.uniform(0.1, 0.8)))
    curve = 255 * float(rng.uniform(0.75, 1.15)) * np.linspace(0, 1, 256) ** gamma
    exposed = cv2.LUT(image, curve.clip(0, 255).astype(np.uint8))
    # Light changes slowly, so a coarse grid of 64 cells across is enlarged smoothly.
    y, x = np.mgrid[-1:1:48j, -1:1:64j]
    angle = rng.uniform(0, 2 * np.pi)
    light = 1 + rng.uniform(0.1, 0.5) * (np.cos(angle) * x + np.sin(angle) * y)
    for _ in range(rng.integers(0, 3)):
        centre, reach = rng.uniform(-1, 1, 2), rng.uniform(0.15, 0.7)
        spot = np.exp(-((x - centre[0]) ** 2 + (y - centre[1]) ** 2) / (2 * reach**2))
        light += rng.choice([-0.6, 0.9]) * rng.uniform(0.3, 1) * spot
    field = cv2.resize(light.clip(0.15, 2.2).astype(np.float32), (width, height), interpolation=cv2.INTER_CUBIC)
    return np.asarray(cv2.multiply(exposed, cv2.merge([field] * 3), dtype=cv2.CV_8U), np.uint8)


def _noise(rng: np.random.Generator, image: Picture) -> Picture:
    """Defocus or motion, sensor noise that grows with the signal, and a hard JPEG."""
    blur = rng.random()
    if blur < 0.5:
        image = np.asarray(cv2.GaussianBlur(image, (0, 0), float(rng.uniform(0.5, 1.6))), np.uint8)
    elif blur < 0.7:
        kernel = np.full((1, int(rng.integers(3, 8))), 1.0, np.float32)
        kernel = kernel if rng.random() < 0.5 else kernel.T
        image = np.asarray(cv2.filter2D(image, -1, kernel / kernel.sum()), np.uint8)
    # Photon noise has a variance that is proportional to the signal, the read-out adds a constant.
    read, shot = rng.uniform(2, 14), rng.uniform(0, 1.2)
    deviation = np.sqrt(read**2 + shot * np.arange(256, dtype=np.float32)).astype(np.float32)
    grain = rng.standard_normal(image.shape, np.float32) * deviation[image]
    noisy = np.asarray(cv2.add(image, grain, dtype=cv2.CV_8U), np.uint8)
    if rng.random() < 0.15:
        salt = rng.random(image.shape[:2]) < rng.uniform(0.001, 0.01)
        noisy[salt] = rng.choice(np.array([0, 255], np.uint8), int(salt.sum()))[:, None]
    packed = io.BytesIO()
    Image.fromarray(noisy).save(packed, "JPEG", quality=int(rng.integers(15, 60)))
    return decode_image(packed.getvalue())


def _sigmoid(rng: np.random.Generator, image: Picture) -> Picture:
    """Sigmoid contrast, 1 / (1 + exp(gain * (cutoff - value))) with values in 0-1.

    The formula is G. J. Braun and M. D. Fairchild's (Image lightness rescaling using sigmoidal contrast enhancement
    functions, Journal of Electronic Imaging 8(4), 1999).
    """
    gain, cutoff = rng.uniform(4, 12), rng.uniform(0.3, 0.7)
    values = np.linspace(0, 1, 256)
    curve = 255 / (1 + np.exp(gain * (cutoff - values)))
    if rng.random() < 0.2:
        # Sometimes the other way: greys instead of hard black and white.
        curve = 255 * (0.5 + (values - 0.5) * rng.uniform(0.25, 0.5))
    return np.asarray(cv2.LUT(image, curve.round().astype(np.uint8)), np.uint8)


# ----------------------------------------------------------------------------------------------- sets


def write_degraded(
    kind: Kind,
    dataset: Dataset,
    folder: str,
    seed: int = 0,
    *,
    skip_bad: bool = False,
    in_process: int = IN_PROCESS,
    upright: bool = False,
) -> str:
    """Write folder/images/ with a degraded copy of every image, names kept, and return folder/set.json with the polygons.

    A copy depends only on its file name, the kind and `seed`. After an interruption, images that are there are not made again;
    set.json is written last. upright: images are turned as their EXIF orientation says; copies
    have no EXIF data. UserError for an unreadable image or an ending that cannot be written (with `skip_bad` it is named and left
    out), for a seed below 0, and for a folder that holds other copies.
    """
    if seed < 0:
        raise UserError(f"--seed {seed}: give a whole number from 0")
    if not dataset.records:
        raise UserError(f"{dataset.name}: has no images")
    for record in dataset.records:
        if not skip_bad and not record.file_name.lower().endswith(_ENDINGS):
            raise UserError(f"{record.file_name}: {_NOT_WRITTEN}, or leave it out with --skip-bad")
    if storage.absolute(storage.join(folder, "images")) == storage.absolute(dataset.images_root):
        raise UserError(f"{folder}: its folder images/ holds the images to degrade; choose another folder")
    annotations, note = storage.join(folder, "set.json"), storage.join(folder, "degrade.json")
    content = {"kind": kind, "seed": seed, "images_root": dataset.images_root, "images": len(dataset.records)}
    if upright:
        content["data.exif"] = "upright"
    if not storage.exists(note):
        if storage.exists(annotations):
            raise UserError(f"{annotations}: exists already and is not a degraded copy; choose another folder")
        storage.write_text_atomic(note, json.dumps(content) + "\n")
    elif storage.read_text(note) != json.dumps(content) + "\n":
        raise UserError(f"{note}: the folder holds other degraded copies; choose another folder or remove it")
    if storage.exists(annotations):
        return annotations
    there = storage.list_files(storage.join(folder, "images"))
    wanted = [record.file_name for record in dataset.records if record.file_name not in there]
    chunks = [wanted[i : i + _IMAGES_PER_PART] for i in range(0, len(wanted), _IMAGES_PER_PART)]
    work = partial(_write_part, kind, dataset.images_root, folder, seed, chunks, skip_bad, upright)
    problems = run_parts(f"degrade {kind}", list(range(len(chunks))), len(wanted), work, in_process)
    for problem in problems[:5]:
        logger.info("degrade %s: left out %s", kind, problem)
    if len(problems) > 5:
        logger.info("degrade %s: left out %d images in all", kind, len(problems))
    written = storage.list_files(storage.join(folder, "images"))
    kept = [record for record in dataset.records if record.file_name in written]
    if not kept:
        raise UserError(f"{dataset.name}: none of its {len(dataset.records)} images can be read")
    write_coco(annotations, [_named(record, kind) for record in kept])
    return annotations


def _named(record: ImageRecord, kind: str) -> ImageRecord:
    source = f"{record.source}_{kind}" if record.source else kind
    return ImageRecord(record.id, record.file_name, record.height, record.width, record.instances, source)


def _write_part(
    kind: Kind, images_root: str, folder: str, seed: int, chunks: list[list[str]], skip_bad: bool, upright: bool, part: int
) -> list[str]:
    problems: list[str] = []
    for name in chunks[part]:
        if not name.lower().endswith(_ENDINGS):
            problems.append(f"{name}: {_NOT_WRITTEN}")
            continue
        try:
            image = decode_image(storage.join(images_root, name), upright=upright)
        except ImageError as error:
            if not skip_bad:
                raise UserError(f"{error}; repair it or leave it out with --skip-bad") from None
            problems.append(str(error))
            continue
        copy = degrade(image, kind, (seed, zlib.crc32(name.encode())))
        ending = posixpath.splitext(name)[1].lower()
        # A second hard compression would add artefacts of its own.
        options = [cv2.IMWRITE_JPEG_QUALITY, 92] if ending in (".jpg", ".jpeg") else []
        encoded, data = cv2.imencode(ending, copy[:, :, ::-1], options)
        assert encoded
        storage.write_bytes_atomic(storage.join(folder, "images", name), data.tobytes())
    return problems

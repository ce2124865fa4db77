"""The cameras that take the synthetic pictures."""

from __future__ import annotations

import io
from functools import cache

import cv2
import numpy as np
from cv2.typing import MatLike
from numpy.typing import NDArray
from PIL import Image

from i3cl.config import SceneTextSettings

Picture = NDArray[np.uint8]
"""(H, W, 3) RGB."""


def simple_camera(rng: np.random.Generator, canvas: NDArray[np.float32], difficulty: float) -> NDArray[np.uint8]:
    """The plain generator's: blur, sensor noise and JPEG artefacts. canvas: (H, W, 3) float32 RGB; difficulty: 0-1."""
    sigma = rng.uniform(0, 0.4 + 0.9 * difficulty)
    blurred = cv2.GaussianBlur(canvas, (0, 0), sigma) if sigma > 0.3 else canvas
    noise = rng.uniform(0, 3 + 14 * difficulty) * rng.standard_normal(canvas.shape, np.float32)
    image = (blurred + noise).clip(0, 255).astype(np.uint8)
    if rng.random() < 0.7:
        quality = int(rng.integers(round(90 - 55 * difficulty), 96))
        packed = io.BytesIO()
        Image.fromarray(image).save(packed, "JPEG", quality=quality)
        image = np.array(Image.open(packed))
    return image


@cache
def _noise() -> NDArray[np.float32]:
    """Sensor noise to cut windows from: drawing it for every image would cost more than the rest of the camera."""
    return np.random.default_rng(7).standard_normal((1400, 1400, 3), np.float32)


def street_camera(rng: np.random.Generator, scene: Picture, settings: SceneTextSettings) -> Picture:
    """The street generator's: light, focus, motion, resolution and noise. The JPEG is made when the image is stored."""
    canvas: MatLike = scene
    height, width = canvas.shape[:2]
    if rng.random() < 0.6:
        light = rng.normal(1, 0.15, (3, 4)).clip(0.45, 1.4).astype(np.float32)
        field_of_light = cv2.resize(light, (width, height), interpolation=cv2.INTER_CUBIC)
        canvas = cv2.multiply(canvas, cv2.merge([field_of_light] * 3), dtype=cv2.CV_8U)
    gamma, gain = float(np.exp(rng.normal(-0.05, 0.2))), float(rng.uniform(0.85, 1.12))
    tint = np.exp(rng.normal(0, 0.05, 3))
    curve = (255 * gain * np.linspace(0, 1, 256)[:, None] ** gamma * tint).clip(0, 255).astype(np.uint8)
    canvas = cv2.LUT(canvas, curve[:, None])
    blur = rng.random()
    if blur < 0.12 * settings.blur:
        length = int(rng.integers(3, 7))
        kernel = np.zeros((length, length), np.float32)
        slope = float(rng.uniform(0, np.pi))
        reach = np.array([np.cos(slope), np.sin(slope)]) * length / 2
        middle = np.array([length / 2, length / 2])
        ends = [tuple(map(int, np.clip(middle + way * reach, 0, length - 1))) for way in (-1, 1)]
        cv2.line(kernel, ends[0], ends[1], 1.0, 1)
        canvas = cv2.filter2D(canvas, -1, kernel / kernel.sum())
    elif blur < 0.55:
        canvas = cv2.GaussianBlur(canvas, (0, 0), float(rng.uniform(0.3, 0.3 + 0.9 * settings.blur)))
    if rng.random() < 0.25:
        shrink = float(rng.uniform(0.55, 0.95))
        small = cv2.resize(canvas, None, fx=shrink, fy=shrink, interpolation=cv2.INTER_AREA)
        canvas = cv2.resize(small, (width, height), interpolation=cv2.INTER_LINEAR)
    amount = float(rng.exponential(3)) * settings.noise
    if amount > 0.5:
        table = _noise()
        tall, wide = min(height, len(table)), min(width, len(table))
        y, x = rng.integers(len(table) - tall + 1), rng.integers(len(table) - wide + 1)
        grain = table[y : y + tall, x : x + wide]
        if grain.shape != canvas.shape:
            grain = np.tile(grain, (-(-height // tall), -(-width // wide), 1))[:height, :width]
        canvas = cv2.add(canvas, grain * np.float32(min(amount, 18.0)), dtype=cv2.CV_8U)
    return np.ascontiguousarray(canvas, np.uint8)

"""Colours of letters: chosen by how much their luminance differs from what is behind them."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Rgb = NDArray[np.float32]
"""(3,) float32, 0-255."""

LUMA = np.array([0.299, 0.587, 0.114], np.float32)
"""Weights of red, green and blue in the luminance."""
LUMA_EXACT = np.array([0.299, 0.587, 0.114])
"""The same in float64."""


def exact_ink(rng: np.random.Generator, ground: float, contrast: float) -> Rgb:
    """(3,) float32 RGB: a random colour whose luminance differs from `ground` (0-255) by exactly `contrast`, if there is room.

    The plain generator's: its difficulty is a matter of contrast, so contrast must not depend on chance.
    """
    up, down = ground + contrast, ground - contrast
    if up > 250 and down < 5:
        target = 255.0 if ground < 127 else 0.0
    elif down < 5 or (up <= 250 and rng.random() < 0.5):
        target = up
    else:
        target = down
    tint = rng.uniform(-1, 1, 3).astype(np.float32)
    tint -= tint @ LUMA
    # The strongest tint that keeps every channel in range keeps the luminance exact.
    room = np.where(tint > 0, 255 - target, target) / np.maximum(np.abs(tint), 1e-3)
    return (target + tint * min(float(room.min()), rng.uniform(0, 120))).astype(np.float32)


def paint_ink(rng: np.random.Generator, ground: NDArray[np.float64], contrast: float) -> NDArray[np.float64]:
    """(3,) float64 RGB: a random colour whose luminance differs from that of `ground` (RGB) by about `contrast` (0-255).

    The street generator's: mostly brighter on dark and darker on bright ground, with little tint, like paint.
    """
    level = float(ground @ LUMA_EXACT)
    up = level < 128 if rng.random() < 0.75 else level >= 128
    if not 0 <= level + (contrast if up else -contrast) <= 255:
        up = level < 128
    target = min(max(level + (contrast if up else -contrast), 0.0), 255.0)
    tint = rng.normal(0, 1, 3) * (rng.uniform(0, 60) if rng.random() < 0.6 else 8)
    colour = target + tint - tint @ LUMA_EXACT
    return colour.clip(0, 255)

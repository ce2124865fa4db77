"""Drawing outlines on pictures. Pictures are (H, W, 3) uint8 RGB; every function returns a new array."""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np
from numpy.typing import NDArray

from i3cl.geometry import Polygon, as_polygon

Colour = tuple[int, int, int]
"""Red, green, blue, 0-255."""
Picture = NDArray[np.uint8]
"""(H, W, 3) RGB."""

IGNORED: Colour = (150, 150, 150)
"""Colour of ignore regions."""

# From low to high, mixed in CIELAB, where equal steps look equal. Colour-blind people can tell red from blue.
_SCALE = np.array([(205, 35, 40), (240, 130, 40), (235, 205, 70), (80, 185, 150), (30, 120, 200)], np.float32)


def draw_polygons(
    image: Picture,
    polygons: Sequence[Polygon],
    colours: Colour | Sequence[Colour],
    thickness: int = 2,
    labels: Sequence[str] | None = None,
) -> Picture:
    """A copy of the picture with the outlines of (N, 2) pixel polygons, which may leave the picture.

    colours: one for all or one for each polygon. thickness: pixels, at least 1. labels: a short text for each
    polygon, written over its top left corner. ValueError for a picture that is not uint8 RGB, a broken
    polygon, or a wrong number of colours or labels.
    """
    _check(image)
    if thickness < 1:
        raise ValueError(f"thickness must be at least 1 pixel, not {thickness}")
    each = _one_each(colours, len(polygons))
    if labels is not None and len(labels) != len(polygons):
        raise ValueError(f"{len(labels)} labels for {len(polygons)} polygons")
    drawn = np.ascontiguousarray(image).copy()
    rings = [as_polygon(polygon) for polygon in polygons]
    for ring, colour in zip(rings, each, strict=True):
        # Eighths of a pixel (shift=3); OpenCV puts the centre of pixel 0 at 0, our polygons put it at 0.5.
        points = np.round((np.clip(ring, -1e6, 1e6) - 0.5) * 8).astype(np.int32)
        cv2.polylines(drawn, [points], True, colour, thickness, cv2.LINE_AA, shift=3)
    for ring, colour, label in zip(rings, each, labels or (), strict=False):
        _write(drawn, ring, label, colour)
    return drawn


def weight_colour(weight: float | None) -> Colour:
    """Red at 0 over yellow to blue at 1, even to the eye; grey for None, an ignored region.

    ValueError for a weight outside 0-1.
    """
    if weight is None:
        return IGNORED
    if not 0 <= weight <= 1:
        raise ValueError(f"a weight is between 0 and 1, not {weight}")
    lab = cv2.cvtColor(_SCALE[None] / 255, cv2.COLOR_RGB2LAB)[0]
    stops = np.linspace(0, 1, len(lab))
    mixed = np.array([[[np.interp(weight, stops, lab[:, channel]) for channel in range(3)]]], np.float32)
    red, green, blue = (cv2.cvtColor(mixed, cv2.COLOR_LAB2RGB)[0, 0] * 255).round().clip(0, 255).astype(int).tolist()
    return red, green, blue


def fit(image: Picture, long_side: int) -> Picture:
    """A copy whose long side is at most `long_side` pixels; smaller pictures keep their size.

    ValueError for a picture that is not uint8 RGB and for a long side below 1.
    """
    _check(image)
    if long_side < 1:
        raise ValueError(f"the long side must be at least 1 pixel, not {long_side}")
    height, width = image.shape[:2]
    ratio = long_side / max(height, width)
    if ratio >= 1:
        return image.copy()
    size = max(1, round(width * ratio)), max(1, round(height * ratio))
    return np.asarray(cv2.resize(image, size, interpolation=cv2.INTER_AREA), np.uint8)


def _check(image: Picture) -> None:
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.size:
        raise ValueError(f"a picture is (H, W, 3) uint8 RGB, not {image.shape} {image.dtype}")


def _one_each(colours: Colour | Sequence[Colour], count: int) -> list[Colour]:
    if len(colours) == 3 and all(isinstance(value, int | np.integer) for value in colours):
        return [colours] * count  # type: ignore[list-item]
    if len(colours) != count:
        raise ValueError(f"{len(colours)} colours for {count} polygons")
    return list(colours)  # type: ignore[arg-type]


def _write(image: Picture, ring: NDArray[np.float32], label: str, colour: Colour) -> None:
    """Write the label at the ring's top left corner, on the outline's colour, and inside the picture if it fits."""
    font, scale = cv2.FONT_HERSHEY_SIMPLEX, 0.4
    (width, height), below = cv2.getTextSize(label, font, scale, 1)
    corner = ring[ring.sum(axis=1).argmin()]
    x = int(np.clip(corner[0], 0, max(image.shape[1] - width - 4, 0)))
    y = int(np.clip(corner[1] - 2, height + 2, image.shape[0] - below))
    cv2.rectangle(image, (x, y - height - 2), (x + width + 3, y + below), colour, cv2.FILLED)
    bright = np.dot(colour, (0.299, 0.587, 0.114)) > 140
    cv2.putText(image, label, (x + 2, y), font, scale, (0, 0, 0) if bright else (255, 255, 255), 1, cv2.LINE_AA)

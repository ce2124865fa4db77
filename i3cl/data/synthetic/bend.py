"""Bending words: pixels and outlines go through the same map, so they agree.

The plain generator bends one word along a centreline of any shape. The street generator bends a whole line of words, which
keep their own outlines, by a map with a closed inverse: an arc or a sine.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

Points = NDArray[np.float64]
"""(N, 2) x, y."""

OVERSAMPLE = 2
"""Flat words of the plain generator are drawn at this many times their size."""


@dataclass(frozen=True, slots=True)
class Word:
    """A word of the plain generator: its flat picture and the centreline that it is bent along."""

    text: str
    layers: NDArray[np.uint8]
    """(h, w, 2) uint8 coverage of the letters, and with their border; at OVERSAMPLE times the size."""
    centre: NDArray[np.float32]
    """(K, 2) points of the centreline in image pixels, equally spaced along it."""
    angle: NDArray[np.float32]
    """(K,) direction of the centreline in radians."""
    length: float
    """Length of the centreline, pixels."""
    height: float
    """Height of the letters across the centreline, pixels."""
    outline: NDArray[np.float32]
    """(N, 2) polygon in image pixels."""


@dataclass(slots=True)
class Line:
    """A line of words drawn flat."""

    mask: NDArray[np.uint8]
    """(h, w) coverage."""
    outlines: list[Points]
    """Words' polygons in pixels of the mask."""
    words: list[str]
    language: str


def bend_word(word: Word, side: int) -> tuple[tuple[slice, slice], NDArray[np.float32]]:
    """The window of the image that holds the word, and the (h, w, 2) float32 coverage (0-1) of its layers."""
    x0, y0 = np.maximum(np.floor(word.outline.min(axis=0)).astype(int) - 3, 0)
    x1, y1 = np.minimum(np.ceil(word.outline.max(axis=0)).astype(int) + 3, side)
    x, y = np.arange(x0, x1, dtype=np.float32) + 0.5, np.arange(y0, y1, dtype=np.float32) + 0.5
    dx, dy = x[None, :, None] - word.centre[:, 0], y[:, None, None] - word.centre[:, 1]
    nearest = (dx * dx + dy * dy).argmin(axis=2)
    dx = x[None, :] - word.centre[nearest, 0]
    dy = y[:, None] - word.centre[nearest, 1]
    cos, sin = np.cos(word.angle[nearest]), np.sin(word.angle[nearest])
    step = word.length / (len(word.centre) - 1)
    curvature = np.gradient(word.angle, step).astype(np.float32)[nearest]
    across = dy * cos - dx * sin
    # Off the centreline the spacing of its normals shrinks or grows with the curvature.
    along = nearest * step + (dx * cos + dy * sin) / np.maximum(1 - curvature * across, 0.2)
    layers = cv2.remap(
        word.layers,
        (along * OVERSAMPLE - 0.5).astype(np.float32),
        ((across + word.height / 2) * OVERSAMPLE - 0.5).astype(np.float32),
        cv2.INTER_LINEAR,
        borderMode=cv2.BORDER_CONSTANT,
    )
    return (slice(y0, y1), slice(x0, x1)), np.asarray(layers, np.float32) / np.float32(255)


def bend_line(rng: np.random.Generator, line: Line, points_per_edge: int) -> Line:
    """The line along an arc or a sine; outlines get `points_per_edge` points on top and as many below."""
    height, length = map(float, line.mask.shape)
    if length < 2.5 * height:
        return line
    if rng.random() < 0.65:
        # At least 0.9 line heights of radius: sharper arcs would squeeze the inner edge to nothing.
        turn = min(float(rng.uniform(0.5, 2.9)), length / (0.9 * height))
        forward, inverse = _arc(length / turn * (1 if rng.random() < 0.7 else -1), length, height)
    else:
        wave = length / float(rng.uniform(0.6, 1.6))
        forward, inverse = _sine(float(rng.uniform(0.15, 0.5)) * wave / (2 * np.pi), wave, float(rng.uniform(0, 6.3)))
    along = np.linspace(0, 1, points_per_edge)
    outlines = []
    for ring in line.outlines:
        (x0, y0), (x1, y1) = ring[0], ring[2]
        x = x0 + (x1 - x0) * along
        top, bottom = np.stack([x, np.full_like(x, y0)], 1), np.stack([x, np.full_like(x, y1)], 1)[::-1]
        outlines.append(forward(np.concatenate([top, bottom])))
    x = np.linspace(0, length, 64)
    frame = forward(np.concatenate([np.stack([x, np.full_like(x, y)], 1) for y in (0.0, height)]))
    origin = np.floor(frame.min(axis=0)) - 1
    wide, tall = (np.ceil(frame.max(axis=0)) + 1 - origin).astype(int)
    x, y = (np.arange(count) + 0.5 + start for count, start in zip((wide, tall), origin, strict=True))
    grid_x, grid_y = np.meshgrid(x, y)
    u, v = inverse(grid_x.astype(np.float32), grid_y.astype(np.float32))
    bent = cv2.remap(line.mask, u - np.float32(0.5), v - np.float32(0.5), cv2.INTER_LINEAR, borderMode=cv2.BORDER_CONSTANT)
    return Line(bent.astype(np.uint8, copy=False), [ring - origin for ring in outlines], line.words, line.language)


_Forward = Callable[[Points], Points]
_Inverse = Callable[[NDArray[np.float32], NDArray[np.float32]], tuple[NDArray[np.float32], NDArray[np.float32]]]


def _arc(radius: float, length: float, height: float) -> tuple[_Forward, _Inverse]:
    """Maps between the flat line and a circle of signed `radius` through its middle (positive: arched upwards)."""
    sign, r = np.float32(np.sign(radius)), np.float32(radius)
    middle, half = np.float32(length / 2), np.float32(height / 2)

    def forward(points: Points) -> Points:
        angle = (points[:, 0] - length / 2) / radius
        distance = radius - (points[:, 1] - height / 2)
        return np.stack([distance * np.sin(angle), radius - distance * np.cos(angle)], axis=1)

    def inverse(x: NDArray[np.float32], y: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        angle = np.arctan2(sign * x, sign * (r - y))
        return angle * r + middle, r - sign * np.hypot(x, r - y) + half

    return forward, inverse


def _sine(amplitude: float, wave: float, phase: float) -> tuple[_Forward, _Inverse]:
    """Maps between the flat line and one that is moved up and down by a sine along its length."""
    a, k, p = np.float32(amplitude), np.float32(2 * np.pi / wave), np.float32(phase)

    def forward(points: Points) -> Points:
        return points + np.stack([np.zeros(len(points)), a * np.sin(k * points[:, 0] + p)], axis=1)

    def inverse(x: NDArray[np.float32], y: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        return x, y - a * np.sin(k * x + p)

    return forward, inverse

"""Small synthetic scene text for the quickstart: words on procedural backgrounds, with exact outlines.

Every image depends on (seed, index) alone, so workers can make disjoint index ranges of one set. A word is drawn straight at
twice its size and bent along a centreline; outline and pixels come from the same centreline, so they agree. street.py makes
larger pictures for pre-training.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from shapely.geometry import Polygon as Ring
from shapely.geometry import box

from i3cl.data.synthetic.bend import OVERSAMPLE, Word, bend_word
from i3cl.data.synthetic.camera import simple_camera
from i3cl.data.synthetic.fonts import Face, dejavu_files, font
from i3cl.data.synthetic.ink import LUMA, Rgb, exact_ink
from i3cl.data.synthetic.words import plain_word

_POINTS_PER_EDGE = 12


@dataclass(frozen=True, slots=True)
class SyntheticImage:
    """One image and its words."""

    image: NDArray[np.uint8]
    """(side, side, 3) uint8 RGB."""
    polygons: list[NDArray[np.float32]]
    """Word outlines, (N, 2) float32 pixels, clockwise on screen: the top edge from the first letter to the
    last, then the bottom edge back. N is 4 for straight words and 24 for curved ones. Inside the image, no
    overlap."""
    texts: list[str]
    """The words, in the order of the polygons."""


def make_image(index: int, seed: int, side: int = 256, difficulty: float = 0.5) -> SyntheticImage:
    """Image `index` of the endless set `seed`: two to six straight, rotated and curved words.

    index, seed: at least 0. side: pixels, at least 64; words scale with it, 11 to 40 pixels high at 256.
    difficulty: 0 to 1, the share of small and of low-contrast words and the amount of clutter, blur and
    noise. The same arguments give the same image. ValueError for arguments outside these ranges.
    """
    if index < 0 or seed < 0:
        raise ValueError(f"index and seed must be at least 0, not {index} and {seed}")
    if side < 64:
        raise ValueError(f"side must be at least 64 pixels, not {side}")
    if not 0 <= difficulty <= 1:
        raise ValueError(f"difficulty must be between 0 and 1, not {difficulty}")
    rng = np.random.default_rng(np.random.SeedSequence((seed, index)))
    canvas = _background(rng, side)
    for _ in range(rng.poisson(1 + 5 * difficulty)):
        _draw_distractor(rng, canvas)
    words = _lay_out(rng, side, difficulty)
    for word in words:
        if rng.random() < 0.25:
            _draw_plate(rng, canvas, word)
    for word in words:
        _draw_word(rng, canvas, word, difficulty)
    image = simple_camera(rng, canvas, difficulty)
    return SyntheticImage(image, [word.outline for word in words], [word.text for word in words])


def make_split(start: int, count: int, seed: int, side: int = 256, difficulty: float = 0.5) -> Iterator[SyntheticImage]:
    """Images start, ..., start + count - 1 of the set `seed`, one at a time; arguments as for make_image."""
    for index in range(start, start + count):
        yield make_image(index, seed, side, difficulty)


# ------------------------------------------------------------------------------------------------------ words


def _lay_out(rng: np.random.Generator, side: int, difficulty: float) -> list[Word]:
    """Two to six words that neither overlap nor leave the image."""
    wanted = int(rng.integers(2, 7))
    frame, gap = box(1, 1, side - 1, side - 1), 0.015 * side
    words: list[Word] = []
    taken: list[Ring] = []
    for attempt in range(60):
        if len(words) == wanted:
            break
        # Crowded images get smaller and smaller words, so that every image has at least two.
        word = _random_word(rng, side, difficulty, largest=40 - 24 * attempt / 60)
        ring = Ring(word.outline)
        if ring.is_valid and frame.contains(ring) and not any(other.intersects(ring) for other in taken):
            words.append(word)
            taken.append(ring.buffer(gap))
    return words


def _random_word(rng: np.random.Generator, side: int, difficulty: float, largest: float) -> Word:
    """A word of random text, size, shape and place, perhaps partly outside the image."""
    scale = side / 256
    smallest = 11 if rng.random() < 0.4 * difficulty else 16
    height = scale * float(np.exp(rng.uniform(np.log(min(smallest, largest)), np.log(largest))))
    files = dejavu_files()
    face = Face(str(files[rng.integers(len(files))]))
    text = plain_word(rng)
    left, top, right, bottom = font(face, 64).getbbox(text)
    height = max(min(height, 0.8 * side * (bottom - top) / (right - left)), 8.0)
    size = max(round(OVERSAMPLE * height * 64 / (bottom - top)), 8)
    border = int(rng.integers(1, 3)) if rng.random() < 0.2 else 0
    layers = _draw_straight(text, font(face, size), border)
    length, height = layers.shape[1] / OVERSAMPLE, layers.shape[0] / OVERSAMPLE

    along = np.linspace(0, 1, max(round(length / 2), 2), dtype=np.float32)
    kind = rng.choice(["straight", "rotated", "arc", "wave"], p=[0.25, 0.3, 0.3, 0.15])
    curved = kind in ("arc", "wave") and length > 2.5 * height
    # Half a letter's height times the curvature stays below 0.45, or the inner edge would fold over itself.
    bend = 0.9 * length / height
    if kind == "straight":
        angle = np.full_like(along, 0)
    elif not curved:
        angle = np.full_like(along, rng.choice([rng.uniform(-0.7, 0.7), rng.uniform(-1.6, 1.6)]))
    elif kind == "arc":
        turn = min(rng.uniform(0.9, 2.8), bend) * rng.choice([-1, 1])
        angle = rng.uniform(-0.4, 0.4) + turn * (along - 0.5)
    else:
        cycles = rng.uniform(0.8, 1.3)
        swing = min(rng.uniform(0.35, 0.8), bend / (2 * np.pi * cycles))
        angle = rng.uniform(-0.3, 0.3) + swing * np.sin(2 * np.pi * (cycles * along + rng.random()))
    angle = angle.astype(np.float32)
    step = length / (len(along) - 1)
    middle = (angle[1:] + angle[:-1]) / 2
    centre = np.zeros((len(along), 2), np.float32)
    centre[1:] = np.cumsum(np.stack([np.cos(middle), np.sin(middle)], axis=1) * step, axis=0)

    chosen = np.linspace(0, len(along) - 1, _POINTS_PER_EDGE if curved else 2).round().astype(int)
    across = np.stack([-np.sin(angle), np.cos(angle)], axis=1)[chosen] * height / 2
    outline = np.concatenate([centre[chosen] - across, (centre[chosen] + across)[::-1]])
    low, high = outline.min(axis=0), outline.max(axis=0)
    # A place where the word fits into the frame; if there is none, the layout drops it.
    shift = rng.uniform(1 - low, np.maximum(side - 1 - high, 1 - low + 0.01)).astype(np.float32)
    return Word(text, layers, centre + shift, angle, length, height, outline + shift)


def _draw_straight(text: str, font: ImageFont.FreeTypeFont, border: int) -> NDArray[np.uint8]:
    """(h, w, 2) coverage of the letters and of the letters with a `border` in pixels, cut to the ink."""
    border *= OVERSAMPLE
    left, top, right, bottom = (round(v) for v in font.getbbox(text, stroke_width=border))
    planes = []
    for width in (0, border):
        plane = Image.new("L", (right - left + 2, bottom - top + 2))
        ImageDraw.Draw(plane).text((1 - left, 1 - top), text, fill=255, font=font, stroke_width=width)
        planes.append(np.asarray(plane))
    layers = np.stack(planes, axis=2)
    rows, columns = (np.flatnonzero((layers[..., 1] > 64).any(axis=axis)) for axis in (1, 0))
    return np.ascontiguousarray(layers[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1])


def _draw_word(rng: np.random.Generator, canvas: NDArray[np.float32], word: Word, difficulty: float) -> None:
    window, layers = bend_word(word, len(canvas))
    patch = canvas[window]
    inside = cv2.fillPoly(
        np.zeros(patch.shape[:2], np.uint8),
        [np.round(word.outline - [window[1].start, window[0].start]).astype(np.int32)],
        1,
    )
    around = patch[inside > 0] @ LUMA
    faint = rng.random() < 0.5 * difficulty
    contrast = rng.uniform(26, 45) if faint else rng.uniform(55, 140)
    ink = exact_ink(rng, float(around.mean()), contrast + (0.3 if faint else 0.8) * float(around.std()))
    if rng.random() < 0.2:
        shadow = np.roll(layers[..., 1:], rng.integers(1, 3, 2), axis=(0, 1))
        patch *= 1 - shadow * rng.uniform(0.3, 0.6)
    # Where no border was asked for, both layers are the same and the border's colour never shows.
    border = exact_ink(rng, float(ink @ LUMA), 70)
    patch += (border - patch) * layers[..., 1:]
    patch += (ink - patch) * layers[..., :1]


# ------------------------------------------------------------------------------------------------ the scenery


def _colour(rng: np.random.Generator) -> Rgb:
    return (rng.uniform(15, 240) + rng.uniform(-45, 45, 3)).clip(0, 255).astype(np.float32)


def _background(rng: np.random.Generator, side: int) -> NDArray[np.float32]:
    """(side, side, 3) float32 RGB: a smooth gradient under one of four textures."""
    first, second = _colour(rng), _colour(rng)
    second = first + (second - first) * rng.uniform(0.2, 0.8)
    y, x = np.mgrid[0 : 1 : side * 1j, 0 : 1 : side * 1j].astype(np.float32)
    angle = rng.uniform(0, 2 * np.pi)
    along = np.cos(angle) * x + np.sin(angle) * y
    mix = (along - along.min()) / np.ptp(along)
    canvas = first + (second - first) * mix[..., None]
    depth = rng.uniform(8, 40)
    kind = rng.integers(4)
    if kind == 0:
        cells = int(rng.integers(3, 24))
        blobs = rng.uniform(-1, 1, (cells, cells, 3)).astype(np.float32)
        canvas += depth * cv2.resize(blobs, (side, side), interpolation=cv2.INTER_CUBIC)
    elif kind == 1:
        angle, period = rng.uniform(0, np.pi), rng.uniform(6, 40)
        wave = np.sin((np.cos(angle) * x + np.sin(angle) * y) * (2 * np.pi * side / period))
        canvas += (depth / 2) * (wave if rng.random() < 0.5 else np.sign(wave))[..., None]
    elif kind == 2:
        tall, wide = rng.integers(10, 30) * side // 256, rng.integers(20, 60) * side // 256
        row = (y * (side - 1)).astype(np.int32)
        column = (x * (side - 1)).astype(np.int32) + (row // tall % 2) * (wide // 2)
        shades = rng.uniform(-1, 1, (64, 64)).astype(np.float32)[row // tall % 64, column // wide % 64]
        joints = (row % tall < 2) | (column % wide < 2)
        canvas += (depth / 2) * np.where(joints, np.float32(-1.5), shades)[..., None]
    canvas += rng.uniform(0, 8) * rng.standard_normal((side, side, 1), np.float32)
    return canvas.clip(0, 255)


def _draw_distractor(rng: np.random.Generator, canvas: NDArray[np.float32]) -> None:
    """Edges, bars and rows of shapes: strokes with a word's size and spacing that are not a word."""
    side = len(canvas)
    scale = side / 256
    colour = tuple(map(float, _colour(rng)))
    x, y = rng.uniform(0, side, 2)
    angle = rng.choice([0.0, rng.uniform(-0.8, 0.8)])
    turn = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
    tall, pitch = rng.uniform(10, 36) * scale, rng.uniform(6, 18) * scale
    thickness = max(1, round(rng.uniform(1, 4) * scale))

    def to_pixels(points: object) -> NDArray[np.int32]:
        return np.round(np.asarray(points) @ turn + [x, y]).astype(np.int32)

    kind = rng.integers(5)
    if kind == 0:
        wide, high = rng.uniform(20, 120, 2) * scale
        corners = to_pixels([(0, 0), (wide, 0), (wide, high), (0, high)])
        cv2.polylines(canvas, [corners], True, colour, thickness, cv2.LINE_AA)
    elif kind == 1:
        wide, high = rng.uniform(20, 120, 2) * scale
        cv2.fillPoly(canvas, [to_pixels([(0, 0), (wide, 0), (wide, high), (0, high)])], colour, cv2.LINE_AA)
    elif kind == 2:
        for place in range(rng.integers(4, 12)):
            ends = to_pixels([(place * pitch, 0), (place * pitch, tall)])
            cv2.line(canvas, ends[0].tolist(), ends[1].tolist(), colour, thickness, cv2.LINE_AA)
    elif kind == 3:
        shape = rng.uniform(0, 1, (int(rng.integers(3, 5)), 2)) * [pitch, tall]
        for place in range(rng.integers(3, 8)):
            corners = to_pixels(shape + np.array([place * pitch * 1.3, 0]))
            cv2.polylines(canvas, [corners], True, colour, thickness, cv2.LINE_AA)
    else:
        count = int(rng.integers(5, 14))
        trail = np.stack([np.arange(count) * pitch * 0.7, rng.uniform(0, tall, count)], axis=1)
        cv2.polylines(canvas, [to_pixels(trail)], False, colour, thickness, cv2.LINE_AA)


def _draw_plate(rng: np.random.Generator, canvas: NDArray[np.float32], word: Word) -> None:
    """Draw a sign of one colour behind the word."""
    margin = word.height * rng.uniform(0.15, 0.4)
    ring = np.asarray(Ring(word.outline).buffer(margin, join_style="mitre").exterior.coords)
    colour = tuple(map(float, _colour(rng)))
    cv2.fillPoly(canvas, [np.round(ring - 0.5).astype(np.int32)], colour, cv2.LINE_AA)

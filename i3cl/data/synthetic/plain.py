"""Small synthetic scene text for the quickstart: words on procedural backgrounds, with exact outlines.

Every image depends on (seed, index) alone, so workers can make disjoint index ranges of one set. A word
is drawn straight at twice its size and bent along a centreline; outline and pixels come from the same
centreline, so they agree.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path

import cv2
import matplotlib
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from shapely.geometry import Polygon as Ring
from shapely.geometry import box

Rgb = NDArray[np.float32]
"""(3,) float32, 0-255."""

_OVERSAMPLE = 2
_POINTS_PER_EDGE = 12
_SIGN_WORDS = (
    "OPEN CLOSED EXIT ENTRY TAXI HOTEL CAFE BAR BANK SALE STOP PARKING STATION MARKET BAKERY PHARMACY FRESH "
    "Coffee Books Pizza Welcome Restaurant Garden Museum Library Studio Express Center Street Avenue 24H No1 "
    "1987 50OFF Since1920"
)
_ONSETS = "b c d f g h j k l m n p r s t v w br ch cl dr fl gr pl pr sh sl st str th tr"
_NUCLEI = "a e i o u ai ea ee io oo ou"
_CODAS = "l m n r s t ck nd ng rk st"
_LUMA = np.array([0.299, 0.587, 0.114], np.float32)


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


@dataclass(frozen=True, slots=True)
class _Word:
    text: str
    layers: NDArray[np.uint8]
    """(h, w, 2) uint8 coverage of the letters, and with their border; _OVERSAMPLE times the size."""
    centre: NDArray[np.float32]
    """(K, 2) points of the centreline in image pixels, equally spaced along it."""
    angle: NDArray[np.float32]
    """(K,) direction of the centreline in radians."""
    length: float
    """Of the centreline, pixels."""
    height: float
    """Of the letters across the centreline, pixels."""
    outline: NDArray[np.float32]
    """(N, 2) polygon in image pixels."""


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
    image = _camera(rng, canvas, difficulty)
    return SyntheticImage(image, [word.outline for word in words], [word.text for word in words])


def make_split(start: int, count: int, seed: int, side: int = 256, difficulty: float = 0.5) -> Iterator[SyntheticImage]:
    """Images start, ..., start + count - 1 of the set `seed`, one at a time; arguments as for make_image."""
    for index in range(start, start + count):
        yield make_image(index, seed, side, difficulty)


def contact_sheet(images: Sequence[SyntheticImage], columns: int = 4) -> NDArray[np.uint8]:
    """The images in rows of `columns` with their outlines drawn: (rows * side, columns * side, 3) uint8 RGB.

    All images have one side. ValueError without images or with less than one column.
    """
    if not images or columns < 1:
        raise ValueError("a contact sheet needs at least one image and one column")
    side = images[0].image.shape[0]
    sheet = np.full((-(-len(images) // columns) * side, columns * side, 3), 255, np.uint8)
    for place, item in enumerate(images):
        tile = item.image.copy()
        # shift=3: outlines in eighths of a pixel; -0.5 because OpenCV puts pixel centres on whole numbers.
        rings = [np.round((polygon - 0.5) * 8).astype(np.int32) for polygon in item.polygons]
        cv2.polylines(tile, rings, True, (0, 255, 0), 1, cv2.LINE_AA, shift=3)
        row, column = divmod(place, columns)
        sheet[row * side : (row + 1) * side, column * side : (column + 1) * side] = tile
    return sheet


# ------------------------------------------------------------------------------------------------------ words


@cache
def _font_files() -> tuple[Path, ...]:
    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    # The Display faces hold only a few symbols.
    return tuple(sorted(f for f in folder.glob("DejaVu*.ttf") if "Display" not in f.name))


@lru_cache(maxsize=1024)
def _font(file: Path, size: int) -> ImageFont.FreeTypeFont:
    # Basic layout: the optional Raqm engine would make pixels depend on the machine.
    return ImageFont.truetype(str(file), size, layout_engine=ImageFont.Layout.BASIC)


def _random_text(rng: np.random.Generator) -> str:
    """3 to 10 letters or digits."""
    kind = rng.random()
    if kind < 0.2:
        return str(rng.choice(_SIGN_WORDS.split()))
    if kind < 0.3:
        return "".join(rng.choice(list("0123456789"), rng.integers(3, 7)))
    text = ""
    for _ in range(rng.integers(1, 5)):
        text += str(rng.choice(_ONSETS.split())) + str(rng.choice(_NUCLEI.split()))
        text += str(rng.choice(_CODAS.split())) if rng.random() < 0.75 else ""
    text = (text if len(text) >= 3 else text + "ns")[:10]
    return (text.lower(), text.upper(), text.capitalize())[rng.integers(3)]


def _lay_out(rng: np.random.Generator, side: int, difficulty: float) -> list[_Word]:
    """Two to six words that neither overlap nor leave the image."""
    wanted = int(rng.integers(2, 7))
    frame, gap = box(1, 1, side - 1, side - 1), 0.015 * side
    words: list[_Word] = []
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


def _random_word(rng: np.random.Generator, side: int, difficulty: float, largest: float) -> _Word:
    """A word of random text, size, shape and place, perhaps partly outside the image."""
    scale = side / 256
    smallest = 11 if rng.random() < 0.4 * difficulty else 16
    height = scale * float(np.exp(rng.uniform(np.log(min(smallest, largest)), np.log(largest))))
    file = _font_files()[rng.integers(len(_font_files()))]
    text = _random_text(rng)
    left, top, right, bottom = _font(file, 64).getbbox(text)
    height = max(min(height, 0.8 * side * (bottom - top) / (right - left)), 8.0)
    size = max(round(_OVERSAMPLE * height * 64 / (bottom - top)), 8)
    border = int(rng.integers(1, 3)) if rng.random() < 0.2 else 0
    layers = _draw_straight(text, _font(file, size), border)
    length, height = layers.shape[1] / _OVERSAMPLE, layers.shape[0] / _OVERSAMPLE

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
    # A place inside the frame where the word fits; elsewhere the layout drops it.
    shift = rng.uniform(1 - low, np.maximum(side - 1 - high, 1 - low + 0.01)).astype(np.float32)
    return _Word(text, layers, centre + shift, angle, length, height, outline + shift)


def _draw_straight(text: str, font: ImageFont.FreeTypeFont, border: int) -> NDArray[np.uint8]:
    """(h, w, 2) coverage of the letters and of the letters with a `border` in pixels, cut to the ink."""
    border *= _OVERSAMPLE
    left, top, right, bottom = (round(v) for v in font.getbbox(text, stroke_width=border))
    planes = []
    for width in (0, border):
        plane = Image.new("L", (right - left + 2, bottom - top + 2))
        ImageDraw.Draw(plane).text((1 - left, 1 - top), text, fill=255, font=font, stroke_width=width)
        planes.append(np.asarray(plane))
    layers = np.stack(planes, axis=2)
    rows, columns = (np.flatnonzero((layers[..., 1] > 64).any(axis=axis)) for axis in (1, 0))
    return np.ascontiguousarray(layers[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1])


def _bend(word: _Word, side: int) -> tuple[tuple[slice, slice], NDArray[np.float32]]:
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
        (along * _OVERSAMPLE - 0.5).astype(np.float32),
        ((across + word.height / 2) * _OVERSAMPLE - 0.5).astype(np.float32),
        cv2.INTER_LINEAR,
        borderMode=cv2.BORDER_CONSTANT,
    )
    return (slice(y0, y1), slice(x0, x1)), np.asarray(layers, np.float32) / np.float32(255)


def _draw_word(rng: np.random.Generator, canvas: NDArray[np.float32], word: _Word, difficulty: float) -> None:
    window, layers = _bend(word, len(canvas))
    patch = canvas[window]
    inside = cv2.fillPoly(
        np.zeros(patch.shape[:2], np.uint8),
        [np.round(word.outline - [window[1].start, window[0].start]).astype(np.int32)],
        1,
    )
    around = patch[inside > 0] @ _LUMA
    faint = rng.random() < 0.5 * difficulty
    contrast = rng.uniform(26, 45) if faint else rng.uniform(55, 140)
    ink = _ink(rng, float(around.mean()), contrast + (0.3 if faint else 0.8) * float(around.std()))
    if rng.random() < 0.2:
        shadow = np.roll(layers[..., 1:], rng.integers(1, 3, 2), axis=(0, 1))
        patch *= 1 - shadow * rng.uniform(0.3, 0.6)
    # Where no border was asked for, both layers are the same and the border's colour never shows.
    border = _ink(rng, float(ink @ _LUMA), 70)
    patch += (border - patch) * layers[..., 1:]
    patch += (ink - patch) * layers[..., :1]


def _ink(rng: np.random.Generator, ground: float, contrast: float) -> Rgb:
    """A random colour whose luminance is `contrast` from `ground` (0-255), or as far as it can be."""
    up, down = ground + contrast, ground - contrast
    if up > 250 and down < 5:
        target = 255.0 if ground < 127 else 0.0
    elif down < 5 or (up <= 250 and rng.random() < 0.5):
        target = up
    else:
        target = down
    tint = rng.uniform(-1, 1, 3).astype(np.float32)
    tint -= tint @ _LUMA
    # The strongest tint that keeps every channel in range keeps the luminance exact.
    room = np.where(tint > 0, 255 - target, target) / np.maximum(np.abs(tint), 1e-3)
    return (target + tint * min(float(room.min()), rng.uniform(0, 120))).astype(np.float32)


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
    """Edges, bars and rows of shapes: strokes of a word's size and spacing that are no word."""
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


def _draw_plate(rng: np.random.Generator, canvas: NDArray[np.float32], word: _Word) -> None:
    """A sign of one colour behind the word."""
    margin = word.height * rng.uniform(0.15, 0.4)
    ring = np.asarray(Ring(word.outline).buffer(margin, join_style="mitre").exterior.coords)
    colour = tuple(map(float, _colour(rng)))
    cv2.fillPoly(canvas, [np.round(ring - 0.5).astype(np.int32)], colour, cv2.LINE_AA)


def _camera(rng: np.random.Generator, canvas: NDArray[np.float32], difficulty: float) -> NDArray[np.uint8]:
    """Blur, sensor noise and JPEG artefacts."""
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

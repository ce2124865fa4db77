"""Backgrounds of synthetic text: procedural streets and shops, photographs, and clutter that is not text."""

from __future__ import annotations

import colorsys
from functools import cache

import cv2
import numpy as np
from cv2.typing import MatLike
from numpy.typing import NDArray

from i3cl import storage
from i3cl.data.formats.checks import is_companion
from i3cl.data.loading.endings import IMAGE_ENDINGS
from i3cl.data.loading.images import decode_image
from i3cl.errors import UserError

Picture = NDArray[np.uint8]
"""(H, W, 3) RGB."""
Colour = tuple[float, float, float]
_TEXTURE = 768


def background(rng: np.random.Generator, height: int, width: int, photographs: float, folder: str | None) -> Picture:
    """A picture of height x width pixels without text.

    photographs: share (0-1) of pictures that are photographs, if there are any; the others are procedural scenes. folder: the
    user's photographs without text, local or s3://; with it, no other photographs are used.
    """
    if rng.random() < photographs:
        sources = photograph_files(folder) if folder is not None else _packaged_photographs()
        if sources:
            choice = sources[rng.integers(len(sources))]
            return _crop(rng, _photograph(choice) if isinstance(choice, str) else choice, height, width)
    canvas: MatLike = _scene(rng, height, width)
    for _ in range(rng.integers(0, 7)):
        clutter(rng, canvas)
    if rng.random() < 0.5:
        # Seen from the side: one edge of the scene nearer than the other.
        corners = np.array([(0, 0), (width, 0), (width, height), (0, height)], np.float32)
        depth = rng.uniform(0, 0.35, 2)
        seen = corners + np.array([(0, -depth[0]), (0, -depth[1]), (0, depth[1]), (0, depth[0])]) * height
        matrix = cv2.getPerspectiveTransform(corners, seen.astype(np.float32))
        canvas = cv2.warpPerspective(canvas, matrix, (width, height), borderMode=cv2.BORDER_REFLECT)
    if rng.random() < 0.6:
        canvas = cv2.GaussianBlur(canvas, (0, 0), float(rng.uniform(0.4, 2.2)))
    return canvas.astype(np.uint8, copy=False)


def wall_colour(rng: np.random.Generator) -> Colour:
    """A random colour as things in streets have it: mostly greys, browns and dull blues. RGB, 0-255."""
    kind, pick, level = rng.random(3)
    hue = 0.02 + 0.11 * pick if kind < 0.55 else 0.54 + 0.12 * pick if kind < 0.8 else pick
    saturation = 0.6 * pick * rng.random() if kind < 0.85 else 0.3 + 0.6 * rng.random()
    red, green, blue = colorsys.hsv_to_rgb(hue, saturation, 0.08 + 0.87 * level)
    return red * 255, green * 255, blue * 255


# ----------------------------------------------------------------------------------------------- textures


@cache
def textures() -> list[NDArray[np.uint8]]:
    """Grey textures, _TEXTURE pixels square; made once per process, and the same in every process."""
    rng = np.random.default_rng(20)
    side = _TEXTURE
    made: list[MatLike] = []
    for sharpness in (0.35, 0.5, 0.62, 0.75, 0.9):
        made.append(_fractal(rng, side, sharpness))
    for stretch in (8, 24):
        grain = _fractal(rng, side, 0.8)[: side // stretch]
        made.append(cv2.resize(grain, (side, side), interpolation=cv2.INTER_CUBIC))
    y, x = np.mgrid[0:side, 0:side]
    plaster = _fractal(rng, side, 0.85)
    for tall, wide, joint in ((24, 64, 2), (40, 90, 4), (60, 60, 2), (96, 96, 3)):
        row = y // tall
        column = (x + (row % 2) * (wide // 2 if wide > tall else 0)) // wide
        shade = rng.uniform(-1, 1, (128, 128))[row % 128, column % 128]
        joints = (y % tall < joint) | ((x + (row % 2) * (wide // 2 if wide > tall else 0)) % wide < joint)
        made.append(0.5 * shade + 0.5 * plaster - 1.5 * joints)
    for period, share in ((12, 0.5), (26, 0.15), (40, 0.6)):
        made.append(1.2 * ((x % period) < share * period) + 0.4 * plaster)
        made.append(np.abs((y % period) / period - 0.5) * 3 + 0.3 * plaster)
    for sharpness in (0.8, 0.95):
        leaves = _fractal(rng, side, sharpness) + 0.7 * (_fractal(rng, side, 0.6) > 0.2)
        made.append(np.where(_fractal(rng, side, 0.9) > 0, leaves, leaves - 1.2))
    pebbles = cv2.resize(rng.uniform(-1, 1, (160, 160)), (side, side), interpolation=cv2.INTER_NEAREST)
    made.append(cv2.GaussianBlur(pebbles, (0, 0), 1.5) + 0.3 * plaster)
    result = [(255 * (t - t.min()) / np.ptp(t)).astype(np.uint8) for t in made]
    return result + [cv2.resize(t, (side, side)).astype(np.uint8) for t in _packaged_textures()]


def textured(rng: np.random.Generator, height: int, width: int, colour: Colour, depth: float | None = None) -> Picture:
    """A surface of height x width pixels: `colour` with a random texture of strength `depth` (0-1; None: random)."""
    library = textures()
    texture = library[rng.integers(len(library))]
    zoom = float(np.exp(rng.uniform(-0.8, 0.5)))
    tall, wide = min(round(height / zoom) + 1, _TEXTURE), min(round(width / zoom) + 1, _TEXTURE)
    y, x = rng.integers(_TEXTURE - tall + 1), rng.integers(_TEXTURE - wide + 1)
    crop: MatLike = texture[y : y + tall, x : x + wide]
    if rng.random() < 0.3:
        crop = crop.T
    if rng.random() < 0.5:
        crop = crop[:, ::-1]
    crop = cv2.resize(np.ascontiguousarray(crop), (width, height), interpolation=cv2.INTER_LINEAR)
    depth = float(rng.beta(1.3, 3)) if depth is None else depth
    other = np.array(wall_colour(rng)) if rng.random() < 0.25 else np.array(colour) * rng.uniform(0.2, 0.7)
    low = np.array(colour) * (1 - depth) + other * depth
    high = np.minimum(np.array(colour) * (1 + 0.5 * depth) + 12 * depth, 255)
    ramp = np.linspace(0, 1, 256)[:, None]
    table = (low + (high - low) * ramp).astype(np.uint8)
    return table[crop]


def _fractal(rng: np.random.Generator, side: int, sharpness: float) -> NDArray[np.floating]:
    total = np.zeros((side, side), np.float32)
    for octave in range(2, 9):
        cells = rng.standard_normal((2**octave, 2**octave)).astype(np.float32)
        total += sharpness**octave * cv2.resize(cells, (side, side), interpolation=cv2.INTER_CUBIC)
    return total / float(total.std())


# ----------------------------------------------------------------------------------------------- procedural scenes


def _scene(rng: np.random.Generator, height: int, width: int) -> Picture:
    """A wall close by, a street or a shop: planes with textures, one behind the other."""
    kind = rng.random()
    canvas = textured(rng, height, width, wall_colour(rng))
    if kind < 0.35:
        return canvas
    if kind < 0.65:
        horizon = int(height * rng.uniform(0.35, 0.85))
        if rng.random() < 0.6:
            _fill_gradient(canvas[:horizon], (110 + 60 * rng.random(), 160, 200 + 55 * rng.random()), (225, 230, 235))
        x = -int(rng.integers(0, width // 3))
        while x < width:
            wide = int(rng.integers(width // 8, width // 2))
            roof = int(rng.integers(0, max(horizon // 2, 1) + 1)) if rng.random() < 0.6 else 0
            left, right = max(x, 0), min(x + wide, width)
            if right - left > 4 and horizon - roof > 8 and rng.random() < 0.85:
                canvas[roof:horizon, left:right] = textured(rng, horizon - roof, right - left, wall_colour(rng))
                if rng.random() < 0.6:
                    _windows(rng, canvas[roof:horizon, left:right])
            x += wide
        grey = rng.uniform(50, 170)
        canvas[horizon:] = textured(rng, height - horizon, width, (grey, grey * 0.98, grey * 0.95))
        return canvas
    for _ in range(rng.integers(3, 12)):
        top, left = int(rng.integers(0, height - height // 8)), int(rng.integers(0, width - width // 10))
        bottom, right = top + int(rng.integers(height // 8, height)), left + int(rng.integers(width // 10, width // 2))
        part = canvas[top:bottom, left:right]
        part[:] = textured(rng, part.shape[0], part.shape[1], wall_colour(rng))
        if rng.random() < 0.5:
            _shelves(rng, part)
    return canvas


def _fill_gradient(part: Picture, top: Colour, bottom: Colour) -> None:
    mix = np.linspace(0, 1, part.shape[0])[:, None]
    part[:] = (np.array(top) * (1 - mix) + np.array(bottom) * mix).astype(np.uint8)[:, None]


def _windows(rng: np.random.Generator, part: Picture) -> None:
    tall, wide = int(rng.integers(12, 70)), int(rng.integers(8, 50))
    step_y, step_x = int(tall * rng.uniform(1.2, 2)), int(wide * rng.uniform(1.2, 2))
    frame, glass = wall_colour(rng), np.array(wall_colour(rng)) * 0.6
    for y in range(int(rng.integers(2, 12)), part.shape[0] - tall, step_y):
        for x in range(int(rng.integers(2, 12)), part.shape[1] - wide, step_x):
            shade = tuple((glass * rng.uniform(0.7, 1.4)).clip(0, 255).tolist())
            cv2.rectangle(part, (x, y), (x + wide, y + tall), shade, -1)
            cv2.rectangle(part, (x, y), (x + wide, y + tall), frame, 1 + int(rng.random() < 0.4))
            if wide > 16:
                cv2.line(part, (x + wide // 2, y), (x + wide // 2, y + tall), frame, 1)


def _shelves(rng: np.random.Generator, part: Picture) -> None:
    """Rows of goods: many small shapes of the size of a word."""
    tall = int(rng.integers(10, 44))
    board = wall_colour(rng)
    for y in range(0, part.shape[0] - tall, tall + int(rng.integers(3, 8))):
        x, wide = 0, int(rng.integers(5, 22))
        colour = wall_colour(rng)
        while x < part.shape[1]:
            if rng.random() < 0.25:
                colour, wide = wall_colour(rng), int(rng.integers(4, 24))
            high = int(tall * rng.uniform(0.6, 0.95))
            cv2.rectangle(part, (x, y + tall - high), (x + wide - 2, y + tall), colour, -1)
            if rng.random() < 0.4:
                cv2.circle(part, (x + wide // 2, y + tall - high // 2), max(wide // 4, 1), wall_colour(rng), -1)
            x += wide
        cv2.rectangle(part, (0, y + tall), (part.shape[1], y + tall + 2), board, -1)


def clutter(rng: np.random.Generator, canvas: MatLike) -> None:
    """Draw one thing that a detector might take for text: bars, grids, rows of shapes, lights, leaves, arrows, empty signs."""
    height, width = canvas.shape[:2]
    x, y = rng.uniform(0, width), rng.uniform(0, height)
    angle = rng.normal(0, 0.12) if rng.random() < 0.8 else rng.uniform(-1.6, 1.6)
    turn = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
    size = float(np.exp(rng.uniform(np.log(6), np.log(70))))
    colour, second = wall_colour(rng), wall_colour(rng)
    line = max(1, round(size * rng.uniform(0.05, 0.2)))

    def at(points: object) -> NDArray[np.int32]:
        return np.round(np.asarray(points, float) @ turn + [x, y]).astype(np.int32)

    def quad(left: float, top: float, wide: float, tall: float) -> NDArray[np.int32]:
        return at([(left, top), (left + wide, top), (left + wide, top + tall), (left, top + tall)])

    kind = rng.integers(10)
    if kind == 0:
        for place in range(rng.integers(4, 24)):
            cv2.fillConvexPoly(canvas, quad(place * size * 0.5, 0, line, size), colour, cv2.LINE_AA)
    elif kind == 1:
        rows, columns = rng.integers(2, 7, 2)
        cv2.fillConvexPoly(canvas, quad(0, 0, columns * size, rows * size), second, cv2.LINE_AA)
        for row in range(rows):
            for column in range(columns):
                cell = quad(column * size + line, row * size + line, size - 2 * line, size - 2 * line)
                cv2.fillConvexPoly(canvas, cell, colour, cv2.LINE_AA)
    elif kind == 2:
        shape = rng.uniform(0, 1, (int(rng.integers(3, 6)), 2)) * size
        for place in range(rng.integers(2, 9)):
            cv2.polylines(canvas, [at(shape + np.array([place * size * 1.2, 0]))], True, colour, line, cv2.LINE_AA)
    elif kind == 3:
        for place in range(rng.integers(1, 8)):
            centre = tuple(map(int, at([(place * size * 1.4, 0)])[0]))
            cv2.circle(canvas, centre, max(int(size / 2), 1), colour, -1 if rng.random() < 0.5 else line, cv2.LINE_AA)
    elif kind == 4:
        for _ in range(rng.integers(20, 70)):
            leaf = rng.normal(0, size * 1.5, 2) + rng.normal(0, size / 6, (4, 2))
            shade = tuple((np.array(colour) * rng.uniform(0.5, 1.3)).clip(0, 255).tolist())
            cv2.fillPoly(canvas, [at(leaf)], shade, cv2.LINE_AA)
    elif kind == 5:
        arrow = np.array([(0, 0.4), (1.2, 0.4), (1.2, 0.1), (2, 0.5), (1.2, 0.9), (1.2, 0.6), (0, 0.6)]) * size
        cv2.fillPoly(canvas, [quad(-0.3 * size, -0.2 * size, 2.6 * size, 1.4 * size)], second, cv2.LINE_AA)
        cv2.fillPoly(canvas, [at(arrow)], colour, cv2.LINE_AA)
    elif kind == 6:
        wide, tall = size * rng.uniform(1, 6), size * rng.uniform(0.6, 3)
        cv2.fillConvexPoly(canvas, quad(0, 0, wide, tall), colour, cv2.LINE_AA)
        cv2.polylines(canvas, [quad(0, 0, wide, tall)], True, second, line, cv2.LINE_AA)
    elif kind == 7:
        trail = np.cumsum(rng.normal(0, size / 2, (int(rng.integers(4, 20)), 2)), axis=0)
        cv2.polylines(canvas, [at(trail)], False, colour, line, cv2.LINE_AA)
    elif kind == 8:
        wide = rng.uniform(2, 14)
        cv2.fillConvexPoly(canvas, quad(0, -height, wide, 2 * height), colour, cv2.LINE_AA)
    else:
        for place in range(rng.integers(2, 12)):
            bar = rng.uniform(0.1, 1)
            cv2.fillConvexPoly(canvas, quad(0, place * size * 0.4, size * 6 * bar, max(size * 0.12, 1)), colour, cv2.LINE_AA)


# ----------------------------------------------------------------------------------------------- photographs


@cache
def _packaged_photographs() -> list[Picture]:
    """The photographs without text that scikit-image brings along; none when it is not installed."""
    try:
        from skimage import data
    except ImportError:
        return []
    grey = np.asarray(data.camera(), np.uint8)
    return [data.chelsea(), data.coffee(), data.rocket(), np.repeat(grey[..., None], 3, axis=2)]


@cache
def _packaged_textures() -> list[NDArray[np.uint8]]:
    try:
        from skimage import data
    except ImportError:
        return []
    return [data.brick(), data.grass(), data.gravel()]


@cache
def photograph_files(folder: str) -> list[str]:
    """Sorted paths of the photographs in a folder, without hidden files. UserError when there is none."""
    names = sorted(n for n in storage.list_files(folder) if n.lower().endswith(IMAGE_ENDINGS) and not is_companion(n))
    if not names:
        raise UserError(f"{folder}: holds no photograph ({', '.join(IMAGE_ENDINGS)}); correct scene_text.backgrounds")
    return [storage.join(folder, name) for name in names]


def _photograph(path: str) -> Picture:
    return decode_image(path)


def _crop(rng: np.random.Generator, photograph: Picture, height: int, width: int) -> Picture:
    """A random window of the photograph with the image's shape, at random mirrored and shifted in colour."""
    zoom = min(photograph.shape[0] / height, photograph.shape[1] / width) * rng.uniform(0.45, 1)
    tall, wide = max(int(height * zoom), 1), max(int(width * zoom), 1)
    y, x = rng.integers(photograph.shape[0] - tall + 1), rng.integers(photograph.shape[1] - wide + 1)
    part = photograph[y : y + tall, x : x + wide]
    if rng.random() < 0.5:
        part = part[:, ::-1]
    resized = cv2.resize(np.ascontiguousarray(part), (width, height), interpolation=cv2.INTER_LINEAR)
    # One curve per channel: exposure, and colour of the light.
    gamma, gains = np.exp(rng.normal(0, 0.3)), np.exp(rng.normal(0, 0.05, 3))
    table = (255 * (np.linspace(0, 1, 256)[:, None] ** gamma) * gains).clip(0, 255).astype(np.uint8)
    return cv2.LUT(resized, table[:, None]).astype(np.uint8, copy=False)

"""One synthetic photograph: signs, notices and lettering on a background, with the outline of every word.

A group of lines (a sign, say) is drawn flat at about its final size and put into the picture by one perspective map. The
outlines of its words go through the same map, so pixels and polygons agree. Every image depends on the settings and on
(seed, index) alone.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import cv2
import numpy as np
from cv2.typing import MatLike
from numpy.typing import NDArray

from i3cl import geometry
from i3cl.config import SceneTextSettings
from i3cl.data.formats.records import Instance
from i3cl.data.synthetic.backgrounds import (
    Colour,
    Picture,
    background,
    clutter,
    textured,
    wall_colour,
)
from i3cl.data.synthetic.bend import Line, Points, bend_line
from i3cl.data.synthetic.camera import street_camera
from i3cl.data.synthetic.fonts import (
    Face,
    Faces,
    covers,
    find_faces,
    font,
)
from i3cl.data.synthetic.ink import LUMA_EXACT, paint_ink
from i3cl.data.synthetic.words import line_of_words
from i3cl.errors import UserError

_MAP_CELL = 4
# Ground and letters of common signs, RGB.
_SIGN_COLOURS: tuple[tuple[Colour, Colour], ...] = (
    ((245, 245, 240), (25, 25, 28)),
    ((25, 60, 140), (245, 245, 245)),
    ((20, 95, 60), (245, 245, 240)),
    ((190, 25, 35), (250, 250, 245)),
    ((245, 200, 30), (20, 20, 20)),
    ((30, 30, 32), (240, 240, 235)),
    ((40, 36, 34), (205, 165, 90)),
    ((95, 60, 38), (240, 228, 200)),
    ((240, 232, 210), (150, 30, 35)),
    ((250, 250, 250), (25, 70, 160)),
    ((235, 110, 30), (255, 255, 255)),
    ((120, 30, 90), (245, 235, 240)),
)


@dataclass(frozen=True, slots=True)
class Scene:
    """One image and its words."""

    image: Picture
    """(height, width, 3) uint8 RGB, before the JPEG compression."""
    quality: int
    """JPEG quality that the image is meant to be stored with, 1-100."""
    instances: list[Instance]
    """Words with text and language; outlines run clockwise from the first letter along the top and back along the bottom."""


@dataclass(slots=True)
class _Group:
    """Lines arranged on one plane."""

    mask: NDArray[np.uint8]
    """(H, W) coverage of all letters."""
    outlines: list[Points] = field(default_factory=list)
    words: list[str] = field(default_factory=list)
    languages: list[str] = field(default_factory=list)


def make_scene(index: int, seed: int, settings: SceneTextSettings) -> Scene:
    """Image `index` of the endless set `seed`. ValueError for a negative index or seed."""
    if index < 0 or seed < 0:
        raise ValueError(f"index and seed must be at least 0, not {index} and {seed}")
    rng = np.random.default_rng(np.random.SeedSequence((seed, index)))
    faces = find_faces(settings.fonts)
    height, width = settings.height, settings.width
    canvas = np.ascontiguousarray(background(rng, height, width, settings.photographs, settings.backgrounds))
    for _ in range(rng.poisson(settings.clutter)):
        clutter(rng, canvas)
    wanted = max(1, round(settings.words * float(np.exp(rng.normal(0, 0.7)))))
    taken = np.zeros((-(-height // _MAP_CELL), -(-width // _MAP_CELL)), np.uint8)
    roughness = _roughness(canvas)
    instances: list[Instance] = []
    misses = 0
    while len(instances) < wanted and misses < 6:
        group, plate = _make_group(rng, settings, faces, wanted - len(instances))
        placed = _place(rng, canvas.shape[:2], group.mask.shape, roughness, taken)
        if placed is None:
            misses += 1
            continue
        matrix, window = placed
        _draw(rng, canvas, group, plate, matrix, window, settings, taken)
        instances += _instances(group, matrix, settings)
    canvas = street_camera(rng, canvas, settings)
    return Scene(canvas, int(rng.integers(*settings.jpeg_quality, endpoint=True)), instances)


# ----------------------------------------------------------------------------------------------- lines and groups


def _make_group(rng: np.random.Generator, settings: SceneTextSettings, faces: Faces, room: int) -> tuple[_Group, bool]:
    """A group of at most about `room` words, and whether it stands on a plate of its own."""
    size = min(float(np.exp(rng.normal(np.log(settings.size), settings.size_spread))), 0.4 * settings.height)
    kind = rng.random()
    notice = kind < 0.22 and room >= 4
    # Notices are many lines of small print; elsewhere a heading may have smaller lines under it.
    lines = int(rng.integers(3, 9)) if notice else 1 + int(rng.geometric(0.62)) - int(rng.random() < 0.5)
    if notice:
        size = min(size, 18.0) * 0.8
    language = _language(rng, settings, faces)
    face = _face(rng, faces, language)
    align = rng.choice(3, p=[0.6, 0.3, 0.1])
    drawn: list[Line] = []
    count, longest = 0, settings.width * 0.9
    for place in range(max(lines, 1)):
        if count >= room:
            break
        scale = 1.0 if place == 0 or notice else float(rng.uniform(0.4, 1.0))
        if not notice and place and rng.random() < 0.3:
            face = _face(rng, faces, language)
        length = int(rng.integers(2, 7)) if notice else int(rng.choice(4, p=[0.45, 0.3, 0.15, 0.1])) + 1
        words = line_of_words(rng, language, length)
        line = _draw_line(rng, words, face, language, max(size * scale, settings.smallest), longest)
        if not notice and rng.random() < settings.curved:
            line = bend_line(rng, line, settings.points_per_edge)
        drawn.append(line)
        count += len(line.words)
    return _stack(rng, drawn, int(align), size), kind < 0.75


def _language(rng: np.random.Generator, settings: SceneTextSettings, faces: Faces) -> str:
    shares = np.array([settings.latin, settings.digits, settings.cjk if faces.cjk else 0.0])
    if not shares.any():
        shares[0] = 1.0
    return str(rng.choice(["latin", "digits", "cjk"], p=shares / shares.sum()))


def _face(rng: np.random.Generator, faces: Faces, language: str) -> Face:
    families = faces.cjk if language == "cjk" else faces.latin
    family = families[rng.integers(len(families))]
    return family[rng.integers(len(family))]


def _draw_line(rng: np.random.Generator, words: list[str], face: Face, language: str, size: float, longest: float) -> Line:
    """The words in one row, letters about `size` pixels high, with ink outlines of four points."""
    if language != "cjk":
        words = ["".join(c for c in word if covers(face, c)) or "A" for word in words]
    # An em is about 1.4 capital letters high.
    em = size * (1.1 if language == "cjk" else 1.4)
    # Letters too large for one word to fit the image would only be shrunk again.
    widest = max(font(face, 20).getlength(word) for word in words)
    made = font(face, max(round(min(em, 20 * longest / max(widest, 1))), 6))
    spread = float(rng.uniform(0.05, 0.35)) * size if rng.random() < 0.15 else 0.0
    gap = made.getlength(" ") + spread + float(rng.uniform(0, 0.3)) * size
    pieces: list[tuple[NDArray[np.uint8], int, int]] = []
    kept: list[str] = []
    spans: list[tuple[int, int]] = []
    pen = 0.0
    for word in words:
        if kept and pen + made.getlength(word) > longest:
            break
        first = len(pieces)
        for part in word if spread else [word]:
            core, (left, top) = made.getmask2(part, mode="L", anchor="ls")
            if core.size[0] and core.size[1]:
                mask = np.asarray(core, np.uint8).reshape(core.size[1], core.size[0])
                pieces.append((mask, round(pen) + int(left), int(top)))
            pen += made.getlength(part) + spread
        if len(pieces) > first:
            kept.append(word)
            spans.append((first, len(pieces)))
        pen += gap
    if not pieces:
        raise UserError(f"{face.path}: draws nothing for {words[0]!r}; remove the typeface")
    left = min(x for _, x, _ in pieces) - 1
    top = min(y for _, _, y in pieces) - 1
    right = max(x + mask.shape[1] for mask, x, _ in pieces) + 1
    bottom = max(y + mask.shape[0] for mask, _, y in pieces) + 1
    canvas = np.zeros((bottom - top, right - left), np.uint8)
    outlines = []
    for first, last in spans:
        low, high = np.array([np.inf, np.inf]), np.array([-np.inf, -np.inf])
        for mask, x, y in pieces[first:last]:
            np.maximum(target := canvas[y - top : y - top + mask.shape[0], x - left : x - left + mask.shape[1]], mask, out=target)
            ink = mask > 80
            rows, columns = np.flatnonzero(ink.any(axis=1)), np.flatnonzero(ink.any(axis=0))
            if len(rows):
                low = np.minimum(low, [x - left + columns[0], y - top + rows[0]])
                high = np.maximum(high, [x - left + columns[-1] + 1, y - top + rows[-1] + 1])
        if not np.isfinite(low).all():
            low, high = np.zeros(2), np.array(canvas.shape[::-1], float)
        outlines.append(np.array([low, [high[0], low[1]], high, [low[0], high[1]]], np.float64))
    return Line(canvas, outlines, kept, language)


def _stack(rng: np.random.Generator, lines: list[Line], align: int, size: float) -> _Group:
    """Lines under each other. align: 0 centred, 1 left, 2 right."""
    gap = max(round(size * float(rng.uniform(0.15, 0.6))), 2)
    margin_x, margin_y = (max(round(size * float(rng.uniform(0.2, 0.9))), 2) for _ in range(2))
    width = max(line.mask.shape[1] for line in lines) + 2 * margin_x
    height = sum(line.mask.shape[0] for line in lines) + gap * (len(lines) - 1) + 2 * margin_y
    group = _Group(np.zeros((height, width), np.uint8))
    y = margin_y
    for line in lines:
        tall, wide = line.mask.shape
        x = (width - wide) // 2 if align == 0 else margin_x if align == 1 else width - wide - margin_x
        group.mask[y : y + tall, x : x + wide] = line.mask
        group.outlines += [ring + np.array([x, y]) for ring in line.outlines]
        group.words += line.words
        group.languages += [line.language] * len(line.words)
        y += tall + gap
    return group


# ----------------------------------------------------------------------------------------------- placing


def _roughness(canvas: Picture) -> NDArray[np.float64]:
    """Integral image of the gradient's size, in cells of _MAP_CELL pixels."""
    height, width = canvas.shape[:2]
    size = (-(-width // _MAP_CELL), -(-height // _MAP_CELL))
    grey = cv2.cvtColor(cv2.resize(canvas, size, interpolation=cv2.INTER_AREA), cv2.COLOR_RGB2GRAY)
    gradient = cv2.morphologyEx(grey, cv2.MORPH_GRADIENT, np.ones((3, 3), np.uint8))
    return np.asarray(cv2.integral(gradient), np.float64)


def _place(
    rng: np.random.Generator,
    image: tuple[int, ...],
    group: tuple[int, ...],
    roughness: NDArray[np.float64],
    taken: NDArray[np.uint8],
) -> tuple[NDArray[np.float64], tuple[int, int, int, int]] | None:
    """A perspective map into the smoothest of some free places, and its window x0, y0, x1, y1; None when nothing is free.

    Marks the window in `taken`.
    """
    height, width = image[:2]
    tall, wide = map(float, group)
    shape = np.array([(0, 0), (wide, 0), (wide, tall), (0, tall)]) - [wide / 2, tall / 2]
    yaw, pitch = rng.normal(0, 0.08, 2).clip(-0.25, 0.25) * (rng.random(2) < [0.7, 0.5])
    quad = shape.copy()
    quad[:, 1] *= 1 + yaw * np.array([-1, 1, 1, -1])
    quad[:, 0] *= (1 + pitch * np.array([-1, -1, 1, 1])) * (1 - abs(yaw))
    quad[:, 1] *= 1 - 0.5 * abs(pitch)
    if rng.random() < 0.3:
        quad[:, 0] *= rng.uniform(0.75, 1.3)
    choice = rng.random()
    angle = rng.normal(0, 0.06) if choice < 0.8 else rng.normal(0, 0.3) if choice < 0.97 else rng.uniform(-np.pi, np.pi)
    if rng.random() < 0.3:
        quad[:, 1] += np.tan(rng.normal(0, 0.12)) * quad[:, 0]
    quad = quad @ np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
    spread = np.ptp(quad, axis=0)
    quad *= min(1.0, 0.96 * width / spread[0], 0.96 * height / spread[1])
    low, high = quad.min(axis=0), quad.max(axis=0)
    # Now and then a sign is cut by the image's border.
    outside = 0.35 if rng.random() < 0.08 else 0.0
    reach = (high - low) * outside
    places = rng.uniform(-low - reach + 1, np.maximum([width, height] - high + reach - 1, -low - reach + 2), (24, 2))
    blocked = np.asarray(cv2.integral(taken), np.float64)
    best, best_score = None, np.inf
    for place in places:
        x0, y0 = np.maximum(np.floor((place + low) / _MAP_CELL).astype(int), 0)
        x1, y1 = np.minimum(np.ceil((place + high) / _MAP_CELL).astype(int), taken.shape[::-1])
        if x1 <= x0 or y1 <= y0 or _sum(blocked, x0, y0, x1, y1):
            continue
        score = _sum(roughness, x0, y0, x1, y1) / ((x1 - x0) * (y1 - y0))
        if score < best_score:
            best, best_score = (place, (x0, y0, x1, y1)), score
    if best is None:
        return None
    place, (x0, y0, x1, y1) = best
    taken[y0:y1, x0:x1] = 1
    corners = np.array([(0, 0), (wide, 0), (wide, tall), (0, tall)], np.float32)
    matrix = cv2.getPerspectiveTransform(corners, (quad + place).astype(np.float32))
    left, top = np.maximum(np.floor(place + low).astype(int) - 2, 0).tolist()
    right, bottom = np.minimum(np.ceil(place + high).astype(int) + 2, [width, height]).tolist()
    return np.asarray(matrix, np.float64), (left, top, right, bottom)


def _sum(integral: NDArray[np.float64], x0: int, y0: int, x1: int, y1: int) -> float:
    return float(integral[y1, x1] - integral[y0, x1] - integral[y1, x0] + integral[y0, x0])


def _map(points: Points, matrix: NDArray[np.float64]) -> Points:
    mapped = np.concatenate([points, np.ones((len(points), 1))], axis=1) @ matrix.T
    return mapped[:, :2] / mapped[:, 2:]


def _instances(group: _Group, matrix: NDArray[np.float64], settings: SceneTextSettings) -> list[Instance]:
    """The parts of the words that are inside the image; cut and illegible words are ignore regions."""
    made = []
    for outline, word, language in zip(group.outlines, group.words, group.languages, strict=True):
        ring = _map(outline, matrix).astype(np.float32)
        inside = geometry.clip_polygon(ring, settings.width, settings.height)
        if inside is None or geometry.polygon_area(inside) < 1:
            continue
        cut = geometry.polygon_area(inside) < 0.5 * geometry.polygon_area(ring)
        tiny = geometry.short_side(ring) < settings.ignore_below
        made.append(Instance(inside, ignore=cut or tiny, text=word, language=language))
    return made


# ----------------------------------------------------------------------------------------------- drawing


def _draw(
    rng: np.random.Generator,
    canvas: Picture,
    group: _Group,
    plate: bool,
    matrix: NDArray[np.float64],
    window: tuple[int, int, int, int],
    settings: SceneTextSettings,
    taken: NDArray[np.uint8],
) -> None:
    """Draw the group into the picture, and perhaps a post under it where nothing is `taken`."""
    x0, y0, x1, y1 = window
    patch = canvas[y0:y1, x0:x1]
    if not patch.size:
        return
    faint = rng.random() < settings.faint
    size = float(np.median([np.ptp(ring[:, 1]) for ring in group.outlines]))
    if plate:
        layer = _plate(rng, group, size, faint)
        _mount(rng, canvas, matrix, group.mask.shape, size, taken)
    else:
        layer = _lettering(rng, group, size, patch.reshape(-1, 3).mean(axis=0), faint)
    # Pixel centres lie at halves in our coordinates and at whole numbers in OpenCV's.
    before, after = np.eye(3), np.eye(3)
    before[:2, 2], after[:2, 2] = 0.5, (-x0 - 0.5, -y0 - 0.5)
    to_window = after @ matrix @ before
    warped = cv2.warpPerspective(layer, to_window, (x1 - x0, y1 - y0), flags=cv2.INTER_LINEAR)
    alpha = warped[..., 3:].astype(np.float32)
    if plate:
        patch[:] = (patch * (1 - alpha / 255) + warped[..., :3]).clip(0, 255)
        return
    # Paint on a wall: the wall's texture shows through.
    grey = cv2.cvtColor(patch, cv2.COLOR_RGB2GRAY).astype(np.float32)
    relief = (grey + 20) / (cv2.blur(grey, (9, 9)) + 20)
    patch[:] = (patch * (1 - alpha / 255) + warped[..., :3] * relief[..., None] ** 0.7).clip(0, 255)


def _mount(
    rng: np.random.Generator,
    canvas: Picture,
    matrix: NDArray[np.float64],
    shape: tuple[int, ...],
    size: float,
    taken: NDArray[np.uint8],
) -> None:
    """Draw what holds a plate: a shadow on what is behind it, or a post under it."""
    tall, wide = map(float, shape)
    corners = _map(np.array([(0, 0), (wide, 0), (wide, tall), (0, tall)]), matrix)
    kind = rng.random()
    if kind < 0.4:
        shift = np.array([rng.uniform(-0.3, 0.3), rng.uniform(0.05, 0.35)]) * size
        low = np.maximum(np.floor(corners.min(axis=0) + shift - size / 2), 0).astype(int)
        high = np.minimum(np.ceil(corners.max(axis=0) + shift + size / 2), canvas.shape[1::-1]).astype(int)
        part = canvas[low[1] : high[1], low[0] : high[0]]
        if part.size:
            shade = np.zeros(part.shape[:2], np.uint8)
            cv2.fillConvexPoly(shade, np.round(corners + shift - low).astype(np.int32), int(rng.integers(60, 170)))
            reach = 2 * max(1, round(size * 0.15)) + 1
            part[:] = part * (1 - cv2.blur(shade, (reach, reach))[..., None].astype(np.float32) / 255)
    elif kind < 0.55:
        post = float(rng.uniform(0.04, 0.12)) * wide
        middle = (corners[2] + corners[3]) / 2
        ends = [(middle[0] - post / 2, middle[1]), (middle[0] + post / 2, middle[1])]
        foot = [(ends[1][0], canvas.shape[0]), (ends[0][0], canvas.shape[0])]
        below = taken[
            int(max(corners[:, 1].max(), 0)) // _MAP_CELL + 1 :,
            max(int(ends[0][0]) // _MAP_CELL, 0) : max(int(ends[1][0]) // _MAP_CELL + 1, 0),
        ]
        if not below.any():
            below[:] = 1
            cv2.fillConvexPoly(canvas, np.round(np.array(ends + foot)).astype(np.int32), wall_colour(rng), cv2.LINE_AA)


def _plate(rng: np.random.Generator, group: _Group, size: float, faint: bool) -> Picture:
    """(H, W, 4) premultiplied RGBA of a sign with the letters on it."""
    height, width = group.mask.shape
    ground, ink = _SIGN_COLOURS[rng.integers(len(_SIGN_COLOURS))] if rng.random() < 0.6 else (wall_colour(rng), (0.0, 0.0, 0.0))
    ground = tuple((np.array(ground) * rng.uniform(0.75, 1) + rng.normal(0, 12, 3)).clip(0, 255))
    target = np.array(ink) + rng.normal(0, 12, 3)
    if faint or abs(float((target - np.array(ground)) @ LUMA_EXACT)) < 60:
        target = paint_ink(rng, np.array(ground), float(rng.uniform(22, 50) if faint else rng.uniform(70, 170)))
    texture = float(rng.beta(1, 6)) if rng.random() < 0.8 else float(rng.beta(2, 3))
    picture = textured(rng, height, width, ground, texture).astype(np.float32)
    alpha = np.full((height, width), 255, np.uint8)
    shape = rng.random()
    if shape < 0.3:
        radius = max(1, int(min(height, width) * rng.uniform(0.05, 0.25)))
        alpha[:] = 0
        cv2.rectangle(alpha, (radius, 0), (width - radius - 1, height), 255, -1)
        cv2.rectangle(alpha, (0, radius), (width, height - radius - 1), 255, -1)
        for x in (radius, width - radius - 1):
            for y in (radius, height - radius - 1):
                cv2.circle(alpha, (x, y), radius, 255, -1, cv2.LINE_AA)
    edge = max(1, round(size * float(rng.uniform(0.04, 0.15))))
    if shape > 0.2 and rng.random() < 0.35:
        inset = edge * int(rng.integers(0, 3))
        colour = tuple(map(float, target)) if rng.random() < 0.7 else wall_colour(rng)
        cv2.rectangle(picture, (inset, inset), (width - 1 - inset, height - 1 - inset), colour, edge)
    _write(rng, picture, group.mask, target, size)
    if rng.random() < 0.4:
        # Light falls unevenly on a sign.
        light = cv2.resize(rng.uniform(0.75, 1.15, (2, 3)).astype(np.float32), (width, height), interpolation=cv2.INTER_LINEAR)
        picture *= light[..., None]
    picture *= alpha[..., None].astype(np.float32) / 255
    return np.dstack([picture.clip(0, 255).astype(np.uint8), alpha])


def _write(
    rng: np.random.Generator, picture: NDArray[np.float32], mask: NDArray[np.uint8], ink: NDArray[np.float64], size: float
) -> None:
    """Letters into an opaque float picture, perhaps with a shadow, a border or a relief."""
    effect = rng.random() if size > 12 else 1.0
    reach = max(1, round(size * float(rng.uniform(0.04, 0.12))))
    if effect < 0.15:
        shadow = _shifted(mask, reach, reach)
        picture *= 1 - (shadow.astype(np.float32) * np.float32(rng.uniform(0.3, 0.8) / 255))[..., None]
    elif effect < 0.25:
        border = cv2.dilate(mask, cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * reach + 1, 2 * reach + 1)))
        _over(picture, border, paint_ink(rng, ink, float(rng.uniform(80, 180))))
    _over(picture, mask, ink)
    if 0.25 <= effect < 0.37:
        soft = cv2.GaussianBlur(mask, (0, 0), max(reach * 0.7, 0.7)).astype(np.float32)
        slope = np.roll(soft, 1, axis=0) - np.roll(soft, -1, axis=0) + np.roll(soft, 1, axis=1) - np.roll(soft, -1, axis=1)
        picture -= (slope * np.float32(rng.uniform(0.2, 0.6)))[..., None]


def _over(picture: NDArray[np.float32], mask: MatLike, colour: NDArray[np.float64]) -> None:
    picture += (np.asarray(colour, np.float32) - picture) * (mask.astype(np.float32) / 255)[..., None]


def _lettering(rng: np.random.Generator, group: _Group, size: float, ground: NDArray[np.float64], faint: bool) -> Picture:
    """(H, W, 4) premultiplied RGBA of letters without a plate."""
    ink = paint_ink(rng, ground, float(rng.uniform(25, 50) if faint else rng.uniform(70, 180)))
    picture = np.zeros((*group.mask.shape, 4), np.float32)
    effect = rng.random() if size > 12 else 1.0
    reach = max(1, round(size * float(rng.uniform(0.04, 0.13))))
    if effect < 0.3:
        shadow: MatLike = _shifted(group.mask, reach, reach)
        if rng.random() < 0.5:
            shadow = cv2.GaussianBlur(shadow, (0, 0), reach)
        picture[..., 3] = shadow.astype(np.float32) * np.float32(rng.uniform(0.3, 0.8))
    elif effect < 0.45:
        border = cv2.dilate(group.mask, cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * reach + 1, 2 * reach + 1)))
        _over(picture, border, np.append(paint_ink(rng, ink, float(rng.uniform(80, 180))), 255))
    # Premultiplied: where the mask is partly set, colour and coverage fall together.
    _over(picture, group.mask, np.append(ink, 255))
    return picture.clip(0, 255).astype(np.uint8)


def _shifted(mask: NDArray[np.uint8], x: int, y: int) -> NDArray[np.uint8]:
    moved = np.zeros_like(mask)
    moved[y:, x:] = mask[:-y, :-x]
    return moved

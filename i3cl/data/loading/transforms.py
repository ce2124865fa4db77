"""Training augmentation and test-time resizing: image and polygons move together through one affine map.

All geometry is in continuous pixel coordinates (pixel i covers [i, i + 1)), so a flip of width W sends x to
W - x.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from statistics import NormalDist
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np
from numpy.typing import NDArray

from i3cl import geometry
from i3cl.config import TransformSettings
from i3cl.data.formats.records import ImageRecord, Instance
from i3cl.data.loading.images import ImageError, resize, scaled_size, test_scale
from i3cl.errors import UserError

if TYPE_CHECKING:
    import torch

FILL = (124, 116, 104)
"""RGB where a rotation uncovers pixels and where patches are erased: the mean, which normalising turns into about zero."""
ROTATION = {"rotate": 10.0, "colour_rotate": 15.0}
"""Largest angle of a policy, degrees."""
JITTER = 0.4
"""Colour, brightness and contrast are each multiplied by a number from 1 - this to 1 + this."""
GREY = np.array([0.299, 0.587, 0.114])


@dataclass(frozen=True, eq=False)
class TrainingImage:
    """An image ready for the network, and its record in the pixels of that image."""

    image: NDArray[np.uint8]
    """(h, w, 3) uint8 RGB."""
    record: ImageRecord
    """Its height and width are those of `image`, and every polygon lies inside it."""
    matrix: NDArray[np.float64] = field(default_factory=lambda: np.eye(2, 3))
    """(2, 3) original continuous pixels to those of `image`."""
    source: int = 0
    """Number of its training set in data.train."""
    weight: float = 1.0
    """Factor of all its losses."""
    problem: str | None = None
    """Why the image of the file could not be used, with the file's name; `image` is then an empty grey one of weight 0."""

    def to_original(self, points: NDArray[np.floating]) -> NDArray[np.float32]:
        """(..., 2) points of `image` in the pixels of the original."""
        inverse = np.linalg.inv(self.matrix[:, :2])
        return ((np.asarray(points, np.float64) - self.matrix[:, 2]) @ inverse.T).astype(np.float32)


class TrainTransform:
    """Random flips, one policy, a random scale, an optional square crop, strong augmentation; see ``TransformSettings``."""

    def __init__(self, settings: TransformSettings) -> None:
        if not settings.short_sides or not settings.policies:
            raise UserError("data.transform: short_sides and policies need at least one entry each")
        self.settings = settings

    def __call__(self, image: NDArray[np.uint8], record: ImageRecord, rng: np.random.Generator) -> TrainingImage:
        """One random variant of an image (H, W, 3) uint8 RGB; the same `rng` state gives the same variant.

        ImageError when the image does not have the record's size.
        """
        check_size(image.shape[0], image.shape[1], record)
        settings = self.settings
        height, width = image.shape[:2]
        flip_x = rng.random() < settings.flip_horizontal
        flip_y = rng.random() < settings.flip_vertical
        policy = settings.policies[rng.integers(len(settings.policies))]
        angle = 0.0
        if policy in ROTATION and rng.random() < 0.5:
            most = ROTATION[policy] if settings.rotation is None else settings.rotation
            angle = rng.uniform(-most, most)
        size = rng.integers(len(settings.short_sides))
        long_cap = settings.long_caps[size] if settings.long_caps else settings.long_cap
        scale = test_scale(height, width, settings.short_sides[size], long_cap)
        if settings.scale_jitter != (1, 1):
            scale = min(scale * float(np.exp(rng.uniform(*np.log(settings.scale_jitter)))), long_cap / max(height, width))
        out_height, out_width = scaled_size(height, width, scale)

        # Rotate first: rounding the sides to whole pixels stretches x and y by slightly different factors.
        matrix = _flip(flip_x, flip_y, width, height)
        matrix = _rotation(angle, width / 2, height / 2) @ matrix
        matrix = np.diag([out_width / width, out_height / height, 1.0]) @ matrix
        polygons = _move([i.polygon for i in record.instances], matrix)
        if settings.crop and (settings.crop < out_height or settings.crop < out_width):
            x, y, out_width, out_height = self._window(polygons, record, out_height, out_width, rng)
            matrix = np.array([[1, 0, -x], [0, 1, -y], [0, 0, 1.0]]) @ matrix
            polygons = [p - np.array([x, y], np.float32) for p in polygons]

        pixels = _warp(image, matrix, out_height, out_width, scale, angle != 0)
        if policy in ("colour", "colour_rotate"):
            pixels = _jitter(pixels, rng)
        pixels = change_colours(pixels, settings, rng)
        erased = None
        if settings.erase and rng.random() < settings.erase:
            erased = _patches(settings, out_height, out_width, rng)
            pixels[erased] = FILL
        instances = self._visible(polygons, record, out_height, out_width, erased)
        moved = replace(record, height=out_height, width=out_width, instances=instances)
        return TrainingImage(pixels, moved, matrix[:2])

    def _window(
        self,
        polygons: Sequence[NDArray[np.float32]],
        record: ImageRecord,
        height: int,
        width: int,
        rng: np.random.Generator,
    ) -> tuple[int, int, int, int]:
        """x, y, width, height of the crop: around a random instance three times in four, else anywhere."""
        side = self.settings.crop
        crop = np.minimum(side, [width, height])
        low, high = np.zeros(2), np.array([width, height]) - crop
        boxes = [geometry.polygon_box(p) for p, i in zip(polygons, record.instances, strict=True) if not i.ignore]
        if boxes and rng.random() < 0.75:
            box = boxes[rng.integers(len(boxes))]
            # All windows that hold the whole instance, or that lie within it where it is larger than the window.
            ends = np.sort([box[:2], box[2:] - crop], axis=0)
            low, high = np.clip(ends[0], low, high), np.clip(ends[1], low, high)
        start = np.minimum(np.ceil(low), np.floor(high)).astype(np.int64)
        x, y = rng.integers(start, np.floor(high).astype(np.int64) + 1)
        return int(x), int(y), int(crop[0]), int(crop[1])

    def _visible(
        self,
        polygons: Sequence[NDArray[np.float32]],
        record: ImageRecord,
        height: int,
        width: int,
        erased: NDArray[np.bool_] | None = None,
    ) -> tuple[Instance, ...]:
        """The instances clipped to the image; what is mostly outside, too small or mostly erased is to be ignored."""
        settings = self.settings
        kept = []
        for polygon, instance in zip(polygons, record.instances, strict=True):
            low, high = polygon.min(axis=0), polygon.max(axis=0)
            if high[0] <= 0 or high[1] <= 0 or low[0] >= width or low[1] >= height:
                continue
            clipped = geometry.clip_polygon(polygon, width, height)
            if clipped is None:
                continue
            share = 1.0
            if clipped is not polygon:
                share = geometry.polygon_area(clipped) / max(geometry.polygon_area(polygon), 1e-9)
            side = float(np.ptp(clipped, axis=0).min())
            hidden = share < settings.min_visible or side < settings.min_side
            hidden = hidden or (erased is not None and _covered(clipped, erased) > 0.5)
            kept.append(replace(instance, polygon=clipped, ignore=instance.ignore or hidden))
        return tuple(kept)


class EvalTransform:
    """Resizing to the test size; nothing random."""

    def __init__(self, short_side: int, long_side: int, upscale: bool = True) -> None:
        self.short_side, self.long_side, self.upscale = short_side, long_side, upscale

    def __call__(self, image: NDArray[np.uint8], record: ImageRecord) -> TrainingImage:
        """The image (H, W, 3) uint8 RGB at test size, with all instances of the record.

        ImageError when the image does not have the record's size.
        """
        check_size(image.shape[0], image.shape[1], record)
        height, width = image.shape[:2]
        pixels = resize(image, test_scale(height, width, self.short_side, self.long_side, self.upscale))
        matrix = np.diag([pixels.shape[1] / width, pixels.shape[0] / height, 1.0])
        polygons = _move([i.polygon for i in record.instances], matrix)
        instances = (replace(i, polygon=p) for i, p in zip(record.instances, polygons, strict=True))
        moved = replace(record, height=pixels.shape[0], width=pixels.shape[1], instances=tuple(instances))
        return TrainingImage(pixels, moved, matrix[:2])


def to_target(sample: TrainingImage) -> tuple[torch.Tensor, dict[str, Any]]:
    """The input of the network for one image: the image (3, h, w) float32 RGB, 0-255, and its target.

    boxes (N, 4) float32 x0, y0, x1, y1 tight around the polygons; labels (N,) int64 zeros; masks: N uint8
    tensors (h, w) of 0 and 1, each of the polygon's own pixel box, whose left top is in mask_origins (N, 2)
    int64 x, y; lossweight (N,) float32; outlineweight (N,) float32, where any is not 1; ignore (N,) bool;
    image_weight, a float.
    """
    # Imported here: processes that only decode and augment do not need torch.
    import torch

    instances = sample.record.instances
    height, width = sample.image.shape[:2]
    crops = [geometry.mask_crop(i.polygon, height, width) for i in instances]
    origins = np.stack([o for _, o in crops]) if crops else np.zeros((0, 2), np.int64)
    target: dict[str, Any] = {
        "boxes": torch.from_numpy(geometry.boxes_of([i.polygon for i in instances])),
        "labels": torch.zeros(len(instances), dtype=torch.int64),
        "masks": [torch.from_numpy(mask) for mask, _ in crops],
        "mask_origins": torch.from_numpy(origins),
        "lossweight": torch.tensor([i.lossweight for i in instances], dtype=torch.float32),
        "ignore": torch.tensor([i.ignore for i in instances], dtype=torch.bool),
        "image_weight": sample.weight,
    }
    if any(i.outlineweight != 1 for i in instances):
        target["outlineweight"] = torch.tensor([i.outlineweight for i in instances], dtype=torch.float32)
    return torch.from_numpy(sample.image.transpose(2, 0, 1).astype(np.float32, order="C")), target


def check_size(height: int, width: int, record: ImageRecord) -> None:
    """ImageError when an image of height x width pixels is not of the size that its record says."""
    if (height, width) != (record.height, record.width):
        on_its_side = (width, height) == (record.height, record.width)
        turned = " (turned: pixels count as stored, without EXIF rotation)" if on_its_side else ""
        raise ImageError(
            f"{record.file_name}: the image is {width} x {height} but its annotation says "
            f"{record.width} x {record.height}{turned}; correct the annotation"
        )


def _flip(flip_x: bool, flip_y: bool, width: int, height: int) -> NDArray[np.float64]:
    return np.array(
        [
            [-1.0 if flip_x else 1.0, 0, width if flip_x else 0],
            [0, -1.0 if flip_y else 1.0, height if flip_y else 0],
            [0, 0, 1],
        ]
    )


def _rotation(degrees: float, x: float, y: float) -> NDArray[np.float64]:
    c, s = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    return np.array([[c, -s, x - c * x + s * y], [s, c, y - s * x - c * y], [0, 0, 1]])


def _move(polygons: Sequence[NDArray[np.float32]], matrix: NDArray[np.float64]) -> list[NDArray[np.float32]]:
    return [(p @ matrix[:2, :2].T + matrix[:2, 2]).astype(np.float32) for p in polygons]


def _warp(
    image: NDArray[np.uint8],
    matrix: NDArray[np.float64],
    height: int,
    width: int,
    scale: float,
    rotated: bool,
) -> NDArray[np.uint8]:
    if scale < 0.5:
        # Bilinear sampling alone would skip source pixels; shrink by area first, as at test time.
        small = resize(image, scale)
        matrix = matrix @ np.diag([image.shape[1] / small.shape[1], image.shape[0] / small.shape[0], 1.0])
        image = small
    # warpAffine's coordinates are those of pixel centres.
    to_centres = np.array([[1, 0, 0.5], [0, 1, 0.5], [0, 0, 1]])
    from_centres = np.array([[1, 0, -0.5], [0, 1, -0.5], [0, 0, 1]])
    centred = (from_centres @ matrix @ to_centres)[:2]
    border = cv2.BORDER_CONSTANT if rotated else cv2.BORDER_REPLICATE
    warped = cv2.warpAffine(image, centred, (width, height), flags=cv2.INTER_LINEAR, borderMode=border, borderValue=FILL)
    return warped.astype(np.uint8, copy=False)


def _jitter(image: NDArray[np.uint8], rng: np.random.Generator) -> NDArray[np.uint8]:
    """Colour, brightness and contrast, each with probability one half, as one map of the RGB cube."""
    colour, brightness, contrast = np.where(rng.random(3) < 0.5, rng.uniform(1 - JITTER, 1 + JITTER, 3), 1.0)
    if colour == brightness == contrast == 1:
        return image
    return _recoloured(image, colour * np.eye(3) + (1 - colour) * GREY, brightness, contrast)


def _recoloured(image: NDArray[np.uint8], matrix: NDArray[np.float64], brightness: float, contrast: float) -> NDArray[np.uint8]:
    """The image's colours times a matrix (3, 3) that keeps grey values, then contrast around the mean grey, then brightness."""
    matrix = contrast * brightness * matrix
    offset = (1 - contrast) * brightness * float(np.array(cv2.mean(image)[:3]) @ GREY)
    return cv2.transform(image, np.column_stack([matrix, np.full(3, offset)])).astype(np.uint8, copy=False)


_TO_YIQ = np.array([[0.299, 0.587, 0.114], [0.5959, -0.2746, -0.3213], [0.2115, -0.5227, 0.3112]])


def change_colours(image: NDArray[np.uint8], settings: TransformSettings, rng: np.random.Generator) -> NDArray[np.uint8]:
    """The strong augmentation that moves no pixel: colour, grey, blur, noise, JPEG; what is off draws no random number.

    image: (H, W, 3) uint8 RGB, which is not changed. Returns an image of that kind.
    """
    matrix, brightness, contrast = np.eye(3), 1.0, 1.0
    if settings.jitter and rng.random() < settings.jitter:
        amounts = (settings.jitter_brightness, settings.jitter_contrast, settings.jitter_saturation)
        brightness, contrast, saturation = 1 + rng.uniform(-1, 1, 3) * amounts
        turn = 2 * np.pi * rng.uniform(-settings.jitter_hue, settings.jitter_hue)
        hue = np.array([[1, 0, 0], [0, np.cos(turn), -np.sin(turn)], [0, np.sin(turn), np.cos(turn)]])
        matrix = (saturation * np.eye(3) + (1 - saturation) * GREY) @ np.linalg.inv(_TO_YIQ) @ hue @ _TO_YIQ
    if settings.grey and rng.random() < settings.grey:
        matrix = np.tile(GREY, (3, 1)) @ matrix
    if brightness != 1 or contrast != 1 or not np.array_equal(matrix, np.eye(3)):
        # One pass over the image for all of them.
        image = _recoloured(image, matrix, brightness, contrast)
    if settings.blur and rng.random() < settings.blur:
        sigma = rng.uniform(*settings.blur_sigma)
        image = cv2.GaussianBlur(image, (0, 0), sigma).astype(np.uint8, copy=False)
    if settings.noise and rng.random() < settings.noise:
        image = _noisy(image, rng.uniform(*settings.noise_sigma), rng)
    if settings.jpeg and rng.random() < settings.jpeg:
        quality = int(rng.integers(settings.jpeg_quality[0], settings.jpeg_quality[1] + 1))
        coded = cv2.imencode(".jpg", image[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, quality])[1]
        decoded = cv2.imdecode(coded, cv2.IMREAD_COLOR_RGB)
        assert decoded is not None, "what was encoded a line above"
        image = decoded.astype(np.uint8, copy=False)
    return image


_NORMAL = np.array([NormalDist().inv_cdf((i + 0.5) / 256) for i in range(256)])
_NORMAL /= _NORMAL.std()


def _noisy(image: NDArray[np.uint8], sigma: float, rng: np.random.Generator) -> NDArray[np.uint8]:
    """The image plus normal noise of standard deviation `sigma` of 255, from one random byte per value for speed."""
    draws = np.frombuffer(rng.bytes(image.size), np.uint8).reshape(image.shape)
    noise = cv2.LUT(draws, np.round(_NORMAL * sigma).astype(np.int16).reshape(1, 256))
    return cv2.add(image, noise, dtype=cv2.CV_8U).astype(np.uint8, copy=False)


def _patches(settings: TransformSettings, height: int, width: int, rng: np.random.Generator) -> NDArray[np.bool_]:
    """(height, width) bool: True in a few random rectangles."""
    erased = np.zeros((height, width), bool)
    for _ in range(rng.integers(settings.erase_patches[0], settings.erase_patches[1] + 1)):
        area = rng.uniform(*settings.erase_area) * height * width
        ratio = np.exp(rng.uniform(np.log(0.3), np.log(3.3)))
        tall, wide = min(height, round(np.sqrt(area * ratio))), min(width, round(np.sqrt(area / ratio)))
        y, x = rng.integers(height - tall + 1), rng.integers(width - wide + 1)
        erased[y : y + tall, x : x + wide] = True
    return erased


def _covered(polygon: NDArray[np.float32], erased: NDArray[np.bool_]) -> float:
    """Share of a polygon's pixels that are True in (H, W) `erased`."""
    mask, (x, y) = geometry.mask_crop(polygon, *erased.shape)
    inside = mask.astype(bool)
    return float(erased[y : y + mask.shape[0], x : x + mask.shape[1]][inside].mean()) if inside.any() else 0.0

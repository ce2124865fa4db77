"""PP-OCR's text detector: lines of text, with ONNX Runtime.

The network is a file of the package rapidocr, none of whose code runs here: it would fetch other models by itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

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
    fingerprint_of,
    grown,
    quadrilateral,
    read_options,
    require,
    weights_file,
)
from i3cl.members.member import Granularity, Member, Place

_REVISION = 1
_STEP = 32
"""Sides that the network sees are multiples of this."""
_LEAST = 3
"""Shortest side, in pixels of the network's map, of what counts as text."""
_MANY = 1000
"""Regions of one image that are looked at, the largest first."""


class PPOCRMember(Member):
    """PP-OCRv6 (small) of the installed package, or another PP-OCR detector in an ONNX file."""

    granularity: ClassVar[Granularity] = "line"
    licence: ClassVar[str] = "code and weights Apache-2.0 (the package's MODEL_LICENSES.md covers the weights)"
    about: ClassVar[str] = "PP-OCR's text detector: lines. Weights are in its package; weights: another PP-OCR detector as .onnx"
    packages: ClassVar[tuple[str, ...]] = ("rapidocr", "onnxruntime")
    install: ClassVar[str] = "pip install 'i3cl[ppocr]'"
    options: ClassVar[Mapping[str, Option]] = {
        "limit_side_len": Option(736, "pixels that the network sees on the side of limit_type", 32, 4096),
        "limit_type": Option(
            "min",
            "min: a shorter short side is enlarged to limit_side_len; max: a longer long side is reduced to it",
            choices=("min", "max"),
        ),
        "max_side_len": Option(2000, "pixels; the long side is never larger for the network", 32, 10000),
        "thresh": Option(0.3, "probability from which a pixel is text", 0, 1),
        "box_thresh": Option(0.3, "mean probability of its pixels from which a line is kept; this mean is its score", 0, 1),
        "unclip_ratio": Option(1.6, "how far the shrunk region that the network marks is widened; 0: not at all", 0, 10),
    }

    @classmethod
    def _weights(cls, settings: MemberSettings) -> Path:
        if settings.weights is not None:
            require(settings.use, ["onnxruntime"], cls.install)
            return weights_file(settings, settings.use, "a PP-OCR detector as .onnx")
        versions = require(settings.use, cls.packages, cls.install)
        path = file_of("rapidocr", "rapidocr/models/*det*.onnx")
        if path is None:
            raise UserError(
                f"use: {settings.use}: rapidocr {versions['rapidocr']} holds no detector; {cls.install}, or give weights"
            )
        return path

    @classmethod
    def fingerprint(cls, settings: MemberSettings) -> str:
        """As `Member.fingerprint`. The package counts by the file that is taken from it."""
        options = read_options(settings, cls.options)
        return fingerprint_of("ppocr", _REVISION, cls._weights(settings), options, {})

    @classmethod
    def load(cls, settings: MemberSettings, place: Place) -> PPOCRMember:
        """As `Member.load`. On a GPU where this ONNX Runtime has one; else on the CPU."""
        options, file = read_options(settings, cls.options), cls._weights(settings)
        import onnxruntime

        setup = onnxruntime.SessionOptions()
        setup.intra_op_num_threads = place.threads
        setup.inter_op_num_threads = 1
        # Images differ in size, and what is kept for each size would add up.
        setup.enable_cpu_mem_arena = False
        setup.log_severity_level = 4
        wanted = ["CUDAExecutionProvider", "CPUExecutionProvider"] if place.device == "cuda" else ["CPUExecutionProvider"]
        providers = [name for name in wanted if name in onnxruntime.get_available_providers()]
        try:
            session = onnxruntime.InferenceSession(str(file), setup, providers=providers)
        # ONNX Runtime has a class of error for every way in which a file can be wrong.
        except Exception as error:
            reason = " ".join(str(error).split())[:120]
            raise UserError(f"weights: {file}: not a readable ONNX file ({reason}); give a PP-OCR detector as .onnx") from None
        inputs, outputs = session.get_inputs(), session.get_outputs()
        channels = [each[0].shape[1] if len(each[0].shape) == 4 else None for each in (inputs, outputs)]
        if len(inputs) > 1 or channels[0] != 3 or (isinstance(channels[1], int) and channels[1] != 1) or channels[1] is None:
            raise UserError(f"weights: {file}: an ONNX file, but not a text detector of PP-OCR (3 channels in, 1 map out)")
        return cls(session, options)

    def __init__(self, session: Any, options: Mapping[str, Any]) -> None:
        """session: an onnxruntime.InferenceSession; options: every key of `options`."""
        self._session, self._input, self._chosen = session, session.get_inputs()[0].name, options

    def __call__(self, images: Sequence[NDArray[np.uint8]], view: ViewSettings) -> list[Detections]:
        """As `Member.__call__`."""
        return [self._one(image) for image in images]

    def _one(self, image: NDArray[np.uint8]) -> Detections:
        whole = grown(image)
        height, width = self._size(*whole.shape[:2])
        sized = cv2.resize(whole, (width, height))
        # The network was trained on BGR.
        tensor = (sized[:, :, ::-1].astype(np.float32) / 127.5 - 1).transpose(2, 0, 1)[None]
        found = self._session.run(None, {self._input: np.ascontiguousarray(tensor)})[0][0, 0]
        scale = np.array([whole.shape[1] / found.shape[1], whole.shape[0] / found.shape[0]], np.float32)
        polygons, scores = regions(
            found, self._chosen["thresh"], self._chosen["box_thresh"], self._chosen["unclip_ratio"], least=_LEAST
        )
        return as_detections([polygon * scale for polygon in polygons], scores, image)

    def _size(self, height: int, width: int) -> tuple[int, int]:
        """Height and width that the network sees."""
        limit, short = self._chosen["limit_side_len"], self._chosen["limit_type"] == "min"
        factor = max(1.0, limit / min(height, width)) if short else min(1.0, limit / max(height, width))
        factor = min(factor, self._chosen["max_side_len"] / max(height, width))
        return tuple(max(_STEP, round(side * factor / _STEP) * _STEP) for side in (height, width))


def regions(
    found: NDArray[np.float32], threshold: float, box_threshold: float, unclip: float, least: float
) -> tuple[list[NDArray[np.float32]], list[float]]:
    """The rectangles around the regions of a probability map, widened as differentiable binarisation asks for it.

    A network trained for it marks every text shrunk. A rectangle of area A and perimeter P is moved outwards by
    A * unclip / P on every side.

    Args:
        found: (H, W) float32, 0-1.
        threshold: Probability above which a pixel belongs to a region.
        box_threshold: Mean probability in the rectangle, before it is widened, that a region needs.
        unclip: See above.
        least: Pixels; regions whose rectangle has a shorter side are left out.

    Returns:
        (4, 2) float32 polygons in pixels of the map, clockwise from the top left, and their mean probabilities.
    """
    contours, _ = cv2.findContours((found > threshold).astype(np.uint8), cv2.RETR_LIST, cv2.CHAIN_APPROX_SIMPLE)
    polygons, scores = [], []
    for contour in sorted(contours, key=len, reverse=True)[:_MANY]:
        (x, y), (width, height), angle = cv2.minAreaRect(contour)
        # A contour runs through pixel centres, so half a pixel is missing on every side.
        middle, width, height = (x + 0.5, y + 0.5), width + 1, height + 1
        if min(width, height) < least:
            continue
        score = _mean_inside(found, np.asarray(cv2.boxPoints(((x, y), (width - 1, height - 1), angle)), np.float32))
        if score < box_threshold:
            continue
        wider = width * height * unclip / (width + height)
        polygons.append(quadrilateral((middle, (width + wider, height + wider), angle)))
        scores.append(score)
    return polygons, scores


def _mean_inside(values: NDArray[np.float32], ring: NDArray[np.float32]) -> float:
    """Mean of the pixels whose centres lie in or on a ring (K, 2) that runs through pixel centres, integers."""
    height, width = values.shape
    x0, y0 = np.clip(np.floor(ring.min(axis=0)), 0, [width - 1, height - 1]).astype(int)
    x1, y1 = np.clip(np.ceil(ring.max(axis=0)), 0, [width - 1, height - 1]).astype(int)
    inside = np.zeros((y1 - y0 + 1, x1 - x0 + 1), np.uint8)
    cv2.fillPoly(inside, [np.round(ring - [x0, y0]).astype(np.int32)], 1)
    return float(cv2.mean(values[y0 : y1 + 1, x0 : x1 + 1], inside)[0])

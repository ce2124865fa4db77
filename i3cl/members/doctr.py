"""docTR's text detectors (package python-doctr) as members of an ensemble."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from i3cl.config import MemberSettings, ViewSettings
from i3cl.detections import Detections
from i3cl.errors import UserError
from i3cl.members.adapting import (
    Option,
    as_detections,
    fill,
    fingerprint_of,
    grown,
    read_options,
    require,
    weights_file,
)
from i3cl.members.member import Granularity, Member, Place

if TYPE_CHECKING:
    from torch import nn

_REVISION = 1
_WHAT = "the weights of the detector that options.arch names"


class DocTRMember(Member):
    """One of docTR's detectors with weights from a local file."""

    granularity: ClassVar[Granularity] = "word"
    licence: ClassVar[str] = "code Apache-2.0; weights: you bring them, their licence is not stated in the package"
    about: ClassVar[str] = "docTR: words of documents. weights: the .pt file of the detector that options.arch names"
    packages: ClassVar[tuple[str, ...]] = ("python-doctr",)
    install: ClassVar[str] = (
        "pip install --no-deps python-doctr && pip install anyascii langdetect rapidfuzz pypdfium2 validators h5py"
    )
    options: ClassVar[Mapping[str, Option]] = {
        "arch": Option(
            "fast_base",
            "the detector",
            choices=(
                *("db_resnet34", "db_resnet50", "db_mobilenet_v3_large"),
                *("linknet_resnet18", "linknet_resnet34", "linknet_resnet50"),
                *("fast_tiny", "fast_small", "fast_base"),
            ),
        ),
        "side": Option(1024, "pixels; the image is fitted into a square of this side, a multiple of 32", 32, 4096),
        "bin_thresh": Option(0.3, "probability from which a pixel is text", 0, 1),
        "box_thresh": Option(0.1, "mean probability of its pixels from which a word is kept; this mean is its score", 0, 1),
    }

    @classmethod
    def _options(cls, settings: MemberSettings) -> dict[str, Any]:
        options = read_options(settings, cls.options)
        if options["side"] % 32:
            raise UserError(f"options.side: {options['side']} is not a multiple of 32; give {-(-options['side'] // 32) * 32}")
        return options

    @classmethod
    def fingerprint(cls, settings: MemberSettings) -> str:
        """As `Member.fingerprint`."""
        options, versions = cls._options(settings), require(settings.use, cls.packages, cls.install)
        file = weights_file(settings, settings.use, _WHAT)
        return fingerprint_of("doctr", _REVISION, file, options, versions)

    @classmethod
    def load(cls, settings: MemberSettings, place: Place) -> DocTRMember:
        """As `Member.load`."""
        options = cls._options(settings)
        require(settings.use, cls.packages, cls.install)
        file = weights_file(settings, settings.use, _WHAT)
        from doctr.models import detection, detection_predictor

        from i3cl.model.weights_file import read_tensors

        tensors = read_tensors(file, f"weights: {file}")
        # Neither of the two may be true: docTR would download what it lacks.
        network = getattr(detection, options["arch"])(pretrained=False, pretrained_backbone=False, assume_straight_pages=False)
        fill(network, tensors, file, f"docTR's {options['arch']}")
        # The predictor takes its size from there. The package's own table, which all networks share, stays as it is.
        network.cfg = {**network.cfg, "input_shape": (3, options["side"], options["side"])}
        network.postprocessor.bin_thresh, network.postprocessor.box_thresh = options["bin_thresh"], options["box_thresh"]
        return cls(detection_predictor(network, assume_straight_pages=False, batch_size=1).to(place.device).eval())

    def __init__(self, predictor: nn.Module) -> None:
        """predictor: doctr's DetectionPredictor for pages that may be turned, on its device."""
        self._predictor = predictor

    def __call__(self, images: Sequence[NDArray[np.uint8]], view: ViewSettings) -> list[Detections]:
        """As `Member.__call__`."""
        wholes = [grown(image) for image in images]
        pages: list[dict[str, Any]] = self._predictor(wholes) if wholes else []
        result = []
        for image, whole, page in zip(images, wholes, pages, strict=True):
            # Of each class (N, 5, 2): four corners as shares of the page, and (0, score).
            rows = np.concatenate([np.asarray(each, np.float32).reshape(-1, 5, 2) for each in page.values()])
            size = np.array([whole.shape[1], whole.shape[0]], np.float32)
            result.append(as_detections([row[:4] * size for row in rows], rows[:, 4, 1], image))
        return result

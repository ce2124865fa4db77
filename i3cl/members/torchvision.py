"""torchvision's Mask R-CNN, trained elsewhere on text, as a member of an ensemble."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from i3cl.config import MemberSettings, ViewSettings
from i3cl.detections import Detections
from i3cl.errors import UserError
from i3cl.geometry import outlines_from_masks
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
_WHAT = "a state dict of torchvision's maskrcnn_resnet50_fpn or maskrcnn_resnet50_fpn_v2"
_CLASSES = "roi_heads.box_predictor.cls_score.weight"
"""Tensor with one row for each class, the background too."""
_SECOND = "rpn.head.conv.1.0.weight"
"""Tensor that only the second version has."""


class TorchvisionMember(Member):
    """Mask R-CNN with ResNet-50, either version of torchvision's; the number of classes is that of the file."""

    granularity: ClassVar[Granularity] = "word"
    licence: ClassVar[str] = "code BSD-3-Clause; weights as whoever trained them states"
    about: ClassVar[str] = "Mask R-CNN (ResNet-50) of torchvision: words, if it learned words. weights: a state dict file"
    packages: ClassVar[tuple[str, ...]] = ("torchvision",)
    install: ClassVar[str] = "part of every installation"
    options: ClassVar[Mapping[str, Option]] = {
        "min_size": Option(800, "pixels of the short side that the network sees ...", 32, 4096),
        "max_size": Option(1333, "... and of the long side, at most", 32, 8192),
        "score_threshold": Option(0.05, "least score of a detection", 0, 1),
        "detections": Option(100, "detections of an image, at most: the best", 1, 10000),
        "label": Option(0, "class that is text, as the network numbers them; 0: every class is", 0, 100000),
    }

    @classmethod
    def fingerprint(cls, settings: MemberSettings) -> str:
        """As `Member.fingerprint`."""
        options, versions = read_options(settings, cls.options), require(settings.use, cls.packages, cls.install)
        file = weights_file(settings, settings.use, _WHAT)
        return fingerprint_of("torchvision", _REVISION, file, options, versions)

    @classmethod
    def load(cls, settings: MemberSettings, place: Place) -> TorchvisionMember:
        """As `Member.load`."""
        options, file = read_options(settings, cls.options), weights_file(settings, settings.use, _WHAT)
        import torchvision

        from i3cl.model.weights_file import read_tensors

        tensors = read_tensors(file, f"weights: {file}")
        if _CLASSES not in tensors:
            raise UserError(f"weights: {file}: it has no tensor {_CLASSES}; give {_WHAT}")
        classes = len(tensors[_CLASSES])
        if not options["label"] < classes:
            raise UserError(f"options.label: {options['label']}, but {file} has the classes 1 to {classes - 1}")
        models = torchvision.models.detection
        build = models.maskrcnn_resnet50_fpn_v2 if _SECOND in tensors else models.maskrcnn_resnet50_fpn
        network = build(
            weights=None,
            weights_backbone=None,
            num_classes=classes,
            min_size=options["min_size"],
            max_size=options["max_size"],
            box_score_thresh=options["score_threshold"],
            box_detections_per_img=options["detections"],
        )
        fill(network, tensors, file, f"{build.__name__} with {classes} classes")
        return cls(network.to(place.device).eval(), options["label"])

    def __init__(self, network: nn.Module, label: int) -> None:
        """network: torchvision's MaskRCNN in eval mode, on its device; label: as the option."""
        self._network, self._label = network, label

    def __call__(self, images: Sequence[NDArray[np.uint8]], view: ViewSettings) -> list[Detections]:
        """As `Member.__call__`. One image after the other: together they would be padded to the largest."""
        return [self._one(image) for image in images]

    def _one(self, image: NDArray[np.uint8]) -> Detections:
        import torch

        network: Any = self._network
        whole = grown(image)
        tensor = torch.from_numpy(np.ascontiguousarray(whole)).permute(2, 0, 1).float() / 255
        # Step by step: the network's own call would paste every mask into a bitmap of the whole image.
        with torch.inference_mode():
            sized, _ = network.transform([tensor.to(next(network.parameters()).device)])
            features = network.backbone(sized.tensors)
            proposals, _ = network.rpn(sized, features)
            (found,), _ = network.roi_heads(features, proposals, sized.image_sizes)
        boxes, masks, scores, labels = (found[key].cpu().numpy() for key in ("boxes", "masks", "scores", "labels"))
        if self._label:
            kept = labels == self._label
            boxes, masks, scores = boxes[kept], masks[kept], scores[kept]
        height, width = sized.image_sizes[0]
        scale = np.array([whole.shape[1] / width, whole.shape[0] / height], np.float32)
        outlines = outlines_from_masks(masks[:, 0], boxes)
        pairs = [(outline * scale, score) for outline, score in zip(outlines, scores, strict=True) if outline is not None]
        return as_detections([outline for outline, _ in pairs], [float(score) for _, score in pairs], image)

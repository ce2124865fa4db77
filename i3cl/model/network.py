"""I3CL (arXiv 2108.01343): a Mask R-CNN with modules for context within an instance and between instances."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from i3cl.config import ModelSettings, Settings
from i3cl.model.backbone import Backbone
from i3cl.model.heads import Heads
from i3cl.model.intra import IntraBlock, as_channels_last
from i3cl.model.proposals import STRIDES, Proposals
from i3cl.model.pyramid import Pyramid
from i3cl.model.targets import Truth, read_truths

MULTIPLE = 32
"""Image sides are padded to a multiple of this."""
Size = tuple[int, int]
"""Height, width in pixels."""


def padded_size(size: Size) -> Size:
    """(H, W) rounded up to multiples of 32."""
    return -(-size[0] // MULTIPLE) * MULTIPLE, -(-size[1] // MULTIPLE) * MULTIPLE


class I3CL(nn.Module):
    """The detector: called with images, it returns detections (eval mode) or losses (train mode, with targets)."""

    mean: Tensor
    std: Tensor
    recipe: Settings | None = None
    """All settings that the network was trained with, if it comes from a checkpoint."""
    keep_image_losses: bool = False
    """Whether a training pass leaves `image_losses`."""
    image_losses: Tensor | None = None
    """(B,) float32: what each image added to the sum of the losses of the last training pass, without gradients."""

    def __init__(self, settings: ModelSettings) -> None:
        super().__init__()
        self.settings = settings
        self.backbone = Backbone(settings.backbone)
        self.pyramid = Pyramid(self.backbone.channels, settings.pyramid_channels)
        self.intra = nn.ModuleList(IntraBlock(settings.pyramid_channels) for _ in STRIDES) if settings.intra else None
        self.proposals = Proposals(settings)
        self.heads = Heads(settings)
        self.register_buffer("mean", torch.tensor(settings.mean).reshape(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(settings.std).reshape(3, 1, 1), persistent=False)
        self.to(memory_format=torch.channels_last)
        if settings.compile != "none":
            # Compiled in place, so that the tensors keep their names and a copy of the network does not run this one's code.
            self.backbone.compile(backend=settings.compile)
            self.pyramid.compile(backend=settings.compile)

    def forward(
        self, images: Sequence[Tensor], targets: Sequence[Mapping[str, Any] | Truth] | None = None
    ) -> dict[str, Tensor] | list[dict[str, Tensor]]:
        """Losses or detections of a list of images.

        images: float32 RGB (3, H, W), 0-255, of any sizes. targets (training), one dict per image: `boxes` (N, 4) float32 x0,
        y0, x1, y1 pixels; `labels` (N,) int64; `masks`, either (N, H, W) uint8 or bool, or N uint8 crops (h, w) with
        `mask_origins` (N, 2) int64, the x, y pixel of each crop's first value; optionally `lossweight` (N,) float32;
        `outlineweight` (N,) float32, a further factor of the box and mask losses; `image_weight`, a float that scales all losses
        of the image; and `ignore` (N,) bool: instances that are not truth, but are not taught as background either. With the
        network on a GPU, targets on the CPU are best, or all of them as `targets.read_truths` makes of them.

        Train mode: loss_rpn_cls, loss_rpn_box, loss_cls, loss_box, loss_mask: scalars, multiplied by their weights in the
        settings. Eval mode: for every image `boxes` (n, 4) float32 pixels, `scores` (n,) 0-1, `labels` (n,), `masks` (n, 28, 28)
        float32 probabilities in the frame of the box, by descending score. Only images of the same padded size are computed
        together, so every answer is the same as that of the image alone.

        Raises ValueError for wrong shapes and for train mode without targets.
        """
        for image in images:
            if image.dim() != 3 or image.shape[0] != 3 or not image.shape[1] or not image.shape[2]:
                raise ValueError(f"an image must be (3, H, W), not {tuple(image.shape)}")
        if self.training:
            if targets is None or len(targets) != len(images) or not len(images):
                raise ValueError("training needs images and a target for each of them")
            return self.losses(images, targets)
        return self.detect(images)

    # --------------------------------------------------------------------------------------------------------
    # parts

    def batch(self, images: Sequence[Tensor]) -> Tensor:
        """(B, 3, H, W) float32: normalised, padded at the right and bottom with zeros to the largest multiple of 32."""
        height = max(padded_size((x.shape[1], x.shape[2]))[0] for x in images)
        width = max(padded_size((x.shape[1], x.shape[2]))[1] for x in images)
        batch = self.mean.new_zeros((len(images), 3, height, width)).contiguous(memory_format=torch.channels_last)
        for row, image in zip(batch, images, strict=True):
            row[:, : image.shape[1], : image.shape[2]] = (image.to(self.mean) - self.mean) / self.std
        return batch

    def features(self, batch: Tensor) -> list[Tensor]:
        """Normalised images (B, 3, H, W) of `batch` -> the five maps (B, C, H_i, W_i) that all heads read."""
        levels = self.pyramid(self.backbone(as_channels_last(batch)))
        if self.intra is not None:
            levels = [block(x) for block, x in zip(self.intra, levels, strict=True)]
        return levels

    def losses(self, images: Sequence[Tensor], targets: Sequence[Mapping[str, Any] | Truth]) -> dict[str, Tensor]:
        """The training losses; see `forward`."""
        sizes = [(x.shape[1], x.shape[2]) for x in images]
        truths = [target for target in targets if isinstance(target, Truth)]
        truths = truths or read_truths([target for target in targets if not isinstance(target, Truth)], self.mean.device)
        return self.losses_of(self.features(self.batch(images)), sizes, truths)

    def losses_of(
        self,
        levels: Sequence[Tensor],
        sizes: Sequence[Size],
        truths: Sequence[Truth],
        proposals: Sequence[Tensor] | None = None,
    ) -> dict[str, Tensor]:
        """The losses from feature maps; `proposals` (n, 4 or more columns), if given, replace the network's own ones."""
        if proposals is None:
            proposals = self.proposals.propose(levels, sizes)
        by_image: dict[str, Tensor] | None = {} if self.keep_image_losses else None
        rpn_cls, rpn_box = self.proposals.losses(levels, truths, [padded_size(s) for s in sizes], by_image)
        second = self.heads.losses(levels, self.heads.sample(proposals, truths), truths, by_image)
        s = self.settings
        if by_image is not None:
            self.image_losses = torch.stack([getattr(s, name) * values for name, values in by_image.items()]).sum(0)
        return {
            "loss_rpn_cls": rpn_cls.sum() * s.loss_rpn_cls,
            "loss_rpn_box": rpn_box.sum() * s.loss_rpn_box,
            "loss_cls": second["loss_cls"] * s.loss_cls,
            "loss_box": second["loss_box"] * s.loss_box,
            "loss_mask": second["loss_mask"] * s.loss_mask,
        }

    @torch.no_grad()
    def detect(self, images: Sequence[Tensor]) -> list[dict[str, Tensor]]:
        """The detections; see `forward`."""
        groups: dict[Size, list[int]] = defaultdict(list)
        for i, image in enumerate(images):
            groups[padded_size((image.shape[1], image.shape[2]))].append(i)
        results: list[dict[str, Tensor]] = [{} for _ in images]
        for members in groups.values():
            group = [images[i] for i in members]
            sizes = [(x.shape[1], x.shape[2]) for x in group]
            levels = self.features(self.batch(group))
            found = self.heads.detect(levels, self.proposals.propose(levels, sizes), sizes)
            for i, detections in zip(members, found, strict=True):
                results[i] = detections
        return results

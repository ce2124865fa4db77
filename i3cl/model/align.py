"""RoIAlign over a feature pyramid (arXiv 1703.06870, 1612.03144)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torchvision.ops import roi_align

STRIDES = (4, 8, 16, 32)
"""Levels that regions are read from."""
FINEST = 56
"""Regions whose sqrt(area) is below twice this many pixels read the finest level."""


def region_levels(boxes: Tensor) -> Tensor:
    """(N,) int64 index into STRIDES for boxes (N, 4): floor(log2(sqrt(area) / 56 + 1e-6)), limited."""
    boxes = boxes.float()
    side = ((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])).clamp(min=0).sqrt()
    return torch.log2(side / FINEST + 1e-6).floor().clamp(0, len(STRIDES) - 1).long()


def with_batch_index(boxes: Sequence[Tensor]) -> Tensor:
    """(N, 5) float32 regions: the image's index in the batch, then the box; images in order."""
    return torch.cat([
        torch.cat([b.new_full((len(b), 1), i, dtype=torch.float32), b.float()], dim=1) for i, b in enumerate(boxes)
    ])


class RegionReader:
    """Reads regions from the first four levels of one batch's pyramid; make one a batch and use it for both heads."""

    def __init__(self, levels: Sequence[Tensor]) -> None:
        """levels: maps (B, C, H, W) of strides 4, 8, 16, 32 (further ones are not used)."""
        self._maps = [x.float().contiguous() for x in levels[: len(STRIDES)]]

    def __call__(self, regions: Tensor, side: int) -> Tensor:
        """(N, C, side, side) float32 features of regions (N, 5): aligned to half pixels, sampled adaptively."""
        level = region_levels(regions[:, 1:])
        order = level.argsort(stable=True)
        counts = torch.bincount(level, minlength=len(STRIDES)).tolist()
        parts = [
            roi_align(x, part, side, 1 / stride, 0, True)
            for x, part, stride in zip(self._maps, regions[order].split(counts), STRIDES, strict=True)
        ]
        return torch.cat(parts)[order.argsort()]

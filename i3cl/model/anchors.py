"""Anchors of the region proposals: one side length per pyramid level, several aspect ratios, no half-cell offset."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from i3cl.model.placement import positions


def base_anchors(stride: int, scale: float, ratios: Sequence[float]) -> Tensor:
    """(A, 4) float32 boxes around the origin: area (scale x stride)², height / width from `ratios`, not rounded."""
    root = torch.tensor(ratios, dtype=torch.float32).sqrt()
    width, height = stride * (1 / root) * scale, stride * root * scale
    return torch.stack([-0.5 * width, -0.5 * height, 0.5 * width, 0.5 * height], dim=1)


class Anchors:
    """Anchors of all levels; those of the last few map sizes are kept.

    The flat order is level, row, column, ratio: the order in which the proposal head's answers are flattened.
    """

    def __init__(self, strides: Sequence[int], scale: float, ratios: Sequence[float]) -> None:
        self.strides = tuple(strides)
        self.per_cell = len(ratios)
        self._base = [base_anchors(stride, scale, ratios) for stride in self.strides]
        self._base_on: dict[torch.device, list[Tensor]] = {}
        self._kept: dict[tuple[tuple[tuple[int, int], ...], torch.device], Tensor] = {}

    def __call__(self, sizes: Sequence[tuple[int, int]], device: torch.device) -> Tensor:
        """(sum of A x H x W, 4) float32 boxes in pixels for maps of `sizes`, one (H, W) per level."""
        key = (tuple(sizes), device)
        if key not in self._kept:
            if len(self._kept) >= 16:
                self._kept.pop(next(iter(self._kept)))
            levels = [self._level(level, height, width, device) for level, (height, width) in enumerate(sizes)]
            self._kept[key] = torch.cat(levels)
        return self._kept[key]

    def _level(self, level: int, height: int, width: int, device: torch.device) -> Tensor:
        if device not in self._base_on:
            self._base_on[device] = [base.to(device) for base in self._base]
        stride = self.strides[level]
        rows, columns = torch.arange(height, device=device) * stride, torch.arange(width, device=device) * stride
        y, x = torch.meshgrid(rows, columns, indexing="ij")
        shift = torch.stack([x, y, x, y], dim=-1).reshape(-1, 1, 4).float()
        return (shift + self._base_on[device][level]).reshape(-1, 4)

    def counts(self, sizes: Sequence[tuple[int, int]]) -> list[int]:
        """Number of anchors of each level."""
        return [height * width * self.per_cell for height, width in sizes]

    def valid(self, sizes: Sequence[tuple[int, int]], padded: tuple[int, int], device: torch.device) -> Tensor | None:
        """(K,) int64, the anchors whose cell begins inside an image padded to `padded` (H, W) pixels; None means all.

        In a batch an image may be smaller than the maps; cells beyond its own padding are not sampled.
        """
        inside = []
        for (height, width), stride in zip(sizes, self.strides, strict=True):
            rows, columns = math.ceil(padded[0] / stride), math.ceil(padded[1] / stride)
            inside.append((height, width, min(rows, height), min(columns, width)))
        if all(height == rows and width == columns for height, width, rows, columns in inside):
            return None
        masks = []
        for height, width, rows, columns in inside:
            mask = torch.zeros(height, width, self.per_cell, dtype=torch.bool, device=device)
            mask[:rows, :columns] = True
            masks.append(mask.flatten())
        return positions(torch.cat(masks), sum(rows * columns * self.per_cell for _, _, rows, columns in inside))

"""Anchors of the region proposals: one side length per pyramid level, several aspect ratios, no half-cell offset."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def base_anchors(stride: int, scale: float, ratios: Sequence[float]) -> Tensor:
    """(A, 4) float32 boxes around the origin: side scale x stride, height / width from `ratios`, the area kept, not rounded."""
    root = torch.tensor(ratios, dtype=torch.float32).sqrt()
    width, height = stride * (1 / root) * scale, stride * root * scale
    return torch.stack([-0.5 * width, -0.5 * height, 0.5 * width, 0.5 * height], dim=1)


class Anchors:
    """Anchors of all levels, kept for the map sizes seen lately.

    The flat order is level, row, column, ratio: the order in which the proposal head's answers are flattened.
    """

    def __init__(self, strides: Sequence[int], scale: float, ratios: Sequence[float]) -> None:
        self.strides = tuple(strides)
        self.per_cell = len(ratios)
        self._base = [base_anchors(stride, scale, ratios) for stride in self.strides]
        self._kept: dict[tuple[tuple[tuple[int, int], ...], torch.device], Tensor] = {}

    def __call__(self, sizes: Sequence[tuple[int, int]], device: torch.device) -> Tensor:
        """(sum of A x H x W, 4) float32 boxes in pixels for maps of `sizes` (H, W), one a level."""
        key = (tuple(sizes), device)
        if key not in self._kept:
            if len(self._kept) >= 16:
                self._kept.pop(next(iter(self._kept)))
            self._kept[key] = torch.cat([self._level(level, height, width) for level, (height, width) in enumerate(sizes)]).to(
                device
            )
        return self._kept[key]

    def _level(self, level: int, height: int, width: int) -> Tensor:
        stride = self.strides[level]
        y, x = torch.meshgrid(torch.arange(height) * stride, torch.arange(width) * stride, indexing="ij")
        shift = torch.stack([x, y, x, y], dim=-1).reshape(-1, 1, 4).float()
        return (shift + self._base[level]).reshape(-1, 4)

    def counts(self, sizes: Sequence[tuple[int, int]]) -> list[int]:
        """Anchors of each level."""
        return [height * width * self.per_cell for height, width in sizes]

    def valid(self, sizes: Sequence[tuple[int, int]], padded: tuple[int, int], device: torch.device) -> Tensor | None:
        """(A_total,) bool: anchors whose cell begins inside an image padded to `padded` (H, W) pixels; None
        when all are.

        In a batch an image may be smaller than the maps; cells past its own padding are no samples.
        """
        inside = []
        for (height, width), stride in zip(sizes, self.strides, strict=True):
            rows, columns = math.ceil(padded[0] / stride), math.ceil(padded[1] / stride)
            inside.append((height, width, min(rows, height), min(columns, width)))
        if all(height == rows and width == columns for height, width, rows, columns in inside):
            return None
        masks = []
        for height, width, rows, columns in inside:
            mask = torch.zeros(height, width, self.per_cell, dtype=torch.bool)
            mask[:rows, :columns] = True
            masks.append(mask.flatten())
        return torch.cat(masks).to(device)

"""RoIAlign over a feature pyramid (arXiv 1703.06870, 1612.03144)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.ops import roi_align

from i3cl.model import placement

STRIDES = (4, 8, 16, 32)
"""Strides of the levels that regions are read from."""
FINEST = 56
"""Regions whose sqrt(area) is less than twice this many pixels are read from the finest level."""


def region_levels(boxes: Tensor) -> Tensor:
    """(N,) int64 index into STRIDES for boxes (N, 4): floor(log2(sqrt(area) / 56 + 1e-6)), limited to 0 .. 3."""
    boxes = boxes.float()
    side = ((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])).clamp(min=0).sqrt()
    return torch.log2(side / FINEST + 1e-6).floor().clamp(0, len(STRIDES) - 1).long()


def with_batch_index(boxes: Sequence[Tensor]) -> Tensor:
    """(N, 5) float32 regions: the image's index in the batch, then the box; images in order."""
    return torch.cat(
        [torch.cat([b.new_full((len(b), 1), i, dtype=torch.float32), b.float()], dim=1) for i, b in enumerate(boxes)]
    )


class RegionReader:
    """Reads regions from the first four levels of one batch's pyramid."""

    def __init__(self, levels: Sequence[Tensor]) -> None:
        """Takes the maps (B, C, H, W) of strides 4, 8, 16, 32; further ones are not used."""
        self._maps = [x.float() for x in levels[: len(STRIDES)]]
        self._sparse = placement.on_cpu(self._maps[0])
        if not self._sparse:
            # Once for both heads: the kernel reads maps whose channels are each stored in one piece.
            self._maps = [x.contiguous() for x in self._maps]

    def __call__(self, regions: Tensor, side: int) -> Tensor:
        """(N, C, side, side) float32 features of regions (N, 5): aligned to half pixels, sampled adaptively."""
        level = region_levels(regions[:, 1:])
        order = level.argsort(stable=True)
        counts = torch.stack([(level == i).sum() for i in range(len(STRIDES))]).tolist()
        parts = [
            sparse_roi_align(x, part, side, 1 / stride) if self._sparse else roi_align(x, part, side, 1 / stride, 0, True)
            for x, part, stride in zip(self._maps, regions[order].split(counts), STRIDES, strict=True)
        ]
        return torch.cat(parts)[order.argsort()]


def sparse_roi_align(x: Tensor, regions: Tensor, side: int, scale: float) -> Tensor:
    """Computes the same as torchvision's roi_align(x, regions, side, scale, 0, aligned=True), several times faster on a CPU.

    x: (B, C, H, W) float32, fastest with channels innermost; regions: (N, 5); returns (N, C, side, side). Each output cell is a
    weighted sum of map cells. Its weights are products of weights along y and along x (`axis_weights`), because bilinear
    samples on a regular grid are separable. So all channels of a cell are summed at once, and cells that several samples share
    are read once.
    """
    batch, channels, height, width = x.shape
    image, box = regions[:, 0].long(), regions[:, 1:] * scale
    weight_y, first_y, cells_y = axis_weights(box[:, 1], box[:, 3], side, height)
    weight_x, first_x, cells_x = axis_weights(box[:, 0], box[:, 2], side, width)
    # One entry for every pair of an output cell and a map cell that it reads, ordered by output cell.
    reads = (cells_y[:, :, None] * cells_x[:, None, :]).flatten()
    starts = reads.cumsum(0) - reads
    total = int(reads.sum())
    output = torch.repeat_interleave(torch.arange(len(reads)), reads, output_size=total)
    bin_y = output // side
    bin_x = bin_y // side * side + output % side
    across = cells_x.flatten()[bin_x]
    entry = torch.arange(total) - starts[output]
    y = entry // across
    column = entry - y * across
    weight = weight_y.flatten()[bin_y * weight_y.shape[2] + y] * weight_x.flatten()[bin_x * weight_x.shape[2] + column]
    row = (first_y + image[:, None] * height).flatten()[bin_y] + y
    index = row * width + first_x.flatten()[bin_x] + column
    table = x.permute(0, 2, 3, 1).reshape(batch * height * width, channels)
    cells = F.embedding_bag(index, table, starts, mode="sum", per_sample_weights=weight)
    return cells.reshape(-1, side, side, channels).permute(0, 3, 1, 2)


def axis_weights(start: Tensor, end: Tensor, bins: int, length: int) -> tuple[Tensor, Tensor, Tensor]:
    """The weights that RoIAlign gives to the cells along one axis.

    start, end: (N,) float32 edges of the regions in cells, before the half-cell shift; length: cells of the map. Each bin
    averages ceil(size / bins) equidistant bilinear samples. A sample at most one cell outside the map takes the border's value;
    one further out counts as zero. Returns the weights (N, bins, K) float32 of up to K neighbouring cells, the first of these
    cells (N, bins) int64, and their number (N, bins) int64, which is 0 where a bin reads nothing.
    """
    start = start - 0.5
    size = (end - 0.5) - start
    samples = (size / bins).ceil()
    step = size / bins
    n = torch.arange(int(samples.max()) if len(samples) else 0, dtype=torch.float32)
    bin_start = start[:, None] + torch.arange(bins, dtype=torch.float32) * step[:, None]
    position = bin_start[:, :, None] + (n + 0.5) * (step / samples)[:, None, None]
    used = (n < samples[:, None, None]) & (position >= -1) & (position <= length)
    position = position.clamp(0, length - 1)
    floor = position.floor()
    share, low = position - floor, floor.long()
    if not len(n):
        empty = low.new_zeros(low.shape[:2])
        return position.new_zeros((*low.shape[:2], 1)), empty, empty
    first = torch.where(used, low, length).amin(2)
    last = torch.where(used, (low + 1).clamp(max=length - 1), -1).amax(2)
    cells = (last - first + 1).clamp(min=0)
    most = max(int(cells.max()), 1)
    weights = position.new_zeros((len(start), bins, most + 2))
    value = used / samples.clamp(min=1)[:, None, None]
    # Unused samples have weight zero wherever they land. A sample on the last cell gives its whole weight to `low`.
    place = (low - first[:, :, None]).clamp(0, most)
    weights.scatter_add_(2, place, value * (1 - share))
    weights.scatter_add_(2, place + 1, value * share)
    return weights, first, cells

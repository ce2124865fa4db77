"""Inter-instance collaborative learning (arXiv 2108.01343, section 3.3): attention among the instances of an image."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from i3cl.model.intra import batch_norm

GRID = 3
"""Side, in cells, of the grid to which an instance is pooled before it becomes one token."""
LEVELS = 4
"""Pyramid levels that feed the image's global context."""


class InterBlock(nn.Module):
    """Replaces the RoI features by ReLU(BatchNorm(conv(RoI + its instance's context + its image's context)))."""

    def __init__(
        self, channels: int, inner: int = 32, layers: int = 3, heads: int = 4, feedforward: int = 2048, dropout: float = 0.1
    ) -> None:
        super().__init__()
        width = inner * GRID * GRID
        self.reduce = nn.Conv2d(channels, inner, 1)
        layer = nn.TransformerEncoderLayer(width, heads, feedforward, dropout, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.expand = nn.Conv2d(inner, channels, 1)
        self.context = nn.ModuleList(nn.Conv2d(channels, channels, 1, bias=False) for _ in range(LEVELS))
        self.conv3 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.conv1 = nn.Conv2d(channels, channels, 1)
        self.norm = nn.BatchNorm2d(channels)

    def global_context(self, levels: Sequence[Tensor]) -> Tensor:
        """(B, C): one vector per image from the first four pyramid levels (B, C, H, W).

        The original pads its bias-free 1x1 convolutions by 1 and averages over the padded map, which is the
        convolution of the mean times HW / ((H + 2)(W + 2)).
        """
        total: Tensor | None = None
        for conv, x in zip(self.context, levels[:LEVELS], strict=True):
            assert isinstance(conv, nn.Conv2d)
            height, width = x.shape[-2:]
            mean = x.mean(dim=(2, 3)) * (height * width / ((height + 2) * (width + 2)))
            vector = F.linear(mean, conv.weight.flatten(1))
            total = vector if total is None else total + vector
        assert total is not None
        return total

    def instance_tokens(self, rois: Tensor, counts: Sequence[int]) -> Tensor:
        """(N, 9 x inner) context of every RoI (N, C, S, S) among the RoIs of its image; counts: RoIs of each image, in order."""
        tokens = F.adaptive_max_pool2d(self.reduce(rois), GRID).flatten(1)
        return torch.cat([self.encoder(t[None])[0] for t in tokens.split(list(counts)) if len(t)])

    def forward(self, rois: Tensor, levels: Sequence[Tensor], counts: Sequence[int]) -> Tensor:
        """RoI features (N, C, S, S) -> (N, C, S, S). Images do not see each other; in training BatchNorm pools all RoIs."""
        if not len(rois):
            return rois
        assert sum(counts) == len(rois) and len(counts) == len(levels[0])
        tokens = self.instance_tokens(rois, counts).reshape(len(rois), -1, GRID, GRID)
        context = self.global_context(levels)
        context = torch.cat([context[i : i + 1].expand(count, -1) for i, count in enumerate(counts)])
        # Interpolation keeps constants, so the image's vector can be added on the small grid.
        added = self.expand(tokens) + context[:, :, None, None]
        rois = rois + F.interpolate(added, size=rois.shape[-2:], mode="bilinear", align_corners=True)
        y = F.conv2d(rois, self.merged(), self.conv1.bias, padding=1)
        return batch_norm(self.norm, y).relu_()

    def merged(self) -> Tensor:
        """(C, C, 3, 3): the 3x3 convolution followed by the 1x1 convolution, as one 3x3 kernel (nothing is in between)."""
        return torch.einsum("om,mikl->oikl", self.conv1.weight.flatten(1), self.conv3.weight)

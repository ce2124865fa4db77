"""Feature pyramid (arXiv 1612.03144): four backbone maps in, five maps of equal width out."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional as F


class Pyramid(nn.Module):
    """1x1 laterals, nearest-neighbour top-down sums, 3x3 outputs; the fifth level is every second cell of the fourth."""

    def __init__(self, in_channels: Sequence[int], channels: int) -> None:
        super().__init__()
        self.lateral = nn.ModuleList(nn.Conv2d(c, channels, 1) for c in in_channels)
        self.output = nn.ModuleList(nn.Conv2d(channels, channels, 3, padding=1) for _ in in_channels)
        for layer in (*self.lateral, *self.output):
            assert isinstance(layer, nn.Conv2d) and layer.bias is not None
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Maps (B, C_i, H_i, W_i) of strides 4 to 32 -> five maps (B, channels, H_i, W_i) of strides 4 to 64."""
        sums = [lateral(x) for lateral, x in zip(self.lateral, maps, strict=True)]
        for i in range(len(sums) - 1, 0, -1):
            sums[i - 1] = sums[i - 1] + F.interpolate(sums[i], size=sums[i - 1].shape[-2:], mode="nearest")
        levels = [output(x) for output, x in zip(self.output, sums, strict=True)]
        return [*levels, F.max_pool2d(levels[-1], kernel_size=1, stride=2)]

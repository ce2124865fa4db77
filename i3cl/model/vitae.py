"""ViTAEv2-S (arXiv 2202.10108): transformer cells with convolutions beside the attention, as the original release computes them.

Maps are (B, H, W, C) inside: attention and Linear want the channels last, and for a convolution the same memory
is a (B, C, H, W) map in channels-last format.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import torch
from timm.models import FeatureInfo
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from torchvision.ops import stochastic_depth

WINDOW = 7
"""Side of an attention window, in tokens."""


@dataclass(frozen=True)
class Stage:
    """One reduction cell and the normal cells after it."""

    embed: int
    """Channels of each convolution of the reduction cell's pyramid."""
    channels: int
    """Channels of the stage's output."""
    ratio: int
    """Factor by which the reduction cell shrinks the map."""
    kernel: int
    """Kernel of the pyramid's convolutions ..."""
    dilations: tuple[int, ...]
    """... and the dilation of each."""
    reduction_heads: int
    reduction_groups: int
    """Attention heads and convolution groups of the reduction cell."""
    depth: int
    """Normal cells."""
    heads: int
    groups: int
    """Attention heads and convolution groups of the normal cells."""
    windowed: bool
    """Whether attention is limited to windows; otherwise it is among all tokens of the image."""
    first_rate: int
    """Index of the first normal cell's rate among the stochastic depth rates."""


STAGES = (
    Stage(64, 64, 4, 7, (1, 2, 3, 4), 1, 1, depth=2, heads=1, groups=1, windowed=True, first_rate=0),
    Stage(64, 128, 2, 3, (1, 2, 3), 1, 16, depth=2, heads=2, groups=32, windowed=True, first_rate=2),
    Stage(128, 256, 2, 3, (1, 2), 2, 32, depth=8, heads=4, groups=64, windowed=False, first_rate=2),
    Stage(256, 512, 2, 3, (1, 2), 4, 64, depth=2, heads=8, groups=128, windowed=False, first_rate=8),
)
"""ViTAEv2-S. The stochastic depth rates rise linearly over all 14 normal cells; the original then starts stage 3 at the
third rate and stage 4 at the ninth instead of the fifth and thirteenth, so the largest rate used is 9/13 of the maximum."""


class Attention(nn.Module):
    """Multi-head self-attention whose width may change from `in_channels` to `channels`."""

    def __init__(self, in_channels: int, channels: int, heads: int, bias: bool = True) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(in_channels, 3 * channels, bias=bias)
        self.proj = nn.Linear(channels, channels)

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens (B, N, in) -> the attention's output and the values that went into it, both (B, N, channels)."""
        batch, count, _ = tokens.shape
        q, k, v = self.qkv(tokens).reshape(batch, count, 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        mixed = F.scaled_dot_product_attention(q, k, v)
        return self.proj(mixed.transpose(1, 2).flatten(2)), v.transpose(1, 2).flatten(2)


def window_attention(attention: Attention, x: Tensor) -> Tensor:
    """Attention inside windows of 7 x 7: (B, H, W, C) -> (B, H, W, channels).

    The map is padded with zeros on both sides to multiples of 7; the odd row or column goes to the bottom and right. The
    padding takes part in the attention, as in the original: it is not masked.
    """
    batch, height, width, channels = x.shape
    down, across = -height % WINDOW, -width % WINDOW
    top, left = down // 2, across // 2
    x = F.pad(x, (0, 0, left, across - left, top, down - top))
    rows, columns = x.shape[1] // WINDOW, x.shape[2] // WINDOW
    x = x.reshape(batch, rows, WINDOW, columns, WINDOW, channels).transpose(2, 3)
    x, _ = attention(x.reshape(-1, WINDOW * WINDOW, channels))
    x = x.reshape(batch, rows, columns, WINDOW, WINDOW, -1).transpose(2, 3)
    x = x.reshape(batch, rows * WINDOW, columns * WINDOW, -1)
    return x[:, top : top + height, left : left + width]


class MLP(nn.Module):
    """Two Linear layers with a GELU between them; the width stays."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(channels, hidden)
        self.fc2 = nn.Linear(hidden, channels)

    def forward(self, x: Tensor) -> Tensor:
        """(..., channels) -> the same shape."""
        return self.fc2(F.gelu(self.fc1(x)))


class _BatchNorm(nn.BatchNorm2d):
    """Uses its stored statistics where a channel has one value, which has no variance: the 1 x 1 map of a tiny image."""

    def forward(self, x: Tensor) -> Tensor:
        if self.training and x.numel() <= x.shape[1]:
            return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)
        return super().forward(x)


def _convolutions(widths: Sequence[int], strides: Sequence[int], groups: int) -> nn.Sequential:
    """Three 3x3 convolutions, BatchNorm and SiLU after the first two."""
    layers: list[nn.Module] = []
    for i, stride in enumerate(strides):
        layers.append(nn.Conv2d(widths[i], widths[i + 1], 3, stride, padding=1, groups=groups))
        if i < 2:
            layers += [_BatchNorm(widths[i + 1]), nn.SiLU()]
    return nn.Sequential(*layers)


class ReductionCell(nn.Module):
    """Shrinks the map: attention over a pyramid of dilated convolutions, plus a parallel stack of convolutions."""

    def __init__(self, in_channels: int, stage: Stage) -> None:
        super().__init__()
        self.windowed = stage.windowed
        reach = [(stage.kernel - 1) * d + 1 for d in stage.dilations]
        self.pyramid = nn.ModuleList(
            nn.Conv2d(in_channels, stage.embed, stage.kernel, stage.ratio, padding=-(-(r - stage.ratio) // 2), dilation=d)
            for d, r in zip(stage.dilations, reach, strict=True)
        )
        width = stage.embed * len(stage.dilations)
        strides = (2, 2, 1) if stage.ratio == 4 else (2, 1, 1)
        self.conv = _convolutions((in_channels, stage.embed, stage.embed, stage.channels), strides, stage.reduction_groups)
        self.norm1 = nn.LayerNorm(width)
        self.attention = Attention(width, stage.channels, stage.reduction_heads, bias=stage.windowed)
        self.norm2 = nn.LayerNorm(stage.channels)
        self.mlp = MLP(stage.channels, stage.channels)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) -> (B, H / ratio, W / ratio, channels). Where the attention sees all tokens, its values are the skip."""
        image = x.permute(0, 3, 1, 2)
        y = torch.cat([F.gelu(conv(image)) for conv in self.pyramid], dim=1).permute(0, 2, 3, 1)
        y = self.norm1(y)
        if self.windowed:
            y = window_attention(self.attention, y)
        else:
            attended, values = self.attention(y.flatten(1, 2))
            y = (values + attended).unflatten(1, y.shape[1:3])
        y = y + self.conv(image).permute(0, 2, 3, 1)
        return y + self.mlp(self.norm2(y))


class NormalCell(nn.Module):
    """Attention and convolutions in parallel, then an MLP. `drop`: probability that an image skips a part in training."""

    def __init__(self, channels: int, heads: int, groups: int, windowed: bool, drop: float) -> None:
        super().__init__()
        self.windowed = windowed
        self.drop = drop
        self.norm1 = nn.LayerNorm(channels, eps=1e-6)
        self.attention = Attention(channels, channels, heads)
        self.conv = _convolutions((channels, 4 * channels, channels, channels), (1, 1, 1), groups)
        self.norm2 = nn.LayerNorm(channels, eps=1e-6)
        self.mlp = MLP(channels, 4 * channels)

    def _dropped(self, x: Tensor) -> Tensor:
        return stochastic_depth(x, self.drop, "row", self.training)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) -> the same shape."""
        y = self.norm1(x)
        if self.windowed:
            y = window_attention(self.attention, y)
        else:
            y = self.attention(y.flatten(1, 2))[0].unflatten(1, x.shape[1:3])
        convolved = self.conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        x = x + self._dropped(y) + self._dropped(convolved)
        return x + self._dropped(self.mlp(self.norm2(x)))


class ViTAEv2(nn.Module):
    """Maps of strides 4, 8, 16 and 32 with 64, 128, 256 and 512 channels.

    drop_path: largest stochastic depth rate, 0-1. checkpointing: keep only the cells' inputs for the backward pass and
    recompute the rest there. `feature_info` describes the maps as timm does.
    """

    def __init__(self, drop_path: float = 0.3, checkpointing: bool = False) -> None:
        super().__init__()
        self.checkpointing = checkpointing
        rates = [drop_path * i / (sum(s.depth for s in STAGES) - 1) for i in range(sum(s.depth for s in STAGES))]
        self.stages = nn.ModuleList()
        for in_channels, stage in zip((3, *(s.channels for s in STAGES)), STAGES, strict=False):
            cells: list[nn.Module] = [ReductionCell(in_channels, stage)]
            for rate in rates[stage.first_rate : stage.first_rate + stage.depth]:
                cells.append(NormalCell(stage.channels, stage.heads, stage.groups, stage.windowed, rate))
            self.stages.append(nn.Sequential(*cells))
        self.feature_info = FeatureInfo(
            [{"num_chs": stage.channels, "reduction": 4 << i, "module": f"stages.{i}"} for i, stage in enumerate(STAGES)],
            (0, 1, 2, 3),
        )
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, images: Tensor) -> list[Tensor]:
        """(B, 3, H, W) -> four maps (B, C_i, H_i, W_i), H_i = H / stride rounded up.

        Sides that are not multiples of 4 are padded with zeros at the bottom and right, so that the reduction cell's two
        branches give maps of the same size.
        """
        height, width = images.shape[-2:]
        x = F.pad(images, (0, -width % 4, 0, -height % 4)).permute(0, 2, 3, 1)
        maps = []
        for stage in self.stages:
            assert isinstance(stage, nn.Sequential)
            for cell in stage:
                x = self._through(cell, x)
            maps.append(x.permute(0, 3, 1, 2))
        return maps

    def _through(self, cell: nn.Module, x: Tensor) -> Tensor:
        if not (self.checkpointing and torch.is_grad_enabled()):
            return cell(x)

        def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
            return nullcontext(), statistics_untouched(cell)

        return checkpoint(cell, x, use_reentrant=False, context_fn=contexts)


@contextmanager
def statistics_untouched(module: nn.Module) -> Iterator[None]:
    """Within it, BatchNorm normalises as before but does not update its statistics, which include this batch already."""
    norms = [m for m in module.modules() if isinstance(m, nn.BatchNorm2d)]
    before = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm in norms:
        norm.momentum, norm.num_batches_tracked = 0.0, None
    try:
        yield
    finally:
        for norm, (momentum, counter) in zip(norms, before, strict=True):
            norm.momentum, norm.num_batches_tracked = momentum, counter

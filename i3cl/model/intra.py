"""Intra-instance collaborative learning (arXiv 2108.01343, section 3.2): context along and across a text within one level."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

ROUNDS = (7, 5, 3)
"""Kernel sizes of the rounds; each round reads the result of the previous one."""


class IntraBlock(nn.Module):
    """x + ReLU(BatchNorm(expand(rounds(reduce(x))))); a round of size k adds up a k x k, a k x 1 and a 1 x k convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        inner = channels // 4
        self.reduce = nn.Conv2d(channels, inner, 1)
        self.square = nn.ModuleList(nn.Conv2d(inner, inner, k, padding=k // 2) for k in ROUNDS)
        self.column = nn.ModuleList(nn.Conv2d(inner, inner, (k, 1), padding=(k // 2, 0)) for k in ROUNDS)
        self.row = nn.ModuleList(nn.Conv2d(inner, inner, (1, k), padding=(0, k // 2)) for k in ROUNDS)
        self.expand = nn.Conv2d(inner, channels, 1)
        self.norm = nn.BatchNorm2d(channels)
        # A new block changes x only a little, so a detector that was trained without it keeps its quality. The weight is not
        # zero, because a ReLU at exactly zero passes no gradient and the block would never learn.
        nn.init.constant_(self.norm.weight, 0.1)

    def merged(self, round_: int) -> tuple[Tensor, Tensor]:
        """One k x k kernel (C, C, k, k) and bias (C,) that equal one round's three convolutions.

        Convolution is linear in its kernel, so the sum of three convolutions of one input is the convolution
        with the sum of the kernels, the thin ones padded with zeros.
        """
        square, column, row = self.square[round_], self.column[round_], self.row[round_]
        assert isinstance(square, nn.Conv2d) and isinstance(column, nn.Conv2d) and isinstance(row, nn.Conv2d)
        assert square.bias is not None and column.bias is not None and row.bias is not None
        half = ROUNDS[round_] // 2
        weight = square.weight.clone()
        weight[:, :, :, half] += column.weight[:, :, :, 0]
        weight[:, :, half, :] += row.weight[:, :, 0, :]
        return weight, square.bias + column.bias + row.bias

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> the same shape."""
        y = self.reduce(x)
        for i, k in enumerate(ROUNDS):
            weight, bias = self.merged(i)
            y = F.conv2d(y, weight, bias, padding=k // 2)
        y = self.expand(y)
        return x + batch_norm(self.norm, y).relu_()


def batch_norm(norm: nn.BatchNorm2d, x: Tensor) -> Tensor:
    """BatchNorm that uses its stored statistics where a channel has at most one value, which has no variance."""
    if norm.training and x.numel() <= x.shape[1]:
        return F.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias, False, 0.0, norm.eps)
    return norm(x)


def as_channels_last(x: Tensor) -> Tensor:
    """The same values with the channels innermost in memory."""
    return x.contiguous(memory_format=torch.channels_last)

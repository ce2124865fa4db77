"""What keeps a GPU busy: constants that are copied to it once, and a second way of computing where the CPU's would make it wait.

A GPU works through a queue. Reading one of its values on the CPU (`item`, `nonzero`, a boolean index) or copying a Python
number to it empties the queue first, so the steps of the network avoid both.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor


def on_cpu(x: Tensor) -> bool:
    """Whether `x` is computed with on the CPU, where reading a value costs nothing."""
    return x.device.type == "cpu"


def constant(values: tuple[float, ...], device: torch.device) -> Tensor:
    """(N,) float32 of the values on `device`, made once. Do not write into it."""
    # What is made during an export stands for a value without having one, so it may not be kept.
    make = _made if torch.compiler.is_exporting() else _kept
    return make(tuple(values), device)


def _made(values: tuple[float, ...], device: torch.device) -> Tensor:
    # A tensor born in inference mode could not be used in training later.
    with torch.inference_mode(False):
        return torch.tensor(values, dtype=torch.float32, device=device)


_kept = lru_cache(maxsize=256)(_made)


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """`x` on `device`; from the CPU to a GPU through pinned memory, so that the CPU need not wait."""
    if x.device.type == "cpu" and device.type == "cuda":
        x = x.pin_memory()
    return x.to(device, non_blocking=x.device.type == "cpu")


def positions(mask: Tensor, count: int) -> Tensor:
    """(count,) int64 positions of the `count` true values of `mask` (N,), in ascending order, without waiting for a GPU."""
    if on_cpu(mask):
        return mask.nonzero().flatten()
    return torch.nonzero_static(mask, size=count).flatten()

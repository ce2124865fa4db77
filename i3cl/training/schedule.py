"""Optimiser, learning rate over the run, and the running average of the weights."""

from __future__ import annotations

import copy
import math

import torch
from torch import nn

from i3cl.config import TrainSettings

_UNDECAYED = ("relative_position_bias_table", "pos_embed")


def make_optimizer(model: nn.Module, settings: TrainSettings) -> torch.optim.Optimizer:
    """SGD with momentum, or AdamW without weight decay on norms, biases and position tables. Frozen parameters stay out."""
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    if settings.optimizer == "sgd":
        return torch.optim.SGD(
            [p for _, p in trained],
            lr=settings.learning_rate,
            momentum=settings.momentum,
            weight_decay=settings.weight_decay,
        )
    decayed = [p for name, p in trained if p.ndim > 1 and not name.endswith(_UNDECAYED)]
    plain = [p for name, p in trained if p.ndim <= 1 or name.endswith(_UNDECAYED)]
    groups = [{"params": decayed, "weight_decay": settings.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=settings.learning_rate)


def learning_rate(step: int, steps: int, images_per_step: int, settings: TrainSettings) -> float:
    """Rate of 0-based `step` of `steps`, for a total batch of `images_per_step` images over all workers.

    Linear scaling with the total batch (Goyal et al., arXiv 1706.02677), linear warm-up over the same number of images at any
    batch, then tenfold falls at the milestones or a half cosine to a hundredth.
    """
    scale = 1.0 if settings.reference_batch is None else images_per_step / settings.reference_batch
    rate = settings.learning_rate * scale
    warmup = min(round(settings.warmup_steps / scale), steps // 5)
    if step < warmup:
        return rate * (settings.warmup_factor + (1 - settings.warmup_factor) * step / warmup)
    if settings.schedule == "cosine":
        share = (step - warmup) / max(1, steps - warmup)
        return rate * (0.01 + 0.99 * (1 + math.cos(math.pi * share)) / 2)
    return rate * 0.1 ** sum(step >= milestone * steps for milestone in settings.milestones)


class WeightAverage:
    """Exponential moving average of a network's weights and statistics, kept as a network in eval mode.

    The decay at update n is min(decay, (1 + n) / (10 + n)), so that the random initial weights leave the average at once.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.updates = 0
        self.model = copy.deepcopy(model).eval().requires_grad_(False)

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        self.updates += 1
        keep = min(self.decay, (1 + self.updates) / (10 + self.updates))
        average, current = self.model.state_dict(), model.state_dict()
        floats = [name for name, tensor in average.items() if tensor.is_floating_point()]
        torch._foreach_lerp_([average[name] for name in floats], [current[name] for name in floats], 1 - keep)
        for name in average.keys() - set(floats):
            average[name].copy_(current[name])

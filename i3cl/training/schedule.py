"""Optimiser, learning rate over the run, and the running average of the weights."""

from __future__ import annotations

import copy
import math

import torch
from torch import nn

from i3cl.config import TrainSettings

_UNDECAYED = ("relative_position_bias_table", "pos_embed")


def make_optimizer(model: nn.Module, settings: TrainSettings) -> torch.optim.Optimizer:
    """SGD with momentum, or AdamW without weight decay on norms, biases and position tables; frozen parameters are left out."""
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


def peak_rate(images_per_step: int, settings: TrainSettings) -> float:
    """The learning rate after the warm-up, for a total batch of `images_per_step` images over all workers.

    With the ratio of the total batch to reference_batch, SGD's rate grows linearly (Goyal et al., arXiv 1706.02677) and AdamW's
    by the square root (Malladi et al., arXiv 2205.10287).
    """
    ratio = _ratio(images_per_step, settings)
    return settings.learning_rate * (ratio if settings.optimizer == "sgd" else math.sqrt(ratio))


def warmup_steps(steps: int, images_per_step: int, settings: TrainSettings) -> int:
    """Steps of the warm-up: the same number of images at any batch, at least warmup_min_steps, at most a fifth of `steps`."""
    fewest = min(settings.warmup_steps, settings.warmup_min_steps)
    return min(max(round(settings.warmup_steps / _ratio(images_per_step, settings)), fewest), steps // 5)


def describe_rate(steps: int, images_per_step: int, settings: TrainSettings) -> str:
    """One line for people: the learning rate and the warm-up of a run, and what they follow from."""
    rate, warmup = peak_rate(images_per_step, settings), warmup_steps(steps, images_per_step, settings)
    given, why = settings.learning_rate, "train.learning_rate as it stands"
    if settings.reference_batch is not None and images_per_step != settings.reference_batch:
        how = "linear, SGD" if settings.optimizer == "sgd" else "by the square root, AdamW"
        why = f"{given:g} for {settings.reference_batch} images a step, scaled to {images_per_step}: {how}"
    return f"learning rate {rate:.3g} ({why}), warm-up over {warmup} of {steps} steps"


def learning_rate(step: int, steps: int, images_per_step: int, settings: TrainSettings) -> float:
    """Rate of 0-based `step` of `steps`, for a total batch of `images_per_step` images over all workers.

    Linear warm-up to `peak_rate`; then tenfold falls at the milestones or a half cosine to a hundredth.
    """
    rate, warmup = peak_rate(images_per_step, settings), warmup_steps(steps, images_per_step, settings)
    if step < warmup:
        return rate * (settings.warmup_factor + (1 - settings.warmup_factor) * step / warmup)
    if settings.schedule == "cosine":
        share = (step - warmup) / max(1, steps - warmup)
        return rate * (0.01 + 0.99 * (1 + math.cos(math.pi * share)) / 2)
    return rate * 0.1 ** sum(step >= milestone * steps for milestone in settings.milestones)


def _ratio(images_per_step: int, settings: TrainSettings) -> float:
    return 1.0 if settings.reference_batch is None else images_per_step / settings.reference_batch


class WeightAverage:
    """Exponential moving average of a network's weights and statistics, kept as a network in eval mode.

    The decay at update n is min(decay, (1 + n) / (10 + n)), so that the initial weights soon vanish from the average.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        """Starts at the weights of `model`, whose tensors `update` reads: it must keep them (load_state_dict does)."""
        self.decay = decay
        self.updates = 0
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        # Looked up once: with a small network, collecting the tensors by name takes as long as averaging them. Frozen
        # parameters never change; running statistics do, and they are buffers.
        frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
        average = {name: tensor for name, tensor in self.model.state_dict().items() if name not in frozen}
        pairs = [(tensor, model.state_dict()[name]) for name, tensor in average.items()]
        self._averaged = [pair for pair in pairs if pair[0].is_floating_point()]
        self._copied = [pair for pair in pairs if not pair[0].is_floating_point()]

    @torch.no_grad()
    def update(self) -> None:
        """Move the average towards the weights as they are now."""
        self.updates += 1
        keep = min(self.decay, (1 + self.updates) / (10 + self.updates))
        averages, currents = zip(*self._averaged, strict=True)
        torch._foreach_lerp_(averages, currents, 1 - keep)
        if self._copied:
            averages, currents = zip(*self._copied, strict=True)
            torch._foreach_copy_(averages, currents)

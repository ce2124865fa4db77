"""A training step reads few values back from the GPU: each time the GPU's queue runs empty.

Counted on the CPU, with the ways of computing that a GPU takes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from i3cl.model import placement
from i3cl.model.targets import read_truths
from tests.model import small

WAITING = {"_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_dim", "bincount", "nms"}
"""Operations after which the CPU has read something from the GPU."""
INDEXED = {"index", "index_put", "index_put_", "_index_put_impl_"}
"""Operations that read from the GPU when an index is boolean."""
COPIES = {"lift_fresh"}
"""What makes a tensor of Python numbers, which a GPU waits for too."""


class Waits(TorchDispatchMode):
    """Counts what makes the CPU wait for a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function._schema.name.split("::")[1]
        indices = args[1] if name in INDEXED else []
        boolean = any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in indices)
        if name in WAITING or name in COPIES or boolean:
            self.counts[name] += 1
        return function(*args, **(kwargs or {}))


class Lists(TorchFunctionMode):
    """Counts `tolist`, which no operation shows on the CPU."""

    def __init__(self, counts: Counter[str]) -> None:
        super().__init__()
        self.counts = counts

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.Tensor.tolist:
            self.counts["tolist"] += 1
        return function(*args, **(kwargs or {}))


def waits(step: Callable[[], object]) -> Counter[str]:
    step()  # constants are made once
    with Waits() as mode, Lists(mode.counts):
        step()
    return mode.counts


def training_step(images: int) -> Callable[[], object]:
    model = small.build().train()
    chosen = [i % 2 for i in range(images)]
    truths = read_truths([small.target(i) for i in chosen], torch.device("cpu"))
    pictures, sizes = [small.image(i) for i in chosen], [small.SIZES[i] for i in chosen]

    def step() -> None:
        losses = model.losses_of(model.features(model.batch(pictures)), sizes, truths)
        sum(losses.values()).backward()

    return step


def test_the_counter_counts() -> None:
    x = torch.arange(4.0)

    def step() -> None:
        assert x.sum().item() == 6 and x[x > 1].numel() == 2 and x.tolist() and x.nonzero().numel() == 3
        x.new_tensor([1.0])

    counts = waits(step)
    assert counts["_local_scalar_dense"] == counts["nonzero"] == counts["tolist"] == counts["lift_fresh"] == counts["index"] == 1


@pytest.mark.parametrize(("images", "limit"), [(1, 7), (2, 8), (4, 10)])
def test_a_training_step_waits_rarely(images: int, limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(placement, "on_cpu", lambda x: False)
    counts = waits(training_step(images))
    assert sum(counts.values()) <= limit, counts
    assert counts["nms"] == images


def test_both_ways_of_computing_give_the_same_losses(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = small.measure()
    monkeypatch.setattr(placement, "on_cpu", lambda x: False)
    assert small.differences(small.measure(), expected, 1e-5) == []

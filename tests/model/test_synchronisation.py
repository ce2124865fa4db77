"""A training step reads few values back from the GPU: each time the GPU's queue runs empty. Counted with a stand-in for a GPU."""

from __future__ import annotations

import pytest
import torch

from i3cl.config import ModelSettings, with_overrides
from i3cl.model import placement
from i3cl.model.anchors import Anchors
from i3cl.model.network import I3CL
from i3cl.training.loop import Trainer
from tests.model import small
from tests.model.stand_in import DEVICE, StandIn


def test_the_stand_in_counts_what_a_gpu_waits_for() -> None:
    with StandIn() as gpu:
        x = torch.arange(4.0, device=DEVICE)
        assert not gpu.waits and not gpu.sent
        assert x.sum().item() == 6
        assert x[x > 1].numel() == 2
        assert x.nonzero().numel() == 3
        assert x.tolist() == [0, 1, 2, 3]
        assert x.new_tensor([1.0, 2.0]).device == DEVICE
        assert torch.ones(2).to(DEVICE, non_blocking=True).device == DEVICE
        with pytest.raises(RuntimeError, match="of the CPU and of the device"):
            x + torch.ones(4)
    # Both copies that wait: the list and the numbers. The third was asked not to.
    assert gpu.waits == {"_local_scalar_dense": 1, "index": 1, "nonzero": 1, "_to_copy": 2}
    assert gpu.sent == 16


@pytest.mark.parametrize("batch", [1, 2, 4])
def test_a_training_step_waits_rarely(batch, tiny_settings, tmp_path):
    changes = {"train.batch": batch, "train.steps": 3, "data.validation": None}
    settings = with_overrides(tiny_settings, changes, "test")
    with StandIn() as gpu:
        trainer = Trainer(settings, I3CL(settings.model).to(DEVICE), DEVICE, 0, 1, str(tmp_path))
        trainer.parallel.train()
        batches = trainer._ready_batches()
        trainer._train_step(batches)  # constants are made once
        gpu.waits.clear()
        gpu.sent = 0
        trainer._train_step(batches)
    assert gpu.waits["nms"] == batch
    assert gpu.waits.total() <= 8 + batch, gpu.waits
    images = batch * 3 * 96 * 96 * 4
    assert images < gpu.sent < images + batch * 16_384, "the images, and little for their truth"


def test_a_step_of_the_papers_network_waits_as_rarely():
    box = torch.tensor([[8.0, 10, 70, 44]])
    target = {"boxes": box, "labels": torch.zeros(1, dtype=torch.int64), "masks": torch.ones(1, 64, 96, dtype=torch.uint8)}
    with StandIn() as gpu:
        model = I3CL(ModelSettings()).to(DEVICE).train()
        for _ in range(2):
            gpu.waits.clear()
            losses = model([torch.zeros(3, 64, 96, device=DEVICE)], [target])
            sum(losses.values()).backward()
    assert gpu.waits["nms"] == 1
    assert gpu.waits.total() <= 8, gpu.waits


def test_losses_on_the_stand_in_are_those_on_the_cpu():
    found = []
    with StandIn():
        for device in (torch.device("cpu"), DEVICE):
            model = small.build().to(device).train()
            losses = model([small.image(i).to(device) for i in (0, 1)], [small.target(i) for i in (0, 1)])
            sum(losses.values()).backward()
            norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
            found.append({name: loss.item() for name, loss in losses.items()} | {"gradients": norm.item()})
    assert found[1] == pytest.approx(found[0], rel=1e-4)


def test_anchors_of_a_new_size_are_not_sent():
    anchors = Anchors((4, 8), 8, (0.5, 1, 2))
    with StandIn() as gpu:
        anchors([(8, 8), (4, 4)], DEVICE)
        assert gpu.sent == 2 * 3 * 4 * 4, "the anchors of one cell of each level, once"
        gpu.waits.clear()
        other = anchors([(10, 6), (5, 3)], DEVICE)
        assert gpu.sent == 2 * 3 * 4 * 4 and not gpu.waits
        assert torch.equal(other.cpu(), anchors([(10, 6), (5, 3)], torch.device("cpu")))


def test_both_ways_of_computing_give_the_same_losses(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = small.measure()
    monkeypatch.setattr(placement, "on_cpu", lambda x: False)
    assert small.differences(small.measure(), expected, 1e-5) == []

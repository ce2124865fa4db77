"""ViTAEv2-S on its own: sizes, windows, recomputation, stochastic depth, frozen parts."""

from __future__ import annotations

import json

import pytest
import torch
from torch import Tensor

from i3cl.config import BackboneSettings
from i3cl.errors import UserError
from i3cl.model.backbone import Backbone
from i3cl.model.vitae import STAGES, Attention, NormalCell, ViTAEv2, window_attention
from tests.model.parity import default_directory


@pytest.fixture(scope="module")
def network() -> ViTAEv2:
    torch.manual_seed(0)
    return ViTAEv2().eval()


@pytest.mark.parametrize("size", [(32, 32), (33, 61), (5, 7), (1, 1), (64, 250)])
@torch.no_grad()
def test_any_size_gives_maps_of_its_strides(network: ViTAEv2, size: tuple[int, int]) -> None:
    maps = network(torch.rand(1, 3, *size))
    for i, x in enumerate(maps):
        stride = 4 << i
        assert x.shape == (1, STAGES[i].channels, -(-size[0] // stride), -(-size[1] // stride))
        assert x.isfinite().all()


def plain_window_attention(attention: Attention, x: Tensor) -> Tensor:
    """The definition, window by window and head by head, for one image (1, H, W, C)."""
    _, height, width, channels = x.shape
    up, down = -(-height // 7) * 7, -(-width // 7) * 7
    top, left = (up - height) // 2, (down - width) // 2
    padded = torch.zeros(up, down, channels)
    padded[top : top + height, left : left + width] = x[0]
    out = torch.zeros(up, down, len(attention.proj.bias))
    for i in range(0, up, 7):
        for j in range(0, down, 7):
            q, k, v = attention.qkv(padded[i : i + 7, j : j + 7].reshape(49, channels)).chunk(3, dim=1)
            parts = []
            for a, b, c in zip(*(t.chunk(attention.heads, dim=1) for t in (q, k, v)), strict=True):
                parts.append((a @ b.T / a.shape[1] ** 0.5).softmax(dim=1) @ c)
            out[i : i + 7, j : j + 7] = attention.proj(torch.cat(parts, dim=1)).reshape(7, 7, -1)
    return out[None, top : top + height, left : left + width]


@pytest.mark.parametrize("size", [(7, 14), (8, 8), (13, 9), (2, 3), (6, 20)])
@torch.no_grad()
def test_windows_are_padded_evenly_with_the_odd_row_below(size: tuple[int, int]) -> None:
    torch.manual_seed(1)
    attention = Attention(6, 8, 2)
    torch.nn.init.normal_(attention.qkv.bias)
    x = torch.randn(1, *size, 6)
    assert torch.allclose(window_attention(attention, x), plain_window_attention(attention, x), atol=1e-5)


@torch.no_grad()
def test_full_attention_adds_its_values_where_the_width_changes(network: ViTAEv2) -> None:
    attention = network.stages[2][0].attention
    x = torch.randn(2, 35, 256)
    answer, values = attention(x)
    q, k, v = (t.unflatten(2, (2, 128)).transpose(1, 2) for t in attention.qkv(x).chunk(3, dim=2))
    mixed = ((q @ k.transpose(2, 3)) * 128**-0.5).softmax(dim=3) @ v
    assert torch.allclose(answer, attention.proj(mixed.transpose(1, 2).flatten(2)), atol=1e-5)
    assert torch.equal(values, v.transpose(1, 2).flatten(2))


@torch.no_grad()
def test_images_of_a_batch_do_not_see_each_other(network: ViTAEv2) -> None:
    images = torch.rand(3, 3, 64, 96)
    together = network(images)
    for i in range(3):
        for x, y in zip(network(images[i : i + 1]), together, strict=True):
            assert torch.allclose(x[0], y[i], atol=1e-4)


def test_recomputation_changes_nothing_but_memory() -> None:
    answers = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        network = ViTAEv2(drop_path=0.5, checkpointing=checkpointing).train()
        torch.manual_seed(1)
        sum(x.square().mean() for x in network(torch.rand(2, 3, 64, 64))).backward()
        gradients = {name: p.grad for name, p in network.named_parameters()}
        statistics = {name: b.clone() for name, b in network.named_buffers()}
        answers.append((gradients, statistics))
    (gradients, statistics), (again, statistics_again) = answers
    assert all(torch.allclose(gradients[n], again[n], rtol=1e-3, atol=1e-6) for n in gradients)
    assert all(torch.equal(statistics[n], statistics_again[n]) for n in statistics)


def test_stochastic_depth_rates() -> None:
    rates = {
        f"backbone.layers.{i}.NC.{j - 1}.drop_path": cell.drop
        for i, stage in enumerate(ViTAEv2(drop_path=0.3).stages)
        for j, cell in enumerate(stage)
        if isinstance(cell, NormalCell) and cell.drop
    }
    assert max(rates.values()) == pytest.approx(0.3 * 9 / 13)
    facts = default_directory() / "config_facts.json"
    if not facts.is_file():
        pytest.skip("no recorded rates; set I3CL_SHARED")
    recorded = json.loads(facts.read_text())["vitae"]["drop_path"]
    assert rates == pytest.approx(recorded, abs=1e-6)


def test_stochastic_depth_only_in_training() -> None:
    torch.manual_seed(0)
    cell = NormalCell(8, 1, 1, True, drop=0.999999)
    x = torch.randn(2, 9, 9, 8)
    assert torch.allclose(cell.train()(x), x)
    assert not torch.allclose(cell.eval()(x), x)


def test_frozen_stages_and_norms() -> None:
    whole = Backbone(BackboneSettings(name="vitaev2_s", frozen_stages=0, norm_eval=False)).train()
    assert all(p.requires_grad for p in whole.parameters()) and all(m.training for m in whole.modules())
    part = Backbone(BackboneSettings(name="vitaev2_s", frozen_stages=2, norm_eval=False)).train()
    for i, stage in enumerate(part.body.stages):
        assert all(p.requires_grad == (i >= 2) for p in stage.parameters())
        assert all(m.training == (i >= 2) for m in stage.modules())
    held = Backbone(BackboneSettings(name="vitaev2_s", frozen_stages=0)).train()
    assert {type(m).__name__ for m in held.modules() if not m.training} == {"_BatchNorm"}


def test_there_are_no_weights_but_in_files() -> None:
    for weights in ("timm", "package"):
        with pytest.raises(UserError, match=r"model.backbone.weights: .*vitaev2_s"):
            Backbone(BackboneSettings(name="vitaev2_s", weights=weights))

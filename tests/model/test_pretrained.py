"""Initial weights of the image network under everybody's names, and files that are refused."""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn

from i3cl.config import BackboneSettings
from i3cl.errors import UserError
from i3cl.model.backbone import Backbone
from i3cl.model.original import to_original
from i3cl.model.pretrained import to_body_names
from i3cl.model.weights_file import read_tensors


def loaded(name: str, path: Path) -> Backbone:
    return Backbone(BackboneSettings(name=name, weights=str(path), frozen_stages=0))


def body_of(name: str) -> nn.Module:
    with torch.device("meta"):
        return Backbone(BackboneSettings(name=name, frozen_stages=0)).body


def complete(body: nn.Module, named: dict[str, Tensor]) -> bool:
    """Whether every weight of the body is there under its name and shape."""
    own = {name: tensor for name, tensor in body.state_dict().items() if not name.endswith("num_batches_tracked")}
    return all(name in named and named[name].shape == tensor.shape for name, tensor in own.items())


@pytest.mark.parametrize("prefix", ["", "module.", "backbone.", "module.encoder_q."])
def test_torchvision_weights_behind_any_prefix_give_torchvisions_maps(prefix: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    theirs = torchvision.models.resnet18(weights=None).eval()
    state = {prefix + name: tensor for name, tensor in theirs.state_dict().items()}
    other = {name.replace("encoder_q", "encoder_k"): torch.zeros_like(t) for name, t in state.items() if "_q" in name}
    beside = {"args": argparse.Namespace(lr=1), "best": np.float64(0.5), "epoch": np.int64(3), "seen": np.bool_(True)}
    torch.save({"model": {**state, **other, "queue": torch.zeros(3)}, **beside}, tmp_path / "w.pth")
    backbone = loaded("resnet18", tmp_path / "w.pth").eval()
    assert backbone.report is not None and not backbone.report.missing
    assert set(backbone.report.unexpected) == {f"{prefix}fc.weight", f"{prefix}fc.bias", "queue", *other}
    x = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        y = theirs.maxpool(theirs.relu(theirs.bn1(theirs.conv1(x))))
        for layer, found in zip((theirs.layer1, theirs.layer2, theirs.layer3, theirs.layer4), backbone(x), strict=True):
            y = layer(y)
            assert torch.allclose(found, y, atol=1e-5)


@pytest.mark.parametrize("prefix", ["encoder.", "encoder_q.0.", "backbone.body.", "module.backbone.", "state.online."])
def test_any_other_prefix(prefix: str) -> None:
    with torch.device("meta"):
        theirs = torchvision.models.resnet18(weights=None).state_dict()
    body = body_of("resnet18")
    assert complete(body, to_body_names({prefix + n: t for n, t in theirs.items()}, body.state_dict()))


def test_files_without_batch_counters_lack_nothing(tmp_path: Path) -> None:
    state = torchvision.models.resnet18(weights=None).state_dict()
    torch.save({n: t for n, t in state.items() if not n.endswith("num_batches_tracked")}, tmp_path / "old.pth")
    report = loaded("resnet18", tmp_path / "old.pth").report
    assert report is not None and not report.missing


@pytest.mark.parametrize(
    ("name", "maker"),
    [("resnet50", "resnet50"), ("resnext101", "resnext101_32x8d")],
)
def test_torchvision_names_of_the_papers_networks(name: str, maker: str) -> None:
    with torch.device("meta"):
        theirs = getattr(torchvision.models, maker)(weights=None).state_dict()
    assert complete(body_of(name), to_body_names(theirs, body_of(name).state_dict()))


@pytest.mark.parametrize("name", ["resnest14d", "convnext_atto", "tf_efficientnet_lite0", "regnetx_002"])
def test_timm_names(name: str) -> None:
    with torch.device("meta"):
        theirs = timm.create_model(name).state_dict()
    body = body_of(name)
    assert complete(body, to_body_names(theirs, body.state_dict()))


def test_mmdetection_names_of_a_deep_stem() -> None:
    with torch.device("meta"):
        theirs = timm.create_model("resnest14d").state_dict()
    renamed = {}
    for name, tensor in theirs.items():
        parts = name.split(".")
        if parts[0] == "conv1":
            parts[0] = "stem"
        elif parts[0] == "bn1":
            parts[:1] = ["stem", "7"]
        renamed["backbone." + ".".join(parts)] = tensor
    assert not complete(body_of("resnest14d"), renamed)
    assert complete(body_of("resnest14d"), to_body_names(renamed, body_of("resnest14d").state_dict()))


def test_papers_networks_have_their_shape() -> None:
    for name, blocks in (("resnext101", [3, 4, 23, 3]), ("resnext151", [3, 8, 36, 3]), ("resnest101", [3, 4, 23, 3])):
        body = body_of(name)
        assert [len(body.get_submodule(f"layer{i}")) for i in range(1, 5)] == blocks
        assert body.feature_info.channels() == [256, 512, 1024, 2048]
    for name in ("resnext101", "resnext151"):
        assert body_of(name).get_submodule("layer1.0.conv2").weight.shape == (256, 8, 3, 3)


@pytest.mark.parametrize("prefix", ["", "backbone."])
def test_a_vitae_classifier_loads(prefix: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    source = Backbone(BackboneSettings(name="vitaev2_s"))
    state = to_original({f"backbone.{name}": tensor for name, tensor in source.state_dict().items()})
    state = {prefix + name.removeprefix("backbone."): tensor for name, tensor in state.items()}
    state |= {f"{prefix}head.weight": torch.zeros(1000, 512), f"{prefix}norm.weight": torch.zeros(512)}
    torch.save({"state_dict": state}, tmp_path / "classifier.pth")
    other = loaded("vitaev2_s", tmp_path / "classifier.pth")
    assert other.report is not None and not other.report.missing
    assert {name.rpartition(".")[2] for name in other.report.unexpected} == {
        "weight",
        "relative_position_bias_table",
        "relative_position_index",
    }
    assert all(torch.equal(a, b) for a, b in zip(source.parameters(), other.parameters(), strict=True))


def test_another_networks_file_shows_both_namings(tmp_path: Path) -> None:
    torch.save({f"blocks.{i}.mlp.weight": torch.zeros(1) for i in range(9)}, tmp_path / "other.pth")
    with pytest.raises(UserError, match=r"other.pth: holds only 0 of .*'blocks.4.mlp.weight'.*'layer"):
        loaded("resnet18", tmp_path / "other.pth")
    torch.save({"stem.conv1.weight": torch.zeros(1), "res2.0.conv1.weight": torch.zeros(1)}, tmp_path / "d2.pth")
    with pytest.raises(UserError, match=r"d2\.pth: has detectron2's names"):
        loaded("resnet50", tmp_path / "d2.pth")


class _Unknown:
    """A class that a training script might have pickled."""


def test_unreadable_files_are_one_line(tmp_path: Path) -> None:
    torch.save({"state_dict": {"a": torch.zeros(1)}, "meta": _Unknown()}, tmp_path / "objects.pth")
    (tmp_path / "text.pth").write_text("not weights")
    (tmp_path / "broken.safetensors").write_bytes(b"\x00" * 20)
    torch.save({"epoch": 3}, tmp_path / "empty.pth")
    for name, words in (
        ("objects.pth", "_Unknown"),
        ("text.pth", "is a text file"),
        ("broken.safetensors", "safetensors"),
        ("empty.pth", "no named tensors"),
        ("absent.pth", "no such"),
    ):
        with pytest.raises(UserError, match=words) as caught:
            read_tensors(tmp_path / name)
        assert name in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("legacy", [False, True])
def test_a_pickle_that_runs_commands_is_refused(tmp_path: Path, legacy: bool) -> None:
    class Trap:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            import os

            return (os.system, (f"touch {tmp_path / 'sprung'}",))

    torch.save(
        {"state_dict": {"a": torch.zeros(1)}, "meta": Trap()},
        tmp_path / "bad.pth",
        _use_new_zipfile_serialization=not legacy,
    )
    with pytest.raises(UserError, match=r"bad\.pth: holds a .*system"):
        loaded("resnet18", tmp_path / "bad.pth")
    assert not (tmp_path / "sprung").exists()


def test_recomputation_of_timm_networks(tmp_path: Path) -> None:
    gradients = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        backbone = Backbone(BackboneSettings(name="resnet10t", frozen_stages=0, checkpointing=checkpointing)).train()
        sum(x.square().mean() for x in backbone(torch.full((1, 3, 64, 64), 0.5))).backward()
        gradients.append([p.grad for p in backbone.parameters()])
    assert all(torch.allclose(a, b, rtol=1e-3, atol=1e-6) for a, b in zip(*gradients, strict=True))
    with pytest.raises(UserError, match="checkpointing"):
        Backbone(BackboneSettings(name="resnet10t", norm_eval=False, checkpointing=True))

"""Checkpoints of the original release become ours, and torchvision's backbone and pyramid start a training."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torchvision
from torch import Tensor

import i3cl
from i3cl.config import BackboneSettings, ModelSettings
from i3cl.errors import UserError
from i3cl.model.align import RegionReader
from i3cl.model.checkpoint import load_weights
from i3cl.model.convert import convert_original, recognise
from i3cl.model.network import I3CL
from i3cl.model.original import from_original, relative_position_index, to_original, to_our_names
from tests.model.parity import Parity

ROOT = Path(__file__).resolve().parents[2]


def original_file(path: Path, state: dict[str, Tensor], prefix: str = "") -> str:
    """As mmdetection writes checkpoints: tensors under 'state_dict', and plain things beside them."""
    meta = {"epoch": 8, "CLASSES": ("text",), "config": "model = dict()", "hook_msgs": {}}
    optimizer = {"state": {0: {"momentum_buffer": torch.zeros(2)}}, "param_groups": [{"lr": 1e-3, "params": [0]}]}
    torch.save({"meta": meta, "optimizer": optimizer, "state_dict": {prefix + n: t for n, t in state.items()}}, path)
    return str(path)


@pytest.mark.parametrize(("network", "prefix"), [("r50", "module."), ("vitae", "")])
def test_a_full_original_checkpoint_gives_the_same_detections(network: str, prefix: str, tmp_path: Path) -> None:
    parity = Parity()
    entries = parity.json(f"state_dict_{network}.json")
    weights = parity.weights(network)
    rest = {name: relative_position_index() for name, _, _ in entries if name not in weights}
    state = {name: rest.get(name, weights.get(name)) for name, _, _ in entries}
    source = original_file(tmp_path / "original.pth", state, prefix)
    text = convert_original(source, str(tmp_path / "converted"))
    assert "63 classes, intra and inter blocks" in text and ("left over" not in text)
    assert ("12 that the network does not use are left out" in text) == (network == "vitae")
    model = i3cl.load(str(tmp_path / "converted"), "cpu")
    assert model.settings.backbone.name == {"r50": "resnet50", "vitae": "vitaev2_s"}[network]
    image = parity.image(parity.spec["image_a"])
    model.heads.settings = model.settings.model_copy(update={"score_threshold": 0.001})
    (before,), (after,) = parity.network(network, score_threshold=0.001).eval()([image]), model([image])
    assert len(before["boxes"]) > 3
    assert all(torch.equal(before[key], after[key]) for key in ("boxes", "scores", "labels", "masks"))
    back = to_original(model.state_dict(), unused=state)
    assert back.keys() == state.keys() and all(torch.equal(back[name], state[name]) for name in state)

    if network == "vitae":
        return
    one_text = convert_original(source, str(tmp_path / "one"), classes=1)
    assert ", 1 class, " in one_text and "choose new thresholds" in one_text
    one = i3cl.load(str(tmp_path / "one"), "cpu")
    with torch.no_grad():
        levels = one.features(one.batch([image]))
        regions = torch.cat([torch.zeros(len(before["boxes"]), 1), before["boxes"]], dim=1)
        reader = RegionReader(levels)
        (many_cls, many_reg), (cls, reg) = model.heads.box(reader(regions, 7)), one.heads.box(reader(regions, 7))
        assert torch.allclose(cls, many_cls[:, [0, 63]], atol=1e-5) and torch.allclose(reg, many_reg[:, :4], atol=1e-5)
        assert (cls.softmax(1)[:, 0] >= many_cls.softmax(1)[:, 0] - 1e-6).all()
        features = reader(regions, 14)
        assert torch.allclose(one.heads.mask(features)[:, 0], model.heads.mask(features)[:, 0], atol=1e-5)


@pytest.fixture(scope="module")
def plain() -> I3CL:
    torch.manual_seed(0)
    return I3CL(ModelSettings(num_classes=3, intra=False, inter=False))


@pytest.mark.slow
def test_a_checkpoint_of_the_pretrain_stage(plain: I3CL, tmp_path: Path) -> None:
    source = original_file(tmp_path / "pretrain.pth", to_original(plain.state_dict()))
    command = [sys.executable, "jobs/prepare.py", "convert", "--source", source, "--out"]
    done = subprocess.run([*command, str(tmp_path / "out")], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert "resnet50, 3 classes, neither intra nor inter blocks" in done.stdout and str(tmp_path / "out") in done.stdout
    model = i3cl.load(str(tmp_path / "out"), "cpu")
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), plain.state_dict().values(), strict=True))
    with pytest.raises(UserError, match="exists already"):
        convert_original(source, str(tmp_path / "out"))
    for wrong in (0, 4):
        with pytest.raises(UserError, match=f"--classes {wrong}"):
            convert_original(source, str(tmp_path / "wrong"), wrong)
    assert not (tmp_path / "wrong").exists()


def test_incomplete_and_foreign_files_are_refused(plain: I3CL, tmp_path: Path) -> None:
    state = to_original(plain.state_dict())
    less = {name: tensor for name, tensor in state.items() if not name.startswith("rpn_head.rpn_reg")}
    foreign = {name: tensor for name, tensor in state.items() if not name.startswith("roi_head.mask_head")}
    shallow = {name: tensor for name, tensor in state.items() if ".layer3.5." not in name}
    for content, words in (
        (less, "is incomplete: 2 tensors"),
        (foreign, "is not a checkpoint"),
        (shallow, r"\[3, 4, 5, 3\]"),
        ({"backbone.bottom_up.res2.0.conv1.weight": torch.zeros(1)}, "detectron2"),
    ):
        source = original_file(tmp_path / "bad.pth", content)
        with pytest.raises(UserError, match=words) as caught:
            convert_original(source, str(tmp_path / "out"))
        assert "bad.pth" in str(caught.value) and not (tmp_path / "out").exists()


def test_networks_are_recognised_by_their_tensors() -> None:
    for name in ("resnet50", "resnext101", "resnext151", "vitaev2_s"):
        for intra, inter in ((True, False), (False, True)):
            settings = ModelSettings(backbone=BackboneSettings(name=name), num_classes=2, intra=intra, inter=inter)
            with torch.device("meta"):
                state = I3CL(settings).state_dict()
            found = recognise(from_original(to_original(state)), "file")
            assert (found.backbone.name, found.num_classes, found.intra, found.inter) == (name, 2, intra, inter)


def test_torchvision_gives_backbone_and_pyramid(plain: I3CL, tmp_path: Path) -> None:
    torch.manual_seed(1)
    theirs = torchvision.models.detection.maskrcnn_resnet50_fpn(weights=None, weights_backbone=None).eval()
    torch.save(theirs.state_dict(), tmp_path / "torchvision.pth")
    report = load_weights(plain, tmp_path / "torchvision.pth")
    assert {name.split(".")[0] for name in report.missing} == {"proposals", "heads"}
    assert {name.split(".")[0] for name in report.unexpected} == {"rpn", "roi_heads"}
    x = torch.rand(1, 3, 96, 64)
    with torch.no_grad():
        for ours, other in zip(plain.eval().features(x), theirs.backbone(x).values(), strict=True):
            assert torch.allclose(ours, other, atol=1e-4)
    with pytest.raises(UserError, match=r"train\.start_from"):
        convert_original(str(tmp_path / "torchvision.pth"), str(tmp_path / "out"))


def test_a_torchvision_pyramid_with_norms_is_left_alone() -> None:
    with torch.device("meta"):
        theirs = torchvision.models.detection.maskrcnn_resnet50_fpn_v2(weights=None, weights_backbone=None).state_dict()
    named = to_our_names(theirs, "file")
    assert "backbone.body.conv1.weight" in named and not any(name.startswith("pyramid.") for name in named)

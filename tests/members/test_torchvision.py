"""torchvision's Mask R-CNN, with random weights: nothing here says how well it finds text."""

from __future__ import annotations

import pytest
import torch
from members.checks import VIEW, check_any_image, check_fingerprints, check_wrong_files, no_network, photo

from i3cl.config import MemberSettings
from i3cl.errors import UserError
from i3cl.members.member import Place
from i3cl.members.torchvision import TorchvisionMember

SMALL = {"min_size": 64, "max_size": 128, "score_threshold": 0.0, "detections": 5}


def settings(weights: str | None, **options) -> MemberSettings:
    return MemberSettings(use="torchvision", weights=weights, options={**SMALL, **options})


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """State dicts of both versions with 3 and 2 classes, saved as a training script does it."""
    from torchvision.models import detection

    folder = tmp_path_factory.mktemp("torchvision")
    builds = {"v1": (detection.maskrcnn_resnet50_fpn, 3), "v2": (detection.maskrcnn_resnet50_fpn_v2, 2)}
    for name, (build, classes) in builds.items():
        torch.manual_seed(0)
        network = build(weights=None, weights_backbone=None, num_classes=classes)
        # Random weights give masks in crumbs; these fill their boxes.
        network.roi_heads.mask_predictor.mask_fcn_logits.weight.data.zero_()
        network.roi_heads.mask_predictor.mask_fcn_logits.bias.data.fill_(2.0)
        torch.save({"model": network.state_dict(), "epoch": 3}, folder / f"{name}.pth")
    return {name: str(folder / f"{name}.pth") for name in builds}


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_a_state_dict_is_enough(files, version, monkeypatch):
    image = photo(120, 200, {"word": (20, 70)})
    with no_network(monkeypatch):
        member = TorchvisionMember.load(settings(files[version]), Place())
        (found,) = member([image], VIEW)
    assert len(found) > 0


def test_outlines_are_those_of_the_networks_own_masks(files):
    """Against torchvision's own way, which pastes every mask into a bitmap of the image."""
    image = photo(120, 200, {"word": (20, 70)})
    member = TorchvisionMember.load(settings(files["v1"]), Place())
    (found,) = member([image], VIEW)
    with torch.inference_mode():
        (wanted,) = member._network([torch.from_numpy(image).permute(2, 0, 1).float() / 255])
    masks = wanted["masks"][:, 0].numpy() >= 0.5
    assert len(found) == sum(mask.any() for mask in masks)
    by_score = {round(float(score), 5): mask for score, mask in zip(wanted["scores"], masks, strict=True)}
    for (_, score), box in zip(found, found.boxes, strict=True):
        rows, columns = by_score[round(score, 5)].nonzero()
        assert abs(box - [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]).max() < 3


@pytest.mark.slow
def test_any_image_can_be_taken(files):
    check_any_image(TorchvisionMember.load(settings(files["v2"]), Place()))


def test_one_class_can_be_chosen(files):
    image = photo(120, 200, {})
    every, one, other = (TorchvisionMember.load(settings(files["v1"], label=n), Place())([image], VIEW)[0] for n in range(3))
    assert len(one) + len(other) == len(every) > 0
    with pytest.raises(UserError, match=r"options\.label: 3, but .*v1\.pth has the classes 1 to 2"):
        TorchvisionMember.load(settings(files["v1"], label=3), Place())


def test_the_fingerprint_follows_weights_and_options(files):
    check_fingerprints(
        settings(files["v1"]),
        settings(files["v1"], score_threshold=0),
        settings(files["v1"], min_size=96),
        settings(files["v2"]),
        kind=TorchvisionMember,
    )


def test_other_files_are_named(tmp_path, files):
    tensors = torch.load(files["v1"], weights_only=True)["model"]
    resnet, cut = tmp_path / "resnet.pth", tmp_path / "cut.pth"
    torch.save({"conv1.weight": torch.zeros(64, 3, 7, 7)}, resnet)
    torch.save({name: value for name, value in tensors.items() if not name.startswith("backbone.body.layer4")}, cut)
    check_wrong_files(TorchvisionMember, settings, tmp_path, ".pth", {"resnet": resnet, "cut": cut})
    with pytest.raises(UserError, match="needs a local file"):
        TorchvisionMember.fingerprint(settings(None))

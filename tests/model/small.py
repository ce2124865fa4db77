"""A narrow network with made-up weights, and every number that it gives, for a parity check that needs no outside data.

`python -m tests.model.small` writes small.json again. Do that only after a change that is meant to alter results, and after
tests/model/test_parity.py has passed with the numbers of the original release.
"""

from __future__ import annotations

import json
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from i3cl.config import ModelSettings
from i3cl.model.heads import paste_masks
from i3cl.model.network import I3CL
from i3cl.model.targets import read_truths
from i3cl.model.vitae import ViTAEv2

RECORDED = Path(__file__).with_name("small.json")
SETTINGS = {
    "backbone": {"name": "resnet10t", "frozen_stages": 1},
    "num_classes": 2,
    "pyramid_channels": 8,
    "box_head_channels": 16,
    "mask_head_channels": 8,
    "mask_head_convs": 2,
    "inter_channels": 4,
    "inter_layers": 2,
    "inter_heads": 2,
    "inter_feedforward": 16,
    "inter_dropout": 0.0,
    "anchor_scale": 4,
    "proposals_per_level_train": 60,
    "proposals_per_level_test": 40,
    "proposals_per_image": 60,
    "rpn_samples": 64,
    "box_samples": 48,
    "score_threshold": 0.02,
    "detections_per_image": 24,
}
SIZES = ((200, 260), (256, 192))


def _random(name: str) -> np.random.RandomState:
    return np.random.RandomState(zlib.crc32(name.encode()))


@torch.no_grad()
def fill(module: torch.nn.Module) -> None:
    """Sets every tensor from its name alone, the same on every machine and with every version of torch."""
    for name, tensor in module.state_dict().items():
        noise = torch.from_numpy(_random(name).standard_normal(tuple(tensor.shape)).astype(np.float32))
        if not tensor.is_floating_point():
            tensor.zero_()
        elif name.endswith("running_var"):
            tensor.copy_(1 + 0.2 * noise.clamp(-2, 2))
        elif tensor.dim() > 1:
            tensor.copy_(noise * (1 / tensor[0].numel()) ** 0.5)
        elif name.endswith("weight"):
            tensor.copy_(1 + 0.1 * noise)
        else:
            tensor.copy_(0.1 * noise)


def build(**changes: object) -> I3CL:
    """The network, with logits and offsets of a size at which scores differ and boxes stay near their anchors."""
    model = I3CL(ModelSettings.model_validate({**SETTINGS, **changes}))
    fill(model)
    with torch.no_grad():
        model.proposals.cls.weight.mul_(0.3)
        model.proposals.reg.weight.mul_(0.1)
        model.heads.box.cls.weight.mul_(0.4)
        model.heads.box.reg.weight.mul_(0.2)
        model.heads.box.cls.bias[0] += 0.3  # both classes are found
    model.proposals.choose = model.heads.choose = lambda x, count: x[torch.arange(count) * len(x) // count]
    return model


def image(index: int) -> Tensor:
    """(3, H, W) float32, 0-255: blocks of 8 pixels."""
    height, width = SIZES[index]
    blocks = _random(f"image {index}").uniform(0, 255, (3, -(-height // 8), -(-width // 8))).astype(np.float32)
    return torch.from_numpy(blocks.repeat(8, axis=1).repeat(8, axis=2)[:, :height, :width].copy())


def target(index: int) -> dict[str, object]:
    """Four slanted instances, the last an ignore region, with loss weights and box crops as masks."""
    rows = [[8, 10, 170, 134], [90, 44, 180, 92], [4, 150, 60, 198], [104, 108, 190, 190]]
    boxes = torch.tensor(rows, dtype=torch.float32) + index
    masks = []
    for x0, y0, x1, y1 in boxes.long().tolist():
        y, x = np.mgrid[: y1 - y0, : x1 - x0]
        masks.append(torch.from_numpy((abs(x / (x1 - x0) - y / (y1 - y0)) < 0.45).astype(np.uint8)))
    return {
        "boxes": boxes,
        "labels": torch.tensor([0, 1, 0, 0]),
        "masks": masks,
        "mask_origins": boxes[:, :2].long(),
        "lossweight": torch.tensor([1.0, 0.5, 0.25 + index, 1.0]),
        "ignore": torch.tensor([False, False, False, True]),
    }


def summary(x: Tensor) -> list[float]:
    """Mean, standard deviation, largest magnitude, and a sum that weighs every place differently."""
    x = x.detach().double().flatten()
    places = torch.arange(len(x), dtype=torch.float64)
    weighted = (x * torch.cos(places)).sum() / max(len(x), 1) ** 0.5
    return [float(x.mean()), float(x.std(correction=0)), float(x.abs().max()), float(weighted)]


def measure(**changes: object) -> dict[str, list]:
    """Name -> numbers of one training step and one detection of the narrow network."""
    torch.manual_seed(0)
    model = build(**changes)
    images, sizes = [image(0), image(1)], list(SIZES)
    numbers: dict[str, list] = {}

    model.train()
    truths = read_truths([target(0), target(1)], torch.device("cpu"))
    levels = model.features(model.batch(images))
    for i, x in enumerate(levels):
        numbers[f"map {i}"] = summary(x)
    around = torch.tensor([[0.0, 0, 0, 0], [3, 2, 3, 2], [-2, 1, -3, 2], [25, 0, 25, 0], [0, -20, 0, -20]])
    proposals = [(t.boxes[:, None] + around).reshape(-1, 4) for t in truths]
    losses = model.losses_of(levels, sizes, truths, proposals)
    for name, loss in losses.items():
        numbers[name] = [loss.item()]
    torch.stack(list(losses.values())).sum().backward()
    for part in ("backbone", "pyramid", "intra", "proposals", "heads.box", "heads.inter", "heads.mask"):
        gradients = [p.grad.flatten() for p in model.get_submodule(part).parameters() if p.grad is not None]
        numbers[f"gradient of {part}"] = [float(torch.cat(gradients).double().norm())]
    assert model.heads.inter is not None
    numbers["running mean"] = summary(model.heads.inter.norm.running_mean)

    model.eval()
    with torch.no_grad():
        levels = model.features(model.batch(images[:1]))
        found = model.proposals.propose(levels, sizes[:1])[0]
        numbers["proposals"], numbers["objectness"] = found[:, :4].double().tolist(), found[:, 4].double().tolist()
    for i, detections in enumerate(model(images)):
        for name in ("boxes", "scores", "labels"):
            numbers[f"{name} {i}"] = detections[name].double().tolist()
        numbers[f"masks {i}"] = [summary(mask) for mask in detections["masks"]]
        pasted = paste_masks(detections["masks"], detections["boxes"], *sizes[i])
        numbers[f"pasted {i}"] = [summary(mask) for mask in pasted]
    return numbers


@torch.no_grad()
def measure_vitae() -> dict[str, list]:
    """Name -> numbers of the four maps of ViTAEv2-S."""
    network = ViTAEv2(drop_path=0.0)
    fill(network)
    return {f"vitae {i}": summary(x) for i, x in enumerate(network.eval()((image(0)[None] - 128) / 64))}


def differences(actual: dict[str, list], expected: dict[str, list], tolerance: float = 1e-4) -> list[str]:
    """What differs by more than `tolerance` of the largest expected number of its kind; empty when all is equal."""
    wrong = [f"{name}: only on one side" for name in actual.keys() ^ expected.keys()]
    for name in actual.keys() & expected.keys():
        a, b = np.array(actual[name], dtype=float), np.array(expected[name], dtype=float)
        if a.shape != b.shape:
            wrong.append(f"{name}: {a.shape}, not {b.shape}")
        elif a.size and not np.abs(a - b).max() <= tolerance * np.abs(b).max():
            wrong.append(f"{name}: off by {np.abs(a - b).max():.3g}, largest {np.abs(b).max():.3g}")
    return sorted(wrong)


def _rounded(value: object) -> object:
    return [_rounded(v) for v in value] if isinstance(value, list) else float(f"{value:.7g}")


if __name__ == "__main__":
    lines = [f"{json.dumps(name)}: {json.dumps(_rounded(rows))}" for name, rows in (measure() | measure_vitae()).items()]
    RECORDED.write_text("{\n" + ",\n".join(lines) + "\n}\n")

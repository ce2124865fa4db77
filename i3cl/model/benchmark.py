"""Times the network: a training step compared with torchvision's Mask R-CNN, and the cost of each part."""

from __future__ import annotations

import resource
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.detection import MaskRCNN, maskrcnn_resnet50_fpn
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.ops import FrozenBatchNorm2d

from i3cl.config import ModelSettings
from i3cl.model.heads import RegionSample
from i3cl.model.network import I3CL

Step = Callable[[], None]
"""One forward and backward pass."""


@dataclass(frozen=True)
class Scene:
    """One image with its truth and the regions that the second stage of every detector is given."""

    image: Tensor
    """(3, H, W) float32, 0-255."""
    boxes: Tensor
    """(N, 4) float32."""
    masks: Tensor
    """(N, H, W) uint8."""
    proposals: Tensor
    """(1000, 4) float32."""
    samples: Tensor
    """(512, 4) float32: 128 positives, then 384 negatives."""
    matches: Tensor
    """(128,) int64 truth of each positive."""


def make_scene(side: int = 640, count: int = 12, seed: int = 0) -> Scene:
    """A square noise image with `count` text-shaped rectangles, proposals scattered around them and elsewhere."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(n: int, low: float, high: float) -> Tensor:
        return torch.rand(n, generator=generator) * (high - low) + low

    def scatter(n: int) -> Tensor:
        width = side * uniform(n, 0.08, 0.4)
        height = width * uniform(n, 0.2, 0.8)
        x, y = (side - width) * uniform(n, 0, 1), (side - height) * uniform(n, 0, 1)
        return torch.stack([x, y, x + width, y + height], dim=1)

    boxes = scatter(count).round()
    masks = torch.zeros(count, side, side, dtype=torch.uint8)
    for mask, (x0, y0, x1, y1) in zip(masks, boxes.long().tolist(), strict=True):
        mask[y0:y1, x0:x1] = 1
    matches = torch.arange(128) % count
    size = (boxes[:, 2:] - boxes[:, :2])[matches]
    shift = torch.cat([uniform(256, -0.08, 0.08).reshape(128, 2) * size] * 2, dim=1)
    near = (boxes[matches] + shift).clamp(0, side)
    far = scatter(1000 - 128)
    return Scene(
        image=torch.rand(3, side, side, generator=generator) * 255,
        boxes=boxes,
        masks=masks,
        proposals=torch.cat([near, far]),
        samples=torch.cat([near, far[: 512 - 128]]),
        matches=matches,
    )


def _backward(model: nn.Module, losses: dict[str, Tensor]) -> None:
    torch.stack([loss.reshape(()) for loss in losses.values()]).sum().backward()
    for parameter in model.parameters():
        parameter.grad = None


def i3cl_step(scene: Scene, settings: ModelSettings | None = None) -> Step:
    """A training step of I3CL on the scene; it computes its own proposals and samples, which are then replaced by the scene's."""
    model = I3CL(settings or ModelSettings()).train()
    propose, sample = model.proposals.propose, model.heads.sample

    def fixed_proposals(*arguments: Any) -> list[Tensor]:
        propose(*arguments)
        return [scene.proposals]

    def fixed_samples(*arguments: Any) -> list[RegionSample]:
        sample(*arguments)
        return [RegionSample(scene.samples, scene.matches)]

    model.proposals.propose = fixed_proposals  # type: ignore[method-assign,assignment]
    model.heads.sample = fixed_samples  # type: ignore[method-assign,assignment]
    target = {"boxes": scene.boxes, "labels": torch.zeros(len(scene.boxes), dtype=torch.int64), "masks": scene.masks}

    def step() -> None:
        losses = model([scene.image], [target])
        assert isinstance(losses, dict)
        _backward(model, losses)

    return step


def torchvision_step(scene: Scene, frozen: bool, num_classes: int = 64) -> Step:
    """The same step of torchvision's Mask R-CNN with the scene's proposals and samples.

    frozen False: as `maskrcnn_resnet50_fpn(weights=None, weights_backbone=None)` builds it, with every layer trained. frozen
    True: as for fine-tuning, with three trainable stages and frozen BatchNorm.
    """
    side = scene.image.shape[-1]
    model = mask_rcnn(side, side, frozen, num_classes).train()
    rpn, sample = model.rpn.forward, model.roi_heads.select_training_samples
    positives = len(scene.matches)
    labels = torch.zeros(len(scene.samples), dtype=torch.int64)
    labels[:positives] = 1
    matches = torch.zeros_like(labels)
    matches[:positives] = scene.matches
    wanted = model.roi_heads.box_coder.encode([scene.boxes[matches]], [scene.samples])

    def fixed_proposals(*arguments: Any) -> Any:
        return [scene.proposals], rpn(*arguments)[1]

    def fixed_samples(*arguments: Any) -> Any:
        sample(*arguments)
        return [scene.samples], [matches], [labels], wanted

    model.rpn.forward = fixed_proposals
    model.roi_heads.select_training_samples = fixed_samples
    image = scene.image / 255
    target = {"boxes": scene.boxes, "labels": torch.ones(len(scene.boxes), dtype=torch.int64), "masks": scene.masks}

    def step() -> None:
        _backward(model, model([image], [target]))

    return step


def mask_rcnn(short_side: int, long_side: int, frozen: bool, num_classes: int) -> MaskRCNN:
    """A Mask R-CNN of torchvision with ResNet-50 for images of this size in pixels; `frozen` as in `torchvision_step`."""
    size = {"min_size": short_side, "max_size": long_side, "num_classes": num_classes}
    if not frozen:
        return maskrcnn_resnet50_fpn(weights=None, weights_backbone=None, **size)
    backbone = resnet_fpn_backbone(backbone_name="resnet50", weights=None, trainable_layers=3, norm_layer=FrozenBatchNorm2d)
    return MaskRCNN(backbone, **size)


@dataclass(frozen=True)
class Timing:
    """Seconds of one step."""

    wall: float
    cpu: float
    """Process time of all threads; it varies less than wall time on a busy machine."""


def timed(step: Step) -> Timing:
    """Runs the step once."""
    cpu, wall = time.process_time(), time.perf_counter()
    step()
    return Timing(time.perf_counter() - wall, time.process_time() - cpu)


def compare(steps: Sequence[Step], runs: int, warm_up: int = 2) -> list[list[Timing]]:
    """`runs` timings of every step after `warm_up` rounds; the steps take turns, so that all see the same load."""
    for _ in range(warm_up):
        for step in steps:
            step()
    rounds = [[timed(step) for step in steps] for _ in range(runs)]
    return [list(column) for column in zip(*rounds)]


def step_report(runs: int, side: int = 640, threads: int = 2) -> str:
    """The comparison as text: median times, and the median over the rounds of our time divided by torchvision's."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    scene = make_scene(side)
    names = ["i3cl", "torchvision", "torchvision, 3 trainable stages"]
    steps = [i3cl_step(scene), torchvision_step(scene, frozen=False), torchvision_step(scene, frozen=True)]
    columns = compare(steps, runs)
    lines = [
        f"training step, ResNet-50, forward and backward, 1 image {side} x {side}, float32,",
        f"{threads} CPU threads, {runs} runs in turn;",
        "same image and truth (12 instances), same 512 regions (128 positive) in every second stage, 64 class logits;",
        "ours: stem and stage 1 frozen, BatchNorm on stored statistics, intra and inter blocks on; torchvision: its default",
        "(nothing frozen), and its fine-tuning form (3 trainable stages, frozen BatchNorm)",
        f"{'':<34}{'wall s':>9}{'CPU s':>9}{'ours / it, wall':>18}{'CPU':>8}",
    ]
    for name, column in zip(names, columns, strict=True):
        wall, cpu = (statistics.median(getattr(t, kind) for t in column) for kind in ("wall", "cpu"))
        ratios = [
            statistics.median(getattr(a, kind) / getattr(b, kind) for a, b in zip(columns[0], column, strict=True))
            for kind in ("wall", "cpu")
        ]
        shown = "" if name == names[0] else f"{ratios[0]:>18.3f}{ratios[1]:>8.3f}"
        lines.append(f"{name:<34}{wall:>9.3f}{cpu:>9.3f}{shown}")
    return "\n".join(lines)


PARTS = ("backbone", "pyramid", "intra", "proposals", "box head", "inter", "mask head")
"""Rows of `model_report`; everything else (sampling, losses, suppression, RoIAlign) is 'rest'."""


def part_modules(model: I3CL) -> dict[str, list[nn.Module]]:
    """The modules of each part that the network has."""
    modules: dict[str, list[nn.Module]] = {
        "backbone": [model.backbone],
        "pyramid": [model.pyramid],
        "intra": list(model.intra or ()),
        "proposals": [model.proposals.conv, model.proposals.cls, model.proposals.reg],
        "box head": [model.heads.box],
        "inter": [model.heads.inter] if model.heads.inter is not None else [],
        "mask head": [model.heads.mask],
    }
    return {name: found for name, found in modules.items() if found}


class PartTimer:
    """Seconds that each part's forward passes took within the `with` block; it waits for the GPU before and after each part."""

    def __init__(self, model: I3CL, device: torch.device) -> None:
        self.seconds = dict.fromkeys(PARTS, 0.0)
        self._modules = part_modules(model)
        self._device = device
        self._handles: list[Any] = []
        self._started = 0.0

    def __enter__(self) -> PartTimer:
        for name, modules in self._modules.items():
            for module in modules:
                self._handles += [
                    module.register_forward_pre_hook(lambda *_: self._start()),
                    module.register_forward_hook(lambda *_, part=name: self._stop(part)),
                ]
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _start(self) -> None:
        wait(self._device)
        self._started = time.perf_counter()

    def _stop(self, part: str) -> None:
        wait(self._device)
        self.seconds[part] += time.perf_counter() - self._started


def wait(device: torch.device) -> None:
    """Until the GPU has done what it was given; at once on a CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_memory(device: torch.device) -> float:
    """GiB: the most memory that tensors have taken on the GPU, or that the process has taken on the machine."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def model_report(
    settings: ModelSettings, side: int, batch: int, device: str = "cpu", runs: int = 3, precision: str = "float32"
) -> str:
    """Images per second, peak memory and the share of each part, on `batch` noise images of side x side, as text.

    precision: 'float32' or 'bfloat16' (autocast). A random network finds almost nothing, so detection runs without a score
    threshold: every image gives `detections_per_image`.
    """
    target_device = torch.device(device)
    torch.manual_seed(0)
    settings = settings.model_copy(update={"score_threshold": 0.0})
    model = I3CL(settings).to(target_device).to(memory_format=torch.channels_last)
    scenes = [make_scene(side, seed=i) for i in range(batch)]
    images = [scene.image.to(target_device) for scene in scenes]
    targets = [
        {
            "boxes": scene.boxes.to(target_device),
            "labels": torch.zeros(len(scene.boxes), dtype=torch.int64, device=target_device),
            "masks": scene.masks.to(target_device),
        }
        for scene in scenes
    ]

    def cast() -> AbstractContextManager[object]:
        return torch.autocast(target_device.type, torch.bfloat16) if precision == "bfloat16" else nullcontext()

    def predict() -> None:
        with cast():
            model.eval()(images)
        wait(target_device)

    def train() -> None:
        with cast():
            losses = model.train()(images, targets)
        assert isinstance(losses, dict)
        _backward(model, losses)
        wait(target_device)

    lines = [
        f"{settings.backbone.name}, {batch} x {side} x {side}, {precision}, {device}, {torch.get_num_threads()} CPU threads, "
        f"median of {runs}",
        f"{'':<16}{'images/s':>10}{'peak GiB':>10}",
    ]
    shares = {}
    for name, step in (("prediction", predict), ("training step", train)):
        step()
        if target_device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(target_device)
        seconds = statistics.median(timed(step).wall for _ in range(runs))
        lines.append(f"{name:<16}{batch / seconds:>10.2f}{peak_memory(target_device):>10.2f}")
        with PartTimer(model, target_device) as parts:
            whole = timed(step).wall
        shares[name] = {**{part: parts.seconds[part] / whole for part in PARTS}, "rest": 1 - sum(parts.seconds.values()) / whole}
    lines += ["", f"{'forward share of':<16}{'prediction':>12}{'training step':>15}"]
    for part in (*PARTS, "rest"):
        lines.append(f"{part:<16}{shares['prediction'][part]:>12.1%}{shares['training step'][part]:>15.1%}")
    lines.append("rest: RoIAlign, sampling, suppression, losses; in a training step the whole backward pass too")
    return "\n".join(lines)

"""What one GPU does, part by part, for a machine that is lent for minutes: `i3cl benchmark gpu`.

Every part runs in a process of its own with a time limit, and every line counts from the moment it is known: a part that hangs or
dies loses only itself. Nothing is read but the package, and the network is not needed.
"""

from __future__ import annotations

import json
import multiprocessing
import statistics
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision
from torch import Tensor, nn

from i3cl import storage
from i3cl.config import ModelSettings, Settings
from i3cl.data.formats.coco import write_coco
from i3cl.data.formats.records import ImageRecord, Instance
from i3cl.data.synthetic.plain import make_split
from i3cl.inference.device import Precision, autocast, full_float32
from i3cl.inference.predictor import Predictor
from i3cl.model.benchmark import mask_rcnn, peak_memory, wait
from i3cl.model.network import I3CL
from i3cl.model.targets import read_truths
from i3cl.training.loop import Trainer

Line = dict[str, Any]
"""What is known about one measurement, for JSON."""
Scene = tuple[Tensor, dict[str, Any]]
"""An image (3, H, W) float32, 0-255, and its target with masks as crops, both on the CPU."""


@dataclass(frozen=True)
class Scale:
    """How large everything is."""

    model: ModelSettings
    height: int
    """Pixels of an image in training."""
    width: int
    predicted: tuple[int, int]
    """Height and width of an image in prediction."""
    batches: tuple[int, ...]
    """Images of a training step, one after another."""
    runs: int
    """Timed steps of each."""


PAPER = Scale(ModelSettings(num_classes=1, inter_dropout=0.0), 1216, 1600, (1185, 1950), (1, 2, 4, 8), 10)
"""ResNet-50 at the paper's sizes."""


def scene(scale: Scale, seed: int) -> Scene:
    """Noise with 15 text-shaped rectangles."""
    random = np.random.default_rng(seed)
    size = np.array([scale.width, scale.height])
    sides = (random.uniform(0.1, 0.3, (15, 2)) * size * [1, 0.5]).astype(int) + 8
    corners = (random.uniform(0, 1, (15, 2)) * (size - sides)).astype(int)
    target = {
        "boxes": torch.from_numpy(np.concatenate([corners, corners + sides], axis=1)).float(),
        "labels": torch.zeros(15, dtype=torch.int64),
        "masks": [torch.ones(h, w, dtype=torch.uint8) for w, h in sides.tolist()],
        "mask_origins": torch.from_numpy(corners),
    }
    image = torch.from_numpy(random.uniform(0, 255, (3, scale.height, scale.width)).astype(np.float32))
    return image, target


def versions(scale: Scale, device: torch.device) -> Iterator[Line]:
    """What the numbers are of."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    yield {"device": name, "torch": torch.__version__, "torchvision": torchvision.__version__, "cuda": torch.version.cuda}


def parity(scale: Scale, device: torch.device) -> Iterator[Line]:
    """The losses of one step on the same regions; `off` is their largest relative distance from those of the CPU in float32."""
    image, target = scene(scale, 0)
    around = torch.tensor([[0.0, 0, 0, 0], [3, 2, 3, 2], [-2, 1, -3, 2], [90, 0, 90, 0], [0, -70, 0, -70]])
    proposals = (target["boxes"][:, None] + around).reshape(-1, 4)
    wanted: dict[str, float] = {}
    cases: list[tuple[torch.device, Precision]] = [(torch.device("cpu"), "float32"), (device, "float32"), (device, "bfloat16")]
    for place, precision in cases:
        full_float32(precision)
        torch.manual_seed(0)
        model = I3CL(scale.model).to(place).to(memory_format=torch.channels_last).train()
        # The same samples everywhere: the generators of two devices draw differently.
        model.proposals.choose = model.heads.choose = lambda candidates, count: candidates[:count]
        with autocast(precision, place, training=True):
            levels = model.features(model.batch([image.to(place)]))
            truths = read_truths([target], place)
            losses = model.losses_of(levels, [(scale.height, scale.width)], truths, [proposals.to(place)])
        values = {name: loss.item() for name, loss in losses.items()}
        wanted = wanted or values
        off = {name: abs(value - wanted[name]) / max(abs(wanted[name]), 1e-9) for name, value in values.items()}
        yield {"on": place.type, "precision": precision, "losses": values, "off": max(off.values())}


def _step_of(scale: Scale, batch: int, device: torch.device, ours: bool) -> Callable[[], None]:
    """A training step in bfloat16 of I3CL or of torchvision's Mask R-CNN: three trained stages, fixed norms, SGD."""
    scenes = [scene(scale, seed) for seed in range(batch)]
    images = [image.to(device) for image, _ in scenes]
    targets: list[Any] = [target for _, target in scenes]
    model: nn.Module
    if ours:
        model = I3CL(scale.model).to(device).to(memory_format=torch.channels_last)
    else:
        model = mask_rcnn(scale.height, scale.width, frozen=True, num_classes=2).to(device)
        images = [image / 255 for image in images]
        targets = [_with_bitmaps(scale, target, device) for target in targets]
    model.train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 1e-5)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with autocast("bfloat16", device, training=True):
            losses = model(images, targets)
        torch.stack(list(losses.values())).sum().backward()
        optimizer.step()

    return step


def _with_bitmaps(scale: Scale, target: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """The target as torchvision takes it: masks of the image's size, classes from 1."""
    masks = torch.zeros(len(target["masks"]), scale.height, scale.width, dtype=torch.uint8)
    for mask, crop, (x, y) in zip(masks, target["masks"], target["mask_origins"].tolist(), strict=True):
        mask[y : y + crop.shape[0], x : x + crop.shape[1]] = crop
    return {"boxes": target["boxes"].to(device), "labels": target["labels"].to(device) + 1, "masks": masks.to(device)}


def training(scale: Scale, device: torch.device) -> Iterator[Line]:
    """Images a second and GiB of a training step, beside torchvision's Mask R-CNN in turn.

    Without a GPU the memory is the most that the part's process has taken so far.
    """
    for batch in scale.batches:
        for network in ("i3cl", "torchvision") * 2:
            line: Line = {"network": network, "batch": batch}
            try:
                step = _step_of(scale, batch, device, network == "i3cl")
                step()
                if device.type == "cuda":
                    torch.cuda.reset_peak_memory_stats(device)
                seconds = [_seconds(step, device) for _ in range(scale.runs)]
                line |= {"images_per_second": batch / statistics.median(seconds), "peak_gib": peak_memory(device)}
            except torch.OutOfMemoryError:
                line["error"] = "out of memory"
            yield line


def _seconds(step: Callable[[], object], device: torch.device) -> float:
    wait(device)
    started = time.perf_counter()
    step()
    wait(device)
    return time.perf_counter() - started


def synchronisation(scale: Scale, device: torch.device) -> Iterator[Line]:
    """Where a training step of one image makes the CPU wait, as CUDA itself reports it: file and line, how often."""
    step = _step_of(scale, 1, device, ours=True)
    step()
    if device.type != "cuda":
        yield {"waits": None}
        return
    torch.cuda.set_sync_debug_mode("warn")
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        step()
    places = Counter(f"{Path(w.filename).name}:{w.lineno}" for w in found if "synchroniz" in str(w.message))
    yield {"waits": places.total(), "places": dict(places.most_common())}


def labelling(scale: Scale, device: torch.device) -> Iterator[Line]:
    """Images a second from pixels in memory to polygons, four at a time, every image with as many detections as it may have."""
    height, width = scale.predicted
    data = {"test_short_side": min(height, width), "test_long_side": max(height, width)}
    model = scale.model.model_copy(update={"score_threshold": 0.0})
    settings = Settings.model_validate({"name": "gpu", "data": data, "train": {"precision": "auto"}})
    network = I3CL(model).to(device).to(memory_format=torch.channels_last).eval()
    predictor = Predictor(network, settings)
    images = list(np.random.default_rng(0).integers(0, 255, (4, height, width, 3), np.uint8))
    predictor(images)
    seconds = [_seconds(lambda: predictor(images), device) for _ in range(scale.runs)]
    yield {"images_per_second": len(images) / statistics.median(seconds), "peak_gib": peak_memory(device)}


def resumption(scale: Scale, device: torch.device) -> Iterator[Line]:
    """Four steps at once, and four steps of which the last two continue from a checkpoint: how far apart the weights are."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "images").mkdir()
        records = []
        for index, made in enumerate(make_split(0, 4, seed=5, side=96)):
            torchvision.io.write_jpeg(torch.from_numpy(made.image).permute(2, 0, 1), str(folder / "images" / f"{index}.jpg"))
            records.append(ImageRecord(index + 1, f"{index}.jpg", 96, 96, tuple(Instance(p) for p in made.polygons)))
        write_coco(str(folder / "set.json"), records)
        source = {"annotations": str(folder / "set.json"), "images": str(folder / "images")}
        data = {"train": [source], "ray_data": False, "transform": {"short_sides": [96], "long_cap": 96}}
        train = {"steps": 4, "batch": 2, "checkpoint_every": 2, "precision": "float32", "learning_rate": 1e-3, "warmup_steps": 0}
        settings = Settings.model_validate({"name": "gpu", "data": data, "train": train}).model_copy(
            update={"model": scale.model}
        )

        def trainer() -> Trainer:
            torch.manual_seed(0)
            model = I3CL(scale.model).to(device).to(memory_format=torch.channels_last)
            return Trainer(settings, model, device, 0, 1, str(folder / "run"))

        whole = trainer()
        whole.run(lambda metrics, step: whole.save(folder / "checkpoint") if step == 2 else None)
        continued = trainer()
        continued.restore(folder / "checkpoint")
        continued.run(lambda metrics, step: None)
        pairs = zip(whole.model.parameters(), continued.model.parameters(), strict=True)
        yield {"steps": continued.step, "largest_difference": max((a - b).abs().max().item() for a, b in pairs)}


PARTS: dict[str, tuple[Callable[[Scale, torch.device], Iterator[Line]], float]] = {
    "versions": (versions, 60),
    "parity": (parity, 60),
    "synchronisation": (synchronisation, 40),
    "training": (training, 200),
    "labelling": (labelling, 60),
    "resumption": (resumption, 60),
}
"""Every part and its limit in seconds; together eight minutes."""


def _run(work: Callable[[Scale, torch.device], Iterator[Line]], scale: Scale, device: str, lines: Connection) -> None:
    """Body of a part's process."""
    try:
        for line in work(scale, torch.device(device)):
            lines.send(line)
    except Exception as error:  # told in the report, which has other parts
        lines.send({"error": f"{type(error).__name__}: {error}"})


def gpu_report(
    scale: Scale, device: str, out: str, tell: Callable[[str], object], parts: dict[str, Any] | None = None
) -> list[Line]:
    """Run the parts one after another.

    Args:
        scale: how large everything is.
        device: 'cuda' or 'cpu'.
        out: JSON file, written again after every line: a list of them.
        tell: called with every line as text.
        parts: in place of PARTS.

    Returns:
        The lines; each has `part`. One with `error` says why a part is not complete.
    """
    # Forked from a server that has imported this module, and has not touched the GPU: a part begins at once.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    found: list[Line] = []

    def keep(part: str, line: Line) -> None:
        found.append({"part": part} | line)
        tell(json.dumps(found[-1]))
        storage.write_text_atomic(out, json.dumps(found, indent=1) + "\n")

    for part, (work, limit) in (PARTS if parts is None else parts).items():
        receiving, sending = context.Pipe(duplex=False)
        process = context.Process(target=_run, args=(work, scale, device, sending))
        process.start()
        sending.close()
        ends = time.monotonic() + limit
        try:
            while receiving.poll(max(0.0, ends - time.monotonic())):
                keep(part, receiving.recv())
            keep(part, {"error": f"not done after {limit:g} s"})
            process.kill()
        except EOFError:
            process.join()
            if process.exitcode:
                keep(part, {"error": f"its process ended with status {process.exitcode}"})
        process.join()
    return found

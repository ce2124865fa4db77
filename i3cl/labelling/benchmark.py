"""The labelling pipeline compared with a plain Python loop over the same network and images."""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from i3cl import storage
from i3cl.config import LabelSettings, Settings
from i3cl.data.formats.records import Dataset, ImageRecord
from i3cl.data.loading.endings import images_in
from i3cl.data.loading.images import decode_image
from i3cl.labelling.predict import predict
from i3cl.runtime.resources import machine_cores

if TYPE_CHECKING:
    from i3cl.inference.predictor import Predictor


def label_report(checkpoint: str, images: str, count: int, rounds: int, label: LabelSettings) -> str:
    """Measure both in turn, `rounds` times, on `count` images of a folder (some repeated when it has fewer); returns a table.

    The loop has decoded images in memory and all cores; the pipeline reads, decodes, labels and writes Parquet. Start-up counts
    for neither: loading for the loop, Ray and its actors for the pipeline. UserError for a folder without images and for a
    directory that is not a checkpoint.
    """
    import torch

    from i3cl.inference.predictor import Predictor

    names = images_in(images)
    torch.set_num_threads(machine_cores())
    model = Predictor.load(checkpoint)
    pixels = {name: decode_image(storage.join(images, name), upright=model.upright) for name in names[:count]}
    chosen = [names[i % len(names)] for i in range(count)]
    shapes = [pixels[name].shape for name in chosen]
    records = [ImageRecord(i + 1, name, s[0], s[1]) for i, (name, s) in enumerate(zip(chosen, shapes, strict=True))]
    dataset = Dataset("benchmark", storage.absolute(images), records)
    settings = Settings(label=label)
    _loop(model, [pixels[name] for name in chosen[: 2 * label.batch]], label.batch)
    loops, pipelines, starts = [], [], []
    for turn in range(rounds):
        loops.append(count / _loop(model, [pixels[name] for name in chosen], label.batch))
        with tempfile.TemporaryDirectory(prefix="i3cl-") as folder:
            out = predict(dataset, {"member": checkpoint}, settings, str(Path(folder) / "predictions"), f"turn {turn + 1}")
            cost = json.loads(storage.read_text(storage.join(out, "cost.json")))
        pipelines.append(cost["images_per_second"])
        starts.append(cost["startup_seconds"])
    ratios = [pipeline / loop for pipeline, loop in zip(pipelines, loops, strict=True)]
    return "\n".join(
        [
            f"{count} images of {len(pixels)} files, batches of {label.batch}, {machine_cores()} cores",
            f"{'turn':<8}{'loop/s':>10}{'pipeline/s':>12}{'ratio':>8}{'start-up s':>12}",
            *(
                f"{turn:<8}{loop:>10.2f}{pipeline:>12.2f}{ratio:>8.3f}{start:>12.1f}"
                for turn, loop, pipeline, ratio, start in zip(range(1, rounds + 1), loops, pipelines, ratios, starts, strict=True)
            ),
            f"median ratio {statistics.median(ratios):.3f}",
        ]
    )


def _loop(model: Predictor, images: Sequence[NDArray[np.uint8]], batch: int) -> float:
    """Seconds that a plain loop takes."""
    started = time.perf_counter()
    for start in range(0, len(images), batch):
        model(images[start : start + batch])
    return time.perf_counter() - started

"""An exported file beside the checkpoint it comes from: how far their answers differ, and how much CPU time each takes."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from i3cl.data.loading.images import resize
from i3cl.deploy.onnx_predictor import OnnxPredictor
from i3cl.geometry import outlines_from_masks, overlaps
from i3cl.model.network import I3CL

SAME_IOU = 0.99
"""Polygons of this intersection over union or more count as the same."""


@dataclass
class Comparison:
    """Sums and extremes over images."""

    images: int = 0
    texts: int = 0
    """Texts that PyTorch finds."""
    lost: int = 0
    """Texts that have no polygon of IoU .99 or more in the other's answer."""
    added: int = 0
    """Texts of the exported file that PyTorch does not find."""
    box: float = 0.0
    """Largest difference of a coordinate of two boxes of the same text, pixels of the image that the network sees."""
    score: float = 0.0
    """Largest difference of the scores of the same text."""
    iou: float = 1.0
    """Smallest IoU of the polygons of the same text."""
    torch_seconds: float = 0.0
    """CPU seconds of the network in PyTorch, all threads together; decoding, resizing and outlines are the same for both."""
    onnx_seconds: float = 0.0

    def __str__(self) -> str:
        count = max(self.images, 1)
        return (
            f"{self.images} images, {self.texts} texts by PyTorch: {self.lost} lost, {self.added} added; of the same texts boxes "
            f"differ by up to {self.box:.1e} pixels, scores by {self.score:.1e}, polygons have an IoU of {self.iou:.4f} or more; "
            f"CPU seconds an image: PyTorch {self.torch_seconds / count:.3f}, onnxruntime {self.onnx_seconds / count:.3f}"
        )


def compare(network: I3CL, predictor: OnnxPredictor, images: Iterable[NDArray[np.uint8]]) -> Comparison:
    """Both over the same images ((H, W, 3) uint8 RGB, of any size), with the threads that they are set to.

    PyTorch gets the padding that the exported file has. The first image is looked at once before, so that no time of starting up
    is counted.
    """
    result = Comparison()
    size = (predictor.info.max_height, predictor.info.max_width)
    for number, image in enumerate(images):
        sized = resize(image, predictor.scale(image.shape[0], image.shape[1]))
        if not number:
            reference(network, sized, size)
            predictor.run(sized)
        started = time.process_time()
        wanted = reference(network, sized, size)
        between = time.process_time()
        boxes, scores, masks = predictor.run(sized)
        result.onnx_seconds += time.process_time() - between
        result.torch_seconds += between - started
        result.images += 1
        _add(result, wanted, (boxes, scores, masks))
    return result


@torch.inference_mode()
def reference(network: I3CL, image: NDArray[np.uint8], size: tuple[int | None, int | None] = (None, None)) -> dict[str, Tensor]:
    """What PyTorch finds in one image, padded to `size` (height, width) where that is given, else to multiples of 32."""
    tensor = torch.from_numpy(image).permute(2, 0, 1).float()
    batch = network.batch([tensor])
    if size[0] is not None and size[1] is not None:
        batch = F.pad(batch, (0, size[1] - batch.shape[3], 0, size[0] - batch.shape[2]))
    sizes = [(image.shape[0], image.shape[1])]
    levels = network.features(batch)
    (found,) = network.heads.detect(levels, network.proposals.propose(levels, sizes), sizes)
    return found


def _add(result: Comparison, wanted: dict[str, Tensor], found: tuple[NDArray[np.float32], ...]) -> None:
    ours, theirs = _outlined(*(wanted[name].numpy() for name in ("boxes", "scores", "masks"))), _outlined(*found)
    result.texts += len(ours[0])
    same = overlaps(ours[0], theirs[0]).dense_iou()
    best = same.max(axis=1, initial=0.0)
    kept = np.flatnonzero(best >= SAME_IOU)
    partner = same[kept].argmax(axis=1) if len(kept) else kept
    result.lost += len(ours[0]) - len(kept)
    result.added += len(theirs[0]) - len(set(partner.tolist()))
    if len(kept):
        result.box = max(result.box, float(np.abs(ours[1][kept] - theirs[1][partner]).max()))
        result.score = max(result.score, float(np.abs(ours[2][kept] - theirs[2][partner]).max()))
        result.iou = min(result.iou, float(best[kept].min()))


def _outlined(
    boxes: NDArray[np.float32], scores: NDArray[np.float32], masks: NDArray[np.float32]
) -> tuple[list[NDArray[np.float32]], NDArray[np.float32], NDArray[np.float32]]:
    """Polygons, boxes and scores of the detections whose mask has an outline."""
    outlines = [(i, outline) for i, outline in enumerate(outlines_from_masks(masks, boxes)) if outline is not None]
    index = [i for i, _ in outlines]
    return [outline for _, outline in outlines], boxes[index], scores[index]

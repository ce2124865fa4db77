"""Ground truth of an image as the losses need it, and mask targets cut from box crops or full bitmaps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.ops import roi_align


@dataclass(frozen=True)
class Truth:
    """One image's instances, without those to be ignored."""

    boxes: Tensor
    """(N, 4) float32 pixels."""
    labels: Tensor
    """(N,) int64 in 0 .. num_classes - 1."""
    weights: Tensor
    """(N,) float32 loss weights."""
    masks: list[Tensor]
    """N bitmaps (h, w) uint8 or bool; zero outside."""
    origins: list[tuple[int, int]]
    """x, y pixel of each bitmap's first value."""
    ignored: Tensor
    """(K, 4) float32 boxes of the instances that are left out."""
    outline_weights: Tensor | None = None
    """(N,) float32 factors of the box and mask losses beside `weights`; None: all are 1."""
    image_weight: float = 1.0
    """Factor of all losses of this image, positives and negatives alike."""


def read_truth(target: Mapping[str, Any], device: torch.device) -> Truth:
    """A target dict of the detection contract (see `I3CL.forward`) as a Truth on `device`.

    Raises ValueError when the parts do not have the same number of instances or a box has no area.
    """
    boxes = torch.as_tensor(target["boxes"], dtype=torch.float32, device=device).reshape(-1, 4)
    count = len(boxes)
    labels = torch.as_tensor(target["labels"], dtype=torch.int64, device=device)
    weights = target.get("lossweight")
    weights = boxes.new_ones(count) if weights is None else torch.as_tensor(weights, dtype=torch.float32, device=device)
    outline = target.get("outlineweight")
    outline = None if outline is None else torch.as_tensor(outline, dtype=torch.float32, device=device)
    masks: list[Tensor] = list(target["masks"])
    origins = target.get("mask_origins")
    corners = [(0, 0)] * count if origins is None else [(int(x), int(y)) for x, y in torch.as_tensor(origins).tolist()]
    ignore = target.get("ignore")
    dropped = [False] * count if ignore is None else torch.as_tensor(ignore, dtype=torch.bool).tolist()
    lengths = {
        "labels": len(labels),
        "masks": len(masks),
        "lossweight": len(weights),
        "outlineweight": count if outline is None else len(outline),
        "ignore": len(dropped),
        "mask_origins": len(corners),
    }
    for name, length in lengths.items():
        if length != count:
            raise ValueError(f"target: {length} {name} for {count} boxes")
    kept = [i for i in range(count) if not dropped[i]]
    if len(kept) == count:
        ignored = boxes.new_zeros((0, 4))
    else:
        ignored = boxes[[i for i in range(count) if dropped[i]]]
        index = torch.tensor(kept, dtype=torch.int64, device=device)
        boxes, labels, weights = boxes[index], labels[index], weights[index]
        outline = None if outline is None else outline[index]
    if not bool((boxes[:, 2:] > boxes[:, :2]).all()):
        raise ValueError("target: a box has no width or no height")
    return Truth(
        boxes,
        labels,
        weights,
        [masks[i].to(device) for i in kept],
        [corners[i] for i in kept],
        ignored,
        outline,
        float(target.get("image_weight", 1.0)),
    )


def image_weights(truths: Sequence[Truth], counts: Sequence[int]) -> Tensor | None:
    """(sum of counts,) float32: each image's weight, repeated `counts` times; None when all weights are 1."""
    if all(truth.image_weight == 1 for truth in truths):
        return None
    return torch.cat([truth.weights.new_full((n,), truth.image_weight) for truth, n in zip(truths, counts, strict=True)])


def per_image(values: Tensor, image: Tensor, images: int) -> Tensor:
    """(images,) sums of `values` (N,) by the index (N,) int64 of their image, without gradients."""
    return values.new_zeros(images).index_add(0, image, values).detach()


def outline_weights(truths: Sequence[Truth], matches: Sequence[Tensor]) -> Tensor | None:
    """(P,) float32 of all images' positives, in order, from the truth (n,) int64 of each; None when all weights are 1."""
    if all(truth.outline_weights is None for truth in truths):
        return None
    return torch.cat(
        [
            truth.weights.new_ones(len(m)) if truth.outline_weights is None else truth.outline_weights[m]
            for truth, m in zip(truths, matches, strict=True)
        ]
    )


@torch.no_grad()
def mask_targets(truth: Truth, boxes: Tensor, indices: Tensor, side: int) -> Tensor:
    """(P, side, side) float32 of 0 and 1: the mask of truth `indices` (P,) in the frame of `boxes` (P, 4).

    A cell is 1 when RoIAlign of the bitmap is at least a half there. A crop is read at its place in the
    image, never moved to the origin, so that rounding, and with it every cell at exactly a half, is the same
    as for a full bitmap.
    """
    result = boxes.new_zeros((len(boxes), side, side), dtype=torch.float32)
    if not len(boxes):
        return result
    order = indices.argsort(stable=True)
    counts = torch.bincount(indices, minlength=len(truth.masks)).tolist()
    for mask, (x, y), members in zip(truth.masks, truth.origins, order.split(counts), strict=True):
        if len(members):
            # one row and column of zeros beyond: RoIAlign would repeat the last value otherwise
            bitmap = F.pad(mask.float(), (x, 1, y, 1))[None, None]
            result[members] = (roi_align(bitmap, [boxes[members].float()], side, 1.0, 0, True)[:, 0] >= 0.5).float()
    return result


def read_truths(targets: Sequence[Mapping[str, Any]], device: torch.device) -> list[Truth]:
    """`read_truth` for every image of a batch."""
    return [read_truth(target, device) for target in targets]

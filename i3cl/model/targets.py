"""Ground truth of an image as the losses need it, and mask targets cut from box crops or full bitmaps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.ops import roi_align

from i3cl.model import placement
from i3cl.model.placement import to_device

CELLS_AT_ONCE = 1 << 26
"""Cells of the bitmaps that are held in a GPU's memory at the same time, 4 bytes each."""


@dataclass(frozen=True)
class Truth:
    """The instances of one image; those to be ignored apart."""

    boxes: Tensor
    """(N, 4) float32 pixels."""
    labels: Tensor
    """(N,) int64 in 0 .. num_classes - 1."""
    weights: Tensor
    """(N,) float32 loss weights."""
    masks: list[Tensor]
    """N bitmaps (h, w) uint8 or bool; the mask is zero outside of them."""
    origins: list[tuple[int, int]]
    """x, y pixel of each bitmap's first value."""
    ignored: Tensor
    """(K, 4) float32 boxes of the instances to be ignored, which are in none of the other fields."""
    outline_weights: Tensor | None = None
    """(N,) float32 factors of the box and mask losses beside `weights`; None: all are 1."""
    image_weight: float = 1.0
    """Factor of all losses of this image, positives and negatives alike."""


def read_truth(target: Mapping[str, Any], device: torch.device) -> Truth:
    """A target dict of the detection contract (see `I3CL.forward`) as a Truth on `device`.

    Raises ValueError when the parts do not have the same number of instances or a box has no area.
    """
    return read_truths([target], device)[0]


def read_truths(targets: Sequence[Mapping[str, Any]], device: torch.device) -> list[Truth]:
    """`read_truth` for every image of a batch.

    A GPU is waited for least when the targets are on the CPU, or at least their `mask_origins` and `ignore`.
    """
    boxes = [torch.as_tensor(target["boxes"], dtype=torch.float32).reshape(-1, 4) for target in targets]
    if boxes and not bool(torch.cat([(b[:, 2:] > b[:, :2]).all(1) for b in boxes]).all()):
        raise ValueError("target: a box has no width or no height")
    return [_truth(target, b, device) for target, b in zip(targets, boxes, strict=True)]


def _truth(target: Mapping[str, Any], boxes: Tensor, device: torch.device) -> Truth:
    count = len(boxes)
    labels = torch.as_tensor(target["labels"], dtype=torch.int64)
    weights = target.get("lossweight")
    weights = boxes.new_ones(count) if weights is None else torch.as_tensor(weights, dtype=torch.float32)
    outline = target.get("outlineweight")
    outline = None if outline is None else torch.as_tensor(outline, dtype=torch.float32)
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
    ignored = boxes[:0]
    kept = [i for i in range(count) if not dropped[i]]
    if len(kept) < count:
        flags = torch.tensor(dropped)
        ignored = boxes[to_device(flags.nonzero().flatten(), boxes.device)]
        index = (~flags).nonzero().flatten()
        boxes, labels, weights = (x[to_device(index, x.device)] for x in (boxes, labels, weights))
        outline = None if outline is None else outline[to_device(index, outline.device)]
    boxes, labels, weights, ignored = (to_device(x, device) for x in (boxes, labels, weights, ignored))
    return Truth(
        boxes,
        labels,
        weights,
        _all_to([masks[i] for i in kept], device),
        [corners[i] for i in kept],
        ignored,
        None if outline is None else to_device(outline, device),
        float(target.get("image_weight", 1.0)),
    )


def _all_to(masks: list[Tensor], device: torch.device) -> list[Tensor]:
    """The bitmaps on `device`, copied there in one piece."""
    if all(mask.device == device for mask in masks):
        return masks
    flat = to_device(torch.cat([mask.reshape(-1).to(torch.uint8) for mask in masks]), device)
    pieces = flat.split([mask.numel() for mask in masks])
    return [piece.reshape(mask.shape) for piece, mask in zip(pieces, masks, strict=True)]


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
    if not len(boxes):
        return boxes.new_zeros((0, side, side), dtype=torch.float32)
    if placement.on_cpu(boxes):
        return _targets_by_instance(truth, boxes.float(), indices, side)
    return _targets_together(truth, boxes.float(), indices, side)


def _targets_by_instance(truth: Truth, boxes: Tensor, indices: Tensor, side: int) -> Tensor:
    """One RoIAlign per bitmap, none larger than it must be."""
    result = boxes.new_zeros((len(boxes), side, side))
    order = indices.argsort(stable=True)
    counts = torch.bincount(indices, minlength=len(truth.masks)).tolist()
    for mask, (x, y), members in zip(truth.masks, truth.origins, order.split(counts), strict=True):
        if len(members):
            # One row and column of zeros beyond the bitmap: RoIAlign would repeat its last value otherwise.
            bitmap = F.pad(mask.float(), (x, 1, y, 1))[None, None]
            result[members] = (roi_align(bitmap, [boxes[members]], side, 1.0, 0, True)[:, 0] >= 0.5).float()
    return result


def _targets_together(truth: Truth, boxes: Tensor, indices: Tensor, side: int) -> Tensor:
    """One RoIAlign for all bitmaps, padded to one size: a GPU does not wait. Bitmaps that are too many go in pieces."""
    height = max(y + mask.shape[0] for mask, (_, y) in zip(truth.masks, truth.origins, strict=True)) + 1
    width = max(x + mask.shape[1] for mask, (x, _) in zip(truth.masks, truth.origins, strict=True)) + 1
    step = max(1, CELLS_AT_ONCE // (height * width))
    shares = torch.zeros((len(boxes), side, side), device=boxes.device)
    for first in range(0, len(truth.masks), step):
        piece = range(first, min(first + step, len(truth.masks)))
        bitmaps = boxes.new_zeros((len(piece), 1, height, width))
        for bitmap, i in zip(bitmaps[:, 0], piece, strict=True):
            (x, y), mask = truth.origins[i], truth.masks[i]
            bitmap[y : y + mask.shape[0], x : x + mask.shape[1]] = mask
        # A box whose bitmap is in another piece reads any bitmap of this one, and its answer is not taken.
        own = (indices >= piece.start) & (indices < piece.stop)
        regions = torch.cat([(indices - first).clamp(0, len(piece) - 1)[:, None].float(), boxes], dim=1)
        shares = torch.where(own[:, None, None], roi_align(bitmaps, regions, side, 1.0, 0, True)[:, 0], shares)
    return (shares >= 0.5).float()

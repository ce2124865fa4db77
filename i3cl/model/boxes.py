"""Box arithmetic: offsets between boxes, clipping, overlaps. Boxes are (N, 4) x0, y0, x1, y1 in pixels, edges exclusive."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torchvision.ops import nms

from i3cl.model import placement

LARGEST_LOG_RATIO = abs(math.log(16 / 1000))
"""Limit of |dw| and |dh| before the exponential, so that no prediction can overflow."""


def encode(anchors: Tensor, boxes: Tensor, stds: tuple[float, float, float, float] = (1, 1, 1, 1)) -> Tensor:
    """Offsets (N, 4) float32 dx, dy, dw, dh from each anchor to its box, divided by `stds`.

    dx = (x - xa) / wa and dw = ln(w / wa), of centres and sizes (arXiv 1506.01497, equation 2).
    """
    anchors, boxes = anchors.float(), boxes.float()
    anchor_centre, anchor_size = (anchors[:, :2] + anchors[:, 2:]) / 2, anchors[:, 2:] - anchors[:, :2]
    centre, size = (boxes[:, :2] + boxes[:, 2:]) / 2, boxes[:, 2:] - boxes[:, :2]
    offsets = torch.cat([(centre - anchor_centre) / anchor_size, torch.log(size / anchor_size)], dim=1)
    return offsets / placement.constant(stds, offsets.device)


def decode(anchors: Tensor, offsets: Tensor, stds: tuple[float, float, float, float] = (1, 1, 1, 1)) -> Tensor:
    """Boxes (..., 4) float32 from `anchors` (..., 4) and `offsets` (..., 4): the inverse of `encode`.

    |dw| and |dh| are limited to ln(1000 / 16).
    """
    anchors = anchors.float()
    offsets = offsets.float() * placement.constant(stds, offsets.device)
    centre, size = (anchors[..., :2] + anchors[..., 2:]) / 2, anchors[..., 2:] - anchors[..., :2]
    centre = centre + offsets[..., :2] * size
    half = size * offsets[..., 2:].clamp(-LARGEST_LOG_RATIO, LARGEST_LOG_RATIO).exp() / 2
    return torch.cat([centre - half, centre + half], dim=-1)


def clip(boxes: Tensor, height: int, width: int) -> Tensor:
    """(..., 4) boxes limited to [0, width] x [0, height]."""
    x = boxes[..., 0::2].clamp(0, width)
    y = boxes[..., 1::2].clamp(0, height)
    return torch.stack([x[..., 0], y[..., 0], x[..., 1], y[..., 1]], dim=-1)


def areas(boxes: Tensor) -> Tensor:
    """(N,) square pixels."""
    return (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])


def intersections(first: Tensor, second: Tensor) -> Tensor:
    """(N, M) square pixels shared by every pair of N and M boxes."""
    low = torch.maximum(first[:, None, :2], second[None, :, :2])
    high = torch.minimum(first[:, None, 2:], second[None, :, 2:])
    width, height = (high - low).clamp_(min=0).unbind(-1)
    return width * height


def iou(first: Tensor, second: Tensor) -> Tensor:
    """(N, M) intersection over union, 0-1; 0 for two empty boxes."""
    shared = intersections(first, second)
    union = areas(first)[:, None] + areas(second)[None] - shared
    return shared / union.clamp_(min=1e-6)


def iof(boxes: Tensor, regions: Tensor) -> Tensor:
    """(N, M) share of each of N boxes that lies in each of M regions, 0-1."""
    return intersections(boxes, regions) / areas(boxes)[:, None].clamp(min=1e-6)


def grouped_nms(boxes: Tensor, scores: Tensor, groups: Tensor, threshold: float, limit: int) -> Tensor:
    """Non-maximum suppression inside each group: boxes of different groups never suppress each other.

    boxes (N, 4) with coordinates of at least 0, scores (N,), groups (N,) int64. Returns at most `limit` indices (K,) int64
    in descending order of score.
    """
    boxes, scores = boxes.float(), scores.float()
    if placement.on_cpu(boxes):
        return _nms_by_group(boxes, scores, groups, threshold)[:limit]
    return _nms_side_by_side(boxes, scores, groups, threshold)[:limit]


def _nms_by_group(boxes: Tensor, scores: Tensor, groups: Tensor, threshold: float) -> Tensor:
    """One suppression per group: fewest comparisons, but a GPU has to wait several times."""
    kept = []
    for group in groups.unique().tolist():
        members = (groups == group).nonzero().flatten()
        kept.append(members[nms(boxes[members], scores[members], threshold)])
    if not kept:
        return groups.new_zeros(0, dtype=torch.int64)
    indices = torch.cat(kept)
    return indices[scores[indices].argsort(descending=True, stable=True)]


def _nms_side_by_side(boxes: Tensor, scores: Tensor, groups: Tensor, threshold: float) -> Tensor:
    """One suppression of all groups, moved apart so far that none overlap: a GPU waits once.

    float64 keeps the overlaps of boxes that are far from the origin as exact as those of float32 boxes near it.
    """
    if not len(boxes):
        return groups.new_zeros(0, dtype=torch.int64)
    shift = groups.double() * (boxes.max().double() + 1)
    return nms(boxes.double() + shift[:, None], scores.double(), threshold)

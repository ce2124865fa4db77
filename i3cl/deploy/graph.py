"""The detector as one graph without Python in it: what `torch.onnx` can follow, with the same answers as `I3CL.detect`.

Most of the network is taken as it is. What is written differently here is what depends on the image: anchors of maps whose
size is known only when the graph runs, non-maximum suppression, the reading of regions, and the number of detections.
Suppression and reading are operators of their own, each with a body in PyTorch (for tests) and a body in ONNX (`onnx_operators`).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from timm.layers import Conv2dSame
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_eval

from i3cl.model.align import FINEST, RegionReader
from i3cl.model.align import STRIDES as REGION_STRIDES
from i3cl.model.boxes import decode, grouped_nms
from i3cl.model.heads import BOX_SIDE, BOX_STDS, MASK_SIDE
from i3cl.model.inter import GRID, InterBlock
from i3cl.model.intra import ROUNDS, IntraBlock
from i3cl.model.network import I3CL
from i3cl.model.proposals import STRIDES
from i3cl.model.pyramid import Pyramid

_ABSENT = -1.0
"""Score of a row that only fills a tensor of fixed length."""


@torch.library.custom_op("i3cl::suppress", mutates_args=())
def suppress(boxes: Tensor, scores: Tensor, iou: float, threshold: float, limit: int) -> tuple[Tensor, Tensor]:
    """Non-maximum suppression inside each of G groups of N boxes, then the best of all groups together.

    boxes: (G, N, 4) float32; scores: (G, N) float32, of which those above `threshold` take part. Returns `limit` indices (int64)
    into the G * N boxes and their scores, best first; where fewer are left, index 0 with a score of -1.
    """
    groups, count = scores.shape
    used = (scores.flatten() > threshold).nonzero().flatten()
    group = torch.arange(groups)[:, None].expand(groups, count).flatten()[used]
    kept = used[grouped_nms(boxes.reshape(-1, 4)[used], scores.flatten()[used], group, iou, limit)]
    index = kept.new_zeros(limit)
    score = scores.new_full((limit,), _ABSENT)
    index[: len(kept)] = kept
    score[: len(kept)] = scores.flatten()[kept]
    return index, score


@suppress.register_fake
def _(boxes: Tensor, scores: Tensor, iou: float, threshold: float, limit: int) -> tuple[Tensor, Tensor]:
    return scores.new_empty(limit, dtype=torch.int64), scores.new_empty(limit)


@torch.library.custom_op("i3cl::read_regions", mutates_args=())
def read_regions(maps: Sequence[Tensor], boxes: Tensor, side: int) -> Tensor:
    """(N, C, side, side) features of boxes (N, 4) in one image, each from its own of the four maps (1, C, H, W)."""
    return RegionReader(maps)(F.pad(boxes, (1, 0)), side).contiguous()


@read_regions.register_fake
def _(maps: Sequence[Tensor], boxes: Tensor, side: int) -> Tensor:
    return boxes.new_empty(boxes.shape[0], maps[0].shape[1], side, side)


def onnx_operators(opset: int) -> dict[Callable[..., Any], Callable[..., Any]]:
    """The bodies of `suppress` and `read_regions` in ONNX, as ``torch.onnx.export(custom_translation_table=…)`` takes them."""
    import onnxscript

    op: Any = getattr(onnxscript, f"opset{opset}")

    def ints(*values: int) -> Any:
        return op.Constant(value_ints=list(values))

    def onnx_suppress(boxes: Any, scores: Any, iou: float, threshold: float, limit: int) -> Any:
        # The operator knows batches, whose boxes do not meet: they are our groups.
        count = op.Shape(scores, start=1, end=2)
        kept = op.NonMaxSuppression(
            boxes,
            op.Unsqueeze(scores, ints(1)),
            count,
            op.Constant(value_float=float(iou)),
            op.Constant(value_float=float(threshold)),
        )
        group, box = (op.Squeeze(op.Gather(kept, ints(column), axis=1), ints(1)) for column in (0, 2))
        index = op.Add(op.Mul(group, count), box)
        score = op.Gather(op.Reshape(scores, ints(-1)), index)
        # Filled up, so that there are always `limit` to choose.
        index = op.Concat(index, op.Expand(ints(0), ints(limit)), axis=0)
        score = op.Concat(score, op.Expand(op.Constant(value_floats=[_ABSENT]), ints(limit)), axis=0)
        best, order = op.TopK(score, ints(limit), axis=0)
        return op.Gather(index, order), best

    def onnx_read_regions(maps: Sequence[Any], boxes: Any, side: int) -> Any:
        x0, y0, x1, y1 = (op.Squeeze(op.Gather(boxes, ints(column), axis=1), ints(1)) for column in range(4))
        zero = op.Constant(value_float=0.0)
        area = op.Max(op.Mul(op.Sub(x1, x0), op.Sub(y1, y0)), zero)
        size = op.Add(op.Div(op.Sqrt(area), op.Constant(value_float=float(FINEST))), op.Constant(value_float=1e-6))
        # log2 by comparison: no rounding can move a box across a power of two.
        level = zero
        for power in range(1, len(REGION_STRIDES)):
            level = op.Add(level, op.Cast(op.GreaterOrEqual(size, op.Constant(value_float=float(2**power))), to=1))
        parts, places = [], []
        for number, (x, stride) in enumerate(zip(maps, REGION_STRIDES, strict=True)):
            place = op.Reshape(op.NonZero(op.Equal(level, op.Constant(value_float=float(number)))), ints(-1))
            features = op.RoiAlign(
                x,
                op.Gather(boxes, place, axis=0),
                op.Mul(place, op.Constant(value_int=0)),
                coordinate_transformation_mode="half_pixel",
                output_height=side,
                output_width=side,
                sampling_ratio=0,
                spatial_scale=1 / stride,
            )
            parts.append(features)
            places.append(place)
        where = op.Concat(*places, axis=0)
        rows = op.Range(op.Constant(value_int=0), op.Squeeze(op.Shape(where), ints(0)), op.Constant(value_int=1))
        back = op.ScatterElements(rows, where, rows, axis=0)
        return op.Gather(op.Concat(*parts, axis=0), back, axis=0)

    return {torch.ops.i3cl.suppress.default: onnx_suppress, torch.ops.i3cl.read_regions.default: onnx_read_regions}


def _with_fixed_padding(module: nn.Module) -> None:
    """Replaces, in place, the convolutions that compute their padding from the size of their input.

    On maps whose sides are multiples of the stride, as all of ours are, the padding is the same for every size.
    """
    for name, child in module.named_children():
        if isinstance(child, Conv2dSame):
            missing = [(k - 1) * d + 1 - s for k, d, s in zip(child.kernel_size, child.dilation, child.stride, strict=True)]
            down, across = (max(m, 0) for m in missing)
            pad = nn.ZeroPad2d((across // 2, across - across // 2, down // 2, down - down // 2))
            (kernel_y, kernel_x), (stride_y, stride_x), (step_y, step_x) = child.kernel_size, child.stride, child.dilation
            convolution = nn.Conv2d(
                child.in_channels,
                child.out_channels,
                (kernel_y, kernel_x),
                (stride_y, stride_x),
                dilation=(step_y, step_x),
                groups=child.groups,
                bias=False,
            )
            convolution.weight, convolution.bias = child.weight, child.bias
            setattr(module, name, nn.Sequential(pad, convolution))
        else:
            _with_fixed_padding(child)


class _Pyramid(nn.Module):
    """The feature pyramid for maps whose sides double exactly from level to level: those of images with sides of 32 n."""

    def __init__(self, pyramid: Pyramid) -> None:
        super().__init__()
        self.lateral, self.output = pyramid.lateral, pyramid.output

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """As `Pyramid.forward`."""
        sums = [lateral(x) for lateral, x in zip(self.lateral, maps, strict=True)]
        for i in range(len(sums) - 1, 0, -1):
            batch, channels, height, width = sums[i].shape
            # Nearest-neighbour enlargement; the exporter writes F.interpolate to a symbolic size as a search for indices.
            double = sums[i][:, :, :, None, :, None].expand(batch, channels, height, 2, width, 2)
            sums[i - 1] = sums[i - 1] + double.reshape(batch, channels, 2 * height, 2 * width)
        levels = [output(x) for output, x in zip(self.output, sums, strict=True)]
        return [*levels, F.max_pool2d(levels[-1], kernel_size=1, stride=2)]


class _Intra(nn.Module):
    """An intra block with its three kernels a round, and its BatchNorm, multiplied out."""

    def __init__(self, block: IntraBlock) -> None:
        super().__init__()
        self.reduce = block.reduce
        self.rounds = nn.ModuleList()
        for number, size in enumerate(ROUNDS):
            weight, bias = block.merged(number)
            self.rounds.append(_convolution(weight, bias, size // 2))
        self.expand = fuse_conv_bn_eval(block.expand, block.norm)

    def forward(self, x: Tensor) -> Tensor:
        y = self.reduce(x)
        for convolution in self.rounds:
            y = convolution(y)
        return x + self.expand(y).relu()


def _convolution(weight: Tensor, bias: Tensor | None, padding: int) -> nn.Conv2d:
    result = nn.Conv2d(weight.shape[1], weight.shape[0], weight.shape[2], padding=padding, bias=bias is not None).eval()
    result.weight = nn.Parameter(weight.detach().clone())
    if bias is not None:
        result.bias = nn.Parameter(bias.detach().clone())
    return result


class _Inter(nn.Module):
    """The inter block for the regions of one image."""

    def __init__(self, block: InterBlock) -> None:
        super().__init__()
        self.block = block
        self.out = fuse_conv_bn_eval(_convolution(block.merged(), block.conv1.bias, 1), block.norm)

    def forward(self, rois: Tensor, levels: Sequence[Tensor]) -> Tensor:
        """(n, C, S, S), n at least 1, and the image's maps (1, C, H, W) -> (n, C, S, S)."""
        tokens = _pooled(self.block.reduce(rois)).flatten(1)
        tokens = self.block.encoder(tokens[None])[0]
        inner = self.block.reduce.out_channels
        added = self.block.expand(tokens.reshape(-1, inner, GRID, GRID)) + self.block.global_context(levels)[:, :, None, None]
        rois = rois + F.interpolate(added, size=[int(side) for side in rois.shape[-2:]], mode="bilinear", align_corners=True)
        return self.out(rois).relu()


def _pooled(x: Tensor) -> Tensor:
    """``adaptive_max_pool2d(x, GRID)``, for which ONNX has no operator when the cells do not divide evenly."""
    for axis in (2, 3):
        side = int(x.shape[axis])
        cells = [(i * side // GRID, -(-(i + 1) * side // GRID)) for i in range(GRID)]
        x = torch.stack([x.narrow(axis, start, end - start).amax(axis) for start, end in cells], dim=axis)
    return x


class DetectionGraph(nn.Module):
    """`I3CL.detect` for one image that is already normalised and padded."""

    def __init__(self, network: I3CL) -> None:
        """The network is copied, not changed."""
        super().__init__()
        network = copy.deepcopy(network).cpu().float().eval()
        self.network = network
        self.settings = network.settings
        _with_fixed_padding(network.backbone)
        network.pyramid = _Pyramid(network.pyramid)  # type: ignore[assignment]
        if network.intra is not None:
            network.intra = nn.ModuleList(_Intra(block) for block in network.intra)  # type: ignore[arg-type]
        self.inter = None if network.heads.inter is None else _Inter(network.heads.inter)
        cells = network.proposals.anchors([(1, 1)] * len(STRIDES), torch.device("cpu"))
        self.register_buffer("anchors", cells.reshape(len(STRIDES), -1, 4))

    anchors: Tensor

    def forward(self, batch: Tensor, size: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Boxes (n, 4) float32 pixels, scores (n,) 0-1, labels (n,) int64 and masks (n, 28, 28) 0-1 in the frame of the box.

        batch: (1, 3, H, W) float32 as `I3CL.batch` makes it, H and W multiples of 32; size: (2,) float32 height and width of the
        image inside. Detections come by descending score.
        """
        levels = self.network.features(batch)
        limit = size.flip(0).repeat(2)
        proposals, known = self._proposals(levels, limit)
        maps = list(levels[: len(REGION_STRIDES)])
        logits, offsets = self.network.heads.box(read_regions(maps, proposals, BOX_SIDE))
        boxes, scores, labels = self._select(proposals, known, logits, offsets, limit)
        regions = read_regions(maps, boxes, MASK_SIDE)
        if self.inter is not None:
            regions = self.inter(regions, levels)
        masks = self.network.heads.mask(regions, labels).sigmoid()
        present = (scores > _ABSENT / 2).nonzero().flatten()
        return boxes[present], scores[present], labels[present], masks[present]

    def _proposals(self, levels: Sequence[Tensor], limit: Tensor) -> tuple[Tensor, Tensor]:
        """(P, 4) boxes and (P,) scores, -1 where there are fewer; see `Proposals.select`."""
        settings = self.settings
        best = settings.proposals_per_level_test
        logits, offsets = self.network.proposals.predict(levels)
        boxes, scores = [], []
        for logit, offset, stride, cell in zip(logits, offsets, STRIDES, self.anchors, strict=True):
            width, per_cell = logit.shape[3], logit.shape[1]
            score = logit.permute(0, 2, 3, 1).flatten().sigmoid()
            # A small map has fewer anchors than are wanted: the rest is filled up.
            score, index = torch.cat([score, score.new_full((best,), _ABSENT)]).topk(best)
            index = torch.where(score < 0, 0, index)
            place, ratio = index // per_cell, index % per_cell
            y = place // width
            x = place - y * width
            anchor = cell[ratio] + torch.stack([x, y, x, y], dim=1) * stride
            box = _clip(decode(anchor, offset.permute(0, 2, 3, 1).reshape(-1, 4)[index]), limit)
            usable = (box[:, 2] > box[:, 0]) & (box[:, 3] > box[:, 1])
            scores.append(torch.where(usable, score, _ABSENT))
            boxes.append(box)
        index, score = suppress(
            torch.stack(boxes), torch.stack(scores), settings.proposal_nms, _ABSENT / 2, settings.proposals_per_image
        )
        return torch.cat(boxes)[index], score

    def _select(
        self, proposals: Tensor, known: Tensor, logits: Tensor, offsets: Tensor, limit: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Boxes, scores and labels of n detections, at least one: without any, one with a score of -1. See `Heads.select`."""
        settings = self.settings
        classes = settings.num_classes
        scores = torch.where(known[:, None] > _ABSENT / 2, logits.softmax(dim=1)[:, :classes], _ABSENT).T
        boxes = _clip(decode(proposals[:, None], offsets.reshape(-1, classes, 4), BOX_STDS), limit).transpose(0, 1)
        index, score = suppress(
            boxes.contiguous(),
            scores.contiguous(),
            settings.detection_nms,
            settings.score_threshold,
            settings.detections_per_image,
        )
        count = (score > _ABSENT / 2).sum().clamp(min=1).item()
        torch._check(count >= 1)
        torch._check(count <= settings.detections_per_image)
        index, score = index[:count], score[:count]
        return boxes.reshape(-1, 4)[index], score, index // settings.proposals_per_image


def _clip(boxes: Tensor, limit: Tensor) -> Tensor:
    """(..., 4) boxes inside an image of `limit` (width, height, width, height)."""
    return torch.minimum(boxes.clamp(min=0), limit)

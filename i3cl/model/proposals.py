"""Region proposals (arXiv 1506.01497): boxes in which an instance may be, of any class."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from i3cl.config import ModelSettings
from i3cl.model.anchors import Anchors
from i3cl.model.boxes import clip, decode, encode, grouped_nms
from i3cl.model.matching import Choose, Drawn, assign, random_choice, sample
from i3cl.model.targets import Truth, image_weights, outline_weights, per_image

STRIDES = (4, 8, 16, 32, 64)
Size = tuple[int, int]
"""Height, width in pixels."""


class Proposals(nn.Module):
    """The proposal head. `choose` draws the samples of the loss; a test may replace it to make them repeatable."""

    def __init__(self, settings: ModelSettings) -> None:
        super().__init__()
        self.settings = settings
        self.anchors = Anchors(STRIDES, settings.anchor_scale, settings.anchor_ratios)
        self.choose: Choose = random_choice()
        channels, per_cell = settings.pyramid_channels, self.anchors.per_cell
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)
        self.cls = nn.Conv2d(channels, per_cell, 1)
        self.reg = nn.Conv2d(channels, per_cell * 4, 1)
        for layer in (self.conv, self.cls, self.reg):
            assert layer.bias is not None
            nn.init.normal_(layer.weight, std=0.01)
            nn.init.zeros_(layer.bias)

    def predict(self, levels: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Maps (B, C, H, W) -> per level logits (B, A, H, W) and offsets (B, 4A, H, W), A = anchors per cell."""
        assert self.cls.bias is not None and self.reg.bias is not None
        weight = torch.cat([self.cls.weight, self.reg.weight])
        bias = torch.cat([self.cls.bias, self.reg.bias])
        logits, offsets = [], []
        for x in levels:
            both = F.conv2d(self.conv(x).relu_(), weight, bias)
            logits.append(both[:, : self.anchors.per_cell].float())
            offsets.append(both[:, self.anchors.per_cell :].float())
        return logits, offsets

    @torch.no_grad()
    def propose(self, levels: Sequence[Tensor], images: Sequence[Size]) -> list[Tensor]:
        """The best boxes of every image, (n, 5) float32 each: box in pixels inside the image (H, W) and score, best first."""
        return self.select(*self.predict(levels), images)

    @torch.no_grad()
    def select(self, logits: Sequence[Tensor], offsets: Sequence[Tensor], images: Sequence[Size]) -> list[Tensor]:
        """The second half of `propose`, after `predict`: takes the best of each level, decodes, clips, suppresses per level."""
        settings = self.settings
        limit = settings.proposals_per_level_train if self.training else settings.proposals_per_level_test
        sizes = [(x.shape[2], x.shape[3]) for x in logits]
        counts = self.anchors.counts(sizes)
        all_anchors = self.anchors(sizes, logits[0].device).split(counts)
        scores, boxes, groups = [], [], []
        for level, (logit, offset, anchors) in enumerate(zip(logits, offsets, all_anchors, strict=True)):
            score = logit.permute(0, 2, 3, 1).flatten(1).sigmoid()
            score, index = score.topk(min(limit, score.shape[1]), dim=1)
            offset = offset.permute(0, 2, 3, 1).reshape(len(offset), -1, 4)
            offset = offset.gather(1, index[:, :, None].expand(-1, -1, 4))
            scores.append(score)
            boxes.append(decode(anchors[index], offset))
            groups.append(torch.full_like(index[0], level))
        score, box, group = torch.cat(scores, dim=1), torch.cat(boxes, dim=1), torch.cat(groups)
        results = []
        for i, (height, width) in enumerate(images):
            image_box = clip(box[i], height, width)
            # Boxes without area overlap nothing: with a score below all others they suppress none and come last.
            usable = (image_box[:, 2:] > image_box[:, :2]).all(dim=1)
            image_score = torch.where(usable, score[i], -1.0)
            kept = grouped_nms(image_box, image_score, group, settings.proposal_nms, settings.proposals_per_image)
            results.append(torch.cat([image_box[kept], image_score[kept, None]], dim=1))
        if not results:
            return []
        counts = torch.stack([(found[:, 4] >= 0).sum() for found in results]).tolist()
        return [found[:count] for found, count in zip(results, counts, strict=True)]

    @torch.no_grad()
    def sample(
        self, sizes: Sequence[Size], truths: Sequence[Truth], padded: Sequence[Size], device: torch.device
    ) -> tuple[list[Drawn], list[Tensor]]:
        """Draws the anchors of every image that the loss is computed on: flat indices, and the truth of each positive.

        sizes: (H, W) of the five maps; padded: (H, W) pixels of each image rounded up to multiples of 32. Anchors beyond that
        are not used.
        """
        settings = self.settings
        anchors = self.anchors(sizes, device)
        indices = [self.anchors.valid(sizes, own, device) for own in padded]
        assigned = [
            assign(
                anchors if index is None else anchors[index],
                truth.boxes,
                settings.rpn_positive_iou,
                settings.rpn_negative_iou,
                settings.rpn_negative_iou,
                truth.ignored,
                settings.ignore_iof,
            )
            for index, truth in zip(indices, truths, strict=True)
        ]
        samples, matches = [], []
        drawn_of_all = sample(assigned, settings.rpn_samples, 0.5, self.choose)
        for index, own, drawn in zip(indices, assigned, drawn_of_all, strict=True):
            matches.append(own[drawn.positive])
            samples.append(drawn if index is None else Drawn(index[drawn.positive], index[drawn.negative]))
        return samples, matches

    def losses(
        self,
        levels: Sequence[Tensor],
        truths: Sequence[Truth],
        padded: Sequence[Size],
        by_image: dict[str, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Classification and box loss, (5,) float32 each: one part per level, which add up to the loss.

        Binary cross-entropy and L1, weighted by the truth's loss weight on positives (L1 by its outline weight too) and by the
        image's weight on all, summed over the samples of the batch and divided by their number (each image counts at least one
        positive and one negative). by_image receives what each image adds to loss_rpn_cls and loss_rpn_box, (B,) each.
        """
        sizes = [(x.shape[2], x.shape[3]) for x in levels]
        samples, matches = self.sample(sizes, truths, padded, levels[0].device)
        return self.losses_of(levels, truths, samples, matches, by_image)

    def losses_of(
        self,
        levels: Sequence[Tensor],
        truths: Sequence[Truth],
        samples: Sequence[Drawn],
        matches: Sequence[Tensor],
        by_image: dict[str, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """As `losses`, for the given samples and the truth (P,) of each positive."""
        device = levels[0].device
        sizes = [(x.shape[2], x.shape[3]) for x in levels]
        anchors = self.anchors(sizes, device)
        total = sum(max(len(s.positive), 1) + max(len(s.negative), 1) for s in samples)
        # The positives of all images come first, then the negatives.
        picked = [s.positive for s in samples] + [s.negative for s in samples]
        anchor = torch.cat(picked)
        image = torch.cat([torch.full_like(p, i % len(samples)) for i, p in enumerate(picked)])
        positives = sum(len(s.positive) for s in samples)
        truth_boxes = torch.cat([t.boxes[m] for t, m in zip(truths, matches, strict=True)])
        positive_weight = torch.cat([t.weights[m] for t, m in zip(truths, matches, strict=True)])
        weight = torch.cat([positive_weight, positive_weight.new_ones(len(anchor) - positives)])
        outline_weight = outline_weights(truths, matches)
        reg_weight = positive_weight if outline_weight is None else positive_weight * outline_weight
        of_image = image_weights([*truths, *truths], [len(p) for p in picked])
        if of_image is not None:
            weight, reg_weight = weight * of_image, reg_weight * of_image[:positives]
        is_positive = (torch.arange(len(anchor), device=device) < positives).float()
        logits, offsets, level = self.answers_at(levels, image, anchor, positives)
        cls = weight * F.binary_cross_entropy_with_logits(logits, is_positive, reduction="none")
        wanted = encode(anchors[anchor[:positives]], truth_boxes)
        reg = reg_weight * (offsets - wanted).abs().sum(1)
        if by_image is not None:
            by_image["loss_rpn_cls"] = per_image(cls, image, len(truths)) / total
            by_image["loss_rpn_box"] = per_image(reg, image[:positives], len(truths)) / total
        zeros = logits.new_zeros(len(levels))
        return (
            zeros.index_add(0, level, cls) / total,
            zeros.index_add(0, level[:positives], reg) / total,
        )

    def answers_at(
        self, levels: Sequence[Tensor], image: Tensor, anchor: Tensor, positives: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Logits (N,) at the given flat anchors of the given images, offsets (P, 4) of the first P, levels (N,) int64.

        The head is evaluated at these few cells only. That gives the same numbers as picking them from the whole maps, and
        saves the backward pass of a convolution over every cell.
        """
        per_cell = self.anchors.per_cell
        counts = self.anchors.counts([(x.shape[2], x.shape[3]) for x in levels])
        level, start = torch.zeros_like(anchor), torch.zeros_like(anchor)
        for end, count in zip(accumulate(counts[:-1]), counts, strict=False):
            beyond = anchor >= end
            level, start = level + beyond, start + beyond * count
        cell = (anchor - start) // per_cell
        ratio = anchor % per_cell
        order = level.argsort(stable=True)
        level_counts = torch.stack([(level == i).sum() for i in range(len(levels))]).tolist()
        patches = [
            neighbourhoods(x, image[members], cell[members]) for x, members in zip(levels, order.split(level_counts), strict=True)
        ]
        patch = torch.cat(patches)[order.argsort()]
        hidden = F.linear(patch, self.conv.weight.permute(0, 2, 3, 1).flatten(1), self.conv.bias).relu_()
        logits = F.linear(hidden, self.cls.weight.flatten(1), self.cls.bias).float()
        offsets = F.linear(hidden[:positives], self.reg.weight.flatten(1), self.reg.bias).float()
        chosen = offsets.reshape(positives, per_cell, 4)[torch.arange(positives, device=anchor.device), ratio[:positives]]
        return logits.gather(1, ratio[:, None])[:, 0], chosen, level


def neighbourhoods(x: Tensor, image: Tensor, cell: Tensor) -> Tensor:
    """(N, 9C): the 3 x 3 cells around chosen cells of a map (B, C, H, W), row by row, zero outside the map.

    image, cell: (N,) int64 index in the batch and row x W + column.
    """
    batch, channels, height, width = x.shape
    y, across = cell // width, cell % width
    shift = torch.arange(-1, 2, device=x.device)
    rows = (y[:, None] + shift)[:, :, None].expand(-1, 3, 3)
    columns = (across[:, None] + shift)[:, None, :].expand(-1, 3, 3)
    inside = (rows >= 0) & (rows < height) & (columns >= 0) & (columns < width)
    index = (image[:, None, None] * height + rows.clamp(0, height - 1)) * width + columns.clamp(0, width - 1)
    table = x.permute(0, 2, 3, 1).reshape(batch * height * width, channels)
    values = F.embedding(index.flatten(1), table) * inside.flatten(1)[:, :, None].to(x.dtype)
    return values.flatten(1)

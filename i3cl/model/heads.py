"""Second stage: box and class of each proposal, and a mask of each detection."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from i3cl.config import ModelSettings
from i3cl.model.align import RegionReader, with_batch_index
from i3cl.model.boxes import clip, decode, encode, grouped_nms
from i3cl.model.inter import InterBlock
from i3cl.model.matching import Choose, assign, random_choice, sample
from i3cl.model.targets import Truth, image_weights, mask_targets, outline_weights, per_image

BOX_STDS = (0.1, 0.1, 0.2, 0.2)
"""Scale of the box head's offsets."""
BOX_SIDE = 7
MASK_SIDE = 14
"""Side, in cells, of the regions that the two heads read."""


class BoxHead(nn.Module):
    """Two fully connected layers, then class logits (background last) and four offsets per class."""

    def __init__(self, channels: int, hidden: int, num_classes: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(channels * BOX_SIDE * BOX_SIDE, hidden)
        self.fc2 = nn.Linear(hidden, hidden)
        self.cls = nn.Linear(hidden, num_classes + 1)
        self.reg = nn.Linear(hidden, num_classes * 4)
        for layer in (self.fc1, self.fc2):
            nn.init.xavier_uniform_(layer.weight)
        nn.init.normal_(self.cls.weight, std=0.01)
        nn.init.normal_(self.reg.weight, std=0.001)
        for layer in (self.fc1, self.fc2, self.cls, self.reg):
            nn.init.zeros_(layer.bias)

    def forward(self, regions: Tensor) -> tuple[Tensor, Tensor]:
        """Regions (N, C, 7, 7) -> logits (N, classes + 1) and offsets (N, 4 x classes), float32."""
        hidden = self.fc2(self.fc1(regions.flatten(1)).relu_()).relu_()
        return self.cls(hidden).float(), self.reg(hidden).float()


class MaskHead(nn.Module):
    """3x3 convolutions, a transposed convolution that doubles the side, and one 28 x 28 map of logits per class."""

    def __init__(self, channels: int, hidden: int, convs: int, num_classes: int) -> None:
        super().__init__()
        widths = [channels] + [hidden] * convs
        self.convs = nn.ModuleList(nn.Conv2d(a, b, 3, padding=1) for a, b in pairwise(widths))
        self.upsample = nn.ConvTranspose2d(widths[-1], hidden, 2, stride=2)
        self.logits = nn.Conv2d(hidden, num_classes, 1)
        for layer in (*self.convs, self.upsample):
            assert isinstance(layer, nn.Conv2d | nn.ConvTranspose2d) and layer.bias is not None
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
            nn.init.zeros_(layer.bias)
        nn.init.normal_(self.logits.weight, std=0.01)
        assert self.logits.bias is not None
        nn.init.zeros_(self.logits.bias)

    def forward(self, regions: Tensor, labels: Tensor | None = None) -> Tensor:
        """Regions (N, C, 14, 14) -> float32 logits: (N, classes, 28, 28), or (N, 28, 28) of the classes `labels` (N,) only.

        The transposed convolution's kernel equals its stride, so each input cell makes its own 2 x 2 output cells and nothing
        else: it is a 1x1 convolution. The last layer works on single cells, so the rearrangement into 28 x 28 comes last, when
        there is one number per cell instead of a vector.
        """
        x = regions
        for conv in self.convs:
            x = conv(x).relu_()
        n, channels, height, width = x.shape
        assert self.upsample.bias is not None and self.logits.bias is not None
        hidden = len(self.upsample.bias)
        kernel = self.upsample.weight.permute(2, 3, 1, 0).reshape(4 * hidden, channels, 1, 1)
        fine = F.conv2d(x, kernel, self.upsample.bias.repeat(4)).relu_()
        fine = fine.permute(0, 2, 3, 1).reshape(n, height * width * 4, hidden)
        weight = self.logits.weight.flatten(1)
        if labels is None:
            logits = F.linear(fine, weight, self.logits.bias)
        else:
            logits = (fine @ weight[labels][:, :, None]) + self.logits.bias[labels][:, None, None]
        # (image, y, x, half of y, half of x, class) -> (image, class, y and half, x and half)
        logits = logits.float().reshape(n, height, width, 2, 2, -1).permute(0, 5, 1, 3, 2, 4)
        logits = logits.reshape(n, -1, 2 * height, 2 * width)
        return logits if labels is None else logits[:, 0]


@dataclass(frozen=True)
class RegionSample:
    """The regions of one image that the second stage's losses are computed on, positives first."""

    boxes: Tensor
    """(S, 4) float32."""
    matches: Tensor
    """(P,) int64 index of the truth of each of the P positives."""

    @property
    def positives(self) -> int:
        """Number of positives."""
        return len(self.matches)


class Heads(nn.Module):
    """Box head, inter-instance block and mask head. `choose` draws the samples of the losses; a test may replace it."""

    def __init__(self, settings: ModelSettings) -> None:
        super().__init__()
        self.settings = settings
        self.choose: Choose = random_choice()
        channels = settings.pyramid_channels
        self.box = BoxHead(channels, settings.box_head_channels, settings.num_classes)
        self.mask = MaskHead(channels, settings.mask_head_channels, settings.mask_head_convs, settings.num_classes)
        self.inter = (
            InterBlock(
                channels,
                settings.inter_channels,
                settings.inter_layers,
                settings.inter_heads,
                settings.inter_feedforward,
                settings.inter_dropout,
            )
            if settings.inter
            else None
        )

    # --------------------------------------------------------------------------------------------------------
    # training

    @torch.no_grad()
    def sample(self, proposals: Sequence[Tensor], truths: Sequence[Truth]) -> list[RegionSample]:
        """Draws the samples of every image from its proposals (n, 4 or more columns) and its truths, which join them."""
        settings = self.settings
        boxes, assigned = [], []
        for found, truth in zip(proposals, truths, strict=True):
            candidates = found[:, :4].float()
            own = assign(
                candidates,
                truth.boxes,
                settings.box_positive_iou,
                settings.box_positive_iou,
                settings.box_positive_iou,
                truth.ignored,
                settings.ignore_iof,
            )
            boxes.append(torch.cat([truth.boxes, candidates]))
            assigned.append(torch.cat([torch.arange(len(truth.boxes), device=own.device), own]))
        return [
            RegionSample(b[torch.cat([drawn.positive, drawn.negative])], a[drawn.positive])
            for b, a, drawn in zip(boxes, assigned, sample(assigned, settings.box_samples, 0.25, self.choose), strict=True)
        ]

    def losses(
        self,
        levels: Sequence[Tensor],
        samples: Sequence[RegionSample],
        truths: Sequence[Truth],
        by_image: dict[str, Tensor] | None = None,
    ) -> dict[str, Tensor]:
        """loss_cls, loss_box and loss_mask of a batch's samples: float32 scalars, without the weights of the settings.

        Cross-entropy is averaged over the samples of weight above 0. The L1 of the positives' own-class offsets is divided by
        the number of all samples. The mask's binary cross-entropy is averaged over positives and cells. An image's weight
        multiplies every term of its samples, an instance's outline weight the terms of its box and mask; neither changes what
        the sums are divided by. by_image receives what each image adds to each of the losses, (B,) each.
        """
        reader = RegionReader(levels)
        logits, offsets = self.box(reader(with_batch_index([s.boxes for s in samples]), BOX_SIDE))
        labels, weights, positive, first = [], [], [], 0
        for s, truth in zip(samples, truths, strict=True):
            negatives = len(s.boxes) - s.positives
            background = truth.labels.new_full((negatives,), self.settings.num_classes)
            labels.append(torch.cat([truth.labels[s.matches], background]))
            weights.append(torch.cat([truth.weights[s.matches], truth.weights.new_ones(negatives)]))
            positive.append(torch.arange(first, first + s.positives, device=logits.device))
            first += len(s.boxes)
        label, weight, index = torch.cat(labels), torch.cat(weights), torch.cat(positive)
        positive_label, positive_weight = label[index], weight[index]
        cross_entropy = F.cross_entropy(logits, label, reduction="none")
        # How many samples count is the original's number, whatever the images' weights.
        counted = (weight > 0).sum().clamp(min=1)
        of_image = image_weights(truths, [len(s.boxes) for s in samples])
        if of_image is not None:
            weight = weight * of_image
        cls_terms = cross_entropy * weight
        loss_cls = cls_terms.sum() / counted
        boxes = [s.boxes[: s.positives] for s in samples]
        wanted = encode(torch.cat(boxes), torch.cat([t.boxes[s.matches] for s, t in zip(samples, truths, strict=True)]), BOX_STDS)
        own = offsets.unflatten(1, (-1, 4))[index, positive_label]
        outline_weight = outline_weights(truths, [s.matches for s in samples])
        box_weight = positive_weight if outline_weight is None else positive_weight * outline_weight
        if of_image is not None:
            box_weight = box_weight * of_image[index]
        box_terms = box_weight * (own - wanted).abs().sum(1)
        loss_box = box_terms.sum() / max(len(label), 1)
        if by_image is not None:
            image = torch.cat([torch.full_like(s.boxes[:, 0], i, dtype=torch.int64) for i, s in enumerate(samples)])
            by_image["loss_cls"] = per_image(cls_terms, image, len(samples)) / counted
            by_image["loss_box"] = per_image(box_terms, image[index], len(samples)) / max(len(label), 1)
        result = {"loss_cls": loss_cls, "loss_box": loss_box}
        if not len(index):
            result["loss_mask"] = self._untouched_mask_branch()
            return result
        predicted = self.mask(self.mask_regions(reader, levels, boxes), positive_label)
        target = torch.cat(
            [mask_targets(t, b, s.matches, predicted.shape[-1]) for t, b, s in zip(truths, boxes, samples, strict=True)]
        )
        error = F.binary_cross_entropy_with_logits(predicted, target, reduction="none").mean(dim=(1, 2))
        if self.settings.weight_mask_loss:
            error = error * positive_weight
        if outline_weight is not None:
            error = error * outline_weight
        if of_image is not None:
            error = error * of_image[index]
        if by_image is not None:
            by_image["loss_mask"] = per_image(error, image[index], len(samples)) / len(error)
        result["loss_mask"] = error.mean()
        return result

    def _untouched_mask_branch(self) -> Tensor:
        """A zero that depends on every parameter of the mask branch, so that a batch without positives gives zero gradients.

        Workers that train together exchange every gradient and would wait for a missing one.
        """
        modules = [self.mask] if self.inter is None else [self.mask, self.inter]
        return sum((p.float().sum() * 0 for m in modules for p in m.parameters()), start=torch.zeros(())).float()

    def mask_regions(self, reader: RegionReader, levels: Sequence[Tensor], boxes: Sequence[Tensor]) -> Tensor:
        """(N, C, 14, 14) features of every image's boxes (n, 4), after the inter-instance block if there is one."""
        regions = reader(with_batch_index(boxes), MASK_SIDE)
        return regions if self.inter is None else self.inter(regions, levels, [len(b) for b in boxes])

    # --------------------------------------------------------------------------------------------------------
    # detection

    @torch.no_grad()
    def detect(
        self, levels: Sequence[Tensor], proposals: Sequence[Tensor], images: Sequence[tuple[int, int]]
    ) -> list[dict[str, Tensor]]:
        """Detections of every image (H, W) from its proposals (n, 4 or more columns); see `I3CL.forward` for the dicts."""
        reader = RegionReader(levels)
        logits, offsets = self.box(reader(with_batch_index([p[:, :4] for p in proposals]), BOX_SIDE))
        counts = [len(p) for p in proposals]
        results = [
            self.select(p[:, :4], c, o, size)
            for p, c, o, size in zip(proposals, logits.split(counts), offsets.split(counts), images, strict=True)
        ]
        boxes = [r["boxes"] for r in results]
        masks = self.masks(reader, levels, boxes, [r["labels"] for r in results])
        for result, mask in zip(results, masks, strict=True):
            result["masks"] = mask
        return results

    @torch.no_grad()
    def select(self, proposals: Tensor, logits: Tensor, offsets: Tensor, image: tuple[int, int]) -> dict[str, Tensor]:
        """Boxes, scores and labels of one image from the box head's answers: threshold, clip, suppress per class."""
        settings = self.settings
        scores = logits.softmax(dim=1)[:, :-1]
        region, label = (scores > settings.score_threshold).nonzero(as_tuple=True)
        score = scores[region, label]
        offset = offsets.unflatten(1, (-1, 4))[region, label]
        boxes = clip(decode(proposals[region], offset, BOX_STDS), *image)
        kept = grouped_nms(boxes, score, label, settings.detection_nms, settings.detections_per_image)
        return {"boxes": boxes[kept], "scores": score[kept], "labels": label[kept]}

    @torch.no_grad()
    def masks(
        self, reader: RegionReader, levels: Sequence[Tensor], boxes: Sequence[Tensor], labels: Sequence[Tensor]
    ) -> list[Tensor]:
        """(n, 28, 28) float32 probabilities for every image's boxes (n, 4) and labels (n,)."""
        counts = [len(b) for b in boxes]
        if not sum(counts):
            side = 2 * MASK_SIDE
            return [levels[0].new_zeros((0, side, side), dtype=torch.float32) for _ in boxes]
        logits = self.mask(self.mask_regions(reader, levels, boxes), torch.cat(list(labels)))
        return list(logits.sigmoid().split(counts))


def paste_masks(masks: Tensor, boxes: Tensor, height: int, width: int) -> Tensor:
    """(N, H, W) float32 probabilities in an image of height x width pixels, from masks (N, S, S) in the frame of their boxes.

    Bilinear at pixel centres, with the mask's cells spread evenly over the box (N, 4); zero outside.
    """
    x0, y0, x1, y1 = boxes.float().unsqueeze(-1).unbind(1)
    y = (torch.arange(height, device=masks.device) + 0.5 - y0) / (y1 - y0) * 2 - 1
    x = (torch.arange(width, device=masks.device) + 0.5 - x0) / (x1 - x0) * 2 - 1
    # A box without area covers no pixel.
    y, x = torch.nan_to_num(y, nan=-2.0, posinf=2.0, neginf=-2.0), torch.nan_to_num(x, nan=-2.0, posinf=2.0, neginf=-2.0)
    grid = torch.stack([x[:, None, :].expand(-1, height, -1), y[:, :, None].expand(-1, -1, width)], dim=-1)
    return F.grid_sample(masks[:, None].float(), grid, align_corners=False)[:, 0]

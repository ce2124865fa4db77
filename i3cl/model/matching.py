"""Which candidate box belongs to which ground truth, and which candidates a loss is computed on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from i3cl.model.boxes import iof, iou
from i3cl.model.placement import positions

NEGATIVE = -1
"""Assigned to a candidate that shows background."""
UNUSED = -2
"""Assigned to a candidate that is neither positive nor negative."""

Choose = Callable[[Tensor, int], Tensor]
"""Takes candidates (N,) int64 in ascending order and k < N; returns k of them in any order."""

PAIRS_AT_ONCE = 1 << 24
"""Pairs of candidate and truth whose overlaps are held in memory at the same time."""


def random_choice(generator: torch.Generator | None = None) -> Choose:
    """Uniform choice without replacement; the generator (on the candidates' device) makes it repeatable."""

    def choose(candidates: Tensor, count: int) -> Tensor:
        order = torch.randperm(len(candidates), generator=generator, device=candidates.device)
        return candidates[order[:count]]

    return choose


@torch.no_grad()
def assign(
    candidates: Tensor,
    truths: Tensor,
    positive_iou: float,
    negative_iou: float,
    rescue_iou: float,
    ignored: Tensor | None = None,
    ignore_iof: float | None = None,
) -> Tensor:
    """(N,) int64: for each candidate box (N, 4) the index of its truth (M, 4), NEGATIVE or UNUSED.

    A candidate belongs to the truth that it overlaps most when their IoU is at least `positive_iou`. It is NEGATIVE when that
    IoU is below `negative_iou`, and UNUSED in between. Each truth also gets its best candidates (all that tie) when their IoU
    is at least `rescue_iou`; if two truths claim the same candidate, the later one gets it. A NEGATIVE candidate becomes
    UNUSED when at least `ignore_iof` of its area lies in one of the `ignored` boxes (K, 4); None for either switches this off.
    """
    assigned = candidates.new_full((len(candidates),), NEGATIVE, dtype=torch.int64)
    if len(truths) and len(candidates):
        step = max(1, PAIRS_AT_ONCE // len(truths))
        # The first piece's overlaps are kept; those of further pieces are computed twice, because they may not fit in memory.
        pieces = candidates.split(step)
        first = iou(truths, pieces[0])
        best_of_truth = torch.stack([first.amax(1), *(iou(truths, piece).amax(1) for piece in pieces[1:])]).amax(0)
        rescuable = best_of_truth >= rescue_iou
        order = torch.arange(len(truths), device=candidates.device)[:, None]
        results = []
        for i, piece in enumerate(pieces):
            overlaps = first if i == 0 else iou(truths, piece)
            best, index = overlaps.max(dim=0)
            result = torch.where(best < negative_iou, NEGATIVE, UNUSED)
            result = torch.where(best >= positive_iou, index, result)
            claims = (overlaps == best_of_truth[:, None]) & rescuable[:, None]
            last_claim = torch.where(claims, order, NEGATIVE).amax(0)
            results.append(torch.where(last_claim >= 0, last_claim, result))
        assigned = torch.cat(results)
    if ignored is not None and ignore_iof is not None and len(ignored) and len(candidates):
        covered = torch.cat(
            [(iof(piece, ignored) >= ignore_iof).any(1) for piece in candidates.split(max(1, PAIRS_AT_ONCE // len(ignored)))]
        )
        assigned = torch.where(covered & (assigned == NEGATIVE), UNUSED, assigned)
    return assigned


@dataclass(frozen=True)
class Drawn:
    """The candidates of one image that a loss is computed on, both lists in ascending order."""

    positive: Tensor
    """(P,) int64 indices."""
    negative: Tensor
    """(K,) int64 indices."""


def sample(assigned: Sequence[Tensor], count: int, positive_share: float, choose: Choose) -> list[Drawn]:
    """Draws at most `count` candidates of every image, at most `positive_share` of them positive and the rest negative.

    assigned: what `assign` returns, (N_i,) int64 for each image. The numbers of candidates of all images are read together, so
    that a GPU is waited for once.
    """
    kinds = [(a >= 0, a == NEGATIVE) for a in assigned]
    if not kinds:
        return []
    totals = torch.stack([torch.stack([positive.sum(), negative.sum()]) for positive, negative in kinds]).tolist()
    drawn = []
    for (is_positive, is_negative), (positives, negatives) in zip(kinds, totals, strict=True):
        positive = positions(is_positive, positives)
        most = int(count * positive_share)
        if len(positive) > most:
            positive = choose(positive, most).sort().values
        negative = positions(is_negative, negatives)
        rest = count - len(positive)
        if len(negative) > rest:
            negative = choose(negative, rest).sort().values
        drawn.append(Drawn(positive, negative))
    return drawn

"""How certain a score is: bootstrap intervals over images, and tests of one result against another on the same images."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from i3cl.evaluation.metrics.metric import rates

RESAMPLES = 2000
Rows = NDArray[np.float64]
"""(I, 4) recall hits, truths, precision hits, detections of each image (`Counts.ratios`)."""


@dataclass(frozen=True)
class Interval:
    """Lower and upper limit."""

    low: float
    high: float


@dataclass(frozen=True)
class Comparison:
    """F of result A minus F of result B on the same images."""

    difference: float
    interval: Interval
    """95 % by paired bootstrap: both results on the same drawn images."""
    p_value: float
    """Permutation test: how often swapping A and B in random images gives a difference at least as large."""


def hmean_interval(rows: Rows, resamples: int = RESAMPLES, seed: int = 0) -> Interval:
    """95 % percentile interval of F over images drawn with replacement."""
    return _percentiles(_resampled(rows, resamples, seed, _f))


def rate_intervals(rows: Rows, resamples: int = RESAMPLES, seed: int = 0) -> tuple[Interval, Interval, Interval]:
    """95 % percentile intervals of recall, precision and F over images drawn with replacement."""
    recall, precision, hmean = _resampled(rows, resamples, seed, lambda totals: np.stack(rates(totals)))
    return _percentiles(recall), _percentiles(precision), _percentiles(hmean)


def difference_interval(a: Rows, b: Rows, resamples: int = RESAMPLES, seed: int = 0) -> Interval:
    """95 % percentile interval of F of A minus F of B, both on the same images drawn with replacement.

    Raises:
        ValueError: The numbers of images differ; the rows must be of the same images in the same order.
    """
    _check_paired(a, b)
    both = np.concatenate([a, b], axis=1)
    return _percentiles(_resampled(both, resamples, seed, lambda totals: _f(totals[..., :4]) - _f(totals[..., 4:])))


def seeds_difference(a: Sequence[Rows], b: Sequence[Rows], resamples: int = RESAMPLES, seed: int = 0) -> tuple[float, Interval]:
    """Mean over training seeds of F of A minus F of B, and its 95 % percentile interval.

    Args:
        a: For each of S seeds the (I, 4) rows of one training of A; all S trainings are measured on the same images.
        b: The same of B.
        resamples: Bootstrap draws. Each draws seeds and images with replacement, the same ones for A and B.
        seed: Of the draws.

    Raises:
        ValueError: The numbers of seeds or images differ.
    """
    if len(a) != len(b) or not a:
        raise ValueError(f"{len(a)} seeds against {len(b)}: a paired comparison needs the same seeds")
    for one, other in zip(a, b):
        _check_paired(one, other)
        _check_paired(one, a[0])
    pairs = np.stack([np.stack(a), np.stack(b)])  # (2, S, I, 4)
    difference = np.subtract(*_f(pairs.sum(axis=2))).mean()
    rng = np.random.default_rng(seed)
    seeds, images = pairs.shape[1:3]
    drawn = np.empty(resamples)
    for k in range(resamples):
        visits = np.bincount(rng.integers(0, images, images), minlength=images)
        scores = _f(np.einsum("i,asic->asc", visits, pairs))
        drawn[k] = np.subtract(*scores)[rng.integers(0, seeds, seeds)].mean()
    return float(difference), _percentiles(drawn)


def compare(a: Rows, b: Rows, resamples: int = RESAMPLES, seed: int = 0) -> Comparison:
    """A against B; errors as `difference_interval`."""
    _check_paired(a, b)
    difference = float(_f(a.sum(axis=0)) - _f(b.sum(axis=0)))
    rng = np.random.default_rng(seed + 1)
    gap = b - a
    swapped = np.zeros(resamples)
    for k in range(resamples):
        moved = gap[rng.random(len(a)) < 0.5].sum(axis=0)
        swapped[k] = _f(a.sum(axis=0) + moved) - _f(b.sum(axis=0) - moved)
    # One is added to both: the arrangement seen belongs to the possible ones.
    as_large = int(np.count_nonzero(np.abs(swapped) >= abs(difference) - 1e-12))
    return Comparison(difference, difference_interval(a, b, resamples, seed), (as_large + 1) / (resamples + 1))


def _check_paired(a: Rows, b: Rows) -> None:
    if len(a) != len(b):
        raise ValueError(f"{len(a)} images against {len(b)}: a paired comparison needs the same images")


def _f(totals: NDArray[np.float64]) -> NDArray[np.float64]:
    return rates(totals)[2]


def _resampled(
    rows: NDArray[np.float64], resamples: int, seed: int, statistic: Callable[[NDArray[np.float64]], NDArray[np.float64]]
) -> NDArray[np.float64]:
    rng = np.random.default_rng(seed)
    totals = np.zeros((resamples, rows.shape[1]))
    if len(rows):
        for k in range(resamples):
            totals[k] = np.bincount(rng.integers(0, len(rows), len(rows)), minlength=len(rows)) @ rows
    return statistic(totals)


def _percentiles(values: NDArray[np.float64]) -> Interval:
    low, high = np.percentile(values, [2.5, 97.5])
    return Interval(float(low), float(high))

"""DetEval in the polygon form of Total-Text: one-to-one, then splits, then merges.

Follows the rules of the Total-Text evaluation (cs-chan/Total-Text-Dataset): sigma = |G n D| / |G| and tau = |G n D| / |D|,
both rounded to two decimals.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray

from i3cl.evaluation.metrics.batch import Batch

Merge = Literal["python", "matlab"]

_FRAGMENTS = 2
"""Detections (truths) that make a split (merge)."""
_SHARED_CREDIT = 0.8
"""Credit of each member of a split or merge."""


def credit(
    batch: Batch,
    care: NDArray[np.bool_],
    kept: NDArray[np.bool_],
    tr: float,
    tp: float,
    merge: Merge,
    truth_credit: NDArray[np.float64],
    detection_credit: NDArray[np.float64],
) -> None:
    """Writes each truth's share of recall (N,) and each detection's of precision (M,) into the last two arrays.

    care: (N,) truths that count; kept: (M,) detections that count; tr, tp: thresholds of sigma and tau.
    """
    used = care[batch.truth] & kept[batch.detection]
    truth, detection = batch.truth[used], batch.detection[used]
    sigma_of = np.round(batch.truth_share()[used], 2)
    tau_of = np.round(batch.detection_share()[used], 2)
    image = batch.truth_image[truth]
    starts = np.flatnonzero(np.diff(image, prepend=-1))
    for start, end in zip(starts, [*starts[1:], len(image)]):
        # Truths and detections that touch nothing cannot score.
        g, g_at = np.unique(truth[start:end], return_inverse=True)
        d, d_at = np.unique(detection[start:end], return_inverse=True)
        sigma, tau = np.zeros((len(g), len(d))), np.zeros((len(g), len(d)))
        sigma[g_at, d_at], tau[g_at, d_at] = sigma_of[start:end], tau_of[start:end]
        truth_credit[g], detection_credit[d] = _credit_one_image(sigma, tau, tr, tp, merge)


def _credit_one_image(
    sigma: NDArray[np.float64], tau: NDArray[np.float64], tr: float, tp: float, merge: Merge
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """(N,) and (M,) credits of one image's (N, M) tables."""
    truths, detections = np.zeros(sigma.shape[0]), np.zeros(sigma.shape[1])
    free_g, free_d = np.ones(len(truths), bool), np.ones(len(detections), bool)

    covers, lies = sigma > tr, tau > tp
    for g in np.flatnonzero((covers.sum(axis=1) == 1) & (lies.sum(axis=1) == 1)):
        by_sigma, by_tau = int(covers[g].argmax()), int(lies[g].argmax())
        if covers[:, by_sigma].sum() == 1 and lies[:, by_tau].sum() == 1:
            truths[g] = detections[by_sigma] = 1
            free_g[g] = free_d[by_sigma] = False

    for g in np.flatnonzero(free_g & ((sigma > 0).sum(axis=1) >= _FRAGMENTS)):
        parts = np.flatnonzero((tau[g] >= tp) & free_d)
        if len(parts) == 1:
            if sigma[g, parts[0]] >= tr:
                truths[g] = detections[parts] = 1
                free_g[g] = free_d[parts] = False
        elif len(parts) and sigma[g, parts].sum() >= tr:
            truths[g] = detections[parts] = _SHARED_CREDIT
            free_g[g] = free_d[parts] = False

    least = tp if merge == "python" else tr
    for d in np.flatnonzero(free_d & ((tau > 0).sum(axis=0) >= _FRAGMENTS)):
        parts = np.flatnonzero((sigma[:, d] >= least) & free_g)
        if len(parts) == 1:
            if tau[parts[0], d] >= tp and sigma[parts[0], d] >= tr:
                truths[parts] = detections[d] = 1
                free_g[parts] = free_d[d] = False
        elif len(parts) and tau[parts, d].sum() >= tp:
            truths[parts] = detections[d] = _SHARED_CREDIT
            free_g[parts] = free_d[d] = False
    return truths, detections

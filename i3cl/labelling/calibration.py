"""Calibration: from a fused score to the expected share of right instances, learned on labelled images and kept as JSON."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from i3cl import storage
from i3cl.config import FusionSettings
from i3cl.errors import UserError


@dataclass(frozen=True)
class Calibration:
    """A rising piecewise linear function: fused score -> expected precision."""

    scores: tuple[float, ...]
    """Ascending, 0-1."""
    precision: tuple[float, ...]
    """Same length, 0-1, never falling."""
    members: tuple[str, ...] = ()
    """Sorted names of the members that were fused."""
    fusion: FusionSettings = field(default_factory=FusionSettings)
    """How the scores were fused: scores that were fused differently mean something else."""
    instances: int = 0
    """Fused instances from which it was learned."""

    def __call__(self, scores: ArrayLike) -> NDArray[np.float64]:
        """(N,) expected precision of (N,) fused scores; outside the knots that of the nearest knot."""
        return np.interp(np.asarray(scores, np.float64), self.scores, self.precision)

    def check(self, members: Sequence[str], fusion: FusionSettings, path: str) -> None:
        """UserError when the scores were made by other members or with other fusion settings."""
        active = active_members(members, fusion)
        if self.members and tuple(active) != self.members:
            raise UserError(
                f"{path}: learned from members {', '.join(self.members)}, not {', '.join(active)}; "
                "calibrate again with jobs/label.py trust"
            )
        if self.fusion != fusion:
            raise UserError(f"{path}: learned with other label.fusion settings; calibrate again with jobs/label.py trust")


def active_members(members: Iterable[str], fusion: FusionSettings) -> list[str]:
    """Sorted names of the members whose vote has a weight."""
    return sorted(name for name in members if fusion.member_weights.get(name, 1.0) > 0)


def fit_calibration(
    scores: ArrayLike, right: ArrayLike, members: Sequence[str] = (), fusion: FusionSettings | None = None
) -> Calibration:
    """Isotonic regression of being right on the fused score (Zadrozny and Elkan 2002).

    scores: (N,) 0-1; right: (N,) bool. ValueError without a single instance.
    """
    from sklearn.isotonic import IsotonicRegression

    x, y = np.asarray(scores, np.float64), np.asarray(right, bool)
    if not len(x) or x.shape != y.shape:
        raise ValueError(f"{len(x)} scores and {len(y)} verdicts; calibration needs one of each for every instance")
    fit = IsotonicRegression(y_min=0.0, y_max=1.0, out_of_bounds="clip").fit(x, y.astype(np.float64))
    knots = tuple(map(float, fit.X_thresholds_)), tuple(map(float, np.clip(fit.y_thresholds_, 0, 1)))
    return Calibration(*knots, tuple(sorted(members)), fusion or FusionSettings(), len(x))


def cross_calibrated(scores: ArrayLike, right: ArrayLike, groups: ArrayLike, folds: int = 5) -> NDArray[np.float64]:
    """(N,) expected precision of each instance by a calibration that has not seen its image.

    groups: (N,) image ids. When all images are in one fold there is nothing to learn from, and scores stay as they are.
    """
    x, y = np.asarray(scores, np.float64), np.asarray(right, bool)
    _, numbers = np.unique(np.asarray(groups), return_inverse=True)
    result = x.copy()
    for fold in range(folds):
        own = numbers % folds == fold
        if own.any() and not own.all():
            result[own] = fit_calibration(x[~own], y[~own])(x[own])
    return result


@dataclass(frozen=True)
class ReliabilityBin:
    """Instances whose expected precision is between `low` and `high`."""

    low: float
    high: float
    count: int
    expected: float
    """Mean expected precision of the instances in the bin."""
    observed: float
    """Share of them that is right."""


def reliability(expected: ArrayLike, right: ArrayLike, bins: int = 10) -> list[ReliabilityBin]:
    """Expected and observed precision in `bins` bins of equal width; empty bins are left out."""
    x, y = np.asarray(expected, np.float64), np.asarray(right, bool)
    place = np.clip((x * bins).astype(int), 0, bins - 1)
    return [
        ReliabilityBin(k / bins, (k + 1) / bins, int(own.sum()), float(x[own].mean()), float(y[own].mean()))
        for k in range(bins)
        if (own := place == k).any()
    ]


def expected_calibration_error(bins: Sequence[ReliabilityBin]) -> float:
    """Mean of |expected - observed| over the instances (Guo et al. 2017); 0 without any."""
    count = sum(b.count for b in bins)
    return sum(b.count * abs(b.expected - b.observed) for b in bins) / max(count, 1)


def write_calibration(path: str, calibration: Calibration) -> None:
    """Write it as JSON, whole or not at all."""
    content = {
        "scores": calibration.scores,
        "precision": calibration.precision,
        "members": calibration.members,
        "fusion": calibration.fusion.model_dump(),
        "instances": calibration.instances,
    }
    storage.write_text_atomic(path, json.dumps(content, indent=1) + "\n")


def read_calibration(path: str) -> Calibration:
    """Read what `write_calibration` wrote. UserError when the file is not a calibration."""
    try:
        content: Any = json.loads(storage.read_text(path))
        members = tuple(map(str, content["members"]))
        fusion = FusionSettings.model_validate(content["fusion"])
        return Calibration(*knots_of(content), members, fusion, int(content["instances"]))
    except (ValueError, KeyError, TypeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{path}: not a calibration ({reason}); write one with jobs/label.py trust") from None


def knots_of(content: Any) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Scores and precisions of a calibration in JSON. ValueError when they are not rising knots in 0-1; KeyError, TypeError."""
    knots = np.array([content["scores"], content["precision"]], np.float64)
    if knots.ndim != 2 or not knots.shape[1] or not ((knots >= 0) & (knots <= 1)).all():
        raise ValueError("knots must lie in 0-1")
    if (np.diff(knots, axis=1) < 0).any():
        raise ValueError("knots must not fall")
    return tuple(knots[0].tolist()), tuple(knots[1].tolist())

"""From fused instances to pseudo labels: which are learned, with which weight, and which regions are kept out of the loss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from i3cl.config import SelectSettings
from i3cl.geometry import overlaps, short_side
from i3cl.labelling.calibration import Calibration
from i3cl.labelling.fusion import FusedInstances


@dataclass(frozen=True)
class Selected:
    """One image's pseudo labels and ignore regions, in the order of the fused instances."""

    polygons: list[NDArray[np.float32]]
    """n polygons (P, 2) float32 in pixels."""
    lossweight: NDArray[np.float64]
    """(n,) 0-1, as the settings say, for pseudo labels; 0 for ignore regions."""
    outlineweight: NDArray[np.float64]
    """(n,) 0-1, how strongly a pseudo label teaches box and mask, beside its lossweight; 1 for ignore regions."""
    ignore: NDArray[np.bool_]
    """(n,) True for ignore regions."""
    scores: NDArray[np.float64]
    """(n,) 0-1."""
    votes: NDArray[np.int64]
    """(n,)."""
    dropped: int
    """Fused instances that are neither; the student learns what they cover as background, or as what a label there says."""

    def __len__(self) -> int:
        return len(self.polygons)


def select(fused: FusedInstances, settings: SelectSettings, calibration: Calibration | None = None) -> Selected:
    """Sort the instances by the thresholds of `settings`.

    With a `calibration` the scores become expected precision first, and the thresholds are in that unit.

    - score >= high: pseudo label of lossweight 1;
    - low <= score < high: pseudo label whose lossweight grows linearly from min_weight at low to 1 at high ('ramp'), or is the
      score ('score');
    - ignore <= score < low: ignore region; so is a would-be pseudo label with fewer than min_votes votes or a short side under
      min_side pixels;
    - score < ignore: dropped; so is a would-be ignore region of which pseudo labels cover more than the share `explained`;
    - a line without words: ignore region from the score `ignore` on, dropped below.

    Box and mask are taught fully from agreement outline_high on, not at all below outline_low, and by a linear share between.
    """
    scores = np.asarray(fused.scores, np.float64) if calibration is None else calibration(fused.scores)
    sides = np.array([short_side(polygon) for polygon in fused.polygons], np.float64)
    label = (scores >= settings.low) & (fused.votes >= settings.min_votes) & (sides >= settings.min_side)
    # high == low leaves no ramp: a score that reaches low has reached high.
    ramp = (scores - settings.low) / max(settings.high - settings.low, 1e-12)
    weight = settings.min_weight + (1 - settings.min_weight) * np.clip(ramp, 0, 1)
    if settings.weight == "score":
        weight = scores
    weight = np.where(scores >= settings.high, 1.0, weight)

    # Equal thresholds are a gate: what reaches them has reached the higher one.
    outline = (fused.agreement - settings.outline_low) / max(settings.outline_high - settings.outline_low, 1e-12)
    outline = np.where(fused.agreement >= settings.outline_high, 1.0, np.clip(outline, 0, 1))

    kept = np.flatnonzero((scores >= settings.ignore) & ~_explained(fused.polygons, label, scores, settings))
    line_scores = fused.line_scores if calibration is None else calibration(fused.line_scores)
    lines = np.flatnonzero(line_scores >= settings.ignore)
    none = np.zeros(len(lines))
    return Selected(
        polygons=[fused.polygons[k] for k in kept] + [fused.lines[k] for k in lines],
        lossweight=np.concatenate([np.where(label, weight, 0.0)[kept], none]),
        outlineweight=np.concatenate([np.where(label, outline, 1.0)[kept], none + 1]),
        ignore=np.concatenate([~label[kept], none == 0]),
        scores=np.concatenate([scores[kept], line_scores[lines]]),
        votes=np.concatenate([fused.votes[kept], np.ones(len(lines), np.int64)]),
        dropped=len(scores) - len(kept) + len(line_scores) - len(lines),
    )


def _explained(
    polygons: Sequence[NDArray[np.float32]], label: NDArray[np.bool_], scores: NDArray[np.float64], settings: SelectSettings
) -> NDArray[np.bool_]:
    """(n,) which instances are no labels, but lie on labels: pieces of words, words with their surroundings.

    As ignore regions they would keep such detections, which are wrong, from ever being negatives.
    """
    found = np.zeros(len(polygons), bool)
    rest = np.flatnonzero(~label & (scores >= settings.ignore))
    if settings.explained < 1 and len(rest) and label.any():
        labels = np.flatnonzero(label).tolist()
        pairs = overlaps([polygons[k] for k in rest.tolist()], [polygons[k] for k in labels])
        covered = np.bincount(pairs.first, pairs.intersection, len(rest))
        found[rest] = covered > settings.explained * pairs.area_first
    return found


class SelectionSummary:
    """Counts over many images; `update` with each image's selection."""

    def __init__(self) -> None:
        self.images = self.images_with_labels = self.instances = self.ignored = self.dropped = 0
        self._weight = 0.0

    def update(self, selected: Selected) -> None:
        """Add one image."""
        labels = int(np.count_nonzero(~selected.ignore))
        self.images += 1
        self.images_with_labels += labels > 0
        self.instances += labels
        self.ignored += len(selected) - labels
        self.dropped += selected.dropped
        self._weight += float(selected.lossweight[~selected.ignore].sum())

    def merge(self, counts: Mapping[str, float]) -> None:
        """Add the images of another `summary`."""
        self.images += int(counts["images"])
        self.images_with_labels += int(counts["images_with_labels"])
        self.instances += int(counts["instances"])
        self.ignored += int(counts["ignored"])
        self.dropped += int(counts["dropped"])
        self._weight += counts["mean_weight"] * counts["instances"]

    def summary(self) -> dict[str, float]:
        """The counts images, images_with_labels, instances (pseudo labels), ignored and dropped, and mean_weight.

        mean_weight: the mean lossweight of the pseudo labels, 0-1; 0 without any.
        """
        return {
            "images": self.images,
            "images_with_labels": self.images_with_labels,
            "instances": self.instances,
            "ignored": self.ignored,
            "dropped": self.dropped,
            "mean_weight": self._weight / max(self.instances, 1),
        }

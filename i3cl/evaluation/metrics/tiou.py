"""TIoU: IoU reduced by the part of the truth left out and by other truths taken in (Yuliang-Liu/TIoU-metric)."""

from __future__ import annotations

import numpy as np
import shapely
from numpy.typing import NDArray

from i3cl.evaluation.metrics.batch import Batch

_FREE_OF_CHARGE = 0.01


def tightness(
    batch: Batch, truth: NDArray[np.int64], detection: NDArray[np.int64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """What each matched pair adds to recall and to precision, two (P,) arrays; truth, detection: (P,) indices.

    recall: IoU x f((|G| - |G n D|) / |G|); precision: IoU x f(O / |D|) with O the area of D in other truths, don't-cares
    among them, without what also lies in G; f(x) = 1 up to 0.01, else 1 - x.
    """
    pair_of = {pair: k for k, pair in enumerate(zip(batch.truth.tolist(), batch.detection.tolist()))}
    pairs = np.array([pair_of[pair] for pair in zip(truth.tolist(), detection.tolist())], np.int64)
    iou = batch.iou()[pairs]
    left_out = np.maximum(batch.truth_area[truth] - batch.intersection[pairs], 0) / batch.truth_area[truth]
    touching: dict[int, list[int]] = {}
    for g, d in pair_of:
        touching.setdefault(d, []).append(g)
    taken_in = np.zeros(len(truth))
    for k, (g, d) in enumerate(zip(truth.tolist(), detection.tolist())):
        others = [other for other in touching[d] if other != g]
        if others:
            foreign = shapely.intersection(batch.detections[d], shapely.union_all(batch.truths[others]))
            taken_in[k] = shapely.area(shapely.difference(foreign, batch.truths[g])) / batch.detection_area[d]
    return iou * _charge(left_out), iou * _charge(taken_in)


def _charge(share: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.where(share <= _FREE_OF_CHARGE, 1.0, 1 - share)

"""Matching truths and detections one to one, in the four orders that the field's scripts use."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Matching = Literal["first", "best_gt", "max", "greedy"]

MATCHINGS: dict[Matching, str] = {
    "first": "truths in file order take their first free detection in file order",
    "best_gt": "detections in file order, each looks at its best truth only",
    "max": "maximum bipartite matching",
    "greedy": "pairs by descending IoU",
}
"""Who is matched first, with its explanation."""

Pairs = tuple[NDArray[np.int64], NDArray[np.int64]]
"""(P,) truths and (P,) detections of P pairs."""


def match_pairs(truth: NDArray[np.int64], detection: NDArray[np.int64], iou: NDArray[np.float64], matching: Matching) -> Pairs:
    """One-to-one pairs out of K candidate pairs.

    Args:
        truth: (K,) index of the truth of each candidate, ascending; equal ones are sorted by detection.
        detection: (K,) index of its detection.
        iou: (K,) its IoU.
        matching: Who is matched first.

    Returns:
        The truths and the detections of the matched pairs.
    """
    if matching == "max":
        return _maximum(truth, detection)
    order = np.arange(len(truth))
    if matching == "best_gt":
        by_detection = np.lexsort((truth, -iou, detection))
        _, best = np.unique(detection[by_detection], return_index=True)
        order = by_detection[best]
    elif matching == "greedy":
        order = np.lexsort((detection, truth, -iou))
    return _take_free(zip(truth[order].tolist(), detection[order].tolist()))


def _take_free(pairs: Iterable[tuple[int, int]]) -> Pairs:
    truths: dict[int, int] = {}
    detections: set[int] = set()
    for truth, detection in pairs:
        if truth not in truths and detection not in detections:
            truths[truth] = detection
            detections.add(detection)
    return np.array(list(truths), np.int64), np.array(list(truths.values()), np.int64)


def _maximum(truth: NDArray[np.int64], detection: NDArray[np.int64]) -> Pairs:
    from scipy.sparse import csr_matrix
    from scipy.sparse.csgraph import maximum_bipartite_matching

    truths, row = np.unique(truth, return_inverse=True)
    detections, column = np.unique(detection, return_inverse=True)
    if not len(truths):
        return truth[:0], detection[:0]
    graph = csr_matrix((np.ones(len(row), np.int8), (row, column)), shape=(len(truths), len(detections)))
    column_of = maximum_bipartite_matching(graph, perm_type="column")
    matched = column_of >= 0
    return truths[matched], detections[column_of[matched]]

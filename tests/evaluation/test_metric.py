"""One metric for training, labelling, search and evaluation: its rules, its thresholds and its sweep."""

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from i3cl.evaluation.metrics.batch import EvalImage, mark_small
from i3cl.evaluation.metrics.judge import DROPPED, UNMATCHED, assign
from i3cl.evaluation.metrics.matching import Matching
from i3cl.evaluation.metrics.metric import DetectionMetric
from i3cl.evaluation.metrics.protocols import PROTOCOLS, iou_rules
from i3cl.geometry import overlaps

MATCHINGS: list[Matching] = ["first", "best_gt", "max", "greedy"]


def box(x0, y0, x1, y1):
    return np.array([[x0, y0], [x1, y0], [x1, y1], [x0, y1]], float)


def image(name, truths, ignore, detections, scores):
    return EvalImage(str(name), truths, np.array(ignore, bool), detections, np.array(scores, float))


def score_one(truths, ignore, detections, scores=None, iou=0.5, matching: Matching = "first", threshold=0.0):
    metric = DetectionMetric(iou_rules(iou, matching))
    metric.update([image(1, truths, ignore, detections, np.ones(len(detections)) if scores is None else scores)])
    return metric.summary(threshold)


# -------------------------------------------------------------------------------------------------- the rules


@pytest.mark.parametrize("matching", MATCHINGS)
def test_worked_example(matching):
    truths = [box(0, 0, 100, 20), box(0, 40, 100, 60), box(0, 80, 60, 100)]
    ignore = [False, False, True]
    detections = [
        box(10, 0, 110, 20),
        box(0, 40, 50, 60),
        box(0, 80, 60, 100),
        box(20, 70, 60, 100),
        box(50, 90, 90, 120),
    ]
    result = score_one(truths, ignore, detections, matching=matching)
    assert (result.true_positives, result.truths, result.detections) == (1, 2, 3)
    assert (result.recall, result.precision, result.hmean) == pytest.approx((1 / 2, 1 / 3, 0.4))
    assert (result.dont_cares, result.dropped, result.images) == (1, 2, 1)
    verdicts = assign(truths, ignore, detections, matching=matching)
    assert verdicts.tolist() == [0, UNMATCHED, DROPPED, DROPPED, UNMATCHED]


@pytest.mark.parametrize("width, hit", [(50, 0), (51, 1)])
def test_iou_is_strictly_above(width, hit):
    assert score_one([box(0, 0, 100, 20)], [False], [box(0, 0, width, 20)]).true_positives == hit


@pytest.mark.parametrize("inside, dropped", [(50, 0), (51, 1)])
def test_dont_care_share_is_strictly_above_half(inside, dropped):
    result = score_one([box(0, 0, 100, 20)], [True], [box(100 - inside, 0, 200 - inside, 20)])
    assert (result.dropped, result.detections) == (dropped, 1 - dropped)


def test_dont_cares_are_not_summed():
    result = score_one([box(0, 0, 45, 20), box(45, 0, 90, 20)], [True, True], [box(0, 0, 100, 20)])
    assert (result.dropped, result.detections) == (0, 1)


def test_dont_care_goes_before_a_right_match():
    """A detection on a word that stands inside a don't-care region is dropped, and the word is missed."""
    result = score_one([box(0, 0, 100, 20), box(0, 0, 200, 40)], [False, True], [box(0, 0, 100, 20)])
    assert (result.true_positives, result.dropped, result.recall, result.precision) == (0, 1, 0, 0)


def test_a_second_detection_of_one_truth_is_wrong():
    result = score_one([box(0, 0, 100, 20)], [False], [box(0, 0, 100, 20), box(1, 0, 100, 20)])
    assert (result.true_positives, result.recall, result.precision) == (1, 1, 0.5)


@pytest.mark.parametrize("matching, hits", [("first", 1), ("best_gt", 1), ("max", 2), ("greedy", 2)])
def test_matching_orders_differ(matching, hits):
    truths = [box(0, 0, 10, 10), box(0, 8, 10, 18)]
    detections = [box(0, 0, 10, 18), box(0, 0, 10, 9)]
    assert score_one(truths, [False] * 2, detections, matching=matching).true_positives == hits


def test_greedy_is_not_maximum():
    # IoU > 0.3: D1 likes G1 best (0.6) but is G2's only choice (0.33); D2 (0.5) could stand in for it at G1.
    truths = [box(0, 0, 12, 10), box(12, 0, 22, 10)]
    detections = [box(0, 0, 20, 10), box(0, 0, 6, 10)]
    results = {m: score_one(truths, [False] * 2, detections, iou=0.3, matching=m) for m in MATCHINGS}
    hits = {m: result.true_positives for m, result in results.items()}
    assert hits == {"first": 1, "best_gt": 1, "greedy": 1, "max": 2}


def test_first_follows_the_file_order_not_the_scores():
    truth, close, closer = box(0, 0, 10, 10), box(0, 0, 10, 8), box(0, 0, 10, 9)
    assert assign([truth], [False], [close, closer], matching="first").tolist() == [0, UNMATCHED]
    assert assign([truth], [False], [close, closer], matching="greedy").tolist() == [UNMATCHED, 0]


def test_totals_are_summed_over_images():
    metric = DetectionMetric()
    word = box(0, 0, 100, 20)
    metric.update([image("one", [word], [False], [word], [1.0])])
    metric.update([image("three", [word, box(0, 40, 9, 50), box(0, 60, 9, 70)], [False] * 3, [], [])])
    result = metric.summary(0.5)
    assert (result.recall, result.precision, result.hmean) == pytest.approx((1 / 4, 1, 0.4))


def test_score_threshold_is_strictly_above():
    word = box(0, 0, 100, 20)
    assert score_one([word], [False], [word], [0.5], threshold=0.5).detections == 0
    assert score_one([word], [False], [word], [0.5], threshold=0.49).detections == 1


def test_dropped_detections_are_counted_above_the_threshold_only():
    word = box(0, 0, 100, 20)
    assert score_one([word], [True], [word, word], [0.2, 0.6], threshold=0.4).dropped == 1


# ------------------------------------------------------------------------------------- degenerate and invalid


def test_nothing_at_all():
    result = DetectionMetric().summary("best")
    assert (result.recall, result.precision, result.hmean, result.images) == (0, 0, 0, 0)
    assert DetectionMetric().curve().hmean.tolist() == [0]


def test_empty_image():
    result = score_one([], [], [])
    assert (result.recall, result.precision, result.hmean, result.images) == (0, 0, 0, 1)


def test_no_truths_make_false_positives():
    result = score_one([], [], [box(0, 0, 9, 9)])
    assert (result.recall, result.precision, result.detections) == (0, 0, 1)


def test_no_detections_miss_every_truth():
    result = score_one([box(0, 0, 9, 9)], [False], [])
    assert (result.recall, result.precision, result.truths) == (0, 0, 1)


def test_a_truth_without_area_is_no_truth():
    line = np.array([[0, 0], [5, 5], [9, 9]], float)
    result = score_one([line, box(0, 0, 9, 9)], [False, False], [box(0, 0, 9, 9)])
    assert (result.truths, result.dont_cares, result.invalid_truths, result.recall) == (1, 1, 1, 1)


def test_a_detection_without_area_is_a_false_positive_even_in_a_dont_care():
    line = np.array([[1, 1], [5, 5], [8, 8]], float)
    result = score_one([box(0, 0, 9, 9)], [True], [line])
    assert (result.dropped, result.detections, result.precision) == (0, 1, 0)


def test_repairs_are_counted():
    bow_tie = np.array([[0, 0], [10, 10], [10, 0], [0, 10]], float)
    result = score_one([bow_tie], [False], [bow_tie, box(0, 0, 9, 9)])
    assert (result.repaired, result.true_positives) == (2, 1)


def test_ring_order_does_not_matter():
    word = box(0, 0, 100, 20)
    assert score_one([word], [False], [word[::-1]]).true_positives == 1


def test_bad_input():
    word = box(0, 0, 9, 9)
    metric = DetectionMetric()
    metric.update([image(1, [word], [False], [word], [0.5])])
    with pytest.raises(ValueError, match="image 1 was given twice"):
        metric.update([image(1, [word], [False], [word], [0.5])])
    with pytest.raises(ValueError, match="image 3 was given twice"):
        metric.update([image(3, [], [], [], []), image(3, [], [], [], [])])
    with pytest.raises(ValueError, match="1 detections but 0 scores"):
        image(2, [word], [False], [word], [])
    with pytest.raises(ValueError, match="1 truths but 2 ignore"):
        image(2, [word], [False, True], [], [])
    for broken in (word[:2], word * np.nan):
        with pytest.raises(ValueError, match="image 2: a polygon needs"):
            metric.update([image(2, [], [], [broken], [1])])
    for wrong in (1.5, -0.1, np.nan):
        with pytest.raises(ValueError, match="0-1"):
            image(2, [], [], [word], [wrong])
    with pytest.raises(ValueError, match="matching"):
        iou_rules(matching="hungarian")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="iou"):
        iou_rules(iou=50)
    with pytest.raises(ValueError, match="best"):
        metric.summary("bset")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="curve"):
        DetectionMetric(PROTOCOLS["tiou"][0]).curve()
    assert metric.summary(0).images == 1


# -------------------------------------------------------------------------------------------- small and rules


def test_mark_small():
    truths = [box(0, 0, 100, 10), box(0, 0, 100, 9.9), box(0, 0, 5, 5)]
    assert mark_small(truths, [False, False, True], 10).tolist() == [False, True, True]
    assert mark_small([], [], 10).tolist() == []
    with pytest.raises(ValueError, match="ignore flags"):
        mark_small(truths, [False], 10)


def test_rules_name_what_was_done():
    metric = DetectionMetric(iou_rules(0.7, "max"))
    assert "IoU > 0.7" in metric.summary(0.25).rules
    assert "'max'" in metric.summary(0.25).rules
    assert "score > 0.25 (fixed)" in metric.summary(0.25).rules
    assert "best" in metric.summary("best").rules


# ------------------------------------------------------------------------------------------------------ sweep


def random_images(seed, images=6, truths=5, detections=12, levels=8):
    """Crowded images: every detection is a moved truth, so that they compete."""
    rng = np.random.default_rng(seed)
    result = []
    for number in range(images):
        places = rng.uniform(0, 60, (truths, 2)).round()
        words = [box(x, y, x + 30, y + 12) for x, y in places]
        moved = places[rng.integers(0, truths, detections)] + rng.normal(0, 4, (detections, 2)).round()
        found = [box(x, y, x + 30, y + 12) for x, y in moved]
        scores = rng.integers(0, levels, detections) / levels
        result.append((number, words, rng.random(truths) < 0.2, found, scores))
    return result


def above(given, threshold):
    image_id, truths, ignore, detections, scores = given
    kept = np.flatnonzero(scores > threshold)
    return image_id, truths, ignore, [detections[d] for d in kept], scores[kept]


def collect(images, iou=0.4, matching: Matching = "first"):
    metric = DetectionMetric(iou_rules(iou, matching))
    metric.update([image(*each) for each in images])
    return metric


@pytest.mark.parametrize("matching", MATCHINGS)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_sweep_equals_filtering_first(matching, seed):
    """Any threshold's numbers are those of a metric that was given the detections above it only."""
    images = random_images(seed)
    metric = collect(images, matching=matching)
    curve = metric.curve()
    for k, threshold in enumerate(curve.thresholds):
        filtered = [above(each, threshold) for each in images]
        expected = collect(filtered, matching=matching).summary(0.0)
        result = metric.summary(float(threshold))
        assert (result.true_positives, result.detections) == (expected.true_positives, expected.detections)
        verdicts = np.concatenate([assign(t, g, d, 0.4, matching) for _, t, g, d, _ in filtered])
        assert np.count_nonzero(verdicts >= 0) == result.true_positives
        assert np.count_nonzero(verdicts == DROPPED) == result.dropped
        assert (curve.recall[k], curve.precision[k], curve.hmean[k]) == (
            result.recall,
            result.precision,
            result.hmean,
        )
    best = metric.summary("best")
    assert best.hmean == curve.hmean.max()
    assert best.threshold in curve.thresholds


def brute_force(given, threshold, matching, iou=0.4):
    """True positives by the rules as they are written, no sparse pairs, no steps."""
    _, truths, ignore, detections, scores = given
    ious = overlaps(truths, detections).dense_iou()
    share = np.zeros_like(ious)
    found = overlaps(truths, detections)
    share[found.first, found.second] = found.intersection / found.area_second[found.second]
    care = [g for g in range(len(truths)) if not ignore[g]]
    kept = [
        d
        for d in range(len(detections))
        if scores[d] > threshold and not any(share[g, d] > 0.5 for g in range(len(truths)) if ignore[g])
    ]
    if matching == "max":
        return max_by_search(care, kept, ious, iou), len(kept)
    taken: set[int] = set()
    used: set[int] = set()
    if matching == "best_gt":
        for d in kept:
            g = max(care, key=lambda g: (ious[g, d], -g), default=None)
            if g is not None and ious[g, d] > iou and g not in taken:
                taken.add(g)
        return len(taken), len(kept)
    order = [(g, d) for g in care for d in kept]
    if matching == "greedy":
        order.sort(key=lambda pair: (-ious[pair], pair))
    for g, d in order:
        if ious[g, d] > iou and g not in taken and d not in used:
            taken.add(g)
            used.add(d)
    return len(taken), len(kept)


def max_by_search(care, kept, ious, iou):
    if not care:
        return 0
    first, others = care[0], care[1:]
    choices = [d for d in kept if ious[first, d] > iou]
    with_first = [1 + max_by_search(others, [e for e in kept if e != d], ious, iou) for d in choices]
    return max([max_by_search(others, kept, ious, iou), *with_first])


@pytest.mark.parametrize("matching", MATCHINGS)
def test_sweep_equals_brute_force(matching):
    images = random_images(5)
    metric = collect(images, matching=matching)
    for threshold in metric.curve().thresholds:
        expected = np.sum([brute_force(each, threshold, matching) for each in images], axis=0)
        result = metric.summary(float(threshold))
        assert [result.true_positives, result.detections] == expected.tolist()


def test_sweep_is_fast():
    """Thousands of thresholds cost one sort: measuring the polygons is all the work there is."""
    metric = collect(random_images(0, images=200, truths=5, detections=50, levels=10_000))
    start = time.process_time()
    curve = metric.curve()
    metric.summary("best")
    assert len(curve.thresholds) > 2000
    assert time.process_time() - start < 1


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 1000), order=st.permutations(range(6)), matching=st.sampled_from(MATCHINGS))
def test_image_order_does_not_matter(seed, order, matching):
    images = random_images(seed)
    one, other = collect(images, matching=matching), collect([images[i] for i in order], matching=matching)
    assert one.summary("best") == other.summary("best")
    assert one.summary(0.3) == other.summary(0.3)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 1000))
def test_no_matching_beats_the_maximum(seed):
    images = random_images(seed)
    hits = {m: collect(images, matching=m).summary(0.0).true_positives for m in MATCHINGS}
    assert max(hits.values()) == hits["max"]


def test_merge_equals_one_metric():
    images = random_images(3)
    left, right = collect(images[:2]), collect(images[2:])
    left.merge(right)
    assert left.summary("best") == collect(images).summary("best")
    with pytest.raises(ValueError, match="twice"):
        left.merge(right)
    with pytest.raises(ValueError, match="rules"):
        left.merge(DetectionMetric(iou_rules(0.7)))

"""Every rule of every protocol on small invented cases, and the golden table on the published results."""

import os
import time
from pathlib import Path

import numpy as np
import pytest
import shapely

from i3cl.errors import UserError
from i3cl.evaluation import scoring
from i3cl.evaluation.metrics.batch import EvalImage, measure_polygons
from i3cl.evaluation.metrics.matching import MATCHINGS
from i3cl.evaluation.metrics.metric import DetectionMetric
from i3cl.evaluation.metrics.protocols import PROTOCOLS, rules_of
from i3cl.evaluation.metrics.rctw_ap import polygon_ap

BOW_TIE = np.array([[0, 0], [10, 10], [10, 0], [0, 10]], float)
FLAT = np.array([[1, 1], [5, 5], [8, 8]], float)


def box(x0, y0, x1, y1):
    return np.array([[x0, y0], [x1, y0], [x1, y1], [x0, y1]], float)


def image(truths, detections, ignore=None, scores=None, name="1"):
    ignore = [False] * len(truths) if ignore is None else ignore
    scores = np.ones(len(detections)) if scores is None else scores
    return EvalImage(name, truths, np.array(ignore, bool), detections, np.asarray(scores, float))


def by(protocol, *images, threshold=None, **options):
    metric = DetectionMetric(rules_of(protocol, **options)[0])
    metric.update(images)
    return metric.summary(threshold)


WORKED = image(
    [box(0, 0, 100, 20), box(0, 40, 100, 60), box(0, 80, 60, 100)],
    [box(10, 0, 110, 20), box(0, 40, 50, 60), box(0, 80, 60, 100), box(20, 70, 60, 100), box(50, 90, 90, 120)],
    [False, False, True],
)


@pytest.mark.parametrize("protocol", ["icdar", "art", "lsvt", "ctw1500-v2", "mmocr"])
def test_worked_example(protocol):
    s = by(protocol, WORKED)
    assert (s.recall, s.precision, s.hmean) == pytest.approx((0.5, 1 / 3, 0.4))
    assert (s.truths, s.dont_cares, s.detections, s.dropped) == (2, 1, 3, 2)


# ------------------------------------------------------------------------------------------------------- IoU protocols


@pytest.mark.parametrize(("matching", "hits"), [("first", 1), ("best_gt", 1), ("max", 2), ("greedy", 2)])
def test_matching_orders(matching, hits):
    crowd = image([box(0, 0, 10, 10), box(0, 8, 10, 18)], [box(0, 0, 10, 18), box(0, 0, 10, 9)])
    assert by("icdar", crowd, matching=matching).recall_hits == hits


def test_art_takes_the_highest_iou():
    assert PROTOCOLS["art"][0].matching == PROTOCOLS["lsvt"][0].matching == "greedy"
    assert [r.iou for r in PROTOCOLS["art"]] == [0.5, 0.7]


@pytest.mark.parametrize(("width", "strict", "pascal"), [(50, 0, 0), (51, 1, 1)])
def test_half_is_a_miss_everywhere(width, strict, pascal):
    """Pascal's script takes >= 0.5 but adds 1 to the union, so an exact half fails too."""
    half = image([box(0, 0, 100, 20)], [box(0, 0, width, 20)])
    assert by("icdar", half).recall_hits == strict
    assert by("totaltext-iou", half).recall_hits == pascal


def test_pascal_union_margin():
    """99 / (99 + 101 - ... ) - areas chosen so that the plain IoU is above a half and the padded one below."""
    near = image([box(0, 0, 10, 10)], [box(0, 0, 10, 5.04)])
    assert by("icdar", near).recall_hits == 1
    assert by("totaltext-iou", near).recall_hits == 0
    exact = image([box(0, 0, 10, 10)], [box(0, 0, 10, 5.05)])
    assert by("totaltext-iou", exact).recall_hits == 1  # 50.5 / 101 = 0.5 counts


def test_dont_care_margin_of_total_text():
    """6 of 11 square pixels: 0.545 plainly; of (11 + 1) it is an exact half, which is not dropped."""
    small = image([box(0, 0, 6, 1)], [box(0, 0, 11, 1)], [True])
    assert by("icdar", small).dropped == 1
    assert by("totaltext-iou", small).dropped == 0
    assert by("totaltext-deteval", small).dropped == 0


def test_each_dont_care_on_its_own():
    s = by("icdar", image([box(0, 0, 45, 20), box(45, 0, 90, 20)], [box(0, 0, 100, 20)], [True, True]))
    assert (s.dropped, s.detections) == (0, 1)


def test_a_detection_without_area_is_a_false_positive():
    s = by("icdar", image([box(0, 0, 9, 9)], [FLAT], [True]))
    assert (s.dropped, s.detections, s.precision) == (0, 1, 0)
    turned_back = np.array([[0, 0], [5, 5], [0, 0]], float)
    assert by("icdar", image([box(0, 0, 9, 9)], [turned_back])).detections == 1


def test_a_truth_without_area_is_listed_and_does_not_count():
    s = by("icdar", image([FLAT, box(0, 0, 9, 9), np.array([[3.0, 3.0]])], [box(0, 0, 9, 9)]))
    assert (s.truths, s.dont_cares, s.invalid_truths, s.recall) == (1, 2, 2, 1)
    # Nothing was left to repair.
    assert by("icdar", image([FLAT], [FLAT, BOW_TIE])).repaired == 1


def test_half_is_a_miss_at_any_angle():
    """Half of a slanted word is exactly half of it, wherever it lies: the last bits of an area must not decide."""
    rng = np.random.default_rng(0)
    for _ in range(200):
        a, b, c = 2.0 * rng.integers(-400, 400, (3, 2))
        if abs(np.linalg.det(np.array([b, c]))) < 100:
            continue
        whole, half = (np.array([a, a + b, a + b + c * part, a + c * part]) for part in (1, 0.5))
        assert by("icdar", image([whole], [half])).recall_hits == 0
        assert by("icdar", image([half], [whole], [True])).dropped == 0


def test_fast_areas_are_the_exact_ones():
    rng = np.random.default_rng(1)
    turn = np.sort(rng.uniform(0, 2 * np.pi, (60, 12)), axis=1)
    stars = 100 + rng.uniform(20, 90, (60, 12, 1)) * np.stack([np.cos(turn), np.sin(turn)], axis=2)
    polygons = [star[: 3 + k % 10] for k, star in enumerate(stars)]
    batch = measure_polygons([image(polygons[:30], polygons[30:])])
    exact = shapely.area(shapely.intersection(batch.truths[:, None], batch.detections[None]))
    found = np.zeros(exact.shape)
    found[batch.truth, batch.detection] = batch.intersection
    np.testing.assert_allclose(found, exact, atol=1e-8)
    assert (exact > 0).sum() > 500


@pytest.mark.parametrize(("repair", "area"), [("make_valid", 50), ("buffer0", 25)])
def test_bow_ties(repair, area):
    batch = measure_polygons([image([BOW_TIE], [BOW_TIE, box(0, 0, 10, 10)])], repair)
    assert batch.truth_area.tolist() == batch.detection_area[:1].tolist() == [area]
    s = by("icdar", image([BOW_TIE], [BOW_TIE]), repair=repair)
    assert (s.recall_hits, s.repaired) == (1, 2)


def test_ctw1500_v1_has_no_dont_care_and_skips_invalid_detections():
    words = [box(0, 0, 100, 20), box(0, 40, 100, 60)]
    s = by("ctw1500-v1", image(words, [words[0], BOW_TIE + 200, FLAT + 300], [False, True]))
    assert (s.truths, s.dont_cares, s.detections, s.skipped) == (2, 0, 1, 2)
    assert (s.recall, s.precision) == (0.5, 1)
    assert by("ctw1500-v2", image(words, [words[0], BOW_TIE + 200, FLAT + 300], [False, True])).detections == 3
    with pytest.raises(UserError, match="no truth"):
        scoring.score([image([], [words[0]])], PROTOCOLS["ctw1500-v1"])


def test_totals_are_summed_and_images_without_truth_cost_precision():
    word = box(0, 0, 100, 20)
    s = by("icdar", image([word], [word]), image([], [word, word], name="2"), image([word] * 2, [], name="3"))
    assert (s.recall, s.precision, s.hmean) == pytest.approx((1 / 3, 1 / 3, 1 / 3))


def test_degenerate_data_sets():
    word = box(0, 0, 9, 9)
    for nothing in ([], [image([], [])], [image([word], [], [True])]):
        s = by("icdar", *nothing)
        assert (s.recall, s.precision, s.hmean) == (0, 0, 0)
        s = by("mmocr", *nothing)
        assert (s.recall, s.precision, s.hmean) == (1, 1, 1)
    s = by("mmocr", image([], [word]))
    assert (s.recall, s.precision, s.hmean) == (1, 0, 0)
    assert by("icdar", image([], [word])).detections == 1


def test_score_thresholds():
    word = box(0, 0, 9, 9)
    scored = image([word], [word], scores=[0.5])
    assert by("icdar", scored, threshold=0.5).detections == 0
    assert by("icdar", scored, threshold=0.49).detections == 1
    assert by("mmocr", scored, threshold=0.5).detections == 1


def test_mmocr_sweeps_on_the_test_set_and_says_so():
    words = [box(0, y, 50, y + 10) for y in range(0, 100, 20)]
    wrong = [box(200, y, 250, y + 10) for y in range(0, 100, 20)]
    scored = scoring.score([image(words, words + wrong, scores=[0.9] * 5 + [0.6] * 5)], PROTOCOLS["mmocr"])
    assert scored.summary.hmean == 1
    assert "optimistic" in scored.choice
    fixed = {c.threshold: c.summary().hmean for c in scored.counts}
    assert len(fixed) == 7
    assert fixed[0.3] == pytest.approx(2 / 3)
    # A score of exactly 0.7 or 0.9 counts there, whatever binary fractions do; nothing under 0.3 ever does.
    assert scoring.score([image(words, words, scores=[0.9] * 5)], PROTOCOLS["mmocr"]).counts[-1].summary().hmean == 1
    assert scoring.score([image(words, words, scores=[0.2] * 5)], PROTOCOLS["mmocr"]).summary.hmean == 0


# ------------------------------------------------------------------------------------------------------------- DetEval


def test_deteval_split():
    s = by(
        "totaltext-deteval",
        image(
            [box(0, 0, 100, 20), box(0, 40, 100, 60)],
            [box(0, 0, 100, 20), box(0, 40, 48, 60), box(52, 40, 100, 60)],
        ),
    )
    assert (s.recall, s.precision) == pytest.approx((0.9, 2.6 / 3))


def test_deteval_merge():
    merged = image([box(0, 0, 100, 20), box(0, 24, 100, 44)], [box(0, 0, 100, 44)])
    s = by("totaltext-deteval", merged)
    assert (s.recall, s.precision) == pytest.approx((0.8, 0.8))


@pytest.mark.parametrize(("merge", "recall"), [("python", 0.8), ("matlab", 0)])
def test_deteval_merge_rules_differ(merge, recall):
    """Both truths are covered by 0.65: above tp 0.6, below tr 0.7."""
    partly = image([box(0, 0, 100, 20), box(0, 20, 100, 40)], [box(0, 7, 100, 33)])
    assert by("totaltext-deteval", partly, merge=merge).recall == pytest.approx(recall)


@pytest.mark.parametrize(("width", "hits"), [(70, 0), (70.4, 0), (71, 1)])
def test_deteval_is_strict_and_rounds(width, hits):
    """0.704 is rounded to 0.70, which is not above it."""
    assert by("totaltext-deteval", image([box(0, 0, 100, 20)], [box(0, 0, width, 20)])).recall_hits == hits


def test_deteval_thresholds():
    loose = image([box(0, 0, 100, 20)], [box(0, 0, 200, 20)])  # sigma 1, tau 0.5
    assert by("totaltext-deteval", loose).recall == 0
    assert by("totaltext-deteval", loose, recall_threshold=0.8, precision_threshold=0.4).recall == 1
    assert [r.label for r in PROTOCOLS["totaltext-deteval"]] == ["DetEval 0.7/0.6", "DetEval 0.8/0.4"]


def test_deteval_of_nothing():
    for nothing in (image([], []), image([box(0, 0, 9, 9)], []), image([], [box(0, 0, 9, 9)])):
        assert by("totaltext-deteval", nothing).hmean == 0


# ---------------------------------------------------------------------------------------------------- TIoU, AP, options


def test_tiou_pays_for_what_is_left_out():
    s = by("tiou", image([box(0, 0, 100, 20)], [box(0, 0, 80, 20)]))
    assert s.recall == pytest.approx(0.8 * 0.8)
    assert s.precision == pytest.approx(0.8)


def test_tiou_pays_for_other_truths():
    """The detection takes in 10 of the 30 rows of another truth, a don't-care one too; 1/100 is free of charge."""
    truths = [box(0, 0, 100, 20), box(0, 20, 100, 50)]
    for ignore in ([False, False], [False, True]):
        s = by("tiou", image(truths, [box(0, 0, 100, 30)], ignore))
        assert s.precision_hits == pytest.approx(2 / 3 * (1 - 1 / 3))
        assert s.recall_hits == pytest.approx(2 / 3)
    assert by("tiou", image([box(0, 0, 100, 20)], [box(0, 0, 99, 20)])).recall == pytest.approx(0.99)


def test_rctw_ap():
    words = [box(0, 0, 50, 10), box(0, 20, 50, 30)]
    wrong = box(200, 0, 250, 10)
    assert polygon_ap(measure_polygons([image(words, words)])) == 1
    # Ranked right, wrong, right: precision 1 and 2/3 at the two recalls.
    ranked = image(words, [*words, wrong], scores=[0.9, 0.5, 0.7])
    assert polygon_ap(measure_polygons([ranked])) == pytest.approx((1 + 2 / 3) / 2)
    twice = image(words[:1], [words[0], words[0]], scores=[0.9, 0.8])
    assert polygon_ap(measure_polygons([twice])) == 1
    assert polygon_ap(measure_polygons([image([], [wrong])])) == polygon_ap(measure_polygons([image(words, [])])) == 0


def test_options_that_do_not_exist():
    with pytest.raises(UserError, match="icdar"):
        rules_of("icdr")
    with pytest.raises(UserError, match="--tr"):
        rules_of("icdar", recall_threshold=0.5)
    with pytest.raises(UserError, match="--matching"):
        rules_of("totaltext-deteval", matching="max")
    with pytest.raises(UserError, match="0 to 1"):
        rules_of("icdar", iou=50)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_rules_say_what_is_done(protocol):
    for rules in PROTOCOLS[protocol]:
        text = rules.text
        assert ("DetEval" in text) == (protocol == "totaltext-deteval")
        assert str(rules.iou) in text or rules.method == "deteval"
        assert rules.repair in text


def test_merging_metrics_equals_one_metric():
    images = [image([box(0, 0, 50, 10)], [box(0, 0, k + 10, 10)], name=str(k)) for k in range(40)]
    whole, left, right = (DetectionMetric(PROTOCOLS["tiou"][0]) for _ in range(3))
    whole.update(images)
    left.update(images[:15])
    right.update(images[15:])
    left.merge(right)
    assert left.summary() == whole.summary()
    with pytest.raises(ValueError, match="twice"):
        left.merge(right)
    with pytest.raises(ValueError, match="rules"):
        left.merge(DetectionMetric(PROTOCOLS["icdar"][0]))


def test_a_batch_equals_its_images():
    rng = np.random.default_rng(0)
    images = []
    for k in range(20):
        corner = rng.uniform(-50, 3000, (8, 2))
        truths = [box(x, y, x + 80, y + 30) for x, y in corner]
        found = [t + rng.normal(0, 12, 2) for t in truths]
        images.append(image(truths, found, rng.random(8) < 0.3, name=str(k)))
    for rules in (r for each in PROTOCOLS.values() for r in each):
        together, single = DetectionMetric(rules), DetectionMetric(rules)
        together.update(images)
        for each in images:
            single.update([each])
        assert together.counts().table == pytest.approx(single.counts().table)


def test_adelaidet_steps():
    word = box(0.9, 0.9, 50.7, 10.2)
    prepared, dropped = scoring.adelaidet_steps([image([word], [word, word, BOW_TIE], scores=[0.9, 0.1, 0.9])])
    assert dropped == 2
    assert prepared[0].detections[0].tolist() == box(0, 0, 50, 10).tolist()


# -------------------------------------------------------------------------------------------------------------- golden

SHARED = Path(os.environ.get("I3CL_SHARED", Path(__file__).resolve().parents[2].parent / "shared"))
GOLDEN = SHARED / "golden-eval"
golden = pytest.mark.skipif(not GOLDEN.is_dir(), reason="no golden-eval folder; I3CL_SHARED names its parent")
CTW, TOTAL = ("ctw1500-gt.zip", "det_ctw1500.zip"), ("total-text-gt.zip", "total-text_baseline.zip")
_LOADED: dict = {}


def loaded(pair):
    if pair not in _LOADED:
        paired, warnings = scoring.load(str(GOLDEN / pair[0]), str(GOLDEN / pair[1]))
        assert not warnings
        _LOADED[pair] = measure_polygons(paired.images, "make_valid"), measure_polygons(paired.images, "buffer0")
    return _LOADED[pair]


@golden
@pytest.mark.parametrize(
    ("files", "protocol", "options", "truths", "kept", "rates"),
    [
        (CTW, "ctw1500-v2", {}, 3068, 3340, (0.8162, 0.7497, 0.7815)),
        (CTW, "ctw1500-v1", {}, 3068, 3340, (0.8162, 0.7497, 0.7815)),
        (CTW, "icdar", {"iou": 0.7}, 3068, 3340, (0.6245, 0.5737, 0.5980)),
        (CTW, "tiou", {}, 3068, 3340, (0.520, 0.572, 0.545)),
        (TOTAL, "icdar", {}, 2214, 1932, (0.7014, 0.8038, 0.7492)),
        (TOTAL, "mmocr", {}, 2214, 1932, (0.7014, 0.8038, 0.7492)),
        (TOTAL, "icdar", {"iou": 0.7}, 2214, 1932, (0.5479, 0.6278, 0.5851)),
        (TOTAL, "tiou", {}, 2214, 1932, (0.479, 0.619, 0.540)),
        (TOTAL, "totaltext-deteval", {}, 2214, 1932, (0.6822, 0.7847, 0.7299)),
        (
            TOTAL,
            "totaltext-deteval",
            {"recall_threshold": 0.8, "precision_threshold": 0.4},
            2214,
            1932,
            (0.5956, 0.6825, 0.6361),
        ),
    ],
)
def test_golden_numbers(files, protocol, options, truths, kept, rates):
    for batch in loaded(files):
        metric = DetectionMetric(rules_of(protocol, **options)[0])
        metric.update(batch)
        s = metric.summary()
        assert (s.truths, s.detections) == (truths, kept)
        tolerance = 5e-4 if protocol == "tiou" else 5e-5
        assert (s.recall, s.precision, s.hmean) == pytest.approx(rates, abs=tolerance)


@golden
@pytest.mark.parametrize("matching", MATCHINGS)
@pytest.mark.parametrize(("files", "iou", "hits"), [(CTW, 0.5, 2504), (CTW, 0.7, 1916), (TOTAL, 0.5, 1553), (TOTAL, 0.7, 1213)])
def test_golden_numbers_by_every_matching(files, iou, hits, matching):
    metric = DetectionMetric(rules_of("icdar", iou=iou, matching=matching)[0])
    metric.update(loaded(files)[0])
    assert metric.summary().true_positives == hits


@golden
def test_golden_set_is_quick():
    """500 images with 3,068 x 3,340 polygons; a wide margin for busy machines."""
    start = time.process_time()
    paired, _ = scoring.load(str(GOLDEN / CTW[0]), str(GOLDEN / CTW[1]))
    metric = DetectionMetric(PROTOCOLS["icdar"][0])
    metric.update(paired.images)
    assert metric.summary().recall_hits == 2504
    assert time.process_time() - start < 2.5

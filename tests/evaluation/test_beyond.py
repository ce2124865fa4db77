"""Intervals, kinds of error, groups, and what is said about results with a usual mistake."""

import numpy as np
import pytest

from i3cl.evaluation import scoring
from i3cl.evaluation.analysis import intervals as stats
from i3cl.evaluation.analysis.advice import diagnose
from i3cl.evaluation.analysis.error_kinds import breakdown, kinds
from i3cl.evaluation.metrics.batch import EvalImage, measure_polygons
from i3cl.evaluation.metrics.judge import judge
from i3cl.evaluation.metrics.protocols import PROTOCOLS

ICDAR = PROTOCOLS["icdar"][0]


def box(x0, y0, x1, y1):
    return np.array([[x0, y0], [x1, y0], [x1, y1], [x0, y1]], float)


def sample(truths, detections, name="1", scores=None, **more):
    scores = np.ones(len(detections)) if scores is None else np.asarray(scores, float)
    return EvalImage(name, truths, np.zeros(len(truths), bool), detections, scores, **more)


# ----------------------------------------------------------------------------------------------------------- intervals


def rows(hits, images=200, seed=0):
    """Images of ten truths and ten detections, each found with this probability."""
    rng = np.random.default_rng(seed)
    found = rng.binomial(10, hits, images)
    return np.stack([found, np.full(images, 10), found, np.full(images, 10)], axis=1).astype(float)


def test_interval_covers_and_narrows():
    wide, narrow = stats.hmean_interval(rows(0.7, 50)), stats.hmean_interval(rows(0.7, 2000))
    assert wide.low < 0.7 < wide.high
    assert narrow.high - narrow.low < (wide.high - wide.low) / 3
    # The standard error of a binomial share of 20,000 is 0.0032.
    assert narrow.high - narrow.low == pytest.approx(4 * 0.0032, rel=0.2)


def test_comparison_tells_a_difference_from_none():
    a, same, better = rows(0.7, seed=1), rows(0.7, seed=2), rows(0.76, seed=3)
    assert stats.compare(a, a).p_value == 1
    assert stats.compare(a, same).p_value > 0.05
    clear = stats.compare(better, a)
    assert clear.p_value < 0.01
    assert 0 < clear.interval.low < clear.difference < clear.interval.high
    with pytest.raises(ValueError, match="same images"):
        stats.compare(a, a[:5])


def test_no_images():
    nothing = np.zeros((0, 4))
    assert stats.hmean_interval(nothing) == stats.Interval(0, 0)
    assert stats.compare(nothing, nothing).difference == 0


# -------------------------------------------------------------------------------------------------------------- errors


def kinds_of(truths, detections):
    batch = measure_polygons([sample(truths, detections)])
    return kinds(batch, judge(batch, ICDAR))


def test_kinds_of_error():
    word = box(0, 0, 100, 20)
    cases = {
        "found": ([word], [word], ["found"], ["right"]),
        "fragmented": ([word], [box(0, 0, 45, 20), box(50, 0, 100, 20)], ["fragmented"], ["fragment", "fragment"]),
        "merged": ([word, box(0, 22, 100, 42)], [box(0, 0, 100, 42)], ["merged", "merged"], ["merging"]),
        "loose": ([word], [box(0, 0, 40, 20)], ["loose"], ["loose"]),
        "missed": ([word], [box(300, 0, 400, 20), box(0, 0, 20, 20)], ["missed"], ["false", "false"]),
        "duplicate": ([word], [word, word + 1], ["found"], ["right", "duplicate"]),
        "none": ([word], [], ["missed"], []),
    }
    for name, (truths, detections, of_truths, of_detections) in cases.items():
        result = kinds_of(truths, detections)
        assert result.truth.tolist() == of_truths, name
        assert result.detection.tolist() == of_detections, name


def test_a_fracture_whose_largest_piece_scores_is_counted():
    result = kinds_of([box(0, 0, 100, 20)], [box(0, 0, 60, 20), box(60, 0, 100, 20)])
    assert (result.fractured, result.truth.tolist()) == (1, ["found"])
    assert kinds_of([box(0, 0, 100, 20)], [box(0, 0, 100, 20), box(1, 0, 99, 20)]).fractured == 0


def test_groups():
    curved = np.array([[0, 60], [50, 0], [100, 60], [85, 70], [50, 25], [15, 70]], float)
    straight, small = box(200, 0, 400, 30), box(0, 300, 30, 308)
    image = sample([curved, straight, small], [straight], languages=("Latin", "Latin", "Chinese"))
    batch = measure_polygons([image])
    groups = {(g.by, g.name): g for g in breakdown([image], batch, judge(batch, ICDAR))}
    assert groups["curvature", "curved"].recall == 0
    assert groups["curvature", "straight"].truths == 2
    assert (groups["size", "short side < 10 px"].truths, groups["size", "20-40 px"].recall) == (1, 1)
    assert groups["aspect", "5-10"].precision == 1
    assert (groups["language", "Latin"].recall, groups["language", "Chinese"].recall) == (0.5, 0)
    assert groups["size", "10-20 px"].recall is None


# ----------------------------------------------------------------------------------------------------------- diagnosis


def photographs(count=30, move=lambda polygon, k: polygon, seed=0):
    """Images of eight words whose detections were moved by a mistake."""
    rng = np.random.default_rng(seed)
    result = []
    for k in range(count):
        corners = rng.uniform(0, 1, (8, 2)) * (1100, 700)
        words = [box(x, y, x + 60 + 10 * i, y + 25) for i, (x, y) in enumerate(corners)]
        found = [move(word + rng.normal(0, 1, 2), k) for word in words[:7]]
        result.append(sample(words, found, f"img_{k + 1}.jpg", np.full(7, 0.5), height=800, width=1280))
    return result


def corners_as_sizes(polygon, _):
    (x0, y0), (x1, y1) = polygon[0], polygon[2]
    return box(x0, y0, x1 - x0, y1 - y0)


@pytest.mark.parametrize(
    ("kind", "words", "move"),
    [
        ("swapped", "--point-order yx", lambda p, k: p[:, ::-1]),
        ("scale", "multiply them by", lambda p, k: p * 0.73),
        ("scale", "multiply them by", lambda p, k: p * (0.5, 0.8)),
        ("scale", "relative to the image (0-1);", lambda p, k: p / (1280, 800)),
        ("scale", "relative to the image (0-100);", lambda p, k: p / (12.8, 8)),
        ("scale", "relative to the image (0-1000);", lambda p, k: p / (1.28, 0.8)),
        ("flipped", "from the bottom", lambda p, k: p * (1, -1) + (0, 800)),
        ("scale", "long side of 640", lambda p, k: p * 0.5 + 0.0),
        ("offset", "add (-120, 40)", lambda p, k: p + np.array([120, -40])),
        ("boxes", "x, y, width, height", corners_as_sizes),
    ],
)
def test_mistakes_in_coordinates(kind, words, move):
    images = photographs(move=move)
    found = diagnose(images, ICDAR)
    assert found[0].kind == kind
    assert found[0].hmean > 0.75
    if "long side" not in words:  # a common factor explains that one as well
        assert words in found[0].text


def test_boxes_written_the_other_way():
    images = photographs(move=lambda p, k: box(*p[0], *(p[0] + p[2])))
    assert diagnose(images, ICDAR)[0].kind == "boxes"


@pytest.mark.parametrize("shift", [1, -1])
def test_shifted_images(shift):
    right = photographs()
    wrong = []
    for k, image in enumerate(right):
        other = right[(k + shift) % len(right)]
        wrong.append(EvalImage(image.name, image.truths, image.ignore, other.detections, other.scores))
    advice = diagnose(wrong, ICDAR)
    assert advice[0].kind == "image ids"
    assert advice[0].hmean > 0.75


@pytest.mark.parametrize("numbered_as_text", [True, False])
def test_images_counted_in_text_order(numbered_as_text):
    right = photographs()
    by_text = sorted(range(30), key=lambda k: right[k].name)
    wrong: list = [None] * 30
    for place, k in enumerate(by_text):
        image, found = (right[place], right[k]) if numbered_as_text else (right[k], right[place])
        place = place if numbered_as_text else k
        wrong[place] = EvalImage(image.name, image.truths, image.ignore, found.detections, found.scores)
    best = diagnose(wrong, ICDAR)[0]
    assert ("numbered by file names sorted as text" in best.text) == numbered_as_text
    assert ("where the truth counts names sorted as text" in best.text) != numbered_as_text
    assert best.hmean > 0.75


def test_shares_without_image_sizes():
    words = [box(100, 50, 200, 80)]
    advice = diagnose([sample(words, [words[0] / 1000])], ICDAR)
    assert "no sizes to try" in advice[0].text


def test_one_chance_hit_is_no_advice():
    rows = [(0, 0), (0, 40), (0, 80), (110, 80), (0, 120), (0, 160), (300, 0)]
    words = [box(x, y, x + 100, y + 20) for x, y in rows]
    parts = [box(0, 40, 45, 60), box(50, 40, 100, 60), box(0, 80, 210, 100), box(0, 130, 100, 150)]
    found = [box(2, 0, 100, 20), *parts, box(500, 500, 560, 530), box(2, 0, 98, 20)]
    advice = diagnose([sample(words, found, height=2000, width=2000)], ICDAR)
    assert advice == []


def test_thresholds_and_empty_results():
    images = photographs()
    assert "highest is 0.5" in diagnose(images, ICDAR, 0.6)[0].text
    assert diagnose(images, ICDAR) == []
    empty = [sample(image.truths, [], image.name) for image in images]
    assert "no detection" in diagnose(empty, ICDAR)[0].text
    half = empty[:20] + images[20:]
    assert "20 of 30 images have no detection" in diagnose(half, ICDAR)[0].text


def test_right_results_get_no_advice():
    assert scoring.advice(scoring.score(photographs(), PROTOCOLS["icdar"])) == []


# ------------------------------------------------------------------------------------------------ choosing a threshold


def test_the_threshold_is_chosen_on_other_images():
    rng = np.random.default_rng(0)
    images = []
    for k in range(60):
        words = [box(0, 40 * i, 100, 40 * i + 20) for i in range(5)]
        wrong = [word + np.array([500, 0]) for word in words]
        scores = np.concatenate([rng.uniform(0.5, 1, 5), rng.uniform(0, 0.45, 5)])
        images.append(sample(words, words + wrong, str(k), scores))
    validation, rest = scoring.split_off(images, "0.3")
    assert {s.name for s in validation} | {s.name for s in rest} == {s.name for s in images}
    assert len(validation) + len(rest) == 60
    assert [s.name for s in scoring.split_off(images, "0.3")[0]] == [s.name for s in validation]
    threshold, hmean = scoring.best_threshold(validation, ICDAR)
    assert 0.44 <= threshold <= 0.51
    assert hmean == 1
    scored = scoring.score(rest, PROTOCOLS["icdar"], threshold)
    assert scored.summary.hmean > 0.99
    table = scoring.sweep(scored.batch, ICDAR, (0.0, 0.5))
    assert table[0]["precision"] == pytest.approx(0.5)

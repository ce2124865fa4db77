import numpy as np
import pytest

from i3cl.evaluation.metrics.batch import EvalImage
from i3cl.evaluation.metrics.coco_ap import coco_box_ap, coco_mask_ap


def box(x0, y0, x1, y1):
    return [[x0, y0], [x1, y0], [x1, y1], [x0, y1]]


def record(truths, ignore, detections, scores, side=200):
    rings, found = ([np.array(p, float) for p in polygons] for polygons in (truths, detections))
    return EvalImage("1", rings, np.array(ignore, bool), found, np.array(scores, float), height=side, width=side)


WORDS = [box(10, 10, 60, 30), box(10, 50, 90, 70), [[100, 100], [150, 90], [160, 120], [110, 130]]]


@pytest.mark.parametrize("measure", [coco_mask_ap, coco_box_ap])
def test_perfect_detections(measure):
    result = measure([record(WORDS, [False] * 3, WORDS, [0.9, 0.8, 0.7]), record([], [], [], [])])
    assert result == pytest.approx({"AP": 1, "AP50": 1, "AP75": 1})


def test_iou_thresholds():
    """IoU 80/120 = 0.667 passes 0.50, 0.55, 0.60 and 0.65: four of the ten thresholds."""
    result = coco_box_ap([record([box(0, 0, 100, 20)], [False], [box(20, 0, 120, 20)], [1])])
    assert result == pytest.approx({"AP": 0.4, "AP50": 1, "AP75": 0})


def test_masks_are_not_boxes():
    triangle = [[0, 0], [100, 0], [0, 100]]
    shown = [record([triangle], [False], [box(0, 0, 100, 100)], [1])]
    assert coco_box_ap(shown)["AP"] == pytest.approx(1)
    assert coco_mask_ap(shown)["AP75"] == 0


def test_order_of_scores():
    """A false positive before the only right one halves the precision at every recall."""
    detections = [WORDS[0], box(150, 150, 190, 190)]
    assert coco_mask_ap([record(WORDS[:1], [False], detections, [0.3, 0.8])])["AP50"] == pytest.approx(0.5)
    assert coco_mask_ap([record(WORDS[:1], [False], detections, [0.8, 0.3])])["AP50"] == pytest.approx(1)


def test_dont_care_counts_neither_way():
    inside = [box(15, 52, 40, 68), box(50, 52, 80, 68)]
    detections = [WORDS[0], *inside]
    for measure in (coco_mask_ap, coco_box_ap):
        result = measure([record(WORDS[:2], [False, True], detections, [0.5, 0.9, 0.8])])
        assert result["AP"] == pytest.approx(1)


def test_detections_beyond_the_limit_do_not_count():
    many = [box(x, y, x + 8, y + 8) for y in range(0, 200, 10) for x in range(0, 200, 10)][:150]
    shown = [record(many, [False] * 150, many, np.linspace(1, 0.1, 150))]
    assert coco_mask_ap(shown)["AP"] == pytest.approx(1)
    # Recall stops at 2/3: of the 101 recall points those up to 0.66 have precision 1.
    assert coco_mask_ap(shown, max_detections=100)["AP"] == pytest.approx(67 / 101)


def test_no_truths_or_detections():
    nothing = {"AP": -1, "AP50": -1, "AP75": -1}
    assert coco_mask_ap([]) == nothing
    assert coco_mask_ap([record([], [], [], [])]) == nothing
    assert coco_mask_ap([record([], [], WORDS, [0.1] * 3)]) == nothing
    assert coco_mask_ap([record(WORDS, [True] * 3, [], [])]) == nothing
    assert coco_mask_ap([record(WORDS, [False] * 3, [], [])]) == {"AP": 0, "AP50": 0, "AP75": 0}


def test_polygons_that_leave_the_image_are_cut():
    result = coco_mask_ap([record([box(150, 150, 200, 200)], [False], [box(150, 150, 300, 300)], [1])])
    assert result["AP"] == pytest.approx(1)


def test_prints_nothing(capsys):
    coco_mask_ap([record(WORDS, [False] * 3, WORDS, [0.9, 0.8, 0.7])])
    assert capsys.readouterr() == ("", "")


def test_bad_input():
    with pytest.raises(ValueError, match="3 truths but 1 ignore flags"):
        coco_mask_ap([record(WORDS, [False], [], [])])
    with pytest.raises(ValueError, match="3 detections but 2 scores"):
        coco_mask_ap([record([], [], WORDS, [0.5, 0.5])])
    with pytest.raises(ValueError, match="max_detections"):
        coco_mask_ap([], max_detections=0)


def test_without_an_image_size_the_frame_reaches_as_far_as_the_polygons():
    word = np.array(box(10, 10, 60, 30), float)
    image = EvalImage("1", [word, word[:2]], np.array([False, False]), [word], np.ones(1))
    assert coco_mask_ap([image])["AP"] == pytest.approx(1)  # the truth of two points is left out

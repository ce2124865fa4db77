import json

import numpy as np
import pytest
import shapely

from i3cl import geometry
from i3cl.detections import Detections

SQUARE = np.array([[10, 20], [30, 20], [30, 40], [10, 40]], np.float32)


def some(**changes) -> Detections:
    fields = {"polygons": [SQUARE, SQUARE + 5.25], "scores": [0.9, 0.45], "height": 60, "width": 100}
    return Detections(**{**fields, **changes})


def test_construction():
    found = some(image_id=3, name="a.jpg")
    assert len(found) == 2 and found.scores.dtype == np.float32 and found.image_id == 3
    np.testing.assert_allclose(found.boxes, [[10, 20, 30, 40], [15.25, 25.25, 35.25, 45.25]])
    polygons, scores = zip(*found, strict=True)
    np.testing.assert_array_equal(polygons[0], SQUARE)
    assert scores == (pytest.approx(0.9), pytest.approx(0.45))
    own = some(boxes=np.zeros((2, 4)))
    assert (own.boxes == 0).all() and own.boxes.dtype == np.float32


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scores": [0.9]}, "2 polygons but scores of shape"),
        ({"scores": [[0.9, 0.5]]}, "2 polygons but scores of shape"),
        ({"scores": [0.9, 1.1]}, "not in 0-1"),
        ({"scores": [0.9, -0.1]}, "not in 0-1"),
        ({"scores": [0.9, np.nan]}, "not in 0-1"),
        ({"boxes": np.zeros((1, 4))}, "2 polygons but boxes of shape"),
        ({"boxes": np.full((2, 4), np.inf)}, "not finite"),
        ({"polygons": [SQUARE, SQUARE[:2]]}, "at least 3 points"),
        ({"polygons": [SQUARE, SQUARE * np.nan]}, "not finite"),
        ({"polygons": []}, "0 polygons but scores of shape"),
        ({"height": 0}, "0 x 100 pixels"),
    ],
)
def test_what_does_not_fit_together_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        some(**changes)


def test_nothing_found():
    for scores in ([], np.zeros(0)):
        found = Detections([], scores, 60, 100)
        assert len(found) == 0 and list(found) == [] and found.boxes.shape == (0, 4)
        assert found.scores.shape == (0,)
        assert found.to_coco(1) == [] and found.to_art() == [] and found.to_icdar_text() == ""
        assert len(found.filter(0.5)) == 0
        image = np.zeros((60, 100, 3), np.uint8)
        np.testing.assert_array_equal(found.draw(image), image)


def test_filter_is_strict():
    kept = some(boxes=[[0, 0, 1, 1], [2, 2, 3, 3]], name="a.jpg").filter(0.45)
    assert len(kept) == 1 and kept.scores[0] == np.float32(0.9) and kept.name == "a.jpg"
    np.testing.assert_array_equal(kept.boxes, [[0, 0, 1, 1]])
    assert len(some().filter(0)) == 2 and len(some().filter(1)) == 0


def test_to_coco():
    results = some().to_coco(7)
    assert results[1] == {
        "image_id": 7,
        "category_id": 1,
        "bbox": [15.25, 25.25, 20, 20],
        "segmentation": [[15.25, 25.25, 35.25, 25.25, 35.25, 45.25, 15.25, 45.25]],
        "score": pytest.approx(0.45),
    }
    json.dumps(results, allow_nan=False)
    assert some(image_id=4).to_coco()[0]["image_id"] == 4
    with pytest.raises(ValueError, match="needs an image id"):
        some().to_coco()


def ring(points) -> list:
    """The points from the smallest on, so that only their order counts."""
    start = min(range(len(points)), key=lambda i: points[i])
    return points[start:] + points[:start]


def test_to_art_by_hand():
    # Counter-clockwise, off the pixel grid, with a point in the middle of a side.
    polygon = np.array([[10.4, 20.4], [9.6, 39.6], [20, 40.3], [30.2, 40.1], [30.4, 19.7]], np.float32)
    (entry,) = Detections([polygon], [0.5], 60, 100).to_art()
    assert entry["confidence"] == 0.5
    assert ring(entry["points"]) == [[10, 20], [30, 20], [30, 40], [10, 40]]
    assert all(type(v) is int for point in entry["points"] for v in point)
    json.dumps(entry)


def test_to_art_drops_low_scores_and_what_is_no_ring():
    assert len(some().to_art()) == 1 and len(some().to_art(0.4)) == 2
    speck = np.array([[10.1, 10.1], [10.3, 10.1], [10.3, 10.4]], np.float32)
    needle = np.array([[10, 10], [30, 10.2], [50, 10]], np.float32)
    assert Detections([speck, needle], [0.9, 0.9], 60, 100).to_art() == []


def test_rings_never_cross_themselves():
    bow_tie = np.array([[10, 10], [40, 40], [40, 10], [10, 44]], np.float32)
    (entry,) = Detections([bow_tie], [0.9], 60, 100).to_art()
    assert shapely.Polygon(entry["points"]).is_valid
    rng = np.random.default_rng(0)
    wild = [rng.uniform(0, 60, (n, 2)).astype(np.float32) for n in range(3, 12) for _ in range(20)]
    found = Detections(wild, np.ones(len(wild)), 60, 100)
    entries = found.to_art()
    assert len(entries) > 150
    for entry in entries:
        polygon = shapely.Polygon(entry["points"])
        assert polygon.is_valid and polygon.area > 0 and len(entry["points"]) >= 3
        # Clockwise on screen is counter-clockwise with y up.
        assert shapely.is_ccw(shapely.LinearRing(entry["points"]))


def test_simplification_is_half_a_percent_of_the_perimeter():
    angles = np.linspace(0, 2 * np.pi, 400, endpoint=False)
    circle = np.stack([300 + 200 * np.cos(angles), 300 + 200 * np.sin(angles)], axis=1).astype(np.float32)
    (entry,) = Detections([circle], [0.9], 600, 600).to_art()
    assert 8 <= len(entry["points"]) <= 40
    assert geometry.overlaps([circle], [np.array(entry["points"], np.float32)]).iou[0] > 0.95


def test_to_icdar_text():
    text = some().to_icdar_text()
    assert len(text.splitlines()) == 2 and text.endswith("\n")
    numbers = [int(v) for v in text.splitlines()[0].split(",")]
    assert ring(np.reshape(numbers, (-1, 2)).tolist()) == SQUARE.astype(int).tolist()
    assert some().to_icdar_text(with_score=True).splitlines()[0].endswith(",0.9000")


def test_draw_leaves_the_image_alone():
    image = np.full((60, 100, 3), 50, np.uint8)
    drawn = some().draw(image, scores=False)
    assert (image == 50).all() and drawn.shape == image.shape and drawn.dtype == np.uint8
    assert (drawn[20, 15:25] != 50).any(axis=1).all() or (drawn[19, 15:25] != 50).any(axis=1).all()
    assert (drawn[30, 22] == 50).all() and (drawn[5, 5] == 50).all()
    assert (some().draw(image) != drawn).any()
    with pytest.raises(ValueError, match="image of shape"):
        some().draw(image[:50])

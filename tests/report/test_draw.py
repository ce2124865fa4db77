"""Outlines, weight colours and picture sizes."""

from __future__ import annotations

import numpy as np
import pytest

from i3cl.report.draw import IGNORED, draw_polygons, fit, weight_colour

SQUARE = np.array([(10, 10), (40, 10), (40, 30), (10, 30)], np.float32)
RED, BLUE = (255, 0, 0), (0, 0, 255)


def blank(height: int = 50, width: int = 60) -> np.ndarray:
    return np.full((height, width, 3), 200, np.uint8)


def test_outline_lies_on_the_edge_and_leaves_the_picture_alone() -> None:
    image = blank()
    drawn = draw_polygons(image, [SQUARE], RED, thickness=2)
    assert (image == 200).all()
    # The edge y = 10 lies between pixel rows 9 and 10.
    assert (drawn[9:11, 15:35] == RED).all()
    assert (drawn[15:25, 15:35] == 200).all()


def test_one_colour_each() -> None:
    drawn = draw_polygons(blank(), [SQUARE, SQUARE + 15], [RED, BLUE])
    assert (drawn == RED).all(axis=2).any() and (drawn == BLUE).all(axis=2).any()


def test_no_polygons_and_three_polygons_of_one_colour() -> None:
    assert np.array_equal(draw_polygons(blank(), [], RED), blank())
    assert np.array_equal(draw_polygons(blank(), [], [], labels=[]), blank())
    assert np.array_equal(draw_polygons(blank(), [SQUARE] * 3, RED), draw_polygons(blank(), [SQUARE] * 3, [RED] * 3))


@pytest.mark.parametrize("size", [(1, 1), (3, 200), (50, 60)])
def test_any_size_and_polygons_that_leave_it(size: tuple[int, int]) -> None:
    far = np.array([(-50, -50), (1e9, 5), (20, 1e9)], np.float32)
    assert draw_polygons(blank(*size), [far, SQUARE], RED, labels=["a", "a long label"]).shape == (*size, 3)


def test_labels_show() -> None:
    plain = draw_polygons(blank(), [SQUARE], RED)
    assert not np.array_equal(draw_polygons(blank(), [SQUARE], RED, labels=["0.9"]), plain)


def test_read_only_and_strided_pictures() -> None:
    image = blank()[:, ::-1]
    image.flags.writeable = False
    assert draw_polygons(image, [SQUARE], RED).flags.writeable


def test_wrong_arguments() -> None:
    with pytest.raises(ValueError, match="uint8 RGB"):
        draw_polygons(np.zeros((5, 5), np.uint8), [], RED)
    with pytest.raises(ValueError, match="uint8 RGB"):
        draw_polygons(np.zeros((5, 5, 3), np.float32), [], RED)
    with pytest.raises(ValueError, match="2 colours for 1"):
        draw_polygons(blank(), [SQUARE], [RED, BLUE])
    with pytest.raises(ValueError, match="0 labels for 1"):
        draw_polygons(blank(), [SQUARE], RED, labels=[])
    with pytest.raises(ValueError, match="thickness"):
        draw_polygons(blank(), [SQUARE], RED, thickness=0)
    with pytest.raises(ValueError, match="3 points"):
        draw_polygons(blank(), [SQUARE[:2]], RED)


def test_weight_colours_go_from_red_to_blue() -> None:
    low, middle, high = weight_colour(0.0), weight_colour(0.5), weight_colour(1.0)
    assert low[0] > 180 and low[2] < 80
    assert min(middle[:2]) > 180
    assert high[2] > 180 and high[0] < 80
    assert weight_colour(None) == IGNORED
    assert len({weight_colour(w) for w in np.linspace(0, 1, 21)}) == 21
    for weight in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match="between 0 and 1"):
            weight_colour(weight)


def test_fit_only_shrinks() -> None:
    assert fit(blank(500, 1000), 480).shape == (240, 480, 3)
    assert fit(blank(1000, 3), 100).shape == (100, 1, 3)
    small = blank(40, 30)
    same = fit(small, 480)
    assert np.array_equal(same, small) and same is not small
    with pytest.raises(ValueError, match="long side"):
        fit(small, 0)

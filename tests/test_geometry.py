import numpy as np
import pytest

from i3cl import geometry

SQUARE = np.array([[2, 3], [6, 3], [6, 8], [2, 8]], np.float32)
"""4 wide, 5 high, clockwise on screen."""
BOW_TIE = np.array([[0, 0], [4, 4], [4, 0], [0, 4]], np.float32)
"""Two triangles of 4 square pixels that touch in (2, 2)."""


def test_as_polygon_takes_nested_and_flat():
    flat = geometry.as_polygon([0, 0, 4, 0, 4, 2])
    assert flat.dtype == np.float32
    np.testing.assert_array_equal(flat, [[0, 0], [4, 0], [4, 2]])
    np.testing.assert_array_equal(geometry.as_polygon([[0, 0], [4, 0], [4, 2]]), flat)


@pytest.mark.parametrize(
    ("points", "message"),
    [
        ([], "at least 3 points, not 0"),
        ([0, 0, 1, 1], "at least 3 points, not 2"),
        ([0, 0, 1, 1, 2], "x, y pairs, not 5 numbers"),
        ([0, 0, 1, 1, float("nan"), 2], "not finite"),
        ([0, 0, 1, 1, float("inf"), 2], "not finite"),
    ],
)
def test_as_polygon_refuses(points, message):
    with pytest.raises(ValueError, match=message):
        geometry.as_polygon(points)


def test_area_box_and_short_side():
    assert geometry.polygon_area(SQUARE) == 20
    assert geometry.polygon_area(SQUARE[::-1]) == 20
    np.testing.assert_array_equal(geometry.polygon_box(SQUARE), [2, 3, 6, 8])
    assert geometry.short_side(SQUARE) == 4
    diamond = np.array([[2, 0], [4, 2], [2, 4], [0, 2]], np.float32)
    assert geometry.short_side(diamond) == pytest.approx(8**0.5, abs=1e-5)
    assert geometry.short_side(np.array([[0, 0], [4, 4], [8, 8]], np.float32)) == pytest.approx(0, abs=1e-5)


def test_boxes_of():
    boxes = geometry.boxes_of([SQUARE, SQUARE + 1])
    assert boxes.dtype == np.float32
    np.testing.assert_array_equal(boxes, [[2, 3, 6, 8], [3, 4, 7, 9]])
    assert geometry.boxes_of([]).shape == (0, 4)


def test_clockwise():
    np.testing.assert_array_equal(geometry.clockwise(SQUARE), SQUARE)
    np.testing.assert_array_equal(geometry.clockwise(SQUARE[::-1]), SQUARE)


def test_simplify_drops_what_lies_on_a_line_and_never_falls_below_a_triangle():
    dense = np.array([[0, 0], [5, 0.01], [10, 0], [10, 10], [0, 10]], np.float32)
    kept = geometry.simplify(dense)
    assert kept.dtype == np.float32
    assert {tuple(p) for p in kept.tolist()} == {(0, 0), (10, 0), (10, 10), (0, 10)}
    line = np.array([[0, 0], [5, 0.01], [10, 0]], np.float32)
    assert len(geometry.simplify(line)) == 3


def test_to_shapely_repairs():
    square, tie, line = geometry.to_shapely([SQUARE, BOW_TIE, np.array([[0, 0], [1, 1], [2, 2]], np.float32)])
    assert square.area == 20
    assert tie.is_valid and tie.area == 8
    assert line.is_empty
    assert len(geometry.to_shapely([])) == 0


def test_largest_ring():
    tie = geometry.to_shapely([BOW_TIE + np.array([[0, 0], [0, 0], [0, 0], [0, 4]], np.float32)])[0]
    ring = geometry.largest_ring(tie)
    assert ring is not None and len(ring) == 3
    assert geometry.polygon_area(ring) == pytest.approx(max(part.area for part in tie.geoms))
    assert geometry.largest_ring(geometry.to_shapely([np.zeros((3, 2), np.float32)])[0]) is None


def test_overlaps_by_hand():
    right, apart, beside = (SQUARE + np.array([dx, 0], np.float32) for dx in (2, 100, 4))
    found = geometry.overlaps([SQUARE, apart], [beside, right, SQUARE])
    # The shared edge with `beside` has no area, so it is no pair.
    np.testing.assert_array_equal(found.first, [0, 0])
    np.testing.assert_array_equal(found.second, [1, 2])
    np.testing.assert_allclose(found.intersection, [10, 20])
    np.testing.assert_allclose(found.iou, [10 / 30, 1])
    np.testing.assert_allclose(found.area_first, [20, 20])
    np.testing.assert_allclose(found.dense_iou(), [[0, 1 / 3, 1], [0, 0, 0]])


def test_overlaps_counts_a_bow_tie_by_its_parts():
    square = np.array([[0, 0], [4, 0], [4, 4], [0, 4]], np.float32)
    np.testing.assert_allclose(geometry.overlaps([BOW_TIE], [square]).dense_iou(), [[8 / 16]])


@pytest.mark.parametrize(("n", "m"), [(0, 0), (0, 2), (2, 0)])
def test_overlaps_of_nothing(n, m):
    found = geometry.overlaps([SQUARE] * n, [SQUARE] * m)
    assert found.dense_iou().shape == (n, m) and len(found.iou) == 0
    assert len(found.area_first) == n and len(found.area_second) == m


def test_overlaps_agrees_with_all_pairs():
    rng = np.random.default_rng(0)
    make = lambda: [rng.uniform(0, 60, 2) + SQUARE * rng.uniform(0.5, 4) for _ in range(30)]  # noqa: E731
    first, second = make(), make()
    a, b = geometry.to_shapely(first), geometry.to_shapely(second)
    expected = [[p.intersection(q).area / p.union(q).area for q in b] for p in a]
    np.testing.assert_allclose(geometry.overlaps(first, second).dense_iou(), expected, atol=1e-9)


def test_clip_polygon():
    assert geometry.clip_polygon(SQUARE, 6, 8) is SQUARE
    clipped = geometry.clip_polygon(SQUARE, 4, 100)
    assert clipped is not None
    np.testing.assert_array_equal(geometry.polygon_box(clipped), [2, 3, 4, 8])
    assert geometry.polygon_area(clipped) == 10
    assert geometry.clip_polygon(SQUARE, 2, 100) is None
    assert geometry.clip_polygon(SQUARE - 50, 10, 10) is None


@pytest.mark.parametrize("step", [1, -1])
@pytest.mark.parametrize("first", range(4))
def test_clip_polygon_keeps_the_first_corner_and_the_direction(first, step):
    quad = np.roll(np.array([[-5, 2], [40, 3], [41, 20], [-4, 21]], np.float32)[::step], first, axis=0)
    clipped = geometry.clip_polygon(quad, 100, 100)
    assert len(clipped) == 4
    assert np.abs(clipped - quad.clip(0)).max() < 1


def test_clip_polygon_keeps_the_largest_piece():
    # A U whose arms (2 and 3 wide) reach into the image while its base lies below it.
    shape = np.array([[0, 5], [2, 5], [2, 12], [7, 12], [7, 5], [10, 5], [10, 15], [0, 15]], np.float32)
    clipped = geometry.clip_polygon(shape, 10, 10)
    assert clipped is not None
    np.testing.assert_array_equal(geometry.polygon_box(clipped), [7, 5, 10, 10])


def test_mask_crop():
    mask, origin = geometry.mask_crop(SQUARE, 20, 20)
    assert mask.dtype == np.uint8 and mask.shape == (5, 4) and mask.all()
    np.testing.assert_array_equal(origin, [2, 3])


def test_mask_crop_at_the_border():
    mask, origin = geometry.mask_crop(SQUARE, 6, 4)
    assert mask.shape == (3, 2) and mask.all()
    np.testing.assert_array_equal(origin, [2, 3])
    mask, origin = geometry.mask_crop(SQUARE - [4, 5], 6, 4)
    assert mask.shape == (3, 2) and mask.all()
    np.testing.assert_array_equal(origin, [0, 0])


def test_mask_crop_of_a_speck_is_one_pixel():
    for offset in ([0, 0], [100, 100], [-100, -100]):
        mask, origin = geometry.mask_crop(np.array([[2, 3], [2.2, 3], [2.2, 3.1]]) + offset, 6, 4)
        assert mask.shape == (1, 1)
        assert (origin >= 0).all() and (origin < [4, 6]).all()


def test_mask_crop_has_the_polygons_area():
    angles = np.linspace(0, 2 * np.pi, 40, endpoint=False)
    ellipse = np.stack([50 + 30 * np.cos(angles), 40 + 10 * np.sin(angles)], axis=1).astype(np.float32)
    mask, (x, y) = geometry.mask_crop(ellipse, 100, 100)
    assert (x, y) == (20, 30) and mask.shape == (20, 60)
    assert mask.sum() == pytest.approx(geometry.polygon_area(ellipse), rel=0.02)


def test_outlines_from_masks_by_hand():
    masks = np.zeros((3, 28, 28), np.float32)
    masks[0] = 1
    masks[1, 7:21, 14:] = 1
    boxes = np.array([[10, 20, 38, 48], [0, 0, 56, 28], [0, 0, 5, 5]], np.float32)
    full, half, nothing = geometry.outlines_from_masks(masks, boxes)
    assert full is not None and half is not None and nothing is None
    # True to an eighth of a mask cell, plus the eighth by which a contour lies inside.
    np.testing.assert_allclose(geometry.polygon_box(full), [10, 20, 38, 48], atol=0.5)
    np.testing.assert_allclose(geometry.polygon_box(half), [28, 7, 56, 21], atol=1)


def test_outlines_from_masks_takes_the_largest_part():
    masks = np.zeros((1, 28, 28), np.float32)
    masks[0, 2:4, 2:4] = 1
    masks[0, 10:20, 10:20] = 1
    (outline,) = geometry.outlines_from_masks(masks, np.array([[0, 0, 28, 28]], np.float32))
    assert outline is not None
    np.testing.assert_allclose(geometry.polygon_box(outline), [10, 10, 20, 20], atol=0.5)


def test_outlines_from_no_masks():
    assert geometry.outlines_from_masks(np.zeros((0, 28, 28), np.float32), np.zeros((0, 4), np.float32)) == []


def test_outline_of_a_polygon_mask_is_the_polygon():
    box = np.array([0, 0, 28, 28], np.float32)
    polygon = np.array([[2, 6], [14, 2], [26, 6], [26, 22], [14, 18], [2, 22]], np.float32)
    crop, (x, y) = geometry.mask_crop(polygon, 28, 28)
    mask = np.zeros((1, 28, 28), np.float32)
    mask[0, y : y + crop.shape[0], x : x + crop.shape[1]] = crop
    (outline,) = geometry.outlines_from_masks(mask, box[None])
    assert outline is not None
    assert geometry.overlaps([outline], [polygon]).iou[0] > 0.9

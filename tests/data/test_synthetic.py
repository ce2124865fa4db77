"""The quickstart's synthetic scene text."""

from __future__ import annotations

import numpy as np
import pytest
import shapely

from i3cl.data.synthetic import plain as synthetic
from i3cl.data.synthetic.bend import bend_word
from i3cl.data.synthetic.ink import LUMA, exact_ink
from i3cl.data.synthetic.plain import make_image, make_split
from i3cl.geometry import clockwise, mask_crop, overlaps, short_side

SIDE = 256
COUNT = 40


@pytest.fixture(scope="module")
def images() -> list[synthetic.SyntheticImage]:
    return list(make_split(0, COUNT, seed=5, side=SIDE))


def test_the_same_seed_and_index_give_the_same_image(images: list[synthetic.SyntheticImage]) -> None:
    again = make_image(17, seed=5, side=SIDE)
    assert np.array_equal(again.image, images[17].image)
    assert again.texts == images[17].texts
    assert all(np.array_equal(a, b) for a, b in zip(again.polygons, images[17].polygons, strict=True))


def test_indices_and_seeds_do_not_repeat(images: list[synthetic.SyntheticImage]) -> None:
    other = list(make_split(COUNT, 5, seed=5, side=SIDE)) + list(make_split(0, 5, seed=6, side=SIDE))
    assert len({item.image.tobytes() for item in images + other}) == COUNT + 10


def test_a_split_is_the_images_of_its_indices(images: list[synthetic.SyntheticImage]) -> None:
    part = list(make_split(3, 2, seed=5, side=SIDE))
    assert [item.texts for item in part] == [item.texts for item in images[3:5]]


def test_image_and_word_counts(images: list[synthetic.SyntheticImage]) -> None:
    for item in images:
        assert item.image.shape == (SIDE, SIDE, 3) and item.image.dtype == np.uint8
        assert 2 <= len(item.polygons) == len(item.texts) <= 6
        assert all(3 <= len(text) <= 10 and text.isalnum() for text in item.texts)
    assert len({len(item.polygons) for item in images}) > 3


def test_polygons_are_valid_clockwise_inside_and_apart(images: list[synthetic.SyntheticImage]) -> None:
    for item in images:
        for polygon in item.polygons:
            assert polygon.dtype == np.float32
            assert shapely.Polygon(polygon).is_valid
            assert np.array_equal(clockwise(polygon), polygon)
            assert polygon.min() >= 0 and polygon.max() <= SIDE
            assert 8 <= short_side(polygon) < SIDE
        found = overlaps(item.polygons, item.polygons)
        assert np.array_equal(found.first, found.second)


def test_straight_and_curved_words_are_present(images: list[synthetic.SyntheticImage]) -> None:
    points = [len(polygon) for item in images for polygon in item.polygons]
    assert set(points) == {4, 24}
    assert 0.2 < np.mean(np.array(points) == 24) < 0.6


def test_outlines_hug_the_letters() -> None:
    rng = np.random.default_rng(0)
    for word in (word for _ in range(10) for word in synthetic._lay_out(rng, SIDE, 0.5)):
        window, layers = bend_word(word, SIDE)
        crop, (x, y) = mask_crop(word.outline, SIDE, SIDE)
        inside = np.zeros((SIDE, SIDE), bool)
        inside[y : y + crop.shape[0], x : x + crop.shape[1]] = crop > 0
        ink = np.zeros((SIDE, SIDE))
        ink[window] = layers[..., 1]
        assert ink[inside].sum() > 0.94 * ink.sum()
        rows, columns = np.flatnonzero(ink.max(axis=1) > 0.3), np.flatnonzero(ink.max(axis=0) > 0.3)
        box = np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1])
        slack = 1.5 if word.angle.max() == word.angle.min() == 0 else 0.5 * word.height
        outline_box = np.concatenate([word.outline.min(axis=0), word.outline.max(axis=0)])
        assert np.abs(box - outline_box).max() <= slack


def test_every_word_stands_out(images: list[synthetic.SyntheticImage]) -> None:
    for item in images:
        for polygon in item.polygons:
            crop, (x, y) = mask_crop(polygon, SIDE, SIDE)
            patch = item.image[y : y + crop.shape[0], x : x + crop.shape[1]][crop > 0]
            assert np.ptp(np.percentile(patch.mean(axis=1), [2, 98])) > 20


def test_inks_keep_their_contrast() -> None:
    rng = np.random.default_rng(1)
    for ground in np.linspace(0, 255, 52):
        for contrast in (26, 60, 120):
            ink = exact_ink(rng, float(ground), contrast)
            assert ink.min() >= -0.01 and ink.max() <= 255.01
            assert abs(float(ink @ LUMA) - ground) >= contrast - 0.1


@pytest.mark.parametrize("side", [64, 200, 512])
def test_other_sides(side: int) -> None:
    for item in make_split(0, 6, seed=1, side=side):
        assert item.image.shape == (side, side, 3)
        assert len(item.polygons) >= 2
        assert max(polygon.max() for polygon in item.polygons) <= side


@pytest.mark.parametrize("difficulty", [0.0, 1.0])
def test_ends_of_the_difficulty(difficulty: float) -> None:
    assert all(len(item.texts) >= 2 for item in make_split(0, 10, seed=2, difficulty=difficulty))


def test_wrong_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="index"):
        make_image(-1, 0)
    with pytest.raises(ValueError, match="seed"):
        make_image(0, -1)
    with pytest.raises(ValueError, match="side"):
        make_image(0, 0, side=32)
    with pytest.raises(ValueError, match="difficulty"):
        make_image(0, 0, difficulty=2)

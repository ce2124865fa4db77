"""The order in which disputed images are proposed for review."""

import cv2
import numpy as np
import pytest
from PIL import Image

from i3cl.data.tools.splits import image_hash
from i3cl.labelling.fused import FusedImage
from i3cl.labelling.fusion import FusedInstances
from i3cl.labelling.trust import dispute, diverse_order, spread


def disputed_image(number, value):
    """An image whose dispute is `value` with two members: that many instances with one vote of two."""
    count = max(1, round(value * 4))
    square = np.array([[0, 0], [9, 0], [9, 9], [0, 9]], np.float32)
    fused = FusedInstances([square] * count, np.full(count, 2 * value / count), np.ones(count, np.int64), np.zeros(count))
    return FusedImage(number, f"{number}.png", 96, 128, fused)


def scene(rng):
    """A smooth picture with a few rectangles on it."""
    small = rng.uniform(0, 255, (rng.integers(3, 7), rng.integers(3, 7), 3)).astype(np.float32)
    picture = cv2.resize(small, (128, 96), interpolation=cv2.INTER_CUBIC)
    for _ in range(6):
        x, y = (int(v) for v in rng.integers(0, (110, 80)))
        cv2.rectangle(
            picture, (x, y), (x + int(rng.integers(8, 50)), y + int(rng.integers(4, 30))), rng.uniform(0, 255, 3).tolist(), -1
        )
    return picture


def shot(picture, rng):
    """Another photograph of the same scene: moved by up to two pixels, brighter or darker, with noise."""
    moved = np.roll(picture, tuple(rng.integers(-2, 3, 2)), axis=(0, 1)) * rng.uniform(0.85, 1.15) + rng.normal(
        0, 4, picture.shape
    )
    return np.clip(moved, 0, 255).astype(np.uint8)


def test_equal_images_wait_and_unlike_ones_follow_by_value():
    far = np.uint64(0xFFFFFFFF00000000)
    hashes = np.array([0, 0, far, 0b11], np.uint64)
    values = np.array([3.0, 2.9, 1.0, 2.0])
    # 2 of 32 bits leave 2.0 x 1/16; the exact copy comes last.
    assert spread(values, hashes, np.ones(4, bool)) == [0, 2, 3, 1]
    assert spread(values, hashes, np.array([True, False, True, True])) == [0, 1, 2, 3]
    assert spread(np.zeros(3), hashes[:3], np.ones(3, bool)) == [0, 1, 2]
    assert spread(np.zeros(0), np.zeros(0, np.uint64), np.zeros(0, bool)) == []


def test_a_second_shot_comes_after_other_scenes(tmp_path):
    rng = np.random.default_rng(0)
    one, other = scene(rng), scene(rng)
    for number, picture in enumerate((one, one, other)):
        Image.fromarray(shot(picture, rng)).save(tmp_path / f"{number}.png")
    (tmp_path / "3.png").write_bytes(b"no picture")
    items = [disputed_image(0, 4), disputed_image(1, 3.5), disputed_image(2, 2), disputed_image(3, 1)]
    order = [item.image_id for item in diverse_order(items, 2, str(tmp_path))]
    assert [dispute(item.fused, 2) for item in items] == pytest.approx([4, 3.5, 2, 1])
    assert sorted(order) == [0, 1, 2, 3]
    assert order[:2] == [0, 2]
    assert order.index(1) > 1


def reviewed(seed, copies):
    """Distinct scenes, share of the wrong labels, and share of the wrong labels counted once per scene, in the first 50 images.

    150 scenes, some photographed up to `copies` times. The members' dispute and the number of wrong labels depend on the scene,
    with some chance for each photograph.
    """
    rng = np.random.default_rng(seed)
    scenes, hashes, values, wrong = [], [], [], []
    for number in range(150):
        picture = scene(rng)
        hard = rng.gamma(1.0, 1.5)
        for _ in range(1 if rng.random() < 0.5 else rng.integers(1, copies + 1)):
            scenes.append(number)
            mistakes = rng.poisson(hard)
            wrong.append(mistakes)
            # What the members see of the mistakes, and dispute where nothing is wrong.
            values.append(0.4 * rng.binomial(mistakes, 0.7) + 0.3 * rng.poisson(0.5) + rng.uniform(0, 0.2))
            hashes.append(shot(picture, rng))
    scenes, values, wrong = np.array(scenes), np.array(values), np.array(wrong)
    hashes = np.array([hash_of(picture) for picture in hashes], np.uint64)
    orders = {
        "dispute": np.argsort(-values, kind="stable"),
        "diverse": np.array(spread(values, hashes, np.ones(len(values), bool))),
    }
    results = {}
    most = np.array([wrong[scenes == number].max() for number in range(150)])
    for name, order in orders.items():
        first = order[:50]
        own = np.unique(scenes[first])
        once = sum(wrong[first][scenes[first] == number].max() for number in own)
        results[name] = (len(own), wrong[first].sum() / wrong.sum(), once / most.sum())
    return len(scenes), results


def hash_of(picture):
    import imagehash

    return np.packbits(imagehash.phash(Image.fromarray(picture)).hash).view(">u8")[0]


def test_hash_is_that_of_files(tmp_path):
    picture = shot(scene(np.random.default_rng(1)), np.random.default_rng(2))
    Image.fromarray(picture).save(tmp_path / "a.png")
    assert int(hash_of(picture)) == image_hash(str(tmp_path / "a.png"))


@pytest.mark.parametrize(("copies", "least"), [(10, 10), (1, -3)])
def test_diverse_review_sees_more_scenes(copies, least):
    """At least ten more scenes in the first 50 images with near-duplicates; nearly the same review without them."""
    _, results = reviewed(0, copies)
    print(results)
    assert results["diverse"][0] - results["dispute"][0] >= least
    assert results["diverse"][2] >= results["dispute"][2] - 0.02

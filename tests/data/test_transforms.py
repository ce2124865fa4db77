import time

import cv2
import numpy as np
import pytest
import torch

from i3cl import geometry
from i3cl.config import TransformSettings
from i3cl.data.formats.records import ImageRecord, Instance
from i3cl.data.loading import transforms
from i3cl.data.loading.transforms import (
    EvalTransform,
    TrainingImage,
    TrainTransform,
    to_target,
)
from i3cl.errors import UserError

POLICIES = ("rotate", "colour", "colour_rotate", "resize_only")


def settings(**changes) -> TransformSettings:
    """Nothing random unless changed: no flips, resizing only, the size of the test image."""
    plain = {"short_sides": (60,), "long_cap": 1000, "flip_horizontal": 0, "flip_vertical": 0}
    return TransformSettings(**{**plain, "policies": ("resize_only",), **changes})


def scene(height: int, width: int, *polygons, **fields) -> tuple[np.ndarray, ImageRecord]:
    """Black image with white polygons, drawn by the centre rule on a grid of sixteenths of a pixel."""
    image = np.zeros((height, width, 3), np.uint8)
    instances = []
    for polygon in polygons:
        polygon = np.asarray(polygon, np.float32)
        cv2.fillPoly(image, [np.round((polygon - 0.5) * 16).astype(np.int32)], (255, 255, 255), cv2.LINE_8, 4)
        instances.append(Instance(polygon, **fields))
    return image, ImageRecord(1, "a.jpg", height, width, tuple(instances))


def blob(x: float, y: float, radius: float, points: int = 9, seed: int = 0) -> np.ndarray:
    """An irregular, not convex polygon without any symmetry."""
    rng = np.random.default_rng(seed)
    angles = np.sort(rng.uniform(0, 2 * np.pi, points))
    reach = radius * rng.uniform(0.5, 1, (points, 1))
    return (reach * np.stack([np.cos(angles), np.sin(angles)], axis=1) + [x, y]).astype(np.float32)


def painted(sample: TrainingImage) -> np.ndarray:
    """The pixels that are white, whatever the colours were turned into."""
    grey = sample.image.astype(float).mean(axis=2)
    return grey > (grey.max() + grey.min()) / 2


def drawn(sample: TrainingImage) -> np.ndarray:
    """The target's masks, pasted."""
    canvas = np.zeros(sample.image.shape[:2], bool)
    target = to_target(sample)[1]
    for mask, (x, y) in zip(target["masks"], target["mask_origins"].tolist(), strict=True):
        canvas[y : y + mask.shape[0], x : x + mask.shape[1]] |= mask.numpy().astype(bool)
    return canvas


def iou(a: np.ndarray, b: np.ndarray) -> float:
    return (a & b).sum() / max((a | b).sum(), 1)


# ------------------------------------------------------------------------------------- polygons follow pixels


@pytest.mark.parametrize("crop", [0, 160])
@pytest.mark.parametrize("flips", [(0, 0), (1, 0), (0, 1), (1, 1)])
@pytest.mark.parametrize("policy", POLICIES)
def test_polygons_follow_pixels(policy, flips, crop, monkeypatch):
    monkeypatch.setattr(transforms, "FILL", (0, 0, 0))
    image, record = scene(300, 400, blob(130, 160, 90), blob(300, 100, 70, seed=1))
    transform = TrainTransform(
        settings(
            short_sides=(200, 290, 450),
            crop=crop,
            policies=(policy,),
            flip_horizontal=flips[0],
            flip_vertical=flips[1],
            min_visible=0,
        )
    )
    for seed in range(8):
        sample = transform(image, record, np.random.default_rng(seed))
        assert sample.image.dtype == np.uint8
        if drawn(sample).sum() > 300:
            assert iou(painted(sample), drawn(sample)) > 0.95


def test_polygons_follow_pixels_when_shrunk_much():
    image, record = scene(1200, 1600, blob(700, 600, 500))
    for seed in range(3):
        sample = TrainTransform(settings(short_sides=(150,), policies=("rotate",)))(image, record, np.random.default_rng(seed))
        assert sample.image.shape == (150, 200, 3)
        grey = sample.image[..., 0] > 190
        assert iou(grey, drawn(sample)) > 0.95


def test_no_shift_by_a_part_of_a_pixel():
    """The centres of a soft disc and of its polygon agree to a twentieth of a pixel at every scale."""
    angles = np.linspace(0, 2 * np.pi, 64, endpoint=False)
    circle = np.stack([100.3 + 40 * np.cos(angles), 80.7 + 40 * np.sin(angles)], axis=1).astype(np.float32)
    y, x = np.mgrid[:160, :200] + 0.5
    soft = 255 / (1 + np.exp(np.hypot(x - 100.3, y - 80.7) - 40))
    image = np.repeat(soft.astype(np.uint8)[..., None], 3, axis=2)
    record = ImageRecord(1, "a.jpg", 160, 200, (Instance(circle),))
    for short in (60, 79, 80, 160, 333):
        for flip in (0, 1):
            change = settings(short_sides=(short,), flip_horizontal=flip, flip_vertical=flip)
            sample = TrainTransform(change)(image, record, np.random.default_rng(0))
            weights = sample.image[..., 0].astype(float)
            rows, columns = np.mgrid[: weights.shape[0], : weights.shape[1]] + 0.5
            centre = np.array([(weights * columns).sum(), (weights * rows).sum()]) / weights.sum()
            np.testing.assert_allclose(sample.record.instances[0].polygon.mean(axis=0), centre, atol=0.05)


def test_flips_by_hand():
    image, record = scene(60, 100, [[10, 20], [30, 20], [30, 50]])
    image[:, :, 1] = np.arange(100)
    image[:, :, 2] = np.arange(60)[:, None]
    expected = {
        (0, 0): ([[10, 20], [30, 20], [30, 50]], image),
        (1, 0): ([[90, 20], [70, 20], [70, 50]], image[:, ::-1]),
        (0, 1): ([[10, 40], [30, 40], [30, 10]], image[::-1]),
        (1, 1): ([[90, 40], [70, 40], [70, 10]], image[::-1, ::-1]),
    }
    for (x, y), (polygon, pixels) in expected.items():
        transform = TrainTransform(settings(flip_horizontal=x, flip_vertical=y))
        sample = transform(image, record, np.random.default_rng(0))
        np.testing.assert_array_equal(sample.image, pixels)
        np.testing.assert_allclose(sample.record.instances[0].polygon, polygon, atol=1e-4)


def test_resizing_agrees_with_test_time_resizing():
    rng = np.random.default_rng(0)
    image = cv2.GaussianBlur(rng.integers(0, 256, (90, 130, 3), np.uint8), (0, 0), 3)
    record = ImageRecord(1, "a.jpg", 90, 130)
    for short in (30, 60, 90, 200):
        train = TrainTransform(settings(short_sides=(short,)))(image, record, rng)
        test = EvalTransform(short, 10_000)(image, record)
        assert train.image.shape == test.image.shape
        # The two bilinear routines round their weights differently.
        assert np.abs(train.image.astype(int) - test.image).max() <= 3


def test_a_quarter_of_the_area_by_hand():
    image, record = scene(60, 100, [[10, 20], [30, 20], [30, 50]])
    sample = TrainTransform(settings(short_sides=(30,)))(image, record, np.random.default_rng(0))
    assert sample.image.shape == (30, 50, 3)
    assert (sample.record.height, sample.record.width) == (30, 50)
    np.testing.assert_allclose(sample.record.instances[0].polygon, [[5, 10], [15, 10], [15, 25]], atol=1e-4)


# ----------------------------------------------------------------------------------------------- random draws


def test_the_long_side_is_capped():
    image, record = scene(60, 100)
    sample = TrainTransform(settings(short_sides=(600,), long_cap=150))(image, record, np.random.default_rng(0))
    assert sample.image.shape == (90, 150, 3)


def test_equal_generators_give_equal_samples():
    image, record = scene(120, 160, blob(80, 60, 50))
    transform = TrainTransform(settings(policies=POLICIES, crop=64, short_sides=(90, 120), flip_horizontal=0.5))
    for seed in range(5):
        a, b = (transform(image, record, np.random.default_rng(seed)) for _ in range(2))
        np.testing.assert_array_equal(a.image, b.image)
        np.testing.assert_array_equal(a.matrix, b.matrix)
    others = {transform(image, record, np.random.default_rng(seed)).image.tobytes() for seed in range(10)}
    assert len(others) > 5


def angles_of(policy: str) -> np.ndarray:
    image, record = scene(60, 100)
    transform = TrainTransform(settings(policies=(policy,)))
    matrices = [transform(image, record, np.random.default_rng(seed)).matrix for seed in range(300)]
    return np.degrees([np.arctan2(m[1, 0], m[0, 0]) for m in matrices])


@pytest.mark.parametrize(("policy", "most"), [("rotate", 10), ("colour_rotate", 15), ("colour", 0), ("resize_only", 0)])
def test_angles_of_the_policies(policy, most):
    angles = angles_of(policy)
    assert np.abs(angles).max() <= most
    if most:
        assert 0.4 < (angles != 0).mean() < 0.6
        assert angles.max() > 0.9 * most and angles.min() < -0.9 * most


def test_flips_and_policies_are_drawn_by_their_share():
    image, record = scene(60, 100)
    image[:] = 90
    transform = TrainTransform(settings(flip_horizontal=0.5, flip_vertical=0.25, policies=("colour", "resize_only")))
    samples = [transform(image, record, np.random.default_rng(seed)) for seed in range(400)]
    assert np.mean([s.matrix[0, 0] < 0 for s in samples]) == pytest.approx(0.5, abs=0.08)
    assert np.mean([s.matrix[1, 1] < 0 for s in samples]) == pytest.approx(0.25, abs=0.08)
    # A grey plane changes with brightness only: half the images, half of those again.
    changed = np.mean([(s.image != 90).any() for s in samples])
    assert changed == pytest.approx(0.25, abs=0.08)


def test_colour_policy_by_hand():
    class Always:
        """A generator that applies everything, with the given factors."""

        def __init__(self, *factors):
            self.factors = factors

        def random(self, n):
            return np.zeros(n)

        def uniform(self, low, high, n):
            return np.array(self.factors)

    image = np.zeros((2, 2, 3), np.uint8)
    image[0] = (100, 50, 200)
    grey = 0.299 * 100 + 0.587 * 50 + 0.114 * 200
    none = transforms._jitter(image, Always(0, 1, 1))
    np.testing.assert_allclose(none[0, 0], np.round([grey] * 3), atol=1)
    bright = transforms._jitter(image, Always(1, 1.2, 1))
    np.testing.assert_allclose(bright[0, 0], [120, 60, 240], atol=1)
    flat = transforms._jitter(image, Always(1, 1, 0))
    np.testing.assert_allclose(flat, np.full((2, 2, 3), grey / 2), atol=1)
    assert transforms._jitter(image, Always(1, 1, 1)) is image
    assert transforms._jitter(image, Always(1, 1.4, 1))[0, 0, 2] == 255


# ---------------------------------------------------------------------------------------- strong augmentation

STRONG = {"jitter": 0.8, "grey": 0.2, "blur": 0.5, "noise": 0.5, "jpeg": 0.5, "erase": 0.7}
STRONG |= {"scale_jitter": (0.8, 1.25), "rotation": 20.0}


def photograph() -> np.ndarray:
    rng = np.random.default_rng(3)
    return cv2.GaussianBlur(rng.integers(0, 256, (120, 160, 3), np.uint8), (0, 0), 4)


def changed(seed: int = 0, **on) -> np.ndarray:
    return transforms.change_colours(photograph(), settings(**on), np.random.default_rng(seed)).astype(float)


def test_strong_augmentation_is_off_and_deterministic():
    image = photograph()
    rng = np.random.default_rng(0)
    assert transforms.change_colours(image, settings(), rng) is image
    assert rng.random() == np.random.default_rng(0).random(), "what is off draws nothing"
    record = ImageRecord(1, "a.jpg", 120, 160, (Instance(blob(80, 60, 50)),))
    transform = TrainTransform(settings(short_sides=(110,), crop=96, policies=POLICIES, **STRONG))
    for seed in range(6):
        a, b = (transform(image, record, np.random.default_rng(seed)) for _ in range(2))
        np.testing.assert_array_equal(a.image, b.image)
        assert [i.ignore for i in a.record.instances] == [i.ignore for i in b.record.instances]
    assert len({transform(image, record, np.random.default_rng(s)).image.tobytes() for s in range(10)}) == 10


def test_colour_jitter_grey_and_hue():
    image = photograph().astype(float)
    grey = changed(grey=1)
    assert np.ptp(grey, axis=2).max() == 0
    np.testing.assert_allclose(grey[..., 0], image @ transforms.GREY, atol=1)
    only = {"jitter": 1, "jitter_brightness": 0, "jitter_contrast": 0, "jitter_saturation": 0, "jitter_hue": 0}
    np.testing.assert_allclose(changed(**only), image, atol=1)
    turned = changed(**{**only, "jitter_hue": 0.1})
    assert np.abs(turned - image).max() > 10
    inside = (turned > 0).all(axis=2) & (turned < 255).all(axis=2)
    np.testing.assert_allclose((turned @ transforms.GREY)[inside], (image @ transforms.GREY)[inside], atol=2)
    ratios = [changed(seed, **{**only, "jitter_brightness": 0.4}).mean() / image.mean() for seed in range(60)]
    assert 0.58 < min(ratios) < 0.7 and 1.3 < max(ratios) < 1.42
    contrasts = [changed(seed, **{**only, "jitter_contrast": 0.4}).std() / image.std() for seed in range(60)]
    assert 0.58 < min(contrasts) < 0.75 and 1.25 < max(contrasts) < 1.42


def test_blur_noise_and_jpeg():
    image = photograph().astype(float)
    sharpness = lambda pixels: np.abs(np.diff(pixels, axis=1)).mean()  # noqa: E731
    assert sharpness(changed(blur=1, blur_sigma=(2, 2))) < 0.95 * sharpness(image)
    noise = (changed(noise=1, noise_sigma=(9, 9)) - image)[(image > 40).all(axis=2) & (image < 215).all(axis=2)]
    assert noise.std() == pytest.approx(9, rel=0.03) and abs(noise.mean()) < 0.2
    coarse, fine = (np.abs(changed(jpeg=1, jpeg_quality=(q, q)) - image).mean() for q in (10, 95))
    assert coarse > 2 * fine > 0
    assert fine < 2, "red stays red"


def test_a_word_that_is_more_than_half_erased_is_ignored(monkeypatch):
    words = [[[x, 10], [x + 20, 10], [x + 20, 20], [x, 20]] for x in (0, 30, 60)]
    image, record = scene(60, 100, *words)
    erased = np.zeros((60, 100), bool)
    erased[:, :12] = True  # 12 of 20 columns of the first word
    erased[:, 30:39] = True  # 9 of 20 of the second
    monkeypatch.setattr(transforms, "_patches", lambda *_: erased)
    sample = TrainTransform(settings(erase=1))(image, record, np.random.default_rng(0))
    assert [i.ignore for i in sample.record.instances] == [True, False, False]
    assert (sample.image[:, :12] == transforms.FILL).all() and (sample.image[12, 60:79] == 255).all()


def test_erased_rectangles_have_the_area_that_is_asked_for():
    wanted = settings(erase=1, erase_patches=(1, 1), erase_area=(0.05, 0.1))
    shares = [transforms._patches(wanted, 200, 300, np.random.default_rng(seed)).mean() for seed in range(200)]
    assert 0.045 < min(shares) < 0.06 and 0.09 < max(shares) < 0.105
    several = settings(erase=1, erase_patches=(3, 3), erase_area=(0.01, 0.01))
    assert 0.01 < transforms._patches(several, 200, 300, np.random.default_rng(0)).mean() < 0.032


def test_scale_jitter_and_rotation_ranges():
    image, record = scene(60, 100, [[10, 20], [30, 20], [30, 50]])
    jittered = TrainTransform(settings(scale_jitter=(0.5, 2.0), long_cap=180))
    heights = [jittered(image, record, np.random.default_rng(seed)).image.shape[0] for seed in range(300)]
    assert 30 <= min(heights) < 33 and max(heights) == 108, "180 of 100 pixels at most"
    assert np.mean(np.array(heights) < 60) == pytest.approx(0.5, abs=0.08)
    turned = TrainTransform(settings(policies=("rotate",), rotation=40.0))
    matrices = [turned(image, record, np.random.default_rng(seed)).matrix for seed in range(300)]
    angles = np.degrees([np.arctan2(m[1, 0], m[0, 0]) for m in matrices])
    assert 36 < angles.max() <= 40 and -40 <= angles.min() < -36


def test_a_range_of_the_wrong_order_is_refused():
    with pytest.raises(ValueError, match=r"jpeg_quality: \[90, 30\] is not lowest, highest"):
        settings(jpeg_quality=(90, 30))


# ------------------------------------------------------------------------------------------------------ crops


def test_crops_are_placed_on_text_three_times_in_four():
    image, record = scene(200, 300, [[250, 150], [270, 150], [270, 160], [250, 160]])
    transform = TrainTransform(settings(short_sides=(200,), crop=64))
    samples = [transform(image, record, np.random.default_rng(seed)) for seed in range(400)]
    assert {s.image.shape for s in samples} == {(64, 64, 3)}
    whole = np.mean([len(s.record.instances) == 1 and not s.record.instances[0].ignore for s in samples])
    assert 0.75 - 0.07 < whole < 0.75 + 0.12
    corners = -np.array([s.matrix[:, 2] for s in samples])
    assert (corners >= 0).all() and (corners <= [300 - 64, 200 - 64]).all()
    # The word stands anywhere in the window, not always in its middle.
    places = [s.record.instances[0].polygon.min(axis=0) for s in samples if s.record.instances]
    assert np.ptp(places, axis=0).min() > 25


def test_a_word_larger_than_the_window_fills_it():
    image, record = scene(200, 300, [[20, 20], [280, 20], [280, 180], [20, 180]])
    transform = TrainTransform(settings(short_sides=(200,), crop=64))
    samples = [transform(image, record, np.random.default_rng(seed)) for seed in range(60)]
    full = np.mean([(painted(s) | (s.image.min() == 255)).all() for s in samples])
    assert full > 0.65
    # Less than min_visible of it is left.
    assert all(s.record.instances[0].ignore for s in samples)


def test_ignore_regions_do_not_attract_crops():
    image, record = scene(200, 300, [[250, 150], [270, 150], [270, 160], [250, 160]], ignore=True)
    transform = TrainTransform(settings(short_sides=(200,), crop=64))
    seen = np.mean([bool(transform(image, record, np.random.default_rng(s)).record.instances) for s in range(200)])
    assert seen < 0.4


def test_an_image_smaller_than_the_window_is_not_padded():
    image, record = scene(60, 100, [[10, 20], [30, 20], [30, 50]])
    both = TrainTransform(settings(crop=320))(image, record, np.random.default_rng(0))
    assert both.image.shape == (60, 100, 3)
    one = TrainTransform(settings(crop=80))(image, record, np.random.default_rng(0))
    assert one.image.shape == (60, 80, 3)


# -------------------------------------------------------------------------------------------------- instances


def cut(polygon, **changes):
    """The polygon's instances after a crop to the left 50 of 100 pixels."""
    image, record = scene(50, 100, polygon)
    transform = TrainTransform(settings(short_sides=(50,), crop=50, **changes))
    transform._window = lambda *_: (0, 0, 50, 50)  # type: ignore[method-assign]
    return transform(image, record, np.random.default_rng(0)).record.instances


def test_what_is_mostly_outside_is_ignored_and_what_is_outside_is_gone():
    box = lambda x: [[x, 10], [x + 20, 10], [x + 20, 20], [x, 20]]  # noqa: E731
    (inside,) = cut(box(20))
    assert not inside.ignore
    (half,) = cut(box(40))
    assert not half.ignore
    np.testing.assert_array_equal(geometry.polygon_box(half.polygon), [40, 10, 50, 20])
    (quarter,) = cut(box(45))
    assert quarter.ignore
    assert not cut(box(45), min_visible=0.2)[0].ignore
    assert cut(box(50)) == () and cut(box(70)) == ()
    (sliver,) = cut(box(49), min_visible=0.0)
    assert sliver.ignore, "one pixel is less than min_side"
    assert not cut(box(49), min_visible=0.0, min_side=1)[0].ignore


def test_small_ones_are_ignored():
    image, record = scene(60, 100, [[10, 20], [30, 20], [30, 23], [10, 23]])
    for short, small in ((60, False), (30, True)):
        sample = TrainTransform(settings(short_sides=(short,)))(image, record, np.random.default_rng(0))
        assert sample.record.instances[0].ignore == small


def test_weights_stay_with_their_instance():
    rng = np.random.default_rng(0)
    corners = rng.uniform(0, 280, (60, 2))
    instances = tuple(
        Instance(
            np.array([[x, y], [x + 15, y], [x + 15, y + 9], [x, y + 9]], np.float32),
            ignore=i % 5 == 0,
            lossweight=i / 10,
            score=i / 60,
            votes=i,
            outlineweight=i / 20,
        )
        for i, (x, y) in enumerate(corners)
    )
    record = ImageRecord(1, "a.jpg", 300, 300, instances)
    image = np.zeros((300, 300, 3), np.uint8)
    transform = TrainTransform(settings(short_sides=(300,), crop=128, policies=("rotate",), flip_horizontal=0.5))
    dropped = 0
    for seed in range(20):
        sample = transform(image, record, np.random.default_rng(seed))
        dropped += len(instances) - len(sample.record.instances)
        _, target = to_target(sample)
        for i, instance in enumerate(sample.record.instances):
            before = instances[round(instance.lossweight * 10)]
            assert (instance.score, instance.votes) == (before.score, before.votes)
            assert instance.ignore or not before.ignore
            assert target["lossweight"][i] == pytest.approx(instance.lossweight)
            assert target["outlineweight"][i] == pytest.approx(before.outlineweight)
            assert bool(target["ignore"][i]) == instance.ignore
            # Each is where its own polygon went, up to the clipping.
            back = sample.to_original(instance.polygon)
            low, high = before.polygon.min(axis=0) - 0.01, before.polygon.max(axis=0) + 0.01
            assert (back >= low).all() and (back <= high).all()
    assert dropped > 100


def test_boxes_are_tight_around_the_turned_polygon():
    image, record = scene(100, 100, [[20, 48], [80, 48], [80, 52], [20, 52]])
    transform = TrainTransform(settings(short_sides=(100,), policies=("rotate",)))
    seen = 0
    for seed in range(40):
        sample = transform(image, record, np.random.default_rng(seed))
        _, target = to_target(sample)
        polygon = sample.record.instances[0].polygon
        np.testing.assert_array_equal(target["boxes"][0].numpy(), geometry.polygon_box(polygon))
        angle = np.arctan2(sample.matrix[1, 0], sample.matrix[0, 0])
        seen += angle != 0
        height = 60 * abs(np.sin(angle)) + 4 * np.cos(angle)
        assert float(target["boxes"][0, 3] - target["boxes"][0, 1]) == pytest.approx(height, abs=0.01)
    assert seen > 10


# ---------------------------------------------------------------------------------------------------- targets


def test_target():
    image, record = scene(60, 100, [[10, 20], [30, 20], [30, 50], [10, 50]], lossweight=0.5)
    image[5, 7] = (1, 2, 3)
    tensor, target = to_target(TrainingImage(image, record))
    assert tensor.shape == (3, 60, 100) and tensor.dtype == torch.float32 and tensor.is_contiguous()
    assert tensor[:, 5, 7].tolist() == [1, 2, 3] and tensor.max() == 255
    assert target["boxes"].tolist() == [[10, 20, 30, 50]] and target["boxes"].dtype == torch.float32
    assert target["labels"].tolist() == [0] and target["labels"].dtype == torch.int64
    assert target["masks"][0].shape == (30, 20) and target["masks"][0].dtype == torch.uint8
    assert target["masks"][0].all()
    assert target["mask_origins"].tolist() == [[10, 20]] and target["mask_origins"].dtype == torch.int64
    assert target["image_weight"] == 1 and "outlineweight" not in target
    assert target["lossweight"].tolist() == [0.5] and target["lossweight"].dtype == torch.float32
    assert target["ignore"].tolist() == [False] and target["ignore"].dtype == torch.bool


@pytest.mark.filterwarnings("error")
def test_no_instance():
    image, record = scene(60, 100)
    image.setflags(write=False)
    transform = TrainTransform(settings(crop=32, policies=POLICIES))
    for seed in range(10):
        tensor, target = to_target(transform(image, record, np.random.default_rng(seed)))
        assert tensor.shape == (3, 32, 32)
        assert target["boxes"].shape == (0, 4) and target["mask_origins"].shape == (0, 2)
        assert target["masks"] == [] and all(len(target[k]) == 0 for k in ("labels", "lossweight", "ignore"))
    assert to_target(TrainingImage(image, record))[0].shape == (3, 60, 100)


def test_an_image_of_another_size_is_the_users_error():
    image, record = scene(60, 100)
    for transform in (
        lambda i: TrainTransform(settings())(i, record, np.random.default_rng(0)),
        lambda i: EvalTransform(60, 100)(i, record),
    ):
        with pytest.raises(UserError, match=r"a\.jpg: the image is 99 x 60 but its annotation says 100 x 60;"):
            transform(image[:, :99])
        with pytest.raises(UserError, match=r"turned: by an EXIF rotation.*data\.exif=upright"):
            transform(image.transpose(1, 0, 2))


def test_eval_transform_maps_back():
    image, record = scene(60, 100, blob(50, 30, 25))
    sample = EvalTransform(90, 120)(image, record)
    assert sample.image.shape == (72, 120, 3)
    # A row of pixels around so small a blob is 7 % of it.
    assert iou(painted(sample), drawn(sample)) > 0.9
    polygon = sample.record.instances[0].polygon
    np.testing.assert_allclose(sample.to_original(polygon), record.instances[0].polygon, atol=1e-4)
    assert EvalTransform(90, 120, upscale=False)(image, record).image is image


def test_speed():
    rng = np.random.default_rng(0)
    image = cv2.GaussianBlur(rng.integers(0, 256, (427, 640, 3), np.uint8), (0, 0), 2)
    corners = rng.uniform([0, 0], [600, 400], (10, 2))
    box = np.array([[0, 0], [40, 0], [40, 20], [0, 20]])
    record = ImageRecord(1, "a.jpg", 427, 640, tuple(Instance((box + c).astype(np.float32)) for c in corners))
    change = {"flip_horizontal": 0.5, "flip_vertical": 0.5, "policies": POLICIES[:3]}
    transform = TrainTransform(settings(short_sides=(320, 384, 448, 512), crop=320, **change))
    times, targets = [], []
    for _ in range(60):
        # Seconds of computing, not of waiting: tests run beside others.
        started = time.process_time()
        sample = transform(image, record, rng)
        moved = time.process_time()
        to_target(sample)
        times.append(moved - started)
        targets.append(time.process_time() - moved)
    print(f"transform {1000 * np.median(times):.1f} ms, target {1000 * np.median(targets):.1f} ms")
    assert np.median(times) < 0.008

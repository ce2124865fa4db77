"""The order of a run, the mixture, and Ray Data against threads."""

import subprocess
import sys

import numpy as np
import pyarrow as pa
import pytest

from i3cl.config import Settings, SourceSettings, to_yaml, with_overrides
from i3cl.data.loading.ingest import Mixture, mix, source_names, training_batches
from i3cl.data.loading.transforms import to_target
from i3cl.errors import UserError


def mixture(*weights: float) -> Mixture:
    return Mixture(pa.table({"row": list(range(len(weights)))}), np.array(weights))


def test_an_epoch_visits_every_image_once_in_another_order_each_time():
    mixed = mixture(*[1.0] * 20)
    first, second = mixed.order(0, 20, seed=3), mixed.order(20, 20, seed=3)
    assert sorted(first) == sorted(second) == list(range(20))
    assert list(first) != list(second)


def test_order_does_not_depend_on_where_one_begins():
    mixed = mixture(1, 2, 0.5, 1.5)
    whole = mixed.order(0, 60, seed=1)
    assert np.array_equal(whole[17:41], mixed.order(17, 24, seed=1))
    assert not np.array_equal(whole, mixed.order(0, 60, seed=2))


def test_weights_set_the_shares():
    mixed = mixture(2.0, 0.5, 0.5, 1.0)
    counts = np.bincount(mixed.order(0, 400, seed=0), minlength=4)
    assert counts[0] == 200 and counts[3] == 100
    assert 30 < counts[1] < 70 and counts[1] + counts[2] == 100


def composed(sizes, per_step) -> Mixture:
    return Mixture(pa.table({"row": list(range(sum(sizes)))}), np.ones(sum(sizes)), tuple(sizes), tuple(per_step))


def test_every_share_has_the_images_of_each_source_that_per_step_names():
    sizes = (5, 3, 40)
    mixed = composed(sizes, (2, 1, 4))
    order = mixed.order(0, 7 * 30, seed=4)
    shares = mixed.sources(order).reshape(30, 7)
    assert (shares == [0, 0, 1, 2, 2, 2, 2]).all()
    # Each source is visited in passes of its own: every image once before any image again, in another order each time.
    for source, (size, start) in enumerate(zip(sizes, (0, 5, 8), strict=True)):
        own = order[mixed.sources(order) == source] - start
        passes = own[: len(own) // size * size].reshape(-1, size)
        assert (np.sort(passes, axis=1) == np.arange(size)).all()
        assert len({tuple(p) for p in passes}) > 1
    assert np.array_equal(order[33:150], mixed.order(33, 117, seed=4))
    assert not np.array_equal(order, mixed.order(0, 210, seed=5))


def test_an_epoch_with_per_step_is_a_pass_over_the_first_source():
    mixed = composed((40, 1000), (2, 6))
    assert mixed.steps(3, images_per_step=16) == 30  # 4 images of the first source a step
    assert mixture(*[1.0] * 40).steps(3, images_per_step=16) == 8


def test_per_step_and_train_batch_must_agree(tiny_set, tmp_path):
    source = {"annotations": str(tiny_set / "set.json"), "images": str(tiny_set / "images")}
    three, one = (SourceSettings(**source, per_step=n) for n in (3, 1))
    assert mix([three, one], ".", batch=4).per_step == (3, 1)
    with pytest.raises(UserError, match=r"data\.train: per_step adds up to 3 \+ 1 = 4 images but train\.batch is 6"):
        mix([three, one], ".", batch=6)
    with pytest.raises(UserError, match=r"train\.1: has no per_step"):
        with_overrides(Settings(), {"data.train": [{**source, "per_step": 3}, source]}, "test")
    with pytest.raises(UserError, match="leave out weight, or per_step"):
        with_overrides(Settings(), {"data.train": [{**source, "per_step": 3, "weight": 2}]}, "test")
    (tmp_path / "empty.json").write_text('{"images": [], "annotations": []}')
    with pytest.raises(UserError, match=r"empty\.json: has no images, but its per_step is 1"):
        mix([three, SourceSettings(annotations=str(tmp_path / "empty.json"), images=".", per_step=1)], ".")


def test_names_of_training_sets_differ():
    def source(annotations, **more):
        return SourceSettings(annotations=annotations, images="x", **more)

    assert source_names([source("a/train.json"), source("b/pseudo/")]) == ["train", "pseudo"]
    same = [source("a/train.json"), source("s3://x/b/train.json"), source("b/train.json"), source("c.json", name="own")]
    assert source_names(same) == ["a-train", "b-train", "b-train-2", "own"]


def test_augmentation_of_a_source_overrides_single_settings():
    sources = [
        {"annotations": "a", "images": "b"},
        {"annotations": "c", "images": "b", "transform": {"jitter": 0.8, "crop": 64}},
    ]
    data = with_overrides(Settings(), {"data.train": sources, "data.transform.crop": 32}, "test").data
    assert data.transform_of(0) is data.transform
    own = data.transform_of(1)
    assert (own.jitter, own.crop, own.short_sides) == (0.8, 64, data.transform.short_sides)
    for change, message in (
        ({"jiter": 1}, r"train\.1\.transform\.jiter: unknown key; did you mean jitter\?"),
        ({"jitter": 2}, r"train\.1\.transform\.jitter: Input should be less than or equal to 1"),
        ({"blur_sigma": [2, 1]}, r"train\.1\.transform: blur_sigma"),
    ):
        with pytest.raises(UserError, match=message):
            with_overrides(Settings(), {"data.train": [sources[0], {**sources[1], "transform": change}]}, "test")


def test_lossweight_override_and_several_sources(tiny_set):
    annotations, images = str(tiny_set / "set.json"), str(tiny_set / "images")
    mixed = mix(
        [
            SourceSettings(annotations=annotations, images=images),
            SourceSettings(annotations=annotations, images=images, lossweight=0.25, weight=2),
        ],
        ".",
    )
    rows = mixed.table.to_pylist()
    assert len(rows) == 24 and mixed.epoch_images == 36
    assert {i["lossweight"] for i in rows[0]["instances"]} == {1.0}
    assert {i["lossweight"] for i in rows[23]["instances"]} == {0.25}


def test_no_data_set_is_a_users_mistake():
    with pytest.raises(UserError, match=r"data\.train"):
        mix([], ".")


def batches(settings, steps, rank=0, workers=1, batch=4):
    mixed = mix(settings.data.train, settings.data_root)
    return list(training_batches(mixed, settings.data, steps=steps, batch=batch, shares=[rank], of=workers, seed=7))


def test_a_later_start_and_more_workers_see_the_same_samples(tiny_settings):
    settings = with_overrides(
        tiny_settings,
        {"data.transform.policies": ["colour_rotate"], "data.transform.crop": 64, "data.transform.flip_horizontal": 0.5},
        "test",
    )
    whole = batches(settings, range(0, 5))
    late = batches(settings, range(3, 5))
    halves = [batches(settings, range(0, 5), rank, 2, 2) for rank in (0, 1)]
    for step, samples in enumerate(whole):
        assert len(samples) == 4
        for i, sample in enumerate(samples):
            other = halves[i // 2][step][i % 2]
            assert np.array_equal(sample.image, other.image)
            if step >= 3:
                assert np.array_equal(sample.image, late[step - 3][i].image)


def test_ray_data_gives_the_same_batches_as_threads(tiny_settings, ray_cluster):
    settings = with_overrides(tiny_settings, {"data.transform.policies": ["colour_rotate"]}, "test")
    through_ray = with_overrides(settings, {"data.ray_data": True}, "test")
    for samples, others in zip(batches(settings, range(4)), batches(through_ray, range(4)), strict=True):
        for sample, other in zip(samples, others, strict=True):
            assert np.array_equal(sample.image, other.image)
            assert len(sample.record.instances) == len(other.record.instances)
            for a, b in zip(sample.record.instances, other.record.instances, strict=True):
                assert np.allclose(a.polygon, b.polygon) and (a.ignore, a.lossweight) == (b.ignore, b.lossweight)


def test_skip_bad_lists_and_counts(tiny_set, tmp_path, caplog):
    caplog.set_level("INFO", "i3cl")
    import json

    from i3cl.data.loading.ingest import read_source

    tree = json.loads((tiny_set / "set.json").read_text())
    tree["annotations"][0]["segmentation"] = [[1, 2, 3, 4]]
    (tmp_path / "bad.json").write_text(json.dumps(tree))
    source = SourceSettings(annotations=str(tmp_path / "bad.json"), images=str(tiny_set / "images"))
    with pytest.raises(UserError, match=r"bad\.json.*3 points"):
        read_source(source, ".")
    dataset = read_source(source, ".", skip_bad=True)
    printed = caplog.text
    assert len(dataset.problems) == 1 and printed.count("left out") == 2 and "12 images" in printed


def test_an_unreadable_image_stops_or_is_passed_over(tiny_settings, tiny_set, tmp_path, ray_cluster):
    import shutil

    shutil.copytree(tiny_set / "images", tmp_path / "images")
    (tmp_path / "images" / "3.jpg").write_bytes(b"no image")
    source = {"annotations": str(tiny_set / "set.json"), "images": str(tmp_path / "images")}
    broken = with_overrides(tiny_settings, {"data.train": [source]}, "test")
    for ray_data in (False, True):
        with pytest.raises(UserError, match=r"^[^\n]*3\.jpg: not an image in a known format[^\n]*$"):
            batches(with_overrides(broken, {"data.ray_data": ray_data}, "test"), range(3))
    samples = [s for batch in batches(with_overrides(broken, {"data.skip_bad": True}, "test"), range(3)) for s in batch]
    (skipped,) = [s for s in samples if not s.record.instances]
    assert "3.jpg: not an image" in skipped.problem and skipped.weight == 0 and to_target(skipped)[1]["image_weight"] == 0


AHEAD = """
import os, sys, time
from i3cl.config import load_settings
from i3cl.data.loading.ingest import mix, training_batches
from i3cl.runtime.cluster import connect

connect()
settings = load_settings(sys.argv[1], ["data.ray_data=true", "data.transform.short_sides=[320]"])
mixed = mix(settings.data.train, settings.data_root)
stream = training_batches(mixed, settings.data, steps=range(500), batch=4, shares=[0], of=1, seed=7)
for _ in range(5):
    next(stream)
used, started = time.process_time(), time.perf_counter()
for _ in range(6):
    time.sleep(0.5)
    next(stream)
print((time.process_time() - used) / (time.perf_counter() - started), flush=True)
# Ray's threads of a stream that is left would end the process with an error.
os._exit(0)
"""


def test_a_pipeline_that_is_ahead_takes_no_time_from_training(tiny_settings, tmp_path):
    """Ray Data's loop ran without a pause while batches waited, and training on few cores was half as fast."""
    (tmp_path / "settings.yaml").write_text(to_yaml(tiny_settings))
    command = [sys.executable, "-c", AHEAD, str(tmp_path / "settings.yaml")]
    run = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert run.returncode == 0, run.stderr[-2000:]
    assert float(run.stdout.split()[-1]) < 0.3

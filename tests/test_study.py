"""Studies: the split by seed, the table, and a grid of arms with real training that is done once."""

import json

import numpy as np
import pytest

from i3cl.config import with_overrides
from i3cl.data.formats.coco import read_coco, write_coco
from i3cl.data.formats.records import ImageRecord
from i3cl.errors import SettingsError, UserError
from i3cl.evaluation.analysis.intervals import compare, seeds_difference
from i3cl.report.study import write_study_figure
from i3cl.study import COLUMNS, _split, study, table


def summary_of(**arms):
    def runs(values):
        return [
            {"seed": seed, "rules": "polygon IoU > 0.5", **dict.fromkeys(COLUMNS, value)} for seed, value in enumerate(values)
        ]

    return {
        "images": 9,
        "arms": {
            name: {**{c: {"mean": float(np.mean(v)), "std": 0.0123} for c in COLUMNS}, "runs": runs(v)}
            for name, v in arms.items()
        },
        "comparisons": [{"a": "S", "b": "C", "difference": 0.031, "low": 0.002, "high": 0.06, "per_seed": [0.03, 0.032]}],
    }


def test_table_shows_mean_spread_and_differences(tmp_path):
    summary = summary_of(S=[0.5, 0.5], C=[0.47, 0.468])
    text = table(summary)
    assert text.splitlines()[1].split() == ["S", *["50.0", "±", "1.2"] * 4]
    assert "S - C: +3.1 points of F, 95 % interval +0.2 to +6.0 (per seed +3.0, +3.2)" in text
    assert "seeds 0, 1; 9 images; polygon IoU > 0.5" in text
    write_study_figure(str(tmp_path / "study.png"), summary)
    assert (tmp_path / "study.png").read_bytes().startswith(b"\x89PNG")


def rows(rng, images, quality):
    truths = rng.integers(1, 9, images).astype(float)
    hits = rng.binomial(truths.astype(int), quality).astype(float)
    return np.stack([hits, truths, hits, hits + rng.integers(0, 3, images)], axis=1)


def test_difference_over_seeds():
    rng = np.random.default_rng(0)
    good, bad = ([rows(rng, 200, quality) for _ in range(3)] for quality in (0.7, 0.6))
    difference, interval = seeds_difference(good, bad)
    assert 0.03 < difference < 0.1 and 0 < interval.low < difference < interval.high
    same, nothing = seeds_difference(good, good)
    assert same == 0 and nothing.low == nothing.high == 0
    one, alone = seeds_difference(good[:1], bad[:1])
    plain = compare(good[0], bad[0])
    assert one == pytest.approx(plain.difference)
    # With one seed it is the paired bootstrap over images; the draws differ.
    assert (alone.low, alone.high) == pytest.approx((plain.interval.low, plain.interval.high), abs=0.01)
    with pytest.raises(ValueError, match="same seeds"):
        seeds_difference(good, bad[:2])


ARMS = {
    "T": {},
    "S": {
        "start_from": "T",
        "labels_from": ["T"],
        "train": [{"use": "labelled", "per_step": 1}, {"use": "pseudo", "per_step": 1}],
    },
    "C": {"start_from": "T", "overrides": {"train.learning_rate": 1e-3}},
}


@pytest.fixture
def recipe(tiny_settings, tmp_path):
    changes = {
        "name": "study",
        "storage": str(tmp_path),
        "train.steps": 2,
        "train.checkpoint_every": 2,
        "model.score_threshold": 0.0,
        "model.detections_per_image": 5,
        "label.select": {"low": 0.0, "ignore": 0.0, "high": 0.9},
        "label.fusion.min_score": 0.0,
        "study": {"seeds": [3], "labelled": 4, "test": 3, "arms": ARMS, "compare": [["S", "C"]]},
    }
    settings = with_overrides(tiny_settings, changes, "test")
    root = settings.data.train[0].annotations.rpartition("/")[0]
    source = {"annotations": "set.json", "images": "images"}
    unlabelled = source | {"annotations": "unlabelled.json"}
    return with_overrides(settings, {"data_root": root, "data.train": [source], "label.source": unlabelled}, "test")


def test_split_is_fixed_by_the_seeds(recipe, tmp_path):
    more = [
        ImageRecord(r.id, r.file_name, 96, 96)
        for r in read_coco(f"{recipe.data_root}/unlabelled.json", "", check_files=False).records
    ]
    more += [ImageRecord(100 + i, f"more/{i}.jpg", 96, 96) for i in range(30)]
    write_coco(str(tmp_path / "more.json"), more)
    changes = {"study.seeds": [0, 1], "label.source": {"annotations": str(tmp_path / "more.json"), "images": "images"}}
    settings = with_overrides(recipe, changes, "test")
    parts, test = _split(settings, str(tmp_path / "a"))
    again, test_again = _split(settings, str(tmp_path / "b"))
    assert test is not None and test_again is not None
    names = {r.file_name for r in test.records}
    assert len(names) == 3 and names == {r.file_name for r in test_again.records}
    seen = {}
    for seed, part in parts.items():
        labelled = read_coco(part.labelled[0]["annotations"], part.labelled[0]["images"])
        seen[seed] = {r.file_name for r in labelled.records}
        assert len(seen[seed]) == 4 and not seen[seed] & names
        assert (tmp_path / f"a/seed-{seed}/labelled.json").read_bytes() == (
            tmp_path / f"b/seed-{seed}/labelled.json"
        ).read_bytes()
        unlabelled = read_coco(part.unlabelled.annotations, part.unlabelled.images, check_files=False)
        hidden = read_coco(part.hidden.annotations, part.hidden.images)
        # 12 images: 3 test, 4 labelled, 5 hidden. label.source has all 12 of them, and thirty others in `more`.
        assert len(hidden) == 5 and len(unlabelled) == 5 + 30
        assert not any(r.instances for r in unlabelled.records) and any(r.instances for r in hidden.records)
        assert not {r.file_name for r in hidden.records} & {f"images/{name}" for name in names | seen[seed]}
    assert seen[0] != seen[1] and list(again) == [0, 1]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"study.arms.S.labels_from": ["X"]}, "arms.S.labels_from: X is not an arm; there are T, S, C"),
        ({"study.arms.T.start_from": "C"}, "arms: T, S, C need each other in a circle"),
        ({"study.compare": [["S", "Z"]]}, "compare: Z is not an arm; there are T, S, C"),
        ({"study.arms.T.train": [{"use": "pseudo"}]}, "labels_from: goes with"),
        ({"study.seeds": [1, 1]}, "seeds: give each seed once"),
    ],
)
def test_a_study_that_cannot_be_is_refused(recipe, changes, message):
    with pytest.raises(SettingsError, match=message):
        with_overrides(recipe, changes, "test")


def test_too_few_images_are_named(recipe, tmp_path):
    with pytest.raises(UserError, match=r"study.labelled, study.test: together 12 of 12 images"):
        _split(with_overrides(recipe, {"study.test": 8}, "test"), str(tmp_path))


@pytest.mark.slow
def test_arms_are_trained_once(recipe, tmp_path, ray_cluster):
    settings = with_overrides(recipe, {"study.arms.S.overrides": {"train.batch": 2}}, "test")
    summary = study(settings)
    run = tmp_path / "study"
    assert list(summary["arms"]) == ["T", "S", "C"] and summary["images"] == 3
    assert json.loads((run / "study.json").read_text()) == summary
    assert [row["per_seed"][0] for row in summary["comparisons"]] == [
        summary["arms"]["S"]["hmean"]["mean"] - summary["arms"]["C"]["hmean"]["mean"]
    ]
    assert summary["labels"][0]["arm"] == "S" and 0 <= summary["labels"][0]["precision"] <= 1
    assert "seed-3/T/best" in (run / "seed-3/S/settings.yaml").read_text()
    before = {path: path.stat().st_mtime_ns for path in run.rglob("weights.safetensors")}
    assert study(settings) == summary
    assert before == {path: path.stat().st_mtime_ns for path in run.rglob("weights.safetensors")}
    # Another seed joins; other arms do not.
    joined = study(with_overrides(settings, {"study.seeds": [3, 4]}, "test"))
    assert joined["arms"]["T"]["runs"][0] == summary["arms"]["T"]["runs"][0] and len(joined["arms"]["T"]["runs"]) == 2
    assert all(path.stat().st_mtime_ns == time for path, time in before.items())
    with pytest.raises(UserError, match=r"other settings \(study.compare"):
        study(with_overrides(settings, {"study.compare": []}, "test"))

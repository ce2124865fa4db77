"""What the circle says and how its control is made; the circle itself runs in tests/jobs."""

import numpy as np
import pytest

from i3cl.circle import verdict
from i3cl.config import with_overrides
from i3cl.data.formats.predictions import member_predictions, prediction_table
from i3cl.data.formats.records import Dataset, ImageRecord, Instance
from i3cl.errors import SettingsError, UserError
from i3cl.evaluation.metrics.model_score import score_predictions
from i3cl.labelling.pseudo import with_pseudo_labels, without_pseudo_labels
from i3cl.labelling.scoring import Gain, Scores, gain


def test_a_gain_above_zero_is_said(tiny_settings):
    text = verdict(Gain(0.031, 0.004, 0.06), tiny_settings)
    assert text.startswith("Student minus control: +3.1 points of F, 95 % interval +0.4 to +6.0.")
    assert "better" in text and "levers" not in text


def test_a_gain_that_cannot_be_told_from_zero_names_levers(tiny_settings):
    text = verdict(Gain(0.009, -0.004, 0.026), tiny_settings)
    assert "cannot be told from zero" in text and "selftrain.pseudo_per_step" in text and "train.average_decay" in text
    assert "made it worse" in verdict(Gain(-0.03, -0.05, -0.01), tiny_settings)
    every = {
        "selftrain.members": {"scene": "lite0-scene"},
        "selftrain.calibrate": True,
        "selftrain.pseudo_per_step": 1,
        "selftrain.pseudo_transform": {"blur": 0.5},
        "train.average_decay": 0.99,
        "label.select.outline_high": 0.7,
        "label.views": [{}, {"flip": True}],
    }
    assert "better teachers" in verdict(Gain(0, -0.1, 0.1), with_overrides(tiny_settings, every, "test"))
    assert "is not known" in verdict(None, tiny_settings)


def test_a_control_by_weight_has_the_labelled_sources_alone(tiny_settings):
    student = with_pseudo_labels(tiny_settings, "pseudo.json", "images")
    assert [s["annotations"] for s in student][1:] == ["pseudo.json"]
    assert without_pseudo_labels(tiny_settings) == student[:1]


def test_a_control_per_step_sees_as_many_images_as_the_student(tiny_settings):
    first = tiny_settings.data.train[0].model_dump()
    changes = {
        "data.train": [{**first, "per_step": 3}, {**first, "per_step": 1}],
        "train.batch": 4,
        "selftrain.pseudo_per_step": 4,
        "selftrain.pseudo_loss_scale": 2.0,
        "selftrain.pseudo_transform": {"blur": 0.5},
    }
    settings = with_overrides(tiny_settings, changes, "test")
    student, control = with_pseudo_labels(settings, "pseudo.json", "images"), without_pseudo_labels(settings)
    assert sum(s["per_step"] for s in student) == sum(s["per_step"] for s in control) == 8
    assert [s["per_step"] for s in control] == [3, 1, 3, 1]
    assert [s["transform"] for s in control] == [{}, {}, {"blur": 0.5}, {"blur": 0.5}]
    # Labelled images teach at their own weight, however strongly they are augmented.
    assert [s["loss_scale"] for s in control] == [1, 1, 1, 1] and student[2]["loss_scale"] == 2
    # Both are recipes that training accepts.
    for sources in (student, control):
        with_overrides(settings, {"data.train": sources, "train.batch": 8}, "test")


def test_labelled_images_per_step_of_a_student_whose_teachers_take_any_number(tiny_settings):
    changes = {"selftrain.labelled_per_step": 3, "selftrain.pseudo_per_step": 5}
    settings = with_overrides(tiny_settings, changes, "test")
    student, control = with_pseudo_labels(settings, "pseudo.json", "images"), without_pseudo_labels(settings)
    assert [s["per_step"] for s in student] == [s["per_step"] for s in control] == [3, 5]
    assert settings.data.train[0].per_step is None
    with pytest.raises(SettingsError, match="labelled_per_step: goes with pseudo_per_step"):
        with_overrides(tiny_settings, {"selftrain.labelled_per_step": 3}, "test")
    two = with_overrides(settings, {"data.train": [settings.data.train[0].model_dump()] * 2}, "test")
    with pytest.raises(UserError, match=r"use data\.train\.N\.per_step"):
        with_pseudo_labels(two, "pseudo.json", "images")


def box(x):
    return np.array([[x, 0], [x + 30, 0], [x + 30, 12], [x, 12]], np.float32)


@pytest.fixture
def two_models(tmp_path, tiny_settings):
    """Forty images of one word: model a finds all, model b every second one."""
    import pyarrow.parquet as pq

    records = [ImageRecord(i, f"{i}.jpg", 100, 100, (Instance(box(10)),)) for i in range(1, 41)]
    truth = Dataset("truth", "images", records)
    rows = []
    for record in records:
        for member in "ab":
            seen = member == "a" or record.id % 2
            row = {"image_id": record.id, "file_name": record.file_name, "height": 100, "width": 100, "member": member}
            polygons, scores = ([box(10)], [0.9]) if seen else ([], [])
            rows.append(row | {"view": "default", "polygons": polygons, "scores": np.array(scores, np.float32), "error": None})
    (tmp_path / "found").mkdir()
    pq.write_table(prediction_table(rows), tmp_path / "found" / "part-00-000000.parquet")
    found = str(tmp_path / "found")
    members = {m: score_predictions(m, records, member_predictions(found, m), tiny_settings.evaluate) for m in "ab"}
    return truth, Scores(found, members)


def test_gain_is_paired(two_models, tiny_settings):
    truth, scores = two_models
    found = gain(truth, (scores, "a"), (scores, "b"), tiny_settings.evaluate)
    # F is 1 against 2/3: recall one half, precision 1.
    assert found.difference == pytest.approx(1 / 3, abs=1e-6)
    assert 0.15 < found.low < found.difference < found.high < 0.6
    same = gain(truth, (scores, "b"), (scores, "b"), tiny_settings.evaluate)
    assert (same.difference, same.low, same.high) == (0, 0, 0)

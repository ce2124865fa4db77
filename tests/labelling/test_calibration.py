import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from i3cl.config import FusionSettings
from i3cl.errors import UserError
from i3cl.labelling.calibration import (
    Calibration,
    cross_calibrated,
    expected_calibration_error,
    fit_calibration,
    read_calibration,
    reliability,
    write_calibration,
)


def overconfident(seed=0, count=4000):
    """Scores whose true precision is their square, and an image for each."""
    rng = np.random.default_rng(seed)
    scores = rng.uniform(0, 1, count)
    return scores, rng.uniform(0, 1, count) < scores**2, rng.integers(0, 300, count)


def test_calibration_finds_the_precision_behind_the_score():
    scores, right, _ = overconfident()
    calibration = fit_calibration(scores, right)
    at = np.array([0.2, 0.5, 0.8])
    assert calibration(at) == pytest.approx(at**2, abs=0.07)
    assert calibration.instances == len(scores)


def test_images_that_a_calibration_has_not_seen_are_expected_right():
    scores, right, images = overconfident()
    before = expected_calibration_error(reliability(scores, right))
    after = expected_calibration_error(reliability(cross_calibrated(scores, right, images), right))
    assert before > 0.12
    assert after < 0.03


def test_one_image_alone_keeps_its_scores():
    assert cross_calibrated([0.3, 0.7], [True, False], [1, 1]).tolist() == [0.3, 0.7]


@hypothesis_settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.floats(0, 1), st.booleans()), min_size=1, max_size=30))
def test_precision_never_falls_with_the_score(instances):
    scores, right = zip(*instances)
    values = fit_calibration(scores, right)(np.linspace(0, 1, 50))
    assert (np.diff(values) >= -1e-12).all()
    assert ((values >= 0) & (values <= 1)).all()


def test_nothing_to_learn_from():
    with pytest.raises(ValueError, match="0 scores"):
        fit_calibration([], [])
    assert reliability([], []) == []
    assert expected_calibration_error([]) == 0


def test_bins_hold_every_instance_once():
    bins = reliability([0.0, 0.05, 0.1, 0.95, 1.0], [False, True, True, True, True])
    assert [(b.low, b.count, b.observed) for b in bins] == [(0.0, 2, 0.5), (0.1, 1, 1.0), (0.9, 2, 1.0)]


def test_json_gives_the_same_calibration_back(tmp_path):
    scores, right, _ = overconfident(count=50)
    one = fit_calibration(scores, right, ["b", "a"], FusionSettings(iou=0.4))
    path = str(tmp_path / "calibration.json")
    write_calibration(path, one)
    assert read_calibration(path) == one


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "[]",
        "{}",
        json.dumps({"scores": [], "precision": [], "members": [], "fusion": {}, "instances": 0}),
        json.dumps({"scores": [0, 1], "precision": [0.5], "members": [], "fusion": {}, "instances": 0}),
        json.dumps({"scores": [0, 1], "precision": [0.9, 0.5], "members": [], "fusion": {}, "instances": 0}),
        json.dumps({"scores": [0, 1], "precision": [0.9, 1.5], "members": [], "fusion": {}, "instances": 0}),
        json.dumps({"scores": [0], "precision": [0.5], "members": [], "fusion": {"x": 1}, "instances": 0}),
    ],
)
def test_broken_files_are_named(tmp_path, content):
    path = tmp_path / "calibration.json"
    path.write_text(content)
    with pytest.raises(UserError, match=r"calibration\.json: not a calibration") as error:
        read_calibration(str(path))
    assert "\n" not in str(error.value)


def test_scores_of_other_members_or_fusion_are_refused():
    calibration = Calibration((0.0, 1.0), (0.0, 1.0), ("a", "b"), FusionSettings())
    calibration.check(["b", "a"], FusionSettings(), "c.json")
    with pytest.raises(UserError, match="members a, b, not a"):
        calibration.check(["a"], FusionSettings(), "c.json")
    with pytest.raises(UserError, match=r"label\.fusion"):
        calibration.check(["a", "b"], FusionSettings(iou=0.4), "c.json")

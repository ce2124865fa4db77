import optuna
import pytest
from hypothesis import given
from hypothesis import strategies as st

from i3cl.config import Settings
from i3cl.errors import SettingsError
from i3cl.search.space import SHARE, Space

RANGES = {
    "label.select.low": {"uniform": [0.1, 0.6]},
    "label.select.high": {"uniform": [0.2, 0.9], "above": "label.select.low"},
    "label.select.ignore": {"uniform": [0.0, 0.5], "below": "label.select.low"},
    "label.select.min_votes": {"integer": [1, 3]},
    "model.loss_mask": {"log": [0.1, 10]},
    "model.weight_mask_loss": {"choice": [False, True]},
}


def space_of(ranges, **sections) -> Space:
    return Space.of(Settings.model_validate({**sections, "search": {"space": ranges}}))


@given(st.integers(0, 2**31))
def test_suggestions_stay_in_their_ranges_and_come_back_from_their_parameters(seed):
    space = space_of(RANGES)
    trial = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=seed)).ask()
    values = space.suggest(trial)
    assert list(values) == list(RANGES)
    assert values["label.select.ignore"] <= values["label.select.low"] <= values["label.select.high"]
    assert 0.1 <= values["label.select.low"] <= 0.6 and 0.2 <= values["label.select.high"] <= 0.9
    assert values["label.select.min_votes"] in (1, 2, 3) and 0.1 <= values["model.loss_mask"] <= 10
    again = space.parameters(values)
    assert again == pytest.approx(trial.params)
    assert set(again) == set(space.distributions()) == set(space.grid())
    assert "label.select.high" + SHARE in again


def test_the_present_settings_are_a_point_of_the_space():
    settings = Settings.model_validate({"search": {"space": RANGES}})
    space = Space.of(settings)
    present = space.present(settings)
    assert present["label.select.low"] == 0.4 and present["model.weight_mask_loss"] is False
    study = optuna.create_study()
    study.enqueue_trial(space.parameters(present))
    assert space.suggest(study.ask()) == pytest.approx(present)


def test_a_grid_takes_ends_choices_and_whole_numbers():
    grid = space_of({**RANGES, "model.loss_mask": {"log": [0.1, 10], "points": 3}}).grid()
    assert grid["label.select.min_votes"] == [1, 2, 3]
    assert grid["model.loss_mask"] == pytest.approx([0.1, 1, 10])
    assert grid["label.select.low"] == pytest.approx([0.1, 0.225, 0.35, 0.475, 0.6])


def test_a_member_weight_is_a_key_though_the_settings_do_not_name_it():
    space = space_of({"label.fusion.member_weights.a": {"uniform": [0.0, 2.0]}})
    assert space.parameters({"label.fusion.member_weights.a": 1.0}) == {"label.fusion.member_weights.a": 1.0}


@pytest.mark.parametrize(
    ("ranges", "words"),
    [
        ({}, ["search.space", "empty"]),
        ({"label.select.lwo": {"uniform": [0, 1]}}, ["label.select.lwo", "label.select.low?"]),
        ({"label.select.high": {"uniform": [0, 1], "above": "label.select.low"}}, ["must stand before"]),
        ({"label.select.low": {"uniform": [0.5, 0.9]}}, ["label.select.low", "0.4", "widen"]),
        ({"model.loss_mask": {"choice": [2.0, 3.0]}}, ["model.loss_mask", "1.0", "add it"]),
        ({"label.select.low": {"uniform": [0.9, 0.1]}}, ["search.space.label.select.low", "empty"]),
        ({"label.select.low": {"uniform": [0, 1], "choice": [0.4]}}, ["exactly one"]),
        ({"label.select.low": {}}, ["exactly one"]),
        ({"model.loss_mask": {"log": [0, 1]}}, ["greater than 0"]),
        ({"label.select.min_votes": {"integer": [1, 3], "above": "x"}}, ["uniform only"]),
        ({"search.trials": {"integer": [1, 300]}}, ["cannot be searched"]),
    ],
)
def test_an_unusable_space_is_one_line(tmp_path, ranges, words):
    import yaml

    from i3cl.config import load_settings

    path = tmp_path / "space.yaml"
    path.write_text(yaml.safe_dump({"search": {"space": ranges}}))
    with pytest.raises(SettingsError) as caught:
        Space.of(load_settings(path))
    message = str(caught.value)
    assert all(word in message for word in words), message
    assert "\n" not in message

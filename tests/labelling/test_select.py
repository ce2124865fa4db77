import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from i3cl.config import SelectSettings
from i3cl.labelling.fusion import FusedInstances
from i3cl.labelling.select import SelectionSummary, select


def box(width=100.0, height=20.0):
    return np.array([[0, 0], [width, 0], [width, height], [0, height]], np.float32)


def fused(*scores, votes=None, polygons=None):
    return FusedInstances(
        polygons=[box() for _ in scores] if polygons is None else polygons,
        scores=np.array(scores, float),
        votes=np.full(len(scores), 3) if votes is None else np.array(votes),
    )


SETTINGS = SelectSettings(high=0.8, low=0.4, ignore=0.2, min_weight=0.2, min_votes=2, min_side=5)


def test_thresholds_are_inclusive():
    chosen = select(fused(1.0, 0.8, 0.79, 0.6, 0.4, 0.39, 0.2, 0.19), SETTINGS)
    assert chosen.ignore.tolist() == [False] * 5 + [True] * 2
    assert chosen.lossweight == pytest.approx([1, 1, 0.98, 0.6, 0.2, 0, 0])
    assert chosen.scores.tolist() == [1.0, 0.8, 0.79, 0.6, 0.4, 0.39, 0.2]
    assert chosen.dropped == 1
    assert len(chosen.polygons) == len(chosen) == 7


def test_few_votes_make_an_ignore_region():
    chosen = select(fused(0.9, 0.9, 0.1, votes=[2, 1, 1]), SETTINGS)
    assert chosen.ignore.tolist() == [False, True]
    assert chosen.lossweight.tolist() == [1, 0]
    assert chosen.votes.tolist() == [2, 1]
    assert chosen.dropped == 1


def test_a_small_short_side_makes_an_ignore_region():
    slanted = np.array([[0, 0], [60, 60], [58, 62], [-2, 2]], np.float32)
    chosen = select(fused(0.9, 0.9, 0.9, polygons=[box(height=5), box(height=4.9), slanted]), SETTINGS)
    assert chosen.ignore.tolist() == [False, True, True]


def test_equal_thresholds_leave_no_ramp():
    settings = SelectSettings(high=0.5, low=0.5, ignore=0.5)
    chosen = select(fused(0.5, 0.499999), settings)
    assert (chosen.lossweight.tolist(), chosen.ignore.tolist(), chosen.dropped) == ([1.0], [False], 1)


def test_thresholds_of_zero_take_everything():
    chosen = select(fused(0.0, 0.5), SelectSettings(high=0, low=0, ignore=0))
    assert chosen.lossweight.tolist() == [1.0, 1.0]


def test_empty():
    chosen = select(fused(), SETTINGS)
    assert (len(chosen), chosen.polygons, chosen.dropped) == (0, [], 0)
    assert chosen.lossweight.shape == chosen.ignore.shape == chosen.scores.shape == chosen.votes.shape == (0,)
    assert (chosen.ignore.dtype, chosen.votes.dtype.kind) == (bool, "i")


def test_the_fused_instances_stay_as_they_are():
    instances = fused(0.9, 0.5, 0.3)
    before = instances.scores.copy()
    select(instances, SETTINGS)
    assert (instances.scores == before).all()


@hypothesis_settings(max_examples=25, deadline=None)
@given(
    thresholds=st.lists(st.floats(0, 1), min_size=3, max_size=3).map(sorted),
    min_weight=st.floats(0, 1),
    scores=st.lists(st.floats(0, 1), max_size=10).map(sorted),
)
def test_weight_never_falls_with_the_score(thresholds, min_weight, scores):
    settings = SelectSettings(
        ignore=thresholds[0], low=thresholds[1], high=thresholds[2], min_weight=min_weight
    )
    chosen = select(fused(*scores), settings)
    weights = chosen.lossweight
    assert (np.diff(weights) >= 0).all()
    assert ((weights[~chosen.ignore] >= min_weight) & (weights[~chosen.ignore] <= 1)).all()
    assert (weights[chosen.ignore] == 0).all()
    assert len(chosen) + chosen.dropped == len(scores)


def test_summary():
    summary = SelectionSummary()
    empty = {
        "images": 0,
        "images_with_labels": 0,
        "instances": 0,
        "ignored": 0,
        "dropped": 0,
        "mean_weight": 0,
    }
    assert summary.summary() == empty
    summary.update(select(fused(0.9, 0.6, 0.3, 0.1), SETTINGS))
    summary.update(select(fused(0.3), SETTINGS))
    summary.update(select(fused(), SETTINGS))
    assert summary.summary() == pytest.approx(
        {"images": 3, "images_with_labels": 1, "instances": 2, "ignored": 2, "dropped": 1, "mean_weight": 0.8}
    )

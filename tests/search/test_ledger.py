import numpy as np
import pytest

from i3cl.search.ledger import Ledger
from i3cl.search.objectives import Counts, bootstrap, held_out


def test_a_ledger_comes_back_as_it_was_written(tmp_path):
    ledger = Ledger(str(tmp_path))
    first = ledger.begin({"a": 0.5, "b": True}, present=True)
    first.metrics, first.state, first.curve = {"hmean": 0.4, "labels": 7.0}, "finished", [(10, 0.3), (20, 0.4)]
    running = ledger.begin({"a": 0.7, "b": False}, present=False)
    ledger.write()
    again = Ledger(str(tmp_path))
    assert again.trials == [first, running]
    assert again.done() == [first] and again.best() == first
    assert again.begin({"a": 0.7, "b": False}, present=False).number == 2, "a trial cut off by a kill goes on"
    assert again.begin({"a": 0.5, "b": True}, present=True).number == 3, "a finished one does not"


def test_best_and_front(tmp_path):
    ledger = Ledger(str(tmp_path))
    for number, (f, labels, state) in enumerate(
        [(0.5, 10, "finished"), (0.6, 5, "finished"), (0.5, 5, "finished"), (0.9, 99, "stopped"), (0.6, 5, "finished")]
    ):
        trial = ledger.begin({"a": number}, present=False)
        trial.metrics, trial.state = {"hmean": f, "labels": labels}, state
    ledger.begin({"a": 9}, present=False).state = "broken"
    best = ledger.best()
    assert best is not None and best.number == 2, "of equal ones the first, and none that was stopped early"
    assert ledger.front() == {1, 2, 5}


def test_no_trial_is_best_of_none(tmp_path):
    assert Ledger(str(tmp_path)).best() is None


def test_held_out_parts_by_id_alone():
    parts = [held_out(i, 0.3, seed=1) for i in range(4000)]
    assert 0.27 < np.mean(parts) < 0.33
    assert parts == [held_out(i, 0.3, seed=1) for i in range(4000)]
    assert parts != [held_out(i, 0.3, seed=2) for i in range(4000)]


def test_bootstrap_sees_a_difference_and_its_absence():
    rng = np.random.default_rng(0)
    truths = rng.integers(1, 10, 300)
    good = Counts(truths - (rng.random(300) < 0.1), truths, truths)
    bad = Counts(truths - (rng.random(300) < 0.6), truths, truths)
    verdict = bootstrap(good, bad)
    assert verdict["difference"][0] > 0 and verdict["better"] == 1
    same = bootstrap(good, good)
    assert same["difference"] == [0, 0] and same["better"] == 0
    low, high = verdict["first"]
    assert low < good.scores()["hmean"] < high


def test_counts_without_anything_score_zero():
    nothing = Counts(*(np.zeros(2, np.int64) for _ in range(3)))
    assert nothing.scores() == {"recall": 0, "precision": 0, "hmean": 0}
    assert bootstrap(nothing, nothing)["first"] == [0, 0]


def test_scores_are_the_usual_ones():
    counts = Counts(np.array([3, 1]), np.array([4, 4]), np.array([5, 1]))
    scores = counts.scores()
    recall, precision = 4 / 8, 4 / 6
    assert scores["recall"] == recall and scores["precision"] == pytest.approx(precision)
    assert scores["hmean"] == pytest.approx(2 * recall * precision / (recall + precision))

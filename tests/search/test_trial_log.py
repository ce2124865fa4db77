import numpy as np
import pytest

from i3cl.config import EvaluateSettings
from i3cl.data.formats.records import ImageRecord, Instance
from i3cl.search.objectives import count, scores, verdict
from i3cl.search.trial_log import TrialLog


def test_a_log_comes_back_as_it_was_written(tmp_path):
    log = TrialLog(str(tmp_path))
    first = log.begin({"a": 0.5, "b": True}, present=True)
    first.metrics, first.state, first.curve = {"hmean": 0.4, "labels": 7.0}, "finished", [(10, 0.3), (20, 0.4)]
    running = log.begin({"a": 0.7, "b": False}, present=False)
    log.write()
    again = TrialLog(str(tmp_path))
    assert again.trials == [first, running]
    assert again.done() == [first] and again.best() == first
    assert again.begin({"a": 0.7, "b": False}, present=False).number == 2, "a trial cut off by a kill goes on"
    assert again.begin({"a": 0.5, "b": True}, present=True).number == 3, "a finished one does not"
    assert again.begin({"a": 0.7, "b": False}, present=False, copy=1).number == 4, "nor one of equal values at the same time"


def test_best_and_front(tmp_path):
    log = TrialLog(str(tmp_path))
    for number, (f, labels, state) in enumerate(
        [(0.5, 10, "finished"), (0.6, 5, "finished"), (0.5, 5, "finished"), (0.9, 99, "stopped"), (0.6, 5, "finished")]
    ):
        trial = log.begin({"a": number}, present=False)
        trial.metrics, trial.state = {"hmean": f, "labels": labels}, state
    log.begin({"a": 9}, present=False).state = "broken"
    best = log.best()
    assert best is not None and best.number == 2, "of equal ones the first, and none that was stopped early"
    assert log.front() == {1, 2, 5}


def test_no_trial_is_best_of_none(tmp_path):
    assert TrialLog(str(tmp_path)).best() is None


def test_the_verdict_sees_a_difference_and_its_absence():
    square = np.array([[0, 0], [20, 0], [20, 10], [0, 10]], np.float32)
    truth = [ImageRecord(i, f"{i}.jpg", 99, 99, (Instance(square), Instance(square + 40))) for i in range(60)]
    good = count(truth, {i: [square, square + 40] if i % 5 else [square] for i in range(60)}, EvaluateSettings())
    bad = count(truth, {i: [square] if i % 2 else [square + 20] for i in range(60)}, EvaluateSettings())
    assert scores(good)["precision"] == 1 and scores(good)["recall"] == pytest.approx(108 / 120)
    told = verdict(good, bad, seed=0)
    assert told["difference"][0] > 0 and told["p_value"] < 0.01
    assert told["found"][0] < scores(good)["hmean"] < told["found"][1]
    same = verdict(good, good, seed=0)
    assert same["difference"] == [0, 0] and same["p_value"] == 1


def test_nothing_found_scores_zero():
    truth = [ImageRecord(1, "1.jpg", 9, 9, ())]
    assert scores(count(truth, {}, EvaluateSettings())) == {"recall": 0, "precision": 0, "hmean": 0}


def test_a_broken_trial_says_why_in_the_words_of_the_error():
    from i3cl.search.trials import _reason

    trace = "Traceback (most recent call last):\n  File x\n{}: search.space: low: must be below 1\n"
    assert _reason(trace.format("i3cl.errors.SettingsError")) == "search.space: low: must be below 1"
    assert _reason(trace.format("ValueError")) == "ValueError: search.space: low: must be below 1"


def test_what_could_not_be_written_at_once_is_written_later(tmp_path):
    import json
    import time

    log = TrialLog(str(tmp_path))
    log.write()
    log.begin({"a": 1}, present=False)
    log._sparing._next = time.monotonic() + 0.2
    log.write(always=False)
    assert log.owed and json.loads((tmp_path / "trials.json").read_text())["trials"] == []
    time.sleep(0.25)
    log.write(always=False)
    assert not log.owed and len(json.loads((tmp_path / "trials.json").read_text())["trials"]) == 1

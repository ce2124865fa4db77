"""Work in parts, and the time it takes."""

import time

import pytest

from i3cl import observe
from i3cl.errors import UserError
from i3cl.runtime import resources
from i3cl.runtime.pace import Every, Pace
from i3cl.runtime.parts import fan_out, run_parts


@pytest.fixture
def square():
    """A task that Ray sends by value: workers cannot import this file."""

    def task(number: int) -> int:
        if number == 5:
            raise UserError("part 5 is bad")
        return number * number

    return task


def test_parts_in_this_process(square, capsys):
    with observe.console():
        assert list(fan_out("work", square, [(3,), (4,)])) == [(0, 9), (1, 16)]
    assert "work: part 1 of 2, " in capsys.readouterr().out
    with pytest.raises(UserError, match="part 5 is bad"):
        list(fan_out("work", square, [(5,)]))
    assert run_parts("work", [], 0, lambda part: ["never"]) == []


def test_parts_as_ray_tasks_and_a_users_mistake_in_one(ray_cluster, square, capsys):
    calls = [(number,) for number in (0, 1, 2, 3, 4)]
    with observe.console():
        assert sorted(fan_out("work", square, calls, unit="bundle")) == [(n, n * n) for n in range(5)]
    assert "work: bundle 4 of 5, " in capsys.readouterr().out
    with pytest.raises(UserError, match=r"^part 5 is bad$"):
        list(fan_out("work", square, [*calls, (5,)]))
    with observe.console():
        found = run_parts("work", [1, 2, 3], 30, lambda part: [f"problem {part}"])
    assert sorted(found) == ["problem 1", "problem 2", "problem 3"]
    assert "work: 30 images in " in capsys.readouterr().out
    assert 1 <= resources.cluster_cores() <= resources.machine_cores(), "a local Ray is told of more CPUs than there are"
    assert resources.use_gpu(True) and not resources.use_gpu(False)


def test_pace_counts_only_what_was_done_since_it_began():
    pace = Pace(total=100, done=50)
    assert pace.left() == "" and pace.seconds_left is None and pace.rate == 0
    time.sleep(0.1)
    pace.done += 25
    assert pace.seconds_left == pytest.approx(pace.seconds, rel=0.2)
    assert pace.left().endswith("s left")


def test_every_says_yes_once_in_its_time():
    due = Every(0.1)
    assert not due()
    time.sleep(0.12)
    assert due() and not due()

"""Machines and processes of a real cluster vanish under a job: it goes on, and loses no more than it may.

`make faults` breaks everything and prints the table; here are a labelling job and the two faults of a training that differ most.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from cluster.faults import Labelling, Training, make_checkpoint, make_data
from cluster.nodes import namespaces_refused

REFUSED = namespaces_refused()


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("faults")
    make_data(folder)
    return folder


def assert_every_step_once(run: Training) -> None:
    steps = [row["step"] for row in run.rows()]
    assert steps == list(range(1, len(steps) + 1))


@pytest.mark.slow
def test_a_spot_machine_that_is_taken_away_costs_a_pause_but_no_step(data):
    """Also: one worker does the work of two, and the job ends when its steps are done."""
    with Training(data, network=REFUSED is None) as run:
        row = run.announce("spot notice", "")
        assert row.redone == "0 steps", f"{row}: the checkpoint at the notice was not used"
        names = {path.name for path in (run.folder / "runs" / "train" / "ray").glob("step_*")}
        assert any(int(name.removeprefix("step_")) % run.interval for name in names), f"no checkpoint at the notice: {names}"
        assert len([node for node in run.cluster.nodes[1:] if node.process.poll() is None]) == 1
        run.wait_for_step(run.step() + 3)
        assert_every_step_once(run)


@pytest.mark.skipif(REFUSED is not None, reason=str(REFUSED))
@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_cut_link_a_killed_worker_and_a_lost_head(data, tmp_path):
    (tmp_path / "data").symlink_to(data / "data")
    with Training(tmp_path, network=True) as run:
        rows = [
            run.strike("worker killed", "", run.kill_worker),
            run.strike("link cut", "", run.cut_link),
            run.strike("head lost", "", run.restart_head),
        ]
        for row in rows:
            assert int(row.redone.split()[0]) <= run.interval, f"{row}: more than a checkpoint interval was lost"
        assert_every_step_once(run)


@pytest.mark.slow
def test_labelling_loses_and_repeats_nothing_when_a_machine_vanishes(data, tmp_path):
    (tmp_path / "data").symlink_to(data / "data")
    with Labelling(tmp_path, REFUSED is None, make_checkpoint(tmp_path)) as job:
        job.strike("machine lost", "", job.remove_node)
        images, missing, double = job.finish()
    assert (images, missing, double) == (2000, 0, 0)

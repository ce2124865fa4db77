"""A user's mistake that surfaces in another process ends a command as one in the command itself does: status 2, one line."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from i3cl.cli import command_line
from i3cl.data.loading.images import ImageError
from i3cl.errors import UserError, inside
from i3cl.runtime import cluster, ray_private

LINE = "img/trunc.jpg: cannot be decoded (it is cut off); leave it out with --skip-bad"


def bad(batch: Any = None) -> Any:
    raise ImageError(LINE)


class Bad:
    def __call__(self, batch: Any = None) -> Any:
        bad()


@pytest.fixture(scope="module")
def ray() -> Iterator[Any]:
    with pytest.MonkeyPatch.context() as patch:
        import ray
        import ray.data

        patch.setenv("RAY_ADDRESS", "local")
        # One that other tests of this process have started is theirs, and stays.
        before = ray.is_initialized()
        cluster.connect()

        ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import a test

        yield ray
        if not before:
            ray.shutdown()


def _task(ray: Any) -> None:
    ray.get(ray.remote(bad).remote())


def _task_of_a_task(ray: Any) -> None:
    ray.get(ray.remote(lambda: ray.get(ray.remote(bad).remote())).remote())


def _actor(ray: Any) -> None:
    ray.get(ray.remote(Bad).remote().__call__.remote())


def _actor_that_cannot_begin(ray: Any) -> None:
    class Begins:
        def __init__(self) -> None:
            bad()

        def work(self) -> None:
            pass

    ray.get(ray.remote(Begins).remote().work.remote())


def _data(ray: Any) -> None:
    cluster.quiet(ray.data.DataContext.get_current())
    list(ray.data.range(4).map_batches(bad).iter_batches())


def _data_in_actors(ray: Any) -> None:
    cluster.quiet(ray.data.DataContext.get_current())
    list(ray.data.range(4).map_batches(Bad, concurrency=1).iter_batches())


def _data_read_by_a_worker(ray: Any) -> None:
    cluster.quiet(ray.data.DataContext.get_current())
    (shard,) = ray.data.range(4).map_batches(bad).streaming_split(1)
    ray.get(ray.remote(lambda: list(shard.iter_batches())).remote())


def _training(ray: Any) -> None:
    import ray.train
    from ray.train.torch import TorchTrainer

    TorchTrainer(bad, scaling_config=ray.train.ScalingConfig(num_workers=1)).fit()


WAYS = [_task, _task_of_a_task, _actor, _actor_that_cannot_begin, _data, _data_in_actors, _data_read_by_a_worker, _training]


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__.strip("_"))
def test_a_mistake_in_another_process_is_one_line(ray, way: Callable[[Any], None], capfd, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))  # Ray Train keeps its results there
    with pytest.raises(SystemExit) as ended:
        command_line.run(lambda settings, options: way(ray), "", argv=["name=x"], prog="train.py")
    assert ended.value.code == 2
    assert capfd.readouterr().err.strip().splitlines()[-1] == f"train.py: {LINE}"


def test_inside_finds_the_plain_error():
    plain = UserError("a.json: no such file")
    assert inside(plain, UserError) is plain
    try:
        try:
            raise OSError("disk")
        except OSError as low:
            raise UserError("better") from low
    except UserError as error:
        assert inside(error, UserError) is error and isinstance(inside(error, OSError), OSError)
    wrapped = RuntimeError("wrapper")
    wrapped.cause = plain  # type: ignore[attr-defined]  # as RayTaskError has it
    assert inside(ExceptionGroup("several", [ValueError("x"), wrapped]), UserError) is plain
    assert inside(ValueError("x"), UserError) is None
    circle = RuntimeError("a")
    circle.__cause__ = RuntimeError("b")
    circle.__cause__.__cause__ = circle
    assert inside(circle, UserError) is None


def test_a_mistake_keeps_its_line_when_ray_adds_advice_to_it():
    error = ImageError(LINE)
    error.args = (f"{LINE}\nTo change retry attempts, configure something",)
    assert str(error) == LINE and str(pickle.loads(pickle.dumps(error))) == LINE


# ------------------------------------------------------------------------------------------------- a Ray that cannot start


def test_a_local_ray_starts_with_a_long_temporary_folder_and_without_a_home(tmp_path):
    long = tmp_path / "slurm_jobdir_1355700_user" / "tmp.node0016" / "scratch"
    long.mkdir(parents=True)
    (tmp_path / "home").write_text("a file: nothing can be written below it")
    code = """
from i3cl.cli.command_line import run
from i3cl.runtime.cluster import connect
def work(settings, options):
    connect()
    import ray
    print("answer", ray.get(ray.remote(lambda: 6 * 7).remote()))
run(work, "starts")
"""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    environment |= {"TMPDIR": str(long), "HOME": str(tmp_path / "home"), "RAY_ADDRESS": "local"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"TMPDIR={long}: the path is too long for Ray's sockets" in done.stdout and "answer 42" in done.stdout
    assert list((long / "ray").glob("session_*/logs")), "the files are where the user wanted them"


def test_a_folder_that_cannot_be_used_is_replaced_or_named(tmp_path, monkeypatch):
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    (tmp_path / "ray").write_text("somebody's file")
    places = ray_private.local_places()
    own = f"/tmp/i3cl-{os.getuid()}"
    assert places.arguments["_temp_dir"] == f"{own}/ray" and f"RAY_TMPDIR={tmp_path}: " in places.told and own in places.told
    assert os.stat(own).st_mode & 0o077 == 0
    monkeypatch.setattr(ray_private, "_own_folder", lambda: None)
    with pytest.raises(UserError, match=rf"^RAY_TMPDIR={tmp_path}: .* set RAY_TMPDIR to a folder .* at most \d\d characters$"):
        ray_private.local_places()
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path / ("x" * 60)))
    with pytest.raises(UserError, match="too long for Ray's sockets; set RAY_TMPDIR to"):
        ray_private.local_places()


def test_a_usual_folder_is_left_to_ray(monkeypatch):
    for name in ("RAY_TMPDIR", "TMPDIR"):
        monkeypatch.delenv(name, raising=False)
    if ray_private._unusable("/tmp/ray"):
        pytest.skip("/tmp/ray belongs to somebody else here")
    assert "_temp_dir" not in ray_private.local_places().arguments

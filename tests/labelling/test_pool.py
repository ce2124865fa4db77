"""The queue of shards, and the pool of actors on nodes with fake GPUs that come, go, slow down and hang."""

import json
import subprocess
import sys

import pytest

from i3cl.config import SourceSettings
from i3cl.data.formats.records import Dataset, ImageRecord
from i3cl.data.loading.ingest import read_source
from i3cl.labelling import pool
from i3cl.labelling.ledger import part_name
from i3cl.labelling.manifest import make_manifest


@pytest.fixture
def clock(monkeypatch):
    """Seconds that pass only when a test says so."""
    now = [1000.0]
    monkeypatch.setattr(pool.time, "monotonic", lambda: now[0])

    def passes(seconds):
        now[0] += seconds

    return passes


def queue(shards, groups=1, together=4, silent=120.0):
    manifest = make_manifest(Dataset("set", "/i", [ImageRecord(k, f"{k}.jpg", 5, 5) for k in range(2 * shards)]))
    tasks = [(part_name(group, k), group, k) for group in range(groups) for k in range(shards)]
    return pool.ShardQueue(manifest, tasks, 2, together, silent)


def parts(block):
    return block["part"].to_pylist()


def done(shards, actor, finished):
    """Report these parts as finished; those of them that nobody had finished before."""
    shards.report(actor, [{"part": part} for part in finished])
    return [row["part"] for row in shards.news()[0]]


def test_every_shard_is_handed_out_once_and_the_last_ones_one_by_one(clock):
    shards = queue(40)
    taken = {"a": [], "b": []}
    while True:
        blocks = {actor: shards.take(actor, 0) for actor in taken}
        if blocks["a"] is True:
            break
        clock(1)
        for actor, block in blocks.items():
            if block is False:
                continue
            assert done(shards, actor, parts(block)) == parts(block)
            taken[actor].append(parts(block))
    every = [part for blocks in taken.values() for block in blocks for part in block]
    assert sorted(every) == [part_name(0, k) for k in range(40)]
    sizes = [len(block) for block in taken["a"]]
    assert sizes == sorted(sizes, reverse=True) and (sizes[0], sizes[-1]) == (4, 1)
    assert shards.take("a", 0) is True and shards.take("c", 0) is True


def test_a_block_holds_the_images_of_its_shards(clock):
    block = queue(3, together=1).take("a", 0).to_pylist()
    assert block == [
        {
            "part": part_name(0, 0),
            "group": 0,
            "image_id": [0, 1],
            "file_name": ["0.jpg", "1.jpg"],
            "height": [5, 5],
            "width": [5, 5],
        }
    ]


def test_an_actor_stays_with_the_members_that_it_holds(clock):
    shards, seen = queue(6, groups=2, together=1), {"a": [], "b": []}
    holds = {"a": 0, "b": 1}
    for _ in range(6):
        for actor in holds:
            block = shards.take(actor, holds[actor])
            seen[actor] += block["group"].to_pylist()
            done(shards, actor, parts(block))
    assert seen == {"a": [0] * 6, "b": [1] * 6}


def test_what_an_actor_had_when_it_was_restarted_goes_to_the_next(clock):
    shards = queue(12, together=2)
    first = parts(shards.take("a", 0))
    again = parts(shards.take("a", 0))
    assert first == again, "it asks again, so it has lost what it had"
    assert not set(parts(shards.take("b", 0))) & set(first)


def test_a_late_shard_is_labelled_by_an_idle_actor_too(clock):
    shards = queue(6, together=1)
    held = parts(shards.take("slow", 0))
    for _ in range(5):
        block = shards.take("fast", 0)
        clock(1)
        done(shards, "fast", parts(block))
    late = parts(shards.take("fast", 0))
    assert late == held, "five times as long as the others"
    assert shards.take("third", 0) is False, "two are enough"
    clock(0.5)
    assert done(shards, "fast", late) == late
    assert done(shards, "slow", held) == [], "it has been counted"
    assert shards.take("slow", 0) is True


def test_a_slow_actor_takes_fewer_shards_at_a_time(clock):
    shards = queue(200, together=4)
    sizes = {"slow": [], "fast": []}
    for _ in range(6):
        for actor, seconds in (("slow", 8), ("fast", 2), ("fast", 2)):
            block = shards.take(actor, 0)
            sizes[actor].append(len(block))
            clock(seconds * len(block))
            done(shards, actor, parts(block))
    assert sizes["fast"] == [4] * 12 and sizes["slow"] == [4, 1, 1, 1, 1, 1]


def test_a_shard_that_takes_as_long_as_others_is_left_alone(clock):
    shards = queue(3, together=1)
    for actor in "ab":
        block = shards.take(actor, 0)
        clock(10)
        done(shards, actor, parts(block))
    shards.take("a", 0)
    clock(15)
    assert shards.take("b", 0) is False
    clock(6)
    assert parts(shards.take("b", 0)) == [part_name(0, 2)]


def test_a_silent_actor_loses_its_shards(clock):
    shards = queue(8, together=1, silent=60)
    held = parts(shards.take("hangs", 0))
    for _ in range(3):
        block = shards.take("works", 0)
        clock(2)
        done(shards, "works", parts(block))
    clock(30)
    assert shards.silent() == [], "more than ten times the median, but not a minute"
    block = parts(shards.take("works", 0))
    clock(25)
    assert shards.silent() == ["hangs"] and shards.silent() == [], "the other one has taken 25 s, not a minute"
    assert parts(shards.take("third", 0)) == held
    # It comes back all the same: the shard is done, and nobody gets it again.
    assert done(shards, "hangs", held) == held
    done(shards, "works", block)
    assert parts(shards.take("works", 0)) != held


def test_nobody_is_late_or_silent_before_it_is_known_how_long_a_shard_takes(clock):
    """Else the first shards of a slow ensemble would kill their actors again and again."""
    shards = queue(2, together=1, silent=1)
    for actor in "ab":
        shards.take(actor, 0)
    clock(100_000)
    assert shards.silent() == [] and shards.take("c", 0) is False


def test_a_shard_given_back_but_finished_after_all_is_not_handed_out(clock):
    shards = queue(3, together=1, silent=1)
    held = parts(shards.take("a", 0))
    block = shards.take("b", 0)
    clock(1)
    done(shards, "b", parts(block))
    clock(700)
    assert shards.silent() == ["a"]
    assert done(shards, "a", held) == held
    assert parts(shards.take("b", 0)) == [part_name(0, 2)]
    done(shards, "b", [part_name(0, 2)])
    assert shards.take("a", 0) is True


def test_an_actor_that_hangs_is_killed_although_another_has_finished_its_shard(clock):
    shards = queue(4, together=1, silent=60)
    held = parts(shards.take("hangs", 0))
    for _ in range(3):
        block = shards.take("works", 0)
        clock(1)
        done(shards, "works", parts(block))
    assert done(shards, "works", parts(shards.take("works", 0))) == held
    clock(61)
    assert shards.silent() == ["hangs"]


def test_what_an_actor_finished_before_it_died_is_reported_and_ends_the_job(clock):
    """Its own answer is lost with it; a driver that counted those would wait for ever."""
    shards = queue(1)
    shards.report("dies", [{"part": part, "images": 2} for part in parts(shards.take("dies", 0))])
    assert shards.take("dies", 0) is True, "Ray starts it again"
    shards.report("dies", [{"part": None, "images": 0}])
    reports, over = shards.news()
    assert [row["images"] for row in reports] == [2, 0] and over
    assert shards.news() == ([], True)


def test_at_the_end_all_are_killed_and_nothing_more_is_handed_out(clock, monkeypatch):
    killed = []
    monkeypatch.setattr(pool, "_kill", lambda handle, restart: killed.append((handle, restart)))
    shards = queue(3, together=1)
    held = parts(shards.take("slow", 0, "handle of slow"))
    for _ in range(2):
        block = shards.take("fast", 0, "handle of fast")
        clock(1)
        done(shards, "fast", parts(block))
    clock(5)
    assert parts(shards.take("fast", 0, "handle of fast")) == held
    done(shards, "fast", held)
    assert shards.take("idle", 0, "handle of idle") is True
    shards.end()
    assert killed == [("handle of slow", False), ("handle of fast", False)]
    assert shards.take("restarted", 0, "handle of restarted") is True and not shards._handles


ENDS = """
import sys, time
from contextlib import closing
import ray
from i3cl.config import LabelSettings
from i3cl.labelling.layout import Layout
from i3cl.labelling.ledger import part_name
from i3cl.labelling.pool import labelled
from i3cl.labelling.scale_benchmark import Sleeper, Told, listed
from i3cl.runtime.cluster import connect

connect()
cores = ray.cluster_resources()["CPU"]
tasks = [(part_name(0, k), 0, k) for k in range(6)]
told, label = Told(sys.argv[1], 0.3, False), LabelSettings(rows_per_block=4)
spread = Layout(2, 2, 1, 1, cores / 2, 0.0, 1)

def free():
    end = time.time() + 20
    while (now := ray.available_resources().get("CPU", 0)) < cores and time.time() < end:
        time.sleep(0.2)
    return now == cores

found = list(labelled(told, listed(24), tasks, label, spread, Sleeper))
print("images", sum(row["images"] for row in found), "free", free())
with closing(labelled(told, listed(24), tasks, label, spread, Sleeper)) as reports:
    next(reports)
print("left early", "free", free())
list(labelled(told, listed(24), tasks, label, spread, Sleeper))
ray.shutdown()
print("ended")
"""


def test_a_job_leaves_no_actor_and_no_thread(tmp_path):
    """Otherwise a training after it waits for ever for cores, and threads that ask Ray after its end end the process."""
    (tmp_path / "out").mkdir()
    run = subprocess.run([sys.executable, "-c", ENDS, str(tmp_path / "out")], capture_output=True, text=True, timeout=200)
    said = ["images 24 free True", "left early free True", "ended"]
    assert run.returncode == 0 and run.stdout.splitlines()[-3:] == said, run.stdout + run.stderr[-2000:]


def played(name, folder):
    out = folder / "scale.json"
    command = [sys.executable, "-m", "i3cl.cli", "benchmark", "scale", "--only", name, "--out", str(out)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert run.returncode == 0, run.stderr[-3000:]
    print(run.stdout)
    [row] = map(json.loads, out.read_text().splitlines())
    assert "error" not in row and row["passed"], row
    assert row["free"] == row["gpus"], "no actor stays behind"
    return row


@pytest.mark.slow
def test_the_pool_grows_when_gpus_join(tmp_path):
    row = played("joins", tmp_path)
    assert (row["actors"], row["gpus"]) == (8, 8)


@pytest.mark.slow
def test_the_pool_goes_on_when_gpus_leave(tmp_path):
    assert played("leaves", tmp_path)["gpus"] == 4


@pytest.mark.slow
def test_a_slow_gpu_takes_fewer_shards_and_holds_nobody_up(tmp_path):
    row = played("slow", tmp_path)
    assert row["actors"] == 8 and row["shares"][0] < 0.4 * row["shares"][1]


@pytest.mark.slow
def test_a_job_ends_although_an_actor_hangs(tmp_path):
    assert sum(played("asleep", tmp_path)["shares"]) == 800


@pytest.mark.slow
def test_two_jobs_share_the_gpus_as_they_were_told(tmp_path):
    row = played("together", tmp_path)
    assert (row["actors"], row["gpus"]) == (4, 8)


def test_a_long_list_is_read_in_little_memory(tmp_path):
    """At ten million images the same takes 120 s and 3 GB at most: `i3cl benchmark scale --only list-10000000`."""
    from i3cl.labelling.scale_benchmark import write_list

    write_list(50_000, str(tmp_path / "list"))
    source = SourceSettings(annotations=str(tmp_path / "list"), images="/i")
    manifest = make_manifest(read_source(source, "", False, check_files=False))
    assert len(manifest) == 50_000 and manifest.table.nbytes < 60 * len(manifest)
    rows = manifest.table.to_pylist()
    records = [ImageRecord(row["image_id"], row["file_name"], row["height"], row["width"]) for row in rows]
    assert make_manifest(Dataset("set", "/i", records)).digest == manifest.digest, "as from records one by one"

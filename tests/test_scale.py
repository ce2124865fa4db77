"""The rows of `i3cl benchmark scale`, each at a size for which a test has time."""

import json

import pytest
from s3.proxy import Faults

from i3cl import scale
from i3cl.cli.benchmark import main


def told(row):
    assert row.passed, row.told
    return row.numbers


def test_a_sweep_spends_its_time_on_trials_and_not_in_its_driver(tmp_path):
    """Writing everything at every change took 271 ms a time at a thousand trials."""
    numbers = told(scale.trials(str(tmp_path)))
    assert (numbers["trials"], numbers["pages"]) == (1000, 1)
    assert numbers["megabytes"] > 0.1, "all trials are in the file"


def test_workers_of_one_machine_share_one_copy_of_the_annotations(tmp_path):
    numbers = told(scale.tables(str(tmp_path), images=60_000, workers=3))
    [copy] = (path.stat().st_size for path in tmp_path.glob("i3cl-tables-*/*.arrow") if path.stat().st_size > 5e6)
    assert numbers["gigabytes"] < 2 * copy / 1e9, "three copies would be more"


def test_what_a_job_asks_of_s3_does_not_grow_with_its_parts(bucket):
    """30 ms a request: one after another, 400 parts with an error each took 24 s, and 6,250 parts to group them 47 s."""
    bucket.proxy.reset(Faults(delay=0.03))
    failures = told(scale.failures(f"{bucket.url}/failures", parts=100))
    assert failures["GetObject"] == 100, "read side by side: one after another they would take 3 s, and 2 are allowed"
    numbers = told(scale.grouping(f"{bucket.url}/parts", parts=70))
    assert (numbers["ListObjectsV2"], numbers["groups"]) == (1, 3)
    assert told(scale.claimed(f"{bucket.url}/claims"))["won"] == 1


def test_requests_are_counted_as_the_server_sees_them(bucket):
    from i3cl import storage

    bucket.proxy.reset()
    with storage.counted(bucket.url) as counts:
        storage.write_text_atomic(f"{bucket.url}/a.txt", "a")
        assert storage.read_text(f"{bucket.url}/a.txt") == "a" and storage.list_dir(bucket.url) == ["a.txt"]
    seen = bucket.proxy.total()
    storage.read_text(f"{bucket.url}/a.txt")
    assert counts.total() == seen and counts["PutObject"] == 1, "nothing is counted afterwards"


def test_the_command_measures_rows_on_s3_and_leaves_nothing_there(bucket, tmp_path, monkeypatch, capsys):
    from i3cl import storage

    out = tmp_path / "scale.json"
    monkeypatch.setattr("sys.argv", ["benchmark", "scale", "--only", "claims", "--s3", bucket.url, "--out", str(out)])
    main()
    assert "| 20 drivers claim one folder on S3 | 1 of 20 won | 1 | yes |" in capsys.readouterr().out
    [row] = map(json.loads, out.read_text().splitlines())
    assert row["row"] == "claims" and row["passed"] and row["won"] == 1
    assert not storage.list_files(bucket.url)


@pytest.mark.parametrize(
    ("work", "ready", "end"),
    [(10, [0, 0], 5), (10, [0, 4], 7), (3, [0, 4], 3), (10, [0, 100, 2], 6), (4, [1], 5)],
)
def test_when_workers_that_begin_one_after_another_are_done(work, ready, end):
    from i3cl.labelling.scale_benchmark import _shared_end

    assert _shared_end(work, ready) == end


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--only", "nothing"], "--only: nothing is none of steady, joins"),
        (["--only", "parts"], "--only: parts counts requests; add --s3 s3://bucket/folder"),
        (["--only", "trials", "--s3", "/tmp"], "--s3: /tmp is not an s3:// URL"),
    ],
)
def test_mistakes_of_the_command(given, message, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["benchmark", "scale", *given])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.slow
def test_sixty_four_actors_and_the_beginning_of_ten_million_images(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["benchmark", "scale", "--only", "begin", "many", "--out", str(tmp_path / "scale.json")])
    main()
    begin, many = map(json.loads, (tmp_path / "scale.json").read_text().splitlines())
    assert begin.get("passed"), begin
    assert many.get("passed") and many["actors"] == 64 and many["free"] == many["gpus"] == 64, many

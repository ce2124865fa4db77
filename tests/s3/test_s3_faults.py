"""Storage on S3 while the network fails: against a real server behind a proxy that breaks requests and counts them."""

from __future__ import annotations

import itertools
import os
import pickle
import random
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pyarrow.fs
import pytest
from s3.proxy import DROPS, Faults

from i3cl import observe, s3, storage
from i3cl.data.formats.checks import PresentFiles
from i3cl.data.loading.images import decode_image, image_size
from i3cl.errors import UserError
from i3cl.storage import AccessError, NoAnswer
from i3cl.training.launch import Progress
from i3cl.training.loop import MetricsLog

BAD = Faults(errors=0.2, drops=0.1)


def test_every_call_gets_through_a_bad_network(bucket, tmp_path):
    """A fifth of the requests fail and a tenth is cut: the bytes are right all the same."""
    bucket.proxy.reset(BAD)
    files = {f"{name}/{k}.bin": random.Random(k).randbytes(1 + 40_000 * k) for k in range(8) for name in ("a", "b")}
    for name, data in files.items():
        storage.write_bytes_atomic(f"{bucket.url}/run/{name}", data)
    assert all(storage.read_bytes(f"{bucket.url}/run/{name}") == data for name, data in files.items())
    assert storage.list_files(f"{bucket.url}/run") == files.keys()
    assert storage.list_dir(f"{bucket.url}/run") == ["a", "b"]
    assert storage.exists(f"{bucket.url}/run/a") and not storage.exists(f"{bucket.url}/run/c")
    with storage.atomic_file(f"{bucket.url}/run/c.txt") as file:
        file.write(b"one")
        file.write(b"two")
    with storage.open_read(f"{bucket.url}/run/c.txt") as file:
        assert (file.read(3), file.seek(4), file.read()) == (b"one", 4, b"wo")
    with storage.atomic_directory(f"{bucket.url}/run/best") as folder:
        for name, data in files.items():
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_bytes(data)
    assert storage.is_complete(f"{bucket.url}/run/best")
    with storage.local_copy(f"{bucket.url}/run/best") as folder:
        assert {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()} == files
    filesystem, path = storage.filesystem(f"{bucket.url}/run/a/7.bin")
    with filesystem.open_input_file(path) as stream:
        assert stream.read() == files["a/7.bin"]
    storage.remove_tree(f"{bucket.url}/run")
    assert not storage.exists(f"{bucket.url}/run")
    assert bucket.proxy.broken.keys() == {"500", "503", *DROPS}, "every fault was met"


def test_looks_at_a_large_folder_cost_the_same_as_at_a_small_one(bucket, s3_server):
    """5,000 files: no look lists them."""
    with ThreadPoolExecutor(16) as pool:
        client = s3_server.client()
        name, _, prefix = bucket.url.removeprefix("s3://").partition("/")
        list(pool.map(lambda k: client.put_object(Bucket=name, Key=f"{prefix}/many/{k:05d}.jpg", Body=b""), range(5000)))
    folder = f"{bucket.url}/many"

    def requests(call, *arguments):
        bucket.proxy.reset()
        return call(*arguments), dict(bucket.proxy.counts)

    assert requests(storage.is_dir, folder) == (True, {"LIST": 1})
    assert requests(storage.is_file, folder) == (False, {"HEAD": 1})
    assert requests(storage.exists, folder) == (True, {"HEAD": 1, "LIST": 1})
    assert requests(storage.is_complete, folder) == (True, {"LIST": 1, "HEAD": 1})
    assert requests(storage.is_file, f"{folder}/00007.jpg") == (True, {"HEAD": 1})
    assert requests(storage.version, f"{folder}/00007.jpg")[1] == {"HEAD": 1}
    assert requests(lambda: storage.open_read(f"{folder}/00007.jpg").read()) == (b"", {"HEAD": 1})
    assert requests(storage.read_bytes, f"{folder}/00007.jpg") == (b"", {"GET": 1})
    with pytest.raises(UserError, match="exists already"), storage.atomic_directory(folder):
        pytest.fail("the block must not be entered")
    names, cost = requests(storage.list_dir, folder)
    assert len(names) == 5000 and cost == {"LIST": 5}
    present, cost = requests(PresentFiles, folder)
    assert present.has("04999.jpg") and not present.has("5000.jpg") and cost == {"LIST": 5}
    # Of several requests that delete, none is done before the folder says that it is no whole one.
    bucket.proxy.reset()
    storage.remove_tree(folder)
    assert not storage.exists(folder) and bucket.proxy.keys["PUT", f"{prefix}/many/_unfinished"] == 1


def test_large_files_travel_in_parts_and_whole(bucket, tmp_path, monkeypatch):
    monkeypatch.setattr(s3, "PART", 5 << 20)  # S3's smallest.
    data = random.Random(0).randbytes(33_333_333)
    (tmp_path / "big").write_bytes(data)
    bucket.proxy.reset(BAD)
    with storage.atomic_file(f"{bucket.url}/a.bin") as file:
        file.write(data)
    storage.write_bytes_atomic(f"{bucket.url}/b.bin", data)
    assert bucket.proxy.counts["MULTIPART PART"] >= 14
    for name in ("a.bin", "b.bin"):
        assert storage.read_bytes(f"{bucket.url}/{name}") == data
        with storage.local_copy(f"{bucket.url}/{name}") as path:
            assert path.read_bytes() == data
        with storage.open_read(f"{bucket.url}/{name}") as file:
            pieces = iter(lambda: file.read(4 << 20), b"")
            assert b"".join(pieces) == data
    assert bucket.proxy.broken.total() > 10


def test_an_upload_that_fails_leaves_nothing(bucket, s3_server, tmp_path, monkeypatch):
    monkeypatch.setattr(s3, "PART", 5 << 20)
    name, _, prefix = bucket.url.removeprefix("s3://").partition("/")

    def pending():
        # Of this test alone: a test with a bad network may leave an upload whose beginning the client never heard of.
        return [u["Key"] for u in s3_server.client().list_multipart_uploads(Bucket=name, Prefix=prefix).get("Uploads", ())]

    monkeypatch.setenv("I3CL_S3_PATIENCE", "0")
    plan, seen, parts = bucket.proxy.plan, [], itertools.count(1)

    def fail_third(asked, key):
        fate, wait = plan(asked, key)
        if asked == "MULTIPART PART":
            seen.extend(pending())
            # Parts arrive in several threads, so `len(seen)` may go from 2 to 4 before either looks at it.
            return ("503" if next(parts) == 3 else fate), wait
        return fate, wait

    monkeypatch.setattr(bucket.proxy, "plan", fail_third)
    with pytest.raises(NoAnswer, match=r"S3 gave no valid answer in 1 tries over 0 s \(SlowDown"):
        storage.write_bytes_atomic(f"{bucket.url}/a.bin", bytes(25 << 20))
    assert set(seen) == {f"{prefix}/a.bin"} and bucket.proxy.counts["MULTIPART ABORT"] == 1
    assert pending() == [] and not storage.exists(f"{bucket.url}/a.bin")


def test_an_upload_that_is_ended_by_another_is_done_anew(bucket, s3_server, monkeypatch):
    """As a lifecycle rule does, or the server that has done it and forgotten the upload when it is asked again."""
    monkeypatch.setattr(s3, "PART", 5 << 20)
    name, _, prefix = bucket.url.removeprefix("s3://").partition("/")
    plan, ended = bucket.proxy.plan, []

    def end_first(asked, key):
        if asked == "MULTIPART COMPLETE" and not ended:
            client = s3_server.client()
            [upload] = client.list_multipart_uploads(Bucket=name, Prefix=prefix)["Uploads"]
            client.abort_multipart_upload(Bucket=name, Key=upload["Key"], UploadId=upload["UploadId"])
            ended.append(upload["UploadId"])
        return plan(asked, key)

    monkeypatch.setattr(bucket.proxy, "plan", end_first)
    data = random.Random(2).randbytes(11 << 20)
    storage.write_bytes_atomic(f"{bucket.url}/a.bin", data)
    assert ended and bucket.proxy.counts["MULTIPART BEGIN"] == 2
    assert storage.read_bytes(f"{bucket.url}/a.bin") == data


@pytest.mark.parametrize("operation", ["MULTIPART COMPLETE", "PUT"])
def test_an_answer_that_is_lost_after_the_deed(bucket, monkeypatch, operation):
    """The server has done it, the client does not know: it must come to the same end and not to an error."""
    monkeypatch.setattr(s3, "PART", 5 << 20)
    data = random.Random(1).randbytes((11 << 20) if operation != "PUT" else 1000)
    plan = bucket.proxy.plan
    lost = []

    def lose_one(asked, key):
        fate, wait = plan(asked, key)
        if asked == operation and not lost:
            lost.append(key)
            return DROPS[1], wait
        return fate, wait

    monkeypatch.setattr(bucket.proxy, "plan", lose_one)
    storage.write_bytes_atomic(f"{bucket.url}/a.bin", data)
    assert lost and bucket.proxy.counts[operation] == 2
    assert storage.read_bytes(f"{bucket.url}/a.bin") == data


def test_a_file_that_is_written_anew_while_it_is_read(bucket):
    """Ranges of two versions never make one file."""
    url = f"{bucket.url}/a.bin"
    storage.write_bytes_atomic(url, b"1" * (3 << 20))
    with storage.open_read(url) as file:
        file.read(10)
        storage.write_bytes_atomic(url, b"2" * (3 << 20))
        with pytest.raises(s3.Changed, match="was changed while it was read"):
            file.read()
    assert set(storage.read_bytes(url)) == {ord("2")}


def test_slow_answers_are_waited_for(bucket, tmp_path):
    """Both clients; five seconds are more than pyarrow's own three."""
    storage.write_bytes_atomic(f"{bucket.url}/a.bin", b"x" * 1000)
    bucket.proxy.reset(Faults(delay=5.0))
    filesystem, path = storage.filesystem(f"{bucket.url}/b.bin")
    with ThreadPoolExecutor(2) as pool:
        read = pool.submit(storage.read_bytes, f"{bucket.url}/a.bin")
        with filesystem.open_output_stream(path) as stream:
            stream.write(b"y" * 1000)
        assert read.result() == b"x" * 1000
    assert bucket.proxy.counts == {"GET": 1, "PUT": 1}


def test_what_the_user_can_mend_is_told_at_once(bucket, monkeypatch):
    began = time.monotonic()
    with pytest.raises(AccessError, match="the bucket no-such-bucket does not exist; create it"):
        storage.read_bytes("s3://no-such-bucket/a")
    with pytest.raises(AccessError, match="does not exist; create it"):
        storage.exists("s3://no-such-bucket/a")
    with pytest.raises(UserError, match="Invalid bucket name"):
        storage.exists("s3://not a bucket/a")
    for key, value, call, expected in (
        ("AWS_SECRET_ACCESS_KEY", "wrong", storage.exists, "refuses the credentials .SignatureDoesNotMatch"),
        ("AWS_ACCESS_KEY_ID", "nobody", storage.read_bytes, "refuses the credentials .InvalidAccessKeyId"),
        ("AWS_ENDPOINT_URL", "nonsense", storage.read_bytes, "Invalid endpoint: nonsense; check AWS_"),
        ("AWS_CA_BUNDLE", "/nothing.pem", storage.read_bytes, "AWS_CA_BUNDLE names /nothing.pem, which does not exist"),
        ("AWS_PROFILE", "nobody", storage.read_bytes, r"profile \(nobody\) could not be found; check AWS_"),
    ):
        with monkeypatch.context() as patch:
            patch.setenv(key, value)
            with pytest.raises(AccessError, match=rf"^s3://tests/.*{expected}"):
                call(f"{bucket.url}/a")
    with monkeypatch.context() as patch:
        patch.delenv("AWS_ACCESS_KEY_ID")
        patch.delenv("AWS_SECRET_ACCESS_KEY")
        with pytest.raises(AccessError, match="Unable to locate credentials"):
            storage.list_dir(bucket.url)
        patch.setenv("AWS_ACCESS_KEY_ID", "reader")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "reader")
        with pytest.raises(UserError, match=r"/a\.txt: permission denied; check its permissions") as denied:
            storage.write_text_atomic(f"{bucket.url}/a.txt", "x")
        assert not isinstance(denied.value, AccessError)
        assert not storage.exists(f"{bucket.url}/a.txt")
    assert time.monotonic() - began < 10


def test_a_network_that_stays_away_ends_with_what_was_tried(bucket, monkeypatch):
    monkeypatch.setenv("I3CL_S3_PATIENCE", "1.5")
    bucket.proxy.reset(Faults(down=True))
    began = time.monotonic()
    with pytest.raises(NoAnswer, match=rf"{bucket.url}/a: S3 gave no valid answer in \d+ tries over \d s \(.*{bucket.proxy.url}"):
        storage.read_bytes(f"{bucket.url}/a")
    assert time.monotonic() - began < 4
    assert bucket.proxy.counts["GET"] > 2
    # No fault of an image: it must not become a row of errors.
    with pytest.raises(NoAnswer):
        decode_image(f"{bucket.url}/a.jpg")
    with pytest.raises(NoAnswer):
        image_size(f"{bucket.url}/a.jpg")
    bucket.proxy.reset(Faults(fail_next=3))
    assert not storage.exists(f"{bucket.url}/a")
    monkeypatch.setenv("I3CL_S3_PATIENCE", "long")
    with pytest.raises(UserError, match="I3CL_S3_PATIENCE: 'long' is not a number of seconds"):
        storage.read_bytes(f"{bucket.url}/a")


def test_the_filesystem_of_ray_keeps_its_retries_when_shipped(bucket):
    given = storage.for_ray(f"{bucket.url}/run")
    assert given["storage_path"] == f"{bucket.url}/run".removeprefix("s3://")
    shipped = pickle.loads(pickle.dumps(given["storage_filesystem"]))
    assert type(shipped) is s3.ArrowS3 and b"testsecret" not in pickle.dumps(shipped)
    # Where rights end at the run's folder, an object for each folder above could not be put.
    shipped.create_dir(given["storage_path"])
    assert bucket.proxy.total() == 0
    # pyarrow alone would end after three.
    bucket.proxy.reset(Faults(fail_next=4))
    assert shipped.get_file_info(given["storage_path"]).type == pyarrow.fs.FileType.NotFound
    assert bucket.proxy.total() >= 5


WRITE = """
import sys
from i3cl import storage
target = sys.argv[1]
if target.endswith("/"):
    with storage.atomic_directory(target.rstrip("/"), replace=True) as folder:
        for k in range(40):
            (folder / f"{k}.bin").write_bytes(b"new" * 1000)
else:
    with storage.atomic_file(target) as file:
        file.write(b"new" * (14 << 20))
"""


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_a_process_killed_while_it_uploads(bucket, tmp_path, kind):
    """What stood there is either still whole or seen as unfinished, and the same work done again mends it."""
    target = f"{bucket.url}/best"
    if kind == "folder":
        with storage.atomic_directory(target) as folder:
            (folder / "old.bin").write_bytes(b"old")
    else:
        storage.write_bytes_atomic(target, b"old")
    place = target + ("/" if kind == "folder" else "")
    watched = "PUT" if kind == "folder" else "MULTIPART PART"
    bucket.proxy.reset(Faults(delay=0.4))
    process = subprocess.Popen([sys.executable, "-c", WRITE, place], cwd=os.getcwd(), env=dict(os.environ))
    while bucket.proxy.counts[watched] < 2 and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "it was killed before its end"
    bucket.proxy.reset()
    if kind == "folder":
        assert storage.exists(target) and not storage.is_complete(target)
        with pytest.raises(UserError, match="stopped half-way"), storage.local_copy(target):
            pytest.fail("half a folder must not be used")
    else:
        assert storage.read_bytes(target) == b"old"
    subprocess.run([sys.executable, "-c", WRITE, place], check=True, env=dict(os.environ))
    if kind == "folder":
        assert storage.is_complete(target) and storage.list_files(target) == {f"{k}.bin" for k in range(40)}
    else:
        assert storage.read_bytes(target) == b"new" * (14 << 20)


def test_the_log_of_training_costs_few_requests(bucket, capsys):
    """Written and read whole, so not at every row and not at every look."""
    log = MetricsLog(f"{bucket.url}/run", enabled=True)
    progress = Progress("tiny", f"{bucket.url}/run/metrics.jsonl")
    assert progress.every >= 10
    progress._show()
    for step in range(1, 21):
        log.add({"step": step, "steps": 20, "loss": 1.0, "images_per_second": 2.0})
        log.flush(step == 20)
    assert bucket.proxy.counts["PUT"] == 4, "metrics and events, at the first row and at the checkpoint"
    bucket.proxy.reset()
    with observe.console():
        for _ in range(5):
            progress._show()
    assert bucket.proxy.counts == {"HEAD": 5, "GET": 1}
    assert "step 20/20" in capsys.readouterr().out


def test_of_many_writers_of_a_new_object_one_succeeds(bucket):
    from concurrent.futures import ThreadPoolExecutor

    url = f"{bucket.url}/claims/job.json"
    with ThreadPoolExecutor(20) as pool:
        won = list(pool.map(lambda number: storage.write_text_new(url, str(number)), range(20)))
    assert won.count(True) == 1
    assert storage.read_text(url) == str(won.index(True))
    assert not storage.write_text_new(url, "later") and storage.read_text(url) == str(won.index(True))

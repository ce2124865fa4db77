import json
import os
import socket
import stat
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from i3cl import storage
from i3cl.errors import UserError


@pytest.fixture(params=["local", "s3"])
def root(request, tmp_path):
    """A folder of each kind."""
    return str(tmp_path / "data") if request.param == "local" else request.getfixturevalue("bucket").url + "/data"


def test_join_keeps_urls_and_starts_anew_at_absolute_parts():
    assert storage.join("a", "b", "c.txt") == "a/b/c.txt"
    assert storage.join("s3://bucket/a/", "b") == "s3://bucket/a/b"
    assert storage.join("s3://bucket", "b") == "s3://bucket/b"
    assert storage.join("root", "/data/x") == "/data/x"
    assert storage.join("root", "s3://bucket/x") == "s3://bucket/x"
    assert storage.join("root", "") == "root"


def test_absolute_leaves_urls():
    assert storage.absolute("s3://bucket/a") == "s3://bucket/a"
    assert storage.absolute("a/b") == os.path.join(os.getcwd(), "a/b")
    assert storage.absolute("file:///a/b") == "/a/b"


def test_other_schemes_are_refused():
    with pytest.raises(UserError, match="gs:// is not supported"):
        storage.exists("gs://bucket/a")
    with pytest.raises(UserError, match="names no bucket"):
        storage.read_bytes("s3://")
    with pytest.raises(UserError, match="means a version of another object; rename it"):
        storage.read_bytes("s3://bucket/a?versionId=1")


def test_write_and_read_back(root):
    path = storage.join(root, "sub", "a.txt")
    assert not storage.exists(path)
    storage.write_text_atomic(path, "straße")
    storage.write_text_atomic(path, "zwei")
    assert storage.read_text(path) == "zwei"
    assert storage.read_bytes(path) == b"zwei"
    with storage.open_read(path) as file:
        assert file.read(2) == b"zw"
    assert storage.exists(path) and storage.is_file(path) and not storage.is_dir(path)
    assert storage.exists(root) and storage.is_dir(root) and not storage.is_file(root)
    assert storage.list_dir(storage.join(root, "sub")) == ["a.txt"]


def test_listing(root):
    assert storage.list_dir(root) == [] and storage.list_files(root) == set()
    for name in ("b/c.txt", "a.txt", "b/d/e.txt"):
        storage.write_bytes_atomic(storage.join(root, name), b"x")
    assert storage.list_dir(root) == ["a.txt", "b"]
    assert storage.list_files(root) == {"a.txt", "b/c.txt", "b/d/e.txt"}
    odd = "ü #1%20+&?.txt"
    storage.write_bytes_atomic(storage.join(root, "odd", odd), b"odd")
    assert storage.list_dir(storage.join(root, "odd")) == [odd] and storage.read_bytes(storage.join(root, "odd", odd)) == b"odd"
    with storage.local_copy(storage.join(root, "odd")) as folder:
        assert (folder / odd).read_bytes() == b"odd"
    storage.remove_tree(storage.join(root, "odd"))
    assert storage.list_files(storage.join(root, "odd")) == set()


def test_a_missing_file_is_named(root):
    path = storage.join(root, "nothing.json")
    for call in (storage.read_bytes, storage.read_text, storage.open_read):
        with pytest.raises(UserError, match=r"nothing\.json: no such file"):
            call(path)
    with pytest.raises(UserError, match="no such file"), storage.local_copy(path):
        pass


def test_byte_order_mark_and_wrong_encoding(root):
    path = storage.join(root, "a.txt")
    storage.write_bytes_atomic(path, b"\xef\xbb\xbfa")
    assert storage.read_text(path) == "a"
    storage.write_bytes_atomic(path, b"a\xff")
    with pytest.raises(UserError, match=r"not UTF-8 text \(byte 1\)"):
        storage.read_text(path)


def test_remove_tree(root):
    storage.remove_tree(root)
    storage.write_bytes_atomic(storage.join(root, "a", "b.txt"), b"x")
    storage.write_bytes_atomic(storage.join(root, "c.txt"), b"x")
    storage.remove_tree(storage.join(root, "c.txt"))
    assert storage.list_dir(root) == ["a"]
    storage.remove_tree(root)
    assert not storage.exists(root)


def test_remove_tree_does_not_follow_a_link(tmp_path):
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "a.txt").write_text("x")
    (tmp_path / "link").symlink_to(tmp_path / "kept")
    storage.remove_tree(str(tmp_path / "link"))
    assert (tmp_path / "kept" / "a.txt").exists() and not (tmp_path / "link").is_symlink()


def test_atomic_directory(root):
    target = storage.join(root, "out")
    with storage.atomic_directory(target) as folder:
        (folder / "deep").mkdir()
        (folder / "deep" / "a.txt").write_text("one")
        assert not storage.exists(target)
    assert storage.is_complete(target)
    assert storage.read_text(storage.join(target, "deep", "a.txt")) == "one"
    with pytest.raises(UserError, match="exists already"), storage.atomic_directory(target):
        pytest.fail("the block must not be entered")
    with storage.atomic_directory(target, replace=True) as folder:
        (folder / "b.txt").write_text("two")
    assert storage.list_files(target) == {"b.txt"}


def test_atomic_directory_leaves_nothing_after_an_error(root):
    target = storage.join(root, "out")
    with pytest.raises(KeyError), storage.atomic_directory(target) as folder:
        (folder / "a.txt").write_text("one")
        raise KeyError
    assert not storage.is_complete(target)
    assert not storage.exists(target) and storage.list_dir(root) == []


def test_a_stopped_upload_is_seen_and_done_anew(bucket, monkeypatch):
    target = f"{bucket.url}/out"
    with monkeypatch.context() as patch:
        patch.setattr(storage, "_put", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt), storage.atomic_directory(target) as folder:
            (folder / "stale.txt").write_text("one")
    storage.write_bytes_atomic(f"{target}/stale.txt", b"one")
    assert storage.exists(target) and not storage.is_complete(target)
    with storage.atomic_directory(target) as folder:
        (folder / "a.txt").write_text("two")
    assert storage.is_complete(target) and storage.list_dir(target) == ["a.txt"]


def test_atomic_directory_never_clears_what_it_has_not_written(root):
    storage.write_bytes_atomic(storage.join(root, "data", "mine.txt"), b"x")
    with (
        pytest.raises(UserError, match="exists already"),
        storage.atomic_directory(storage.join(root, "data")),
    ):
        pytest.fail("the block must not be entered")
    assert storage.list_dir(storage.join(root, "data")) == ["mine.txt"]


def test_local_copy(root):
    target = storage.join(root, "model")
    storage.write_bytes_atomic(storage.join(target, "a", "b.txt"), b"x")
    with storage.local_copy(target) as folder:
        assert (folder / "a" / "b.txt").read_bytes() == b"x"
        remembered = folder
    with storage.local_copy(storage.join(target, "a", "b.txt")) as file:
        assert file.read_bytes() == b"x"
    storage.write_bytes_atomic(storage.join(target, "ab.txt"), b"y")
    with storage.local_copy(target, without="a") as folder:
        assert (folder / "ab.txt").read_bytes() == b"y"
        assert (folder / "a").exists() != storage.is_remote(root)
    assert remembered.exists() != storage.is_remote(root)


def test_files_are_readable_by_others_and_no_temporary_is_left(tmp_path):
    path = tmp_path / "a.txt"
    storage.write_bytes_atomic(str(path), b"x")
    plain = tmp_path / "plain.txt"
    plain.write_text("x")
    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE(plain.stat().st_mode)
    assert storage.list_dir(str(tmp_path)) == ["a.txt", "plain.txt"]


def test_a_failed_write_keeps_the_old_content(tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    path.write_text("old")

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(UserError, match="no space left"):
        storage.write_bytes_atomic(str(path), b"new")
    assert path.read_text() == "old" and storage.list_dir(str(tmp_path)) == ["a.txt"]


def test_user_errors_of_local_paths(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="is a folder"):
        storage.read_bytes(str(tmp_path))
    with pytest.raises(UserError, match="is a file, not a folder"):
        storage.read_bytes(str(tmp_path / "file" / "a"))
    with pytest.raises(UserError, match="exists already as something else"):
        storage.write_bytes_atomic(str(tmp_path / "file" / "a"), b"x")
    with pytest.raises(UserError, match="null character"):
        storage.read_bytes("a\0b")
    with pytest.raises(UserError, match="too long"):
        storage.read_bytes("a" * 5000)


def test_pyarrow_filesystem(tmp_path):
    odd = tmp_path / "a #1%20.bin"
    odd.write_bytes(b"abc")
    filesystem, path = storage.filesystem(str(odd))
    with filesystem.open_input_file(path) as file:
        assert file.read() == b"abc"


def test_pyarrow_filesystem_of_s3_keeps_the_key(monkeypatch):
    monkeypatch.setenv("AWS_REGION", "us-east-1")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    filesystem, path = storage.filesystem("s3://bucket/a b/c#1.parquet")
    assert filesystem.type_name == "s3" and path == "bucket/a b/c#1.parquet"


def test_versions_change_with_the_file(root):
    path = storage.join(root, "a.txt")
    assert storage.version(path) is None
    storage.write_bytes_atomic(path, b"one")
    first = storage.version(path)
    assert first is not None and first == storage.version(path)
    storage.write_bytes_atomic(path, b"two")
    assert storage.version(path) not in (None, first)


def test_parquet_is_read_from_both(root):
    table = pa.table({"a": list(range(5000)), "b": ["x" * 100] * 5000})
    with storage.atomic_file(storage.join(root, "a.parquet")) as file:
        pq.write_table(table, file, row_group_size=500)
    with storage.open_arrow(storage.join(root, "a.parquet")) as source, pq.ParquetFile(source) as file:
        assert file.read() == table
    with pytest.raises((UserError, OSError)):
        storage.open_arrow(storage.join(root, "b.parquet"))


def test_a_relative_path_means_the_same_when_the_working_folder_was_laid_anew(tmp_path):
    folder = tmp_path / "work"
    folder.mkdir()
    script = (
        "import os, shutil\n"
        "from i3cl import storage\n"
        "shutil.rmtree(os.getcwd()); os.mkdir(storage._STARTED_IN)\n"
        "storage.write_text_atomic('runs/a.txt', 'a')\n"
        "print(storage.absolute('runs'), storage.read_text('runs/a.txt'))\n"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", script], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.stdout.split() == [str(folder / "runs"), "a"], done.stderr


def _write(path: str, data: bytes, how: str) -> None:
    if how == "whole":
        storage.write_bytes_atomic(path, data)
        return
    with storage.atomic_file(path) as file:
        file.write(data)


@pytest.mark.parametrize("how", ["whole", "pieces"])
def test_writing_follows_symbolic_links(tmp_path, how):
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "real.json").write_text("old")
    (tmp_path / "link.json").symlink_to("there/real.json")
    (tmp_path / "again.json").symlink_to("link.json")
    (tmp_path / "new.json").symlink_to("there/missing.json")
    _write(str(tmp_path / "again.json"), b"new", how)
    _write(str(tmp_path / "new.json"), b"made", how)
    assert (tmp_path / "there" / "real.json").read_text() == "new"
    assert (tmp_path / "there" / "missing.json").read_text() == "made"
    assert all((tmp_path / name).is_symlink() for name in ("link.json", "again.json", "new.json"))
    assert sorted(os.listdir(tmp_path / "there")) == ["missing.json", "real.json"]
    (tmp_path / "round").symlink_to("round")
    with pytest.raises(UserError, match="form a loop"):
        _write(str(tmp_path / "round"), b"", how)


def test_a_folder_is_written_behind_a_link(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to("disk")
    for text in ("first", "second"):
        with storage.atomic_directory(str(tmp_path / "out"), replace=text == "second") as folder:
            (folder / "a.txt").write_text(text)
        assert (tmp_path / "out").is_symlink() and (tmp_path / "disk" / "a.txt").read_text() == text


@pytest.mark.parametrize("how", ["whole", "pieces"])
def test_a_pipe_is_written_through(tmp_path, how):
    pipe = str(tmp_path / "pipe")
    os.mkfifo(pipe)
    (tmp_path / "link").symlink_to("pipe")
    data = b"numbers" * 100_000
    for name in ("pipe", "link"):
        with open(tmp_path / "read", "wb") as out, subprocess.Popen(["cat", pipe], stdout=out) as reader:
            _write(str(tmp_path / name), data, how)
            assert reader.wait(timeout=60) == 0
        assert (tmp_path / "read").read_bytes() == data
    assert stat.S_ISFIFO(os.stat(pipe).st_mode) and sorted(os.listdir(tmp_path)) == ["link", "pipe", "read"]


@pytest.mark.parametrize("how", ["whole", "pieces"])
def test_devices_are_written_through_and_never_replaced(how):
    _write("/dev/null", b"nothing", how)
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)
    with pytest.raises(UserError, match="/dev/full: no space left"):
        _write("/dev/full", b"nothing", how)
    with pytest.raises(UserError, match="not removed"):
        storage.remove_tree("/dev/null")
    with pytest.raises(UserError, match="not a folder"), storage.atomic_directory("/dev/null", replace=True):
        pytest.fail("the work must not begin")


@pytest.mark.parametrize("how", ["whole", "pieces"])
@pytest.mark.parametrize("name", ["/dev/stdout", "/dev/fd/1", "/proc/self/fd/1"])
def test_an_open_descriptor_is_written_through(tmp_path, how, name):
    code = f"""
import sys
from tests.test_storage import _write
print("before", flush=False)
_write({name!r}, b"numbers\\n", {how!r})
print("after")
"""
    run = [sys.executable, "-c", code]
    root = Path(__file__).parents[1]
    with open(tmp_path / "out.txt", "wb") as out:
        subprocess.run(run, stdout=out, check=True, cwd=root)
    # The same file, not one that replaced it: what was printed is still there.
    assert (tmp_path / "out.txt").read_text() == "before\nnumbers\nafter\n"
    assert os.listdir(tmp_path) == ["out.txt"]
    if name == "/dev/fd/1":
        # Bash hands the command /dev/fd/63, a pipe that the command inherits.
        code = f"import sys; from tests.test_storage import _write; _write(sys.argv[1], b'x', {how!r})"
        shell = f'{sys.executable} -c "$1" >(cat); sleep 1'
        done = subprocess.run(["bash", "-c", shell, "bash", code], capture_output=True, check=True, cwd=root)
        assert done.stdout == b"x"


def test_a_socket_is_refused(tmp_path):
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "s"))
        with pytest.raises(UserError, match="is a socket, not a file"):
            storage.write_bytes_atomic(str(tmp_path / "s"), b"")


def test_names_that_are_not_utf8(tmp_path):
    name = os.fsdecode(b"z\xe9.jpg")
    path = storage.join(str(tmp_path), name)
    storage.write_bytes_atomic(path, b"data")
    assert storage.list_dir(str(tmp_path)) == [name] and storage.list_files(str(tmp_path)) == {name}
    assert storage.read_bytes(path) == b"data"
    table = str(tmp_path / "table.json")
    storage.write_text_atomic(table, json.dumps({"file_name": name}, ensure_ascii=False))
    assert json.loads(storage.read_text(table)) == {"file_name": name}
    with pytest.raises(UserError, match="no such file") as told:
        storage.read_bytes(path + "x")
    assert name in str(told.value)


def test_what_stands_in_for_a_file_is_named(tmp_path):
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
    (tmp_path / "train.json").write_bytes(pointer)
    with pytest.raises(UserError, match=r"train\.json: is a Git LFS pointer, not the file itself; run `git lfs pull`"):
        storage.read_text(str(tmp_path / "train.json"))
    assert "git lfs pull" in str(storage.stand_in(pointer))
    assert "web page" in str(storage.stand_in(b"\xef\xbb\xbf\n <!DOCTYPE HTML><html>"))
    assert storage.stand_in(b"PK\x03\x04") is None and storage.stand_in(b"") is None

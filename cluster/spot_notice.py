"""Tell Ray that this machine will soon be taken away, so that training saves a checkpoint before that.

    python cluster/spot_notice.py aws     # or gcp: watch the cloud's metadata service until it announces the end
    python cluster/spot_notice.py now     # the end is known (a Kubernetes preStop hook): tell Ray, wait until its work here ends

This runs `ray drain-node` with reason PREEMPTION for every raylet on this machine: Ray then starts no new tasks here, and a
training run sees the warning. It needs only the standard library and the `ray` command next to this Python. With token
authentication, RAY_AUTH_MODE and the token are read from the environment, as by any Ray command.

AWS announces the end of a spot machine two minutes before in spot/instance-action, Google about 30 s in instance/preempted.
Exit status 0: Ray was told, or this is not a spot machine, or another watcher runs here; 1: Ray could not be told.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import re
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

AWS_ENDPOINT = "http://169.254.169.254"
GCP_HOST = "metadata.google.internal"
GCP_SECONDS = 25
"""Google stops a machine 30 s after the notice; this leaves 5 s to notice it."""
PATIENCE = 120
"""Seconds without an answer of the metadata service at the start after which this is not taken for a machine of that cloud."""
HEAD_PATIENCE = 10
"""Seconds without an answer of the head, when a pod ends, after which the head is taken for gone too."""

# No proxy: a metadata service is reached directly or not at all.
_open = urllib.request.build_opener(urllib.request.ProxyHandler({})).open


@dataclass(frozen=True)
class Raylet:
    """Ray's process for one node."""

    pid: int
    node_id: str
    """56 hexadecimal digits."""
    address: str
    """host:port of the cluster's head."""


def raylets(address: str | None = None) -> list[Raylet]:
    """Find this user's raylets on this machine that belong to the cluster at `address` (None: to any cluster).

    The node id is read from the process, because `ray drain-node` without --node-id may start a new Ray and drain that one.
    """
    found = []
    for folder in Path("/proc").iterdir():
        try:
            if not folder.name.isdigit() or folder.stat().st_uid != os.getuid():
                continue
            raylet = parse_raylet(int(folder.name), (folder / "cmdline").read_bytes().decode(errors="replace").split("\0"))
        except OSError:  # The process has ended since.
            continue
        if raylet and address in (None, raylet.address):
            found.append(raylet)
    return found


def parse_raylet(pid: int, arguments: list[str]) -> Raylet | None:
    """Read a raylet from its command line; None for any other process."""
    if os.path.basename(arguments[0]) != "raylet":
        return None
    line = " ".join(arguments)
    node_id = re.search(r"--node_id=([0-9a-f]{56})\b", line)
    address = re.search(r"--gcs-address=(\S+)", line)
    return Raylet(pid, node_id[1], address[1]) if node_id and address else None


class Aws:
    """Instance metadata service, version 2, which needs a session token for every request."""

    def __init__(self) -> None:
        self._base = os.environ.get("AWS_EC2_METADATA_SERVICE_ENDPOINT", AWS_ENDPOINT).rstrip("/") + "/latest/"
        self._token = ""

    def is_spot(self) -> bool:
        """Whether this is a spot machine."""
        return self._get("meta-data/instance-life-cycle") == "spot"

    def seconds_left(self) -> float | None:
        """Seconds until the machine ends; None while nothing is announced."""
        notice = self._get("meta-data/spot/instance-action")
        if notice is None:
            return None
        end = datetime.fromisoformat(json.loads(notice)["time"].replace("Z", "+00:00"))
        return max(0.0, (end - datetime.now(UTC)).total_seconds())

    def _get(self, path: str) -> str | None:
        """Return a page of the service; None when there is no such page."""
        for attempt in range(2):
            if not self._token:
                ask = urllib.request.Request(self._base + "api/token", method="PUT")
                ask.add_header("X-aws-ec2-metadata-token-ttl-seconds", "21600")
                with _open(ask, timeout=5) as answer:
                    self._token = answer.read().decode()
            request = urllib.request.Request(self._base + path, headers={"X-aws-ec2-metadata-token": self._token})
            try:
                with _open(request, timeout=5) as answer:
                    return answer.read().decode().strip()
            except urllib.error.HTTPError as error:
                if error.code == 404:
                    return None
                if error.code != 401 or attempt:
                    raise
                self._token = ""  # It has expired.
        raise AssertionError("the second attempt returns or raises")


class Gcp:
    """Compute Engine metadata server."""

    def __init__(self) -> None:
        self._base = f"http://{os.environ.get('GCE_METADATA_HOST', GCP_HOST)}/computeMetadata/v1/instance/"

    def is_spot(self) -> bool:
        """Whether this is a spot machine."""
        return self._get("scheduling/preemptible") == "TRUE"

    def seconds_left(self) -> float | None:
        """Seconds until the machine ends; None while nothing is announced."""
        return GCP_SECONDS if self._get("preempted") == "TRUE" else None

    def _get(self, path: str) -> str:
        request = urllib.request.Request(self._base + path, headers={"Metadata-Flavor": "Google"})
        with _open(request, timeout=5) as answer:
            return answer.read().decode().strip()


def watch(cloud: Aws | Gcp, interval: float, patience: float = PATIENCE) -> float | None:
    """Wait until the end is announced, and return the seconds that are left; None when this is not a spot machine.

    interval: seconds between requests. A metadata service that fails for a while is asked again; OSError when it has never
    answered within `patience` seconds.
    """
    began = time.monotonic()
    spot = False
    failing = ""
    while True:
        try:
            if not spot:
                spot = cloud.is_spot()
                if not spot:
                    return None
                say("watching for the end of this spot machine")
            left = cloud.seconds_left()
            if left is not None:
                return left
            failing = ""
        except (OSError, http.client.HTTPException, ValueError, KeyError, TypeError) as error:
            # Unreachable, or an answer that is not as expected.
            if not spot and time.monotonic() - began > patience:
                raise OSError(f"the metadata service does not answer: {error}") from error
            if str(error) != failing:
                failing = str(error)
                say(f"the metadata service fails and is asked again: {failing}")
        time.sleep(interval)


def drain_command(raylet: Raylet, seconds: float) -> list[str]:
    """Build the command that drains a raylet. seconds: until the machine ends."""
    return [
        str(Path(sys.executable).with_name("ray")),
        "drain-node",
        f"--address={raylet.address}",
        f"--node-id={raylet.node_id}",
        "--reason=DRAIN_NODE_REASON_PREEMPTION",
        "--reason-message=this machine is being taken away",
        f"--deadline-remaining-seconds={int(seconds)}",
    ]


def reachable(address: str) -> bool:
    """Whether something listens at host:port."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=3).close()
    except OSError:
        return False
    return True


def drain(find: Callable[[], list[Raylet]], seconds: float, patience: float) -> bool:
    """Tell Ray about every raylet that `find` returns, and repeat this until Ray has accepted all or `seconds` are over.

    Returns whether all were accepted; False also when there was none. patience: seconds after which a head that does not answer
    is taken for gone, because a cluster that is deleted loses its head together with the workers.
    """
    began = time.monotonic()
    deadline = began + seconds
    accepted: set[str] = set()
    while True:
        todo = [raylet for raylet in find() if raylet.node_id not in accepted]
        for raylet in todo:
            left = max(1.0, deadline - time.monotonic())
            if not reachable(raylet.address):
                say(f"node {raylet.node_id}: nothing answers at {raylet.address}")
                if time.monotonic() - began >= patience:
                    return False
                continue
            try:
                done = subprocess.run(drain_command(raylet, left), capture_output=True, text=True, timeout=min(20.0, left))
            except subprocess.TimeoutExpired:
                say(f"node {raylet.node_id}: no answer from {raylet.address}")
                continue
            if done.returncode == 0:
                accepted.add(raylet.node_id)
                say(f"node {raylet.node_id}: Ray knows that it ends in {left:.0f} s")
            else:
                say(f"node {raylet.node_id}: {(done.stderr.strip() or done.stdout.strip() or 'no message').splitlines()[-1]}")
        if accepted and all(raylet.node_id in accepted for raylet in todo):
            return True
        if time.monotonic() + 1 > deadline:
            return False
        time.sleep(1)


def wait_for_end(nodes: list[Raylet], seconds: float) -> bool:
    """Wait up to `seconds` until these raylets have ended, as a drained raylet does after its work; return whether they have."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if not {raylet.node_id for raylet in nodes} & {raylet.node_id for raylet in raylets()}:
            return True
        time.sleep(0.5)
    return False


def say(text: str) -> None:
    """Print a line with the time."""
    print(f"{datetime.now(UTC):%Y-%m-%d %H:%M:%S} spot_notice: {text}", flush=True)


def only_watcher(address: str | None) -> socket.socket | None:
    """Take a lock that ends with the process; None when another watcher of this user holds it."""
    lock = socket.socket(socket.AF_UNIX)
    try:
        lock.bind(f"\0i3cl-spot-notice-{os.getuid()}-{address or ''}")
    except OSError:
        lock.close()
        return None
    return lock


def main() -> int:
    """Run the command; return its exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", choices=("aws", "gcp", "now"))
    parser.add_argument("--address", metavar="HOST:PORT", help="only nodes of the cluster at this head; default: all")
    parser.add_argument("--interval", type=float, default=2.0, metavar="SECONDS", help="between requests; default %(default)s")
    parser.add_argument("--seconds", type=float, default=100.0, help="with now: until the machine ends; default %(default)s")
    parser.add_argument("--dry-run", action="store_true", help="print the commands but do not run them")
    options = parser.parse_args()

    if options.source == "now":
        left: float | None = options.seconds
    else:
        lock = None if options.dry_run else only_watcher(options.address)
        if lock is None and not options.dry_run:
            say("another watcher runs here")
            return 0
        try:
            left = watch(Aws() if options.source == "aws" else Gcp(), options.interval)
        except OSError as error:
            say(str(error))
            return 1
        if left is None:
            say("this is not a spot machine: nothing to watch for")
            return 0
    assert left is not None
    say(f"this machine ends in {left:.0f} s")
    nodes = raylets(options.address)
    if options.dry_run:
        for raylet in nodes:
            print(subprocess.list2cmdline(drain_command(raylet, left)))
        return 0 if nodes else 1
    if not nodes:
        say("no Ray node runs here")
        return 0 if options.source == "now" else 1
    began = time.monotonic()
    told = drain(lambda: raylets(options.address), left, HEAD_PATIENCE if options.source == "now" else left)
    if options.source == "now" and told:
        gone = wait_for_end(nodes, left - (time.monotonic() - began))
        say("Ray's work here has ended" if gone else "out of time: Ray's work here has not ended")
    return 0 if told else 1


if __name__ == "__main__":
    sys.exit(main())

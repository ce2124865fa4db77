"""Several Ray nodes on one machine, each started with its own `ray start`, to try a cluster and to test failures.

With `network=True` every node has its own network namespace and address (this needs root and iproute2), so that a link can be
cut. All nodes share this machine's disk.
"""

from __future__ import annotations

import itertools
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

RAY = str(Path(sys.executable).parent / "ray")
HEALTH_CHECKS = {
    "RAY_health_check_initial_delay_ms": "2000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "2000",
    "RAY_health_check_failure_threshold": "3",
}
"""Environment of the head: it gives up on a node that has not answered for about eight seconds."""


def namespaces_refused() -> str | None:
    """Return why network namespaces cannot be made here; None when they can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    if shutil.which("ip") is None:
        return "network namespaces need the program ip (package iproute2)"
    name = f"i3cl-{os.getpid()}-try"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True)
    if made.returncode:
        return f"network namespaces are refused here: {made.stderr.strip()}"
    subprocess.run(["ip", "netns", "del", name], check=True)
    return None


@dataclass
class Node:
    """One node: the process of its `ray start --block`, its address and its network namespace."""

    name: str
    address: str
    namespace: str | None
    process: subprocess.Popen[bytes]

    def kill(self) -> None:
        """Kill all its processes at once, as when the machine loses power."""
        for pid in [self.process.pid, *descendants(self.process.pid)]:
            _signal(pid, signal.SIGKILL)
        self.process.wait(30)

    def stop(self) -> None:
        """Ask it to end; kill what is left after 20 s."""
        family = descendants(self.process.pid)
        _signal(self.process.pid, signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(20)
        for pid in [self.process.pid, *family]:
            _signal(pid, signal.SIGKILL)
        self.process.wait(30)


_CLUSTERS = itertools.count()
_ALIVE = """
import logging, ray
ray.init(logging_level=logging.ERROR, log_to_driver=False)
for node in ray.nodes():
    if node["Alive"]:
        print(node["NodeName"], node["NodeID"])
"""


class LocalCluster:
    """A head and further nodes. Close it, or use it as a context manager: this ends every process that it started.

    folder: for logs. environment: for every node, added to that of this process. head_cpus: like all numbers of CPUs here, what
    Ray is told, not what the machine has.
    """

    def __init__(
        self, folder: Path, *, head_cpus: int = 2, network: bool = False, environment: Mapping[str, str] | None = None
    ) -> None:
        self.folder = folder
        self.head_cpus = head_cpus
        self.nodes: list[Node] = []
        self.namespaces: list[str] = []
        self.network = network
        self._bridge = f"i3cl{os.getpid() % 10000}{chr(97 + next(_CLUSTERS) % 26)}"
        # Short, because the paths of Ray's sockets begin with it.
        self.temporary = Path(tempfile.mkdtemp(prefix="i3cl-", dir="/tmp"))
        self.token = self.temporary / "token"
        self.token.write_text(secrets.token_hex(32))
        self.token.chmod(0o600)
        self.port, self.dashboard_port = (6379, 8265) if network else (free_port(), free_port())
        address = "10.77.0.1" if network else "127.0.0.1"
        self.address = f"{address}:{self.port}"
        self.dashboard = f"http://127.0.0.1:{self.dashboard_port}"
        self.node_environment = {**os.environ, **HEALTH_CHECKS, **(environment or {})}
        self.node_environment |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(self.token)}
        # As in the launch files, `python` in a submitted job is the project's Python.
        self.node_environment["PATH"] = f"{Path(RAY).parent}{os.pathsep}{self.node_environment.get('PATH', '')}"
        for key in ("RAY_ADDRESS", "RAY_AUTH_TOKEN", "RAY_API_SERVER_ADDRESS"):
            self.node_environment.pop(key, None)

    @property
    def environment(self) -> dict[str, str]:
        """Environment of a process that submits a job to this cluster or joins it."""
        return {**self.node_environment, "RAY_ADDRESS": self.address, "RAY_API_SERVER_ADDRESS": self.dashboard}

    def __enter__(self) -> LocalCluster:
        try:
            self.start_head()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def start_head(self) -> Node:
        """Start the head, always on the same ports, and wait until it answers."""
        arguments = [
            "--head", f"--port={self.port}", f"--dashboard-port={self.dashboard_port}", "--dashboard-host=127.0.0.1",
            f"--temp-dir={self.temporary}",
        ]  # fmt: skip
        return self._start("head", self.head_cpus, arguments)

    def add_node(self, cpus: int = 1, labels: str = "") -> Node:
        """Start another node and wait until the head has registered it."""
        arguments = [f"--address={self.address}"] + ([f"--labels={labels}"] if labels else [])
        return self._start(f"node{len(self.nodes)}", cpus, arguments)

    def run(self, command: Sequence[str], log: Path, **environment: str) -> subprocess.Popen[bytes]:
        """Start a process next to the head, as a driver or a laptop would; its output goes to `log`."""
        with open(log, "ab") as file:
            return subprocess.Popen(
                self._inside(self.namespaces[0] if self.network else None, command),
                stdout=file,
                stderr=subprocess.STDOUT,
                env={**self.environment, **environment},
                start_new_session=True,
            )

    def cut(self, node: Node) -> None:
        """Cut the node's network. A node that was cut off does not join again: kill it afterwards."""
        assert node.namespace
        _ip("-n", node.namespace, "link", "set", "eth0", "down")

    def alive(self) -> dict[str, str]:
        """Return the nodes that the head considers alive: name -> Ray's id."""
        command = self._inside(self.namespaces[0] if self.network else None, [sys.executable, "-c", _ALIVE])
        answer = subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=120)
        if answer.returncode:
            raise RuntimeError(f"the head does not list its nodes: {answer.stderr[-2000:]}")
        return dict(line.split() for line in answer.stdout.splitlines())

    def close(self) -> None:
        """End every node, remove the namespaces and the temporary folder."""
        for node in reversed(self.nodes):
            if node.process.poll() is None:
                node.kill()
        for number, name in enumerate(self.namespaces, 1):
            # A namespace and its device exist until the last process in it has ended.
            subprocess.run(["ip", "link", "del", f"{self._bridge}v{number}"], capture_output=True)
            subprocess.run(["ip", "netns", "del", name], capture_output=True)
        if self.namespaces:
            subprocess.run(["ip", "link", "del", self._bridge], capture_output=True)
        shutil.rmtree(self.temporary, ignore_errors=True)

    def _start(self, name: str, cpus: int, arguments: list[str]) -> Node:
        namespace, address = self._namespace(name) if self.network else (None, "127.0.0.1")
        command = [
            RAY, "start", "--block", "--disable-usage-stats", f"--node-ip-address={address}", f"--node-name={name}",
            f"--num-cpus={cpus}", "--num-gpus=0", f"--object-store-memory={200 << 20}",
            f"--dashboard-agent-listen-port={free_port()}", *arguments,
        ]  # fmt: skip
        log = self.folder / f"{name}.log"
        with open(log, "wb") as file:
            process = subprocess.Popen(
                self._inside(namespace, command),
                stdout=file,
                stderr=subprocess.STDOUT,
                env=self.node_environment,
                start_new_session=True,
            )
        node = Node(name, address, namespace, process)
        self.nodes.append(node)
        deadline = time.monotonic() + 120
        while b"Ray runtime started" not in log.read_bytes():
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"{name} did not start: {log.read_text(errors='replace')[-2000:]}")
            time.sleep(0.2)
        return node

    def _namespace(self, name: str) -> tuple[str, str]:
        """Return namespace and address of a node; a new namespace is made and connected to the others by a bridge."""
        full = f"{self._bridge}-{name}"
        if full in self.namespaces:
            return full, f"10.77.0.{self.namespaces.index(full) + 1}"
        if not self.namespaces:
            _ip("link", "add", self._bridge, "type", "bridge")
            _ip("link", "set", self._bridge, "up")
        self.namespaces.append(full)
        number = len(self.namespaces)
        address = f"10.77.0.{number}"
        outer = f"{self._bridge}v{number}"
        _ip("netns", "add", full)
        _ip("link", "add", outer, "type", "veth", "peer", "name", "eth0", "netns", full)
        _ip("link", "set", outer, "master", self._bridge, "up")
        _ip("-n", full, "addr", "add", f"{address}/24", "dev", "eth0")
        for device in ("lo", "eth0"):
            _ip("-n", full, "link", "set", device, "up")
        return full, address

    @staticmethod
    def _inside(namespace: str | None, command: Sequence[str]) -> list[str]:
        return ["ip", "netns", "exec", namespace, *command] if namespace else list(command)


def descendants(pid: int) -> list[int]:
    """Return the ids of all child processes of a process, at any depth."""
    parents: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parents[int(entry.name)] = int((entry / "stat").read_text().rsplit(")", 1)[1].split()[1])
            except (FileNotFoundError, ProcessLookupError):
                continue
    family = {pid}
    while more := {child for child, parent in parents.items() if parent in family} - family:
        family |= more
    return sorted(family - {pid})


def free_port() -> int:
    """Return a port that is free on the loopback address now, outside the range of Ray's workers."""
    while True:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = int(probe.getsockname()[1])
        if not 10002 <= port <= 19999:
            return port


def _signal(pid: int, number: signal.Signals) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return


def _ip(*arguments: str) -> None:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"ip {' '.join(arguments)}: {done.stderr.strip()}")

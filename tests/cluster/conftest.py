"""One real cluster for the tests of this folder: a head and a second node, both `ray start` on this machine, with a token."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from cluster.nodes import RAY, LocalCluster

ROOT = Path(__file__).parents[2]
SECRET = "kept-on-the-nodes-0123456789"
"""AWS_SECRET_ACCESS_KEY in the nodes' own environment; Ray must show it nowhere."""


_NOTE = """
import os, sys, pathlib
if "I3CL_SEEN" in os.environ:
    role = pathlib.Path(sys.argv[0]).name
    if role == "default_worker.py":
        import ray
        role = ray.get_runtime_context().get_task_name()
    pathlib.Path(os.environ["I3CL_SEEN"], str(os.getpid())).write_text(f"{role} {__file__}")
"""


@pytest.fixture(scope="session")
def cluster(tmp_path_factory) -> Iterator[LocalCluster]:
    # Without PYTHONPATH, so that jobs find no other copy of the code than the installed one and the uploaded one.
    environment = {"PYTHONPATH": "", "AWS_SECRET_ACCESS_KEY": SECRET, "RAY_DATA_DISABLE_PROGRESS_BARS": "1"}
    with LocalCluster(tmp_path_factory.mktemp("nodes"), head_cpus=4, environment=environment) as running:
        running.add_node(cpus=2)
        yield running


@pytest.fixture(scope="session")
def secret() -> str:
    return SECRET


@dataclass(frozen=True)
class Laptop:
    """A folder with the repository's code in it, and the environment of a user who submits from there."""

    folder: Path
    environment: dict[str, str]

    def submit(self, *arguments: str, options: tuple[str, ...] = (), timeout: float = 300) -> subprocess.CompletedProcess[str]:
        """`ray job submit --working-dir . OPTIONS -- python ARGUMENTS`."""
        return self.ray("job", "submit", "--working-dir", ".", *options, "--", "python", *arguments, timeout=timeout)

    def ray(self, *arguments: str, timeout: float = 120) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [RAY, *arguments], cwd=self.folder, env=self.environment, capture_output=True, text=True, timeout=timeout
        )


@pytest.fixture(scope="session")
def laptop(cluster, tmp_path_factory) -> Laptop:
    """Its copy of the code is not the installed one: each process that imports it leaves a note in the folder $I3CL_SEEN."""
    folder = tmp_path_factory.mktemp("laptop")
    for name in ("i3cl", "jobs", "configs"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in (".gitignore", ".rayignore"):
        shutil.copy(ROOT / name, folder / name)
    with open(folder / "i3cl" / "__init__.py", "a") as file:
        file.write(_NOTE)
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "AWS_")) and k != "PYTHONPATH"}
    environment |= {
        "HOME": str(tmp_path_factory.mktemp("home")),
        "RAY_API_SERVER_ADDRESS": cluster.dashboard,
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(cluster.token),
    }
    return Laptop(folder, environment)

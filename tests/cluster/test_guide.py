"""docs/clusters.md, followed to the letter by somebody who has only cloned and run `make setup`."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def first_block(page: Path) -> str:
    """The first indented block that starts a head."""
    blocks, block = [], []
    for line in [*page.read_text().splitlines(), ""]:
        if line.startswith("    "):
            block.append(line[4:])
        elif block:
            blocks.append("\n".join(block))
            block = []
    return next(block for block in blocks if "ray start --head" in block)


def own_machine_refused() -> str | None:
    """Why a process cannot have process ids and a loopback of its own here; None when it can."""
    if shutil.which("unshare") is None or shutil.which("ip") is None:
        return "needs the programs unshare (util-linux) and ip (iproute2)"
    tried = subprocess.run([*OWN_MACHINE, "true"], capture_output=True, text=True)
    return f"namespaces are refused here: {tried.stderr.strip()}" if tried.returncode else None


# `ray stop` ends every Ray that it sees, and the guide takes Ray's usual ports: it must see nothing of this machine.
OWN_MACHINE = ["unshare", "--pid", "--net", "--fork", "--mount-proc"]
REFUSED = own_machine_refused()


@pytest.mark.skipif(REFUSED is not None, reason=str(REFUSED))
@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_two_nodes_on_this_machine(tmp_path):
    clone, home = tmp_path / "clone", tmp_path / "home"
    home.mkdir()
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    for name in tracked:
        (clone / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, clone / name)
    (clone / ".venv").symlink_to(Path(sys.executable).parents[1])
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "AWS_", "PYTHONPATH"))} | {"HOME": str(home)}
    # Each line must succeed; whatever happens, what the guide started ends with its first process.
    script = "set -e\nip link set lo up\n" + first_block(ROOT / "docs" / "clusters.md")
    log = tmp_path / "log.txt"
    with open(log, "w") as file:
        command = [*OWN_MACHINE, "bash", "-c", script]
        done = subprocess.run(command, cwd=clone, env=environment, stdout=file, stderr=file, timeout=1400)
    printed = log.read_text()
    assert done.returncode == 0, printed[-3000:]
    run = clone / "runs" / "quickstart"
    assert (run / "report.html").is_file() and (run / "summary.json").is_file(), printed[-3000:]
    assert "8 CPUs" in printed, "the job did not see both nodes"
    assert (home / ".ray" / "auth_token").stat().st_mode & 0o077 == 0

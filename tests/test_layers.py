"""The layers of imports: the check finds what breaks them, and docs/concepts.md draws what is checked."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def lint(folder: Path) -> subprocess.CompletedProcess[str]:
    pytest.importorskip("importlinter", reason="needs the package import-linter")
    command = [sys.executable, "-c", "from importlinter.cli import lint_imports_command; lint_imports_command()", "--no-cache"]
    return subprocess.run(command, capture_output=True, text=True, cwd=folder, env={"PYTHONPATH": str(folder), "COLUMNS": "200"})


@pytest.fixture
def checkout(tmp_path) -> Path:
    shutil.copytree(ROOT / "i3cl", tmp_path / "i3cl", ignore=shutil.ignore_patterns("__pycache__", "configs"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


def plant(folder: Path, file: str, line: str) -> None:
    path = folder / "i3cl" / file
    path.write_text(f"{path.read_text()}\n{line}\n")


def test_no_import_goes_up_and_no_files_import_each_other_in_a_circle():
    done = lint(ROOT)
    assert done.returncode == 0, done.stdout


def test_a_planted_upward_import_is_found(checkout):
    plant(checkout, "geometry.py", "def planted():\n    from i3cl.training import launch\n    return launch")
    done = lint(checkout)
    assert done.returncode == 1
    assert "i3cl.geometry -> i3cl.training.launch" in done.stdout, done.stdout


@pytest.mark.parametrize(
    ("file", "line", "words"),
    [
        ("model/anchors.py", "from i3cl.model import proposals", ["i3cl.model", ".anchors"]),
        ("data/formats/records.py", "from i3cl.data.formats import coco", ["i3cl.data.formats", ".records"]),
    ],
)
def test_a_planted_cycle_is_found(checkout, file, line, words):
    before = lint(checkout).stdout
    plant(checkout, file, line)
    done = lint(checkout)
    assert done.returncode == 1
    new = "\n".join(set(done.stdout.splitlines()) - set(before.splitlines()))
    assert all(word in new for word in words), done.stdout


def test_a_new_room_must_be_put_into_a_layer(checkout):
    (checkout / "i3cl" / "attic.py").write_text("")
    assert "attic" in lint(checkout).stdout


def test_the_drawing_shows_the_layers_that_are_checked():
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    layers = [re.findall(r"\w+", layer) for contract in contracts for layer in contract.get("layers", [])]
    page = (ROOT / "docs" / "concepts.md").read_text()
    drawing = page[page.index("## Rooms") :].split("```")[1]
    drawn = [set(re.findall(r"\w+", line.split("│")[1])) for line in drawing.splitlines() if "│" in line]
    assert drawn == [set(layer) for layer in layers]

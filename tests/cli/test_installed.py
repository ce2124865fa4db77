"""The built wheel in an environment of its own, used from a folder outside the checkout."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import cv2
import numpy as np
import pytest
import yaml

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def environment(tmp_path_factory) -> Path:
    """A virtual environment with the wheel. Its dependencies are those of this interpreter, without its own i3cl."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    for name in ("i3cl", "configs"):
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    call(sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(folder), str(source))
    venv.create(folder / "env", with_pip=False, symlinks=True)
    packages = next((folder / "env" / "lib").glob("python*/site-packages"))
    # A folder that is added by a .pth file does not have its own .pth files read: an editable i3cl in it stays unseen.
    (packages / "shared.pth").write_text(sysconfig.get_path("purelib") + "\n")
    python = str(folder / "env" / "bin" / "python")
    call(python, "-m", "pip", "install", "-q", "--no-deps", "--no-index", "--ignore-installed", str(*folder.glob("*.whl")))
    return folder / "env"


def call(*command: str, cwd: Path | None = None) -> str:
    variables = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PYTHONHOME")}
    done = subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=variables)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_the_wheel_brings_the_command_and_the_recipes(environment, tmp_path):
    i3cl = str(environment / "bin" / "i3cl")
    where = call(str(environment / "bin" / "python"), "-c", "import i3cl; print(i3cl.__file__)", cwd=tmp_path)
    assert where.startswith(str(environment))
    assert "selftrain" in call(i3cl, "--help", cwd=tmp_path)
    for recipe, name in (("quickstart", "quickstart"), ("r50/mixtrain", "r50-mixtrain")):
        settings = yaml.safe_load(call(i3cl, "train", "--config", recipe, "--dry-run", cwd=tmp_path))
        assert settings["name"] == name
    assert (environment / "lib").exists()
    packages = next((environment / "lib").glob("python*/site-packages/i3cl"))
    recipes = {path.relative_to(packages / "configs") for path in (packages / "configs").rglob("*.yaml")}
    assert recipes == {path.relative_to(ROOT / "configs") for path in (ROOT / "configs").rglob("*.yaml")}
    assert (packages / "py.typed").is_file() and list((packages / "report").glob("*.j2"))


@pytest.mark.slow
def test_the_wheel_finds_text_with_the_detector_that_it_brings(environment, tmp_path):
    picture = np.full((200, 400, 3), 235, np.uint8)
    cv2.putText(picture, "COFFEE", (40, 120), cv2.FONT_HERSHEY_DUPLEX, 2.5, (30, 30, 120), 6, cv2.LINE_AA)
    cv2.imwrite(str(tmp_path / "sign.png"), picture)
    call(str(environment / "bin" / "i3cl"), "predict", "--images", "sign.png", "--out", "out", cwd=tmp_path)
    (found,) = json.loads((tmp_path / "out" / "art.json").read_text()).values()
    centre = np.mean(found[0]["points"], axis=0)
    assert 40 < centre[0] < 360 and 60 < centre[1] < 130, "on the word"
    assert (tmp_path / "out" / "pictures" / "sign.jpg").is_file()

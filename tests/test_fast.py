"""`make test-fast` touches every room."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
# Rooms whose tests need a running Ray, or which are one file that the tests of other rooms use.
ELSEWHERE = {"runtime", "circle", "circle_unlabelled", "study", "errors", "s3", "claims", "deploy", "lineage", "scale"}


def test_the_fast_tests_exist_and_use_every_room():
    files = [ROOT / line for line in (ROOT / "tests" / "fast.txt").read_text().split()]
    assert all(file.is_file() for file in files), [str(file) for file in files if not file.is_file()]
    text = "".join(file.read_text() for file in files)
    layers = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"][0]["layers"]
    rooms = {name for layer in layers for name in re.findall(r"\w+", layer)}
    missing = {room for room in rooms - ELSEWHERE if not re.search(rf"i3cl(\.| import .*\b){room}\b", text)}
    assert not missing

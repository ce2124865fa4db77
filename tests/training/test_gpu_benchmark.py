"""`i3cl benchmark gpu`, small and on the CPU."""

from __future__ import annotations

import json
import os
import time

from i3cl.config import ModelSettings
from i3cl.training.gpu_benchmark import PARTS, Scale, gpu_report, versions
from tests.conftest import TINY_MODEL

SMALL = {
    **TINY_MODEL,
    "backbone": {"name": "tf_efficientnet_lite0", "frozen_stages": 0},
    "inter_dropout": 0.0,
    "detections_per_image": 4,
}
SCALE = Scale(ModelSettings.model_validate(SMALL), 96, 128, (96, 128), (2,), 1)


def test_every_part_gives_its_lines(tmp_path):
    out, told = tmp_path / "gpu.json", []
    # A machine that does other work too needs longer than the limits.
    parts = {name: (work, 600) for name, (work, _) in PARTS.items()}
    lines = gpu_report(SCALE, "cpu", str(out), told.append, parts)
    assert json.loads(out.read_text()) == lines == [json.loads(line) for line in told]
    assert not [line for line in lines if "error" in line]
    of = {part: [line for line in lines if line["part"] == part] for part in PARTS}
    assert [line["precision"] for line in of["parity"]] == ["float32", "float32", "bfloat16"]
    assert of["parity"][1]["off"] == 0 < of["parity"][2]["off"] < 0.1
    turns = [(line["batch"], line["network"]) for line in of["training"]]
    assert turns == [(2, network) for network in ("i3cl", "torchvision") * 2]
    assert all(line["images_per_second"] > 0 for line in [*of["training"], *of["labelling"]])
    assert of["resumption"] == [{"part": "resumption", "steps": 4, "largest_difference": 0.0}]


def begins_and_hangs(scale, device):
    yield {"begun": True}
    time.sleep(600)


def dies(scale, device):
    yield {"begun": True}
    os._exit(3)


def fails(scale, device):
    yield {"begun": True}
    raise ValueError("wrong")


def test_a_part_that_hangs_dies_or_fails_loses_only_itself(tmp_path):
    parts = {"first": (versions, 600), "hangs": (begins_and_hangs, 10), "dies": (dies, 600), "fails": (fails, 600)}
    lines = gpu_report(SCALE, "cpu", str(tmp_path / "gpu.json"), lambda line: None, {**parts, "last": (versions, 600)})
    begun = [line["part"] for line in lines if line.get("begun") or "torch" in line]
    assert begun == ["first", "hangs", "dies", "fails", "last"]
    assert [line["error"] for line in lines if "error" in line] == [
        "not done after 10 s",
        "its process ended with status 3",
        "ValueError: wrong",
    ]

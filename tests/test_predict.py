"""Views, sizes, devices: whatever the network saw, polygons come back in the original's pixels."""

import numpy as np
import pytest
import torch
from torch import nn

from i3cl.config import Settings, ViewSettings, load_settings, to_yaml, with_overrides
from i3cl.errors import UserError
from i3cl.inference import device, recipe
from i3cl.inference.predictor import Predictor, load


class OneBox(nn.Module):
    """Finds the white rectangle by its pixels, so that the mapping back is all that is tested."""

    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Parameter(torch.zeros(1))

    def forward(self, images):
        results = []
        for image in images:
            ys, xs = torch.where(image[0] > 128)
            if not len(xs):
                results.append({"boxes": torch.zeros(0, 4), "scores": torch.zeros(0), "masks": torch.zeros(0, 28, 28)})
                continue
            box = torch.tensor([[xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]], dtype=torch.float32)
            results.append({"boxes": box, "scores": torch.tensor([0.9]), "masks": torch.ones(1, 28, 28)})
        return results


@pytest.mark.parametrize(
    "view", [ViewSettings(), ViewSettings(short_side=300), ViewSettings(flip=True), ViewSettings(short_side=75, flip=True)]
)
def test_polygons_come_back_in_original_pixels(view):
    image = np.zeros((150, 200, 3), np.uint8)
    image[40:80, 20:120] = 255
    empty = np.zeros((50, 50, 3), np.uint8)
    settings = Settings.model_validate({"data": {"test_short_side": 150, "test_long_side": 2000}})
    found, nothing = Predictor(OneBox(), settings)([image, empty], view)
    assert found.boxes[0] == pytest.approx([20, 40, 120, 80], abs=1.6)
    assert len(nothing) == 0


def test_detection_leaves_the_mode_as_it_was():
    model = OneBox().train()
    Predictor(model, Settings())([np.zeros((32, 32, 3), np.uint8)])
    assert model.training


def test_a_folder_that_is_no_checkpoint(tmp_path):
    with pytest.raises(UserError, match=r"not a checkpoint directory.*settings\.yaml"):
        load(str(tmp_path))


def test_what_a_recipe_or_the_command_line_gives_is_known(tmp_path):
    (tmp_path / "base.yaml").write_text("data: {test_short_side: 300}\ntrain: {steps: 5}\n")
    (tmp_path / "child.yaml").write_text("extends: base.yaml\ndata: {test_upscale: false}\n")
    given = recipe.given_size(load_settings(tmp_path / "child.yaml", ["data.test_long_side=700"]))
    assert given == {"data.test_short_side": 300, "data.test_long_side": 700, "data.test_upscale": False}
    assert recipe.given_size(load_settings(None, ["train.steps=3"])) == {}
    settings = with_overrides(load_settings(tmp_path / "base.yaml"), {"storage": "/elsewhere", "data.skip_bad": True}, "test")
    assert recipe.given_size(settings) == {"data.test_short_side": 300}, "an unrelated override makes nothing else given"
    assert settings == load_settings(tmp_path / "base.yaml", ["storage=/elsewhere", "data.skip_bad=true"])
    (tmp_path / "whole.yaml").write_text(to_yaml(settings))
    assert load_settings(tmp_path / "whole.yaml") == settings


def test_a_given_size_counts_and_the_rest_is_the_checkpoints():
    own = Settings.model_validate({"data": {"test_short_side": 640, "test_long_side": 1024, "test_upscale": False}})
    other = Settings.model_validate({"data": {"test_short_side": 800, "test_long_side": 1333}})
    seen = []

    class Sees(OneBox):
        def forward(self, images):
            seen.extend(tuple(image.shape[1:]) for image in images)
            return super().forward(images)

    image = np.zeros((1000, 1500, 3), np.uint8)
    given = {"data.test_short_side": 100}
    for settings, what in ((own, {}), (other, {}), (own, given), (other, given)):
        Predictor(Sees(), settings, what)([image])
    Predictor(Sees(), own, given)([image], ViewSettings(short_side=200))
    assert seen == [(640, 960), (800, 1200), (100, 150), (100, 150), (200, 300)]
    both = {"a": own, "b": other}
    assert recipe.describe_sizes({"a": own}, {}) == "test size 640/1024 without enlarging from the checkpoint"
    assert recipe.describe_sizes(both, given) == (
        "test size a 100/1024 without enlarging, b 100/1333 (data.test_short_side as given, the rest from the checkpoints)"
    )
    assert recipe.effective(both, {"data.test_short_side": 640, "data.test_upscale": False}) == {
        "data.test_short_side": 640,
        "data.test_upscale": False,
    }
    assert recipe.effective({"a": own}, {"data.test_short_side": 640}) == {}, "every checkpoint has this size anyway"


def test_one_rule_for_the_device_and_one_for_the_precision(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert [device.choose_device(gpu) for gpu in (False, "auto")] == ["cpu", "cpu"]
    with pytest.raises(UserError, match=r"cluster\.gpu: true.*cluster\.gpu=auto"):
        device.choose_device(True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert [device.choose_device(gpu) for gpu in (False, "auto", True)] == ["cpu", "cuda", "cuda"]
    for computes in (False, True):
        monkeypatch.setattr(device, "gpu_has_bfloat16", lambda place, answer=computes: answer)
        assert [device.half_precision("auto", "cuda:1", training) for training in (False, True)] == [computes] * 2
    wanted = {
        ("bfloat16", "cuda"): (True, True),
        ("float32", "cuda"): (False, False),
        ("bfloat16", "cpu"): (True, True),
        ("float32", "cpu"): (False, False),
    }
    for (precision, place), answers in wanted.items():
        assert tuple(device.half_precision(precision, place, training) for training in (False, True)) == answers
    for supported in (False, True):
        monkeypatch.setattr(device, "cpu_has_bfloat16", lambda answer=supported: answer)
        assert [device.half_precision("auto", "cpu", training) for training in (False, True)] == [False, supported]


@pytest.mark.parametrize(("precision", "short"), [("float32", False), ("auto", True)])
def test_float32_computes_no_convolution_in_tf32(precision, short, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    Predictor(OneBox(), with_overrides(Settings(name="run"), {"train.precision": precision}, "test"))
    assert torch.backends.cudnn.allow_tf32 is short


def test_a_checkpoint_asked_onto_the_cpu_never_asks_for_a_visible_gpu(tiny_checkpoints, monkeypatch):
    def refuse(*arguments, **keywords):
        raise AssertionError("CUDA was asked for")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "_lazy_init", refuse)
    predictor = Predictor.load(tiny_checkpoints["a"], device.choose_device(False))
    predictor([np.zeros((96, 96, 3), np.uint8)])
    assert predictor.device.type == "cpu"
    with pytest.raises((AssertionError, RuntimeError)):
        load(tiny_checkpoints["a"])

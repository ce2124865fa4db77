"""Detectors that come with the package, and checkpoints of half the size."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import i3cl
from i3cl.config import LabelSettings, load_settings, to_yaml, with_overrides
from i3cl.errors import UserError
from i3cl.inference.recipe import recipe_of
from i3cl.labelling.identity import as_member, groups_of
from i3cl.members.ours import checkpoint_hash
from i3cl.model import shipped
from i3cl.model.checkpoint import save_checkpoint
from i3cl.model.convert import halve_checkpoint
from i3cl.model.network import I3CL
from i3cl.training.launch import located

MOST_BYTES = 20e6
ROOT = Path(__file__).parents[2]


@pytest.fixture
def checkpoint(tiny_settings, tmp_path) -> str:
    settings = with_overrides(tiny_settings, {"model.backbone.weights": "none", "train.start_from": "/private/place"}, "test")
    torch.manual_seed(1)
    return str(save_checkpoint(I3CL(settings.model), tmp_path / "run" / "best", to_yaml(settings)))


def test_a_halved_checkpoint_names_no_place_and_finds_the_same(checkpoint, tmp_path):
    out = tmp_path / "half"
    size = halve_checkpoint(checkpoint, str(out))
    assert size == (out / "weights.safetensors").stat().st_size
    assert size < 0.6 * (tmp_path / "run" / "best" / "weights.safetensors").stat().st_size
    text = (out / "settings.yaml").read_text()
    assert str(tmp_path) not in text and "/private" not in text
    whole, half = i3cl.load(checkpoint, "cpu").state_dict(), i3cl.load(out, "cpu").state_dict()
    for name, value in half.items():
        assert value.dtype == whole[name].dtype
        torch.testing.assert_close(value, whole[name], rtol=1e-3, atol=1e-6)
    with pytest.raises(UserError, match="not a checkpoint directory"):
        halve_checkpoint(str(tmp_path), str(tmp_path / "other"))


def test_variances_beyond_float16_survive_the_halving(checkpoint, tmp_path):
    """Those of the intra blocks reach 800,000. As infinities they switch the blocks off, and training from them gives NaN."""
    weights = Path(checkpoint, "weights.safetensors")
    tensors = load_file(weights)
    tensors["intra.0.norm.running_var"][3] = 8e5
    tensors["heads.box.fc1.weight"].view(-1)[0] = 7e4
    save_file(tensors, weights)
    halve_checkpoint(checkpoint, str(tmp_path / "half"))
    half = i3cl.load(tmp_path / "half", "cpu").state_dict()
    for name, value in i3cl.load(checkpoint, "cpu").state_dict().items():
        torch.testing.assert_close(half[name], value, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_weights_that_are_not_finite_are_neither_loaded_nor_halved_nor_saved(checkpoint, tmp_path, value):
    weights = Path(checkpoint, "weights.safetensors")
    network = i3cl.load(checkpoint, "cpu")
    tensors = load_file(weights)
    tensors["intra.1.norm.running_var"][0] = value
    save_file(tensors, weights)
    message = r"^\S+: 1 tensors hold values that are not finite, e\.g\. intra\.1\.norm\.running_var; .*another checkpoint$"
    with pytest.raises(UserError, match=message):
        i3cl.load(checkpoint, "cpu")
    with pytest.raises(UserError, match=message):
        halve_checkpoint(checkpoint, str(tmp_path / "half"))
    network.intra[0].norm.running_mean[0] = value
    with pytest.raises(UserError, match=r"not saved, because intra\.0\.norm\.running_mean holds values that are not finite"):
        save_checkpoint(network, tmp_path / "new", "")
    assert not (tmp_path / "new").exists()


def test_every_packaged_detector_loads_by_its_name_and_fits_its_size():
    assert shipped.DEFAULT in shipped.names()
    for name in shipped.names():
        folder = shipped.folder_of(name)
        network = i3cl.load(name, "cpu")
        assert network.recipe == recipe_of(name) == load_settings(f"{folder}/settings.yaml")
        assert len(checkpoint_hash(name)) == 64
        assert Path(folder, "weights.safetensors").stat().st_size < MOST_BYTES
        text = Path(folder, "settings.yaml").read_text()
        assert "/root" not in text and "/home" not in text and "/tmp" not in text
    one, other = (LabelSettings(passes=passes) for passes in ("auto", "per_member"))
    members = dict.fromkeys("ab", as_member(shipped.DEFAULT))
    assert groups_of(members, one) == [["a", "b"]] and groups_of(members, other) == [["a"], ["b"]]
    assert i3cl.load(device="cpu").recipe.name == recipe_of(shipped.DEFAULT).name


def test_the_recipes_that_start_from_it_build_its_network():
    for recipe in ("lite0_scene", "finetune"):
        assert load_settings(recipe).model == recipe_of("lite0-scene").model


def test_it_finds_the_words_in_the_picture_of_the_readme():
    """Five names around a mission patch and the half of a name tag that the helmet does not hide."""
    (found,) = i3cl.detect(i3cl.load(device="cpu"), [ROOT / "docs" / "patch.jpg"], score_threshold=0.7)
    words = {"COLLINS": (150, 136), "ASHBY": (241, 128), "COLEMAN": (105, 312), "HAWLEY": (190, 363), "TOGNINI": (278, 333)}
    words["EILEEN M."] = (704, 180)
    assert len(found.polygons) == len(words)
    for word, middle in words.items():
        distances = [np.linalg.norm(polygon.mean(axis=0) - middle) for polygon in found.polygons]
        assert min(distances) < 40, word


def test_a_training_starts_from_a_name_on_every_machine(tiny_settings):
    """The path of the package differs among machines, so the name is what travels."""
    settings = with_overrides(tiny_settings, {"train.start_from": shipped.DEFAULT}, "test")
    assert located(settings).train.start_from == shipped.DEFAULT
    assert shipped.folder_of("runs/a/best") == "runs/a/best" and not shipped.is_shipped("./" + shipped.DEFAULT)

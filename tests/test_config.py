"""Settings: files, overrides, and one-line errors that name file, key and remedy."""

from pathlib import Path

import pytest
import yaml

from i3cl.config import Settings, SettingsError, load_settings, to_yaml, with_overrides

RECIPES = sorted((Path(__file__).parents[1] / "configs").rglob("*.yaml"))


def test_defaults_are_the_papers():
    settings = load_settings()
    assert settings.model.num_classes == 63
    assert settings.model.detection_nms == 0.35
    assert settings.model.rpn_positive_iou == 0.7


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda p: p.stem)
def test_recipe_survives_a_round_trip(recipe, tmp_path):
    settings = load_settings(recipe)
    again = tmp_path / "again.yaml"
    again.write_text(to_yaml(settings))
    assert load_settings(again) == settings


def test_extends_merges_mappings_and_replaces_lists(tmp_path):
    (tmp_path / "base.yaml").write_text("name: base\ntrain: {steps: 10, batch: 3, milestones: [0.1, 0.2]}\n")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "top.yaml").write_text("extends: ../base.yaml\ntrain: {steps: 20, milestones: [0.9]}\n")
    settings = load_settings(tmp_path / "sub" / "top.yaml", ["train.batch=4"])
    assert (settings.name, settings.train.steps, settings.train.batch) == ("base", 20, 4)
    assert settings.train.milestones == (0.9,)


def test_yaml_number_without_point_is_a_number():
    assert load_settings(None, ["train.learning_rate=1e-4"]).train.learning_rate == 1e-4


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("train: {lerning_rate: 0.1}", ["train.lerning_rate", "train.learning_rate?"]),
        ("data: {train: [{annotations: a.json, imagse: b}]}", ["data.train.0"]),
        ("train: {steps: many}", ["train.steps", "integer", "many"]),
        ("train: {steps: 0}", ["train.steps", "greater than or equal to 1"]),
        ("label: {select: {low: 0.9, high: 0.5}}", ["label.select", "ignore <= low <= high"]),
        ("model: {inter_heads: 7}", ["inter_heads", "does not divide"]),
        ("train: [1]", ["train"]),
        ("- 1", ["mapping"]),
        ("a: [", ["line 1", "not valid YAML"]),
        ("extends: 3", ["extends"]),
        ("extends: me.yaml", ["extends itself"]),
        ("!!python/object/apply:os.system ['true']", ["not valid YAML"]),
    ],
)
def test_mistakes_name_file_key_and_remedy(tmp_path, text, words):
    path = tmp_path / "me.yaml"
    path.write_text(text)
    with pytest.raises(SettingsError) as caught:
        load_settings(path)
    message = str(caught.value)
    assert "\n" not in message
    assert str(path) in message
    assert all(word in message for word in words), message


def test_missing_file_suggests_the_near_one(tmp_path):
    (tmp_path / "quickstart.yaml").write_text("")
    with pytest.raises(SettingsError, match=r"did you mean .*quickstart\.yaml"):
        load_settings(tmp_path / "quikstart.yaml")


@pytest.mark.parametrize("override", ["train.steps", "=3", "train.steps=[", "train.stepz=3", "train.steps=-1"])
def test_bad_overrides_name_the_command_line(override):
    with pytest.raises(SettingsError, match="command line"):
        load_settings(None, [override])


def test_with_overrides_checks_and_keeps_the_rest():
    settings = with_overrides(
        load_settings(), {"train.seed": 5, "data.validation": {"annotations": "a", "images": "b"}}, "here"
    )
    assert settings.train.seed == 5
    assert settings.data.validation is not None
    with pytest.raises(SettingsError, match=r"here: train\.sed.*train\.seed"):
        with_overrides(settings, {"train.sed": 1}, "here")


def test_every_setting_is_explained():
    """A field's meaning stands under it: a bare default would leave the reader guessing."""
    lines = (Path(__file__).parents[1] / "i3cl" / "config.py").read_text().splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("class BackboneSettings"))
    end = next(i for i, line in enumerate(lines) if line.startswith("# ---") and "files and overrides" in line)
    self_evident = {
        "seed",
        "name",
        "steps",
        "epochs",
        "optimizer",
        "schedule",
        "model",
        "data",
        "train",
        "cluster",
        "label",
        "evaluate",
        "selftrain",
        "fusion",
        "select",
        "transform",
        "teachers",
        "student",
        "overrides",
        "backbone",
        "validation",
        "warmup_factor",
    }
    bare = []
    for i in range(start, end):
        text = lines[i]
        if text.startswith("    ") and ":" in text and "=" in text and not text.startswith("     ") and "def " not in text:
            name = text.strip().split(":")[0]
            if name.isidentifier() and name not in self_evident and not lines[i + 1].strip().startswith('"""'):
                bare.append(name)
    assert not bare, bare


def test_yaml_dump_is_plain():
    tree = yaml.safe_load(to_yaml(Settings()))
    assert tree["model"]["mean"] == [123.675, 116.28, 103.53]

"""Settings: files, overrides, and one-line errors that name file, key and remedy."""

from pathlib import Path

import pytest
import yaml

from i3cl.config import (
    Settings,
    load_settings,
    to_yaml,
    with_overrides,
)
from i3cl.config.loading import recipe_names, setting_names
from i3cl.errors import SettingsError

CONFIGS = Path(__file__).parents[1] / "configs"
RECIPES = sorted(path for path in CONFIGS.rglob("*.yaml") if path.name != "datasets.yaml")


def test_defaults_are_the_papers():
    settings = load_settings()
    assert settings.model.num_classes == 63
    assert settings.model.detection_nms == 0.35
    assert settings.model.rpn_positive_iou == 0.7


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda p: str(p.relative_to(CONFIGS)))
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
        ("data: {train: [{annotations: a.json, imagse: b}]}", ["data.train.0.imagse", "data.train.0.images?"]),
        ("data: {train: [{annotations: a.json, images: b, weighted: true}]}", ["data.train.0", "weighted"]),
        ("data: {train: [{dataset: art}]}", ["data.train.0.dataset", "data.catalogue"]),
        ("data: {dataset: art}", ["data.dataset: unknown key"]),
        ("data: {transform: {short_sides: [5, 6], long_caps: [7]}}", ["data.transform", "long_caps", "2 short_sides"]),
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


CATALOGUE = """
art: {images: art/images, annotations: art/train.json, weighted: art/train_lossweight.json}
test: {images: test/images, annotations: test/test.json}
"""


def test_catalogue_names_stand_for_paths(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sets.yaml").write_text(CATALOGUE)
    (tmp_path / "sub" / "base.yaml").write_text("data: {catalogue: ../sets.yaml}\nname: base\n")
    text = """
extends: sub/base.yaml
data:
  train: [{dataset: art, weight: 2}, {dataset: art, weighted: true, lossweight: 0.5}, {annotations: a.json, images: b}]
  validation: {dataset: test}
selftrain:
  teachers: [{name: a, overrides: {data.train: [{dataset: art}]}}]
"""
    (tmp_path / "top.yaml").write_text(text)
    settings = load_settings(tmp_path / "top.yaml", ["label.source={dataset: test}"])
    plain, weighted, own = settings.data.train
    assert (plain.annotations, plain.images, plain.weight) == ("art/train.json", "art/images", 2)
    assert (weighted.annotations, weighted.lossweight) == ("art/train_lossweight.json", 0.5)
    assert (own.annotations, own.images) == ("a.json", "b")
    assert settings.data.validation is not None and settings.data.validation.annotations == "test/test.json"
    assert settings.label.source is not None and settings.label.source.images == "test/images"
    assert settings.selftrain.teachers[0].overrides["data.train"][0]["annotations"] == "art/train.json"
    # The resolved tree needs no catalogue any more.
    (tmp_path / "again").mkdir()
    (tmp_path / "again" / "r.yaml").write_text(to_yaml(settings))
    assert load_settings(tmp_path / "again" / "r.yaml") == settings


@pytest.mark.parametrize(
    ("train", "words"),
    [
        ("{dataset: arrt}", ["data.train.0.dataset", "sets.yaml", "'arrt'", "did you mean art?"]),
        ("{dataset: zzz}", ["'zzz'", "it has art, test"]),
        ("{dataset: [art]}", ["data.train.0.dataset", "has no data set"]),
        ("{dataset: art, weigth: 2}", ["data.train.0.weigth", "data.train.0.weight?"]),
        ("{dataset: art, weighted: 'false'}", ["data.train.0.weighted", "true or false"]),
        ("{dataset: test, weighted: true}", ["test has no weighted annotations"]),
        ("{dataset: art, images: b}", ["either dataset, or annotations and images"]),
        ("{datset: art}", ["data.train.0.datset", "data.train.0.dataset?"]),
    ],
)
def test_mistakes_with_the_catalogue(tmp_path, train, words):
    (tmp_path / "sets.yaml").write_text(CATALOGUE)
    (tmp_path / "me.yaml").write_text(f"data: {{catalogue: sets.yaml, train: [{train}]}}")
    with pytest.raises(SettingsError) as caught:
        load_settings(tmp_path / "me.yaml")
    message = str(caught.value)
    assert "\n" not in message and "me.yaml" in message
    assert all(word in message for word in words), message


@pytest.mark.parametrize("text", ["art: {images: a, anotations: b}", "art: {annotations: b}", "art: 3", "- art", "art: ["])
def test_a_broken_catalogue_is_named(tmp_path, text):
    (tmp_path / "sets.yaml").write_text(text)
    (tmp_path / "me.yaml").write_text("data: {catalogue: sets.yaml, train: [{dataset: art}]}")
    with pytest.raises(SettingsError, match=r"sets\.yaml: "):
        load_settings(tmp_path / "me.yaml")


def test_missing_file_suggests_the_near_one(tmp_path):
    (tmp_path / "quickstart.yaml").write_text("")
    with pytest.raises(SettingsError, match=r"did you mean .*quickstart\.yaml"):
        load_settings(tmp_path / "quikstart.yaml")


@pytest.mark.parametrize("override", ["train.steps", "=3", "train.steps=[", "train.stepz=3", "train.steps=-1"])
def test_bad_overrides_name_the_command_line(override):
    with pytest.raises(SettingsError, match="command line"):
        load_settings(None, [override])


@pytest.mark.parametrize(
    "text",
    ["20240105", "001", "2024-05-01", "exp #2", "1e3", "yes", "null.5", "[a", "{a: b", "a: b", "'a' and 'b'", "x=y", "!a", "*"],
)
def test_text_on_the_command_line_is_taken_as_it_stands(text):
    """Run names, folders and checkpoints are words, whatever YAML would read in them."""
    overrides = [
        f"{key}={text}" for key in ("name", "storage", "data_root", "train.start_from", "label.members.a", "search.start_from")
    ]
    settings = load_settings(None, overrides)
    assert (settings.name, settings.storage, settings.data_root) == (text, text, text)
    assert settings.train.start_from == settings.search.start_from == settings.label.members["a"].weights == text
    assert load_settings(None, ['name="quoted #1"']).name == "quoted #1"


def test_text_survives_the_file_of_a_run(tmp_path):
    settings = load_settings(None, ["name=001", "storage=/data/st #1"])
    (tmp_path / "settings.yaml").write_text(to_yaml(settings))
    assert load_settings(tmp_path / "settings.yaml") == settings


@pytest.mark.parametrize("text", ["null", "~", ""])
def test_optional_text_can_be_emptied(text, tmp_path):
    (tmp_path / "a.yaml").write_text("train: {start_from: other}")
    assert load_settings(tmp_path / "a.yaml", [f"train.start_from={text}"]).train.start_from is None


def test_choices_are_text_and_other_values_yaml():
    settings = load_settings(
        None, ["train.precision=float32", "cluster.gpu=false", "evaluate.score_threshold=0.5", "train.steps=7"]
    )
    assert (settings.train.precision, settings.cluster.gpu) == ("float32", False)
    assert (settings.evaluate.score_threshold, settings.train.steps) == (0.5, 7)


@pytest.mark.parametrize(("value", "quoted"), [("20240105", "'20240105'"), ("2024-05-01", "'2024-05-01'")])
def test_a_text_in_a_file_that_is_not_one_says_how_to_quote(tmp_path, value, quoted):
    (tmp_path / "a.yaml").write_text(f"name: {value}")
    with pytest.raises(SettingsError, match=rf"a\.yaml: name: .*put it in quotes, {quoted}"):
        load_settings(tmp_path / "a.yaml")


def test_packaged_recipes_have_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert load_settings("quickstart") == load_settings(CONFIGS / "quickstart.yaml")
    assert load_settings("r50/mixtrain") == load_settings(CONFIGS / "r50" / "mixtrain.yaml")
    assert set(recipe_names()) == {path.relative_to(CONFIGS).with_suffix("").as_posix() for path in RECIPES}
    Path("quickstart").write_text("name: mine")
    assert load_settings("quickstart").name == "mine", "a file of that name comes first"


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("quikstart", ["did you mean quickstart?"]),
        ("r50/mixtran", ["did you mean r50/mixtrain?"]),
        ("configs/quickstart.yaml", ["configs/quickstart.yaml: no such settings file", "did you mean quickstart?"]),
        ("zzz", ["no packaged recipe", "quickstart"]),
    ],
)
def test_a_misspelt_recipe_names_the_nearest(tmp_path, monkeypatch, name, words):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SettingsError) as caught:
        load_settings(name)
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_names_of_settings_for_completion():
    names = setting_names()
    assert {"name", "train.steps", "model.backbone.name", "label.members", "data.train"} <= set(names)
    assert len(names) == len(set(names)) > 150


def test_with_overrides_checks_and_keeps_the_rest():
    settings = with_overrides(load_settings(), {"train.seed": 5, "data.validation": {"annotations": "a", "images": "b"}}, "here")
    assert settings.train.seed == 5
    assert settings.data.validation is not None
    with pytest.raises(SettingsError, match=r"here: train\.sed.*train\.seed"):
        with_overrides(settings, {"train.sed": 1}, "here")


def test_every_setting_is_explained():
    """A field's meaning stands under it: a bare default would leave the reader guessing."""
    lines = (Path(__file__).parents[1] / "i3cl" / "config" / "settings.py").read_text().splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("class BackboneSettings"))
    end = len(lines)
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


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("train:\n  steps: 7\n  steps: 8\n", "line 3, column 3: not valid YAML (the key steps occurs twice)"),
        ("data: {train: &a [*a]}\n", "alias (*) stands inside its own anchor"),
        ("train: {steps: yes}\n", "train.steps: input should be a number, not True"),
        ("train: {steps: 1:30}\n", "train.steps: input should be a valid integer"),
        ("train: {learning_rate: .inf}\n", "train.learning_rate: input should be a finite number"),
        ("name: ../x\n", "name: would lead out of the folder"),
        ('name: "a\\nb"\n', "name: is empty or holds a line break"),
        ("storage: ''\n", "storage: is empty"),
        ("label: {views: []}\n", "label.views: is empty; give at least one value"),
        ("[" * 5000, "nested too deeply"),
    ],
)
def test_yaml_that_would_be_misread_is_refused(text, words, tmp_path):
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(SettingsError) as caught:
        load_settings(tmp_path / "r.yaml")
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_leading_zeros_are_decimal_and_merged_keys_may_be_given_again(tmp_path):
    text = (
        "name: 001\ntrain: {steps: 0100}\nlabel:\n  views:\n  - &v {short_side: 300}\n  - {<<: *v, flip: true, short_side: 200}\n"
    )
    (tmp_path / "r.yaml").write_text(text)
    found = load_settings(tmp_path / "r.yaml")
    assert (found.name, found.train.steps) == ("001", 100)
    assert [(view.short_side, view.flip) for view in found.label.views] == [(300, False), (200, True)]

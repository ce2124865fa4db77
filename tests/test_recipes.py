"""The paper's recipes: every number of them, a dry run each, and two steps of every stage by name on tiny data."""

from __future__ import annotations

import importlib.util
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml

from i3cl.cli import command_line
from i3cl.config import (
    Settings,
    load_settings,
    to_yaml,
    with_overrides,
)
from i3cl.data.formats.records import record_from_row
from i3cl.errors import UserError
from i3cl.model import backbone
from i3cl.model.network import I3CL
from i3cl.training.launch import _check_data, located, train
from i3cl.training.loop import prepare
from tests.conftest import TINY_MODEL

CONFIGS = Path(__file__).parents[1] / "configs"
STAGES = {
    "r50": ["pretrain", "mixtrain", "finetune", "ssl", "ssl_finetune"],
    "r50_regioncl": ["pretrain", "mixtrain", "finetune", "ssl", "ssl_finetune"],
    "r50_regioncl_unsupervised": ["pretrain", "mixtrain", "finetune", "ssl", "ssl_finetune"],
    "resnext101": ["pretrain", "mixtrain", "finetune"],
    "resnext151": ["pretrain", "mixtrain", "finetune"],
    "resnest101": ["pretrain", "mixtrain", "finetune"],
    "vitae": ["train"],
}
RECIPES = [(family, stage) for family, stages in STAGES.items() for stage in stages]
BEFORE = {"mixtrain": "pretrain", "finetune": "mixtrain", "ssl": "mixtrain", "ssl_finetune": "ssl"}
BACKBONES = {family: family for family in STAGES} | {
    "r50": "resnet50",
    "r50_regioncl": "resnet50",
    "r50_regioncl_unsupervised": "resnet50",
    "vitae": "vitaev2_s",
}

LSVT_MLT = ["lsvt/train1", "lsvt/train2", "icdar2019_mlt/train1", "icdar2019_mlt/train2"]
ART = ["art/train", "art_light/train", "art_noise/train", "art_sig/train"]
SETS = {
    "pretrain": ["syntext1/train", "syntext2/train"],
    "mixtrain": [*LSVT_MLT, "rctw/train", "rects/train", *ART],
    "finetune": [*LSVT_MLT, *ART],
    "ssl": [f"{name}_lossweight" for name in ("art/train", *LSVT_MLT, "lsvt_test/train")],
    "ssl_finetune": [f"{name}_lossweight" for name in (*ART, *LSVT_MLT, "lsvt_test/train")],
    "train": [*LSVT_MLT, *ART],
}
# epochs, epochs after which the rate falls, optimiser, rate, weight decay, images a GPU, modules
SCHEDULE = {
    "pretrain": (20, (4, 10, 16), "sgd", 0.01, 1e-4, 2, False),
    "mixtrain": (10, (4, 8), "sgd", 0.001, 1e-4, 1, False),
    "finetune": (8, (4, 6), "sgd", 0.0005, 1e-4, 1, True),
    "ssl": (10, (4, 8), "sgd", 0.0005, 1e-4, 1, False),
    "ssl_finetune": (6, (2, 5), "sgd", 0.0005, 1e-4, 1, True),
    "train": (12, (8,), "adamw", 1e-4, 0.05, 1, True),
}
WEIGHTS = {
    "r50": "timm",
    "r50_regioncl": "weights/regioncl_finetuned.pth",
    "r50_regioncl_unsupervised": "weights/regioncl_unsupervised.pth",
    "resnext101": "timm",
    "resnext151": "weights/resnext151.pth",
    "resnest101": "timm",
    "vitae": "weights/vitaev2_s.pth",
}


def path_of(family: str, stage: str) -> Path:
    return CONFIGS / family / f"{stage}.yaml"


def test_no_recipe_is_left_out():
    found = {path.relative_to(CONFIGS).as_posix() for path in CONFIGS.glob("*/*.yaml") if path.parent.name != "study"}
    assert found >= {f"{family}/{stage}.yaml" for family, stage in RECIPES}


@pytest.mark.parametrize(("family", "stage"), RECIPES, ids=lambda v: v)
def test_numbers_are_the_papers(family, stage):
    settings = load_settings(path_of(family, stage))
    epochs, falls, optimizer, rate, decay, batch, modules = SCHEDULE[stage]
    train, data, model = settings.train, settings.data, settings.model
    assert settings.name == f"{family}-{stage}"
    assert (train.epochs, train.optimizer, train.learning_rate, train.weight_decay) == (epochs, optimizer, rate, decay)
    assert [math.ceil(share * epochs * 10_000) for share in train.milestones] == [fall * 10_000 for fall in falls]
    assert (train.momentum, train.warmup_steps, train.warmup_factor, train.schedule) == (0.9, 1000, 0.001, "steps")
    assert (train.batch, train.reference_batch) == (batch, 4 * batch)
    assert (model.intra, model.inter, model.num_classes) == (modules, modules, 63)
    assert sorted(source.annotations.removesuffix(".json") for source in data.train) == sorted(SETS[stage])
    assert model.backbone.name == BACKBONES[family]
    first = stage in ("pretrain", "train")
    assert model.backbone.weights == (WEIGHTS[family] if first else "none")
    assert train.start_from == (None if first else f"{family}-{BEFORE[stage]}")
    transform = data.transform
    assert (transform.flip_horizontal, transform.flip_vertical) == (0.5, 0.5)
    if family == "vitae":
        assert transform.short_sides == (*range(480, 769, 32), *range(800, 897, 32))
        assert transform.long_caps == (1333,) * 10 + (1600,) * 4
        assert transform.policies == ("rotate", "colour", "colour_rotate", "resize_only")
        assert (model.backbone.frozen_stages, model.backbone.norm_eval) == (0, False)
    else:
        sizes = ((800, 900, 1000, 1100), 1200) if stage == "pretrain" else ((800, 1000, 1200, 1400, 1600), 1800)
        assert (transform.short_sides, transform.long_cap, transform.long_caps) == (*sizes, ())
        assert transform.policies == ("rotate", "colour", "colour_rotate")
        assert (model.backbone.frozen_stages, model.backbone.norm_eval) == (1, True)


@pytest.mark.parametrize(("family", "stage"), RECIPES, ids=lambda v: v)
def test_dry_run(family, stage, capsys):
    path = str(path_of(family, stage))
    command_line.run(lambda settings, options: pytest.fail("a dry run starts nothing"), "", argv=["--config", path, "--dry-run"])
    printed = capsys.readouterr().out
    assert Settings.model_validate(yaml.safe_load(printed)) == load_settings(path)


def skip_without_vitae(family: str) -> None:
    if family == "vitae" and importlib.util.find_spec("i3cl.model.vitae") is None:
        pytest.skip("this network has no ViTAEv2 backbone: i3cl.model.vitae is not there")


@pytest.mark.parametrize("family", ["r50", "resnext101", "resnext151", "resnest101", "vitae"])
def test_network_of_full_size(family):
    skip_without_vitae(family)
    settings = load_settings(path_of(family, STAGES[family][-1]), ["model.backbone.weights=none"])
    with torch.device("meta"):
        model = I3CL(settings.model)
    widths = [64, 128, 256, 512] if family == "vitae" else [256, 512, 1024, 2048]
    assert model.backbone.channels == widths
    if family == "resnext151":
        blocks = [
            len([n for n, _ in stage.named_children()])
            for name, stage in model.backbone.body.named_children()
            if name.startswith("layer")
        ]
        assert blocks == [3, 8, 36, 3]


# ---------------------------------------------------------------------------------------------------------- tiny training


@pytest.fixture(scope="module")
def data_root(tiny_set, tmp_path_factory) -> Path:
    """Every set of the catalogue with the tiny images; the files with loss weights say 0.5."""
    root = tmp_path_factory.mktemp("data")
    plain = (tiny_set / "set.json").read_text()
    tree = json.loads(plain)
    weighted = json.dumps(tree | {"annotations": [a | {"lossweight": 0.5} for a in tree["annotations"]]})
    for entry in yaml.safe_load((CONFIGS / "datasets.yaml").read_text()).values():
        (root / entry["images"]).parent.mkdir(exist_ok=True)
        (root / entry["images"]).symlink_to(tiny_set / "images")
        (root / entry["annotations"]).write_text(plain)
        if "weighted" in entry:
            (root / entry["weighted"]).write_text(weighted)
    return root


def tiny(family: str, stage: str, data_root: Path, storage: Path) -> Settings:
    """The recipe with what it is about, at a sixteenth of the image size and with narrow heads, for two steps."""
    settings = load_settings(path_of(family, stage))
    transform = settings.data.transform
    changes = {f"model.{key}": value for key, value in TINY_MODEL.items() if key not in ("backbone", "num_classes")}
    changes |= {
        "data_root": str(data_root),
        "storage": str(storage),
        "data.ray_data": False,
        "data.transform.short_sides": [side // 16 for side in transform.short_sides],
        "data.transform.long_cap": transform.long_cap // 16,
        "data.transform.long_caps": [cap // 16 for cap in transform.long_caps],
        "train.epochs": None,
        "train.steps": 2,
        "train.log_every": 1,
    }
    if stage in ("pretrain", "train"):
        weights = storage / "weights.pth"
        changes["model.backbone.weights"] = str(weights) if "regioncl" in family else "none"
        if "regioncl" in family:
            torch.manual_seed(0)
            body = backbone.Backbone(settings.model.backbone.model_copy(update={"weights": "none"})).body
            storage.mkdir()
            torch.save({"state_dict": body.state_dict()}, weights)
    return with_overrides(settings, changes, "test")


@pytest.mark.parametrize("family", STAGES)
def test_all_stages_by_name(family, data_root, tmp_path, monkeypatch):
    """Each stage trains two steps from the checkpoint of the run that its recipe names.

    r50 at its real depth; the other ResNets with one block a stage (their own kind of block at its own width), because at full
    depth they take minutes of a CPU. test_network_of_full_size builds those.
    """
    skip_without_vitae(family)
    torch.set_num_threads(1)
    if family not in ("r50", "vitae"):
        name = BACKBONES[family]
        known = backbone.KNOWN.get(name, backbone.Known(name))
        monkeypatch.setitem(backbone.KNOWN, name, replace(known, options={"layers": (1, 1, 1, 1)}))
    for stage in STAGES[family]:
        settings = located(tiny(family, stage, data_root, tmp_path / "runs"))
        _check_data(settings)
        run = tmp_path / "runs" / settings.name
        torch.manual_seed(0)
        trainer = prepare(settings, torch.device("cpu"), 0, 1, str(run))
        notes = " ".join(trainer.log.rows[0]["notes"]) if trainer.log.rows else ""
        if stage in BEFORE:
            assert f"{family}-{BEFORE[stage]}/best" in notes and "tensors loaded" in notes
            new = {"finetune", "ssl_finetune"}.intersection([stage])
            assert ("new: intra (" in notes and "heads.inter (" in notes) == bool(new), notes
        elif "regioncl" in family:
            assert "weights.pth" in notes and "new" not in notes
        before = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
        instances = record_from_row(trainer.mixture.table.to_pylist()[0]).instances
        assert {i.lossweight for i in instances} == {0.5 if stage.startswith("ssl") else 1.0}
        trainer.run(lambda metrics, step: None)
        assert trainer.step == 2
        moved = {name for name, tensor in trainer.model.state_dict().items() if not torch.equal(tensor, before[name])}
        trained = {name for name, p in trainer.model.named_parameters() if p.requires_grad}
        assert all(torch.isfinite(p).all() for p in trainer.model.parameters())
        assert any(name.startswith("backbone.") for name in moved)
        assert not [name for name in moved if name in dict(trainer.model.named_parameters()) and name not in trained]
        assert any(name.startswith("intra.") for name in moved) == settings.model.intra
        trainer.save(run / "best")


def test_epochs_are_fixed_and_steps_shrink(data_root, tmp_path):
    """Ten epochs of ten sets of twelve images: 1200 images, whatever the workers."""
    settings = with_overrides(tiny("r50", "mixtrain", data_root, tmp_path), {"train.epochs": 10, **SMALL}, "test")
    steps = []
    for workers in (1, 4, 8):
        wanted = with_overrides(settings, {"cluster.workers": workers}, "test")
        steps.append(prepare(wanted, torch.device("cpu"), 0, workers, str(tmp_path / "run")).steps)
    assert steps == [1200, 300, 150]


SMALL = {
    "model.backbone.name": "resnet10t",
    "model.backbone.frozen_stages": 0,
    "train.start_from": None,
}


def test_a_run_that_is_not_there_is_named_with_its_command(data_root, tmp_path, monkeypatch):
    monkeypatch.chdir(CONFIGS.parent)
    settings = located(tiny("r50", "ssl_finetune", data_root, tmp_path / "runs"))
    assert settings.train.start_from == str(tmp_path / "runs" / "r50-ssl" / "best")
    with pytest.raises(UserError) as caught:
        _check_data(settings)
    message = str(caught.value)
    assert "r50-ssl has not begun" in message and "--config configs/r50/ssl.yaml name=r50-ssl" in message
    (tmp_path / "runs" / "r50-ssl").mkdir(parents=True)
    with pytest.raises(UserError, match="r50-ssl has not finished"):
        _check_data(settings)
    elsewhere = with_overrides(settings, {"train.start_from": "./somewhere"}, "test")
    with pytest.raises(UserError, match="somewhere does not exist; give a run's name"):
        _check_data(located(elsewhere))


def test_initial_weights_that_are_not_there_are_named(data_root, tmp_path):
    changes = {"data_root": str(data_root), "storage": str(tmp_path)}
    settings = with_overrides(load_settings(path_of("r50_regioncl", "pretrain")), changes, "test")
    with pytest.raises(UserError, match=r"model\.backbone\.weights: .*regioncl_finetuned\.pth does not exist"):
        _check_data(located(settings))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model.backbone.name": "resnet81"}, "timm has no model 'resnet81'; timm has"),
        ({"model.backbone.weights": "package"}, "'package' has weights for tf_efficientnet_lite0, not for resnet50; give"),
    ],
)
def test_a_backbone_that_cannot_be_built_leaves_no_run_behind(data_root, tmp_path, changes, words):
    """The corrected command would be refused there: it has other settings."""
    settings = with_overrides(tiny("r50", "pretrain", data_root, tmp_path / "runs"), changes, "test")
    with pytest.raises(UserError, match=words):
        train(settings)
    assert not (tmp_path / "runs").exists()


def test_remote_storage_keeps_a_runs_name():
    settings = with_overrides(load_settings(path_of("r50", "mixtrain")), {"storage": "s3://bucket/runs"}, "test")
    assert located(settings).train.start_from == "s3://bucket/runs/r50-pretrain/best"


def losses_of(trainer):
    from i3cl.data.loading.transforms import to_target

    pairs = [to_target(sample) for sample in next(trainer._batches())]
    trainer.model.train()
    trainer.model.proposals.choose = trainer.model.heads.choose = lambda candidates, count: candidates[:count]
    return {k: float(v.detach()) for k, v in trainer.model(*map(list, zip(*pairs))).items()}


def test_channels_last_gives_the_losses_of_channels_first(tiny_settings, tmp_path):
    settings = with_overrides(tiny_settings, {**SMALL, "model.backbone.weights": "none", "model.inter_dropout": 0.0}, "test")
    trainer = prepare(settings, torch.device("cpu"), 0, 1, str(tmp_path / "run"))
    last = losses_of(trainer)
    trainer.model.to(memory_format=torch.contiguous_format)
    assert losses_of(trainer) == pytest.approx(last, rel=1e-4)


def test_round_trip_of_a_resolved_recipe(tmp_path):
    settings = load_settings(path_of("r50", "ssl"))
    (tmp_path / "settings.yaml").write_text(to_yaml(settings))
    assert load_settings(tmp_path / "settings.yaml") == settings

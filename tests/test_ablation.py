"""The table of the ablation, and the grid on the tiny set with real training: finished runs are not done again."""

import json

import pytest

from i3cl.ablation import COLUMNS, ablation, table
from i3cl.config import with_overrides
from i3cl.errors import UserError


def test_table_shows_mean_and_spread():
    runs = [{"seed": seed, "rules": "polygon IoU > 0.5"} for seed in (0, 1)]
    row = {column: {"mean": 0.5, "std": 0.0123} for column in COLUMNS}
    text = table({"steps": 7, "images": 9, "variants": {"plain": {**row, "runs": runs}}})
    assert text.splitlines()[1].split() == ["plain", *["50.0", "±", "1.2"] * 4]
    assert "7 steps each; seeds 0, 1; 9 images; polygon IoU > 0.5" in text


@pytest.fixture
def variants(tiny_settings, tmp_path):
    base = with_overrides(
        tiny_settings,
        {
            "name": "grid",
            "storage": str(tmp_path),
            "train.steps": 2,
            "train.checkpoint_every": 2,
            "model.intra": False,
            "model.inter": False,
            "label.select": {"low": 0.0, "ignore": 0.0, "high": 0.9},
            "label.fusion.min_score": 0.0,
            "model.score_threshold": 0.0,
            "model.detections_per_image": 5,
        },
        "test",
    )
    student = {"selftrain.teachers": [{"name": "both"}], "model.intra": True, "model.inter": True}
    return {
        "plain": base,
        "both": with_overrides(base, {"model.intra": True, "model.inter": True}, "test"),
        "ssl": with_overrides(base, student, "test"),
    }


@pytest.mark.slow
def test_grid_is_done_once(variants, tmp_path, ray_cluster):
    summary = ablation(variants, [3])
    assert list(summary["variants"]) == ["plain", "both", "ssl"]
    for row in summary["variants"].values():
        assert len(row["runs"]) == 1 and row["hmean"] == {"mean": row["runs"][0]["hmean"], "std": 0.0}
    run = tmp_path / "grid"
    assert json.loads((run / "ablation.json").read_text()) == summary
    assert "ssl" in (run / "ablation.txt").read_text()
    assert (run / "pseudo-both-3.json").is_file()
    assert "pseudo-both-3" in (run / "ssl-3" / "settings.yaml").read_text()
    before = {path: path.stat().st_mtime_ns for path in run.rglob("weights.safetensors")}
    assert ablation(variants, [3]) == summary
    assert before == {path: path.stat().st_mtime_ns for path in run.rglob("weights.safetensors")}


def test_a_teacher_must_be_a_variant(variants):
    variants["ssl"] = with_overrides(variants["ssl"], {"selftrain.teachers": [{"name": "nobody"}]}, "test")
    with pytest.raises(UserError, match=r"ssl: selftrain\.teachers: nobody .*available: plain, both"):
        ablation(variants, [0])
    del variants["plain"], variants["both"]
    with pytest.raises(UserError, match=r"ssl: selftrain\.teachers: nobody"):
        ablation(variants, [0])

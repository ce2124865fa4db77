"""Self-training without a single label, and the page that yields an estimate where no truth is known."""

import json
import re

import numpy as np
import pytest

from i3cl.circle import selftrain
from i3cl.circle_unlabelled import selftrain_without_labels
from i3cl.config import MemberSettings, load_settings, with_overrides
from i3cl.data.formats.coco import read_coco
from i3cl.data.formats.predictions import read_predictions
from i3cl.data.formats.records import Dataset
from i3cl.errors import UserError
from i3cl.report.check import estimate, write_check_page


@pytest.fixture
def recipe(tiny_settings, tiny_checkpoints, tmp_path):
    root = tiny_settings.data.train[0].annotations.rpartition("/")[0]
    found = [
        {"image_id": record.id, "category_id": 1, "segmentation": [np.asarray(i.polygon).ravel().tolist()], "score": 0.9}
        for record in read_coco(f"{root}/set.json", f"{root}/images").records
        for i in record.instances
    ]
    (tmp_path / "craft.json").write_text(json.dumps(found * 3))
    changes = {
        "name": "circle",
        "storage": str(tmp_path),
        "data_root": root,
        "data.train": [],
        "data.validation": None,
        "train.steps": 2,
        "train.checkpoint_every": 2,
        "train.start_from": tiny_checkpoints["a"],
        "label.source": {"annotations": "unlabelled.json", "images": "images"},
        "label.agreement": True,
        "label.select": {"low": 0.0, "ignore": 0.0, "high": 0.9},
        "label.fusion.min_score": 0.0,
        "selftrain.members": {"ours": tiny_checkpoints["a"], "craft": {"results": [str(tmp_path / "craft.json")]}},
        "selftrain.rounds": 2,
    }
    return with_overrides(tiny_settings, changes, "test")


@pytest.mark.slow
def test_the_whole_circle(recipe, tmp_path, ray_cluster):
    summary = selftrain_without_labels(recipe)
    run = tmp_path / "circle"
    assert json.loads((run / "summary.json").read_text()) == summary
    first = summary["rounds"][0]
    # The student of the first round labels beside the others in the second.
    for folder, members in ((run, ["craft", "ours"]), (run / "round-2", ["craft", "ours", "student"])):
        assert sorted(json.loads((folder / "pseudo.members.json").read_text())["members"]) == members
    assert first["labels"]["instances"] > 0
    # A quarter of the twelve images is kept for the page, and nothing learns from them.
    checked, learned = (
        {row["file_name"] for rows in read_predictions(str(run / "predictions" / name)) for row in rows}
        for name in ("checked", "unlabelled")
    )
    assert (len(checked), len(learned)) == (3, 9) and not checked & learned
    settings = load_settings(run / "round-2" / "student" / "settings.yaml")
    assert settings.train.start_from == first["student"] and len(settings.data.train) == 1
    assert "cannot be said without truth" in summary["verdict"] and (run / "check.html").read_text().count("<article") == 3
    weights = {path: path.stat().st_mtime_ns for path in run.rglob("weights.safetensors")}
    assert selftrain_without_labels(recipe)["student"] == summary["student"]
    assert weights == {path: path.stat().st_mtime_ns for path in run.rglob("weights.safetensors")}
    measured = with_overrides(recipe, {"data.validation": {"annotations": "set.json", "images": "images"}, "name": "two"}, "test")
    summary = selftrain_without_labels(with_overrides(measured, {"selftrain.rounds": 1}, "test"))
    assert sorted(summary["measured"]) == ["start", "student"] and "Student minus start" in summary["verdict"]


@pytest.mark.slow
def test_members_label_beside_teachers(recipe, tiny_set, tmp_path, ray_cluster):
    source = {"annotations": "set.json", "images": "images"}
    changes = {"data.train": [source], "data.validation": source, "selftrain.teachers": [{"name": "t"}], "name": "both"}
    settings = with_overrides(recipe, changes | {"selftrain.rounds": 1, "selftrain.control": False}, "test")
    with pytest.raises(UserError, match=r"selftrain.calibrate: craft has results of the unlabelled images"):
        selftrain(with_overrides(settings, {"selftrain.calibrate": True}, "test"))
    summary = selftrain(settings)
    job = json.loads((tmp_path / "both" / "predictions" / "unlabelled" / "job.json").read_text())
    assert sorted(job["members"]) == ["craft", "ours", "t"] and summary["pseudo_labels"]["instances"] > 0
    assert sorted(json.loads((tmp_path / "both" / "pseudo.members.json").read_text())["members"]) == ["craft", "ours", "t"]


def test_mistakes(recipe):
    for changes, message in (
        ({"selftrain.teachers": [{"name": "t"}]}, "teachers have nothing to learn from"),
        ({"label.source": None}, "label.source: names no unlabelled images"),
    ):
        with pytest.raises(UserError, match=message):
            selftrain_without_labels(with_overrides(recipe, changes, "test"))
    alone = recipe.model_copy(update={"selftrain": recipe.selftrain.model_copy(update={"members": {}})})
    with pytest.raises(UserError, match=r"selftrain.members: names no detector, and data.train no labelled set"):
        selftrain_without_labels(alone)
    with pytest.raises(UserError, match="student is a teacher or the student"):
        with_overrides(recipe, {"selftrain.members": {"student": "x"}}, "test")
    assert load_settings("unlabelled").selftrain.members["ppocr"] == MemberSettings(use="ppocr")
    assert list(load_settings("unlabelled").selftrain.members) == ["ours", "craft", "ppocr"]
    other = load_settings("unlabelled", ["selftrain.members.craft=null", "selftrain.members.mine={use: doctr}"])
    assert list(other.selftrain.members) == ["ours", "ppocr", "mine"]


def answers(path, images, threshold=0.5):
    path.write_text(json.dumps({"title": "t", "threshold": threshold, "id": "1", "images": images}))
    return str(path)


def test_answers_yield_an_estimate(tmp_path):
    same = {f"{k}.jpg": {"found": 10, "wrong": [1, 4], "missed": 8} for k in range(20)}
    found = estimate(answers(tmp_path / "a.json", same))
    assert (found.images, found.precision, found.recall) == (20, 0.8, 0.5)
    assert found.hmean == pytest.approx(2 * 0.8 * 0.5 / 1.3) and found.threshold == 0.5
    # All images alike: nothing is uncertain.
    assert found.precision_interval.low == found.precision_interval.high == 0.8
    mixed = {f"{k}.jpg": {"found": 10, "wrong": list(range(k % 5)), "missed": k % 3} for k in range(50)}
    found = estimate(answers(tmp_path / "b.json", mixed))
    assert found.precision == 0.8 and found.precision_interval.low < 0.78 < 0.82 < found.precision_interval.high


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[]", "not the answers of a check page"),
        ('{"images": {"a": {"found": 1, "wrong": [0, 1, 2], "missed": 0}}, "threshold": 0.5}', "3 wrong of 1 found"),
        ('{"images": {}, "threshold": 0.5}', "0 images are checked; an estimate needs 10"),
    ],
)
def test_broken_answers(tmp_path, content, message):
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(UserError, match=message):
        estimate(str(tmp_path / "a.json"))


def test_the_page_shows_what_is_above_the_threshold_and_loads_nothing(tiny_settings, tmp_path):
    root = tiny_settings.data.train[0].annotations.rpartition("/")[0]
    records = read_coco(f"{root}/set.json", f"{root}/images").records[:3]
    ring = np.array([[5, 5], [40, 5], [40, 20], [5, 20]], np.float32)
    found = {record.id: ([ring, ring + 9], np.array([0.9, 0.3])) for record in records}
    page = tmp_path / "check.html"
    title = "a < b </script><b>"
    write_check_page(str(page), Dataset("set", f"{root}/images", records), found, title)
    text = page.read_text()
    assert text.count("<polygon") == 3 and text.count("data:image/jpeg") == 3 and "</script><b>" not in text
    assert not re.findall(r'(?:src|href)="(?!data:)', text)

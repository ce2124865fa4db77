"""A folder belongs to what it was begun with: settings, and the content of the annotation files."""

import json
import os
import shutil

import pytest

from i3cl.claims import claim, claim_run, content_hash, first_difference
from i3cl.config import with_overrides
from i3cl.data.formats.coco import read_coco
from i3cl.data.formats.table import write_parquet
from i3cl.errors import UserError
from i3cl.training.launch import IDENTITY, located, train_all


def test_the_first_difference_is_named_with_both_values():
    assert first_difference({"a": {"b": 1, "c": "x"}}, {"a": {"b": 1, "c": "x"}}) is None
    assert first_difference({"a": {"b": 1}}, {"a": {"b": 2}}) == "a.b: 1 there, 2 here"
    assert first_difference({"a": 1}, {"a": 1, "z": [1, "ö"]}) == 'z: nothing there, [1, "ö"] here'
    assert first_difference({"a": "x" * 99}, {"a": ""}) == f"a: {'x' * 57}... there,  here"


def test_a_json_claim(tmp_path):
    path = str(tmp_path / "folder" / "job.json")
    claim(path, {"a": (1, 2)}, "labels of another job")
    claim(path, {"a": [1, 2]}, "labels of another job")
    with pytest.raises(
        UserError, match=r"folder: holds labels of another job \(a: \[1, 2\] there, 3 here\); give another name=…"
    ):
        claim(path, {"a": 3}, "labels of another job")


def test_of_many_claims_at_the_same_moment_one_wins(tmp_path, monkeypatch):
    from concurrent.futures import ThreadPoolExecutor
    from threading import Barrier

    from i3cl import claims

    count, path = 20, str(tmp_path / "folder" / "job.json")
    together, read = Barrier(count), claims.read
    first = iter(range(count))

    def seen(url):
        # All of them see that nothing is there, before one of them writes.
        found = read(url)
        if next(first, None) is not None:
            assert found is None
            together.wait(30)
        return found

    monkeypatch.setattr(claims, "read", seen)

    def attempt(number):
        try:
            claim(path, {"job": number}, "another job")
            return number
        except UserError:
            return None

    with ThreadPoolExecutor(count) as pool:
        winners = [number for number in pool.map(attempt, range(count)) if number is not None]
    assert len(winners) == 1 and json.loads((tmp_path / "folder" / "job.json").read_text()) == {"job": winners[0]}
    assert os.listdir(tmp_path / "folder") == ["job.json"]


def test_a_file_system_without_hard_links_takes_claims_too(tmp_path, monkeypatch):
    import errno

    from i3cl import storage

    def refused(*_):
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refused)
    path = str(tmp_path / "job.json")
    assert storage.write_text_new(path, "first") and not storage.write_text_new(path, "second")
    assert os.listdir(tmp_path) == ["job.json"] and storage.read_text(path) == "first"


@pytest.fixture
def student(tiny_settings, tiny_set, tmp_path):
    """Settings of a student on labels and pseudo labels that were copied, so that a test may change them."""
    pseudo = tmp_path / "pseudo.json"
    shutil.copy(tiny_set / "set.json", pseudo)
    images = str(tiny_set / "images")
    sources = [{"annotations": str(tiny_set / "set.json"), "images": images}, {"annotations": str(pseudo), "images": images}]
    changes = {"data.train": sources, "storage": str(tmp_path / "runs"), "name": "student"}
    return located(with_overrides(tiny_settings, changes, "test")), pseudo, str(tmp_path / "runs" / "student")


def test_labels_that_change_under_a_run_are_refused(student):
    settings, pseudo, run = student
    claim_run(run, settings, IDENTITY)
    claim_run(run, settings, IDENTITY)
    original = pseudo.read_text()
    content = json.loads(original)
    content["annotations"] = content["annotations"][1:]
    pseudo.write_text(json.dumps(content))
    with pytest.raises(
        UserError, match=r"other labels: .*pseudo\.json \(data\.train\.1\.annotations\) has changed.*put the earlier"
    ):
        claim_run(run, settings, IDENTITY)
    # The whole way, as train.py goes it: refused before anything starts.
    with pytest.raises(UserError, match=r"runs/student: was begun with other labels: .*pseudo\.json"):
        train_all([settings])
    pseudo.write_text(original)
    claim_run(run, settings, IDENTITY)
    os.utime(pseudo, (1, 1))
    claim_run(run, settings, IDENTITY)
    pseudo.unlink()
    claim_run(run, settings, IDENTITY)
    changed = with_overrides(settings, {"train.steps": 7}, "test")
    with pytest.raises(UserError, match=r"holds a run with other settings \(train\.steps: 30 there, 7 here\)"):
        claim_run(run, changed, IDENTITY)


def test_select_with_other_thresholds_does_not_slip_under_a_student(student, tmp_path, tiny_set):
    import numpy as np
    import pyarrow.parquet as pq

    from i3cl.config import LabelSettings
    from i3cl.data.formats.predictions import prediction_table
    from i3cl.labelling.label import select_labels

    settings, pseudo, run = student
    square = np.array([[10, 10], [60, 10], [60, 40], [10, 40]], np.float32)
    head = {"image_id": 1, "file_name": "0.jpg", "height": 96, "width": 96, "member": "a", "view": "default"}
    (tmp_path / "predictions").mkdir()
    rows = [{**head, "polygons": [square, square + 35], "scores": [0.9, 0.5]}]
    pq.write_table(prediction_table(rows), tmp_path / "predictions" / "part-00-000000.parquet")

    def select(low):
        label = LabelSettings.model_validate({"select": {"low": low, "ignore": 0.1}})
        return select_labels(str(tmp_path / "predictions"), label, str(tmp_path), str(tiny_set / "images"))

    assert select(0.4).path == str(pseudo)
    claim_run(run, settings, IDENTITY)
    select(0.4)
    claim_run(run, settings, IDENTITY)
    assert select(0.7).counts["instances"] == 1
    with pytest.raises(UserError, match=r"pseudo\.json .*has changed since"):
        train_all([settings])


def test_a_folder_of_shards_is_its_data(tiny_set, tmp_path):
    records = list(read_coco(str(tiny_set / "set.json"), str(tiny_set / "images")).records)
    for number, part in enumerate((records[:5], records[5:])):
        write_parquet(str(tmp_path / "set" / f"part-{number}.parquet"), part, "")
    before = content_hash(str(tmp_path / "set"))
    (tmp_path / "set" / "_done.json").write_text("{}")
    assert content_hash(str(tmp_path / "set")) == before
    (tmp_path / "set" / "part-1.parquet").unlink()
    assert content_hash(str(tmp_path / "set")) != before

"""A later round takes from an earlier one what the same members have predicted there."""

import csv
import shutil

import cv2
import numpy as np
import pytest

from i3cl.config import LabelSettings, MemberSettings, Settings, ViewSettings
from i3cl.data.formats.predictions import read_predictions
from i3cl.data.formats.records import Dataset, ImageRecord
from i3cl.labelling.actor import Labeller
from i3cl.labelling.identity import groups_of
from i3cl.labelling.ledger import Ledger, part_name
from i3cl.labelling.predict import predict
from i3cl.lineage import lineage

COUNT = 5
SETTINGS = Settings(label=LabelSettings(rows_per_block=2))


@pytest.fixture
def images(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    for number in range(COUNT - 1):
        cv2.imwrite(str(folder / f"{number}.jpg"), np.full((60, 90, 3), 30 * number, np.uint8))
    # One image of which both jobs know that it is missing.
    return Dataset("set", str(folder), [ImageRecord(k, f"{k}.jpg", 60, 90) for k in range(COUNT)])


@pytest.fixture
def worked(labelling_here, monkeypatch):
    """(part, members) of every shard for which networks worked."""
    seen = []
    write = Labeller._write

    def noted(self, shard):
        seen.append((shard.part, sorted(self.members)))
        write(self, shard)

    monkeypatch.setattr(Labeller, "_write", noted)
    return seen


def rows_of(out):
    found = {}
    for rows in read_predictions(out):
        for row in rows:
            polygons = [polygon.tolist() for polygon in row["polygons"]]
            found[row["image_id"], row["member"], row["view"]] = (row["error"], polygons, row["scores"].tolist())
    return found


def test_only_the_new_member_works(images, tiny_checkpoints, tmp_path, worked):
    first, second, alone = (str(tmp_path / name) for name in ("first", "second", "alone"))
    predict(images, {"a": tiny_checkpoints["a"]}, SETTINGS, first, "t")
    worked.clear()
    predict(images, tiny_checkpoints, SETTINGS, second, "t", earlier=first)
    assert sorted(worked) == [(part_name(1, k), ["b"]) for k in range(3)]
    predict(images, tiny_checkpoints, SETTINGS, alone, "t")
    assert rows_of(second) == rows_of(alone)
    with open(f"{second}/errors.csv") as file:
        assert [row["file_name"] for row in csv.DictReader(file)] == ["4.jpg"]
    assert lineage(second).fresh
    worked.clear()
    # Finished, or continued without the earlier job: it is still the same job.
    predict(images, tiny_checkpoints, SETTINGS, second, "t", earlier=first)
    shutil.rmtree(first)
    for name in ("done.json", part_name(0, 1)):
        (tmp_path / "second" / name).unlink()
    predict(images, tiny_checkpoints, SETTINGS, second, "t", earlier=first)
    assert worked == [(part_name(0, 1), ["a"])] and Ledger(second).is_done()


def test_what_would_be_predicted_otherwise_is_not_taken(images, tiny_checkpoints, tmp_path, worked):
    first = str(tmp_path / "first")
    predict(images, {"a": tiny_checkpoints["a"]}, SETTINGS, first, "t")
    others = {
        "views": (images, "a", {"views": (ViewSettings(short_side=64),)}),
        "shards": (images, "a", {"rows_per_block": 3}),
        "weights": (images, "b", {}),
        "images": (Dataset("set", images.images_root, images.records[1:]), "a", {}),
    }
    for name, (data, weights, changes) in others.items():
        worked.clear()
        settings = Settings(label=SETTINGS.label.model_copy(update=changes))
        members = {"a": tiny_checkpoints[weights], "b": tiny_checkpoints["b"]}
        predict(data, members, settings, str(tmp_path / name), "t", earlier=first)
        assert {tuple(members) for _, members in worked} == {("a", "b")}, name


def test_the_rest_of_an_unfinished_earlier_job_is_predicted(images, tiny_checkpoints, tmp_path, worked, monkeypatch):
    first, second = str(tmp_path / "first"), str(tmp_path / "second")
    predict(images, {"a": tiny_checkpoints["a"]}, SETTINGS, first, "t")
    for name in ("done.json", part_name(0, 2)):
        (tmp_path / "first" / name).unlink()
    worked.clear()
    predict(images, tiny_checkpoints, SETTINGS, second, "t", earlier=first)
    assert sorted(worked) == [(part_name(0, 2), ["a"])] + [(part_name(1, k), ["b"]) for k in range(3)]


def test_members_from_files_stay_groups_of_their_own():
    held, files = MemberSettings(weights="w"), MemberSettings(results=("r.json",))
    members = {"a": held, "b": held, "c": held, "craft": files}
    label = LabelSettings(passes="one")
    assert groups_of(members, label) == [["a", "b", "c"], ["craft"]]
    assert groups_of(members, label, [["b"], ["craft"]]) == [["b"], ["a", "c"], ["craft"]]
    assert groups_of(members, label, [["a", "b", "c"]]) == [["a", "b", "c"], ["craft"]]

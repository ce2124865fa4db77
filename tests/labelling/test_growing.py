"""A labelling job grows: new images join it in shards of their own, and nothing that is done changes."""

import json
import os

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis
from hypothesis import strategies as st

from i3cl import observe
from i3cl.config import LabelSettings, MemberSettings, Settings
from i3cl.data.formats.predictions import PREDICTION_SCHEMA, read_predictions
from i3cl.data.formats.records import Dataset, ImageRecord
from i3cl.errors import UserError
from i3cl.labelling.actor import view_name, view_of
from i3cl.labelling.label import select_labels
from i3cl.labelling.ledger import Failure, Ledger, part_name
from i3cl.labelling.manifest import joined, make_manifest, make_manifest_of, shard_spans
from i3cl.labelling.predict import add_member, predict

SETTINGS = Settings(label=LabelSettings(rows_per_block=2, select={"low": 0.0, "high": 1.0, "ignore": 0.0}))


def records(*numbers):
    return [ImageRecord(number, f"{number}.jpg", 40, 60) for number in numbers]


@pytest.fixture
def photographs(tmp_path):
    """A function that makes the data set of these image numbers."""
    folder = tmp_path / "images"
    folder.mkdir()

    def dataset(*numbers):
        for number in numbers:
            cv2.imwrite(str(folder / f"{number}.jpg"), np.full((40, 60, 3), 10 * number, np.uint8))
        return Dataset("set", str(folder), records(*numbers))

    return dataset


def times(out):
    return {name: os.stat(f"{out}/{name}").st_mtime_ns for name in Ledger(out).finished()}


def labelled(out):
    return sorted(rows[0]["image_id"] for rows in read_predictions(out))


def results(path, images):
    rows = [
        {"image_id": r.id, "category_id": 1, "segmentation": [[5, 5, 25 + r.id, 5, 25 + r.id, 15, 5, 15]], "score": 0.9}
        for r in images.records
    ]
    path.write_text(json.dumps(rows))
    return MemberSettings(results=(str(path),))


# ------------------------------------------------------------------------------------------------------------- manifest


@hypothesis(deadline=None)
@given(grown=st.lists(st.integers(1, 20), min_size=1, max_size=4), rows=st.integers(1, 7))
def test_shards_cover_every_image_once_and_stay_when_a_job_grows(grown, rows):
    spans = shard_spans(grown, rows)
    assert [k for first, count in spans for k in range(first, first + count)] == list(range(sum(grown)))
    assert all(1 <= count <= rows for _, count in spans)
    assert shard_spans([*grown, 5], rows)[: len(spans)] == spans


@hypothesis(deadline=None)
@given(before=st.sets(st.integers(1, 30), min_size=1), after=st.sets(st.integers(1, 30)), shuffle=st.randoms())
def test_joined_images_come_behind_those_that_were_there_in_any_order(before, after, shuffle):
    every = list(before | after)
    shuffle.shuffle(every)
    there, given_now = (make_manifest(Dataset("set", "/i", records(*numbers))) for numbers in (before, every))
    both = joined(there, given_now, "set")
    fresh = [number for number in every if number not in before]
    assert both.table["image_id"].to_pylist() == [*before, *fresh]
    assert both.table["file_name"].to_pylist() == [f"{n}.jpg" for n in [*before, *fresh]]
    assert both.grown == ((len(before), len(fresh)) if fresh else ())
    assert make_manifest_of(both.table.slice(0, len(there))).digest == there.digest
    assert joined(both, given_now, "set") is both


def test_images_that_are_gone_or_have_another_id_are_refused():
    there = make_manifest(Dataset("set", "/i", records(1, 2, 3)))
    with pytest.raises(UserError, match=r"set: lacks 1 of the 3 images that the job has, e\.g\. 2\.jpg"):
        joined(there, make_manifest(Dataset("set", "/i", records(1, 3, 4, 5))), "set")
    renumbered = [ImageRecord(1, "1.jpg", 4, 6), ImageRecord(2, "0.jpg", 4, 6), ImageRecord(3, "3.jpg", 4, 6)]
    with pytest.raises(UserError, match=r"set: image id 2 is 0\.jpg and was 2\.jpg when the job began; keep the ids"):
        joined(there, make_manifest(Dataset("set", "/i", renumbered)), "set")


# ------------------------------------------------------------------------------------------------------------ whole jobs


def test_only_new_images_are_labelled(photographs, tiny_checkpoints, tmp_path, labelling_here, monkeypatch):
    out, said = str(tmp_path / "predictions"), []
    monkeypatch.setattr(observe, "say", lambda text, **_: said.append(text))
    predict(photographs(1, 2, 3), tiny_checkpoints, SETTINGS, out, "t")
    before = times(out)
    assert sorted(before) == [part_name(0, 0), part_name(0, 1)]
    more = photographs(5, 1, 2, 3, 4)
    predict(more, tiny_checkpoints, SETTINGS, out, "t")
    assert "t: 2 images of set join the 3 of the job" in said
    assert before.items() < times(out).items() and len(times(out)) == 3
    assert labelled(out) == [1, 2, 3, 4, 5]
    counts = select_labels(out, SETTINGS.label, str(tmp_path), more.images_root).counts
    assert counts["images"] == 5
    # The same list again, in any order, finds everything done; a third batch joins as the second did.
    after = {name: os.stat(f"{out}/{name}").st_mtime_ns for name in os.listdir(out)}
    predict(photographs(4, 3, 2, 1, 5), tiny_checkpoints, SETTINGS, out, "t")
    assert after == {name: os.stat(f"{out}/{name}").st_mtime_ns for name in os.listdir(out)}
    predict(photographs(1, 2, 3, 4, 5, 6), tiny_checkpoints, SETTINGS, out, "t")
    assert labelled(out) == [1, 2, 3, 4, 5, 6] and Ledger(out).job()["images"]["grown"] == [3, 2, 1]
    other = SETTINGS.model_copy(update={"label": SETTINGS.label.model_copy(update={"rows_per_block": 4})})
    with pytest.raises(UserError, match=r"label\.rows_per_block: 2 there, 4 here"):
        predict(photographs(1, 2, 3, 4, 5, 6, 7), tiny_checkpoints, other, out, "t")
    assert Ledger(out).job()["images"]["count"] == 6, "a refused job must not grow"


@pytest.mark.parametrize("stage", ["write_manifest", "extend", "_label"])
def test_a_job_killed_while_it_grows_goes_on(photographs, tiny_checkpoints, tmp_path, labelling_here, monkeypatch, stage):
    from i3cl.labelling.predict import _Job

    out = str(tmp_path / "predictions")
    predict(photographs(1, 2, 3), tiny_checkpoints, SETTINGS, out, "t")
    owner = _Job if stage == "_label" else Ledger
    real = getattr(owner, stage)

    def killed(self, *given, **options):
        if stage != "_label":
            real(self, *given, **options)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(owner, stage, killed)
        with pytest.raises(KeyboardInterrupt):
            predict(photographs(1, 2, 3, 4), tiny_checkpoints, SETTINGS, out, "t")
    # Killed after the first file of two, the job is still the earlier one, and may even take another image.
    last = 5 if stage == "write_manifest" else 4
    predict(photographs(1, 2, 3, last), tiny_checkpoints, SETTINGS, out, "t")
    assert labelled(out) == [1, 2, 3, last] and Ledger(out).is_done()


def test_results_of_a_member_grow_with_the_job(photographs, tiny_checkpoints, tmp_path, labelling_here):
    out, images, more = str(tmp_path / "predictions"), photographs(1, 2, 3), photographs(1, 2, 3, 4)
    predict(images, tiny_checkpoints, SETTINGS, out, "t")
    add_member(images, "craft", results(tmp_path / "craft.json", images), SETTINGS, out, "t")
    with pytest.raises(UserError, match="parts of craft are missing; give its command again"):
        predict(more, tiny_checkpoints, SETTINGS, out, "t")
    before = times(out)
    moved = results(tmp_path / "moved.json", photographs(2, 3, 4))
    with pytest.raises(UserError, match="has a member craft already, which is another one"):
        add_member(more, "craft", moved, SETTINGS, out, "t")
    add_member(more, "craft", results(tmp_path / "craft.json", more), SETTINGS, out, "t")
    assert before.items() < times(out).items() and Ledger(out).is_done()
    found = {row["image_id"]: row for rows in read_predictions(out) for row in rows if row["member"] == "craft"}
    assert sorted(found) == [1, 2, 3, 4] and found[4]["polygons"][0][1, 0] == 29
    predict(more, tiny_checkpoints, SETTINGS, out, "t")


def test_a_job_without_a_list_of_images_cannot_grow_but_goes_on(photographs, tiny_checkpoints, tmp_path, labelling_here):
    """As earlier versions wrote it."""
    out = str(tmp_path / "predictions")
    predict(photographs(1, 2, 3), tiny_checkpoints, SETTINGS, out, "t")
    os.remove(f"{out}/_manifest.parquet")
    with pytest.raises(UserError, match=r"images\.count: 3 there, 4 here"):
        predict(photographs(1, 2, 3, 4), tiny_checkpoints, SETTINGS, out, "t")
    predict(photographs(1, 2, 3), tiny_checkpoints, SETTINGS, out, "t")
    predict(photographs(1, 2, 3, 4), tiny_checkpoints, SETTINGS, out, "t")
    assert labelled(out) == [1, 2, 3, 4]
    with open(f"{out}/_manifest.parquet", "wb") as file:
        file.write(b"PAR1")
    with pytest.raises(UserError, match=r"_manifest\.parquet: not Parquet"):
        predict(photographs(1, 2, 3, 4, 5), tiny_checkpoints, SETTINGS, out, "t")


# -------------------------------------------------------------------------------------------------------------- requests


def test_errors_of_a_part_that_is_not_there_do_not_count(tmp_path):
    ledger = Ledger(str(tmp_path))
    for shard in range(3):
        ledger.write(part_name(0, shard), PREDICTION_SCHEMA.empty_table(), [Failure(shard, f"{shard}.jpg", "broken")])
    # Killed between the two writes.
    os.remove(f"{ledger.out}/{part_name(0, 1)}")
    assert [failure.image_id for failure in Ledger(str(tmp_path)).failures()] == [0, 2]


def test_the_parts_of_a_job_are_bundled_by_their_names(photographs, tiny_checkpoints, tmp_path, labelling_here, monkeypatch):
    from i3cl.labelling import pseudo

    out = str(tmp_path / "predictions")
    predict(photographs(1, 2, 3), tiny_checkpoints, SETTINGS, out, "t")
    predict(photographs(1, 2, 3, 4), tiny_checkpoints, SETTINGS, out, "t")
    by_content = pseudo._sizes_by_content

    def opened(*_):
        raise AssertionError("a part was opened")

    monkeypatch.setattr(pseudo, "_heads", opened)
    found = pseudo.bundles(out, least=3)
    monkeypatch.undo()
    assert [[path.rpartition("/")[2] for path in group] for group in found.groups] == [
        [part_name(0, 0), part_name(0, 1)],
        [part_name(0, 2)],
    ]
    assert (found.images, found.members) == (4, ["a", "b"])
    sizes, members = by_content({f"{k:06d}": [f"{out}/{part_name(0, k)}"] for k in range(3)})
    assert (list(sizes.values()), members) == ([2, 1, 1], {"a", "b"})


@pytest.mark.slow
def test_images_that_were_repaired_are_tried_again(photographs, tiny_checkpoints, tmp_path, ray_cluster, capfd):
    """A wrong or missing folder stops a job with errors for good images; the same command has to work once it is there."""
    images, out = photographs(1, 2, 3, 4, 5, 6), str(tmp_path / "out")
    folder, away = tmp_path / "images", tmp_path / "away"
    away.mkdir()
    for number in (1, 4, 5, 6):
        (folder / f"{number}.jpg").rename(away / f"{number}.jpg")
    members = {"a": tiny_checkpoints["a"]}
    for _ in range(2):
        with pytest.raises(UserError, match=r"4 of 6 images cannot be labelled, .*repair them or raise label\.max_error_share"):
            predict(images, members, SETTINGS, out, "t")
    for number in (1, 4, 5):
        (away / f"{number}.jpg").rename(folder / f"{number}.jpg")
    with observe.console():
        predict(images, members, SETTINGS, out, "t")
    assert "t: 4 images that could not be labelled are tried again" in capfd.readouterr().out
    assert json.loads((tmp_path / "out" / "done.json").read_text())["failed"] == 1
    assert (tmp_path / "out" / "errors.csv").read_text().splitlines()[1].startswith("6,6.jpg,")
    errors = {rows[0]["image_id"]: rows[0]["error"] for rows in read_predictions(out)}
    assert sorted(errors) == [1, 2, 3, 4, 5, 6] and [k for k, reason in errors.items() if reason] == [6]


def test_an_added_member_sees_the_views_of_the_job(photographs, tiny_checkpoints, tmp_path):
    """Its recipe may have others since; rows of other views would not belong to the images of the job."""
    images, out = photographs(1, 2), str(tmp_path / "out")
    views = [{"short_side": 64}, {"short_side": 48, "flip": True}]
    begun = SETTINGS.model_copy(update={"label": SETTINGS.label.model_copy(update={"views": LabelSettings(views=views).views})})
    predict(images, {"x": results(tmp_path / "x.json", images)}, begun, out, "t")
    add_member(images, "y", results(tmp_path / "y.json", images), SETTINGS, out, "t")
    assert {row["view"] for rows in read_predictions(out) for row in rows} == {"s64"}
    job = json.loads((tmp_path / "out" / "job.json").read_text())
    assert [view_name(view_of(name)) for name in job["views"]] == job["views"] == ["s64", "s48-flip"]
    same = begun.label.model_copy(update={"views": LabelSettings(views=[{"short_side": 5000}, {"short_side": 6000}]).views})
    predict(images, {"x": results(tmp_path / "x.json", images)}, SETTINGS.model_copy(update={"label": same}), out + "2", "t")
    with pytest.raises(UserError, match="s6000 shows z the same picture as s5000"):
        add_member(images, "z", MemberSettings(weights=tiny_checkpoints["a"]), SETTINGS, out + "2", "t")

"""Members whose findings come from files: matched, checked, added to a job, continued, and refused when they do not fit."""

import csv
import json
import shutil
import subprocess
import sys
from dataclasses import replace

import cv2
import numpy as np
import pytest

from i3cl import storage
from i3cl.cli.label import ordered
from i3cl.config import LabelSettings, MemberSettings, Settings
from i3cl.data.exports.common import ExportOptions
from i3cl.data.exports.registry import FORMATS
from i3cl.data.formats.coco import write_coco
from i3cl.data.formats.predictions import prediction_table, read_predictions
from i3cl.data.formats.records import Dataset, ImageRecord, Instance
from i3cl.errors import UserError
from i3cl.labelling.label import select_labels
from i3cl.labelling.ledger import Ledger, part_name
from i3cl.labelling.predict import add_member, predict
from i3cl.labelling.results import read_member, results_hash
from i3cl.lineage import lineage

SIDES = (120, 160)
COUNT = 6


def ring(x, y, width=40, height=16):
    return np.array([[x, y], [x + width, y], [x + width, y + height], [x, y + height]], np.float32)


def truth(number):
    """The words of an image: another place in every image, so that images cannot be mixed up."""
    return [ring(5 + 7 * number, 10 + 5 * number), ring(60 + 5 * number, 70 - 4 * number)]


@pytest.fixture
def images(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    records = []
    for number in range(COUNT):
        name = f"shop {number}.jpg"
        cv2.imwrite(str(folder / name), np.full((*SIDES, 3), 90 + number, np.uint8))
        records.append(ImageRecord(10 * number + 3, name, *SIDES))
    return Dataset("set", str(folder), records)


def labelled(images, move=lambda ring, number: ring):
    found = []
    for number, record in enumerate(images.records):
        kept = tuple(Instance(np.asarray(move(r, number), np.float32), score=0.8) for r in truth(number))
        found.append(ImageRecord(record.id, record.file_name, record.height, record.width, kept))
    return found


def written(tmp_path, images, form, name, records=None):
    out = str(tmp_path / name)
    FORMATS[form].write(out, labelled(images) if records is None else records, ExportOptions())
    return out


def icdar_by_name(tmp_path, images):
    """Text files named after the images, as most programs write them."""
    folder = tmp_path / "texts"
    folder.mkdir()
    for number, record in enumerate(images.records):
        lines = [",".join(str(int(v)) for v in r.ravel()) + ",0.8" for r in truth(number)]
        (folder / record.file_name.replace(".jpg", ".txt")).write_text("\n".join(lines))
    return str(folder)


def coco_results(tmp_path, images):
    rows = [
        {"image_id": r.id, "category_id": 1, "segmentation": [p.ravel().tolist()], "score": 0.8}
        for number, r in enumerate(images.records)
        for p in truth(number)
    ]
    (tmp_path / "results.json").write_text(json.dumps(rows))
    return str(tmp_path / "results.json")


def table(tmp_path, images, members=("craft",)):
    import pyarrow.parquet as pq

    rows = [
        {
            "image_id": 900 + n,
            "file_name": r.file_name,
            "height": SIDES[0],
            "width": SIDES[1],
            "member": member,
            "view": "default",
        }
        | {"polygons": truth(n), "scores": [0.8, 0.8]}
        for n, r in enumerate(images.records)
        for member in members
    ]
    pq.write_table(prediction_table(rows), tmp_path / "table.parquet")
    return str(tmp_path / "table.parquet")


SOURCES = {
    "COCO results": (coco_results, "auto"),
    "COCO data set": (lambda t, i: written(t, i, "coco", "set.json"), "auto"),
    "text files": (icdar_by_name, "auto"),
    "Label.txt": (lambda t, i: written(t, i, "paddle", "Label.txt"), "auto"),
    "LabelMe": (lambda t, i: written(t, i, "labelme", "labelme"), "auto"),
    "CVAT": (lambda t, i: written(t, i, "cvat", "cvat.xml"), "cvat"),
    "table": (table, "auto"),
    "one of several members": (lambda t, i: table(t, i, ("craft", "other")), "auto"),
}


@pytest.mark.parametrize("source", SOURCES)
def test_every_format_gives_the_same_findings(tmp_path, images, source):
    make, form = SOURCES[source]
    member = MemberSettings(results=(make(tmp_path, images),), format=form)
    found = read_member("craft", member, images).found
    assert sorted(found) == [record.id for record in images.records]
    for number, record in enumerate(images.records):
        polygons, scores = found[record.id]
        assert len(polygons) == len(scores) == 2
        for one, other in zip(polygons, truth(number), strict=True):
            assert np.abs(np.sort(one, axis=0) - np.sort(other, axis=0)).max() <= 1
        assert set(np.round(scores, 3)) <= {0.8, 1.0}


def rows_of(out):
    return {(row["image_id"], row["member"]): row for rows in read_predictions(out) for row in rows}


@pytest.fixture
def begun(tmp_path, images, tiny_checkpoints, labelling_here):
    """A finished job with one member of ours, in shards of two images."""
    out = str(tmp_path / "predictions")
    settings = Settings(label=LabelSettings(rows_per_block=2))
    predict(images, {"a": tiny_checkpoints["a"]}, settings, out, "t")
    return out, settings


def test_results_join_a_finished_job(tmp_path, images, begun, tiny_checkpoints):
    out, settings = begun
    before = {name: (tmp_path / "predictions" / name).stat().st_mtime_ns for name in Ledger(out).finished()}
    member = MemberSettings(results=(coco_results(tmp_path, images),), granularity="line")
    add_member(images, "craft", member, settings, out, "t")
    rows = rows_of(out)
    assert len(rows) == 2 * COUNT and all(row["error"] is None for row in rows.values())
    first = rows[images.records[0].id, "craft"]
    assert first["granularity"] == "line" and (first["height"], first["width"]) == SIDES
    assert rows[images.records[0].id, "a"]["granularity"] == "word"
    assert (
        before.items() <= {name: (tmp_path / "predictions" / name).stat().st_mtime_ns for name in Ledger(out).finished()}.items()
    )
    done = json.loads(storage.read_text(f"{out}/done.json"))
    assert sorted(done["made_from"]["members"]) == ["a", "craft"]
    assert lineage(out).fresh and done["made_from"]["members"]["a"]["file"] == tiny_checkpoints["a"]
    # The same call, and the job's own, find everything done.
    for again in (
        lambda: add_member(images, "craft", member, settings, out, "t"),
        lambda: predict(images, {"a": tiny_checkpoints["a"]}, settings, out, "t"),
    ):
        times = {name: (tmp_path / "predictions" / name).stat().st_mtime_ns for name in storage.list_dir(out)}
        again()
        assert times == {name: (tmp_path / "predictions" / name).stat().st_mtime_ns for name in storage.list_dir(out)}
    (tmp_path / "results.json").write_text("[]")
    assert [each.role for each in lineage(out).artefacts[0][1].inputs if each.state == "stale"] == ["member craft"]
    with pytest.raises(UserError, match="has a member craft already, which is another one; choose another name"):
        add_member(images, "craft", member, settings, out, "t")
    with pytest.raises(UserError, match="has a member a already"):
        add_member(images, "a", MemberSettings(results=(table(tmp_path, images),)), settings, out, "t")


def test_adding_continues_where_it_was_stopped(tmp_path, images, begun, tiny_checkpoints, monkeypatch):
    out, settings = begun
    member = MemberSettings(results=(coco_results(tmp_path, images),))
    write, count = Ledger.write, []

    def stop(self, part, *rest):
        if len(count) == 2:
            raise KeyboardInterrupt
        count.append(part)
        write(self, part, *rest)

    monkeypatch.setattr(Ledger, "write", stop)
    with pytest.raises(KeyboardInterrupt):
        add_member(images, "craft", member, settings, out, "t")
    monkeypatch.undo()
    assert count == [part_name(1, 0), part_name(1, 1)] and not storage.exists(f"{out}/done.json")
    with pytest.raises(UserError, match="is not finished"):
        select_labels(out, LabelSettings(), str(tmp_path), "")
    with pytest.raises(UserError, match="parts of craft are missing; give its command again"):
        predict(images, {"a": tiny_checkpoints["a"]}, settings, out, "t")
    add_member(images, "craft", member, settings, out, "t")
    assert len(rows_of(out)) == 2 * COUNT and storage.exists(f"{out}/done.json")


def test_a_job_of_results_alone(tmp_path, images):
    out = str(tmp_path / "predictions")
    settings = Settings(label=LabelSettings(rows_per_block=4))
    add_member(images, "craft", MemberSettings(results=(coco_results(tmp_path, images),)), settings, out, "t")
    add_member(images, "labelme", MemberSettings(results=(written(tmp_path, images, "labelme", "lm"),)), settings, out, "t")
    labels = select_labels(out, LabelSettings(select={"low": 0.5, "high": 0.8}), str(tmp_path), "")
    assert labels.counts["instances"] == 2 * COUNT and labels.counts["images"] == COUNT
    other = Dataset("set", images.images_root, images.records[1:])
    with pytest.raises(UserError, match=r"lacks 1 of the 6 images that the job has, e.g. shop 0.jpg"):
        add_member(other, "more", MemberSettings(results=(coco_results(tmp_path, images),)), settings, out, "t")


def test_images_that_the_results_lack_are_named_and_do_not_count_against_the_others(tmp_path, images, begun):
    out, settings = begun
    source = written(tmp_path, images, "coco", "set.json", labelled(images)[:4])
    add_member(images, "craft", MemberSettings(results=(source,)), settings, out, "t")
    rows = rows_of(out)
    lacking = [record for record in images.records if rows[record.id, "craft"]["error"]]
    assert lacking == list(images.records[4:])
    with open(tmp_path / "predictions" / "errors.csv") as file:
        reasons = [row["reason"] for row in csv.DictReader(file)]
    assert reasons == [f"{record.file_name}: craft: not in the results" for record in lacking]
    fewer = written(tmp_path, images, "coco", "two.json", labelled(images)[:2])
    with pytest.raises(UserError, match=r"label.members.few.results: hold 2 of 6 images"):
        add_member(images, "few", MemberSettings(results=(fewer,)), settings, out, "t")


def test_results_of_more_images_than_the_job_has(tmp_path, images):
    more = [*labelled(images), ImageRecord(777, "elsewhere.jpg", *SIDES, (Instance(ring(1, 1), score=0.5),))]
    source = written(tmp_path, images, "coco", "set.json", more)
    read = read_member("craft", MemberSettings(results=(source,)), images)
    assert len(read.found) == COUNT and any("1 of its images are not in set, e.g. elsewhere.jpg" in note for note in read.notes)
    # Its ids are those of another set, and fit this one by chance: names come first.
    (tmp_path / "more").mkdir()
    shifted = [replace(r, id=images.records[(k + 1) % COUNT].id) for k, r in enumerate(labelled(images))]
    again = read_member(
        "craft", MemberSettings(results=(written(tmp_path / "more", images, "coco", "ids.json", shifted),)), images
    )
    for image_id, (polygons, _) in read.found.items():
        assert all(np.array_equal(one, other) for one, other in zip(polygons, again.found[image_id][0], strict=True))
    (tmp_path / "Label.txt").write_text("elsewhere.jpg\t[]\n")
    with pytest.raises(UserError, match=r"line 1: image 'elsewhere.jpg' is not in"):
        read_member("craft", MemberSettings(results=(str(tmp_path / "Label.txt"),)), images)
    # A COCO results list has ids alone.
    listed = coco_results(tmp_path, Dataset("more", images.images_root, more))
    assert sorted(read_member("craft", MemberSettings(results=(listed,)), images).found) == [r.id for r in images.records]
    strange = written(tmp_path / "more", images, "coco", "strange.json", [replace(r, file_name=f"x{r.id}.jpg") for r in more])
    with pytest.raises(UserError, match="results are of images that the truth does not have"):
        read_member("craft", MemberSettings(results=(strange,)), images)


MISTAKES = {
    "scaled": (lambda r, n: r * 0.5, r"the results look (scaled by 0.5|like coordinates)"),
    "swapped": (lambda r, n: r[:, ::-1], "x and y look swapped"),
    "relative": (lambda r, n: r / np.array(SIDES[::-1]), r"relative to the image \(0-1\)"),
    "upside down": (lambda r, n: r * (1, -1) + np.array([0, SIDES[0]]), "y looks counted from the bottom"),
    "shifted": (lambda r, n: r + np.array([30, 24]), "the results look moved by"),
    "of the next image": (lambda r, n: truth((n + 1) % COUNT)[int(r[0, 0] == truth(n)[1][0, 0])], "shifted by|look numbered"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_results_in_another_frame_are_refused(tmp_path, images, mistake):
    """What the other members are sure of is the measure."""
    out = str(tmp_path / "predictions")
    add_member(images, "good", MemberSettings(results=(table(tmp_path, images),)), Settings(), out, "t")
    move, message = MISTAKES[mistake]
    rows = [
        {"image_id": r.id, "category_id": 1, "segmentation": [np.asarray(move(p, n)).ravel().tolist()], "score": 0.9}
        for n, r in enumerate(images.records)
        for p in truth(n)
    ]
    (tmp_path / "moved.json").write_text(json.dumps(rows))
    with pytest.raises(UserError, match=rf"label.members.craft.results: .*{message}"):
        add_member(images, "craft", MemberSettings(results=(str(tmp_path / "moved.json"),)), Settings(), out, "t")


def test_polygons_outside_of_their_images_are_refused_without_other_members(tmp_path, images):
    far = [
        {"image_id": r.id, "category_id": 1, "segmentation": [(ring(500, 500)).ravel().tolist()]} | {"score": 0.9}
        for r in images.records
    ]
    (tmp_path / "far.json").write_text(json.dumps(far))
    with pytest.raises(UserError, match=r"6 of 6 polygons lie outside of their images; write pixels"):
        add_member(images, "x", MemberSettings(results=(str(tmp_path / "far.json"),)), Settings(), str(tmp_path / "p"), "t")


def test_broken_files_are_one_line(tmp_path, images):
    def call(**member):
        return read_member("craft", MemberSettings(**member), images)

    with pytest.raises(UserError, match="no such file"):
        add_member(images, "x", MemberSettings(results=(str(tmp_path / "none.json"),)), Settings(), str(tmp_path / "p"), "t")
    (tmp_path / "cut.json").write_text('[{"image_id": 3, "score"')
    with pytest.raises(UserError, match=r"cut\.json"):
        call(results=(str(tmp_path / "cut.json"),))
    good = coco_results(tmp_path, images)
    with pytest.raises(UserError, match=r"craft.format: labelbox is not one of auto, "):
        call(results=(good,), format="labelbox")
    shutil.copy(good, tmp_path / "again.json")
    with pytest.raises(UserError, match=r"both hold image 3; give every image's results once"):
        call(results=(good, str(tmp_path / "again.json")))
    rows = json.loads((tmp_path / "results.json").read_text())
    rows[0]["score"] = 7
    (tmp_path / "bad.json").write_text(json.dumps(rows))
    with pytest.raises(UserError, match="score"):
        call(results=(str(tmp_path / "bad.json"),))
    left = read_member("craft", MemberSettings(results=(str(tmp_path / "bad.json"),)), images, skip_bad=True)
    assert sum(len(polygons) for polygons, _ in left.found.values()) == 2 * COUNT - 1 and "score" in left.notes[0]
    assert not (tmp_path / "p").exists()


def test_results_that_cannot_be_used_leave_a_finished_job_as_it_was(tmp_path, images, begun):
    """The job would be unfinished, and the repaired file another member of a name that is taken."""
    out, settings = begun
    source = coco_results(tmp_path, images)
    good = storage.read_text(source)
    before = {name: storage.read_text(f"{out}/{name}") for name in ("job.json", "done.json")}
    for broken in ('[{"broken', '[{"image_id": 3, "category_id": 1, "segmentation": [[1, 2, 3]], "score": 0.5}]'):
        storage.write_text_atomic(source, broken)
        with pytest.raises(UserError):
            add_member(images, "craft", MemberSettings(results=(source,)), settings, out, "t")
        assert before == {name: storage.read_text(f"{out}/{name}") for name in before}
    storage.write_text_atomic(source, good)
    add_member(images, "craft", MemberSettings(results=(source,)), settings, out, "t")
    assert len(rows_of(out)) == 2 * COUNT and storage.exists(f"{out}/done.json")
    storage.write_text_atomic(source, '[{"broken')
    with pytest.raises(UserError, match="not valid JSON"):
        predict(images, {"craft": MemberSettings(results=(source,))}, settings, str(tmp_path / "new"), "t")
    assert not (tmp_path / "new").exists()


def test_a_member_that_could_not_be_loaded_may_be_given_again(tmp_path, images, begun, tiny_checkpoints):
    out, settings = begun
    (tmp_path / "wrong.pth").write_bytes(b"not weights")
    wrong = MemberSettings(use="torchvision", weights=str(tmp_path / "wrong.pth"))
    with pytest.raises(UserError, match=r"wrong\.pth"):
        add_member(images, "b", wrong, settings, out, "t")
    assert not storage.exists(f"{out}/done.json"), "the job waits for it"
    add_member(images, "b", MemberSettings(weights=tiny_checkpoints["b"]), settings, out, "t")
    assert len(rows_of(out)) == 2 * COUNT and lineage(out).fresh
    with pytest.raises(UserError, match="has a member b already, which is another one"):
        add_member(images, "b", wrong, settings, out, "t")


def test_the_hash_of_a_folder_depends_on_its_files_and_not_on_their_order(tmp_path, images):
    (tmp_path / "texts").mkdir()
    for k in range(40):
        (tmp_path / "texts" / f"{k}.txt").write_text(str(k))
    member = MemberSettings(results=(str(tmp_path / "texts"),))
    code = "from i3cl.config import MemberSettings; from i3cl.labelling.results import results_hash; "
    code += f"print(results_hash({member!r}))"
    # The order of a set of names is another one in every process.
    told = {subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout for _ in range(2)}
    assert told == {results_hash(member) + "\n"}
    (tmp_path / "texts" / "7.txt").write_text("8")
    assert told != {results_hash(member) + "\n"}


def test_settings_of_a_member():
    assert LabelSettings(members={"a": "runs/a/best"}).members["a"] == MemberSettings(weights="runs/a/best")
    for wrong, message in (
        ({}, "weights: give a checkpoint directory"),
        ({"results": ["a.json"], "weights": "b"}, "results: stand for a detector"),
        ({"use": "ppocr", "results": ["a.json"]}, "results: stand for a detector"),
    ):
        with pytest.raises(ValueError, match=message):
            MemberSettings(**wrong)


def test_settings_after_a_list_of_files_are_no_files():
    words = ["add-member", "craft", "--results", "a.json", "b=c.json", "name=x", "label.batch=2", "--format", "coco"]
    assert ordered(words) == ["add-member", "--name", "craft", "name=x", "label.batch=2", *words[2:5], "--format", "coco"]
    assert ordered(["add-member", "name=x"]) == ["add-member", "name=x"] and ordered(["predict", "craft"]) == ["predict", "craft"]


def test_the_command_line(tmp_path, images):
    """From files alone to pseudo labels, with the mistakes that users make on the way."""
    write_coco(str(tmp_path / "set.json"), images.records)

    def i3cl(*words):
        source = f"label.source={{annotations: {tmp_path}/set.json, images: {tmp_path}/images}}"
        settings = [source, f"storage={tmp_path}", "name=run"]
        command = [sys.executable, "-m", "i3cl.cli", "label", *words, *settings]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        return done.returncode, done.stdout + done.stderr

    one, other = coco_results(tmp_path, images), written(tmp_path, images, "labelme", "lm")
    assert i3cl("add-member", "--results", one)[1].strip().endswith("write i3cl label add-member NAME --results FILES")
    status, said = i3cl("add-member", "craft")
    assert status == 2 and "--results: names no file" in said
    status, said = i3cl("add-member", "craft", "--results", one, "--granularity", "word")
    assert status == 0 and "craft: results of 6 images" in said and "predictions: " in said
    status, said = i3cl("agree")
    assert status == 2 and "agreement needs another detector" in said
    status, said = i3cl("add-member", "people", "--results", other)
    assert status == 0, said
    status, said = i3cl("agree")
    assert status == 0 and "people: 12 findings, 1.00 confirmed by others; too few to learn from" in said
    status, said = i3cl("select", "label.select.low=0.5")
    assert status == 0 and "instances 12" in said

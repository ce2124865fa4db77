import csv
import json
import math
import os
import re
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from i3cl.cli import label as command
from i3cl.config import LabelSettings, load_settings, with_overrides
from i3cl.data.exports.corrections import import_corrections
from i3cl.data.exports.export import export_labels
from i3cl.data.formats.coco import read_coco, write_coco
from i3cl.data.formats.predictions import prediction_table
from i3cl.data.formats.records import ImageRecord, Instance
from i3cl.errors import UserError
from i3cl.geometry import overlaps
from i3cl.labelling.audit import audit_labels
from i3cl.labelling.predict import predict
from i3cl.training.launch import train_all

WIDTH, HEIGHT = 640, 480
SHARED = Path(os.environ.get("I3CL_SHARED", Path(__file__).resolve().parents[2].parent / "shared"))


def box(x, y, width=80.0, height=20.0):
    return np.array([[x, y], [x + width, y], [x + width, y + height], [x, y + height]], np.float32)


def stored(folder, found, error=None):
    """found: image -> member -> list of (polygon, score)."""
    folder.mkdir()
    rows = [
        {
            "image_id": image,
            "file_name": f"{image}.jpg",
            "height": HEIGHT,
            "width": WIDTH,
            "member": member,
            "view": "default",
            "polygons": [polygon for polygon, _ in pairs],
            "scores": [score for _, score in pairs],
            "error": error,
        }
        for image, members in found.items()
        for member, pairs in members.items()
    ]
    pq.write_table(prediction_table(rows), folder / "part-00000.parquet")
    return str(folder)


def record(image, *labels):
    return ImageRecord(image, f"{image}.jpg", HEIGHT, WIDTH, tuple(Instance(label) for label in labels))


def both(*pairs):
    """Two members that find the same."""
    return {"a": list(pairs), "b": list(pairs)}


def problems(audit):
    return {(item.record.id, problem.kind, problem.label) for item in audit.ranking for problem in item.problems}


# ------------------------------------------------------------------------------------------------------ single cases


def test_each_kind_of_problem_is_found_and_right_labels_are_not(tmp_path):
    right, shifted = box(20, 20), box(20, 128)
    truth = [
        record(0, right),
        record(1, right),  # box(20, 60) has no label
        record(2, right, box(300, 300)),  # nobody sees the second
        record(3, right, shifted),  # 8 of 20 pixels too low
    ]
    found = {
        0: both((right, 0.9)),
        1: both((right, 0.9), (box(20, 60), 0.8)),
        2: both((right, 0.9)),
        3: both((right, 0.9), (box(20, 120), 0.9)),
    }
    audit = audit_labels([stored(tmp_path / "p", found)], truth, LabelSettings())
    assert problems(audit) == {(1, "missing", None), (2, "unsupported", 1), (3, "loose", 1)}
    assert (audit.images, audit.labels) == (4, 6)
    assert audit.counts() == {"missing": 1, "unsupported": 1, "loose": 1}
    assert [item.score for item in audit.ranking] == sorted((item.score for item in audit.ranking), reverse=True)


@pytest.mark.parametrize(
    ("labels", "found"),
    [
        pytest.param([box(20, 20, 200)], [box(20, 20, 90), box(130, 20, 90)], id="a line of which the members find the words"),
        pytest.param([box(20, 20, 90), box(130, 20, 90)], [box(20, 20, 200)], id="words of which the members find the line"),
    ],
)
def test_lines_and_words_do_not_contradict_each_other(tmp_path, labels, found):
    audit = audit_labels(
        [stored(tmp_path / "p", {0: both(*((polygon, 0.9) for polygon in found))})], [record(0, *labels)], LabelSettings()
    )
    assert not {problem for problem in problems(audit) if problem[1] != "loose"}


def test_ignore_regions_are_neither_missing_nor_judged(tmp_path):
    truth = [ImageRecord(0, "0.jpg", HEIGHT, WIDTH, (Instance(box(20, 20), ignore=True), Instance(box(20, 200), ignore=True)))]
    audit = audit_labels([stored(tmp_path / "p", {0: both((box(20, 20), 0.9))})], truth, LabelSettings())
    assert (audit.ranking, audit.labels) == ([], 0)


def test_a_weak_detection_supports_a_label_and_is_not_a_missing_word(tmp_path):
    found = {0: {"a": [(box(20, 20), 0.15), (box(20, 200), 0.5)], "b": []}}
    assert not audit_labels([stored(tmp_path / "p", found)], [record(0, box(20, 20))], LabelSettings()).ranking


def test_a_label_that_nobody_finds_says_little_where_most_are_not_found(tmp_path):
    """Of ten large words nine are found, of ten small ones one."""
    large = [box(20, 40 * k, 150, 30) for k in range(10)]
    small = [box(300, 40 * k, 15, 4) for k in range(10)]
    found = {0: both(*((polygon, 0.9) for polygon in [*large[:9], small[0]]))}
    audit = audit_labels([stored(tmp_path / "p", found)], [record(0, *large, *small)], LabelSettings())
    scores = {problem.label: problem.score for problem in audit.ranking[0].problems}
    assert scores[9] > 0.8
    assert all(scores[k] < 0.2 for k in range(11, 20))


def test_folds_must_be_disjoint_and_of_the_same_set(tmp_path):
    truth = [record(0, box(20, 20)), record(1, box(20, 20)), record(2, box(20, 20)), record(3, box(20, 20))]
    a = stored(tmp_path / "a", {0: both((box(20, 20), 0.9))})
    b = stored(tmp_path / "b", {0: both((box(20, 20), 0.9)), 1: both((box(20, 20), 0.9))})
    with pytest.raises(UserError, match=r"b: 0\.jpg is also predicted in .*a; each image must be predicted once"):
        audit_labels([a, b], truth, LabelSettings())
    with pytest.raises(UserError, match=r"image 0 is 0\.jpg there and other\.jpg in the labelled set"):
        audit_labels([a], [replace(truth[0], file_name="other.jpg")], LabelSettings())
    with pytest.raises(UserError, match="no image of the labelled set could be read"):
        audit_labels([a], truth[1:], LabelSettings())
    lost = stored(tmp_path / "c", {2: {"a": []}}, error="cannot be decoded")
    audit = audit_labels([b, lost], truth, LabelSettings())
    assert (audit.images, audit.unreadable, audit.unpredicted) == (2, ["2.jpg"], ["3.jpg"])


# ------------------------------------------------------------------------------------------------------------- files


@pytest.fixture
def audited(tmp_path):
    """Image 1 lacks a word and has a wrong one; image 0 is right."""
    text = Instance(box(20, 20), text="exit", language="Latin")
    truth = [
        ImageRecord(0, "0.jpg", HEIGHT, WIDTH, (text,)),
        ImageRecord(1, "1.jpg", HEIGHT, WIDTH, (text, Instance(box(300, 300)))),
    ]
    for entry in truth:
        Image.new("RGB", (WIDTH, HEIGHT), (90, 90, 90)).save(tmp_path / entry.file_name)
    write_coco(str(tmp_path / "set.json"), truth)
    stored(tmp_path / "a", {0: both((box(20, 20), 0.9))})
    stored(tmp_path / "b", {1: both((box(20, 20), 0.9), (box(20, 120), 0.8))})
    return tmp_path


def call(folder, *words):
    argv = ["label.py", "audit", "--truth", f"{folder}/set.json", "--images", str(folder), "--out", f"{folder}/out", *words]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", argv)
        command.main()


def test_the_command_writes_ranking_table_and_page(audited, capsys):
    call(audited, "--predictions", f"{audited}/a", f"{audited}/b")
    printed = capsys.readouterr().out
    assert "missing 1  unsupported 1  loose 0" in printed
    assert "3 labels in 2 images compared; 1 images with a problem" in printed
    content = json.loads((audited / "out/audit.json").read_text())
    assert [image["file_name"] for image in content["images"]] == ["1.jpg"]
    assert [entry.get("problem") for entry in content["annotations"]] == [None, "unsupported", "missing"]
    assert all(0 < entry["problem_score"] <= 1 for entry in content["annotations"][1:])
    assert content["annotations"][0]["text"] == "exit"
    assert (content["annotations"][2]["score"], content["annotations"][2]["votes"]) == (pytest.approx(0.8), 2)
    with open(audited / "out/audit.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["image"], row["problem"]) for row in rows] == [("1.jpg", "unsupported"), ("1.jpg", "missing")]
    assert rows[1]["box"] == "20.0 120.0 100.0 140.0"
    assert float(rows[0]["score"]) > float(rows[1]["score"])
    page = (audited / "out/report.html").read_text()
    assert page.count("<figure>") == 1
    assert re.search(r"1.jpg: unsupported 0\.\d\d, missing 0\.\d\d<", page)
    assert 'href="http' not in page


def test_the_command_says_what_was_not_compared_and_takes_settings_in_any_place(audited, capsys):
    call(audited, "--predictions", f"{audited}/b")
    assert "not compared: 1 images without predictions: 0.jpg" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stopped:
        call(audited, "--predictions", f"{audited}/b", "label.audit.suport=0.2")
    assert stopped.value.code == 2
    assert "did you mean label.audit.support?" in capsys.readouterr().err
    call(audited, "--predictions", f"{audited}/b", "label.audit.support=0.2")
    with pytest.raises(SystemExit):
        call(audited)
    assert "--predictions: names no folder" in capsys.readouterr().err


def test_corrections_of_the_audit_come_back(audited):
    call(audited, "--predictions", f"{audited}/a", f"{audited}/b")
    source = str(audited / "out/audit.json")
    export_labels("cvat", source, str(audited / "annotations.xml"))
    xml = (audited / "annotations.xml").read_text()
    assert re.search(r'<attribute name="problem">missing 0\.\d\d</attribute>', xml)
    assert re.findall(r'<image id="\d+" name="([^"]+)"', xml) == ["1.jpg"]
    export_labels("label-studio", source, str(audited / "tasks.json"))
    tasks = json.loads((audited / "tasks.json").read_text())
    assert re.fullmatch(r"unsupported 0\.\d\d, missing 0\.\d\d", tasks[0]["data"]["problems"])

    # The reviewer deletes the wrong word and keeps the missing one.
    export_labels("labelme", source, str(audited / "labelme"))
    file = audited / "labelme/1.json"
    content = json.loads(file.read_text())
    assert [shape["flags"] for shape in content["shapes"]] == [{}, {"unsupported": True}, {"missing": True}]
    del content["shapes"][1]
    file.write_text(json.dumps(content))
    import_corrections("labelme", str(audited / "labelme"), str(audited / "set.json"), str(audited / "corrected.json"))
    corrected = read_coco(str(audited / "corrected.json"), str(audited)).records
    assert [[tuple(i.polygon[0]) for i in r.instances] for r in corrected] == [[(20, 20)], [(20, 20), (20, 120)]]
    assert all(i.problem is None and i.score is None for r in corrected for i in r.instances)


def test_problems_survive_in_coco(tmp_path):
    entry = ImageRecord(0, "0.jpg", 50, 50, (Instance(box(0, 0, 20, 10), problem=("loose", 0.25)),))
    write_coco(str(tmp_path / "a.json"), [entry])
    assert read_coco(str(tmp_path / "a.json"), "", check_files=False).records[0].instances[0].problem == ("loose", 0.25)


# ------------------------------------------------------------------------------------------ labels damaged on purpose


@dataclass(frozen=True)
class Damage:
    image: int
    kind: str
    polygon: np.ndarray
    """The label after the damage; for a dropped one what it was."""


def place(rng, taken, size=(HEIGHT, WIDTH)):
    """A slightly turned word of any size that keeps away from those that are there; None when there is no room."""
    for _ in range(50):
        height = math.exp(rng.uniform(math.log(8), math.log(48)))
        width = height * rng.uniform(1.5, 6)
        if width > size[1] - 20 or height > size[0] - 20:
            continue
        x, y = rng.uniform(10, size[1] - width - 10), rng.uniform(10, size[0] - height - 10)
        ring = box(x, y, width, height)
        near = [other for other in taken if np.all(other.max(0) + 6 > ring.min(0)) and np.all(ring.max(0) + 6 > other.min(0))]
        if not near:
            return ring
    return None


def make_truth(rng, images):
    truth = []
    for number in range(images):
        words = []
        for _ in range(rng.integers(3, 12)):
            word = place(rng, words)
            if word is not None:
                words.append(word)
        truth.append(record(number, *words))
    return truth


def damage_labels(truth, share, rng):
    """The labels with `share` of the words dropped, shifted, enlarged or added, a quarter each, and what was done."""
    everyone = [(number, k) for number, entry in enumerate(truth) for k in range(len(entry.instances))]
    chosen = rng.choice(len(everyone), round(share * len(everyone)), replace=False)
    labels = [[i.polygon for i in entry.instances] for entry in truth]
    done = []
    for turn, pick in enumerate(chosen):
        number, k = everyone[pick]
        polygon = truth[number].instances[k].polygon
        kind = ("dropped", "shifted", "enlarged", "added")[turn % 4]
        short = np.ptp(polygon, axis=0).min()
        if kind == "dropped":
            labels[number][k] = None
        elif kind == "shifted":
            # Along the short side, by a third to half of the word.
            polygon = labels[number][k] = polygon + np.array(
                [0, rng.choice([-1, 1]) * rng.uniform(0.35, 0.5) * short], np.float32
            )
        elif kind == "enlarged":
            centre = polygon.mean(axis=0)
            polygon = labels[number][k] = ((polygon - centre) * rng.uniform(1.3, 1.6) + centre).astype(np.float32)
        else:
            there = [other for other in labels[number] if other is not None]
            entry = truth[number]
            polygon = place(rng, [*there, *(i.polygon for i in entry.instances)], (entry.height, entry.width))
            assert polygon is not None
            labels[number].append(polygon)
        done.append(Damage(truth[number].id, kind, polygon))
    damaged = [replace(e, instances=tuple(Instance(p) for p in own if p is not None)) for e, own in zip(truth, labels)]
    return damaged, done


def simulate_members(truth, rng, members):
    """Noisy copies of the true words.

    Words differ in how hard they are, for all members alike: hard ones are missed or found with a low score. Some things look
    like words to all members, others to one only.
    """
    found = {}
    for entry in truth:
        words = [i.polygon for i in entry.instances]
        fakes = [fake for fake in (place(rng, words) for _ in range(rng.poisson(0.15))) if fake is not None]
        ease = [rng.beta(5, 1) for _ in words] + [rng.beta(2, 3) for _ in fakes]
        found[entry.id] = {}
        for member in members:
            pairs = []
            for polygon, easy in zip([*words, *fakes], ease):
                height = np.ptp(polygon, axis=0).min()
                if rng.random() < easy * height / (height + 1):
                    noise = rng.normal(0, 0.05 * height, (4, 2)) + rng.normal(0, 0.04 * height, 2)
                    score = np.clip(rng.normal(0.2 + 0.7 * easy, 0.1), 0.06, 0.99)
                    pairs.append(((polygon + noise).astype(np.float32), float(score)))
            for _ in range(rng.poisson(0.5)):
                alarm = place(rng, words)
                if alarm is not None:
                    pairs.append((alarm, float(rng.beta(2, 4) * 0.9 + 0.06)))
            found[entry.id][member] = pairs
    return found


def hits(problem, image, damages):
    """Indices of the damages that a reviewer would see at this problem."""
    own = [k for k, damage in enumerate(damages) if damage.image == image]
    pairs = overlaps([problem.polygon], [damages[k].polygon for k in own])
    return {own[k] for k, iou in zip(pairs.second.tolist(), pairs.iou.tolist()) if iou >= 0.3}


def at_damaged_count(audit, damages):
    """Precision and recall of the strongest problems, as many as labels were damaged, and recall by kind."""
    listed = sorted(
        ((item.record.id, problem) for item in audit.ranking for problem in item.problems), key=lambda row: -row[1].score
    )
    seen = [hits(problem, image, damages) for image, problem in listed[: len(damages)]]
    found = set().union(*seen)
    by_kind = {
        kind: np.mean([k in found for k, damage in enumerate(damages) if damage.kind == kind])
        for kind in ("dropped", "shifted", "enlarged", "added")
    }
    return np.mean([bool(own) for own in seen]), len(found) / len(damages), by_kind


def measure(folder, seed, members, images=200):
    rng = np.random.default_rng(seed)
    truth = make_truth(rng, images)
    given, damages = damage_labels(truth, 0.05, rng)
    found = simulate_members(truth, rng, members)
    folds = [stored(folder / f"{seed}-{k}", {i: f for i, f in found.items() if i % 2 == k}) for k in range(2)]
    audit = audit_labels(folds, given, LabelSettings())
    return audit, damages


@pytest.mark.parametrize(("members", "floor"), [("abc", 0.6), ("ab", 0.45)])
def test_damaged_labels_lead_the_ranking(tmp_path, members, floor):
    """Two folds, 200 images; floors under the lowest of ten seeds. Taking problems by chance finds one in twenty."""
    audit, damages = measure(tmp_path, 10, members)
    assert len(damages) > 60
    precision, recall, by_kind = at_damaged_count(audit, damages)
    print(f"{len(damages)} damaged labels: precision {precision:.3f}, recall {recall:.3f}, by kind {by_kind}")
    assert precision >= floor
    assert recall >= floor
    assert min(by_kind.values()) > 0


@pytest.mark.slow
@pytest.mark.timeout(5400)
def test_damaged_labels_of_photographs(tmp_path):
    """The numbers of docs/review.md: four members, trained from the packaged detector, each on one half of the damaged labels."""
    root = SHARED / "realtext"
    if not root.is_dir():
        pytest.skip(f"no photographs in {root}; set I3CL_SHARED")
    truth = list(read_coco(str(root / "train.json"), str(root / "train")).records)
    given, damages = damage_labels(truth, 0.05, np.random.default_rng(0))
    write_coco(str(tmp_path / "given.json"), given)
    halves = [given[k::2] for k in range(2)]
    runs = []
    for k, half in enumerate(halves):
        write_coco(str(tmp_path / f"{k}.json"), half)
        for seed in range(2):
            source = {"annotations": str(tmp_path / f"{k}.json"), "images": str(root / "train")}
            changes = {"data.train": [source], "data.validation": None, "train.steps": 250, "train.checkpoint_every": 250}
            changes |= {"name": f"{k}-{seed}", "storage": str(tmp_path), "train.seed": seed}
            runs.append(with_overrides(load_settings("finetune"), changes, "test"))
    checkpoints = [run.checkpoint for run in train_all(runs)]
    predictions = []
    for k in range(2):
        members = dict(zip("ab", checkpoints[2 - 2 * k : 4 - 2 * k], strict=True))
        unseen = read_coco(str(tmp_path / f"{k}.json"), str(root / "train"))
        predictions.append(predict(unseen, members, runs[0], str(tmp_path / f"fold-{k}"), f"fold {k}"))
    precision, recall, by_kind = at_damaged_count(audit_labels(predictions, given, LabelSettings()), damages)
    kinds = ", ".join(f"{kind} {share:.3f}" for kind, share in by_kind.items())
    print(f"{len(damages)} damaged labels: precision {precision:.3f}, recall {recall:.3f}; {kinds}")
    assert precision > 0.2, "four times what chance finds"

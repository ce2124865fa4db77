"""The job as people call it: files in, numbers, report and exit status out."""

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import cv2
import numpy as np
import pytest

from i3cl import storage
from i3cl.data.formats import predictions
from i3cl.data.formats.records import (
    ImageRecord,
    Instance,
    from_table,
    record_table,
)
from i3cl.errors import UserError
from i3cl.evaluation import outcome, scoring
from i3cl.evaluation.metrics.metric import COLUMNS, DetectionMetric, summarise
from i3cl.evaluation.metrics.protocols import PROTOCOLS
from i3cl.evaluation.shards import count_shard, plan

ROOT = Path(__file__).parents[2]


def job(*arguments):
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, str(ROOT / "jobs" / "evaluate.py"), *map(str, arguments)],
        capture_output=True,
        text=True,
        env=environment,
        timeout=300,
    )


def box(x, y):
    return [[x, y], [x + 100, y], [x + 100, y + 20], [x, y + 20]]


def line(polygon, *more):
    return ",".join(str(v) for v in [*np.ravel(polygon).tolist(), *more])


@pytest.fixture
def zips(tmp_path):
    """Two images: the worked example of two words and a don't-care region, and one that the results leave out."""
    with zipfile.ZipFile(tmp_path / "gt.zip", "w") as archive:
        archive.writestr("gt_img_1.txt", "\n".join([line(box(0, 0), "SHOP"), line(box(0, 40), "OPEN"), line(box(0, 80), "###")]))
        archive.writestr("gt_img_2.txt", line(box(0, 0), "BAR"))
    with zipfile.ZipFile(tmp_path / "det.zip", "w") as archive:
        found = [(box(5, 0), 0.9), (box(300, 0), 0.4), (box(0, 81), 0.8)]
        archive.writestr("res_img_1.txt", "\n".join(line(p, s) for p, s in found))
    return str(tmp_path / "gt.zip"), str(tmp_path / "det.zip")


def test_numbers_rules_and_report(zips, tmp_path):
    done = job(
        *("--protocol", "icdar", "--truth", zips[0], "--results", zips[1], "--against", zips[1], "--details", "--sweep"),
        *("--json", tmp_path / "out.json", "--report", tmp_path / "out.html"),
    )
    assert done.returncode == 0, done.stderr
    out = json.loads((tmp_path / "out.json").read_text())
    assert (out["recall"], out["precision"], out["hmean"]) == pytest.approx((1 / 3, 1 / 2, 0.4))
    counts = {key: out[key] for key in ("true_positives", "truths", "dont_cares", "detections", "dropped", "images")}
    assert counts == {"true_positives": 1, "truths": 3, "dont_cares": 1, "detections": 2, "dropped": 1, "images": 2}
    assert "IoU > 0.5" in out["rules"]
    assert out["missing_images"] == 1
    assert out["against"]["p_value"] == 1
    assert out["errors"]["truths"]["missed"] == 2
    assert "1 of 2 images have no result" in done.stderr
    for words in ("0.4000", "rules: polygon IoU > 0.5", "3 truths, 1 don't-care", "2 detections kept, 1 dropped"):
        assert words in done.stdout
    page = (tmp_path / "out.html").read_text()
    assert "A against B" in page
    assert "http" not in page.replace("http://www.w3.org", "")


@pytest.mark.parametrize("protocol", ["coco", "rctw"])
def test_average_precision(zips, tmp_path, protocol):
    done = job("--protocol", protocol, "--truth", zips[0], "--results", zips[1], "--json", tmp_path / "o.json")
    assert done.returncode == 0, done.stderr
    out = json.loads((tmp_path / "o.json").read_text())
    value = out["AP"] if protocol == "rctw" else out["bbox"]["AP50"]
    assert value == pytest.approx(1 / 3 if protocol == "rctw" else 34 / 101)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--protocol", "icdr"], ["icdr", "no such protocol"]),
        (["--protocol", "icdar", "--tr", "0.5"], ["--tr"]),
        (["--threshold", "7"], ["--threshold 7"]),
        (["--results", "nowhere.zip"], ["nowhere.zip", "no such file"]),
        (["--choose-threshold-on", "1.5"], ["--choose-threshold-on 1.5"]),
        (["--truth-format", "klingon"], ["klingon"]),
        (["--ray"], ["Parquet"]),
    ],
)
def test_mistakes_end_with_one_line_and_status_2(zips, arguments, words):
    done = job("--truth", zips[0], "--results", zips[1], *arguments)
    assert done.returncode == 2, done.stderr
    assert all(word in done.stderr.splitlines()[-1] for word in words), done.stderr
    assert "Traceback" not in done.stderr


def test_truth_without_results(zips):
    done = job("--truth", zips[0])
    assert done.returncode == 2
    assert "--results" in done.stderr


def test_pictures_in_the_report(tmp_path):
    from i3cl.report.evaluation import render_evaluation_report

    cv2.imwrite(str(tmp_path / "a.jpg"), np.full((50, 120, 3), 90, np.uint8))
    truth = {"images": [{"id": 1, "file_name": "a.jpg", "height": 50, "width": 120}], "categories": [{"id": 1, "name": "text"}]}
    truth["annotations"] = [{"id": 1, "image_id": 1, "category_id": 1, "segmentation": [np.ravel(box(0, 0)).tolist()]}]
    (tmp_path / "t.json").write_text(json.dumps(truth))
    (tmp_path / "r.json").write_text(json.dumps([{"image_id": 1, "bbox": [0, 25, 50, 20], "score": 0.5}]))
    paired, warnings = scoring.load(str(tmp_path / "t.json"), str(tmp_path / "r.json"))
    assert not warnings
    scored = scoring.score(paired.images, PROTOCOLS["icdar"])
    values = outcome.as_json(scored) | outcome.details(scored) | {"truth": "<t>", "results": "r", "advice": []}
    page = render_evaluation_report(scored, values, images=str(tmp_path))
    assert "data:image/jpeg;base64," in page
    assert "&lt;t&gt;" in page
    assert 'class="missed"' in page


def test_the_formats_are_said(zips):
    done = job("--truth", zips[0], "--results", zips[1])
    assert "truth:   text files, 4 points a line, then the text\n" in done.stdout
    assert "results: text files, 4 points a line, then a confidence\n" in done.stdout


# ----------------------------------------------------------------------------------------------------------- many images


def write_corpus(folder, images=60):
    """Truth in row groups of 16 and predictions in two parts; the last image has no row."""
    rng = np.random.default_rng(0)
    records, rows = [], []
    for k in range(images):
        words = [np.array(box(x, y), np.float32) for x, y in rng.uniform(0, 900, (4, 2))]
        flags = rng.random(4) < 0.2
        instances = tuple(Instance(w, bool(f)) for w, f in zip(words, flags))
        records.append(ImageRecord(k + 1, f"{k}.jpg", 1000, 1100, instances))
        found = [w + rng.normal(0, 6, 2).astype(np.float32) for w in words]
        head = {"image_id": k + 1, "file_name": f"{k}.jpg", "height": 1000, "width": 1100, "member": "m"}
        rows.append(head | {"polygons": found, "scores": [0.9] * 4})
    (folder / "truth").mkdir()
    (folder / "found").mkdir()
    predictions.pq.write_table(record_table(records, "images"), folder / "truth" / "0.parquet", row_group_size=16)
    for part, chosen in enumerate((rows[:30], rows[30:-1])):
        predictions.pq.write_table(predictions.prediction_table(chosen), folder / "found" / f"{part}.parquet", row_group_size=8)
    return str(folder / "truth"), str(folder / "found")


def test_shards_add_up_to_the_whole(tmp_path):
    truth, found = write_corpus(tmp_path)
    shards, member = plan(truth, found, None)
    assert (len(shards), member) == (4, "m")
    # Images 1-32 are in the first two shards, 1-30 in the first part of the results.
    assert [len(shard.results) for shard in shards] == [1, 2, 1, 1]
    rules = PROTOCOLS["icdar"]
    totals, missing, images = np.zeros((len(rules), len(COLUMNS))), 0, 0
    for shard in shards:
        counts, absent = count_shard(shard, member, rules, None)
        missing, images = missing + absent, images + len(counts[0].names)
        totals += [each.table.sum(axis=0) for each in counts]
    paired, _ = scoring.load(truth, found)
    for total, r in zip(totals, rules):
        whole = DetectionMetric(r)
        whole.update(paired.images)
        assert summarise(total, images, r, None) == whole.summary()
    assert missing == len(paired.missing) == 1
    assert len(from_table(predictions.pq.read_table(tmp_path / "truth" / "0.parquet"))) == 60


def test_shards_read_only_the_parts_that_hold_their_images(tmp_path, monkeypatch):
    """The ids of every part are read once; a task opens its own parts, not all of them."""
    truth, found = write_corpus(tmp_path)
    for name in ("job.json", "done.json"):
        (tmp_path / "found" / name).write_text("{}")
    shards, member = plan(truth, found, "m")
    opened = []
    real = storage.open_arrow
    monkeypatch.setattr(storage, "open_arrow", lambda url: (opened.append(url), real(url))[1])
    count_shard(shards[0], member, PROTOCOLS["icdar"], None)
    assert sorted(path.rsplit("/", 2)[-2] for path in opened) == ["found", "truth"]
    with pytest.raises(UserError, match="choose one with --member"):
        plan(truth, found, "other")


def test_an_unfinished_labelling_is_refused_and_warned_of_when_it_is_accepted(tmp_path, monkeypatch):
    truth, found = write_corpus(tmp_path)
    job = {"images": {"count": 60}, "label.rows_per_block": 20, "groups": [["m"]]}
    (tmp_path / "found" / "job.json").write_text(json.dumps(job))
    for read in (lambda: scoring.load(truth, found), lambda: plan(truth, found, None)):
        with pytest.raises(UserError, match=rf"^{found}: is not finished, 1 of 3 parts are missing; finish it with: "):
            read()
    monkeypatch.setenv("I3CL_ACCEPT_UNFINISHED", f"elsewhere,{found}/")
    assert any("not finished, 1 of 3" in warning for warning in scoring.load(truth, found)[1])
    assert plan(truth, found, None)[1] == "m"


@pytest.fixture
def written(tiny_set, tiny_settings, tiny_checkpoints, tmp_path, labelling_here, monkeypatch):
    """What the commands write about the tiny set: truth as Parquet in two row groups, and every kind of result."""
    from i3cl.cli import predict as predict_command
    from i3cl.data.formats.coco import read_coco
    from i3cl.labelling.label import select_labels
    from i3cl.labelling.predict import predict

    truth = read_coco(str(tiny_set / "set.json"), str(tiny_set / "images"))
    (tmp_path / "truth").mkdir()
    # In another order than the files have, as the ids of `predict` follow that one.
    records = sorted(truth.records, key=lambda record: -record.id)
    predictions.pq.write_table(record_table(records, "images"), tmp_path / "truth" / "0.parquet", row_group_size=7)
    found = predict(truth, tiny_checkpoints, tiny_settings, str(tmp_path / "predictions"), "test")
    select = {"low": 0.0, "ignore": 0.0, "high": 0.9, "min_side": 0}
    label = tiny_settings.label.model_validate({"select": select, "fusion": {"min_score": 0.0}})
    shards = label.model_copy(update={"select": label.select.model_copy(update={"format": "parquet"})})
    results = {"predictions": found, "json": select_labels(found, label, str(tmp_path), "").path}
    results["shards"] = select_labels(found, shards, str(tmp_path), "").path
    out = str(tmp_path / "predict")
    arguments = ["--checkpoint", tiny_checkpoints["a"], "--images", str(tiny_set / "images"), "--out", out, "--score", "0"]
    monkeypatch.setattr(sys, "argv", ["i3cl predict", *arguments, "cluster.gpu=false"])
    predict_command.main()
    return str(tmp_path / "truth"), results | {"predict": out}


def test_shards_of_all_that_the_commands_write_add_up_to_the_whole(written):
    from i3cl.evaluation.formats.read import read_results
    from i3cl.evaluation.shards import plan_given

    truth, results = written
    counted = {}
    for kind, path in results.items():
        member = "b" if kind == "predictions" else None
        if kind in ("predictions", "shards"):
            shards, chosen = plan(truth, path, member)
        else:
            (shards, _), chosen = plan_given(truth, read_results(path)), None
        assert len(shards) == 2
        rules = PROTOCOLS["icdar"]
        parts = [count_shard(shard, chosen, rules, None) for shard in shards]
        total = sum(counts[0].table.sum(axis=0) for counts, _ in parts)
        paired, _ = scoring.load(truth, path, member=member)
        whole = DetectionMetric(rules[0])
        whole.update(paired.images)
        counted[kind] = summarise(total, 12, rules[0], None)
        assert counted[kind] == whole.summary(), kind
        assert sum(missing for _, missing in parts) == len(paired.missing)
    assert counted["json"] == counted["shards"]
    assert all(summary.truths > 10 and summary.detections > 0 for summary in counted.values())


def test_over_ray_all_that_the_commands_write_gives_the_numbers_of_files(written, ray_cluster):
    from i3cl.evaluation.command import Options, check_over_ray, evaluate_files, evaluate_over_ray

    truth, results = written
    for kind, path in results.items():
        options = Options(truth, path, member="b" if kind == "predictions" else None)
        check_over_ray(options)
        one, ray = evaluate_files(options).values, evaluate_over_ray(options).values
        for key in ("recall", "precision", "hmean", "truths", "dont_cares", "detections", "missing_images", "rules"):
            assert one[key] == ray[key], (kind, key)


@pytest.mark.parametrize(
    "option",
    [["--details"], ["--sweep"], ["--report", "r.html"], ["--choose-threshold-on", "0.2"], ["--pre-steps", "adelaidet"]],
)
def test_what_ray_cannot_do_is_said(option, tmp_path):
    done = job("--truth", tmp_path, "--results", tmp_path, "--ray", *option)
    assert done.returncode == 2 and option[0] in done.stderr and len(done.stderr.strip().splitlines()) == 1


@pytest.mark.slow
def test_over_ray(tmp_path):
    truth, found = write_corpus(tmp_path)
    # What a labelling job leaves beside its parts, and what macOS adds.
    for name in ("job.json", "done.json", "errors.csv", "cost.json", "._0.parquet"):
        (tmp_path / "found" / name).write_text("{}")
    files = job("--truth", truth, "--results", found, "--json", tmp_path / "one.json")
    spread = job("--truth", truth, "--results", found, "--json", tmp_path / "ray.json", "--ray")
    assert (files.returncode, spread.returncode) == (0, 0), spread.stderr
    one, ray = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("one", "ray"))
    assert one["truths"] > 150
    for key in ("recall", "precision", "hmean", "truths", "dont_cares", "detections", "missing_images", "rules"):
        assert one[key] == ray[key], key
    assert one["variants"][0]["hmean"] == ray["variants"][0]["hmean"]

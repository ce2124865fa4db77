"""Unfinished Parquet sets are refused by every reader, with what is missing and the command that finishes them."""

import json
import shutil
import sys

import pytest

from i3cl.config import LabelSettings, with_overrides
from i3cl.data.formats.coco import read_coco
from i3cl.data.formats.parts import ACCEPT
from i3cl.data.formats.predictions import member_predictions, read_batches, read_predictions
from i3cl.data.formats.table import write_parquet
from i3cl.errors import UserError
from i3cl.labelling.fused import fused_images
from i3cl.labelling.label import select_labels
from i3cl.labelling.predict import predict

SELECT = {"low": 0.0, "ignore": 0.0, "high": 0.9, "min_side": 0, "drop_empty": False}
LABEL = LabelSettings.model_validate({"select": SELECT, "fusion": {"min_score": 0.0}})


@pytest.fixture
def job(tiny_set, tiny_settings, tiny_checkpoints, tmp_path, labelling_here, monkeypatch):
    """A labelling of twelve images in three parts, and the call that continues it."""
    monkeypatch.setattr(sys, "argv", ["i3cl label", "predict", "--config", "my recipe.yaml"])
    images = read_coco(str(tiny_set / "unlabelled.json"), str(tiny_set / "images"))
    out = str(tmp_path / "predictions")

    def work():
        return predict(images, {"a": tiny_checkpoints["a"]}, tiny_settings, out, "test")

    return tmp_path / "predictions", work


def test_select_refuses_unfinished_predictions_until_they_are_finished_or_accepted(job, tmp_path, monkeypatch):
    folder, work = job
    work()
    whole = (folder / "part-00-000001.parquet").read_bytes()
    # As a job that was killed leaves its folder.
    (folder / "part-00-000001.parquet").unlink()
    (folder / "done.json").unlink()
    (folder / "_work").mkdir()
    (folder / "_work" / "command.json").write_text(json.dumps("i3cl label predict --config 'my recipe.yaml'"))
    words = (
        rf"^{folder}: is not finished, 1 of 3 parts are missing; finish it with: i3cl label predict --config 'my recipe\.yaml', "
        rf"or read it as it is with {ACCEPT}={folder}$"
    )
    readers = [
        lambda: select_labels(str(folder), LABEL, str(tmp_path), ""),
        lambda: next(read_batches(str(folder))),
        lambda: next(read_predictions(str(folder))),
        lambda: member_predictions(str(folder), "a"),
        lambda: next(fused_images(str(folder), LABEL)),
    ]
    for read in readers:
        with pytest.raises(UserError, match=words):
            read()
    assert not (tmp_path / "pseudo.json").exists()

    monkeypatch.setenv(ACCEPT, str(folder))
    assert select_labels(str(folder), LABEL, str(tmp_path), "").counts["images"] == 8
    assert json.loads((tmp_path / "pseudo.made_from.json").read_text())["predictions"]["missing_parts"] == 1
    monkeypatch.delenv(ACCEPT)

    work()
    assert (folder / "part-00-000001.parquet").read_bytes() == whole and not (folder / "_work").exists()
    assert select_labels(str(folder), LABEL, str(tmp_path), "").counts["images"] == 12


def test_a_part_that_goes_after_the_end_is_noticed(job, tmp_path):
    folder, work = job
    work()
    (folder / "part-00-000001.parquet").unlink()
    for read in (work, lambda: select_labels(str(folder), LABEL, str(tmp_path), "")):
        with pytest.raises(
            UserError, match=r"1 of 3 parts are missing; some were removed after its end: put them back, or remove"
        ):
            read()


def test_a_running_job_says_what_finishes_it(job, monkeypatch):
    folder, work = job
    from i3cl.labelling import predict as module

    def killed(job, missing):
        raise KeyboardInterrupt

    monkeypatch.setattr(module._Job, "_label", killed)
    with pytest.raises(KeyboardInterrupt):
        work()
    with pytest.raises(UserError, match=r"3 of 3 parts are missing; finish it with: i3cl label predict --config 'my recipe"):
        next(read_batches(str(folder)))


def test_unfinished_pseudo_labels_are_refused_by_training_and_evaluation(job, tiny_settings, tiny_set, tmp_path):
    from i3cl.data.loading.ingest import mix
    from i3cl.evaluation.formats.read import read_results, read_truth

    shards = LABEL.model_copy(update={"select": LABEL.select.model_copy(update={"format": "parquet"})})
    labels = select_labels(job[1](), shards, str(tmp_path), "").path
    assert len(read_coco(labels, "", check_files=False)) == 12
    shutil.rmtree(tmp_path / "pseudo" / "_work", ignore_errors=True)
    (tmp_path / "pseudo" / "_done.json").unlink()
    source = {"annotations": labels, "images": str(tiny_set / "images")}
    student = with_overrides(tiny_settings, {"data.train": [source]}, "test").data
    readers = [
        lambda: read_coco(labels, "", check_files=False),
        lambda: mix(student.train, "", batch=2),
        lambda: read_truth(labels),
        lambda: read_results(labels),
    ]
    for read in readers:
        with pytest.raises(
            UserError, match=rf"^{labels}: is not finished, all 1 parts are there, but the command .* has not ended"
        ):
            read()
    (tmp_path / "pseudo" / "part-00000.parquet").unlink()
    with pytest.raises(UserError, match="1 of 1 parts are missing"):
        read_coco(labels, "")
    # The same call finishes it.
    assert select_labels(str(job[0]), shards, str(tmp_path), "").counts["images"] == 12
    assert len(read_coco(labels, "", check_files=False)) == 12 and not (tmp_path / "pseudo" / "_work").exists()


def test_a_part_of_synthetic_scene_text_that_is_missing_is_noticed(tiny_set, tmp_path):
    records = list(read_coco(str(tiny_set / "set.json"), str(tiny_set / "images")).records)
    note = {"images": 12, "seed": 0, "scene_text": {"images_per_part": 6}}
    write_parquet(str(tmp_path / "set.parquet" / "part-00000.parquet"), records[:6], "")
    (tmp_path / "scene_text.json").write_text(json.dumps(note))
    with pytest.raises(UserError, match=r"set\.parquet: is not finished, 1 of 2 parts are missing"):
        read_coco(str(tmp_path / "set.parquet"), "", check_files=False)
    write_parquet(str(tmp_path / "set.parquet" / "part-00001.parquet"), records[6:], "")
    assert len(read_coco(str(tmp_path / "set.parquet"), "", check_files=False)) == 12

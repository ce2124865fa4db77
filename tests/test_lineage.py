"""The chain weights -> predictions -> labels -> student -> report, and what a change anywhere in it makes stale."""

import json
import shutil
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from i3cl import circle
from i3cl.claims import claim_run, content_hash
from i3cl.config import to_yaml, with_overrides
from i3cl.errors import UserError
from i3cl.lineage import lineage
from i3cl.model.checkpoint import save_checkpoint
from i3cl.model.network import I3CL
from i3cl.training.launch import IDENTITY, TrainResult, _weights, keep_best, located
from tests.conftest import label_here

RESULTS = {"student/best", "predictions/validation", "summary.json"}
"""Everything that is made with the student."""


def train_all(runs):
    """As the real one, but the networks keep their random weights. Teacher a has the better F."""
    from ray.train import Checkpoint

    results = []
    for settings in map(located, runs):
        run = Path(settings.storage) / settings.name
        if not (run / "best").exists():
            claim_run(str(run), settings, IDENTITY, _weights(settings))
            torch.manual_seed(settings.train.seed)
            save_checkpoint(I3CL(settings.model), run / "made", to_yaml(settings))
            keep_best(str(run), Checkpoint.from_directory(run / "made"), {"step": 1, "hmean": float(settings.name == "a")})
            shutil.rmtree(run / "made")
            (run / "metrics.jsonl").write_text(json.dumps({"step": 1, "steps": 1, "loss": 1.0, "loss_cls": 1.0}) + "\n")
        results.append(TrainResult(str(run), str(run / "best"), json.loads((run / "best" / "metrics.json").read_text())))
    return results


@pytest.fixture(scope="module")
def made(tiny_set, tiny_settings, tmp_path_factory):
    """A self-training circle with a control, all but the training real: its run directory, and the folder of its data."""
    folder = tmp_path_factory.mktemp("lineage")
    data = folder / "data"
    shutil.copytree(tiny_set, data)
    source = {"annotations": str(data / "set.json"), "images": str(data / "images")}
    shutil.copy(data / "set.json", data / "val.json")
    changes = {
        "name": "circle",
        "storage": str(folder / "runs"),
        "data.train": [source],
        "data.validation": {**source, "annotations": str(data / "val.json")},
        "label.source": {**source, "annotations": str(data / "unlabelled.json")},
        "label.select.low": 0.0,
        "label.select.ignore": 0.0,
        "label.fusion.min_score": 0.0,
        "model.backbone.weights": "none",
        "model.score_threshold": 0.0,
        "model.detections_per_image": 4,
        "selftrain.teachers": [{"name": "a"}, {"name": "b"}],
        "selftrain.control": True,
    }
    settings = with_overrides(tiny_settings, changes, "test")
    with pytest.MonkeyPatch.context() as patch:
        label_here(patch)
        patch.setattr(circle, "train_all", train_all)
        circle.selftrain(settings)
    return folder / "runs" / "circle", data


@contextmanager
def changed(path, content=None):
    """The file with other content inside the block (None: gone), and as it was after it."""
    before = path.read_bytes()
    if content is None:
        path.unlink()
    else:
        path.write_bytes(content)
    yield
    path.write_bytes(before)


def stale(run):
    """The artefacts of a run that are stale, by their paths in it."""
    found = lineage(str(run))
    artefacts = [artefact for _, artefact in found.artefacts]
    artefacts += [each.artefact for artefact in list(artefacts) for each in artefact.every()]
    return {str(Path(artefact.place).relative_to(run)) for artefact in artefacts if artefact.stale}


def states(run):
    """The places of inputs that are not fresh, with their states."""
    found = lineage(str(run))
    every = [each for _, artefact in found.artefacts for each in artefact.every()]
    return {(Path(each.artefact.place).name, each.state) for each in every if each.state != "fresh"}


def test_a_finished_circle_is_fresh_and_its_tree_reaches_the_sources(made):
    run, data = made
    found = lineage(str(run))
    assert found.fresh and states(run) == set()
    lines = found.lines()
    assert lines[0] == f"report  {run}/summary.json"
    student = lines.index(next(line for line in lines if line.startswith(f"  checkpoint student  {run}/student/best")))
    weights = content_hash(str(run / "student" / "best"))[:12]
    assert lines[student].endswith(weights)
    below = "\n".join(lines[student:])
    # From the student over its labels and their predictions to the teachers, and to the files of labels and images.
    for depth, words in (
        (2, f"data.train.1.annotations  {run}/pseudo.json  {content_hash(str(run / 'pseudo.json'))[:12]}"),
        (3, f"predictions  {run}/predictions/unlabelled  {content_hash(str(run / 'predictions' / 'unlabelled'))[:12]}"),
        (4, f"member b  {run}/b/best  {content_hash(str(run / 'b' / 'best'))[:12]}"),
        (4, f"images  {data}/unlabelled.json"),
        (2, f"train.start_from  {run}/a/best"),
    ):
        assert "\n" + "  " * depth + words in below, words
    page = (run / "report.html").read_text()
    assert "SHA-256 of pseudo labels" in page and content_hash(str(run / "pseudo.json"))[:12] in page


def test_a_label_file_makes_stale_what_was_trained_on_it(made):
    run, _ = made
    content = json.loads((run / "pseudo.json").read_text())
    content["annotations"] = content["annotations"][1:]
    with changed(run / "pseudo.json", json.dumps(content).encode()):
        assert stale(run) == {"pseudo.json", *RESULTS}
        assert states(run) == {("pseudo.json", "stale")}
    assert lineage(str(run)).fresh


def test_the_labels_of_all_make_everything_stale(made):
    run, data = made
    with changed(data / "set.json", (data / "set.json").read_bytes() + b"\n"):
        models = {f"{name}/best" for name in ("a", "b", "student-control")}
        assert stale(run) == {"predictions/unlabelled", "predictions/control", "pseudo.json", *models, *RESULTS}
        assert states(run) == {("set.json", "stale")}


def test_validation_labels_make_stale_the_models_that_were_chosen_by_them_but_no_list_of_images(made):
    run, data = made
    content = json.loads((data / "val.json").read_text())
    content["annotations"] = content["annotations"][1:]
    with changed(data / "val.json", json.dumps(content).encode()):
        found = [each for _, artefact in lineage(str(run)).artefacts for each in artefact.every()]
        by_role = {each.role: each.state for each in found if each.artefact.place.endswith("val.json")}
        assert by_role == {"data.validation.annotations": "stale", "validation images": "stale", "images": "fresh"}


def test_a_members_weights_make_stale_its_predictions_and_all_that_follows(made):
    run, _ = made
    other = (run / "a" / "best" / "weights.safetensors").read_bytes()
    with changed(run / "b" / "best" / "weights.safetensors", other):
        # The student starts from a, and so does the control, which has nothing to do with b.
        assert stale(run) == {"predictions/unlabelled", "pseudo.json", *RESULTS}
        assert states(run) == {("best", "stale")}


def test_predictions_make_stale_the_labels_and_the_student(made):
    run, _ = made
    parts = sorted((run / "predictions" / "unlabelled").glob("part-*.parquet"))
    with changed(parts[0], parts[1].read_bytes()):
        assert stale(run) == {"pseudo.json", *RESULTS}
        assert states(run) == {("unlabelled", "stale")}


def test_another_list_of_images_makes_its_predictions_stale(made):
    run, data = made
    content = json.loads((data / "unlabelled.json").read_text())
    del content["images"][0]
    with changed(data / "unlabelled.json", json.dumps(content).encode()):
        assert stale(run) == {"predictions/unlabelled", "pseudo.json", *RESULTS}


def test_what_is_gone_is_missing(made):
    run, data = made
    with changed(data / "unlabelled.json"):
        found = lineage(str(run))
        assert not found.fresh and stale(run) == set()
        assert states(run) == {("unlabelled.json", "missing")}
        assert any("unlabelled.json" in line and line.endswith("missing") for line in found.lines())


def test_runs_of_earlier_versions_are_read_and_say_what_is_not_recorded(made, tmp_path):
    run, _ = made
    with changed(run / "summary.json", b"{}"), changed(run / "pseudo.made_from.json"), changed(run / "b/best/made_from.json"):
        done = run / "predictions" / "unlabelled" / "done.json"
        student = run / "student" / "best" / "made_from.json"
        annotations = run / "student" / "annotations.json"
        labels = {key: value for key, value in json.loads(annotations.read_text()).items() if key != "train.start_from"}
        with changed(done, b'{"images": 12, "failed": 0}'), changed(student), changed(annotations, json.dumps(labels).encode()):
            found = lineage(str(run))
            lines = found.lines()
            assert found.fresh and any("train.start_from" in line and "not recorded" in line for line in lines)
            assert sum("member " in line and "not recorded" in line for line in lines) == 2
            # The files of labels were recorded before.
            every = [each for _, artefact in found.artefacts for each in artefact.every()]
            assert any(each.role == "data.train.1.annotations" and each.state == "fresh" for each in every)


def test_a_training_a_labelling_and_each_artefact_alone(made, tmp_path):
    run, _ = made
    for place in (run / "student", run / "student" / "best", run / "pseudo.json", run / "predictions" / "unlabelled"):
        found = lineage(str(place))
        assert found.fresh and len(found.artefacts) == 1 and found.artefacts[0][1].inputs, place
    labelling = tmp_path / "labelling"
    (labelling / "predictions").mkdir(parents=True)
    shutil.copytree(run / "predictions" / "unlabelled", labelling / "predictions" / "unlabelled")
    assert [role for role, _ in lineage(str(labelling)).artefacts] == ["predictions"]
    with pytest.raises(UserError, match="holds no checkpoint, predictions, pseudo labels or report"):
        lineage(str(tmp_path))
    with pytest.raises(UserError, match="no such file or folder"):
        lineage(str(tmp_path / "nothing"))


def test_the_command_prints_a_tree_and_ends_with_the_status(made, monkeypatch, capsys):
    from i3cl.cli.lineage import main

    run, _ = made

    def command(*arguments):
        monkeypatch.setattr(sys, "argv", ["i3cl lineage", *arguments])
        status = 0
        try:
            main()
        except SystemExit as end:
            status = end.code
        return status, capsys.readouterr().out

    status, text = command("circle", f"storage={run.parent}")
    assert status == 0 and "stale" not in text and text.startswith("report  ")
    with changed(run / "b" / "best" / "settings.yaml", b"{}"):
        status, text = command(str(run))
        assert status == 1
        assert f"member b  {run}/b/best" in text and "stale (now " in text
        status, text = command(str(run), "--json")
        tree = json.loads(text)
        assert status == 1 and tree["fresh"] is False and tree["artefacts"][0]["stale"] is True
        inputs = {each["role"]: each for each in tree["artefacts"][0]["inputs"]}
        assert inputs["checkpoint b"]["state"] == "stale" and inputs["checkpoint a"]["state"] == "fresh"
        assert inputs["checkpoint a"]["recorded"] == inputs["checkpoint a"]["now"] == content_hash(str(run / "a" / "best"))
    assert command(str(run / "nowhere"))[0] == 2


def test_the_chain_is_followed_on_s3(made, bucket):
    from i3cl import storage
    from i3cl.config import LabelSettings
    from i3cl.labelling.label import select_labels

    run, _ = made
    folder = f"{bucket.url}/predictions/unlabelled"
    for file in (run / "predictions" / "unlabelled").iterdir():
        storage.write_bytes_atomic(f"{folder}/{file.name}", file.read_bytes())
    label = {"select": {"low": 0.0, "ignore": 0.0, "high": 0.9, "format": "parquet"}, "fusion": {"min_score": 0.0}}
    select_labels(folder, LabelSettings.model_validate(label), bucket.url, "")
    found = lineage(bucket.url)
    assert found.fresh and [role for role, _ in found.artefacts] == ["labels"]
    assert any(line.startswith(f"  predictions  {folder}") for line in found.lines())
    storage.write_bytes_atomic(f"{folder}/part-00-000000.parquet", storage.read_bytes(f"{folder}/part-00-000001.parquet"))
    assert lineage(bucket.url).artefacts[0][1].stale

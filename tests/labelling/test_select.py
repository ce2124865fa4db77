import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from i3cl.config import LabelSettings, SelectSettings
from i3cl.data.formats.coco import read_coco
from i3cl.data.formats.predictions import prediction_table
from i3cl.errors import UserError
from i3cl.labelling.calibration import Calibration, write_calibration
from i3cl.labelling.fused import FusedStore
from i3cl.labelling.fusion import FusedInstances
from i3cl.labelling.pseudo import bundles, make_pseudo_labels, pseudo_path
from i3cl.labelling.select import SelectionSummary, select


def box(width=100.0, height=20.0):
    return np.array([[0, 0], [width, 0], [width, height], [0, height]], np.float32)


def fused(*scores, votes=None, polygons=None, agreement=None):
    return FusedInstances(
        # Apart from each other, so that no label explains another instance.
        polygons=[box() + np.float32([0, 30 * k]) for k in range(len(scores))] if polygons is None else polygons,
        scores=np.array(scores, float),
        votes=np.full(len(scores), 3) if votes is None else np.array(votes),
        agreement=np.zeros(len(scores)) if agreement is None else np.array(agreement, float),
    )


SETTINGS = SelectSettings(high=0.8, low=0.4, ignore=0.2, min_weight=0.2, min_votes=2, min_side=5)


def test_outlines_that_the_members_dispute_teach_less():
    settings = SETTINGS.model_copy(update={"outline_low": 0.6, "outline_high": 0.8})
    chosen = select(fused(0.9, 0.9, 0.9, 0.9, 0.3, agreement=[0.59, 0.65, 0.8, 0.95, 0.1]), settings)
    assert chosen.outlineweight == pytest.approx([0, 0.25, 1, 1, 1])
    assert chosen.ignore.tolist() == [False] * 4 + [True]
    gate = select(fused(0.9, 0.9, agreement=[0.69, 0.7]), SETTINGS.model_copy(update={"outline_low": 0.7, "outline_high": 0.7}))
    assert gate.outlineweight.tolist() == [0, 1]
    assert select(fused(0.9, 0.9), SETTINGS).outlineweight.tolist() == [1, 1]


def test_thresholds_are_inclusive():
    chosen = select(fused(1.0, 0.8, 0.79, 0.6, 0.4, 0.39, 0.2, 0.19), SETTINGS)
    assert chosen.ignore.tolist() == [False] * 5 + [True] * 2
    assert chosen.lossweight == pytest.approx([1, 1, 0.98, 0.6, 0.2, 0, 0])
    assert chosen.scores.tolist() == [1.0, 0.8, 0.79, 0.6, 0.4, 0.39, 0.2]
    assert chosen.dropped == 1
    assert len(chosen.polygons) == len(chosen) == 7


def test_few_votes_make_an_ignore_region():
    chosen = select(fused(0.9, 0.9, 0.1, votes=[2, 1, 1]), SETTINGS)
    assert chosen.ignore.tolist() == [False, True]
    assert chosen.lossweight.tolist() == [1, 0]
    assert chosen.votes.tolist() == [2, 1]
    assert chosen.dropped == 1


def test_a_small_short_side_makes_an_ignore_region():
    slanted = np.array([[0, 0], [60, 60], [58, 62], [-2, 2]], np.float32)
    chosen = select(fused(0.9, 0.9, 0.9, polygons=[box(height=5), box(height=4.9) + 200, slanted + 400]), SETTINGS)
    assert chosen.ignore.tolist() == [False, True, True]


def at(x, width, height=20.0):
    return box(width, height) + np.float32([x, 0])


def test_what_lies_on_a_label_is_no_ignore_region():
    """Pieces of labelled words, and words with what surrounds them, are wrong detections that a student should unlearn."""
    polygons = [at(0, 100), at(0, 40), at(-10, 130), at(60, 90), at(300, 50)]
    chosen = select(fused(0.9, 0.3, 0.3, 0.3, 0.3, polygons=polygons), SETTINGS)
    assert [p[0, 0] for p in chosen.polygons] == [0, 60, 300], "a piece and the word with a margin are gone, half a word is not"
    assert chosen.ignore.tolist() == [False, True, True] and chosen.dropped == 2
    without = select(fused(0.9, 0.3, 0.3, 0.3, 0.3, polygons=polygons), SETTINGS.model_copy(update={"explained": 1.0}))
    assert len(without) == 5 and without.dropped == 0
    # Labels explain, other ignore regions do not; several labels do so together.
    assert select(fused(0.3, 0.3, polygons=[at(0, 100), at(0, 40)]), SETTINGS).ignore.tolist() == [True, True]
    line = select(fused(0.9, 0.9, 0.3, polygons=[at(0, 40), at(60, 40), at(0, 100)]), SETTINGS)
    assert line.ignore.tolist() == [False, False]
    # An instance with too few votes for a label explains nothing, and is explained like others.
    few = select(fused(0.9, 0.9, votes=[1, 3], polygons=[at(0, 40), at(0, 100)]), SETTINGS)
    assert few.ignore.tolist() == [False] and few.dropped == 1


@hypothesis_settings(deadline=None)
@given(st.lists(st.tuples(st.floats(0, 1), st.integers(0, 300), st.integers(10, 120)), min_size=1, max_size=12))
def test_dropping_what_labels_explain_changes_no_label(instances):
    polygons = [at(x, width) for _, x, width in instances]
    given_ = fused(*[score for score, _, _ in instances], polygons=polygons)
    one, other = (select(given_, SETTINGS.model_copy(update={"explained": share})) for share in (0.5, 1.0))
    assert one.scores[~one.ignore].tolist() == other.scores[~other.ignore].tolist()
    assert one.ignore.sum() <= other.ignore.sum() and len(one) + one.dropped == len(other) + other.dropped == len(instances)


def test_equal_thresholds_leave_no_ramp():
    settings = SelectSettings(high=0.5, low=0.5, ignore=0.5)
    chosen = select(fused(0.5, 0.499999), settings)
    assert (chosen.lossweight.tolist(), chosen.ignore.tolist(), chosen.dropped) == ([1.0], [False], 1)


def test_thresholds_of_zero_take_everything():
    chosen = select(fused(0.0, 0.5), SelectSettings(high=0, low=0, ignore=0))
    assert chosen.lossweight.tolist() == [1.0, 1.0]


def test_empty():
    chosen = select(fused(), SETTINGS)
    assert (len(chosen), chosen.polygons, chosen.dropped) == (0, [], 0)
    assert chosen.lossweight.shape == chosen.ignore.shape == chosen.scores.shape == chosen.votes.shape == (0,)
    assert (chosen.ignore.dtype, chosen.votes.dtype.kind) == (bool, "i")


def test_the_fused_instances_stay_as_they_are():
    instances = fused(0.9, 0.5, 0.3)
    before = instances.scores.copy()
    select(instances, SETTINGS)
    assert (instances.scores == before).all()


@hypothesis_settings(max_examples=25, deadline=None)
@given(
    thresholds=st.lists(st.floats(0, 1), min_size=3, max_size=3).map(sorted),
    min_weight=st.floats(0, 1),
    scores=st.lists(st.floats(0, 1), max_size=10).map(sorted),
)
def test_weight_never_falls_with_the_score(thresholds, min_weight, scores):
    settings = SelectSettings(ignore=thresholds[0], low=thresholds[1], high=thresholds[2], min_weight=min_weight)
    chosen = select(fused(*scores), settings)
    weights = chosen.lossweight
    assert (np.diff(weights) >= 0).all()
    assert ((weights[~chosen.ignore] >= min_weight) & (weights[~chosen.ignore] <= 1)).all()
    assert (weights[chosen.ignore] == 0).all()
    assert len(chosen) + chosen.dropped == len(scores)


def test_summary():
    summary = SelectionSummary()
    empty = {
        "images": 0,
        "images_with_labels": 0,
        "instances": 0,
        "ignored": 0,
        "dropped": 0,
        "mean_weight": 0,
    }
    assert summary.summary() == empty
    summary.update(select(fused(0.9, 0.6, 0.3, 0.1), SETTINGS))
    summary.update(select(fused(0.3), SETTINGS))
    summary.update(select(fused(), SETTINGS))
    assert summary.summary() == pytest.approx(
        {"images": 3, "images_with_labels": 1, "instances": 2, "ignored": 2, "dropped": 1, "mean_weight": 0.8}
    )


def test_weight_can_be_the_score():
    chosen = select(fused(0.9, 0.6, 0.3), SETTINGS.model_copy(update={"weight": "score"}))
    assert chosen.lossweight == pytest.approx([1, 0.6, 0])


def test_thresholds_are_in_units_of_the_calibration():
    calibration = Calibration((0.0, 0.5, 1.0), (0.0, 0.9, 1.0))
    chosen = select(fused(0.5, 0.25, 0.1), SETTINGS, calibration)
    assert chosen.scores == pytest.approx([0.9, 0.45])
    assert chosen.lossweight[0] == 1
    assert chosen.dropped == 1


# ------------------------------------------------------------------------------------- from stored predictions


def predictions(folder, parts, members=("a", "b"), repeat=False):
    """Parts of 3 images with one certain word, one doubtful word, and in every third image nothing."""
    folder.mkdir()
    image = 0
    for part in range(parts):
        rows = []
        for _ in range(3):
            empty = image % 3 == 2
            for member in members:
                polygons = [] if empty else [box(60, 20) + 5, box(60, 20) + np.float32([5, 50])]
                rows.append(
                    {
                        "image_id": image,
                        "file_name": f"{image}.jpg",
                        "height": 100,
                        "width": 200,
                        "member": member,
                        "view": "default",
                        "polygons": polygons,
                        "scores": [] if empty else [0.9, 0.5],
                    }
                )
            image += 1
        pq.write_table(prediction_table(rows), folder / f"part-{part:05d}.parquet")
        if repeat and part == 0:
            pq.write_table(prediction_table(rows), folder / "part-again.parquet")
    return str(folder)


LABEL = LabelSettings(select=SelectSettings(high=0.8, low=0.4, ignore=0.2))


def test_json_and_shards_hold_the_same_labels(tmp_path):
    found = predictions(tmp_path / "predictions", 4)
    counts = make_pseudo_labels(found, LABEL, str(tmp_path / "pseudo.json"))
    assert counts == make_pseudo_labels(found, LABEL, str(tmp_path / "pseudo"))
    assert (counts["images"], counts["images_with_labels"], counts["instances"]) == (12, 8, 16)
    one = read_coco(str(tmp_path / "pseudo.json"), "", check_files=False)
    other = read_coco(str(tmp_path / "pseudo"), "", check_files=False)
    assert [r.id for r in one.records] == sorted(r.id for r in other.records) == [0, 1, 3, 4, 6, 7, 9, 10]
    both = [
        [(i.polygon.tolist(), i.lossweight, i.score, i.votes) for i in r.instances] for r in (one.records[0], other.records[0])
    ]
    assert both[0][0][0] == both[1][0][0]
    assert both[0][0][1:] == pytest.approx(both[1][0][1:], abs=1e-6)


def test_shards_that_are_there_are_not_made_again(tmp_path):
    found, out = predictions(tmp_path / "predictions", 2), tmp_path / "pseudo"
    counts = make_pseudo_labels(found, LABEL, str(out))
    shard = out / "part-00000.parquet"
    before = shard.stat().st_mtime_ns
    assert make_pseudo_labels(found, LABEL, str(out)) == counts
    assert shard.stat().st_mtime_ns == before
    other = LABEL.model_copy(update={"select": SelectSettings(high=0.8, low=0.6, ignore=0.2)})
    assert make_pseudo_labels(found, other, str(out))["instances"] == 4


@pytest.mark.parametrize("form", ["json", "parquet"])
def test_other_predictions_in_the_same_folder_never_leave_old_labels(tmp_path, form):
    """Deleted and predicted again, with the same job.json and the same names of parts."""
    import json
    import shutil

    from i3cl.labelling.pseudo import record_of

    folder, out = tmp_path / "predictions", tmp_path / ("pseudo.json" if form == "json" else "pseudo")
    job = {
        "images": {"count": 6, "sha256": "x"},
        "label.rows_per_block": 3,
        "groups": [["a", "b"]],
        "members": {"a": "1", "b": "2"},
    }

    def again(members):
        shutil.rmtree(folder, ignore_errors=True)
        found = predictions(folder, 2, members)
        for name, content in (("job.json", job), ("done.json", {})):
            (folder / name).write_text(json.dumps(content))
        return make_pseudo_labels(found, LABEL, str(out))["instances"], json.loads(open(record_of(str(out))).read())

    both, first = again(("a", "b"))
    one, second = again(("a",))
    votes = {i.votes for record in read_coco(str(out), "", check_files=False).records for i in record.instances}
    assert (both, one, votes) == (8, 8, {1})
    assert first["predictions"]["job"] == second["predictions"]["job"] == job
    assert first["predictions"]["sha256"] != second["predictions"]["sha256"]
    assert again(("a", "b"))[1] == first, "the same predictions give the same record"


def test_shards_of_an_earlier_version_stay_as_they_are(tmp_path):
    """Their record holds a hash of job.json alone; a student may be learning from them."""
    import hashlib
    import json

    found, out = predictions(tmp_path / "predictions", 2), tmp_path / "pseudo"
    for name in ("job.json", "done.json"):
        (tmp_path / "predictions" / name).write_text("{}")
    counts = make_pseudo_labels(found, LABEL, str(out))
    record = json.loads((out / "_settings.json").read_text())
    record["predictions"] = hashlib.sha256(b"{}").hexdigest()
    (out / "_settings.json").write_text(json.dumps(record))
    before = (out / "part-00000.parquet").stat().st_mtime_ns
    assert make_pseudo_labels(found, LABEL, str(out)) == counts
    assert (out / "part-00000.parquet").stat().st_mtime_ns == before


@pytest.mark.parametrize("name", ["pseudo.json", "pseudo"])
def test_other_thresholds_never_open_the_predictions_again(tmp_path, name):
    """A sweep of students over 400,000 images would otherwise read and fuse all predictions in each of its trials."""
    import json

    folder = tmp_path / "predictions"
    found = predictions(folder, 4)
    # With job.json the names of the parts say which images they hold.
    job = {"images": {"count": 12, "sha256": "x"}, "label.rows_per_block": 3, "groups": [["a", "b"]], "members": {}}
    for part in sorted(folder.glob("part-*.parquet")):
        part.rename(folder / f"part-00-0{part.stem.removeprefix('part-')}.parquet")
    for file, content in (("job.json", job), ("done.json", {})):
        (folder / file).write_text(json.dumps(content))
    higher = LABEL.model_copy(update={"select": SelectSettings(high=0.8, low=0.6, ignore=0.2)})
    wanted = make_pseudo_labels(found, higher, str(tmp_path / "without" / name))
    store = FusedStore.of(found, str(tmp_path / "fused"))
    first = make_pseudo_labels(found, LABEL, str(tmp_path / "first" / name), store=store)
    assert first["instances"] != wanted["instances"]
    for part in folder.glob("*.parquet"):
        part.write_bytes(b"")
    assert make_pseudo_labels(found, higher, str(tmp_path / "with" / name), store=store) == wanted
    one, other = (read_coco(str(tmp_path / each / name), "", check_files=False).records for each in ("without", "with"))
    assert [[(i.polygon.tolist(), i.score, i.votes, i.outlineweight) for i in r.instances] for r in one] == [
        [(i.polygon.tolist(), i.score, i.votes, i.outlineweight) for i in r.instances] for r in other
    ]
    # Other fusion settings are another set of instances.
    with pytest.raises(UserError, match="cannot be read as predictions"):
        fusion = higher.fusion.model_copy(update={"iou": 0.7})
        make_pseudo_labels(found, higher.model_copy(update={"fusion": fusion}), str(tmp_path / "other" / name), store=store)


def test_bundles_keep_every_part_once_and_images_whole(tmp_path):
    found = predictions(tmp_path / "predictions", 5)
    made = bundles(found, least=6)
    assert [len(group) for group in made.groups] == [2, 2, 1]
    assert (made.images, made.members) == (15, ["a", "b"])
    again = bundles(predictions(tmp_path / "again", 5, repeat=True), least=6)
    assert (len(again.groups), again.images) == (1, 15)


def test_parts_of_one_shard_by_several_groups_of_members_stay_together(tmp_path):
    """Otherwise an added member would put a whole corpus into one process, or its polygons would be labels of their own."""
    one, folder = predictions(tmp_path / "one", 4), tmp_path / "apart"
    folder.mkdir()
    for number, part in enumerate(sorted((tmp_path / "one").glob("*.parquet"))):
        table = pq.read_table(part)
        for group, member in enumerate("ab"):
            rows = table.filter(pc.equal(table["member"], member))
            pq.write_table(rows, folder / f"part-{group:02d}-{number:06d}.parquet")
    made = bundles(str(folder), least=6)
    assert [len(group) for group in made.groups] == [4, 4] and (made.images, made.members) == (12, ["a", "b"])
    whole, apart = (make_pseudo_labels(f, LABEL, str(tmp_path / n)) for f, n in ((one, "1.json"), (str(folder), "2.json")))
    assert whole == apart
    records = [read_coco(str(tmp_path / name), "", check_files=False).records for name in ("1.json", "2.json")]
    for first, second in zip(*records, strict=True):
        assert [i.score for i in first.instances] == [i.score for i in second.instances]


def test_an_image_that_a_repeated_task_wrote_twice_counts_once(tmp_path):
    found = predictions(tmp_path / "predictions", 3, repeat=True)
    assert make_pseudo_labels(found, LABEL, str(tmp_path / "pseudo.json"))["images"] == 9


def test_without_predictions(tmp_path):
    with pytest.raises(UserError, match="holds no Parquet part"):
        make_pseudo_labels(str(tmp_path), LABEL, str(tmp_path / "pseudo.json"))


def test_a_calibration_of_other_members_is_refused(tmp_path):
    found, path = predictions(tmp_path / "predictions", 1), str(tmp_path / "calibration.json")
    settings = LABEL.model_copy(update={"select": LABEL.select.model_copy(update={"calibration": path})})
    write_calibration(path, Calibration((0.0, 1.0), (0.0, 1.0), ("a", "b"), LABEL.fusion))
    assert make_pseudo_labels(found, settings, str(tmp_path / "pseudo.json"))["instances"] == 4
    write_calibration(path, Calibration((0.0, 1.0), (0.0, 1.0), ("a", "c"), LABEL.fusion))
    with pytest.raises(UserError, match="members a, c"):
        make_pseudo_labels(found, settings, str(tmp_path / "pseudo.json"))


def test_large_sets_become_shards(tmp_path):
    found = predictions(tmp_path / "predictions", 1)
    assert pseudo_path("run", found, LABEL) == "run/pseudo.json"
    shards = LABEL.model_copy(update={"select": SelectSettings(format="parquet")})
    assert pseudo_path("run", found, shards) == "run/pseudo"

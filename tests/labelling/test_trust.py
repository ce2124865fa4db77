import json

import numpy as np
import pyarrow.parquet as pq
import pytest

from i3cl.config import EvaluateSettings, FusionSettings, LabelSettings
from i3cl.data.formats.coco import read_coco
from i3cl.data.formats.predictions import prediction_table
from i3cl.data.formats.records import ImageRecord, Instance
from i3cl.errors import UserError
from i3cl.labelling.trust import dispute, measure_trust, write_disputed

EVALUATE = EvaluateSettings()


def box(x, y, width=60.0, height=20.0):
    return np.array([[x, y], [x + width, y], [x + width, y + height], [x, y + height]], np.float32)


TRUTH = [ImageRecord(i, f"{i}.jpg", 200, 300, (Instance(box(10, 10)), Instance(box(10, 60)))) for i in range(6)]


def stored(folder, found):
    """found: image -> member -> list of (polygon, score)."""
    folder.mkdir()
    rows = [
        {
            "image_id": image,
            "file_name": f"{image}.jpg",
            "height": 200,
            "width": 300,
            "member": member,
            "view": "default",
            "polygons": [polygon for polygon, _ in pairs],
            "scores": [score for _, score in pairs],
        }
        for image, members in found.items()
        for member, pairs in members.items()
    ]
    pq.write_table(prediction_table(rows), folder / "part-00000.parquet")
    return str(folder)


@pytest.fixture
def complementary(tmp_path):
    """Each member has its own false alarms, as sure as what it finds: only together they tell them apart."""
    found = {}
    for image in range(6):
        both = [(box(10, 10), 0.8), (box(10, 60), 0.8)]
        found[image] = {"a": [*both, (box(150, 10), 0.85)], "b": [*both, (box(150, 100), 0.85)]}
    found[4]["a"] += [(box(200, 150), 0.9)]
    return stored(tmp_path / "predictions", found)


def test_the_ensemble_is_better_than_members_that_err_apart(complementary):
    trust = measure_trust(complementary, TRUTH, LabelSettings(), EVALUATE)
    assert (trust.images, trust.truths) == (6, 12)
    assert trust.ensemble.hmean == 1
    assert trust.members[0].hmean < 0.85
    measured, low, high = trust.gain
    assert 0 < low <= measured <= high
    assert [(row.name, row.count, row.precision, row.recall) for row in trust.by_votes] == [
        ("1 of 2", 13, 0, 0),
        ("2 of 2", 12, 1, 1),
    ]
    assert trust.by_threshold[4].precision == 1
    assert [row.recall for row in trust.by_size if row.count] == [1]
    assert trust.calibration([0.4, 0.8]).tolist() == pytest.approx([0, 1], abs=0.01)


def test_labels_in_another_frame_are_refused(complementary):
    """Truth in the upright frame of images that were predicted as they are stored."""
    turned = [ImageRecord(r.id, r.file_name, r.width, r.height, r.instances) for r in TRUTH]
    with pytest.raises(UserError, match=r"0.jpg: the image is 300 x 200 but its annotation says 200 x 300 \(turned"):
        measure_trust(complementary, turned, LabelSettings(), EVALUATE)


def test_the_most_disputed_image_comes_first(complementary, tmp_path):
    trust = measure_trust(complementary, TRUTH, LabelSettings(), EVALUATE)
    assert trust.disputed[0].image_id == 4
    values = [dispute(item.fused, 2) for item in trust.disputed]
    assert values == sorted(values, reverse=True)
    path = tmp_path / "disputed.json"
    write_disputed(str(path), trust.disputed)
    assert json.loads(path.read_text())["images"][0]["id"] == 4
    first = read_coco(str(path), "", check_files=False).records[0]
    assert {i.votes for i in first.instances} == {1, 2}
    assert all(i.score is not None for i in first.instances)


def test_members_without_weight_are_left_out(complementary):
    settings = LabelSettings(fusion=FusionSettings(member_weights={"b": 0}))
    trust = measure_trust(complementary, TRUTH, settings, EVALUATE)
    assert [member.name for member in trust.members] == ["a"]
    assert trust.calibration.members == ("a",)
    assert trust.gain[0] == 0


def test_images_without_predictions_count_as_missed(tmp_path):
    found = stored(tmp_path / "p", {0: {"a": [(box(10, 10), 0.9), (box(10, 60), 0.9)]}})
    trust = measure_trust(found, TRUTH, LabelSettings(), EVALUATE)
    assert (trust.ensemble.precision, trust.ensemble.recall) == (1, pytest.approx(2 / 12))


def test_what_lies_in_a_dont_care_region_is_neither_right_nor_wrong(tmp_path):
    truth = [ImageRecord(0, "0.jpg", 200, 300, (Instance(box(10, 10)), Instance(box(100, 60), ignore=True)))]
    found = stored(tmp_path / "p", {0: {"a": [(box(10, 10), 0.9), (box(100, 60), 0.9)]}})
    trust = measure_trust(found, truth, LabelSettings(), EVALUATE)
    assert [(row.count, row.precision) for row in trust.by_votes] == [(1, 1)]


def test_other_images_and_nothing_found_are_the_users_mistake(tmp_path):
    with pytest.raises(UserError, match="the same data set"):
        measure_trust(stored(tmp_path / "p", {99: {"a": []}}), TRUTH, LabelSettings(), EVALUATE)
    with pytest.raises(UserError, match="found anything"):
        measure_trust(stored(tmp_path / "q", {0: {"a": []}}), TRUTH, LabelSettings(), EVALUATE)


def test_report_stands_alone(complementary, tmp_path):
    from PIL import Image

    from i3cl.report.trust import write_trust_report

    for record in TRUTH:
        Image.new("RGB", (300, 200), (90, 90, 90)).save(tmp_path / record.file_name)
    trust = measure_trust(complementary, TRUTH, LabelSettings(), EVALUATE)
    write_trust_report(str(tmp_path / "report.html"), trust, str(tmp_path), "Trust & <labels>")
    page = (tmp_path / "report.html").read_text()
    assert "Trust &amp; &lt;labels&gt;" in page
    assert page.count("<figure>") == 6
    assert "Observed precision" in page
    assert 'href="http' not in page
    assert page.index("4.jpg") < page.index("0.jpg")

"""What the scores of members mean, learned from truth and from agreement."""

import json

import numpy as np
import pyarrow.parquet as pq
import pytest

from i3cl.config import EvaluateSettings, FusionSettings, LabelSettings
from i3cl.data.formats.predictions import prediction_table
from i3cl.data.formats.records import ImageRecord, Instance
from i3cl.errors import UserError
from i3cl.labelling.fused import fused_images
from i3cl.labelling.member_scores import (
    off_by,
    read_member_scores,
    scores_by_agreement,
    scores_by_truth,
    write_member_scores,
)

IMAGES = 60
PER_IMAGE = 10


def ring(x, y, width=30, height=12):
    return np.array([[x, y], [x + width, y], [x + width, y + height], [x, y + height]], np.float32)


def simulated(path, recall, seed=0, lines=(), twins=False):
    """Members that find each word with their `recall`, and wrong boxes; p(right) = score for `calm`, score squared for `loud`.

    twins: `twin` finds what `calm` finds; both are of one kind.
    """
    rng = np.random.default_rng(seed)
    rows, truth = [], []
    for image in range(IMAGES):
        places = [(40 * (k % 10), 40 * (k // 10)) for k in range(PER_IMAGE)]
        truth.append(ImageRecord(image, f"{image}.jpg", 800, 800, tuple(Instance(ring(*p)) for p in places)))
        for member, share in recall.items():
            polygons, scores = [], []
            for place in places:
                if rng.random() < share:
                    polygons.append(ring(*(np.array(place) + rng.uniform(-1, 1, 2))))
                    scores.append(np.sqrt(rng.random()))
            for _ in range(int(share * PER_IMAGE)):
                polygons.append(ring(*rng.uniform(300, 700, 2)))
                scores.append(1 - np.sqrt(1 - rng.random()))
            if member in lines:
                polygons, scores = [ring(-5, -5, 400, 22), ring(400, 500, 300, 20)], [0.9, 0.3]
            # `loud` overstates: what it scores s is right as often as what the others score s squared.
            scores = np.sqrt(scores) if member == "loud" else scores
            row = {
                "image_id": image,
                "file_name": f"{image}.jpg",
                "height": 800,
                "width": 800,
                "member": member,
                "view": "default",
            }
            if twins and member == "twin":
                polygons, scores = rows[-1]["polygons"], rows[-1]["scores"]
            row |= {"granularity": "line" if member in lines else "word", "kind": "ours" if member in ("calm", "twin") else None}
            rows.append(row | {"polygons": polygons, "scores": scores})
    pq.write_table(prediction_table(rows), path)
    return truth


def test_truth_shows_what_a_score_means(tmp_path):
    path = str(tmp_path / "p.parquet")
    truth = simulated(path, {"calm": 0.9, "loud": 0.9})
    found = scores_by_truth(path, truth, EvaluateSettings())
    # By construction half of the findings are right, and p(right | s) is s for calm and s squared for loud.
    at = np.linspace(0.1, 0.9, 9)
    assert np.abs(found("calm", at) - at).mean() < 0.05 and np.abs(found("loud", at) - at**2).mean() < 0.05
    assert all(share == pytest.approx(0.5, abs=0.03) for share in found.confirmed.values())


def test_agreement_comes_close_to_truth_when_members_err_apart(tmp_path):
    path = str(tmp_path / "p.parquet")
    truth = simulated(path, {"calm": 0.6, "loud": 0.7, "other": 0.5})
    guess, measured = scores_by_agreement(path, FusionSettings()), scores_by_truth(path, truth, EvaluateSettings())
    assert max(off_by(guess, measured).values()) < 0.08
    # Others miss much: without the correction for it the share of confirmed findings would be taken for precision.
    assert guess.confirmed["calm"] < measured.confirmed["calm"] - 0.05


def test_members_of_one_kind_do_not_confirm_each_other(tmp_path):
    """Two trainings of one network make the same mistakes, and would call them right."""
    path = str(tmp_path / "p.parquet")
    truth = simulated(path, {"calm": 0.6, "twin": 0.6, "other": 0.5}, twins=True)
    measured = scores_by_truth(path, truth, EvaluateSettings())
    assert max(off_by(scores_by_agreement(path, FusionSettings()), measured).values()) < 0.1
    table = pq.read_table(path)
    pq.write_table(table.drop_columns(["kind"]), path)
    assert off_by(scores_by_agreement(path, FusionSettings()), measured)["twin"] > 0.2


def test_lines_confirm_words_and_are_confirmed_by_them(tmp_path):
    path = str(tmp_path / "p.parquet")
    truth = simulated(path, {"calm": 1.0, "pp": 1.0}, lines=("pp",))
    for found in (scores_by_truth(path, truth, EvaluateSettings()), scores_by_agreement(path, FusionSettings())):
        assert found("pp", [0.9, 0.3]) == pytest.approx([1.0, 0.0], abs=0.12)
    assert scores_by_agreement(path, FusionSettings()).confirmed["calm"] == pytest.approx(0.5, abs=0.05)


def test_fusion_works_with_what_the_scores_mean(tmp_path):
    path, file = str(tmp_path / "p.parquet"), str(tmp_path / "members.json")
    truth = simulated(path, {"calm": 0.9, "loud": 0.9})
    write_member_scores(file, scores_by_truth(path, truth, EvaluateSettings()))
    read = read_member_scores(file)
    settings = LabelSettings(fusion={"member_scores": file})
    for plain, item in zip(fused_images(path, LabelSettings()), fused_images(path, settings), strict=True):
        for before, after in zip(plain.members, item.members, strict=True):
            assert after.scores.tolist() == read(before.member, before.scores).tolist()


def test_mistakes(tmp_path):
    path, file = str(tmp_path / "p.parquet"), tmp_path / "members.json"
    truth = simulated(path, {"calm": 0.9})
    with pytest.raises(UserError, match="all members are of one kind and make the same mistakes"):
        scores_by_agreement(path, FusionSettings())
    few = scores_by_truth(path, truth[:1], EvaluateSettings())
    assert few.unlearned == ["calm"] and few("calm", [0.2, 0.7]).tolist() == [0.2, 0.7]
    write_member_scores(str(file), scores_by_truth(path, truth, EvaluateSettings()))
    simulated(path, {"calm": 0.9, "new": 0.5})
    with pytest.raises(UserError, match=r"members.json: learned without new \(there are calm\)"):
        list(fused_images(path, LabelSettings(fusion={"member_scores": str(file)})))
    assert list(fused_images(path, LabelSettings(fusion={"member_scores": str(file), "member_weights": {"new": 0}})))
    for wrong in ("[]", "{", '{"members": {"a": {}}}', json.dumps({"members": {}, "learned_from": "hearsay"})):
        file.write_text(wrong)
        with pytest.raises(UserError, match=r"members.json: not the scores of members"):
            read_member_scores(str(file))

"""A checkpoint of this project as a member."""

from __future__ import annotations

import numpy as np
import pytest
from members.checks import VIEW, check_any_image

from i3cl.config import MemberSettings, ViewSettings
from i3cl.data.loading.images import decode_image
from i3cl.errors import UserError
from i3cl.inference.predictor import Predictor
from i3cl.members.member import Place
from i3cl.members.ours import OurMember, checkpoint_hash, located


def test_it_finds_what_the_predictor_finds(tiny_checkpoints, tiny_set):
    image = decode_image(str(tiny_set / "images" / "0.jpg"))
    member = OurMember.load(MemberSettings(weights=tiny_checkpoints["a"]), Place())
    predictor = Predictor.load(tiny_checkpoints["a"], "cpu")
    assert member.takes_views
    for view in (VIEW, ViewSettings(short_side=64, flip=True)):
        (found,), (wanted,) = member([image], view), predictor([image], view)
        assert len(found) == len(wanted) > 0
        np.testing.assert_array_equal(found.scores, wanted.scores)
        np.testing.assert_array_equal(np.concatenate(found.polygons), np.concatenate(wanted.polygons))


def test_a_given_test_size_is_taken(tiny_checkpoints):
    place = Place(given={"data.test_short_side": 48})
    member = OurMember.load(MemberSettings(weights=tiny_checkpoints["a"]), place)
    assert member.predictor.size.short_side == 48


def test_any_image_can_be_taken(tiny_checkpoints):
    check_any_image(OurMember.load(MemberSettings(weights=tiny_checkpoints["a"]), Place()))


def test_a_checkpoint_is_known_by_its_weights_and_settings(tiny_checkpoints, tmp_path):
    assert checkpoint_hash(tiny_checkpoints["a"]) != checkpoint_hash(tiny_checkpoints["b"])
    assert checkpoint_hash(tiny_checkpoints["a"]) == checkpoint_hash(tiny_checkpoints["a"])
    assert OurMember.fingerprint(MemberSettings(weights=tiny_checkpoints["a"])) == checkpoint_hash(tiny_checkpoints["a"])
    with pytest.raises(UserError, match=r"not a checkpoint directory \(it has no settings.yaml\)"):
        checkpoint_hash(str(tmp_path))


def test_what_is_no_checkpoint_is_told(tiny_checkpoints, tmp_path):
    for settings, words in (
        (MemberSettings(weights=str(tmp_path)), "not a checkpoint directory"),
        (MemberSettings(weights=tiny_checkpoints["a"], options={"size": 3}), r"options\.size: no option of i3cl; it has none"),
    ):
        for call in (OurMember.fingerprint, lambda settings: OurMember.load(settings, Place())):
            with pytest.raises(UserError, match=words):
                call(settings)


def test_a_name_stays_a_name_and_a_path_becomes_absolute(tmp_path, monkeypatch):
    assert located("lite0-scene") == "lite0-scene"
    assert located("runs/a/best").endswith("/runs/a/best") and located("runs/a/best").startswith("/")
    assert located("s3://bucket/a") == "s3://bucket/a"

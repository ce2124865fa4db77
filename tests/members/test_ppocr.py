"""PP-OCR's detector on drawn lines. Needs the extra ppocr."""

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
from i3cl.members.member import Place
from i3cl.members.ppocr import PPOCRMember, regions

needed = pytest.mark.skipif(
    any(installed(package) is None for package in PPOCRMember.packages), reason="needs the extra ppocr (rapidocr, onnxruntime)"
)


def settings(weights: str | None = None, **options) -> MemberSettings:
    return MemberSettings(use="ppocr", weights=weights, options=options)


@pytest.fixture(scope="module")
def member():
    return PPOCRMember.load(settings(), Place())


@needed
def test_it_finds_whole_lines(member, monkeypatch):
    lines = {"Main Street": (30, 80), "closed": (120, 200)}
    image = photo(240, 420, lines)
    with no_network(monkeypatch):
        (found,) = PPOCRMember.load(settings(), Place())([image], VIEW)
    check_detections(found, image)
    assert len(found) == 2 and found.scores.min() > 0.5
    for text, place in lines.items():
        assert max(box_iou(box, where(text, place)) for box in found.boxes) > 0.6, text


@needed
def test_any_image_can_be_taken(member):
    check_any_image(member)


@needed
def test_the_fingerprint_follows_weights_and_options(tmp_path):
    other = tmp_path / "other.onnx"
    other.write_bytes(b"x")
    check_fingerprints(
        settings(),
        settings(box_thresh=0.3, max_side_len=2000),
        settings(box_thresh=0.4),
        settings(str(other)),
        kind=PPOCRMember,
    )
    assert PPOCRMember.fingerprint(settings(str(file_of("rapidocr", "models/*det*.onnx")))) == PPOCRMember.fingerprint(settings())


@needed
def test_files_that_are_no_detector_are_named(tmp_path):
    recognition = file_of("rapidocr", "models/*rec*.onnx")
    check_wrong_files(PPOCRMember, settings, tmp_path, ".onnx", {"recognition": recognition})
    with pytest.raises(UserError, match=r"options\.box_tresh: .*did you mean box_thresh"):
        PPOCRMember.fingerprint(settings(box_tresh=0.5))


def test_without_the_package_the_command_is_told():
    check_missing_package(PPOCRMember, settings(), r"pip install 'i3cl\[ppocr\]'")


def test_a_region_is_widened_by_its_area_over_its_perimeter():
    found = np.zeros((60, 100), np.float32)
    found[20:30, 30:70] = 0.8
    found[50:52, 5:7] = 0.9  # too small
    found[40:50, 80:95] = 0.35  # too weak
    (polygon,), (score,) = regions(found, 0.3, 0.5, unclip=1.5, least=3)
    out = 10 * 40 * 1.5 / (2 * (10 + 40))
    np.testing.assert_allclose(
        polygon, [[30 - out, 20 - out], [70 + out, 20 - out], [70 + out, 30 + out], [30 - out, 30 + out]], atol=0.01
    )
    assert score == pytest.approx(0.8)


@needed
@pytest.mark.parametrize(
    ("options", "size", "seen"),
    [
        ({}, (427, 640), (736, 1088)),
        ({}, (3000, 4000), (1504, 1984)),
        ({"limit_type": "max", "limit_side_len": 320}, (427, 640), (224, 320)),
        ({"limit_type": "max", "limit_side_len": 960}, (427, 640), (416, 640)),
    ],
)
def test_the_size_that_the_network_sees(options, size, seen):
    assert PPOCRMember.load(settings(**options), Place())._size(*size) == seen

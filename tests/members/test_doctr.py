"""docTR's detectors, with random weights: nothing here says how well they find text. Needs the package python-doctr."""

from __future__ import annotations

import pytest
from members.checks import VIEW, check_any_image, check_detections, check_fingerprints, check_wrong_files, no_network, photo

from i3cl.config import MemberSettings
from i3cl.errors import UserError
from i3cl.members.adapting import installed
from i3cl.members.doctr import DocTRMember
from i3cl.members.member import Place

needed = pytest.mark.skipif(installed("python-doctr") is None, reason="needs the package python-doctr")


def settings(weights: str | None, **options) -> MemberSettings:
    return MemberSettings(use="doctr", weights=weights, options={"arch": "fast_tiny", "side": 256, **options})


@pytest.fixture(scope="module")
def file(tmp_path_factory) -> str:
    import torch
    from doctr.models import detection

    torch.manual_seed(0)
    network = detection.fast_tiny(pretrained=False, pretrained_backbone=False)
    path = tmp_path_factory.mktemp("doctr") / "fast_tiny.pt"
    torch.save(network.state_dict(), path)
    return str(path)


@needed
def test_a_state_dict_is_enough(file, monkeypatch):
    image = photo(120, 200, {"word": (20, 70)})
    with no_network(monkeypatch):
        (found,) = DocTRMember.load(settings(file, box_thresh=0.0), Place())([image], VIEW)
    check_detections(found, image)
    assert len(found) > 0


@needed
def test_any_image_can_be_taken(file):
    check_any_image(DocTRMember.load(settings(file, box_thresh=0.0), Place()))


@needed
def test_the_fingerprint_follows_weights_and_options(file, tmp_path):
    other = tmp_path / "other.pt"
    other.write_bytes(b"x")
    check_fingerprints(
        settings(file), settings(file, bin_thresh=0.3), settings(file, bin_thresh=0.2), settings(str(other)), kind=DocTRMember
    )


@needed
def test_other_files_are_named(tmp_path, file):
    import torch

    other = tmp_path / "resnet.pt"
    torch.save({"conv1.weight": torch.zeros(64, 3, 7, 7)}, other)
    check_wrong_files(DocTRMember, settings, tmp_path, ".pt", {"other": other})
    with pytest.raises(UserError, match=r"not the weights of docTR's fast_small"):
        DocTRMember.load(settings(file, arch="fast_small"), Place())
    with pytest.raises(UserError, match=r"options\.side: 100 is not a multiple of 32; give 128"):
        DocTRMember.fingerprint(settings(file, side=100))
    with pytest.raises(UserError, match=r"options\.arch: 'east' is unknown; there are db_resnet34"):
        DocTRMember.fingerprint(settings(file, arch="east"))


def test_without_the_package_the_command_is_told():
    class Absent(DocTRMember):
        packages = ("no-such-package-i3cl",)

    with pytest.raises(UserError, match=r"^use: doctr needs no-such-package-i3cl.*pip install --no-deps python-doctr"):
        Absent.fingerprint(settings("a.pt"))

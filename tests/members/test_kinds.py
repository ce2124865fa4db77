"""Which detectors there are, those of other packages too, and the options that built-in ones share."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from members.checks import VIEW

from i3cl.cli.members import main
from i3cl.config import MemberSettings
from i3cl.errors import UserError
from i3cl.members.adapting import Option, fill, grown, read_options, require
from i3cl.members.listing import listing
from i3cl.members.member import BUILT_IN, Place, granularity_of, kind_of, kinds

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "members.md").read_text(encoding="utf-8")
EXAMPLE = re.search(r"```python\n(.+?)```", PAGE, re.S)[1]
"""The detector of another package that the docs show."""

OTHERS = {
    "bright": "bright_regions:BrightRegions",
    "gone": "no_such_module_of_members:Detector",
    "loud": "loud_member:Detector",
    "wrong": "loud_member_not:NUMBER",
    "half": "loud_member_not:Half",
    "ppocr": "bright_regions:BrightRegions",
}


@pytest.fixture
def others(tmp_path, monkeypatch):
    """An installed package with the detector of the docs and broken ones."""
    (tmp_path / "bright_regions.py").write_text(EXAMPLE)
    (tmp_path / "loud_member.py").write_text("raise RuntimeError('no licence\\nfound')\n")
    half = "from i3cl.members.member import Member\nNUMBER = 3\nclass Half(Member):\n    pass\n"
    (tmp_path / "loud_member_not.py").write_text(half)
    info = tmp_path / "others-2.5.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: others\nVersion: 2.5\n")
    lines = "".join(f"{name} = {value}\n" for name, value in OTHERS.items())
    (info / "entry_points.txt").write_text(f"[i3cl.members]\n{lines}")
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    for name in ("bright_regions", "loud_member_not"):
        sys.modules.pop(name, None)


def test_a_detector_of_another_package_takes_part(others):
    assert kinds() == [*BUILT_IN, "bright", "gone", "half", "loud", "wrong"]
    kind, settings = kind_of("bright"), MemberSettings(use="bright")
    assert kind.fingerprint(settings) == kind.fingerprint(settings)
    image = np.zeros((60, 90, 3), np.uint8)
    image[20:40, 30:70] = 250
    (found,) = kind.load(settings, Place())([image], VIEW)
    np.testing.assert_allclose(found.boxes, [[30, 20, 70, 40]], atol=1)
    assert granularity_of(settings) == "word"
    assert granularity_of(MemberSettings(use="bright", granularity="line")) == "line"


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("gone", "ModuleNotFoundError: No module named"),
        ("loud", "RuntimeError: no licence found"),
        ("wrong", "is not a subclass"),
        ("half", "does not define __call__, fingerprint, load"),
        ("briht", "did you mean bright"),
        ("zzz", "there are i3cl, ppocr"),
    ],
)
def test_a_detector_that_cannot_be_used_is_one_line(others, name, words):
    with pytest.raises(UserError, match=re.escape(words)) as caught:
        kind_of(name, "label.members.x")
    assert str(caught.value).startswith("label.members.x.use: ") and "\n" not in str(caught.value)


def test_the_list_goes_on_after_broken_ones(others, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["i3cl members"])
    main()
    lines = capsys.readouterr().out.splitlines()
    heads = [line for line in lines if not line.startswith(" ")]
    assert [re.split(r"[ :]", line)[0] for line in heads] == [*BUILT_IN, "bright", "gone", "half", "loud", "wrong", "ppocr"]
    assert "bright (words, from others 2.5) installed" in heads
    assert heads[-1] == "ppocr: from others 2.5 adds it, but a built-in detector has the name; it is not used"
    assert "gone: gone (no_such_module_of_members:Detector) cannot be imported: ModuleNotFoundError" in "\n".join(heads)
    monkeypatch.setattr(sys, "argv", ["i3cl members", "--json"])
    main()
    table = json.loads(capsys.readouterr().out)
    assert [kind["name"] for kind in table] == [re.split(r"[ :]", line)[0] for line in heads]


def test_the_page_says_what_the_list_says():
    text = " ".join(PAGE.split())
    for kind in listing():
        if kind.name not in BUILT_IN:
            continue
        for words in (kind.about, kind.licence, kind.install, *kind.options):
            assert words in text, words
        for option, said in kind.options.items():
            default, _, about = said.partition("  ")
            assert f"| `{option}` | {default} | {about} |" in text, option


def test_a_missing_package_is_named_with_the_command():
    with pytest.raises(UserError, match=r"^use: x needs no-such-package-i3cl, which is not installed here; pip install y$"):
        require("x", ["pytest", "no-such-package-i3cl"], "pip install y")
    assert require("x", ["pytest"], "")["pytest"] == pytest.__version__


KNOWN = {
    "side": Option(5, "", 1, 9),
    "share": Option(0.5, "", 0, 1),
    "way": Option("a", "", choices=("a", "b")),
    "on": Option(True, ""),
}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"sied": 3}, "options.sied: no option of ppocr; did you mean side? it has side, share, way, on"),
        ({"side": 0}, "options.side: 0 is out of range; give 1 to 9"),
        ({"side": 2.5}, "options.side: 2.5 is not a whole number"),
        ({"side": True}, "options.side: True is not a whole number"),
        ({"share": "much"}, "options.share: 'much' is not a number; give 0 to 1"),
        ({"share": 1.5}, "options.share: 1.5 is out of range"),
        ({"way": "c"}, "options.way: 'c' is unknown; there are a, b"),
        ({"on": 1}, "options.on: 1 is not true or false"),
    ],
)
def test_a_wrong_option_is_told_with_the_right_ones(options, words):
    with pytest.raises(UserError, match=re.escape(words)):
        read_options(MemberSettings(use="ppocr", options=options), KNOWN)


def test_options_that_are_left_out_have_their_defaults():
    assert read_options(MemberSettings(use="ppocr", options={"share": 1}), KNOWN) == {
        "side": 5,
        "share": 1.0,
        "way": "a",
        "on": True,
    }


def test_tiny_and_thin_images_grow_without_moving():
    for shape in ((1, 1), (5, 2000), (2000, 5), (40, 50)):
        image = np.arange(shape[0] * shape[1] * 3).reshape(*shape, 3).astype(np.uint8)
        whole = grown(image)
        assert min(whole.shape[:2]) >= 32 and max(whole.shape[:2]) <= 16 * min(whole.shape[:2])
        np.testing.assert_array_equal(whole[: shape[0], : shape[1]], image)


def test_only_its_own_tensors_fill_a_network():
    import torch

    network = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 1), torch.nn.BatchNorm2d(4))
    own = {name: torch.full_like(value, 2) for name, value in network.state_dict().items()}
    fill(network, {name: value for name, value in own.items() if "num_batches" not in name}, Path("a.pth"), "X")
    assert (network.state_dict()["0.weight"] == 2).all()
    missing = {name: value for name, value in own.items() if name != "1.bias"}
    for tensors, words in (
        (missing, "1 tensors are missing, e.g. 1.bias"),
        (own | {"new": own["1.bias"]}, "do not belong to it, e.g. new"),
        (own | {"1.bias": torch.zeros(9)}, "have another shape, e.g. 1.bias"),
    ):
        with pytest.raises(UserError, match=f"weights: a.pth: not the weights of X: .*{words}"):
            fill(network, tensors, Path("a.pth"), "X")


def test_no_torch_is_needed_before_a_detector_is_loaded():
    """The driver of a job may run where torch is not installed, and starts in a moment."""
    code = (
        "import sys\nfrom i3cl.config import MemberSettings\nfrom i3cl.errors import UserError\n"
        "from i3cl.members.listing import listing\nfrom i3cl.members.member import kind_of\nlisting()\n"
        "print(kind_of('i3cl').fingerprint(MemberSettings(weights='lite0-scene')))\n"
        "for use in ('ppocr', 'craft', 'doctr', 'torchvision'):\n"
        "    try:\n        kind_of(use).fingerprint(MemberSettings(use=use))\n"
        "    except UserError as error:\n        print(error)\n"
        "sys.exit(any(name in sys.modules for name in ('torch', 'ray', 'onnxruntime', 'easyocr', 'doctr', 'rapidocr')))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env={**os.environ, "PYTHONPATH": _paths()}
    )
    assert done.returncode == 0, done.stdout + done.stderr


def _paths() -> str:
    return os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])

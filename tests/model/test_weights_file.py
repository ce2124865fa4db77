"""Weights files of every wrapping are read; what is another kind of file is called by its name."""

from __future__ import annotations

import gzip
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from i3cl.cli.prepare import main as prepare
from i3cl.config import BackboneSettings, ModelSettings
from i3cl.errors import UserError
from i3cl.model.backbone import Backbone
from i3cl.model.checkpoint import WEIGHTS, load_weights
from i3cl.model.convert import convert_original
from i3cl.model.network import I3CL
from i3cl.model.original import to_original
from i3cl.model.weights_file import plain_names, read_tensors

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0123456789abcdef" * 4 + b"\nsize 178000000\n"
PAGE = b"\xef\xbb\xbf\n <!DOCTYPE html><html><body>404</body></html>"


def half(path: Path, **options: bool) -> bytes:
    torch.save({"a": torch.zeros(1000)}, path, **options)
    return path.read_bytes()[: path.stat().st_size // 2]


def zipped(path: Path) -> bytes:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme.txt", "weights")
    return path.read_bytes()


class Network:
    """Stands for a class of a training script."""


def whole_module(path: Path) -> bytes:
    torch.save(nn.Linear(2, 2), path)
    return path.read_bytes()


def own_class(path: Path) -> bytes:
    torch.save({"state_dict": {"a": torch.zeros(1)}, "model": Network()}, path)
    return path.read_bytes()


def program(path: Path) -> bytes:
    torch.jit.save(torch.jit.trace(nn.Linear(2, 2), torch.zeros(1, 2)), path)
    return path.read_bytes()


OTHERS: dict[str, tuple[Callable[[Path], bytes], str]] = {
    "pointer": (lambda _: POINTER, r"is a Git LFS pointer, not the weights \(of 178 MB\): run `git lfs pull`"),
    "page": (lambda _: PAGE, "is a web page, not the weights"),
    "error of a store": (lambda _: b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>', "is an XML or HTML text"),
    "error of a service": (
        lambda _: b'{"error": "quota exceeded"}',
        'is a text file, not the weights; it begins with \'{"error"',
    ),
    "text": (lambda _: b"not weights", "is a text file.*'not weights'"),
    "nothing": (lambda _: b"", "is empty"),
    "keras": (lambda _: b"\x89HDF\r\n\x1a\n" + bytes(100), "HDF5"),
    "gzip": (lambda _: gzip.compress(bytes(100)), "compressed with gzip"),
    "zip": (zipped, "zip archive that torch did not write"),
    "half": (half, "incomplete or damaged"),
    "half of an old one": (lambda p: half(p, _use_new_zipfile_serialization=False), "incomplete or damaged"),
    "pickle": (lambda _: pickle.dumps({"model": {"a": [1, 2]}}), "is a Python pickle"),
    "whole module": (whole_module, r"holds a torch\.nn\.modules\.linear\.Linear beside its tensors"),
    "own class": (own_class, r"holds a .*Network beside its tensors"),
    "program": (program, "is a TorchScript program"),
    "noise": (lambda _: bytes(range(129, 256)) * 4, "cannot be read as a file of tensors"),
}


@pytest.mark.parametrize("ending", [".pth", ".safetensors"])
@pytest.mark.parametrize("kind", OTHERS)
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
def test_other_files_are_called_by_their_name(kind: str, ending: str, tmp_path: Path) -> None:
    make, words = OTHERS[kind]
    content = make(tmp_path / "made")
    path = tmp_path / f"weights{ending}"
    path.write_bytes(content)
    if ending == ".safetensors" and kind == "noise":
        words = "not a readable safetensors file"
    with pytest.raises(UserError, match=words) as caught:
        read_tensors(path)
    text = str(caught.value)
    assert text.startswith(f"{path}: ") and "\n" not in text and "weights_only" not in text and "\x1b" not in text


@pytest.mark.parametrize("content", [POINTER, PAGE], ids=["pointer", "page"])
def test_wherever_weights_are_read(
    content: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("weights.pth", WEIGHTS):
        (tmp_path / name).write_bytes(content)
    model = I3CL(ModelSettings(backbone=BackboneSettings(name="resnet10t"), intra=False, inter=False))
    ways: list[Callable[[], object]] = [
        lambda: load_weights(model, tmp_path),
        lambda: load_weights(model, tmp_path / "weights.pth"),
        lambda: Backbone(BackboneSettings(name="resnet10t", weights=str(tmp_path / "weights.pth"))),
        lambda: convert_original(str(tmp_path / "weights.pth"), str(tmp_path / "out")),
    ]
    for way in ways:
        with pytest.raises(UserError, match="Git LFS pointer" if content is POINTER else "web page"):
            way()
    assert not (tmp_path / "out").exists()
    arguments = ["convert", "--source", str(tmp_path / "weights.pth"), "--out", str(tmp_path / "out")]
    monkeypatch.setattr("sys.argv", ["prepare.py", *arguments])
    with pytest.raises(SystemExit) as caught:
        prepare()
    assert caught.value.code == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


@pytest.fixture(scope="module")
def detector() -> I3CL:
    torch.manual_seed(0)
    return I3CL(ModelSettings(backbone=BackboneSettings(name="resnet10t"), num_classes=1, inter=False))


WRAPPED: dict[str, Callable[[dict[str, Tensor]], object]] = {
    "plain": dict,
    "state_dict": lambda s: {"state_dict": s, "optimizer": {"state": {0: torch.zeros(2)}}},
    "model_state_dict": lambda s: {"model_state_dict": s, "epoch": 3},
    "model with settings": lambda s: {"model": {"depth": 50}, "net": s},
    "nested": lambda s: {"model": {"state_dict": s}, "args": {"lr": 0.1}},
    "compiled": lambda s: {"model": {f"_orig_mod.{n}": t for n, t in s.items()}},
    "compiled and parallel": lambda s: {f"_orig_mod.module.{n}": t for n, t in s.items()},
    "parallel and compiled": lambda s: {"model_state_dict": {f"module._orig_mod.{n}": t for n, t in s.items()}},
    "parts compiled": lambda s: {n.replace("backbone.", "backbone._orig_mod.", 1): t for n, t in s.items()},
    "averaged": lambda s: {"n_averaged": torch.tensor(7), **{f"module.{n}": t for n, t in s.items()}},
    "lightning": lambda s: {"state_dict": {f"model.{n}": t for n, t in s.items()}},
    "lightning, compiled": lambda s: {"state_dict": {f"model._orig_mod.{n}": t for n, t in s.items()}},
}


@pytest.mark.parametrize("wrapping", WRAPPED)
@pytest.mark.parametrize("names", ["ours", "original"])
def test_wrappers_around_tensors_and_names(wrapping: str, names: str, detector: I3CL, tmp_path: Path) -> None:
    state = detector.state_dict() if names == "ours" else to_original(detector.state_dict())
    torch.save(WRAPPED[wrapping](state), tmp_path / "w.pth")
    torch.manual_seed(1)
    other = I3CL(detector.settings)
    report = load_weights(other, tmp_path / "w.pth")
    assert not report.missing and set(report.unexpected) <= {"n_averaged"}
    assert all(a.equal(b) for a, b in zip(detector.state_dict().values(), other.state_dict().values(), strict=True))


@pytest.mark.parametrize("wrapping", WRAPPED)
def test_wrappers_around_a_backbone(wrapping: str, detector: I3CL, tmp_path: Path) -> None:
    state = detector.backbone.body.state_dict()
    torch.save(WRAPPED[wrapping](state), tmp_path / "w.pth")
    body = Backbone(BackboneSettings(name="resnet10t", weights=str(tmp_path / "w.pth")))
    assert body.report is not None and not body.report.missing and set(body.report.unexpected) <= {"n_averaged"}
    assert all(a.equal(b) for a, b in zip(state.values(), body.body.state_dict().values(), strict=True))


def test_the_content_counts_and_not_the_ending(tmp_path: Path) -> None:
    tensors = {"a": torch.arange(3.0)}
    save_file(tensors, tmp_path / "w.pth")
    torch.save({"state_dict": tensors}, tmp_path / "w.safetensors")
    for name in ("w.pth", "w.safetensors"):
        assert read_tensors(tmp_path / name)["a"].equal(tensors["a"])


def test_files_without_tensors_name_their_keys(tmp_path: Path) -> None:
    torch.save({"epoch": 3, "student": {"a": torch.zeros(1)}}, tmp_path / "w.pth")
    with pytest.raises(UserError, match=r"holds no named tensors.*its keys are 'epoch', 'student'"):
        read_tensors(tmp_path / "w.pth")
    with pytest.raises(UserError, match="is a folder"):
        read_tensors(tmp_path)


def test_names_that_would_become_equal_stay() -> None:
    both = {"_orig_mod.a": torch.zeros(1), "a": torch.ones(1)}
    assert plain_names(both).keys() == both.keys()
    some = {"module.a": torch.zeros(1), "head.a": torch.ones(1)}
    assert plain_names(some).keys() == some.keys()


def test_whole_numbers_are_no_weights():
    from i3cl.model.checkpoint import load_tensors

    module = torch.nn.Linear(2, 1)
    report = load_tensors(module, {"weight": torch.ones(1, 2), "bias": torch.zeros(1, dtype=torch.int8)}, "w.pth")
    assert report.missing == ["bias"]

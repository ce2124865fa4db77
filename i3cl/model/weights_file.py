"""Reads the named tensors of a weights file, whoever wrote it. Nothing from the file is run.

What is not a weights file (a Git LFS pointer, a web page, half a download) is called by its name.
"""

from __future__ import annotations

import argparse
import os
import re
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from i3cl.errors import UserError

WRAPPERS = ("state_dict", "model_state_dict", "model", "module", "network", "net", "weights", "params", "model_ema", "ema")
"""Keys under which training scripts store the tensors, the first that holds some is taken; they may be nested."""
PARALLEL = "module."
"""What DataParallel and DistributedDataParallel put in front of every name."""
WITHIN = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")
"""What torch.compile, FSDP and activation checkpointing put into the names, in front or in the middle."""

_NUMPY_SCALAR: Any = np.float64(0).__reduce__()[0]
_PLAIN: list[Callable[..., Any] | tuple[Callable[..., Any], str]] = [
    argparse.Namespace,
    np.dtype,
    *(type(np.dtype(kind)) for kind in ("f4", "f8", "i4", "i8", "?")),
    (_NUMPY_SCALAR, "numpy.core.multiarray.scalar"),
    (_NUMPY_SCALAR, "numpy._core.multiarray.scalar"),
]
"""Harmless things that training scripts store beside the tensors (arguments, numpy's numbers), allowed in addition to those that
torch allows by itself."""

_ZIP = b"PK\x03\x04"
_TAR_MAGIC = 257
_KINDS: tuple[tuple[bytes, str], ...] = (
    (b"\x89HDF\r\n\x1a\n", "is an HDF5 file, as Keras writes them, and not a file of PyTorch tensors"),
    (b"\x1f\x8b", "is compressed with gzip; unpack it first"),
    (b"BZh", "is compressed with bzip2; unpack it first"),
    (b"\xfd7zXZ\x00", "is compressed with xz; unpack it first"),
    (b"7z\xbc\xaf\x27\x1c", "is a 7z archive; unpack it first"),
    (b"Rar!", "is a rar archive; unpack it first"),
)
"""First bytes -> what such a file is."""


def read_tensors(path: str | os.PathLike[str], source: str | None = None) -> dict[str, Tensor]:
    """Named tensors of a safetensors or torch file, on the CPU, without the wrappers around them and around their names.

    source: the file's name in messages; None: the path. Only tensors and plain containers are unpickled. Raises
    UserError when the file does not exist, is something else (the message says what), is damaged, or holds other
    objects.
    """
    path, source = Path(path), source or str(path)
    if path.is_dir():
        raise UserError(f"{source}: is a folder; give the weights file in it")
    if not path.is_file():
        raise UserError(f"{source}: no such weights file")
    start = _first_bytes(path)
    kind = _what_else(start, path.stat().st_size)
    if kind:
        raise UserError(f"{source}: {kind}")
    if _is_safetensors(start) or (path.suffix == ".safetensors" and not start.startswith((_ZIP, b"\x80"))):
        try:
            content: Any = load_file(path)
        except (SafetensorError, OSError) as error:
            raise UserError(f"{source}: not a readable safetensors file ({error}); download or copy it again") from error
    else:
        content = _read_torch(path, source, start)
    return plain_names(_tensors(content, source))


def plain_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors without the parts of their names that torch's wrappers add: `_orig_mod.`, `module.` and the like.

    `module.` goes only where every name begins with it (a counter of averaged weights aside). Names that would become
    equal stay as they are.
    """
    renamed = {name: re.sub("|".join(map(re.escape, WITHIN)), "", name) for name in tensors}
    counted = [name for name in renamed.values() if name != "n_averaged"]
    while counted and all(name.startswith(PARALLEL) and name != PARALLEL for name in counted):
        renamed = {name: new.removeprefix(PARALLEL) for name, new in renamed.items()}
        counted = [name.removeprefix(PARALLEL) for name in counted]
    if len(set(renamed.values())) < len(tensors):
        return dict(tensors)
    return {renamed[name]: tensor for name, tensor in tensors.items()}


def _first_bytes(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(512)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error


def _is_safetensors(start: bytes) -> bool:
    return start[8:9] == b"{" and 0 < int.from_bytes(start[:8], "little") < 100 << 20


def _what_else(start: bytes, size: int) -> str | None:
    """What a file is that begins with `start` and surely is not a weights file; None when it may be one."""
    if not size:
        return "is empty; download or copy it again"
    if start.startswith(b"version https://git-lfs.github.com/spec/"):
        stored = re.search(rb"\nsize (\d+)", start)
        of = f" (of {int(stored[1]) / 1e6:.0f} MB)" if stored else ""
        return f"is a Git LFS pointer, not the weights{of}: run `git lfs pull` in its repository, or download the file itself"
    text = start.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    if text.startswith((b"<!doctype html", b"<html", b"<head", b"<body")) or (text.startswith(b"<") and b"<html" in text):
        return "is a web page, not the weights: the download gave an error, a login or a preview page; download the file itself"
    if text.startswith(b"<?xml") or (text.startswith(b"<") and b">" in text):
        return "is an XML or HTML text, not the weights: the download probably gave an error message; download the file itself"
    for magic, kind in _KINDS:
        if start.startswith(magic):
            return kind
    if not _is_safetensors(start) and text and all(32 <= byte < 127 or byte in b"\t\r\n" for byte in start):
        shown = " ".join(start[:60].decode("ascii").split())
        return f"is a text file, not the weights; it begins with {shown!r}"
    return None


def _read_torch(path: Path, source: str, start: bytes) -> Any:
    """What torch.save stored. The texts of torch's own errors are not shown: they advise to unpickle everything."""
    try:
        # From an open file: torch judges a path by its ending.
        with path.open("rb") as file, torch.serialization.safe_globals(_PLAIN), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of pickles that torch did not write; the message below says so
            return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:
        text = str(error)
        refused = re.search(r"GLOBAL:? ?`?([\w.]+)`?", text)
        if refused:
            kind = (
                f"holds a {refused[1]} beside its tensors, which could run code and is not opened; ask its author for a "
                ".safetensors file, or for one with the tensors alone"
            )
        elif "TorchScript" in text:
            kind = "is a TorchScript program, which could run code; ask its author for a .safetensors file"
        elif isinstance(error, EOFError) or "central directory" in text or "unexpected EOF" in text:
            kind = "cannot be read: it is incomplete or damaged; download or copy it again"
        elif start.startswith(_ZIP):
            kind = "is a zip archive that torch did not write, or it is damaged; unpack it, or download it again"
        elif start[_TAR_MAGIC : _TAR_MAGIC + 5] == b"ustar":
            kind = "is a tar archive; unpack it first"
        elif start.startswith(b"\x80"):
            kind = (
                "cannot be read as a file of tensors: it is a Python pickle with other content, which could run code, or it is "
                "damaged"
            )
        else:
            kind = f"cannot be read as a file of tensors: it is damaged or another kind of file (it begins with {start[:8]!r})"
        raise UserError(f"{source}: {kind}") from error


def _tensors(content: Any, source: str) -> dict[str, Tensor]:
    """The first dict of named tensors in `content`, at its top or under one of WRAPPERS."""
    found = _inside(content)
    if found:
        return found
    keys = f"; its keys are {', '.join(map(repr, list(content)[:8]))}" if isinstance(content, Mapping) and content else ""
    raise UserError(f"{source}: holds no named tensors (looked at its top and under {', '.join(WRAPPERS)}){keys}")


def _inside(content: Any, depth: int = 3) -> dict[str, Tensor]:
    if not isinstance(content, Mapping):
        return {}
    for key in WRAPPERS if depth else ():
        found = _inside(content.get(key), depth - 1)
        if found:
            return found
    return {name: value for name, value in content.items() if isinstance(name, str) and isinstance(value, Tensor)}

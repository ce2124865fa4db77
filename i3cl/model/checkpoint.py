"""Weights on disk: safetensors beside the settings that the model was built with. Nothing is unpickled."""

from __future__ import annotations

import argparse
import os
import re
import shutil
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from i3cl.errors import UserError
from i3cl.model.original import to_our_names

WEIGHTS = "weights.safetensors"
SETTINGS = "settings.yaml"
STATE = "training"
"""Folder of a checkpoint that only continuing a run needs; prediction ignores it."""
OPTIONAL = ("intra.", "heads.inter.")
"""Modules that may start from scratch on top of a detector trained without them."""

_NUMPY_SCALAR: Any = np.float64(0).__reduce__()[0]
_PLAIN: list[Callable[..., Any] | tuple[Callable[..., Any], str]] = [
    argparse.Namespace,
    np.dtype,
    *(type(np.dtype(kind)) for kind in ("f4", "f8", "i4", "i8", "?")),
    (_NUMPY_SCALAR, "numpy.core.multiarray.scalar"),
    (_NUMPY_SCALAR, "numpy._core.multiarray.scalar"),
]
"""Harmless things that training scripts of others store beside the tensors (arguments, numpy's numbers), added to those that
torch allows by itself."""


@dataclass(frozen=True)
class LoadReport:
    """What became of the tensors of a file."""

    loaded: list[str] = field(default_factory=list)
    """Names of the model that were found."""
    missing: list[str] = field(default_factory=list)
    """Names of the model that keep the values they had; a name of another shape is here and under `unexpected`."""
    unexpected: list[str] = field(default_factory=list)
    """Names of the file that were not used."""

    def __str__(self) -> str:
        text = f"{len(self.loaded)} tensors loaded"
        for word, names in (("new", self.missing), ("left over", self.unexpected)):
            if names:
                shown = names if len(names) <= 4 else [f"{part} ({count})" for part, count in _parts(names).items()]
                text += f"; {len(names)} {word}: {', '.join(shown)}"
        return text


def _parts(names: list[str]) -> Counter[str]:
    """How many of the tensors lie in each part of the network: 'intra', 'heads.inter', ..."""
    split = [name.split(".") for name in names]
    return Counter(".".join(name[: 1 if name[1:2] and name[1].isdigit() else 2]) for name in split)


def save_checkpoint(model: nn.Module, directory: str | os.PathLike[str], settings_yaml: str) -> Path:
    """Writes weights.safetensors and settings.yaml into `directory`, complete or not at all; an older one is
    replaced.

    settings_yaml: the text of the resolved settings. Returns the directory.
    """
    directory = Path(directory)
    directory.parent.mkdir(parents=True, exist_ok=True)
    making = directory.with_name(f".{directory.name}.{uuid4().hex}")
    making.mkdir()
    try:
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
        save_file(tensors, making / WEIGHTS)
        (making / SETTINGS).write_text(settings_yaml, encoding="utf-8")
        if directory.exists():
            old = directory.with_name(f".{directory.name}.{uuid4().hex}.old")
            directory.rename(old)
            making.rename(directory)
            shutil.rmtree(old)
        else:
            making.rename(directory)
    finally:
        shutil.rmtree(making, ignore_errors=True)
    return directory


def read_tensors(path: str | os.PathLike[str], source: str | None = None) -> dict[str, Tensor]:
    """Named tensors of a .safetensors file or a torch file ('state_dict' or 'model' inside is opened).

    source: the file's name in messages; None: the path. Nothing but tensors and plain containers is unpickled:
    raises UserError when the file does not exist, cannot be read or holds other objects.
    """
    path, source = Path(path), source or str(path)
    if not path.is_file():
        raise UserError(f"{source}: no such weights file")
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except (SafetensorError, OSError) as error:
            raise UserError(f"{source}: not a readable safetensors file ({error})") from error
    try:
        with torch.serialization.safe_globals(_PLAIN):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        refused = re.search(r"GLOBAL:? ?`?([\w.]+)`?", str(error))
        if refused:
            raise UserError(
                f"{source}: holds a {refused[1]} beside its tensors, which could run code and is not opened; whoever trusts "
                f"the file can write its tensors alone: torch.save({{'state_dict': ...}}, ...)"
            ) from error
        raise UserError(f"{source}: cannot be read as a file of tensors ({str(error).splitlines()[0]})") from error
    for key in ("state_dict", "model"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    tensors = {k: v for k, v in content.items() if isinstance(v, Tensor)} if isinstance(content, Mapping) else {}
    if not tensors:
        raise UserError(f"{source}: holds no named tensors")
    return tensors


def load_tensors(module: nn.Module, tensors: Mapping[str, Tensor], source: str, optional: tuple[str, ...] = ()) -> LoadReport:
    """Copies the tensors whose name and shape fit into `module`.

    Raises UserError, naming `source`, when less than half of the module's tensors are found; names that begin
    with one of `optional` are not counted, nor are BatchNorm's counters, which some files leave out.
    """
    own = module.state_dict()
    loaded = [name for name, value in own.items() if name in tensors and tensors[name].shape == value.shape]
    fitting = set(loaded)
    weights = [name for name in own if not name.endswith("num_batches_tracked")]
    needed = [name for name in weights if not optional or not name.startswith(optional)]
    found = sum(name in fitting for name in needed)
    if 2 * found < len(needed):
        raise UserError(
            f"{source}: only {found} of the network's {len(needed)} tensors are in it; its names look like "
            f"'{_example(tensors)}', the network's like '{_example(own)}'. Is it another network's?"
        )
    module.load_state_dict({name: tensors[name] for name in loaded}, strict=False)
    return LoadReport(
        loaded,
        [name for name in weights if name not in fitting],
        [name for name in tensors if name not in fitting],
    )


def _example(names: Mapping[str, Tensor]) -> str:
    """A name from the middle, which says more than the first: that is often a stem's."""
    return list(names)[len(names) // 2] if names else ""


def load_weights(model: nn.Module, source: str | os.PathLike[str]) -> LoadReport:
    """Loads a checkpoint directory or a weights file (ours, the original release's, torchvision's) into the model.

    Raises UserError when nothing readable is there, it computes otherwise, or less than half of the model's
    tensors fit.
    """
    path = Path(source)
    if path.is_dir():
        path = path / WEIGHTS
    return load_tensors(model, to_our_names(read_tensors(path), str(path)), str(path), OPTIONAL)

"""Weights on disk: safetensors beside the settings that the model was built with. Nothing is unpickled."""

from __future__ import annotations

import os
import shutil
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from uuid import uuid4

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from i3cl.config import UserError

WEIGHTS = "weights.safetensors"
SETTINGS = "settings.yaml"
OPTIONAL = ("intra.", "heads.inter.")
"""Modules that may start from scratch on top of a detector trained without them."""


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


def read_tensors(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Named tensors of a .safetensors file or a torch file (weights only; 'state_dict' or 'model' inside is
    opened).

    Raises UserError when the file does not exist, cannot be read or holds more than tensors.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such weights file")
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path}: not a readable safetensors file ({error})") from error
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise UserError(f"{path}: cannot be read as plain tensors ({str(error).splitlines()[0]})") from error
    for key in ("state_dict", "model"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    tensors = {k: v for k, v in content.items() if isinstance(v, Tensor)} if isinstance(content, Mapping) else {}
    if not tensors:
        raise UserError(f"{path}: holds no named tensors")
    return tensors


def load_tensors(
    module: nn.Module, tensors: Mapping[str, Tensor], source: str, optional: tuple[str, ...] = ()
) -> LoadReport:
    """Copies the tensors whose name and shape fit into `module`.

    Raises UserError, naming `source`, when less than half of the module's tensors are found; names that begin
    with one of `optional` are not counted.
    """
    own = module.state_dict()
    loaded = [name for name, value in own.items() if name in tensors and tensors[name].shape == value.shape]
    needed = {name for name in own if not name.startswith(optional)} if optional else set(own)
    found = len(needed.intersection(loaded))
    if 2 * found < len(needed):
        raise UserError(
            f"{source}: only {found} of the network's {len(needed)} tensors fit; is it another network's?"
        )
    fitting = set(loaded)
    module.load_state_dict({name: tensors[name] for name in loaded}, strict=False)
    return LoadReport(
        loaded,
        [name for name in own if name not in fitting],
        [name for name in tensors if name not in fitting],
    )


def load_weights(model: nn.Module, source: str | os.PathLike[str]) -> LoadReport:
    """Loads a checkpoint directory or a weights file (ours, or one of the original release) into the model.

    Raises UserError when nothing readable is there or less than half of the model's tensors fit.
    """
    from i3cl.model.original import from_original, is_original

    path = Path(source)
    if path.is_dir():
        path = path / WEIGHTS
    tensors = read_tensors(path)
    if is_original(tensors):
        tensors = from_original(tensors)
    return load_tensors(model, tensors, str(path), OPTIONAL)

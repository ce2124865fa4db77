"""Checkpoint directories: the weights as safetensors, and beside them the settings that the model was built with."""

from __future__ import annotations

import os
import shutil
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from uuid import uuid4

from safetensors.torch import save_file
from torch import Tensor, nn

from i3cl.errors import UserError
from i3cl.model.original import to_our_names
from i3cl.model.weights_file import read_tensors

WEIGHTS = "weights.safetensors"
SETTINGS = "settings.yaml"
STATE = "training"
"""Folder of a checkpoint with the state needed only to resume training; prediction ignores it."""
OPTIONAL = ("intra.", "heads.inter.")
"""Beginnings of the names of modules that may start from scratch on top of a detector that was trained without them."""


@dataclass(frozen=True)
class LoadReport:
    """Which tensors of a file were loaded into a model, and which were not."""

    loaded: list[str] = field(default_factory=list)
    """The model's tensors that were found in the file."""
    missing: list[str] = field(default_factory=list)
    """The model's tensors that keep their values; one whose shape differs is listed here and under `unexpected`."""
    unexpected: list[str] = field(default_factory=list)
    """Tensors of the file that were not used."""

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
    """Writes weights.safetensors and settings.yaml into `directory`, either both or neither, and replaces an older one.

    settings_yaml: the text of the resolved settings. Returns the directory. UserError when a value is not finite: such weights
    find nothing, and a checkpoint that can be used would be replaced by them.
    """
    directory = Path(directory)
    if broken := _not_finite(model.state_dict()):
        raise UserError(
            f"{directory}: not saved, because {broken[0]} holds values that are not finite; lower train.learning_rate or "
            "train.gradient_clip"
        )
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


def check_finite(tensors: Mapping[str, Tensor], source: str) -> None:
    """UserError, naming `source`, when a tensor holds infinities or NaN."""
    if broken := _not_finite(tensors):
        raise UserError(
            f"{source}: {len(broken)} tensors hold values that are not finite, e.g. {broken[0]}; the training that wrote it "
            "failed, or its numbers did not fit into float16; take another checkpoint"
        )


def _not_finite(tensors: Mapping[str, Tensor]) -> list[str]:
    return [name for name, tensor in tensors.items() if not bool(tensor.isfinite().all())]


def load_tensors(module: nn.Module, tensors: Mapping[str, Tensor], source: str, optional: tuple[str, ...] = ()) -> LoadReport:
    """Copies into `module` the tensors whose name and shape fit.

    Raises UserError, naming `source`, when less than half of the module's tensors are found or one of these holds infinities or
    NaN. Names that begin with one of `optional` do not count for the half, and neither do BatchNorm's counters, which some files
    leave out.
    """
    own = module.state_dict()
    loaded = [name for name, value in own.items() if name in tensors and _fits(tensors[name], value)]
    fitting = set(loaded)
    weights = [name for name in own if not name.endswith("num_batches_tracked")]
    needed = [name for name in weights if not optional or not name.startswith(optional)]
    found = sum(name in fitting for name in needed)
    if 2 * found < len(needed):
        raise UserError(
            f"{source}: holds only {found} of the network's {len(needed)} tensors, so it seems to belong to another network; "
            f"its names look like '{_example(tensors)}', the network's like '{_example(own)}'"
        )
    check_finite({name: tensors[name] for name in loaded}, source)
    module.load_state_dict({name: tensors[name] for name in loaded}, strict=False)
    return LoadReport(
        loaded,
        [name for name in weights if name not in fitting],
        [name for name in tensors if name not in fitting],
    )


def _fits(given: Tensor, own: Tensor) -> bool:
    """Whether a tensor has the shape and kind of number of the model's own: quantised weights are whole numbers."""
    return given.shape == own.shape and given.is_floating_point() == own.is_floating_point()


def _example(names: Mapping[str, Tensor]) -> str:
    """A name from the middle, which says more than the first: that one often belongs to the stem."""
    return list(names)[len(names) // 2] if names else ""


def load_weights(model: nn.Module, source: str | os.PathLike[str]) -> LoadReport:
    """Loads a local checkpoint directory or weights file (ours, the original release's or torchvision's) into the model.

    Raises UserError when the file is missing or unreadable, belongs to a detector that computes something else, or fits
    less than half of the model's tensors.
    """
    path = Path(source)
    if path.is_dir():
        path = path / WEIGHTS
    return load_tensors(model, to_our_names(read_tensors(path), str(path)), str(path), OPTIONAL)

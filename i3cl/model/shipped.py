"""Where checkpoints are: those of `i3cl/weights` come with the package and are known by their names. Needs no torch."""

from __future__ import annotations

from pathlib import Path

from i3cl.errors import UserError

_WEIGHTS = Path(__file__).parents[1] / "weights"
DEFAULT = "lite0-scene"
"""The one that is taken where none is named."""


def names() -> list[str]:
    """Names of the detectors in the package."""
    return sorted(settings.parent.name for settings in _WEIGHTS.glob("*/settings.yaml"))


def is_shipped(checkpoint: str) -> bool:
    """Whether this is the name of a detector in the package. A path always has a slash or another name."""
    return checkpoint in names()


def folder_of(checkpoint: str) -> str:
    """The directory of a detector in the package by its name; anything else is a path or URL already and comes back as it is.

    Names travel to other machines as names, because the package may lie elsewhere there.
    """
    return str(_WEIGHTS / checkpoint) if is_shipped(checkpoint) else checkpoint


def not_a_checkpoint(given: str, lacks: str = "settings.yaml") -> UserError:
    """The mistake of giving something, as the user named it, that has not the files of a checkpoint directory."""
    return UserError(f"{given}: not a checkpoint directory (it has no {lacks}); give one that train.py wrote")

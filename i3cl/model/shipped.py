"""The detectors that come with the package: checkpoint directories of `i3cl/weights`, known by their names."""

from __future__ import annotations

from pathlib import Path

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

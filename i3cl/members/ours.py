"""Our own detector as a member of an ensemble."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

import numpy as np
from numpy.typing import NDArray

from i3cl import storage
from i3cl.claims import CHECKPOINT_FILES, content_hash
from i3cl.config import MemberSettings, ViewSettings
from i3cl.detections import Detections
from i3cl.errors import UserError
from i3cl.members.adapting import read_options
from i3cl.members.member import Granularity, Member, Place
from i3cl.model.shipped import folder_of, is_shipped, not_a_checkpoint

if TYPE_CHECKING:
    from i3cl.inference.predictor import Predictor

_HEADER_BYTES = 100_000_000
"""The longest header that safetensors reads."""


class OurMember(Member):
    """A checkpoint of this project, at its own test size and tiles unless others are given, in every view."""

    granularity: ClassVar[Granularity] = "word"
    takes_views: ClassVar[bool] = True
    takes_turns: ClassVar[bool] = True
    licence: ClassVar[str] = "code and the packaged weights Apache-2.0; your own checkpoints are yours"
    about: ClassVar[str] = "I3CL: words. weights: a checkpoint directory, or the name of a detector in the package"

    @classmethod
    def fingerprint(cls, settings: MemberSettings) -> str:
        """As `Member.fingerprint`: SHA-256 of the checkpoint's settings and weights."""
        return checkpoint_hash(located(cls._checkpoint(settings)))

    @classmethod
    def load(cls, settings: MemberSettings, place: Place) -> OurMember:
        """As `Member.load`."""
        checkpoint = located(cls._checkpoint(settings))
        # Here, because it needs torch, and a fingerprint does not.
        from i3cl.inference.predictor import Predictor

        return cls(Predictor.load(checkpoint, place.device, place.given, turn=place.turn))

    @staticmethod
    def _checkpoint(settings: MemberSettings) -> str:
        read_options(settings, {})
        if settings.weights is None:
            raise UserError("weights: give a checkpoint directory, or the name of a detector in the package")
        return settings.weights

    def __init__(self, predictor: Predictor) -> None:
        """predictor: of the checkpoint, on its device."""
        self.predictor = predictor

    def __call__(self, images: Sequence[NDArray[np.uint8]], view: ViewSettings) -> list[Detections]:
        """As `Member.__call__`."""
        return self.predictor(images, view)


def located(checkpoint: str) -> str:
    """A path as it is known in every process: absolute, or the name of a detector in the package."""
    return checkpoint if is_shipped(checkpoint) else storage.absolute(checkpoint)


def checkpoint_hash(checkpoint: str) -> str:
    """SHA-256 of the settings and weights of a checkpoint directory, or of a detector in the package.

    UserError when it is not a checkpoint directory or its weights are not safetensors.
    """
    path = folder_of(checkpoint)
    for name in CHECKPOINT_FILES:
        if not storage.is_file(storage.join(path, name)):
            raise not_a_checkpoint(checkpoint, name)
    _check_weights(storage.join(path, CHECKPOINT_FILES[1]))
    return content_hash(path)


def weights_bytes(checkpoint: str) -> int:
    """Size of a checkpoint's weights."""
    with storage.open_read(storage.join(folder_of(checkpoint), CHECKPOINT_FILES[1])) as stream:
        return stream.seek(0, 2)


def _check_weights(file: str) -> None:
    """UserError when a file does not start as safetensors do. Checked here, before actors start and fail on it."""
    with storage.open_read(file) as stream:
        size = int.from_bytes(stream.read(8), "little")
        try:
            ok = 2 <= size <= _HEADER_BYTES and isinstance(json.loads(stream.read(size)), dict)
        except ValueError:
            ok = False
    if not ok:
        raise UserError(f"{file}: not a readable safetensors file; give a checkpoint that train.py or prepare.py convert wrote")

"""Our own detector as a member of an ensemble, and the hash by which a checkpoint is known."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from i3cl import storage
from i3cl.claims import CHECKPOINT_FILES, content_hash
from i3cl.config import MemberSettings, ViewSettings
from i3cl.detections import Detections
from i3cl.errors import UserError
from i3cl.members.member import Member, Place
from i3cl.model.shipped import folder_of, is_shipped, not_a_checkpoint

if TYPE_CHECKING:
    from i3cl.inference.predictor import Predictor

_HEADER_BYTES = 100_000_000
"""The longest header that safetensors reads."""


class OurMember(Member):
    """A checkpoint of I3CL, at the test size and in the tiles of its recipe or of the user."""

    takes_views = True
    licence = "of the project; a checkpoint's weights are its owner's"
    about = "I3CL; weights: a checkpoint directory, local or s3://, or the name of a detector in the package"

    def __init__(self, predictor: Predictor) -> None:
        self.predictor = predictor

    @classmethod
    def fingerprint(cls, settings: MemberSettings) -> str:
        """As `checkpoint_hash`."""
        if settings.options:
            raise UserError(f"options: i3cl has none, not {next(iter(settings.options))}; use data.test_short_side and the like")
        assert settings.weights is not None
        return checkpoint_hash(settings.weights)

    @classmethod
    def load(cls, settings: MemberSettings, place: Place) -> OurMember:
        """The network of the checkpoint."""
        from i3cl.inference.predictor import Predictor

        assert settings.weights is not None
        return cls(Predictor.load(settings.weights, place.device, place.given))

    def __call__(self, images: Sequence[NDArray[np.uint8]], view: ViewSettings) -> list[Detections]:
        """Detections of each image in one view."""
        return self.predictor(images, view)


def located(checkpoint: str) -> str:
    """A checkpoint as any process finds it: an absolute path or URL, or the name of a detector in the package."""
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

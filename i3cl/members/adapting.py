"""What the adapters of other people's detectors share: options, packages, weights files, and polygons as `Detections`.

Every message of a `UserError` here begins with the key of the member's settings that it is about: use, weights or options.
Nothing here needs torch.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np
from numpy.typing import NDArray

from i3cl import storage
from i3cl.claims import content_hash
from i3cl.config import MemberSettings
from i3cl.detections import Detections
from i3cl.errors import UserError
from i3cl.geometry import clip_polygon, clockwise, polygon_area

if TYPE_CHECKING:
    from torch import Tensor, nn

Value = bool | int | float | str
_THIN = 16
"""Images are made at least one part in this many as wide as they are high, and the other way round."""


@dataclass(frozen=True)
class Option:
    """One key of label.members.NAME.options. The type of its default is the type of its values."""

    default: Value
    about: str
    """One line: unit and meaning."""
    low: float = -math.inf
    """Least value of a number ..."""
    high: float = math.inf
    """... and greatest."""
    choices: tuple[str, ...] = ()
    """The texts that are allowed, where it is a text."""

    def checked(self, key: str, value: Value) -> Value:
        """The value, a whole number turned into a float where floats are meant. UserError that says what is allowed."""
        kind = type(self.default)
        # For Python, True is a whole number; for a user it is not.
        if kind is float and type(value) is int:
            value = float(value)
        if type(value) is not kind:
            raise UserError(f"options.{key}: {value!r} is not {_KINDS[kind]}; {self._range()}")
        if self.choices and value not in self.choices:
            raise UserError(f"options.{key}: {value!r} is unknown; {self._range()}")
        if isinstance(value, int | float) and not self.low <= value <= self.high:
            raise UserError(f"options.{key}: {value:g} is out of range; {self._range()}")
        return value

    def _range(self) -> str:
        if self.choices:
            return f"there are {', '.join(self.choices)}"
        if self.low == -math.inf:
            return f"the default is {self.default}"
        return f"give {self.low:g} or more" if self.high == math.inf else f"give {self.low:g} to {self.high:g}"


_KINDS: dict[type, str] = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}


def read_options(settings: MemberSettings, known: Mapping[str, Option]) -> dict[str, Any]:
    """Every known option with its value: the given one, else the default. UserError for an unknown or impossible one."""
    for key in settings.options:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean {near[0]}? " if near else ""
            there = f"it has {', '.join(known)}" if known else "it has none"
            raise UserError(f"options.{key}: no option of {settings.use}; {hint}{there}")
    return {key: option.checked(key, settings.options.get(key, option.default)) for key, option in known.items()}


def installed(package: str) -> str | None:
    """Version of an installed distribution; None when it is not there. Imports nothing of it."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def require(use: str, packages: Iterable[str], command: str) -> dict[str, str]:
    """Package -> version. UserError that names the command which installs them, unless all are there. Imports nothing."""
    versions = {package: installed(package) for package in packages}
    missing = [package for package, version in versions.items() if version is None]
    if missing:
        raise UserError(f"use: {use} needs {' and '.join(missing)}, which is not installed here; {command}")
    return {package: str(version) for package, version in versions.items()}


def file_of(package: str, pattern: str) -> Path | None:
    """The file of an installed package whose path in it matches; None when there is none. Imports nothing of it.

    Only what was installed counts, not what the package has stored beside its files since. pattern: as for `PurePath.match`.
    """
    try:
        files = metadata.files(package) or []
    except metadata.PackageNotFoundError:
        return None
    found = sorted(Path(str(file.locate())) for file in files if file.match(pattern))
    return next((path for path in found if path.is_file()), None)


def weights_file(settings: MemberSettings, use: str, what: str) -> Path:
    """The local file that the settings name. what: what it should hold, for messages. UserError when it is not a file here."""
    if settings.weights is None:
        raise UserError(f"weights: {use} needs a local file, {what}; give label.members.NAME.weights=FILE")
    if storage.is_remote(settings.weights):
        raise UserError(f"weights: {settings.weights}: {use} takes a local file; copy it to every machine and give its path")
    path = Path(storage.absolute(settings.weights))
    if path.is_dir():
        raise UserError(f"weights: {path}: is a folder; {use} takes a file, {what}")
    if not path.is_file():
        raise UserError(f"weights: {path}: no such file; {use} takes {what}")
    return path


def fingerprint_of(use: str, revision: int, weights: Path, options: Mapping[str, Value], versions: Mapping[str, str]) -> str:
    """SHA-256, in hex, of all on which the findings depend.

    revision: of the adapter, raised when it finds something else with the same weights and options. weights: their file.
    """
    hashed = content_hash(str(weights))
    content = {"use": use, "revision": revision, "weights": hashed, "options": dict(options), "versions": dict(versions)}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def fill(network: nn.Module, tensors: Mapping[str, Tensor], file: Path, what: str) -> None:
    """Put the tensors into the network. UserError unless they are exactly its own; what: the network, for the message.

    Counters of BatchNorm may be missing: frozen layers have none.
    """
    own = network.state_dict()
    missing = [name for name in own if name not in tensors and not name.endswith("num_batches_tracked")]
    strange = [name for name in tensors if name not in own]
    shapes = [name for name in own if name in tensors and own[name].shape != tensors[name].shape]
    for names, problem in ((missing, "are missing"), (strange, "do not belong to it"), (shapes, "have another shape")):
        if names:
            raise UserError(
                f"weights: {file}: not the weights of {what}: {len(names)} tensors {problem}, e.g. {names[0]}; give its own file"
            )
    network.load_state_dict(dict(tensors), strict=False)


def grown(image: NDArray[np.uint8], least: int = 32) -> NDArray[np.uint8]:
    """The image, (H, W, 3), with its last row and column repeated until no side is under `least` pixels or very thin.

    Positions stay as they are. Without this a strip of 5 x 2000 pixels would be scaled to a side of nothing, or to a gigapixel.
    """
    height, width = image.shape[:2]
    least = max(least, -(-max(height, width) // _THIN))
    if min(height, width) >= least:
        return image
    below, beside = max(0, least - height), max(0, least - width)
    return np.asarray(cv2.copyMakeBorder(image, 0, below, 0, beside, cv2.BORDER_REPLICATE), np.uint8)


def quadrilateral(rectangle: Any) -> NDArray[np.float32]:
    """(4, 2) float32 corners of a rotated rectangle of OpenCV, clockwise on screen from the one nearest the top left."""
    corners = clockwise(np.asarray(cv2.boxPoints(rectangle), np.float32))
    return np.roll(corners, -int(corners.sum(axis=1).argmin()), axis=0)


def as_detections(
    polygons: Sequence[NDArray[np.float32]], scores: Sequence[float] | NDArray[np.floating], image: NDArray[np.uint8]
) -> Detections:
    """What was found, cut off at the edges of the image (H, W, 3); what lies outside or has no area is left out.

    polygons: N arrays (K, 2) of x, y in its pixels. scores: (N,), limited to 0-1.
    """
    height, width = image.shape[:2]
    kept, values = [], []
    for polygon, score in zip(polygons, scores, strict=True):
        inside = clip_polygon(polygon, width, height)
        if inside is not None and polygon_area(inside) > 0:
            kept.append(inside)
            values.append(min(1.0, max(0.0, float(score))))
    return Detections(kept, np.array(values, np.float32), height=height, width=width)

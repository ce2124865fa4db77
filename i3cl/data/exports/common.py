"""What the formats share: what a format is, labels, names of images, exact decimals, and what a reader of corrections gives.

A new format is a file with a `write` function (and a `read` function when people can correct labels in it), a ``Format`` of
them, and one line in registry.py.
"""

from __future__ import annotations

import json
import logging
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from i3cl import storage
from i3cl.data.formats.checks import is_companion, shown
from i3cl.data.formats.records import ImageRecord, Instance
from i3cl.errors import UserError

logger = logging.getLogger(__name__)

TEXT = "text"
"""Label of a text instance; every other label is an ignore region."""
IGNORE = "ignore"
"""Label that ignore regions get."""
UNREADABLE = "###"
"""Transcription that marks an ignore region where a format has no labels."""


@dataclass(frozen=True)
class ExportOptions:
    """What the user can choose about an export; each format uses what applies to it."""

    prefix: str = ""
    """Stands before the file names in review formats."""
    confidence: bool = True
    """Whether text results have a score in each line."""
    from_name: str = "label"
    """Label Studio: name of the labels in the project's labelling interface."""
    to_name: str = "image"
    """Label Studio: name of the image there."""


@dataclass(frozen=True)
class Format:
    """A format that labels can be exported to, and perhaps corrected in."""

    write: Callable[[str, Iterable[ImageRecord], ExportOptions], str]
    """Writes the records to a path, atomically, and returns what was written in a few words, e.g. '12 images'."""
    read: Callable[[str], Iterator[Reviewed]] | None = None
    """Reads the images that a person has corrected; None: labels do not come back from this format."""
    score: float | None = None
    """Instances with a score up to this are left out unless the user gives another threshold."""


@dataclass(frozen=True)
class Region:
    """One region that a person drew, or saw and left as it was."""

    points: Any
    """List of x0, y0, x1, y1, ... in pixels, not yet checked."""
    label: Any = TEXT
    text: str | None = None
    fault: str | None = None
    """Why it cannot be used, e.g. a brush stroke."""
    more_parts: tuple[Any, ...] = ()
    """Further parts of the same instance, each like `points`."""


@dataclass(frozen=True)
class Reviewed:
    """One image that a person has looked at, as the other tool exported it."""

    name: str
    """As the file names it; ``ImageNames.find`` knows which image it is."""
    where: str
    """File and item, for messages."""
    regions: Sequence[Region] = ()
    width: int | None = None
    """Pixels, where the format says so."""
    height: int | None = None
    percent: bool = field(default=False)
    """Points are percent of width and height, not pixels."""


def label_of(instance: Instance) -> str:
    """``TEXT`` or ``IGNORE``."""
    return IGNORE if instance.ignore else TEXT


def points_of(instance: Instance) -> list[list[float]]:
    """[[x, y], ...] in the shortest decimals that give the same float32 numbers back."""
    flat = [float(str(v)) for v in np.asarray(instance.polygon, np.float32).ravel()]
    return [list(pair) for pair in zip(flat[::2], flat[1::2], strict=True)]


def flat_points(points: Any) -> Any:
    """[[x, y], ...] as one flat list; anything else is returned as it is, and refused by the check later."""
    if isinstance(points, list) and all(isinstance(p, list) and len(p) == 2 for p in points):
        return [value for point in points for value in point]
    return [points] if not isinstance(points, list) else points


def are_numbers(values: Iterable[Any]) -> bool:
    """Whether all are numbers of a usable size: json may hold NaN and whole numbers of any length."""
    return all(isinstance(v, int | float) and not isinstance(v, bool) and -1e9 < v < 1e9 for v in values)


def box_points(x0: float, y0: float, x1: float, y1: float, degrees: float = 0.0, about: Sequence[float] = ()) -> list[float]:
    """A box as a flat polygon x0, y0, ..., turned clockwise on screen by `degrees` about the point `about`."""
    corners: NDArray[np.float64] = np.array([[x0, y0], [x1, y0], [x1, y1], [x0, y1]], np.float64)
    if degrees:
        turn = np.deg2rad(degrees)
        matrix = np.array([[np.cos(turn), np.sin(turn)], [-np.sin(turn), np.cos(turn)]])
        corners = (corners - about) @ matrix + about
    return [float(v) for v in corners.ravel()]


def with_size(records: Iterable[ImageRecord]) -> Iterator[ImageRecord]:
    """The records without images of unknown size: those that could not be read when they were predicted. Logs which these are."""
    left_out = []
    for record in records:
        if record.height and record.width:
            yield record
        else:
            left_out.append(record.file_name)
    if left_out:
        names = ", ".join(left_out[:5]) + (", ..." if len(left_out) > 5 else "")
        logger.info("left out %d images that could not be read when they were predicted: %s", len(left_out), names)


def dumps(value: Any) -> str:
    """JSON in one line, in UTF-8 without escapes. ValueError for NaN."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False)


class ImageNames:
    """Finds the image that another tool means: tools put a prefix or an upload code before a file name."""

    def __init__(self, names: Iterable[str], base: str, prefix: str = "") -> None:
        self.base, self.prefix = base, prefix
        self.names = set(names)
        self._ends: Mapping[str, list[str]] | None = None

    def find(self, name: str, where: str) -> str:
        """The file name in the base set. UserError when none or several fit."""
        if self.prefix and name.startswith(self.prefix):
            name = name[len(self.prefix) :]
        if name in self.names:
            return name
        if self._ends is None:
            ends: dict[str, list[str]] = {}
            for known in self.names:
                ends.setdefault(_composed(PurePosixPath(known).name), []).append(known)
            self._ends = ends
        name = _composed(name.replace("\\", "/"))
        last = name.rsplit("/", 1)[-1]
        # Label Studio puts eight hexadecimal digits before the name of an uploaded file.
        for ending in (last, re.sub(r"^[0-9a-f]{8}-", "", last)):
            found = self._ends.get(ending, [])
            fitting = [known for known in found if ("/" + name).endswith("/" + _composed(known))] or found
            if len(fitting) > 1:
                raise UserError(f"{where}: image {shown(name)} may be {fitting[0]} or {fitting[1]}; give --image-url-prefix")
            if fitting:
                return fitting[0]
        raise UserError(f"{where}: image {shown(name)} is not in {self.base}; give the set that was exported")


def _composed(name: str) -> str:
    """A name with its accents in one form: macOS writes é as two characters, other systems as one."""
    return unicodedata.normalize("NFC", name)


def files_under(source: str, suffix: str) -> list[str]:
    """Sorted relative names of the files with this suffix in a folder, without hidden ones. UserError when there is none."""
    names = sorted(n for n in storage.list_files(source) if n.lower().endswith(suffix) and not is_companion(n))
    if not names:
        raise UserError(f"{source}: holds no {suffix} file; check the path")
    return names

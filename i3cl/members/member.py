"""What a detector must offer to take part in an ensemble: images in, `Detections` out.

Those that come with the project are named in `BUILT_IN`. Any installed package adds its own with a Python entry point in the
group `i3cl.members` whose value is a subclass of `Member`; docs/members.md shows one.
"""

from __future__ import annotations

import difflib
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from importlib import import_module
from importlib.metadata import entry_points
from inspect import isabstract
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from i3cl.config import MemberSettings, ViewSettings
from i3cl.detections import Detections
from i3cl.errors import UserError

Granularity = Literal["word", "line"]
ENTRY_POINTS = "i3cl.members"
OURS = "i3cl"
BUILT_IN = {
    OURS: "i3cl.members.ours:OurMember",
    "ppocr": "i3cl.members.ppocr:PPOCRMember",
    "craft": "i3cl.members.craft:CRAFTMember",
    "doctr": "i3cl.members.doctr:DocTRMember",
    "torchvision": "i3cl.members.torchvision:TorchvisionMember",
}
"""Name, as label.members.NAME.use gives it -> module and class. Imported only when a job asks for it."""


@dataclass(frozen=True)
class Place:
    """Where a member works."""

    device: str = "cpu"
    """'cpu' or 'cuda'."""
    threads: int = 1
    """CPU threads that it may use."""
    given: Mapping[str, Any] = field(default_factory=dict)
    """Test size and tiles that the user gives for every member that has them (`i3cl.inference.recipe.Given`)."""
    turn: AbstractContextManager[Any] = field(default_factory=nullcontext)
    """Held by a member that `takes_turns` while its network works."""


class Member(ABC):
    """A detector in the memory of one process."""

    granularity: ClassVar[Granularity] = "word"
    """What one polygon encloses: a word, or a whole line, as PP-OCR finds it."""
    takes_views: ClassVar[bool] = False
    """Whether it predicts in every one of label.views. Others see the image once, as it is."""
    takes_turns: ClassVar[bool] = False
    """Whether several threads may call it at the same time, because it holds `Place.turn` around its network. Others are called
    by one thread at a time, not always the one that called `load`."""
    licence: ClassVar[str] = "not stated"
    """Of the code and the weights, for `i3cl members`."""
    about: ClassVar[str] = ""
    """One line for `i3cl members`: what it is, which settings it needs."""
    packages: ClassVar[tuple[str, ...]] = ()
    """Installed distributions that it needs beside those of the project."""
    install: ClassVar[str] = ""
    """The command that installs them."""

    @classmethod
    @abstractmethod
    def fingerprint(cls, settings: MemberSettings) -> str:
        """SHA-256, in hex, of all on which its findings depend: weights, options, version of its package.

        Called once where the job starts, before any actor does, and must not load the network. UserError that names the remedy
        when a package or the weights are not there, or an option is wrong.
        """

    @classmethod
    @abstractmethod
    def load(cls, settings: MemberSettings, place: Place) -> Member:
        """The detector in memory. Called once per process; errors as `fingerprint`."""

    @abstractmethod
    def __call__(self, images: Sequence[NDArray[np.uint8]], view: ViewSettings) -> list[Detections]:
        """Detections of each image, in its pixels, above a low score threshold.

        images: (H, W, 3) uint8 RGB, each of its own size. view: the default one unless `takes_views`. An exception means that
        it cannot take these images; they are then tried one by one, and for one that fails alone the reason is recorded.
        """


def kinds() -> list[str]:
    """The names that label.members.NAME.use may have: built in first, then those of installed packages."""
    others = sorted({point.name for point in entry_points(group=ENTRY_POINTS)} - BUILT_IN.keys())
    return [*BUILT_IN, *others]


def kind_of(use: str, key: str = "label.members") -> type[Member]:
    """The class of that name.

    key: of the setting, for messages. UserError for a name that nobody has, and for a package that cannot be imported or whose
    entry point is not a `Member`.
    """
    if use in BUILT_IN:
        module, _, name = BUILT_IN[use].partition(":")
        found: Any = getattr(import_module(module), name)
        return found
    for point in entry_points(group=ENTRY_POINTS):
        if point.name != use:
            continue
        try:
            found = point.load()
        # Code of others runs here, so anything can be raised; the reason is shown.
        except Exception as error:
            reason = " ".join(str(error).split())[:200]
            raise UserError(f"{key}.use: {use} ({point.value}) cannot be imported: {type(error).__name__}: {reason}") from None
        if not (isinstance(found, type) and issubclass(found, Member)):
            raise UserError(f"{key}.use: {use} ({point.value}) is not a subclass of i3cl.members.member.Member")
        if isabstract(found):
            lacks = ", ".join(sorted(found.__abstractmethods__))
            raise UserError(f"{key}.use: {use} ({point.value}) does not define {lacks} of i3cl.members.member.Member")
        return found
    known = kinds()
    near = difflib.get_close_matches(use, known, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}"
    raise UserError(f"{key}.use: no detector is called {use}; {hint}")


def granularity_of(settings: MemberSettings, key: str = "label.members") -> Granularity:
    """What one polygon of this member encloses: as the settings say, else as its class does. Errors as `kind_of`."""
    if settings.granularity is not None:
        return settings.granularity
    return "word" if settings.results else kind_of(settings.use, key).granularity

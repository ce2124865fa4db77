"""What detectors there are: built in and of installed packages, with licence and whether they can be used here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from i3cl.errors import UserError
from i3cl.members.adapting import Option, installed
from i3cl.members.member import BUILT_IN, ENTRY_POINTS, Member, kind_of, kinds


@dataclass(frozen=True)
class Kind:
    """One detector, as `i3cl members` shows it."""

    name: str
    """As label.members.NAME.use names it."""
    problem: str = ""
    """Why it cannot be used at all; the rest is then empty."""
    granularity: str = ""
    about: str = ""
    licence: str = ""
    missing: tuple[str, ...] = ()
    """Packages that it needs and that are not installed here."""
    install: str = ""
    """How to install them."""
    source: str = "built in"
    """'built in', or the package and its version that add it."""
    options: Mapping[str, str] = field(default_factory=dict)
    """Option -> its default and meaning, where the class says so."""

    def lines(self) -> list[str]:
        """For people. One line when it cannot be used."""
        if self.problem:
            return [f"{self.name}: {self.problem}"]
        state = "installed" if not self.missing else f"not installed: {self.install or 'needs ' + ', '.join(self.missing)}"
        shown = [f"{self.name} ({self.granularity}s, {self.source}) {state}"]
        shown += [f"    {text}" for text in (self.about, f"licence: {self.licence}") if text]
        if self.options:
            width = max(map(len, self.options))
            shown += [f"    options.{name:{width}}  {text}" for name, text in self.options.items()]
        return shown

    def as_json(self) -> dict[str, Any]:
        """The same for machines."""
        return asdict(self)


def listing() -> list[Kind]:
    """Every detector, the built-in ones first. Those that cannot be used are there too, with the reason."""
    points = list(entry_points(group=ENTRY_POINTS))
    found = [_kind(name, next((_source(point) for point in points if point.name == name), "")) for name in kinds()]
    hidden = [
        Kind(point.name, problem=f"{_source(point)} adds it, but a built-in detector has the name; it is not used")
        for point in points
        if point.name in BUILT_IN
    ]
    return found + hidden


def _kind(name: str, source: str) -> Kind:
    try:
        kind = kind_of(name)
    except UserError as error:
        return Kind(name, problem=str(error).removeprefix("label.members.use: "))
    missing = tuple(package for package in kind.packages if installed(package) is None)
    return Kind(
        name,
        granularity=kind.granularity,
        about=kind.about,
        licence=kind.licence,
        missing=missing,
        install=kind.install,
        source="built in" if name in BUILT_IN else source,
        options=_options(kind),
    )


def _options(kind: type[Member]) -> dict[str, str]:
    options = getattr(kind, "options", {})
    if not isinstance(options, Mapping):
        return {}
    return {key: f"{option.default}  {option.about}" for key, option in options.items() if isinstance(option, Option)}


def _source(point: EntryPoint) -> str:
    # A package without metadata has no name.
    dist = point.dist
    name = dist.metadata["Name"] if dist is not None else None
    return f"from {name} {dist.metadata['Version']}" if dist is not None and name else f"from {point.value}"

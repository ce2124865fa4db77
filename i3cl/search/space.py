"""The space of a sweep: settings keys and their ranges, as Optuna samples them.

A range that depends on another key (`above`, `below`) is sampled as a share of the remaining range: the sampler sees a parameter
``KEY@share`` that always runs from 0 to 1, so that its model of the space does not change from trial to trial.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from i3cl.config import RangeSettings, Settings, with_overrides
from i3cl.errors import SettingsError

if TYPE_CHECKING:
    from optuna.trial import BaseTrial

SHARE = "@share"
"""Ends the sampler's name of a key whose range depends on another key."""
COPY = "@copy"
"""In a trial's config beside its values: how many earlier trials have the same values."""


class Suggest:
    """Ray Tune calls it for a trial's values. It counts how often the same values came, so that each trial has its own name."""

    def __init__(self, space: Space, tried: Iterable[Mapping[str, Any]]) -> None:
        """tried: the values of the trials that are done."""
        self.space = space
        self.seen = Counter(map(named, tried))

    def __call__(self, trial: BaseTrial) -> dict[str, Any]:
        """The values of Optuna's `trial`, with the count of earlier trials of the same values."""
        values = self.space.suggest(trial)
        copy = self.seen[named(values)]
        self.seen[named(values)] += 1
        return {**values, COPY: copy}


def named(values: Mapping[str, Any], copy: int = 0) -> str:
    """A short name for values, the same in every session; `copy` distinguishes trials of equal values."""
    text = json.dumps(dict(values), sort_keys=True, default=list)
    return hashlib.blake2b(text.encode(), digest_size=6).hexdigest() + (f"-{copy + 1}" if copy else "")


@dataclass(frozen=True)
class Space:
    """Ranges by settings key, in the order in which they are sampled."""

    ranges: Mapping[str, RangeSettings]

    @classmethod
    def of(cls, settings: Settings) -> Space:
        """The space of `settings.search`, checked.

        SettingsError for an unknown key, for `above` or `below` that do not name an earlier key, and for a present value outside
        its range.
        """
        ranges = settings.search.space
        if not ranges:
            raise SettingsError("search.space: is empty; add e.g. label.select.low: {uniform: [0.1, 0.7]}")
        seen: list[str] = []
        for key, given in ranges.items():
            for other in (given.above, given.below):
                if other is not None and other not in seen:
                    raise SettingsError(f"search.space.{key}: {other} must stand before it in the space")
            if key.split(".")[0] in ("search", "name", "storage"):
                raise SettingsError(f"search.space.{key}: cannot be searched")
            seen.append(key)
        space = cls(ranges)
        values = {key: _present(settings, key) for key in ranges}
        space.parameters(values)
        with_overrides(settings, values, "search.space")
        return space

    def present(self, settings: Settings) -> dict[str, Any]:
        """The values of `settings` for the keys of the space."""
        return {key: _present(settings, key) for key in self.ranges}

    def suggest(self, trial: BaseTrial) -> dict[str, Any]:
        """Key -> value for one trial of Optuna."""
        values: dict[str, Any] = {}
        for name, distribution in self.distributions().items():
            key = name.removesuffix(SHARE)
            given = self.ranges[key]
            if given.choice is not None:
                values[key] = given.choice[trial.suggest_categorical(name, distribution.choices)]
            elif given.integer is not None:
                values[key] = trial.suggest_int(name, distribution.low, distribution.high)
            else:
                value = trial.suggest_float(name, distribution.low, distribution.high, log=distribution.log)
                if name != key:
                    low, high = self._limits(key, values)
                    value = low + (high - low) * value
                values[key] = value
        return values

    def parameters(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """The sampler's parameters that give `values`, the inverse of `suggest`. SettingsError for a value outside its range."""
        found: dict[str, Any] = {}
        for key, given in self.ranges.items():
            value = values[key]
            if given.choice is not None:
                # Lists and tuples of YAML and of the settings tree are the same value.
                same = [i for i, option in enumerate(given.choice) if _plain(option) == _plain(value)]
                if not same:
                    raise SettingsError(f"search.space.{key}: {value!r} is not among {list(given.choice)}; add it")
                found[key] = same[0]
                continue
            low, high = self._limits(key, values)
            right = isinstance(value, int | float) and not isinstance(value, bool)
            if not right or not low - 1e-9 <= value <= high + 1e-9:
                raise SettingsError(f"search.space.{key}: the value {value!r} is outside {low:g} to {high:g}; widen the range")
            if given.above is None and given.below is None:
                found[key] = value
            else:
                found[key + SHARE] = float(np.clip((value - low) / (high - low), 0, 1)) if high > low else 0.0
        return found

    def grid(self) -> dict[str, list[Any]]:
        """The sampler's parameter -> the values that a grid takes."""
        found: dict[str, list[Any]] = {}
        for name, distribution in self.distributions().items():
            given = self.ranges[name.removesuffix(SHARE)]
            if given.choice is not None:
                found[name] = list(distribution.choices)
            elif given.integer is not None:
                found[name] = list(range(distribution.low, distribution.high + 1))
            else:
                spaced = np.geomspace if distribution.log else np.linspace
                found[name] = spaced(distribution.low, distribution.high, given.points).tolist()
        return found

    def distributions(self) -> dict[str, Any]:
        """The sampler's parameter -> Optuna's distribution."""
        from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

        found: dict[str, Any] = {}
        for key, given in self.ranges.items():
            if given.choice is not None:
                found[key] = CategoricalDistribution(list(range(len(given.choice))))
            elif given.integer is not None:
                found[key] = IntDistribution(*given.integer)
            elif given.log is not None:
                found[key] = FloatDistribution(*given.log, log=True)
            elif given.above is None and given.below is None:
                assert given.uniform is not None
                found[key] = FloatDistribution(*given.uniform)
            else:
                found[key + SHARE] = FloatDistribution(0.0, 1.0)
        return found

    def _limits(self, key: str, values: Mapping[str, Any]) -> tuple[float, float]:
        given = self.ranges[key]
        pair = given.uniform or given.log or given.integer
        assert pair is not None
        low, high = float(pair[0]), float(pair[1])
        # Where the other key leaves no range, the value is that of the other key.
        if given.above is not None:
            low = max(low, values[given.above])
            high = max(low, high)
        if given.below is not None:
            high = min(high, values[given.below])
            low = min(low, high)
        return low, high


def _present(settings: Settings, key: str) -> Any:
    value: Any = settings
    for part in key.split("."):
        if isinstance(value, Mapping):
            # A table such as label.fusion.member_weights: a member that is not in it weighs 1.
            value = value.get(part, 1.0)
        elif part in type(value).model_fields:
            value = getattr(value, part)
        else:
            # This raises the message that names the nearest key.
            with_overrides(settings, {key: None}, "search.space")
            raise SettingsError(f"search.space.{key}: not a settings key")
    return value


def _plain(value: Any) -> Any:
    return list(map(_plain, value)) if isinstance(value, list | tuple) else value

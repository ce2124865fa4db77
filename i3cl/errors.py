"""Errors that are shown to the user as one line."""

from __future__ import annotations

from typing import TypeVar

E = TypeVar("E", bound=BaseException)


class UserError(Exception):
    """The user's mistake: one line that names the file, key or image and the remedy. Commands end with status 2 on it."""


class SettingsError(UserError):
    """A settings file or override that cannot be used."""


def inside(error: BaseException, kind: type[E]) -> E | None:
    """The error of class `kind` that caused `error`, also when Ray wrapped it in another process; None when there is none."""
    seen: BaseException | None = error
    while seen is not None:
        # Ray's own class for it prints the other process's trace: `cause` is the plain error.
        for found in (getattr(seen, "cause", None), seen):
            if isinstance(found, kind):
                return found
        seen = seen.__cause__ or seen.__context__
    return None

"""Errors that are shown to the user as one line."""

from __future__ import annotations

import importlib
import re
from typing import TypeVar

E = TypeVar("E", bound=BaseException)


class UserError(Exception):
    """The user's mistake: one line that names the file, key or image and the remedy. Commands end with status 2 on it."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message

    def __str__(self) -> str:
        # Not `args`: Ray Data adds advice of its own to the arguments of an error that leaves a task.
        return self.message


class SettingsError(UserError):
    """A settings file or override that cannot be used."""


def inside(error: BaseException, kind: type[E]) -> E | None:
    """Find the error of class `kind` that caused `error`, also when Ray wrapped it on its way from another process.

    Returns None when there is none. Of several, the one that was raised last: it has the best message.
    """
    return _inside(error, kind, set())


def _inside(error: BaseException, kind: type[E], seen: set[int]) -> E | None:
    if id(error) in seen:
        return None
    seen.add(id(error))
    # Wrappers come after what they hold: Ray makes RayTaskError a subclass of its cause, but its text is a whole traceback.
    held = [getattr(error, "cause", None), getattr(error, "controller_failure", None)]
    held += getattr(error, "worker_failures", {}).values()  # Ray Train: rank -> error
    held += getattr(error, "exceptions", ())
    for each in held:
        if isinstance(each, BaseException) and (found := _inside(each, kind, seen)):
            return found
    if isinstance(error, kind):
        return error
    if getattr(error, "actor_init_failed", False) and (found := _from_text(str(error), kind)):
        return found
    before = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return _inside(before, kind, seen) if before else None


def _from_text(text: str, kind: type[E]) -> E | None:
    """Make the error again from the last line of its traceback: Ray keeps nothing else of an error in an actor's constructor."""
    last = re.fullmatch(r"(i3cl(?:\.\w+)*)\.(\w+): (.+)", text.strip().rpartition("\n")[2])
    if not last:
        return None
    found = getattr(importlib.import_module(last[1]), last[2], None)
    return found(last[3]) if isinstance(found, type) and issubclass(found, kind) else None

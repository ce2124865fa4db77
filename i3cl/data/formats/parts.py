"""The Parquet parts of a set, and the refusal to read one that is not finished. Every reader of Parquet sets comes here.

Three commands write a set part by part: `label predict` (job.json first, done.json last), `label select` (_settings.json first,
_done.json last) and `prepare scene-text` (scene_text.json beside the folder). A folder with none of these files counts as whole.
"""

from __future__ import annotations

import logging
import os
import posixpath
import shlex
import sys
from collections.abc import Collection
from dataclasses import dataclass
from functools import cache
from json import dumps
from typing import Any

from i3cl import claims, storage
from i3cl.errors import UserError

logger = logging.getLogger(__name__)

ACCEPT = "I3CL_ACCEPT_UNFINISHED"
"""Environment variable: paths, with commas between them, of unfinished sets that are to be read as they are."""
_COMMAND = "_work/command.json"
"""The command line that writes a set; removed when the set is finished."""


@dataclass(frozen=True)
class Unfinished:
    """What a set lacks."""

    missing: int
    """Parts that are not there; 0 when only the end of the command is missing."""
    parts: int
    """Parts of the finished set."""
    remedy: str

    def __str__(self) -> str:
        if self.missing:
            return f"{self.missing} of {self.parts} parts are missing"
        return f"all {self.parts} parts are there, but the command that writes them has not ended"


def parts_of(path: str) -> list[str]:
    """The paths of a folder's Parquet parts in the order of their names, or the file itself.

    UserError when the folder is an unfinished set, unless `ACCEPT` names it.
    """
    if storage.is_file(path):
        return [path]
    names = storage.list_dir(path)
    check_finished(path, names)
    return [storage.join(path, name) for name in names if claims.is_part(name)]


def check_finished(folder: str, names: Collection[str]) -> None:
    """UserError when the folder, in which these names lie, is an unfinished set; only a warning when `ACCEPT` names it."""
    found = unfinished(folder, names)
    if found is None:
        return
    if accepted(folder):
        _warn(f"{folder}: {found}; read as it is ({ACCEPT})")
        return
    raise UserError(f"{folder}: is not finished, {found}; {found.remedy}, or read it as it is with {ACCEPT}={folder}")


def accepted(folder: str) -> bool:
    """Whether `ACCEPT` names this folder."""
    given = [path.strip() for path in os.environ.get(ACCEPT, "").split(",")]
    return storage.absolute(folder).rstrip("/") in {storage.absolute(path).rstrip("/") for path in given if path}


def unfinished(folder: str, names: Collection[str] | None = None) -> Unfinished | None:
    """What the set in a folder lacks; None when it is finished, or no command writes it part by part.

    names: what lies directly in the folder, where that is known.
    """
    names = storage.list_dir(folder) if names is None else names
    there = sum(map(claims.is_part, names))
    if "job.json" in names:
        done, wanted = "done.json" in names, _predicted_parts(claims.read(storage.join(folder, "job.json")))
    elif "_settings.json" in names:
        done, wanted = "_done.json" in names, _count(claims.read(storage.join(folder, "_settings.json")), "parts")
    elif posixpath.basename(folder.rstrip("/")) == "set.parquet":
        wanted = _scene_parts(claims.read(storage.join(posixpath.dirname(folder.rstrip("/")), "scene_text.json")))
        done = wanted is None or there >= wanted
    else:
        return None
    missing = max(0, (wanted or 0) - there)
    if done and not missing:
        return None
    remedy = f"finish it with: {_command(folder)}"
    if done:
        remedy = "some were removed after its end: put them back, or remove the folder and give its command again"
    return Unfinished(missing, max(wanted or 0, there), remedy)


def note_command(folder: str) -> None:
    """Write down the command line of this process, which will finish the set in this folder."""
    command = f"{posixpath.basename(sys.argv[0])} {shlex.join(sys.argv[1:])}".strip()
    storage.write_text_atomic(storage.join(folder, _COMMAND), dumps(command))


def _command(folder: str) -> str:
    there = claims.read(storage.join(folder, _COMMAND))
    return str(there) if there else "the command that began it (label predict, label select, selftrain, prepare scene-text, ...)"


def _predicted_parts(job: Any) -> int | None:
    try:
        rows, images = job["label.rows_per_block"], job["images"]
        return len(job["groups"]) * sum(-(-count // rows) for count in images.get("grown") or [images["count"]])
    except (KeyError, TypeError):
        return None


def _scene_parts(note: Any) -> int | None:
    try:
        return -(-note["images"] // note["scene_text"]["images_per_part"])
    except (KeyError, TypeError):
        return None


def _count(tree: Any, key: str) -> int | None:
    found = tree.get(key) if isinstance(tree, dict) else None
    return len(found) if isinstance(found, list) else None


@cache
def _warn(text: str) -> None:
    logger.warning("%s", text)

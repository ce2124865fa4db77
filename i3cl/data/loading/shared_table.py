"""One copy of a data set's table on each machine, which all workers there map into memory.

Reading the annotations of a million images takes a minute and gigabytes; eight workers of one machine would do it eight times,
and again at every restart. The first one writes the table to TMPDIR, the others wait for it and map the same file.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import tempfile
import time
import uuid
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa

from i3cl.errors import UserError

_KEPT = 24 * 3600.0
"""Seconds since its last use after which a copy is removed; who has mapped it keeps it."""


def shared_table(key: str, make: Callable[[], pa.Table]) -> pa.Table:
    """The table of this key, mapped from the copy on this machine. The first process that asks makes it; others wait for it.

    Args:
        key: All on which the table depends.
        make: Makes it. Its errors are raised here, and no copy is left.

    Raises:
        UserError: TMPDIR has no room, or the folder for the copies there belongs to somebody else.
    """
    folder = _folder()
    name = hashlib.sha256(key.encode("utf-8", "backslashreplace")).hexdigest()
    path = folder / f"{name}.arrow"
    with open(folder / f"{name}.lock", "ab") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        _sweep(folder, path)
        # A machine that went down may have left a copy without its content.
        with contextlib.suppress(FileNotFoundError, pa.ArrowInvalid):
            os.utime(path)
            return _mapped(path)
        _write(make(), path)
        return _mapped(path)


def _mapped(path: Path) -> pa.Table:
    return pa.ipc.open_file(pa.memory_map(str(path))).read_all()


def _write(table: pa.Table, path: Path) -> None:
    temporary = path.with_suffix(f".{uuid.uuid4().hex}")
    try:
        with pa.OSFile(str(temporary), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
            writer.write_table(table)
        os.replace(temporary, path)
    except OSError as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{temporary}: cannot be written ({reason}); set TMPDIR to a folder with room") from None
    finally:
        temporary.unlink(missing_ok=True)


def _sweep(folder: Path, wanted: Path) -> None:
    """Remove what nobody has asked for lately, and what killed writers left."""
    now = time.time()
    for path in folder.iterdir():
        # Another worker may remove it at the same moment.
        with contextlib.suppress(FileNotFoundError):
            if path.stem != wanted.stem and now - path.stat().st_mtime > _KEPT:
                path.unlink()


def _folder() -> Path:
    folder = Path(tempfile.gettempdir()) / f"i3cl-tables-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    # In a folder that all may write into, somebody else may have made it first.
    if folder.is_symlink() or folder.stat().st_uid != os.getuid():
        raise UserError(f"{folder}: belongs to somebody else; set TMPDIR to a folder of your own")
    return folder

"""Unpacking archives from outside: nothing is written outside the folder, and nothing grows without limit."""

from __future__ import annotations

import shutil
import tarfile
import zipfile
from collections.abc import Generator
from contextlib import closing
from pathlib import Path
from typing import IO

from i3cl import storage
from i3cl.errors import UserError

ENDINGS = (".zip", ".tar", ".tar.gz", ".tgz")
MAX_BYTES = 256 << 30
"""Largest unpacked size of one archive; SynthText, the largest public set, is about 41 GB."""
MAX_FILES = 5_000_000
MAX_RATIO = 250
"""Largest ratio of unpacked to packed size; label files reach about 20."""
_FREE_OF_RATIO = 64 << 20
"""Bytes that every archive may unpack to, whatever the ratio."""
_BLOCK = 1 << 20


def is_archive(path: str) -> bool:
    """Whether the name has the ending of an archive that ``unpack`` reads."""
    return path.lower().endswith(ENDINGS)


def unpack(archive: str, target: str) -> None:
    """Unpack a .zip, .tar or .tar.gz (local or s3://) into the local or s3:// folder `target`, atomically.

    UserError, with nothing left behind, when the archive is damaged, holds a link or a name that leaves the folder, has more than
    MAX_FILES files, or unpacks to more than MAX_BYTES or MAX_RATIO times its size.
    """
    with storage.local_copy(archive) as local, storage.atomic_directory(target) as folder:
        limit = min(MAX_BYTES, max(_FREE_OF_RATIO, MAX_RATIO * local.stat().st_size))
        members = _zip_members(local) if local.name.lower().endswith(".zip") else _tar_members(local)
        count = total = 0
        try:
            with closing(members):
                for name, stream in members:
                    count += 1
                    if count > MAX_FILES:
                        raise UserError(f"{archive}: more than {MAX_FILES} files; unpack it yourself if you trust it")
                    path = folder / _safe(name, archive)
                    path.parent.mkdir(parents=True, exist_ok=True)
                    with stream, open(path, "xb") as file:
                        while block := stream.read(_BLOCK):
                            total += len(block)
                            if total > limit or shutil.disk_usage(folder).free < 2 * _BLOCK:
                                raise UserError(
                                    f"{archive}: unpacks to more than {total >> 20} MiB, its limit or the disk's; "
                                    "unpack it yourself if you trust it"
                                )
                            file.write(block)
        except UserError:
            raise
        except Exception as error:
            # The libraries raise almost any exception on damaged archives, and all of them mean the same.
            reason = " ".join(str(error).split()) or type(error).__name__
            raise UserError(f"{archive}: cannot be unpacked ({reason}); download it again") from error


def _zip_members(path: Path) -> Generator[tuple[str, IO[bytes]], None, None]:
    with zipfile.ZipFile(path) as file:
        for member in file.infolist():
            if member.external_attr >> 28 == 0xA:  # a symbolic link, as Unix writes it
                raise UserError(f"{path.name}: {member.filename!r} is a link; unpack it yourself if you trust it")
            if not member.is_dir():
                yield member.filename, file.open(member)


def _tar_members(path: Path) -> Generator[tuple[str, IO[bytes]], None, None]:
    with tarfile.open(path, "r:" if path.name.lower().endswith(".tar") else "r:gz") as file:
        for member in file:
            if member.isdir():
                continue
            stream = file.extractfile(member) if member.isfile() else None
            if stream is None:
                raise UserError(f"{path.name}: {member.name!r} is a link or device; unpack it yourself if you trust it")
            yield member.name, stream


def _safe(name: str, archive: str) -> str:
    parts = name.removeprefix("./").split("/")
    if any(part in ("", ".", "..") for part in parts) or "\\" in name or ":" in name or not name.isprintable():
        raise UserError(f"{archive}: holds the name {ascii(name)[:100]}, which may leave the folder")
    return "/".join(parts)

"""The text files of a folder or a flat zip, read with limits: what people hand in may come from anywhere."""

from __future__ import annotations

import io
import zipfile

from i3cl import claims, storage
from i3cl.data.formats.checks import ZIP_FAULTS
from i3cl.errors import UserError

MAX_FILES = 1_000_000
MAX_FILE_BYTES = 64 << 20
"""Largest unpacked file of a zip."""
MAX_ZIP_BYTES = 4 << 30
"""Largest unpacked size of all files of a zip together."""


def text_files(path: str) -> dict[str, bytes] | None:
    """Name -> content of the files in a zip or a folder; None when `path` is any other file, or a folder of Parquet parts.

    Hidden files are passed over, and so is what macOS adds (`._name`, `__MACOSX/`).

    Raises:
        UserError: The path does not exist, or the zip or folder holds something else.
    """
    if not storage.exists(path):
        raise UserError(f"{path}: no such file or folder; check the path")
    if storage.is_dir(path):
        names = [name for name in storage.list_dir(path) if not name.startswith(".")]
        wanted = [name for name in names if name.lower().endswith(".txt")]
        if not wanted:
            if any(name.endswith(".parquet") for name in names):
                return None
            raise UserError(f"{path}: holds neither *.txt nor *.parquet files; check the path")
        return {name: storage.read_bytes(storage.join(path, name)) for name in wanted}
    with storage.open_read(path) as file:
        if file.read(4) != b"PK\x03\x04":
            if path.lower().endswith(".zip"):
                raise UserError(f"{path}: not a zip file, or an empty one; zip it again")
            return None
    return _unzipped(path, storage.read_bytes(path))


def is_table(path: str) -> bool:
    """Whether a path is a Parquet file or a folder of Parquet parts."""
    return path.rstrip("/").endswith(".parquet") or (storage.is_dir(path) and bool(claims.parts(path)))


def _unzipped(path: str, packed: bytes) -> dict[str, bytes]:
    files: dict[str, bytes] = {}
    left = MAX_ZIP_BYTES
    try:
        with zipfile.ZipFile(io.BytesIO(packed)) as archive:
            entries = archive.infolist()
            if len(entries) > MAX_FILES:
                raise UserError(f"{path}: {len(entries)} files, more than {MAX_FILES}; is it the right zip?")
            for entry in entries:
                # Some zip programs of Windows write \ between folder and file.
                name = entry.filename.replace("\\", "/").removeprefix("./")
                if name.startswith("__MACOSX/") or name.rsplit("/", 1)[-1].startswith("."):
                    continue
                _check_name(path, entry, name, files)
                # Read with a limit: the size in a zip's directory is only what its writer claims.
                limit = min(MAX_FILE_BYTES, left)
                with archive.open(entry) as part:
                    data = part.read(limit + 1)
                if len(data) > limit:
                    raise UserError(f"{path}: {name!r:.80} unpacks to more than {limit} bytes; is it the right zip?")
                left -= len(data)
                files[name] = data
    except ZIP_FAULTS as error:
        raise UserError(f"{path}: the zip cannot be unpacked ({str(error)[:120]}); zip it again") from error
    if not files:
        raise UserError(f"{path}: the zip holds no .txt or .json file")
    return files


def _check_name(path: str, entry: zipfile.ZipInfo, name: str, files: dict[str, bytes]) -> None:
    if "/" in name or not name:
        raise UserError(
            f"{path}: {entry.filename!r:.80} lies in a folder; zip the files themselves without their folder, as the sites "
            "want it"
        )
    if name.lower().endswith(".zip"):
        raise UserError(f"{path}: {name!r:.80} is a zip in a zip; unpack it first")
    if not name.lower().endswith((".txt", ".json")):
        raise UserError(f"{path}: {name!r:.80} is neither .txt nor .json; leave it out of the zip")
    if name in files:
        raise UserError(f"{path}: {name!r:.80} occurs twice; zip it again")
    if entry.flag_bits & 1:
        raise UserError(f"{path}: {name!r:.80} is encrypted; zip it without a password")

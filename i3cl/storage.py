"""Local paths and s3:// URLs behind one set of calls; the rest of the package need not know which it has.

S3 settings come from the usual environment: AWS_ENDPOINT_URL, AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY,
AWS_REGION. What the user can put right (a missing file, no permission, no credentials) is a ``UserError``
that names the path.
"""

from __future__ import annotations

import errno
import os
import posixpath
import re
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from i3cl.config import UserError

if TYPE_CHECKING:
    import pyarrow.fs

UNFINISHED = "_unfinished"
"""Empty file in a folder on S3 while ``atomic_directory`` uploads it: S3 cannot move a folder at once."""

_UPLOADED_CODE = "/runtime_resources/working_dir_files/"
"""In the path of the folder where Ray unpacks the code of a submitted job, on every node anew, and which it removes."""

_SCHEME = re.compile(r"^([A-Za-z][A-Za-z0-9+.-]+)://")


def is_remote(url: str) -> bool:
    """True for s3:// URLs, False for local paths and file:// URLs. UserError for any other scheme."""
    found = _SCHEME.match(url)
    if not found or found[1].lower() == "file":
        return False
    if found[1].lower() != "s3":
        raise UserError(f"{url}: {found[1]}:// is not supported; use a local path or an s3:// URL")
    return True


def join(root: str, *parts: str) -> str:
    """Path or URL of `parts` under `root`. A part that is absolute or a URL starts anew."""
    result = str(root)
    for part in map(str, parts):
        if _SCHEME.match(part) or os.path.isabs(part):
            result = part
        elif part:
            result = posixpath.join(result, part)
    return result


def absolute(url: str) -> str:
    """A local path made absolute, so that it means the same in every process; a URL as it is."""
    return url if is_remote(url) else os.path.abspath(_local(url))


def exists(url: str) -> bool:
    """Whether a file or a folder is there (on S3 a folder is there when something lies under it)."""
    if not is_remote(url):
        return os.path.exists(_local(url))
    with _user_errors(url):
        return bool(_s3().exists(_key(url)))


def is_file(url: str) -> bool:
    """Whether a file is there."""
    if not is_remote(url):
        return os.path.isfile(_local(url))
    with _user_errors(url):
        return bool(_s3().isfile(_key(url)))


def is_dir(url: str) -> bool:
    """Whether a folder is there."""
    if not is_remote(url):
        return os.path.isdir(_local(url))
    with _user_errors(url):
        return bool(_s3().isdir(_key(url)))


def open_read(url: str) -> IO[bytes]:
    """Binary reader, seekable, to be closed by the caller. UserError when there is no such file."""
    with _user_errors(url):
        if is_remote(url):
            return _s3().open(_key(url), "rb")
        return open(_local(url), "rb")


def read_bytes(url: str) -> bytes:
    """The whole file. UserError when there is no such file."""
    with _user_errors(url):
        if is_remote(url):
            return bytes(_s3().cat_file(_key(url)))
        return Path(_local(url)).read_bytes()


def read_text(url: str) -> str:
    """The whole file as UTF-8, with or without byte order mark. UserError when missing or not UTF-8."""
    try:
        return read_bytes(url).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{url}: not UTF-8 text (byte {error.start}); save it as UTF-8") from None


def write_bytes_atomic(url: str, data: bytes) -> None:
    """Write a file so that readers see the old content or the new one, never a part. Makes the folders."""
    with _user_errors(url):
        if is_remote(url):
            # A single put appears at once; anything larger goes up as parts that appear together at the end.
            _s3().pipe_file(_key(url), data)
            return
        path = _kept(url)
        path.parent.mkdir(parents=True, exist_ok=True)
        # Not tempfile: that would make the file readable for its owner only.
        temporary = path.parent / f".tmp-{uuid.uuid4().hex}"
        try:
            with open(temporary, "xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
            _fsync_folder(path.parent)
        finally:
            temporary.unlink(missing_ok=True)


def write_text_atomic(url: str, text: str) -> None:
    """``write_bytes_atomic`` of UTF-8 text."""
    write_bytes_atomic(url, text.encode("utf-8"))


@contextmanager
def atomic_file(url: str) -> Iterator[IO[bytes]]:
    """A file to write piece by piece, put in place when the block ends and removed when it raises. Makes the folders."""
    remote = is_remote(url)
    with _user_errors(url):
        folder = None if remote else _kept(url).parent
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=".tmp-", dir=folder))
    try:
        with open(work / "file", "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        with _user_errors(url):
            if folder is None:
                _s3().put_file(str(work / "file"), _key(url))
                return
            os.replace(work / "file", _local(url))
            _fsync_folder(folder)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def make_dirs(url: str) -> None:
    """Make a folder and its parents; on S3, where folders are only prefixes, nothing is to be done."""
    if not is_remote(url):
        with _user_errors(url):
            os.makedirs(_kept(url), exist_ok=True)


def list_dir(url: str) -> list[str]:
    """Sorted names (not paths) of what lies directly in a folder; empty when there is no such folder."""
    with _user_errors(url):
        try:
            if not is_remote(url):
                return sorted(os.listdir(_local(url)))
            key = _key(url)
            keys = {str(p).rstrip("/") for p in _s3().ls(key, detail=False)}
            return sorted(posixpath.basename(k) for k in keys - {key})
        except FileNotFoundError:
            return []


def list_files(url: str) -> set[str]:
    """Names, relative to the folder, of all files at any depth; empty when there is no such folder."""
    with _user_errors(url):
        if is_remote(url):
            key = _key(url)
            return {str(p)[len(key) :].lstrip("/") for p in _s3().find(key)}
        root = _local(url)
        return {
            os.path.relpath(os.path.join(folder, name), root).replace(os.sep, "/")
            for folder, _, names in os.walk(root)
            for name in names
        }


def remove_tree(url: str) -> None:
    """Remove a file or a folder with everything in it; what is not there is fine."""
    with _user_errors(url):
        if is_remote(url):
            if _s3().exists(_key(url)):
                _s3().rm(_key(url), recursive=True)
            return
        path = Path(_local(url))
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def filesystem(url: str) -> tuple[pyarrow.fs.FileSystem, str]:
    """The pyarrow filesystem of a path or URL and the path in it (without s3://)."""
    import pyarrow as pa
    import pyarrow.fs

    if not is_remote(url):
        return pyarrow.fs.LocalFileSystem(), os.path.abspath(_local(url))
    key = _key(url)
    try:
        # Only the bucket goes through the URL parser: keys may hold characters that mean something in a URL.
        return pyarrow.fs.FileSystem.from_uri("s3://" + key.split("/", 1)[0])[0], key
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{url}: {_one_line(error)}") from error


@contextmanager
def atomic_directory(url: str, *, replace: bool = False) -> Iterator[Path]:
    """A local folder to fill, put in place as a whole when the block ends and removed when it raises.

    Local: a move, so the result is there entirely or not at all. S3: an upload; readers must ask
    ``is_complete``, and the rest of an upload that was stopped is cleared away. UserError, before the work
    starts, when anything else stands at `url`, unless `replace`.
    """
    remote = is_remote(url)
    if not replace and _occupied(url):
        raise UserError(f"{url}: exists already; choose another name or remove it")
    target = None if remote else _kept(url)
    with _user_errors(url):
        if target is not None:
            target.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=".tmp-", dir=target.parent if target is not None else None))
    try:
        yield work
        with _user_errors(url):
            if target is None:
                _upload(work, url)
                return
            work.chmod(0o777 & ~_umask())
            for file in work.rglob("*"):
                if file.is_file():
                    _fsync(file)
            if replace:
                remove_tree(url)
            os.replace(work, target)
            _fsync_folder(target.parent)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def is_complete(url: str) -> bool:
    """Whether a folder is there as a whole: not the rest of an upload that was stopped."""
    return is_dir(url) and not is_file(join(url, UNFINISHED))


@contextmanager
def local_copy(url: str) -> Iterator[Path]:
    """A file or folder as a local path: itself when it is local, else downloaded for the time of the block.

    UserError when it is not there.
    """
    if not exists(url):
        raise UserError(f"{url}: {_REMEDY[errno.ENOENT]}")
    if not is_remote(url):
        yield Path(_local(url))
        return
    with tempfile.TemporaryDirectory(prefix="i3cl-") as folder:
        target = Path(folder) / posixpath.basename(_key(url))
        with _user_errors(url):
            for name in [""] if is_file(url) else sorted(list_files(url)):
                (target / name).parent.mkdir(parents=True, exist_ok=True)
                _s3().get_file(posixpath.join(_key(url), name).rstrip("/"), str(target / name))
        yield target


def _upload(folder: Path, url: str) -> None:
    remove_tree(url)
    _s3().pipe_file(_key(join(url, UNFINISHED)), b"")
    for file in sorted(f for f in folder.rglob("*") if f.is_file()):
        _s3().put_file(str(file), _key(join(url, file.relative_to(folder).as_posix())))
    _s3().rm_file(_key(join(url, UNFINISHED)))


def _occupied(url: str) -> bool:
    if is_dir(url):
        return bool(list_dir(url)) and not (is_remote(url) and is_file(join(url, UNFINISHED)))
    return exists(url)


def _local(url: str) -> str:
    return os.path.expanduser(_SCHEME.sub("", url))


def _kept(url: str) -> Path:
    """The local path of what is to be written. UserError where it would be lost: below the uploaded code of a submitted job."""
    path = Path(_local(url))
    _, uploaded, below = os.path.abspath(path).partition(_UPLOADED_CODE)
    if uploaded:
        raise UserError(
            f"{below.partition('/')[2]}: a relative path of a submitted job lies in a temporary copy of the code and would be "
            "lost; give a path that all nodes share or an s3:// URL (storage=… or --out …)"
        )
    return path


def _key(url: str) -> str:
    """Bucket/key of an s3:// URL."""
    key = _SCHEME.sub("", url).strip("/")
    if not key:
        raise UserError(f"{url}: names no bucket; write s3://bucket/path")
    return key


def _s3() -> Any:
    import fsspec

    # fsspec reuses a connection with equal arguments: the endpoint must be among them. Other machines write
    # too, so listings must not be remembered.
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    return fsspec.filesystem("s3", endpoint_url=endpoint, use_listings_cache=False)


_REMEDY = {
    errno.ENOENT: "no such file or folder; check the path",
    errno.EACCES: "permission denied; check the rights on it",
    errno.EPERM: "not permitted; check the rights on it",
    errno.EISDIR: "is a folder, not a file",
    errno.ENOTDIR: "a part of the path is a file, not a folder",
    errno.ENOSPC: "no space left on the device; free some",
    errno.EDQUOT: "disk quota exceeded; free some space",
    errno.EROFS: "the file system is read-only; choose another place",
    errno.ENAMETOOLONG: "the name is too long",
    errno.ENOTEMPTY: "exists already; choose another name or remove it",
    errno.EEXIST: "it or a folder above it is taken by something else; choose another name",
    errno.ELOOP: "symbolic links go round in a circle",
}


@contextmanager
def _user_errors(url: str) -> Iterator[None]:
    """Turn what the user can mend into a UserError that names the URL; everything else passes."""
    try:
        yield
    except OSError as error:
        number = error.errno
        if number is None:  # s3fs sometimes gives the class only
            kinds = {
                FileNotFoundError: errno.ENOENT,
                PermissionError: errno.EACCES,
                IsADirectoryError: errno.EISDIR,
            }
            number = next((n for kind, n in kinds.items() if isinstance(error, kind)), None)
        if number in _REMEDY:
            raise UserError(f"{url}: {_REMEDY[number]}") from error
        raise
    except ValueError as error:
        if "null byte" in str(error) or "null character" in str(error):
            raise UserError(f"{url!r}: a path cannot hold a null character") from error
        raise
    except Exception as error:
        if type(error).__module__.startswith("botocore."):  # imported only where S3 is used
            raise UserError(f"{url}: {_one_line(error)}; check AWS_* in the environment") from error
        raise


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _fsync_folder(path: Path) -> None:
    if os.name == "posix":
        _fsync(path)

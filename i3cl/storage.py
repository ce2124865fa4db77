"""Local paths and s3:// URLs behind one set of functions, so that the rest of the package need not tell them apart.

S3 settings come from the usual environment variables: AWS_ENDPOINT_URL, AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_REGION.
What the user can fix (a missing file, no permission, no credentials) is a `UserError` that names the path; it is an `AccessError`
when it concerns S3 as a whole. When the network stays down, `NoAnswer` is raised after the retries of `s3`.
"""

from __future__ import annotations

import errno
import os
import posixpath
import re
import shutil
import stat
import sys
import tempfile
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.fs

from i3cl import s3
from i3cl.errors import UserError
from i3cl.s3 import AccessError, Changed, Missing, NoAnswer, counted

__all__ = ["AccessError", "NoAnswer", "counted"]

UNFINISHED = "_unfinished"
"""Empty file in a folder on S3 while `atomic_directory` uploads it, because S3 cannot move a folder in one step."""
_BLOCK = 256 << 10
"""Bytes that a reader on S3 requests beyond those it needs."""
_FILES = 8
"""Files of a folder transferred at the same time, each with up to s3.PARTS * s3.PART bytes in memory (256 MiB in all)."""
_NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)
"""Answers of file systems without hard links."""
_PAGE = 1000
"""S3's limit of keys in one delete request."""

_LFS = b"version https://git-lfs.github.com/spec/"
_UPLOADED_CODE = "/runtime_resources/working_dir_files/"
"""Part of the path of the folder where every node unpacks the code of a submitted job, and which Ray removes later."""

try:
    _STARTED_IN = os.getcwd()
except FileNotFoundError:
    _STARTED_IN = os.environ.get("PWD", "/")
_SCHEME = re.compile(r"^([A-Za-z][A-Za-z0-9+.-]+)://")


def is_remote(url: str) -> bool:
    """Tell s3:// URLs (True) from local paths and file:// URLs (False). UserError for any other scheme."""
    found = _SCHEME.match(url)
    if not found or found[1].lower() == "file":
        return False
    if found[1].lower() != "s3":
        raise UserError(f"{url}: {found[1]}:// is not supported; use a local path or an s3:// URL")
    return True


def join(root: str, *parts: str) -> str:
    """Join `parts` to the path or URL `root`. A part that is absolute or a URL replaces everything before it."""
    result = str(root)
    for part in map(str, parts):
        if _SCHEME.match(part) or os.path.isabs(part):
            result = part
        elif part:
            result = posixpath.join(result, part)
    return result


def absolute(url: str) -> str:
    """Make a local path absolute, so that it means the same in every process; return a URL unchanged."""
    return url if is_remote(url) else _absolute(_local(url))


def exists(url: str) -> bool:
    """Whether a file or folder exists. On S3, a folder exists when it contains something; this takes at most two requests."""
    if not is_remote(url):
        return os.path.exists(_local(url))
    return is_file(url) or is_dir(url)


def is_file(url: str) -> bool:
    """Whether a file exists; one request on S3."""
    return version(url) is not None if is_remote(url) else os.path.isfile(_local(url))


def is_dir(url: str) -> bool:
    """Whether a folder exists; one request on S3, however many files it contains."""
    return bool(_some_keys(url)) or not s3.split(url)[1] if is_remote(url) else os.path.isdir(_local(url))


def refuse_to_overwrite(out: str, *inputs: str | None) -> None:
    """UserError when the file to write is one of those that are read, which would be lost. None and folders are passed over."""
    there = is_remote(out) or os.path.exists(_local(out))
    for each in filter(None, inputs if there else ()):
        if is_remote(out) or is_remote(each):
            same = out == each
        else:
            same = os.path.isfile(_local(each)) and os.path.samefile(_local(out), _local(each))
        if same:
            raise UserError(f"{out}: is read by this command and would be overwritten; choose another name for the output")


def open_read(url: str) -> IO[bytes]:
    """Open a seekable binary reader, which the caller closes. UserError when there is no such file, or it is a named pipe."""
    if is_remote(url):
        file = s3.ask(url, lambda fs: fs.open(_path(url), "rb", block_size=_BLOCK, cache_type="readahead"))
        if file.details["type"] != "file":
            raise UserError(f"{url}: {_REMEDY[errno.EISDIR]}")
        # Every range is read with one call, and from the version that existed when the file was opened.
        file.cache.fetcher = lambda start, end: s3.ask(url, lambda _: file._fetch_range(start, end))
        return file
    with _user_errors(url):
        path = _local(url)
        # Opening a pipe to which nobody writes would wait for ever.
        if stat.S_ISFIFO(os.stat(path).st_mode) and _descriptor(path) is None:
            raise UserError(f"{url}: is a pipe, not a file; remove it, or give a file")
        return open(path, "rb")


def read_bytes(url: str) -> bytes:
    """Read the whole file; on S3 with one request. UserError when it is missing or only a Git LFS pointer."""
    if is_remote(url):
        data = s3.ask(url, lambda fs: fs.cat_file(_path(url), max_concurrency=1))
    else:
        with _user_errors(url):
            data = Path(_local(url)).read_bytes()
    if data.startswith(_LFS):
        raise UserError(f"{url}: {stand_in(data)}")
    return data


def stand_in(start: bytes) -> str | None:
    """Recognise a file that was saved in place of the intended one, and say what it is and what to do; None for other files.

    start: the first bytes of the file; 512 are enough. Git LFS pointers and web pages are recognised.
    """
    if start.startswith(_LFS):
        return "is a Git LFS pointer, not the file itself; run `git lfs pull` in its repository"
    if start.removeprefix(b"\xef\xbb\xbf").lstrip()[:15].lower().startswith((b"<!doctype html", b"<html")):
        return "is a web page (HTML), not the file itself; download the file that the page offers"
    return None


def read_text(url: str) -> str:
    """Read the whole file as UTF-8, with or without a byte order mark. UserError when it is missing or not UTF-8."""
    try:
        return read_bytes(url).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{url}: not UTF-8 text (byte {error.start}); save it as UTF-8") from None


def read_text_if_there(url: str) -> str | None:
    """As `read_text`; None when there is no such file. One request on S3."""
    try:
        return read_text(url)
    except Missing:
        return None


def write_bytes_atomic(url: str, data: bytes) -> None:
    """Write a file so that readers see either the old content or the new, never a part. Creates missing folders.

    A symbolic link stays, and its target gets the content. Pipes, character devices and open descriptors (/dev/stdout) are
    written through. UserError for sockets and disks.
    """
    if is_remote(url):
        s3.ask(url, lambda fs: fs.pipe_file(_path(url), data, chunksize=s3.PART))
        return
    with _user_errors(url):
        if stream := _stream(url):
            with stream:
                stream.write(data)
            return
        path = _target(url)
        with _written_beside(path, data) as temporary:
            os.replace(temporary, path)


def write_text_atomic(url: str, text: str) -> None:
    """Write UTF-8 text as `write_bytes_atomic` does.

    Python represents the bytes of a file name that is not UTF-8 as lone surrogates. They are written as escapes with a backslash,
    which JSON readers turn back into the same name.
    """
    write_bytes_atomic(url, text.encode("utf-8", "backslashreplace"))


def write_text_new(url: str, text: str) -> bool:
    """Write UTF-8 text where there is no file yet; False, and nothing is written, when there is one.

    Of many writers at the same time one gets True. Where a store knows no such request (it answers 501) or a file system has no
    hard links, all that see no file get True, and the last one's text stays.
    """
    data = text.encode("utf-8", "backslashreplace")
    if is_remote(url):
        try:
            s3.ask(url, lambda fs: fs.pipe_file(_path(url), data, mode="create"))
        except s3.Changed:
            return False
        except s3.Unknown:
            write_bytes_atomic(url, data)
        return True
    with _user_errors(url):
        path = _target(url)
        with _written_beside(path, data) as temporary:
            try:
                os.link(temporary, path)
            except FileExistsError:
                return False
            except OSError as error:
                if error.errno not in _NO_LINKS:
                    raise
                if path.exists():
                    return False
                os.replace(temporary, path)
    return True


@contextmanager
def atomic_file(url: str) -> Iterator[IO[bytes]]:
    """Open a file to write piece by piece; it appears under its name when the block ends and is removed when the block raises.

    Creates missing folders. Links, pipes and devices as in `write_bytes_atomic`; they too get nothing until the block ends.
    """
    remote = is_remote(url)
    with _user_errors(url):
        stream = None if remote else _stream(url)
        target = None if remote or stream else _target(url)
        if target is not None:
            target.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=".tmp-", dir=target and target.parent))
    try:
        with open(work / "file", "xb") as file:
            yield file
            file.flush()
            if target is not None:
                os.fsync(file.fileno())
        with _user_errors(url):
            if target is not None:
                os.replace(work / "file", target)
                _fsync_folder(target.parent)
            elif stream is not None:
                with open(work / "file", "rb") as file:
                    shutil.copyfileobj(file, stream)
                stream.close()
            else:
                _put(work / "file", url)
    finally:
        if stream is not None:
            stream.close()
        shutil.rmtree(work, ignore_errors=True)


def make_dirs(url: str) -> None:
    """Make a folder and its parents; nothing to do on S3, where folders are only prefixes of names."""
    if not is_remote(url):
        with _user_errors(url):
            os.makedirs(_kept(url), exist_ok=True)


def list_dir(url: str) -> list[str]:
    """List the names (not paths) of what lies directly in a folder, sorted; empty when there is no such folder.

    On S3 this takes a request for every thousand names; what lies deeper costs nothing.
    """
    if is_remote(url):
        return sorted(_names(url))
    with _user_errors(url):
        try:
            return sorted(os.listdir(_local(url)))
        except FileNotFoundError:
            return []


def list_files(url: str) -> set[str]:
    """List all files at any depth, by their paths relative to the folder; empty when there is no such folder.

    On S3 this takes a request for every thousand files: do not call it in a loop.
    """
    if is_remote(url):
        return set(_versions(url))
    with _user_errors(url):
        root = _local(url)
        return {
            os.path.relpath(os.path.join(folder, name), root).replace(os.sep, "/")
            for folder, _, names in os.walk(root)
            for name in names
        }


def remove_tree(url: str) -> None:
    """Remove a file, or a folder with everything in it; do nothing when it does not exist. UserError for devices and pipes."""
    if is_remote(url):
        _clear(url, unfinished=False)
        return
    with _user_errors(url):
        path = Path(_local(url))
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.is_symlink() or path.is_file() or not path.exists():
            path.unlink(missing_ok=True)
        else:
            raise UserError(f"{url}: is a device, pipe or socket and is not removed; choose another name")


def version(url: str) -> str | None:
    """Return a text that changes whenever the file does, None when there is no such file; one request on S3."""
    if is_remote(url):
        bucket, key = s3.split(url)
        try:
            return s3.ask(url, lambda fs: fs.call_s3("head_object", Bucket=bucket, Key=key)["ETag"]) if key else None
        except Missing:
            return None
    with _user_errors(url):
        try:
            status = os.stat(_local(url))
        except FileNotFoundError:
            return None
        return f"{status.st_mtime_ns}-{status.st_size}-{status.st_ino}"


def open_arrow(url: str) -> pa.NativeFile:
    """Open a file for pyarrow, for example to read Parquet. UserError when there is no such file, OSError as pyarrow raises it.

    S3 is read with our own requests, so that network faults are told apart from damaged files and nothing is requested twice.
    """
    return pa.PythonFile(open_read(url), mode="r") if is_remote(url) else pa.OSFile(os.path.abspath(_local(url)))


def for_ray(url: str) -> dict[str, Any]:
    """Make `storage_path` and `storage_filesystem` of Ray's RunConfig for a folder; Ray's own client retries only three times."""
    if not is_remote(url):
        return {"storage_path": url}
    given, path = filesystem(url)
    return {"storage_path": path, "storage_filesystem": given}


def filesystem(url: str) -> tuple[pyarrow.fs.FileSystem, str]:
    """Return the pyarrow filesystem of a path or URL, and the path in it without s3://; for Ray and for tables of many files."""
    return s3.arrow(url) if is_remote(url) else (pyarrow.fs.LocalFileSystem(), os.path.abspath(_local(url)))


@contextmanager
def atomic_directory(url: str, *, replace: bool = False) -> Iterator[Path]:
    """Give a local folder to fill; it is put in place as a whole when the block ends, and removed when the block raises.

    A local result is moved, so it is there entirely or not at all; a symbolic link stays, and the folder appears at its target.
    On S3 the folder is uploaded: readers must check `is_complete`, and the remains of an interrupted upload are removed.
    UserError, before the work starts, when anything else is at `url`, unless `replace` is set.
    """
    remote = is_remote(url)
    if not replace and _occupied(url):
        raise UserError(f"{url}: exists already; choose another name or remove it")
    target = None if remote else _target(url)
    with _user_errors(url):
        if target is not None:
            if target.exists() and not (target.is_dir() or target.is_file()):
                raise UserError(f"{url}: is a device, pipe or socket, not a folder; choose another name")
            target.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=".tmp-", dir=target.parent if target is not None else None))
    try:
        yield work
        if target is None:
            _upload(work, url)
            return
        with _user_errors(url):
            work.chmod(0o777 & ~_umask())
            for file in work.rglob("*"):
                if file.is_file():
                    _fsync(file)
            if replace:
                remove_tree(str(target))
            os.replace(work, target)
            _fsync_folder(target.parent)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def is_complete(url: str) -> bool:
    """Whether a folder exists and is whole: not the remains of an interrupted upload."""
    return is_dir(url) and not is_file(join(url, UNFINISHED))


@contextmanager
def local_copy(url: str, without: str = "") -> Iterator[Path]:
    """Give a file or folder as a local path: itself when it is local, otherwise downloaded and removed after the block.

    without: name of a folder in it that need not be downloaded. UserError when it does not exist or is not whole.
    """
    if not is_remote(url):
        if not exists(url):
            raise UserError(f"{url}: {_REMEDY[errno.ENOENT]}")
        yield Path(_local(url))
        return
    with tempfile.TemporaryDirectory(prefix="i3cl-") as folder:
        target = Path(folder) / posixpath.basename(url.rstrip("/"))
        _get(url, target, without)
        if (target / UNFINISHED).exists():
            raise UserError(f"{url}: its upload was stopped half-way; run the command that writes it again")
        yield target


def _upload(folder: Path, url: str) -> None:
    # The marker is written before anything is removed or uploaded and removed last, so an interrupted upload leaves it behind.
    _clear(url, unfinished=True)
    files = [(file, join(url, file.relative_to(folder).as_posix())) for file in sorted(folder.rglob("*")) if file.is_file()]
    with ThreadPoolExecutor(_FILES) as pool:
        list(pool.map(lambda file: _put(*file), files))
    _delete(url, [_path(join(url, UNFINISHED))])


def _put(file: Path, url: str) -> None:
    # S3 accepts 10,000 parts.
    part = max(s3.PART, file.stat().st_size // 9_999)
    s3.ask(url, lambda fs: fs.put_file(str(file), _path(url), chunksize=part))


def _get(url: str, target: Path, without: str) -> None:
    """Copy an object, or all objects of a folder except those in its folder `without`, to the local path.

    Raises Missing when there is neither.
    """
    single = version(url)
    found = {"": single} if single else _versions(url)
    if not found:
        raise Missing(f"{url}: {_REMEDY[errno.ENOENT]}")

    def get(name: str) -> None:
        path, place = target / name, join(url, name)
        if ".." in path.parts:
            raise UserError(f"{place}: the name points outside its folder ('..'); rename it")
        path.parent.mkdir(parents=True, exist_ok=True)
        s3.ask(place, lambda fs: fs.get_file(_path(place), str(path), chunksize=s3.PART))
        # A large object is read in several requests.
        if path.stat().st_size > s3.PART and version(place) != found[name]:
            raise Changed(f"{place}: was changed while it was read")

    with _user_errors(url), ThreadPoolExecutor(_FILES) as pool:
        list(pool.map(get, [name for name in found if not (without and name.startswith(without + "/"))]))


def _clear(url: str, *, unfinished: bool) -> None:
    """Remove a file or a folder; with `unfinished`, leave the marker of a folder that is not whole."""
    path, marker = _path(url), _path(join(url, UNFINISHED))
    keys = set(s3.ask(url, lambda fs: fs.find(path))) | ({path} if is_file(url) else set())
    # Where deleting takes several requests, mark the folder as not whole before the first.
    if unfinished or len(keys) > _PAGE:
        s3.ask(url, lambda fs: fs.pipe_file(marker, b""))
        keys.add(marker)
    rest = sorted(keys - {marker})
    for first in range(0, len(rest), _PAGE):
        _delete(url, rest[first : first + _PAGE])
    if marker in keys and not unfinished:
        _delete(url, [marker])


def _delete(url: str, paths: list[str]) -> None:
    bucket, wanted = s3.split(url)[0], [{"Key": path.partition("/")[2]} for path in paths]
    answer = s3.ask(url, lambda fs: fs.call_s3("delete_objects", Bucket=bucket, Delete={"Objects": wanted, "Quiet": True}))
    # Delete each of these on its own: that says why it fails, or succeeds after a retry.
    for error in answer.get("Errors", ()):
        _delete_one(f"{bucket}/{error['Key']}")


def _delete_one(path: str) -> None:
    s3.ask(f"s3://{path}", lambda fs: fs.rm_file(path))


def _some_keys(url: str) -> list[str]:
    """Return up to two of the keys under the folder `url`. One request."""
    bucket, key = s3.split(url)
    page = s3.ask(url, lambda fs: fs.call_s3("list_objects_v2", Bucket=bucket, Prefix=key + "/" if key else "", MaxKeys=2))
    return [found["Key"] for found in page.get("Contents", ())]


def _names(url: str) -> set[str]:
    """Names of files and folders directly under the folder `url`."""
    # Not with s3fs, which would list the parent of an empty folder.
    bucket, _, key = _path(url).partition("/")
    where = {"Bucket": bucket, "Prefix": key + "/" if key else "", "Delimiter": "/"}
    names: set[str] = set()
    while True:
        page = s3.ask(url, lambda fs: fs.call_s3("list_objects_v2", **where))
        names |= {posixpath.basename(each["Key"]) for each in page.get("Contents", ())}
        names |= {posixpath.basename(each["Prefix"][:-1]) for each in page.get("CommonPrefixes", ())}
        if not page.get("IsTruncated"):
            # The object that only stands for the folder itself has no name in it.
            return names - {""}
        where["ContinuationToken"] = page["NextContinuationToken"]


def _versions(url: str) -> dict[str, str]:
    """Map the name in the folder to the version, for all objects at any depth except those that only stand for a folder."""
    path = _path(url) + "/"
    found = s3.ask(url, lambda fs: fs.find(path, detail=True))
    return {name[len(path) :]: at["ETag"] for name, at in found.items() if name.startswith(path) and name[-1] != "/"}


def _occupied(url: str) -> bool:
    """Whether anything is there other than the remains of an interrupted upload."""
    if not is_remote(url):
        return bool(list_dir(url)) if is_dir(url) else exists(url)
    own = s3.split(url)[1] + "/"
    if any(key != own for key in _some_keys(url)):
        return not is_file(join(url, UNFINISHED))
    return is_file(url)


def _path(url: str) -> str:
    """Bucket and key in the form that s3fs uses."""
    if "?versionId=" in url:
        raise UserError(f"{url}: '?versionId=' in a name means a version of another object; rename it")
    return "/".join(s3.split(url)).rstrip("/")


def _local(url: str) -> str:
    return os.path.expanduser(_SCHEME.sub("", url))


def _absolute(path: str) -> str:
    try:
        return os.path.abspath(path)
    except FileNotFoundError:
        # When two Ray nodes on one machine share a folder, the second re-extracts the uploaded code of a job and so replaces the
        # driver's working directory: the same path, but another directory.
        os.chdir(_STARTED_IN)
        return os.path.abspath(path)


def _kept(url: str) -> Path:
    """Return the local path of what is to be written. UserError inside the uploaded code of a job, where it would be lost."""
    path = Path(_local(url))
    _, uploaded, below = _absolute(str(path)).partition(_UPLOADED_CODE)
    if uploaded:
        raise UserError(
            f"{below.partition('/')[2]}: a submitted job runs in a temporary copy of the code, where files are lost; "
            "give a path that all nodes share or an s3:// URL (storage=… or --out …)"
        )
    return path


def _target(url: str) -> Path:
    """Return the path of a file or folder to write, with symbolic links followed, so that writing does not replace a link."""
    return Path(os.path.realpath(_kept(url)))


def _stream(url: str) -> IO[bytes] | None:
    """Open a writer for a path that must not be replaced: an open descriptor (/dev/stdout, /dev/fd/63), a pipe or a device.

    None for everything else. UserError for sockets and disks.
    """
    path = str(_kept(url))
    if (descriptor := _descriptor(path)) is not None:
        sys.stdout.flush()
        return open(os.dup(descriptor), "wb")
    try:
        mode = os.stat(path).st_mode
    except (FileNotFoundError, NotADirectoryError):
        return None
    if stat.S_ISBLK(mode) or stat.S_ISSOCK(mode):
        raise UserError(f"{url}: is a {'disk' if stat.S_ISBLK(mode) else 'socket'}, not a file; choose another name")
    return open(path, "wb") if stat.S_ISFIFO(mode) or stat.S_ISCHR(mode) else None


@contextmanager
def _written_beside(path: Path, data: bytes) -> Iterator[Path]:
    """A file with this content beside `path`, to be put in its place; what is left of it is removed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # Not tempfile, which makes files that only their owner can read.
    temporary = path.parent / f".tmp-{uuid.uuid4().hex}"
    try:
        with open(temporary, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        yield temporary
        _fsync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def _descriptor(path: str) -> int | None:
    """Return which open file descriptor of this process a path leads to, through any symbolic links; None for other paths."""
    for _ in range(40):
        folder, name = os.path.split(_absolute(path))
        folder = os.path.realpath(folder)
        if name.isdigit() and folder in ("/dev/fd", f"/proc/{os.getpid()}/fd"):
            return int(name)
        path = os.path.join(folder, name)
        if not os.path.islink(path):
            return None
        path = os.path.join(folder, os.readlink(path))
    return None


_REMEDY = {
    errno.ENOENT: "no such file or folder; check the path",
    errno.EACCES: "permission denied; check its permissions",
    errno.EPERM: "not permitted; check its permissions",
    errno.EISDIR: "is a folder, not a file",
    errno.ENOTDIR: "a part of the path is a file, not a folder",
    errno.ENOSPC: "no space left on the device; free some space",
    errno.EDQUOT: "disk quota exceeded; free some space",
    errno.EROFS: "the file system is read-only; choose another place",
    errno.ENAMETOOLONG: "the name is too long",
    errno.ENOTEMPTY: "exists already; choose another name or remove it",
    errno.EEXIST: "it or a folder above it exists already as something else; choose another name",
    errno.EBADF: "there is no such open file",
    errno.EPIPE: "whoever read the pipe has closed it",
    errno.EBUSY: "is in use, or a file or folder mounted by itself; choose another place",
    errno.ELOOP: "symbolic links form a loop",
    errno.ENXIO: "is a socket, or a device that is not there; give a file",
}


@contextmanager
def _user_errors(url: str) -> Iterator[None]:
    """Turn errors that the user can fix into a UserError that names the URL; let all others pass."""
    try:
        yield
    except OSError as error:
        if error.errno in _REMEDY:
            kind = Missing if error.errno in (errno.ENOENT, errno.ENOTDIR) else UserError
            raise kind(f"{url}: {_REMEDY[error.errno]}") from error
        raise
    except ValueError as error:
        if "null byte" in str(error) or "null character" in str(error):
            raise UserError(f"{url!r}: a path cannot hold a null character") from error
        raise


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

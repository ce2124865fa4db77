"""Objects on S3, by boto3: every request is repeated while network or server fail, large objects travel in parts.

Endpoint, region, credentials and certificates come from the environment, the AWS profile or the machine's role, as boto3 finds
them. What is repeated may be done twice without harm: a whole object is put or a range of one version read. `storage` is for
everybody else; nothing else of the package imports this.
"""

from __future__ import annotations

import logging
import math
import os
import posixpath
import random
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import dataclass
from functools import lru_cache, partial
from io import RawIOBase
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

import boto3
import pyarrow.fs
import urllib3
from botocore import exceptions as failures
from botocore.config import Config
from botocore.parsers import ResponseParserError

from i3cl.config import UserError

CONNECT_SECONDS, ANSWER_SECONDS = 10, 60
"""A connection that takes longer, or an answer of which nothing comes for so long, has failed."""
PATIENCE_SECONDS = 120.0
"""A request is repeated for so long after its first failure; I3CL_S3_PATIENCE sets another."""
FIRST_WAIT, LONGEST_WAIT = 0.2, 20.0
"""Seconds: the waits are random between 0 and a bound that doubles from one to the other, so that many clients spread."""
PART = 16 << 20
"""Bytes of a request for a part of a large object; larger ones than 10,000 parts get larger parts."""
PARALLEL = 8
"""Requests at a time of one transfer: it holds up to PARALLEL * PART bytes (128 MiB)."""
PYARROW_ATTEMPTS = 12
"""Of a request by pyarrow's own client, which counts and has no time limit: about a minute and a half of waits."""
_MOST_PARTS = 10_000
PAGE = 1000
"""Keys of a listing's page and of one request that deletes: S3's limits."""
_LOUD_AFTER = 5.0
_BELOW = (ResponseParserError, urllib3.exceptions.HTTPError, OSError)
"""Errors that boto3 lets through from below when a connection or an answer breaks."""
T = TypeVar("T")

_log = logging.getLogger("i3cl.s3")

_PASSING = {
    *("SlowDown", "Throttling", "ThrottlingException", "RequestLimitExceeded", "BandwidthLimitExceeded", "RequestTimeout"),
    *("InternalError", "ServiceUnavailable", "OperationAborted", "IncompleteBody", "BadDigest", "XAmzContentSHA256Mismatch"),
}
_CREDENTIALS = {
    *("InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken", "InvalidToken", "TokenRefreshRequired", "NotSignedUp"),
    *("RequestTimeTooSkewed", "InvalidSecurity", "AccountProblem", "AllAccessDisabled", "RequestExpired"),
}
_REGION = {"PermanentRedirect", "AuthorizationHeaderMalformed", "IllegalLocationConstraintException", "301"}
_USERS = {"InvalidBucketName", "KeyTooLongError", "InvalidObjectState", "KMS.DisabledException", "KMS.NotFoundException"}


class NoAnswer(RuntimeError):
    """S3 gave no right answer for as long as requests are repeated: the network's or the server's fault, not the user's."""


class AccessError(UserError):
    """S3 refuses everything (credentials, bucket, region, certificate): no fault of the one object that was asked for."""


class Changed(RuntimeError):
    """The object was written anew while it was read."""


@dataclass(frozen=True)
class Object:
    """One object of a bucket."""

    bucket: str
    key: str
    size: int
    etag: str

    @property
    def url(self) -> str:
        return f"s3://{self.bucket}/{self.key}"


def split(url: str) -> tuple[str, str]:
    """Bucket and key ('' for the bucket itself) of an s3:// URL. UserError when it names no bucket."""
    bucket, _, key = url.split("://", 1)[-1].strip("/").partition("/")
    if not bucket:
        raise UserError(f"{url}: names no bucket; write s3://bucket/path")
    return bucket, key


# -------------------------------------------------------------------------------------------------------------- requests


def head(url: str) -> Object | None:
    """The object of this very key, or None. One request."""
    bucket, key = split(url)
    if not key:
        return None
    try:
        answer = _ask(url, "HeadObject", lambda s3: s3.head_object(Bucket=bucket, Key=key))
    except failures.ClientError as error:
        status = _status(error)
        if status == 404:
            return None
        if status in (400, 403):
            # This answer has no body that would tell bad credentials from a missing right.
            get(url, 0, 1)
        raise _told(url, error) from error
    return Object(bucket, key, answer["ContentLength"], answer["ETag"])


def get(url: str, start: int = 0, size: int | None = None, etag: str | None = None) -> bytes:
    """`size` bytes of an object from `start` (None: to its end; fewer where it ends). One request.

    UserError when it is not there, Changed when its version is not `etag`.
    """
    return _get(url, start, size, etag)[0]


def _get(url: str, start: int, size: int | None, etag: str | None) -> tuple[bytes, int, str]:
    """The bytes, the size of the whole object, and its version."""
    bucket, key = split(url)
    wanted: dict[str, Any] = {"Bucket": bucket, "Key": key}
    if start or size is not None:
        wanted["Range"] = f"bytes={start}-" + ("" if size is None else str(start + size - 1))
    if etag is not None:
        wanted["IfMatch"] = etag

    def read(s3: Any) -> tuple[bytes, int, str]:
        answer = s3.get_object(**wanted)
        with closing(answer["Body"]) as body:
            data = body.read()
        whole = answer.get("ContentRange", "").rpartition("/")[2]
        return data, int(whole) if whole else len(data), answer["ETag"]

    try:
        return _ask(url, "GetObject", read)
    except failures.ClientError as error:
        if _status(error) == 416 and not start:
            return b"", 0, ""  # An empty object has no range.
        raise _told(url, error) from error


def read(url: str) -> bytes:
    """A whole object: one request up to `PART` bytes, else ranges of one version side by side."""
    for _ in range(3):
        first, size, etag = _get(url, 0, PART, None)
        if size <= len(first):
            return first
        try:
            with _pool() as pool:
                rest = _each(pool, partial(get, url, size=PART, etag=etag), range(len(first), size, PART))
            return b"".join([first, *rest])
        except Changed:
            continue
    raise Changed(f"{url}: is written again and again while it is read")


def put(url: str, data: bytes) -> None:
    """Put an object, which appears whole: one request up to two parts' size, else parts side by side."""
    if len(data) <= 2 * PART:
        _put(url, data)
    else:
        view = memoryview(data)
        _put_parts(url, len(data), lambda start, size: bytes(view[start : start + size]))


def _put(url: str, data: bytes) -> None:
    bucket, key = split(url)
    _told_ask(url, "PutObject", lambda s3: s3.put_object(Bucket=bucket, Key=key, Body=data))


def pages(url: str, *, deep: bool) -> Iterator[tuple[list[Object], list[str]]]:
    """Objects under the folder `url` and the names of folders directly in it, a thousand at a time: a request each.

    deep: objects at any depth and no folders. Objects that only stand for a folder (their key ends with '/') are left out.
    """
    bucket, key = split(url)
    prefix = key + "/" if key else ""
    for page in _listing(url, {} if deep else {"Delimiter": "/"}):
        found = [Object(bucket, o["Key"], o["Size"], o["ETag"]) for o in page.get("Contents", ()) if not o["Key"].endswith("/")]
        yield found, [p["Prefix"][len(prefix) : -1] for p in page.get("CommonPrefixes", ())]


def keys(url: str) -> list[str]:
    """All keys under the folder `url`, those that only stand for a folder too. A request for every thousand."""
    return [o["Key"] for page in _listing(url, {}) for o in page.get("Contents", ())]


def some_keys(url: str) -> list[str]:
    """Two of the keys under the folder `url`, as far as there are. One request."""
    page = next(_listing(url, {"MaxKeys": 2}))
    return [o["Key"] for o in page.get("Contents", ())]


def _listing(url: str, more: dict[str, Any]) -> Iterator[dict[str, Any]]:
    bucket, key = split(url)
    wanted = {"Bucket": bucket, "Prefix": key + "/" if key else ""} | more
    while True:
        page = _told_ask(url, "ListObjectsV2", partial(_list_page, wanted))
        yield page
        if not page.get("IsTruncated"):
            return
        wanted["ContinuationToken"] = page["NextContinuationToken"]


def _list_page(wanted: dict[str, Any], s3: Any) -> dict[str, Any]:
    return s3.list_objects_v2(**wanted)


def delete(bucket: str, keys: Sequence[str]) -> None:
    """Delete objects, a request for every thousand; what is not there is fine."""
    for first in range(0, len(keys), PAGE):
        some = list(keys[first : first + PAGE])
        if len(some) > 1:
            answer = _told_ask(f"s3://{bucket}/{some[0]}", "DeleteObjects", partial(_delete_some, bucket, some))
            # Each by itself: it then says why, or succeeds a little later.
            some = [failed["Key"] for failed in answer.get("Errors", ())]
        for key in some:
            _told_ask(f"s3://{bucket}/{key}", "DeleteObject", partial(_delete_one, bucket, key))


def _delete_some(bucket: str, keys: list[str], s3: Any) -> dict[str, Any]:
    return s3.delete_objects(Bucket=bucket, Delete={"Objects": [{"Key": key} for key in keys], "Quiet": True})


def _delete_one(bucket: str, key: str, s3: Any) -> None:
    s3.delete_object(Bucket=bucket, Key=key)


# ------------------------------------------------------------------------------------------------------------- transfers


def upload(path: Path, url: str) -> None:
    """Put a local file as an object, which appears whole; a large one in parts, side by side."""
    size = path.stat().st_size
    if size <= 2 * PART:
        _put(url, path.read_bytes())
        return
    _put_parts(url, size, partial(_piece, path))


def _piece(path: Path, start: int, size: int) -> bytes:
    with open(path, "rb") as file:
        file.seek(start)
        return file.read(size)


def upload_all(files: Sequence[tuple[Path, str]]) -> None:
    """Put local files: small ones side by side, then large ones one after the other, each in parts side by side."""
    large = {path for path, _ in files if path.stat().st_size > PART}
    with _pool() as pool:
        _each(pool, lambda pair: upload(*pair), [pair for pair in files if pair[0] not in large])
    for path, url in files:
        if path in large:
            upload(path, url)


def _put_parts(url: str, size: int, part: Callable[[int, int], bytes]) -> None:
    """Put an object of `size` bytes, of which part(start, length) gives some, as a multipart upload."""
    bucket, key = split(url)
    length = max(PART, math.ceil(size / _MOST_PARTS))
    # By this the object is known to be this upload's when the answer to its completion was lost.
    mark = uuid.uuid4().hex
    begun = _told_ask(
        url, "CreateMultipartUpload", lambda s3: s3.create_multipart_upload(Bucket=bucket, Key=key, Metadata={"upload": mark})
    )
    upload = {"Bucket": bucket, "Key": key, "UploadId": begun["UploadId"]}

    def send(number: int) -> dict[str, Any]:
        body = part((number - 1) * length, length)
        sent = _told_ask(url, "UploadPart", lambda s3: s3.upload_part(**upload, PartNumber=number, Body=body))
        checks = {name: value for name, value in sent.items() if name.startswith("Checksum") and name != "ChecksumType"}
        return {"PartNumber": number, "ETag": sent["ETag"]} | checks

    try:
        with _pool() as pool:
            parts = _each(pool, send, range(1, math.ceil(size / length) + 1))
        whole = {"MultipartUpload": {"Parts": parts}}
        try:
            _ask(url, "CompleteMultipartUpload", lambda s3: s3.complete_multipart_upload(**upload, **whole))
        except failures.ClientError as error:
            if _status(error) != 404:
                raise _told(url, error) from error
            there = _told_ask(url, "HeadObject", lambda s3: s3.head_object(Bucket=bucket, Key=key))
            if there["Metadata"].get("upload") != mark:
                raise _told(url, error) from error
    except BaseException:
        # What cannot be ended now stays invisible until the bucket's lifecycle rule removes it.
        with suppress(NoAnswer, UserError):
            _told_ask(url, "AbortMultipartUpload", lambda s3: s3.abort_multipart_upload(**upload), patience=5.0)
        raise


def download(url: str, target: Path, without: str = "") -> bool:
    """Copy an object, or all objects under a folder, to the local path; False when there is neither.

    without: name of a folder in the folder that is left out. Large objects come as ranges of one version, side by side. Changed
    when one was written anew meanwhile.
    """
    single = head(url)
    if single is not None:
        wanted = [(single, target)]
    else:
        key = split(url)[1]
        skipped = len(key) + 1 if key else 0
        there = [(o, o.key[skipped:]) for objects, _ in pages(url, deep=True) for o in objects]
        wanted = [(o, target / name) for o, name in there if not (without and name.startswith(without + "/"))]
    units = []
    for found, path in wanted:
        if ".." in path.parts:
            raise UserError(f"{found.url}: its name leaves the folder; rename it")
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "wb") as file:
            file.truncate(found.size)
        units += [(found, path, start) for start in range(0, found.size, PART)]

    def fetch(unit: tuple[Object, Path, int]) -> None:
        found, path, start = unit
        size = min(PART, found.size - start)
        # Whole, a small object is checked against its checksum.
        data = get(found.url, start, None if size == found.size else size, found.etag)
        if len(data) != size:
            raise Changed(f"{found.url}: was written anew while it was read")
        with open(path, "r+b") as file:
            file.seek(start)
            file.write(data)

    with _pool() as pool:
        _each(pool, fetch, units)
    return bool(wanted)


class Reader(RawIOBase):
    """Seekable reader of one version of an object; a read from where the last one ended takes twice as much at once.

    Opening is one request, which brings the beginning: all that a small object or a reader of headers needs.
    """

    SMALLEST, LARGEST = 256 << 10, 8 << 20

    def __init__(self, url: str) -> None:
        self.url = url
        self._at = self._start = 0
        self._block, self.size, self._etag = _get(url, 0, self.SMALLEST, None)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        origin = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self.size}[whence]
        if origin + offset < 0:
            raise ValueError(f"negative position {origin + offset}")
        self._at = origin + offset
        return self._at

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        if self._at >= self.size or not len(view):
            return 0
        end = self._start + len(self._block)
        if not self._start <= self._at < end:
            ahead = min(2 * len(self._block), self.LARGEST) if self._at == end and self._block else self.SMALLEST
            size = min(max(ahead, len(view)), self.size - self._at)
            self._start, self._block = self._at, get(self.url, self._at, size, self._etag)
        data = self._block[self._at - self._start :][: len(view)]
        view[: len(data)] = data
        self._at += len(data)
        return len(data)


def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(PARALLEL, "s3")


def _each(pool: ThreadPoolExecutor, work: Callable[[Any], T], items: Sequence[Any]) -> list[T]:
    """Results in order; the first failure ends the rest, of which nothing new begins."""
    futures = [pool.submit(work, item) for item in items]
    try:
        return [future.result() for future in futures]
    except BaseException:
        pool.shutdown(cancel_futures=True)
        raise


# --------------------------------------------------------------------------------------------------------------- repeats


def _ask(url: str, operation: str, request: Callable[[Any], T], patience: float | None = None) -> T:
    """One request, repeated while it fails of the network or the server.

    NoAnswer when that goes on for `patience` seconds (None: the setting), AccessError at once when nothing can work;
    botocore's ClientError for what S3 refuses.
    """
    patience = _patience() if patience is None else patience
    s3 = _client(url)
    tries, began, told = 0, 0.0, False
    while True:
        tries += 1
        try:
            return request(s3)
        except (failures.ClientError, failures.BotoCoreError, *_BELOW) as error:
            if not _passes(error):
                if isinstance(error, failures.ClientError):
                    raise
                raise _told(url, error) from error
            now = time.monotonic()
            began = began or now
            wait = random.uniform(0, min(LONGEST_WAIT, FIRST_WAIT * 2.0 ** min(tries - 1, 30)))
            reason = f"{operation} at {s3.meta.endpoint_url}: {_reason(error)}"
            if now + wait - began > patience:
                raise NoAnswer(
                    f"{url}: S3 gave no right answer in {tries} tries over {now - began:.0f} s ({reason}); "
                    "the same command continues when it is back"
                ) from error
            if not told and now - began > _LOUD_AFTER:
                told = True
                _log.warning("%s: trying again for up to %.0f s (%s)", url, patience, reason)
        time.sleep(wait)


def _told_ask(url: str, operation: str, request: Callable[[Any], T], patience: float | None = None) -> T:
    """`_ask`, with S3's refusals as UserError, AccessError or Changed."""
    try:
        return _ask(url, operation, request, patience)
    except failures.ClientError as error:
        raise _told(url, error) from error


def _passes(error: Exception) -> bool:
    """Whether the same request may succeed a little later."""
    if isinstance(error, failures.ClientError):
        code, status = error.response["Error"].get("Code", ""), _status(error)
        return code in _PASSING or status in (408, 429) or (status >= 500 and status != 501)
    if "CERTIFICATE_VERIFY_FAILED" in str(error):
        return False
    passing = (
        *(failures.HTTPClientError, failures.ConnectionError, failures.IncompleteReadError, failures.FlexibleChecksumError),
        *(failures.CredentialRetrievalError, failures.MetadataRetrievalError),
        *_BELOW,
    )
    return isinstance(error, passing)


def _told(url: str, error: Exception) -> Exception:
    """What to raise for an error that does not pass: what the user can mend in words, anything else as it is."""
    if not isinstance(error, failures.ClientError):
        hint = "set AWS_CA_BUNDLE to its certificates" if "CERTIFICATE_VERIFY" in str(error) else "check AWS_* in the environment"
        kind = UserError if isinstance(error, failures.ParamValidationError) else AccessError
        return kind(f"{url}: {_one_line(error)}; {hint}")
    code, status = error.response["Error"].get("Code", ""), _status(error)
    message = _one_line(error.response["Error"].get("Message", "") or error)
    if code == "NoSuchBucket":
        return AccessError(f"{url}: there is no bucket {split(url)[0]}; create it or correct the URL")
    if code in _CREDENTIALS:
        keys = "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, AWS_PROFILE or the machine's role"
        return AccessError(f"{url}: S3 refuses the credentials ({code}: {message}); check {keys}")
    if code in _REGION:
        return AccessError(f"{url}: the bucket is in another region ({code}: {message}); set AWS_REGION to it")
    if status == 412:
        return Changed(f"{url}: was written anew while it was read")
    if status == 404:
        return UserError(f"{url}: no such file or folder; check the path")
    if status == 403:
        return UserError(f"{url}: permission denied; check the rights on it ({message})")
    if code in _USERS:
        return UserError(f"{url}: S3 refuses it ({code}: {message})")
    return error


def _status(error: failures.ClientError) -> int:
    return int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))


def _patience() -> float:
    given = os.environ.get("I3CL_S3_PATIENCE")
    if not given:
        return PATIENCE_SECONDS
    try:
        seconds = float(given)
    except ValueError:
        seconds = math.nan
    if not 0 <= seconds < math.inf:
        raise UserError(f"I3CL_S3_PATIENCE: {given!r} is no number of seconds from 0; correct it")
    return seconds


def _reason(error: Exception) -> str:
    if isinstance(error, failures.ClientError):
        return f"{error.response['Error'].get('Code', _status(error))}: {_one_line(error.response['Error'].get('Message', ''))}"
    return _one_line(error)


def _one_line(error: object) -> str:
    return " ".join(str(error).split()) or ("no reason given" if isinstance(error, str) else type(error).__name__)


_making = threading.Lock()


def _client(url: str) -> Any:
    certificates = os.environ.get("AWS_CA_BUNDLE")
    if certificates and not os.path.exists(certificates):
        raise AccessError(f"{url}: AWS_CA_BUNDLE names {certificates}, which is not there; correct it or put the file there")
    environment = tuple(sorted((key, value) for key, value in os.environ.items() if key.startswith("AWS_")))
    try:
        with _making:
            return _made_client(os.getpid(), environment)
    except (failures.BotoCoreError, ValueError) as error:
        raise _told(url, error) from error


@lru_cache(maxsize=4)
def _made_client(process: int, environment: tuple[tuple[str, str], ...]) -> Any:
    """One for all threads of a process and as long as the environment says the same."""
    config = Config(
        connect_timeout=CONNECT_SECONDS,
        read_timeout=ANSWER_SECONDS,
        # Repeats are `_ask`'s: botocore's own would multiply with them, and know no limit in seconds.
        retries={"total_max_attempts": 1, "mode": "standard"},
        max_pool_connections=4 * PARALLEL,
        tcp_keepalive=True,
    )
    return boto3.session.Session().client("s3", config=config)


# --------------------------------------------------------------------------------------------------------------- pyarrow


class ArrowS3(pyarrow.fs.S3FileSystem):
    """pyarrow's own client with our timeouts and retries, kept when Ray ships it: the plain class loses its retries."""

    def __init__(self, options: dict[str, str]) -> None:
        super().__init__(
            **options,
            # A small file is then one request instead of three.
            allow_delayed_open=True,
            # Else every copy puts an object for each folder above, where it may have no right to write.
            check_directory_existence_before_creation=True,
            connect_timeout=CONNECT_SECONDS,
            request_timeout=ANSWER_SECONDS,
            retry_strategy=pyarrow.fs.AwsStandardS3RetryStrategy(max_attempts=PYARROW_ATTEMPTS),
        )
        self._options = options

    def create_dir(self, path: str, *, recursive: bool = True) -> None:
        """Nothing: a folder is there as soon as something lies in it."""

    def __reduce__(self) -> tuple[Any, ...]:
        # Without credentials: each machine finds its own.
        return ArrowS3, (self._options,)


def arrow(url: str) -> tuple[ArrowS3, str]:
    """pyarrow's filesystem for a URL and the path in it (bucket/key). AccessError for what the environment has wrong."""
    bucket, key = split(url)
    options: dict[str, str] = {}
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    try:
        if endpoint:
            parts = urlsplit(endpoint)
            options |= {"scheme": parts.scheme, "endpoint_override": parts.netloc + parts.path.rstrip("/")}
        if region or not endpoint:
            options["region"] = region or pyarrow.fs.resolve_s3_region(bucket)
        if certificates := os.environ.get("AWS_CA_BUNDLE"):
            options["tls_ca_file_path"] = certificates
        return ArrowS3(options), posixpath.join(bucket, key) if key else bucket
    except (OSError, ValueError, pyarrow.ArrowException) as error:
        raise AccessError(f"{url}: {_one_line(error)}; check AWS_* in the environment") from error

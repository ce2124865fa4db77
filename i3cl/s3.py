"""S3 through s3fs and through pyarrow: settings, retries of whole calls for a limited time, and plain error messages.

Endpoint, region, credentials and certificates come from the environment, the AWS profile or the machine's role. Only `storage`
imports this module; everything else uses `storage`.
"""

from __future__ import annotations

import logging
import math
import os
import posixpath
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, TypeVar
from urllib.parse import urlsplit

import aiohttp
import pyarrow.fs
import tenacity
from botocore import exceptions as failures
from s3fs import S3FileSystem
from s3fs.core import S3_RETRYABLE_ERRORS

from i3cl.errors import UserError

CONNECT_SECONDS, ANSWER_SECONDS = 10, 60
"""Time limits for making a connection, and for the next bytes of an answer."""
ATTEMPTS = 5
"""Attempts of botocore for one request, with waits of up to 1, 2, 4 and 8 seconds between them; fewer if patience is shorter."""
PATIENCE = "120"
"""Seconds after its first failure for which a call that still fails is repeated; I3CL_S3_PATIENCE sets another value."""
PYARROW_ATTEMPTS = 12
"""Attempts of pyarrow's own client for one request: about a minute and a half of waiting. It has no limit in seconds."""
PART, PARTS = 8 << 20, 4
"""Bytes of one part of a large object, and how many parts are transferred at the same time."""
T = TypeVar("T")

_log = logging.getLogger("i3cl.s3")
_BROKEN = (
    *(*S3_RETRYABLE_ERRORS, aiohttp.ClientError, ConnectionError, failures.ConnectionError, failures.FlexibleChecksumError),
    *(failures.CredentialRetrievalError, failures.MetadataRetrievalError),
)
# Besides every status from 500 on. NoSuchUpload: the upload was completed, the answer got lost, and botocore asked again.
_PASSING = {"RequestTimeout", "OperationAborted", "IncompleteBody", "BadDigest", "XAmzContentSHA256Mismatch", "NoSuchUpload"}
_REGION = {"PermanentRedirect", "AuthorizationHeaderMalformed", "IllegalLocationConstraintException", "301"}
_HINT = "check AWS_* in the environment"


class NoAnswer(RuntimeError):
    """S3 gave no valid answer for as long as calls are repeated: the network's or the server's fault, not the user's."""


class AccessError(UserError):
    """S3 refuses all access (credentials, bucket, region, certificate), not only access to the requested object."""


class Missing(UserError):
    """There is no such object."""


class Changed(RuntimeError):
    """The object was changed while it was read, or is there already where a new one was wanted."""


class Unknown(RuntimeError):
    """The store does not know this kind of request."""


def split(url: str) -> tuple[str, str]:
    """Split an s3:// URL into bucket and key; the key is '' for the bucket itself. UserError when it names no bucket."""
    bucket, _, key = url.split("://", 1)[-1].strip("/").partition("/")
    if not bucket:
        raise UserError(f"{url}: names no bucket; write s3://bucket/path")
    return bucket, key


def ask(url: str, call: Callable[[S3FileSystem], T]) -> T:
    """Call s3fs, and repeat the whole call while the network or the server fails.

    Raises NoAnswer when that goes on for too long. Raises at once, without repeating: Missing, AccessError, another UserError,
    Changed, or an error that is none of these as it is.
    """
    given = os.environ.get("I3CL_S3_PATIENCE") or PATIENCE
    if not re.fullmatch(r"\d{1,6}(\.\d*)?", given):
        raise UserError(f"I3CL_S3_PATIENCE: {given!r} is not a number of seconds, 0 or more; correct it")
    patience, failed = float(given), list[float]()
    environment = tuple(sorted((key, value) for key, value in os.environ.items() if key.startswith("AWS_")))

    def over(state: tenacity.RetryCallState) -> bool:
        # Counted from the first failure, because a large transfer may run long before it fails.
        failed.append(time.monotonic())
        return failed[-1] - failed[0] + state.upcoming_sleep > patience

    def tell(state: tenacity.RetryCallState) -> None:
        _log.warning("%s: again for up to %s s (%r)", url, given, state.outcome and state.outcome.exception())

    wait = tenacity.wait_random_exponential(multiplier=0.2, max=20)
    again = tenacity.Retrying(retry=tenacity.retry_if_exception(_passes), wait=wait, stop=over, before_sleep=tell, reraise=True)
    try:
        attempts = min(ATTEMPTS, int(math.log2(1 + patience)) + 1)
        return again(lambda: call(_client(os.getpid(), environment, attempts)))
    except (OSError, ValueError, failures.BotoCoreError, *_BROKEN) as error:
        if _passes(error):
            tried = f"in {len(failed)} tries over {failed[-1] - failed[0]:.0f} s ({_reason(error)})"
            raise NoAnswer(f"{url}: S3 gave no valid answer {tried}; run the same command again to continue") from error
        if told := _told(url, error):
            raise told from error
        raise


@lru_cache(maxsize=4)
def _client(process: int, environment: tuple[tuple[str, str], ...], attempts: int) -> S3FileSystem:
    """Make one client for all threads of a process, as long as the environment stays the same; fsspec makes one per thread."""
    given = dict(environment)
    retries = {"mode": "standard", "total_max_attempts": attempts}
    timeouts = {"connect_timeout": CONNECT_SECONDS, "read_timeout": ANSWER_SECONDS, "tcp_keepalive": True}
    client = S3FileSystem(
        endpoint_url=given.get("AWS_ENDPOINT_URL_S3") or given.get("AWS_ENDPOINT_URL"),
        client_kwargs={"region_name": given.get("AWS_REGION") or given.get("AWS_DEFAULT_REGION")},
        config_kwargs={"retries": retries, "max_pool_connections": 64, **timeouts},
        default_block_size=PART,
        max_concurrency=PARTS,
        use_listings_cache=False,
        skip_instance_cache=True,
    )
    # s3fs repeats what botocore repeats already, in some calls twice over; `ask` does it once, with a time limit.
    client.retries = 1
    certificates = given.get("AWS_CA_BUNDLE")
    try:
        if certificates and not os.path.exists(certificates):
            raise ValueError(f"AWS_CA_BUNDLE names {certificates}, which does not exist")
        client.connect()
    except ValueError as error:
        raise failures.InvalidConfigError(error_msg=f"{error}") from error
    return client


@contextmanager
def counted(url: str) -> Iterator[Counter[str]]:
    """Requests that s3fs sends from this process meanwhile, by operation (GetObject, ListObjectsV2, ...), repeated ones too."""
    found: Counter[str] = Counter()

    def note(event_name: str, **_: Any) -> None:
        found[event_name.rpartition(".")[2]] += 1

    ask(url, lambda fs: fs.s3.meta.events.register("before-send.s3", note))
    try:
        yield found
    finally:
        ask(url, lambda fs: fs.s3.meta.events.unregister("before-send.s3", note))


def _refusal(error: BaseException | None) -> failures.ClientError | None:
    """Return S3's own answer, which s3fs turned into another error."""
    while error is not None and not isinstance(error, failures.ClientError):
        error = error.__cause__
    return error


def _passes(error: BaseException) -> bool:
    """Whether the same call may succeed when it is repeated."""
    if refused := _refusal(error):
        status = refused.response["ResponseMetadata"]["HTTPStatusCode"]
        return refused.response["Error"]["Code"] in _PASSING or status == 429 or (status >= 500 and status != 501)
    return isinstance(error, _BROKEN) and "CERTIFICATE_VERIFY_FAILED" not in str(error)


def _told(url: str, error: Exception) -> Exception | None:
    """Make a plain error of what the user can fix; None for anything else."""
    refused, reason = _refusal(error), _reason(error)
    if refused is None:
        if isinstance(error, FileNotFoundError) and error.errno is None:
            return Missing(f"{url}: no such file or folder; check the path")
        if isinstance(error, (ValueError, failures.ParamValidationError)):
            return UserError(f"{url}: {reason}")
        hint = "set AWS_CA_BUNDLE to its certificates" if "CERTIFICATE_VERIFY" in reason else _HINT
        return AccessError(f"{url}: {reason}; {hint}") if isinstance(error, (failures.BotoCoreError, *_BROKEN)) else None
    code, status = refused.response["Error"]["Code"], refused.response["ResponseMetadata"]["HTTPStatusCode"]
    if status in (400, 403) and refused.operation_name == "HeadObject":
        # This answer has no body, so bad credentials cannot be told from a missing permission; ask again in another way.
        ask(url, lambda fs: fs.cat_file(url, 0, 1))
    if code == "NoSuchBucket":
        return AccessError(f"{url}: the bucket {split(url)[0]} does not exist; create it or correct the URL")
    if code in _REGION:
        return AccessError(f"{url}: the bucket is in another region ({reason}); set AWS_REGION to it")
    if "Token" in code or (status == 403 and code not in ("AccessDenied", "InvalidObjectState", "403")):
        keys = "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, AWS_PROFILE or the machine's role"
        return AccessError(f"{url}: S3 refuses the credentials ({reason}); check {keys}")
    if status == 403:
        return UserError(f"{url}: permission denied; check its permissions ({reason})")
    if status == 404:
        return Missing(f"{url}: no such file or folder; check the path")
    if status == 412:
        return Changed(f"{url}: was changed while it was read")
    if status == 501:
        return Unknown(f"{url}: S3 does not know this request ({reason})")
    return UserError(f"{url}: S3 refuses it ({reason})") if status in (400, 405) else None


def _reason(error: BaseException) -> str:
    refused = _refusal(error)
    text = f"{refused.response['Error']['Code']}: {refused.response['Error'].get('Message')}" if refused else str(error)
    return " ".join(text.split()) or type(error).__name__


class ArrowS3(pyarrow.fs.S3FileSystem):
    """pyarrow's own client with our timeouts and retries, which the plain class loses when Ray sends it to another process."""

    def __init__(self, options: dict[str, str]) -> None:
        super().__init__(
            **options,
            # So that a small file takes one request instead of three.
            allow_delayed_open=True,
            # Otherwise every copy writes an object for each parent folder, where writing may not be permitted.
            check_directory_existence_before_creation=True,
            connect_timeout=CONNECT_SECONDS,
            request_timeout=ANSWER_SECONDS,
            retry_strategy=pyarrow.fs.AwsStandardS3RetryStrategy(max_attempts=PYARROW_ATTEMPTS),
        )
        self._options = options

    def create_dir(self, path: str, *, recursive: bool = True) -> None:
        """Do nothing: on S3, a folder exists as soon as it contains something."""

    def __reduce__(self) -> tuple[Any, ...]:
        # Without credentials: each machine finds its own.
        return ArrowS3, (self._options,)


def arrow(url: str) -> tuple[ArrowS3, str]:
    """Return pyarrow's filesystem for a URL and the path in it (bucket/key). AccessError when the environment is wrong."""
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
        raise AccessError(f"{url}: {_reason(error)}; {_HINT}") from error

"""S3 through s3fs: its settings, whole calls done anew for a limited time, errors in words; pyarrow's client alike.

Endpoint, region, credentials and certificates come from the environment, the AWS profile or the machine's role. `storage` is
for everybody else; nothing else of the package imports this.
"""

from __future__ import annotations

import logging
import math
import os
import posixpath
import re
import time
from collections.abc import Callable
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
"""A connection that takes longer, or an answer of which nothing comes for so long, has failed."""
ATTEMPTS = 5
"""Of one request by botocore, which waits up to 1, 2, 4 and 8 seconds between them; fewer where patience is shorter."""
PATIENCE = "120"
"""Seconds: a call that fails nevertheless is done anew for so long after its first failure; I3CL_S3_PATIENCE sets another."""
PYARROW_ATTEMPTS = 12
"""Of one request by pyarrow's own client, which has no limit in seconds: about a minute and a half of waits."""
PART, PARTS = 8 << 20, 4
"""Bytes of a part of a large object, and how many of them travel at a time."""
T = TypeVar("T")

_log = logging.getLogger("i3cl.s3")
_BROKEN = (
    *(*S3_RETRYABLE_ERRORS, aiohttp.ClientError, ConnectionError, failures.ConnectionError, failures.FlexibleChecksumError),
    *(failures.CredentialRetrievalError, failures.MetadataRetrievalError),
)
# Beside every status of 500 and more. No such upload: it was ended, the answer lost, and botocore asked again.
_PASSING = {"RequestTimeout", "OperationAborted", "IncompleteBody", "BadDigest", "XAmzContentSHA256Mismatch", "NoSuchUpload"}
_REGION = {"PermanentRedirect", "AuthorizationHeaderMalformed", "IllegalLocationConstraintException", "301"}
_HINT = "check AWS_* in the environment"


class NoAnswer(RuntimeError):
    """S3 gave no right answer for as long as calls are repeated: the network's or the server's fault, not the user's."""


class AccessError(UserError):
    """S3 refuses everything (credentials, bucket, region, certificate): no fault of the one object that was asked for."""


class Missing(UserError):
    """There is no such object."""


class Changed(RuntimeError):
    """The object was written anew while it was read."""


def split(url: str) -> tuple[str, str]:
    """Bucket and key ('' for the bucket itself) of an s3:// URL. UserError when it names no bucket."""
    bucket, _, key = url.split("://", 1)[-1].strip("/").partition("/")
    if not bucket:
        raise UserError(f"{url}: names no bucket; write s3://bucket/path")
    return bucket, key


def ask(url: str, call: Callable[[S3FileSystem], T]) -> T:
    """What a call of s3fs gives, done anew as a whole while it fails of the network or the server.

    NoAnswer when that goes on for too long; at once Missing, AccessError, another UserError or Changed, or the error as it is.
    """
    given = os.environ.get("I3CL_S3_PATIENCE") or PATIENCE
    if not re.fullmatch(r"\d{1,6}(\.\d*)?", given):
        raise UserError(f"I3CL_S3_PATIENCE: {given!r} is no number of seconds from 0; correct it")
    patience, failed = float(given), list[float]()
    environment = tuple(sorted((key, value) for key, value in os.environ.items() if key.startswith("AWS_")))

    def over(state: tenacity.RetryCallState) -> bool:
        # Counted from the first failure: a large transfer takes long before it.
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
            raise NoAnswer(f"{url}: S3 gave no right answer {tried}; the same command continues when it is back") from error
        if told := _told(url, error):
            raise told from error
        raise


@lru_cache(maxsize=4)
def _client(process: int, environment: tuple[tuple[str, str], ...], attempts: int) -> S3FileSystem:
    """One for all threads of a process, as long as the environment says the same; fsspec would keep one for each thread."""
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
    # s3fs's own repeats are around botocore's and in some calls around themselves; `ask` does the same with a limit in time.
    client.retries = 1
    certificates = given.get("AWS_CA_BUNDLE")
    try:
        if certificates and not os.path.exists(certificates):
            raise ValueError(f"AWS_CA_BUNDLE names {certificates}, which is not there")
        client.connect()
    except ValueError as error:
        raise failures.InvalidConfigError(error_msg=f"{error}") from error
    return client


def _refusal(error: BaseException | None) -> failures.ClientError | None:
    """S3's own answer, from which s3fs made an error."""
    while error is not None and not isinstance(error, failures.ClientError):
        error = error.__cause__
    return error


def _passes(error: BaseException) -> bool:
    """Whether the same call may succeed a little later."""
    if refused := _refusal(error):
        status = refused.response["ResponseMetadata"]["HTTPStatusCode"]
        return refused.response["Error"]["Code"] in _PASSING or status == 429 or (status >= 500 and status != 501)
    return isinstance(error, _BROKEN) and "CERTIFICATE_VERIFY_FAILED" not in str(error)


def _told(url: str, error: Exception) -> Exception | None:
    """In words what the user can mend, None for anything else."""
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
        # This answer has no body that would tell bad credentials from a missing right.
        ask(url, lambda fs: fs.cat_file(url, 0, 1))
    if code == "NoSuchBucket":
        return AccessError(f"{url}: there is no bucket {split(url)[0]}; create it or correct the URL")
    if code in _REGION:
        return AccessError(f"{url}: the bucket is in another region ({reason}); set AWS_REGION to it")
    if "Token" in code or (status == 403 and code not in ("AccessDenied", "InvalidObjectState", "403")):
        keys = "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, AWS_PROFILE or the machine's role"
        return AccessError(f"{url}: S3 refuses the credentials ({reason}); check {keys}")
    if status == 403:
        return UserError(f"{url}: permission denied; check the rights on it ({reason})")
    if status == 404:
        return Missing(f"{url}: no such file or folder; check the path")
    if status == 412:
        return Changed(f"{url}: was written anew while it was read")
    return UserError(f"{url}: S3 refuses it ({reason})") if status in (400, 405) else None


def _reason(error: BaseException) -> str:
    refused = _refusal(error)
    text = f"{refused.response['Error']['Code']}: {refused.response['Error'].get('Message')}" if refused else str(error)
    return " ".join(text.split()) or type(error).__name__


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
        raise AccessError(f"{url}: {_reason(error)}; {_HINT}") from error

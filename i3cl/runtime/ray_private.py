"""The only file that uses Ray's private modules: to find a cluster, to ask whether it answers, and to start a local Ray safely.

Ray has no public call for any of these. When Ray is updated, check this file first (tests/cluster/test_locks.py).
"""

from __future__ import annotations

import os
import stat
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from hashlib import sha256
from urllib.parse import urlsplit

from i3cl.errors import UserError


def cluster_address() -> str | None:
    """Return host:port of the cluster to join: RAY_ADDRESS, or else the one that `ray start` started on this machine.

    None when there is neither. UserError when RAY_ADDRESS holds anything else.
    """
    from ray._private.services import canonicalize_bootstrap_address_or_die, find_bootstrap_address

    given = os.environ.get("RAY_ADDRESS", "")
    if given == "local":
        return None
    if not given:
        try:
            return find_bootstrap_address(None)
        except PermissionError:  # the folder of another user's cluster
            return None
    if given == "auto":
        try:
            return canonicalize_bootstrap_address_or_die(given)
        except (ConnectionError, PermissionError) as error:
            raise UserError(
                "RAY_ADDRESS=auto: found no Ray cluster on this machine, or more than one; set RAY_ADDRESS=host:port"
            ) from error
    if "://" in given:
        raise UserError(
            f"RAY_ADDRESS={given}: is not the host:port of a cluster; to send a job to a cluster use `ray job submit --address`, "
            "to run on this machine unset RAY_ADDRESS"
        )
    try:
        complete = bool(urlsplit(f"//{given}").hostname and urlsplit(f"//{given}").port)
    except ValueError:
        complete = False
    if not complete:
        raise UserError(f"RAY_ADDRESS={given}: is not host:port, e.g. 10.0.0.1:6379")
    return given


def check_answers(address: str) -> None:
    """Raise UserError when no cluster answers at `address` or it asks for another token.

    ray.init would try for half a minute and then raise an error of its own.
    """
    import grpc
    from ray._private.authentication.authentication_token_setup import maybe_enable_token_auth_if_token_available
    from ray._private.grpc_utils import init_grpc_channel
    from ray.core.generated.gcs_service_pb2 import CheckAliveRequest  # type: ignore[attr-defined]
    from ray.core.generated.gcs_service_pb2_grpc import NodeInfoGcsServiceStub
    from ray.exceptions import AuthenticationError

    if os.environ.get("RAY_ADDRESS", "") in ("", "auto"):
        maybe_enable_token_auth_if_token_available(warn_if_disabled=False)  # as ray.init does
    where = f"RAY_ADDRESS={address}" if os.environ.get("RAY_ADDRESS") else f"the cluster of `ray start` at {address}"
    token = "export RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN or the file ~/.ray/auth_token with the cluster's token"
    with init_grpc_channel(address) as channel:
        try:
            NodeInfoGcsServiceStub(channel).CheckAlive(CheckAliveRequest(), timeout=10)
        except AuthenticationError as error:
            raise UserError(f"RAY_AUTH_MODE=token, but there is no token; {token}") from error
        except grpc.RpcError as error:
            if error.code() == grpc.StatusCode.UNAUTHENTICATED:
                raise UserError(
                    f"{where}: the cluster asks for its token, and this job has none or a different one; {token}"
                ) from error
            reason = " ".join(str(error.details()).split()).rpartition(": ")[2]
            raise UserError(
                f"{where}: no cluster answers there ({reason}); start it, correct RAY_ADDRESS, or set RAY_ADDRESS=local to run "
                "on this machine"
            ) from error


@dataclass(frozen=True)
class LocalPlaces:
    """Where a Ray that a job starts by itself keeps its files."""

    arguments: dict[str, str]
    """For ray.init."""
    told: str
    """What differs from Ray's own places, and why; '' when nothing does."""


def local_places() -> LocalPlaces:
    """Find folders in which a local Ray can start, and see to its token. UserError when there is no such folder.

    Ray alone ends with a traceback when the path of its folder is too long for a socket, the folder belongs to somebody else, the
    home folder cannot be written, or there is no /dev/shm.
    """
    from ray._common.utils import get_default_ray_temp_dir

    _make_token()
    usual = get_default_ray_temp_dir()
    name = next((name for name in ("RAY_TMPDIR", "TMPDIR") if name in os.environ), "")
    where = f"{name}={os.environ[name]}" if name else usual
    folder, told = usual, ""
    if fault := _unusable(usual):
        own = _own_folder()
        if own is None:
            raise UserError(
                f"{where}: Ray cannot keep its files there ({fault}), nor in a folder of its own in /tmp or /var/tmp; set "
                f"RAY_TMPDIR to a folder that you may write in, with a path of at most {_room() - len('/ray')} characters"
            )
        folder, told = os.path.join(own, "ray"), f"{where}: {fault}; Ray's files are in {own}"
    elif len(os.fsencode(usual)) > _room():
        own = _own_folder()
        if own is None:
            raise UserError(
                f"{where}: the path is too long for Ray's sockets; set RAY_TMPDIR to a folder with a path of at most "
                f"{_room() - len('/ray')} characters"
            )
        # A link with a short path: the files stay on the disk that the user chose.
        folder = os.path.join(own, sha256(os.fsencode(usual)).hexdigest()[:8])
        if not os.path.islink(folder):
            with suppress(FileExistsError):
                os.symlink(usual, folder)
        told = f"{where}: the path is too long for Ray's sockets; Ray reaches it by the link {folder}"
    arguments = {} if folder == usual else {"_temp_dir": folder}
    if not os.access("/dev/shm", os.W_OK | os.X_OK):
        arguments["_plasma_directory"] = folder
        os.makedirs(folder, exist_ok=True)
        told += f"{'; ' if told else ''}/dev/shm cannot be written; shared memory is in {folder}, which is slower"
    return LocalPlaces(arguments, told)


def _room() -> int:
    """Bytes that the path of Ray's folder may have, so that its longest socket path fits Linux's limit of 107 (macOS: 103)."""
    below = f"/session_2000-01-01_00-00-00_000000_{os.getpid()}/sockets/plasma_store"
    return (107 if sys.platform == "linux" else 103) - len(below)


def _unusable(folder: str) -> str:
    """Why a folder cannot be made or written in; '' when it can."""
    try:
        os.makedirs(folder, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder):
            return ""
    except OSError as error:
        return (error.strerror or str(error)).lower()


def _own_folder() -> str | None:
    """A folder with a short path that is this user's alone; None when there is no place for one."""
    for above in ("/tmp", "/var/tmp"):
        folder = f"{above}/i3cl-{os.getuid()}"
        with suppress(OSError):
            with suppress(FileExistsError):
                os.mkdir(folder, 0o700)
            found = os.lstat(folder)
            # Anybody can make a folder of this name there first: theirs is not used.
            if (
                stat.S_ISDIR(found.st_mode)
                and found.st_uid == os.getuid()
                and not found.st_mode & 0o077
                and not _unusable(folder)
            ):
                return folder
    return None


def _make_token() -> None:
    """Make the token of a local Ray where there is none yet; one for this job alone when the home folder cannot be written."""
    from ray._private.authentication.authentication_token_generator import generate_new_authentication_token
    from ray._private.authentication.authentication_token_setup import generate_and_save_token
    from ray._raylet import AuthenticationTokenLoader  # type: ignore[attr-defined]

    loader = AuthenticationTokenLoader.instance()
    if os.environ.get("RAY_AUTH_MODE", "token").lower() != "token" or loader.has_token(ignore_auth_mode=True):
        return
    try:
        generate_and_save_token()
    except (OSError, RuntimeError):  # RuntimeError: this user has no home folder
        os.environ["RAY_AUTH_TOKEN"] = generate_new_authentication_token()
    loader.reset_cache()


@contextmanager
def this_machine_only() -> Iterator[None]:
    """Make a Ray that is started inside listen on the loopback address only; by default it listens on every address."""
    from ray._private import ray_constants

    # Ray does the same on macOS and Windows. The constant is read when Ray is imported, the variable by the processes it starts.
    name = ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR
    before = os.environ.get(name), ray_constants.ENABLE_RAY_CLUSTER
    os.environ[name], ray_constants.ENABLE_RAY_CLUSTER = "0", False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before[1]
        os.environ.pop(name)
        if before[0] is not None:
            os.environ[name] = before[0]

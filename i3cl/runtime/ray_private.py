"""The only file that touches Ray's private modules: finding, asking and confining a cluster.

Ray has no public call for any of these; a new version of Ray is checked here first (tests/cluster/test_locks.py).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import urlsplit

from i3cl.errors import UserError


def cluster_address() -> str | None:
    """host:port of the cluster to join: RAY_ADDRESS, else the one that `ray start` has left on this machine; None: none.

    UserError for a RAY_ADDRESS of another kind.
    """
    from ray._private.services import canonicalize_bootstrap_address_or_die, find_bootstrap_address

    given = os.environ.get("RAY_ADDRESS", "")
    if given == "local":
        return None
    if not given:
        return find_bootstrap_address(None)
    if given == "auto":
        try:
            return canonicalize_bootstrap_address_or_die(given)
        except ConnectionError as error:
            raise UserError("RAY_ADDRESS=auto: `ray start` has left no one cluster here; give its host:port") from error
    if "://" in given:
        raise UserError(
            f"RAY_ADDRESS={given}: is no host:port of a cluster; for a job on it use `ray job submit --address`, for a Ray of "
            "this machine unset RAY_ADDRESS"
        )
    try:
        complete = bool(urlsplit(f"//{given}").hostname and urlsplit(f"//{given}").port)
    except ValueError:
        complete = False
    if not complete:
        raise UserError(f"RAY_ADDRESS={given}: is not host:port, e.g. 10.0.0.1:6379")
    return given


def check_answers(address: str) -> None:
    """UserError when no cluster answers there or it wants another token: ray.init would try for half a minute, then raise."""
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
                raise UserError(f"{where}: it wants its token, and this job has none or another one; {token}") from error
            reason = " ".join(str(error.details()).split()).rpartition(": ")[2]
            raise UserError(
                f"{where}: no cluster answers there ({reason}); start it, correct RAY_ADDRESS, or RAY_ADDRESS=local for a Ray "
                "of this machine"
            ) from error


@contextmanager
def this_machine_only() -> Iterator[None]:
    """A Ray that is started in the block listens on the loopback address; Ray by itself listens on every one."""
    from ray._private import ray_constants

    # Ray's own way on macOS and Windows. Read once, when Ray is imported, and by the processes that are started.
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

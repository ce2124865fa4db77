"""What every job shares: its command line, its exit status, and the way it reaches Ray.

Exit status 0 done; 2 the user's mistake, one line on stderr that names the file or key and the remedy; 1 anything else.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

from i3cl import observe
from i3cl.config import Settings, UserError, load_settings, to_yaml
from i3cl.storage import NoAnswer

TRAVELLING = ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_REGION", "AWS_DEFAULT_REGION")
"""Variables of a job that joins a cluster which its workers get too, besides I3CL_*, RAY_DATA_*, GLOO_* and NCCL_*. Never a
secret: Ray shows them to everybody who may look at the cluster. Keys and tokens come from each node's own environment or role."""

Work = Callable[[Settings, argparse.Namespace], None]
Arguments = Callable[[argparse.ArgumentParser], None]
E = TypeVar("E", bound=BaseException)


@dataclass(frozen=True)
class Command:
    """One of a job's commands: ``python jobs/NAME.py COMMAND …``."""

    work: Work
    description: str
    arguments: Arguments | None = None


def run_commands(commands: Mapping[str, Command], description: str) -> None:
    """As `run`, for a job whose first argument names what to do; without one, the list of commands."""
    width = max(map(len, commands))
    listing = "\n".join(f"  {name:{width}}  {command.description}" for name, command in commands.items())
    parser = argparse.ArgumentParser(
        description=f"{description}\n\n{listing}", formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", choices=commands, metavar="COMMAND")
    name = parser.parse_args(sys.argv[1:2]).command
    chosen = commands[name]
    run(chosen.work, chosen.description, chosen.arguments, argv=sys.argv[2:], prog=f"{Path(sys.argv[0]).name} {name}")


def run(
    work: Work,
    description: str,
    arguments: Arguments | None = None,
    argv: Sequence[str] | None = None,
    prog: str | None = None,
) -> None:
    """Parse ``--config FILE [key=value …] [--dry-run]``, call `work`, end the process with the status above.

    argv, prog: arguments and name in messages; None: the process's own.
    """
    parser = argparse.ArgumentParser(
        prog=prog, description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", metavar="FILE.yaml", help="recipe; see configs/")
    parser.add_argument("--dry-run", action="store_true", help="print the resolved settings and start nothing")
    parser.add_argument("--skip-bad", action="store_true", help="list and count bad images and annotations, and go on")
    if arguments:
        arguments(parser)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="any setting, e.g. train.steps=500")
    options = parser.parse_intermixed_args(argv)
    try:
        settings = load_settings(options.config, options.overrides)
        if options.skip_bad:
            settings = settings.model_copy(update={"data": settings.data.model_copy(update={"skip_bad": True})})
        if options.dry_run:
            print(to_yaml(settings), end="")
            return
        # `ray job stop`, and a machine that goes down, send SIGTERM some seconds before they kill.
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        observe.begin(settings.name, parser.prog.split()[-1].removesuffix(".py"))
        with observe.only_json():
            work(settings, options)
    except UserError as error:
        observe.complain(f"{parser.prog}: {error}")
        sys.exit(2)
    except KeyboardInterrupt:
        observe.complain(f"{parser.prog}: interrupted; the same command continues where it stopped")
        sys.exit(130)
    except Exception as error:
        lost = inside(error, NoAnswer)
        if lost is None:
            raise
        observe.complain(f"{parser.prog}: {lost}")
        sys.exit(1)


def inside(error: BaseException, kind: type[E]) -> E | None:
    """The error of this kind that an error, perhaps one that Ray wrapped in another process, comes from."""
    seen: BaseException | None = error
    while seen is not None:
        # Ray's own class for it prints the other process's trace: `cause` is the plain error.
        for found in (getattr(seen, "cause", None), seen):
            if isinstance(found, kind):
                return found
        seen = seen.__cause__ or seen.__context__
    return None


def connect() -> None:
    """Join the cluster of RAY_ADDRESS or a running one, else start a local Ray. Safe to call twice.

    Sets the environment that Ray reads on the driver: no chatter between a job's own lines. What workers print is shown with
    I3CL_WORKER_LOGS=1; with I3CL_LOG=json what they log is JSON (docs/observe.md).
    """
    defaults = {
        "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
        "RAY_AIR_NEW_OUTPUT": "0",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        "RAY_BACKEND_LOG_LEVEL": "fatal",
        "RAY_worker_maximum_startup_concurrency": "6",
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    for key, value in defaults.items():
        os.environ.setdefault(key, value)
    import ray

    logging.getLogger("ray").setLevel(logging.ERROR)
    if ray.is_initialized():
        return
    started, on_stop = time.perf_counter(), signal.getsignal(signal.SIGTERM)
    silent: dict[str, Any] = {"log_to_driver": os.environ.get("I3CL_WORKER_LOGS", "0") == "1", "logging_level": "ERROR"}
    if observe.wants_json():
        silent["logging_config"] = ray.LoggingConfig(encoding="JSON", log_level="INFO")
    address = _cluster_address()
    if address:
        _check_answers(address)
        # What `ray job submit --runtime-env-json` set is in this environment too, and equal keys are a conflict without this.
        os.environ["RAY_OVERRIDE_JOB_RUNTIME_ENV"] = "1"
        ray.init(runtime_env={"env_vars": travelling(os.environ)}, **silent)
    else:
        # More logical CPUs than cores: on a laptop Ray Data's decoding shares the cores with a training worker that reserves
        # them, and a cluster without a free logical CPU would wait for ever. Workers inherit this process's environment.
        cpus = max(8, 2 * (os.cpu_count() or 1))
        with _this_machine_only():
            ray.init("local", num_cpus=cpus, include_dashboard=False, object_store_memory=1 << 30, **silent)
    if on_stop is signal.default_int_handler:
        signal.signal(signal.SIGTERM, on_stop)  # ray.init puts its own there
    if observe.wants_json():
        # In this process the logging_config would have put Ray's own lines between the job's.
        logging.getLogger("ray").setLevel(logging.ERROR)
        logging.getLogger().setLevel(logging.WARNING)
    observe.joined()
    where = ray.get_runtime_context().gcs_address if address else "started here"
    observe.say(
        f"Ray: {where}, {ray.cluster_resources().get('CPU', 0):.0f} CPUs, "
        f"{ray.cluster_resources().get('GPU', 0):.0f} GPUs ({time.perf_counter() - started:.0f} s)",
        cpus=ray.cluster_resources().get("CPU", 0),
        gpus=ray.cluster_resources().get("GPU", 0),
    )


def travelling(environment: Mapping[str, str]) -> dict[str, str]:
    """Those of the variables that go with a job to the workers of a cluster: addresses and regions, never keys."""
    families = ("I3CL_", "RAY_DATA_", "GLOO_", "NCCL_")
    return {key: value for key, value in environment.items() if key in TRAVELLING or key.startswith(families)}


def _cluster_address() -> str | None:
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


def _check_answers(address: str) -> None:
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
def _this_machine_only() -> Iterator[None]:
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


def quiet(context: Any) -> None:
    """Keep a Ray Data context from printing: jobs show progress of their own."""
    context.enable_progress_bars = False
    context.issue_detectors_config.detectors = []
    logging.getLogger("ray.data").setLevel(logging.ERROR)


def duration(seconds: float) -> str:
    """'42 s', '3 min 05 s', '2 h 07 min': for progress lines."""
    seconds = max(0, round(seconds))
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 3600:
        return f"{seconds // 60} min {seconds % 60:02d} s"
    return f"{seconds // 3600} h {seconds % 3600 // 60:02d} min"

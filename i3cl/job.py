"""What every job shares: its command line, its exit status, and the way it reaches Ray.

Exit status 0 done; 2 the user's mistake, one line on stderr that names the file or key and the remedy; 1 anything else.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from i3cl.config import Settings, UserError, load_settings, to_yaml
from i3cl.storage import NoAnswer

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
        work(settings, options)
    except UserError as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print(f"{parser.prog}: interrupted; the same command continues where it stopped", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        lost = inside(error, NoAnswer)
        if lost is None:
            raise
        print(f"{parser.prog}: {lost}", file=sys.stderr)
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

    Sets the environment that Ray reads on the driver: quicker health checks, and no chatter between a job's own lines. What
    workers print is shown with I3CL_WORKER_LOGS=1.
    """
    defaults = {
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "1",
        "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "60",
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
    started = time.perf_counter()
    workers_env = {
        key: value for key, value in os.environ.items() if key.startswith(("AWS_", "I3CL_S3_", "RAY_DATA_", "GLOO_", "NCCL_"))
    }
    silent: dict[str, Any] = {"log_to_driver": os.environ.get("I3CL_WORKER_LOGS", "0") == "1", "logging_level": "ERROR"}
    environment = {"env_vars": workers_env}
    local: dict[str, Any] = {}
    if not os.environ.get("RAY_ADDRESS"):
        # More logical CPUs than cores: on a laptop Ray Data's decoding shares the cores with a training worker that reserves
        # them, and a cluster without a free logical CPU would wait for ever.
        local = {"num_cpus": max(8, 2 * (os.cpu_count() or 1)), "include_dashboard": False, "object_store_memory": 1 << 30}
    try:
        ray.init(runtime_env=environment, **local, **silent)
    except ValueError as error:
        # Ray found a cluster that `ray start` left on this machine; its size is its own.
        if not local or "existing cluster" not in str(error):
            raise
        ray.init(runtime_env=environment, **silent)
        local = {}
    where = "started here" if local else ray.get_runtime_context().gcs_address
    print(
        f"Ray: {where}, {ray.cluster_resources().get('CPU', 0):.0f} CPUs, "
        f"{ray.cluster_resources().get('GPU', 0):.0f} GPUs ({time.perf_counter() - started:.0f} s)",
        flush=True,
    )


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

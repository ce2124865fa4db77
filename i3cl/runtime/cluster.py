"""Joining a Ray cluster, or starting a local Ray when there is none."""

from __future__ import annotations

import logging
import os
import signal
import time
from collections.abc import Mapping
from typing import Any

from i3cl import observe
from i3cl.errors import UserError
from i3cl.runtime.ray_private import check_answers, cluster_address, local_places, this_machine_only

logger = logging.getLogger(__name__)

TRAVELLING = ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_REGION", "AWS_DEFAULT_REGION")
"""Environment variables copied to the workers when a job joins an existing cluster, besides I3CL_*, RAY_DATA_*, GLOO_* and
NCCL_*. Never secrets, because Ray shows them to everybody who may look at the cluster: keys and tokens come from each node's own
environment or role."""


def connect() -> None:
    """Join the cluster of RAY_ADDRESS or a running one, else start a local Ray. Safe to call twice.

    Sets environment variables that keep Ray's own messages out of the job's output. I3CL_WORKER_LOGS=1 shows what the workers
    print; with I3CL_LOG=json the workers log JSON (docs/observe.md). UserError when the cluster cannot be reached or a local Ray
    cannot start.
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
    address = cluster_address()
    if address:
        check_answers(address)
        # `ray job submit --runtime-env-json` has set some of these too; without this, Ray refuses a variable that is set twice.
        os.environ["RAY_OVERRIDE_JOB_RUNTIME_ENV"] = "1"
        ray.init(runtime_env={"env_vars": travelling(os.environ)}, **silent)
    else:
        _start(silent)
    if on_stop is signal.default_int_handler:
        signal.signal(signal.SIGTERM, on_stop)  # ray.init installs its own handler
    if observe.wants_json():
        # In this process the logging_config would show Ray's own INFO lines between the job's lines.
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


def _start(silent: Mapping[str, Any]) -> None:
    """Start a Ray on this machine, for this job alone. Its workers inherit the environment of this process."""
    places = local_places()
    if places.told:
        logger.info("Ray: %s", places.told)
    # More logical CPUs than cores: on a laptop Ray Data decodes images on the same cores that a training worker has reserved, and
    # without a free logical CPU it would wait for ever.
    cpus = max(8, 2 * (os.cpu_count() or 1))
    arguments: dict[str, Any] = {"num_cpus": cpus, "include_dashboard": False, "object_store_memory": 1 << 30}
    arguments |= {**places.arguments, **silent}
    try:
        with this_machine_only():
            if not _in_time(arguments):
                logger.info("Ray: this machine is too busy to start it in time; trying once more")
                if not _in_time(arguments):
                    raise UserError("Ray could not start in time, twice: this machine is too busy; give the command again later")
    except OSError as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"Ray cannot start here ({reason}); set RAY_TMPDIR to a short path of a folder that you may write in"
        ) from error


def _in_time(arguments: Mapping[str, Any]) -> bool:
    """Start Ray; False when its own processes were not there within the half minute that it waits for them."""
    import ray

    try:
        ray.init("local", **arguments)
    except Exception as error:
        if "timed out during startup" not in str(error):
            raise
        ray.shutdown()
        return False
    return True


def travelling(environment: Mapping[str, str]) -> dict[str, str]:
    """Select the variables that go with a job to the workers of a cluster: addresses and regions, never keys."""
    families = ("I3CL_", "RAY_DATA_", "GLOO_", "NCCL_")
    return {key: value for key, value in environment.items() if key in TRAVELLING or key.startswith(families)}


def quiet(context: Any) -> None:
    """Set a Ray Data context up for a job: no progress of its own, errors of tasks as they are, and pauses in its loop.

    The job shows its progress itself. A wrapper would lose the original error, and with it the file and the reason, on the way to
    the driver. Ray Data also logs every error that it raises; the job reports it once.
    """
    context.enable_progress_bars = False
    context.issue_detectors_config.detectors = []
    context.raise_original_map_exception = True
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)
    if Pauses not in context.custom_execution_callback_classes:
        context.custom_execution_callback_classes.append(Pauses)


class Pauses:
    """A pause in every round of Ray Data's scheduling loop, which is a thread of the process that reads the data.

    While the reader is slower than the tasks, the loop has nothing to wait for and runs without a pause (Ray 2.60): in a training
    worker it then took half of a core and of the interpreter's time. Ray calls these methods.
    """

    SECONDS = 0.05
    """One round can start many tasks, so this limits nothing."""

    def before_execution_starts(self, executor: Any) -> None:
        """Do nothing."""

    def on_execution_step(self, executor: Any) -> None:
        """Give the time to others."""
        time.sleep(self.SECONDS)

    def after_execution_succeeds(self, executor: Any) -> None:
        """Do nothing."""

    def after_execution_fails(self, executor: Any, error: Exception) -> None:
        """Do nothing."""

"""Joining a Ray cluster, or starting a local Ray when there is none."""

from __future__ import annotations

import logging
import os
import signal
import time
from collections.abc import Mapping
from typing import Any

from i3cl import observe
from i3cl.runtime.ray_private import check_answers, cluster_address, this_machine_only

TRAVELLING = ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_REGION", "AWS_DEFAULT_REGION")
"""Variables of a job that joins a cluster which its workers get too, besides I3CL_*, RAY_DATA_*, GLOO_* and NCCL_*. Never a
secret: Ray shows them to everybody who may look at the cluster. Keys and tokens come from each node's own environment or role."""


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
    address = cluster_address()
    if address:
        check_answers(address)
        # What `ray job submit --runtime-env-json` set is in this environment too, and equal keys are a conflict without this.
        os.environ["RAY_OVERRIDE_JOB_RUNTIME_ENV"] = "1"
        ray.init(runtime_env={"env_vars": travelling(os.environ)}, **silent)
    else:
        # More logical CPUs than cores: on a laptop Ray Data's decoding shares the cores with a training worker that reserves
        # them, and a cluster without a free logical CPU would wait for ever. Workers inherit this process's environment.
        cpus = max(8, 2 * (os.cpu_count() or 1))
        with this_machine_only():
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


def quiet(context: Any) -> None:
    """Keep a Ray Data context from printing, because jobs show their own progress, and let it pass on errors as they are.

    Ray's own wrapper for an error in a task loses the error on its way to the driver, and with it the file and the reason. Ray
    logs every error that it raises as well: the job tells it once.
    """
    context.enable_progress_bars = False
    context.issue_detectors_config.detectors = []
    context.raise_original_map_exception = True
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)

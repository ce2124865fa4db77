"""How many cores and GPUs there are to work with. Every part of the program asks here."""

from __future__ import annotations

import os
from typing import Literal


def machine_cores() -> int:
    """Cores of this machine that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cluster_cores() -> int:
    """Cores for work on the cluster that this process has joined, at least 1.

    A local Ray is told of more CPUs than the machine has, so on a single machine its real cores count: more processes than
    cores would only take memory.
    """
    cpus = _node_cpus()
    return max(1, min(int(cpus[0]), machine_cores()) if len(cpus) == 1 else int(sum(cpus)))


def node_cores() -> int:
    """Cores of the largest machine of the cluster that this process has joined, at least 1."""
    cpus = _node_cpus()
    return cluster_cores() if len(cpus) == 1 else max(1, int(max(cpus)))


def cluster_gpus() -> int:
    """GPUs of the cluster that this process has joined."""
    import ray

    return int(ray.cluster_resources().get("GPU", 0))


def use_gpu(gpu: bool | Literal["auto"]) -> bool:
    """What the setting cluster.gpu means on the cluster that this process has joined: whether work runs on GPUs."""
    return cluster_gpus() > 0 if gpu == "auto" else gpu


def _node_cpus() -> list[float]:
    import ray

    return [node["Resources"].get("CPU", 0.0) for node in ray.nodes() if node["Alive"]]

"""How the work of a labelling job is spread over the cluster."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from i3cl.config import LabelSettings, Settings
from i3cl.errors import UserError
from i3cl.labelling.actor import automatic_threads
from i3cl.runtime.cluster import connect
from i3cl.runtime.ray_private import cluster_address
from i3cl.runtime.resources import cluster_cores, cluster_gpus, node_cores, use_gpu


@dataclass(frozen=True)
class Layout:
    """How the work is spread over the cluster."""

    actors: int
    """To begin with."""
    most: int
    """At the same time, when GPUs join."""
    threads: int
    decode_threads: int
    cpus_per_actor: float
    gpus_per_actor: float
    shards_per_task: int


def layout(label: LabelSettings, shards: int, gpus: int, cpus: float, cores: int) -> Layout:
    """The layout with automatic values filled in.

    gpus, cpus: of the cluster, 0 GPUs when none is to be used; cores: of one machine.
    """
    threads = automatic_threads(label.threads, label.actors, gpus > 0, cores)
    if gpus:
        most = min(label.actors or shards, shards)
        actors = min(gpus * label.actors_per_gpu, most)
    else:
        actors = most = min(label.actors or max(1, int(cpus) // threads), shards)
    return Layout(
        actors,
        most,
        threads,
        label.decode_threads or (4 if gpus else 1),
        1 if gpus else min(threads, max(1.0, cpus)),
        1 / label.actors_per_gpu if gpus else 0.0,
        # Within a task decoding runs on from shard to shard; tasks that are too long would leave actors idle at the end.
        max(1, min(4, shards // (actors * 8))),
    )


def plan_of_cluster(settings: Settings, shards: int, say: Callable[[str], None]) -> Layout:
    """Join the cluster, and lay so many shards out over it.

    say: is told when the cluster has no GPU. UserError with cluster.gpu=true on a single machine without one.
    """
    connect()
    on_gpu = use_gpu(settings.cluster.gpu)
    gpus = cluster_gpus() if on_gpu else 0
    if on_gpu and not gpus:
        if cluster_address() is None:
            raise UserError("cluster.gpu: true, but this machine has no GPU; set cluster.gpu=auto or join a cluster")
        # The actors that wait for one make an autoscaler start machines.
        say("the cluster has no GPU now; waiting for the first one (cluster.gpu=false: do not wait)")
        gpus = 1
    elif not on_gpu and settings.cluster.gpu == "auto" and cluster_address() is not None:
        say("the cluster has no GPU now, so CPUs label; cluster.gpu=true waits for GPUs")
    return layout(settings.label, shards, gpus, cluster_cores(), node_cores())

"""What a labelling job will take, from a quick measurement of a few of its images, before it starts."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace

import numpy as np

from i3cl import claims, observe, storage
from i3cl.config import MemberSettings, Settings
from i3cl.data.formats.records import Dataset
from i3cl.errors import UserError
from i3cl.inference.recipe import Given
from i3cl.labelling.cost import COST, ESTIMATE
from i3cl.labelling.identity import as_member
from i3cl.labelling.layout import Layout, plan_of_cluster
from i3cl.labelling.predict import predict
from i3cl.runtime.pace import duration

_MEASURED = 50
"""Images."""
_ACTORS = 4
"""That measure, at most: each should see several images."""
_REQUESTS_PER_SHARD = 4
"""To S3, beside one for each image: whether the shard is done, its attempt before and after, its rows."""


@dataclass(frozen=True)
class Estimate:
    """A forecast for the whole job."""

    images: int
    passes: int
    """How often every image is read: once for each group of members that fits into memory."""
    actors: int
    """That the cluster has room for now."""
    seconds: float
    """Start-up included."""
    gpu_hours: float
    actor_hours: float
    money: float
    """At label.price_per_hour."""
    requests: int
    """To S3, if images and predictions lie there."""
    bytes_read: int
    bytes_written: int
    measured: int
    """Images that this comes from."""

    def lines(self) -> list[str]:
        """For people."""
        passes = f" in {self.passes} passes" if self.passes > 1 else ""
        rows = [
            f"{self.images} images{passes} on {self.actors} actors: about {duration(self.seconds)}",
            f"{self.gpu_hours:.2f} GPU-hours" if self.gpu_hours else f"{self.actor_hours:.2f} actor-hours",
            f"{self.bytes_read / 1e9:.2f} GB read, {self.bytes_written / 1e9:.2f} GB written; {self.requests} requests on S3",
        ]
        if self.money:
            rows.insert(2, f"money {self.money:.2f}")
        return [*rows, f"measured on {self.measured} images; the real number will differ with their sizes and with the cluster"]


def estimate(
    dataset: Dataset,
    members: Mapping[str, str | MemberSettings],
    settings: Settings,
    out: str,
    given: Given | None = None,
) -> Estimate:
    """Label a few images, spread over the data set, and forecast the job that `predict` with the same arguments would be.

    The forecast is written to <out>/estimate.json, and `predict` compares it at its end with what the job took. What was labelled
    for it is removed again.

    UserError as `predict`, or when all members' findings come from files.
    """
    detectors = {name: each for name, each in members.items() if not as_member(each).results}
    if members and not detectors:
        raise UserError("label.members: the findings of all members come from files; there is nothing to measure")
    if not len(dataset):
        raise UserError(f"{dataset.name}: has no images")
    count = min(_MEASURED, len(dataset))
    sample = replace(dataset.subset(np.linspace(0, len(dataset) - 1, count).astype(np.int64), dataset.name), annotations="")
    work = storage.join(out, "_estimate")
    storage.remove_tree(work)
    try:
        shards = math.ceil(len(dataset) / settings.label.rows_per_block)
        planned = plan_of_cluster(settings, shards, lambda text: observe.say(f"estimate: {text}"))
        actors = min(planned.actors, _ACTORS, count)
        changes = {"actors": actors, "rows_per_block": math.ceil(count / actors), "max_error_share": 1.0}
        own = settings.model_copy(update={"label": settings.label.model_copy(update=changes)})
        predict(sample, detectors, own, work, "estimate", given)
        found = _forecast(dataset, sample, settings, work, planned, actors)
    finally:
        storage.remove_tree(work)
    storage.write_text_atomic(storage.join(out, ESTIMATE), json.dumps(asdict(found), indent=1) + "\n")
    return found


def _forecast(dataset: Dataset, sample: Dataset, settings: Settings, work: str, planned: Layout, actors: int) -> Estimate:
    cost = claims.read(storage.join(work, COST))
    passes, count = round(cost["images"] / len(sample)), len(dataset)
    per_actor = cost["images_per_second"] / actors
    seconds = count * passes / (per_actor * planned.actors) + cost["startup_seconds"]
    hours = planned.actors * seconds / 3600
    gpu_hours = hours * planned.gpus_per_actor
    shards = math.ceil(count / settings.label.rows_per_block)
    written = sum(len(storage.read_bytes(part)) for part in claims.parts(work))
    return Estimate(
        images=count,
        passes=passes,
        actors=planned.actors,
        seconds=round(seconds, 1),
        gpu_hours=round(gpu_hours, 6),
        actor_hours=round(hours, 6),
        money=round((gpu_hours or hours) * settings.label.price_per_hour, 6),
        requests=passes * (count + _REQUESTS_PER_SHARD * shards),
        bytes_read=round(_bytes(sample) * count * passes),
        bytes_written=round(written / len(sample) * count),
        measured=len(sample),
    )


def _bytes(sample: Dataset) -> float:
    """Mean size of the image files that can be read."""
    sizes = []
    for record in sample.records:
        try:
            sizes.append(len(storage.read_bytes(sample.path(record))))
        except UserError:
            # The job makes an error row of it, and so has the measurement.
            continue
    return sum(sizes) / max(1, len(sizes))

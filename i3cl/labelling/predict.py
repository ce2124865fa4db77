"""Ensemble prediction: Ray Data hands shards of images to actors that hold the members.

The result is Parquet with one row for each image, member and view. Paths travel through the cluster, pixels do not. Every image
is labelled exactly once, whatever is killed and when (see ``i3cl.labelling.ledger``). An image that cannot be read does not stop
the job: the reason is written into the `error` column of its rows and into errors.csv.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from i3cl import observe, storage
from i3cl.claims import CHECKPOINT_FILES, recorded
from i3cl.config import LabelSettings, Settings
from i3cl.data.formats.parts import check_finished, note_command
from i3cl.data.formats.records import Dataset
from i3cl.errors import UserError, inside
from i3cl.inference.recipe import AS_TRAINED, Given, chosen_exif, describe_sizes, effective, given_size, recipe_of
from i3cl.labelling.actor import Labeller, Plan, automatic_threads, view_name
from i3cl.labelling.cost import CostFile, Meter, line
from i3cl.labelling.ledger import Ledger, part_name
from i3cl.labelling.manifest import Manifest, make_manifest
from i3cl.members.ours import checkpoint_hash, located
from i3cl.model.shipped import folder_of
from i3cl.runtime.cluster import connect, quiet
from i3cl.runtime.pace import Every
from i3cl.runtime.resources import cluster_cores, cluster_gpus, node_cores, use_gpu

_TOGETHER_BYTES = 4 << 30
"""Weights for which any GPU in use today has room beside the working memory of one network."""
_EARLY = 500
"""Images from which the share of errors so far may stop a job."""
_SHOWN = 5
"""Errors that are printed one by one."""
_COST_EVERY = 30.0
"""Seconds between two versions of cost.json."""


def predict(
    dataset: Dataset, members: dict[str, str], settings: Settings, out: str, title: str, given: Given | None = None
) -> str:
    """Write the members' predictions for every image of `dataset` as Parquet parts under `out`.

    The same call continues a job that was stopped, and returns at once when done.json says that it is done.

    Args:
        dataset: The images; their instances do not matter.
        members: Name -> checkpoint directory, local or s3://.
        settings: Of which `label` and `cluster.gpu` count, and data.exif where it is given; else the checkpoints' own counts.
        out: Folder of the job.
        title: Begins the lines of progress.
        given: What takes the place of the checkpoints' own test sizes and tiles; None: the keys of data.test_* and data.tile that
            the recipe or the command line gives.

    Returns:
        `out`.

    Raises:
        UserError: There is no member or no image; `out` holds another job (other images, weights, views, test size, tiles,
            data.exif or shard size), or parts were removed after it was done; a larger share of the images than
            label.max_error_share cannot be labelled; or the checkpoints were trained with different data.exif and none is given.
    """
    label = settings.label
    if not members:
        raise UserError("label.members: names no checkpoint; add label.members.NAME=CHECKPOINT_DIRECTORY")
    names = [view_name(view) for view in label.views]
    if not names or len(set(names)) < len(names):
        raise UserError(f"label.views: {', '.join(names) or 'is empty'}; name every view once")
    manifest = make_manifest(dataset)
    # By name, so that the order in a settings file means nothing.
    members = {name: located(members[name]) for name in sorted(members)}
    hashes = {name: checkpoint_hash(path) for name, path in members.items()}
    recipes = {name: recipe_of(path) for name, path in members.items()}
    given = given_size(settings) if given is None else given
    exif = chosen_exif(recipes, settings)
    groups = _groups(members, label)
    ledger = Ledger(out)
    ledger.claim(
        {
            "images": {"count": len(manifest), "sha256": manifest.digest, "root": dataset.images_root},
            "members": hashes,
            "views": names,
            "label.rows_per_block": label.rows_per_block,
            "groups": [list(group) for group in groups],
            "data.exif": exif,
            # A size that every checkpoint has anyway makes no other job.
            **effective(recipes, given),
        }
    )
    if ledger.is_done():
        ledger.clean()
        check_finished(out, storage.list_dir(out))
        return out
    note_command(out)
    sizes = describe_sizes(recipes, given) + (", images turned upright (data.exif)" if exif == "upright" else "")
    made_from: dict[str, Any] = {"members": {name: {"file": path, "sha256": hashes[name]} for name, path in members.items()}}
    if dataset.annotations:
        made_from["images"] = recorded(dataset.annotations) | {"images": manifest.digest}
    job = _Job(dataset, manifest, groups, settings, ledger, title, given, sizes, exif == "upright", made_from)
    job.run()
    return out


def _groups(members: dict[str, str], label: LabelSettings) -> tuple[dict[str, str], ...]:
    """The members in groups that an actor holds at the same time."""
    apart = label.passes == "per_member"
    if label.passes == "auto" and len(members) > 1:
        apart = sum(map(_weights_bytes, members.values())) > _TOGETHER_BYTES
    return tuple({name: path} for name, path in members.items()) if apart else (members,)


def _weights_bytes(checkpoint: str) -> int:
    with storage.open_read(storage.join(folder_of(checkpoint), CHECKPOINT_FILES[1])) as stream:
        return stream.seek(0, 2)


@dataclass(frozen=True)
class Layout:
    """How the work is spread over the cluster."""

    actors: int
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
    actors = label.actors or gpus or max(1, int(cpus) // threads)
    actors = min(actors, shards)
    return Layout(
        actors,
        threads,
        label.decode_threads or (4 if gpus else 1),
        1 if gpus else min(threads, max(1.0, cpus)),
        min(1.0, gpus / actors),
        # Within a task decoding runs on from shard to shard; tasks that are too long would leave actors idle at the end.
        max(1, min(4, shards // (actors * 8))),
    )


class _Job:
    """One run of one labelling job."""

    def __init__(
        self,
        dataset: Dataset,
        manifest: Manifest,
        groups: Sequence[dict[str, str]],
        settings: Settings,
        ledger: Ledger,
        title: str,
        given: Given = AS_TRAINED,
        sizes: str = "",
        upright: bool = False,
        made_from: Mapping[str, Any] | None = None,
    ) -> None:
        """sizes: a line that says at which test size the members see the images; upright: as `Plan.upright`.

        made_from: for done.json; files and hashes of members and image list.
        """
        self.made_from = made_from or {}
        self.dataset, self.manifest, self.groups, self.ledger, self.title = dataset, manifest, tuple(groups), ledger, title
        self.settings, self.label, self.given, self.sizes, self.upright = settings, settings.label, given, sizes, upright
        rows = self.label.rows_per_block
        self.parts = {
            part_name(group, shard): (group, shard) for group in range(len(groups)) for shard in range(manifest.shards(rows))
        }
        self.cost = CostFile(storage.join(ledger.out, "cost.json"))

    def run(self) -> None:
        """Label what is missing and finish the job."""
        finished = self.ledger.finished()
        missing = [part for part in self.parts if part not in finished]
        if missing:
            self._label(missing)
            left = self.parts.keys() - self.ledger.finished()
            if left:
                raise RuntimeError(
                    f"{self.ledger.out}: {len(left)} parts are missing, e.g. {min(left)}; give the same command again"
                )
        failures = self.ledger.failures()
        self._check_share(len(failures), len(self.manifest), len(self.manifest))
        for failure in failures[:_SHOWN]:
            self._say(f"skipped {failure.reason}", level="WARNING")
        errors = storage.join(self.ledger.out, "errors.csv")
        self.ledger.finish({"images": len(self.manifest), "failed": len(failures), "made_from": self.made_from})
        text = (
            f"{len(self.manifest)} images labelled"
            if not failures
            else (f"{len(self.manifest) - len(failures)} images labelled, {len(failures)} with errors: {errors}")
        )
        self._say(text, images=len(self.manifest), errors=len(failures))

    def _say(self, text: str, **numbers: Any) -> None:
        observe.say(f"{self.title}: {text}", stage=self.title, **numbers)

    def _label(self, missing: list[str]) -> None:
        connect()
        on_gpu = use_gpu(self.settings.cluster.gpu)
        gpus = cluster_gpus() if on_gpu else 0
        if on_gpu and not gpus:
            raise UserError("cluster.gpu: true, but the cluster has no GPU; set cluster.gpu=auto or add one")
        spread = layout(self.label, len(missing), gpus, cluster_cores(), node_cores())
        total = len(self.manifest) * len(self.groups)
        to_do = sum(self.manifest.shard_size(self.parts[part][1], self.label.rows_per_block) for part in missing)
        self._say(self.sizes)
        before = len(self.ledger.failures()) if len(missing) < len(self.parts) else 0
        meter = Meter(total, total - to_do, before, spread.actors, spread.gpus_per_actor, self.label.price_per_hour)
        self._say(
            f"{len(self.manifest)} images x {sum(map(len, self.groups))} members x {len(self.label.views)} views"
            + (f" in {len(self.groups)} passes" if len(self.groups) > 1 else "")
            + (f", {meter.done} of {total} done already" if meter.done else "")
            + f"; starting {spread.actors} actors of {spread.threads} threads"
            + (f", {spread.gpus_per_actor:g} GPUs each" if spread.gpus_per_actor else ""),
            images=total,
            done=meter.done,
            actors=spread.actors,
        )
        try:
            self._drain(missing, spread, meter)
        except Exception as error:
            mistake = inside(error, UserError)
            if mistake is None:
                raise
            raise UserError(str(mistake)) from None
        finally:
            cost = self.cost.write(meter)
            observe.labelling_ended(self.title)
        numbers = {key: value for key, value in cost.items() if key != "runs"}
        self._say(line(cost, self.label.price_per_hour > 0), **numbers)

    def _drain(self, missing: list[str], spread: Layout, meter: Meter) -> None:
        show, save = Every(5), Every(_COST_EVERY)
        for report in _reports(self.plan(spread), self._blocks(missing, spread), spread):
            meter.add(report)
            observe.labelling(self.title, report["images"], report["errors"], meter.numbers())
            self._check_share(meter.errors, meter.done + meter.worked, meter.total)
            if show():
                self._say(meter.line(), **meter.numbers())
            if save():
                self.cost.write(meter)

    def plan(self, spread: Layout) -> Plan:
        """What the actors need to know."""
        label = self.label
        return Plan(
            self.ledger.out,
            self.dataset.images_root,
            self.groups,
            label.views,
            label.batch,
            label.prefetch,
            spread.threads,
            spread.decode_threads,
            label.attempts,
            self.title,
            "cuda" if spread.gpus_per_actor else "cpu",
            self.given,
            self.upright,
        )

    def _blocks(self, missing: list[str], spread: Layout) -> list[Any]:
        tasks = [(part, *self.parts[part]) for part in missing]
        return list(self.manifest.blocks(tasks, self.label.rows_per_block, spread.shards_per_task))

    def _check_share(self, failed: int, seen: int, total: int) -> None:
        """UserError when too many images fail: of those seen, or so many that the rest cannot make up for it."""
        allowed = self.label.max_error_share
        if failed > allowed * total or (seen >= _EARLY and failed > allowed * seen):
            example = next((f.reason for f in self.ledger.failures()), "")
            raise UserError(
                f"{self.dataset.name}: {failed} of {seen} images cannot be labelled, e.g. {example}; "
                f"repair them or raise label.max_error_share ({allowed:g})"
            )


def _reports(plan: Plan, blocks: list[Any], spread: Layout) -> Any:
    """Run the actors over the blocks and yield what they report, shard by shard."""
    import ray.data
    from ray.data import ActorPoolStrategy, DataContext

    quiet(DataContext.get_current())
    pipeline = ray.data.from_arrow(blocks).map_batches(
        Labeller,
        fn_constructor_args=(plan,),
        batch_size=spread.shards_per_task,
        batch_format="pyarrow",
        compute=ActorPoolStrategy(size=spread.actors),
        num_cpus=spread.cpus_per_actor,
        num_gpus=spread.gpus_per_actor,
    )
    for batch in pipeline.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
        yield from batch.to_pylist()  # type: ignore[union-attr]

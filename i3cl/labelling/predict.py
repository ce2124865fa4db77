"""Ensemble prediction: Ray Data hands shards of images to actors that hold the members.

The result is Parquet with one row for each image, member and view. Paths travel through the cluster, pixels do not. Every image
is labelled exactly once, whatever is killed and when (see ``i3cl.labelling.ledger``). An image that cannot be read does not stop
the job: the reason is written into the `error` column of its rows and into errors.csv.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from i3cl import observe, storage
from i3cl.claims import read
from i3cl.config import MemberSettings, Settings
from i3cl.data.formats.parts import check_finished, note_command
from i3cl.data.formats.predictions import PREDICTION_SCHEMA, prediction_table, read_predictions
from i3cl.data.formats.records import Dataset
from i3cl.errors import UserError, inside
from i3cl.inference.recipe import AS_TRAINED, Given, chosen_exif, describe_sizes, effective, given_size
from i3cl.labelling.actor import Plan, view_name, view_of
from i3cl.labelling.cost import COST, ESTIMATE, CostFile, Meter, compared, line
from i3cl.labelling.identity import (
    as_member,
    check_views,
    claim_job,
    fingerprint,
    groups_of,
    images_of_job,
    known_groups,
    located_member,
    made_from_of,
    may_be_replaced,
    recipes_of,
    sources_of,
    view_names,
    with_joined_images,
)
from i3cl.labelling.layout import Layout, plan_of_cluster
from i3cl.labelling.ledger import Failure, Ledger, part_name
from i3cl.labelling.manifest import Manifest, make_manifest
from i3cl.labelling.pool import labelled
from i3cl.labelling.results import Found, Results, check_frame, read_member, result_row
from i3cl.members.member import granularity_of
from i3cl.runtime.pace import Every

_COPIED = 16
"""Parts of an earlier job copied at the same time."""
_COMPARED = 200
"""Images on which results from files are compared with the members that are there already."""
_EARLY = 500
"""Images from which the share of errors so far may stop a job."""
_SHOWN = 5
"""Errors that are printed one by one."""
_COST_EVERY = 30.0
"""Seconds between two versions of cost.json."""


def predict(
    dataset: Dataset,
    members: Mapping[str, str | MemberSettings],
    settings: Settings,
    out: str,
    title: str,
    given: Given | None = None,
    earlier: str | None = None,
) -> str:
    """Write the members' predictions for every image of `dataset` as Parquet parts under `out`.

    The same call continues a job that was stopped, and returns at once when done.json says that it is done. Members that
    `add_member` has added to the job stay in it. Images of `dataset` that the job does not have join it: only they are labelled.

    Args:
        dataset: The images; their instances do not matter.
        members: Name -> detector, or in its place a checkpoint directory, local or s3://.
        settings: Of which `label` and `cluster.gpu` count, and data.exif where it is given; else the checkpoints' own counts.
        out: Folder of the job.
        title: Begins the lines of progress.
        given: What takes the place of the checkpoints' own test sizes and tiles; None: the keys of data.test_* and data.tile that
            the recipe or the command line gives.
        earlier: Folder of another job. What the same members have predicted there for the same images in the same way is taken
            from it.

    Returns:
        `out`.

    Raises:
        UserError: There is no member or no image; `out` holds another job (other weights, views, test size, tiles, data.exif or
            shard size, or images that `dataset` lacks), or parts were removed after it was done; a larger share of the images
            than label.max_error_share cannot be labelled; the checkpoints were trained with different data.exif and none is
            given; a member's package or weights are missing, or its results do not fit the images.
    """
    label = settings.label
    if not members:
        raise UserError("label.members: names no detector; add label.members.NAME=CHECKPOINT_DIRECTORY")
    names = view_names(label)
    own_images = make_manifest(dataset)
    # By name, so that the order in a settings file means nothing.
    detectors = {name: located_member(as_member(members[name])) for name in sorted(members)}
    hashes = {name: fingerprint(name, member) for name, member in detectors.items()}
    recipes = recipes_of(detectors)
    given = given_size(settings) if given is None else given
    check_views(label, recipes, given)
    exif = chosen_exif(recipes, settings)
    ledger = Ledger(out)
    there = ledger.job()
    added: dict[str, Any] = (there or {}).get("added", {})
    manifest = with_joined_images(ledger, there, own_images, dataset)
    own = {name: member for name, member in detectors.items() if name not in added}
    identity: dict[str, Any] = {
        "images": images_of_job(manifest, dataset),
        "members": {name: each["sha256"] for name, each in added.items()} | hashes,
        "views": names,
        "label.rows_per_block": label.rows_per_block,
        "data.exif": exif,
        # A size that every checkpoint has anyway makes no other job.
        **effective(recipes, given),
    }
    known = known_groups(earlier, identity)
    groups = groups_of(own, label, list(known.values()))
    if earlier is not None and there is not None and {name for group in there["groups"] for name in group} == {*own, *added}:
        # As it was begun, also when the earlier job is not there any more.
        groups = there["groups"][: len(there["groups"]) - len(added)]
    identity |= {"groups": groups + [[name] for name in added]} | ({"added": added} if added else {})
    sizes = describe_sizes(recipes, given) if recipes else ""
    sizes += ", images turned upright (data.exif)" if exif == "upright" else ""
    numbered = {number: {name: detectors[name] for name in group} for number, group in enumerate(groups)}
    copies = {groups.index(names): number for number, names in known.items() if names in groups}
    upright = exif == "upright"
    job = _Job(
        dataset,
        manifest,
        numbered,
        settings,
        ledger,
        title,
        given,
        sizes,
        upright,
        identity["groups"],
        earlier,
        copies,
    )
    if there is None:
        job.read_results()
    claim_job(ledger, there, identity, manifest, dataset, title)
    if ledger.is_done():
        ledger.clean()
        check_finished(out, storage.list_dir(out))
        return out
    note_command(out)
    job.run(made_from_of(dataset, own_images, added | sources_of(detectors, hashes)))
    return out


def add_member(dataset: Dataset, name: str, member: MemberSettings, settings: Settings, out: str, title: str) -> str:
    """Add one more member to the labelling job in `out`, finished or not, and let it predict all images of the job.

    What the other members have predicted stays. Without a job, a job with this one member begins. The same call continues when it
    was stopped. The job's own views, image frame and shard size count; otherwise as `predict`. Results may grow with the job: new
    files under the same name count when they say of the images that are done what the earlier ones said. A member of which
    nothing is there yet may be replaced.

    Raises:
        UserError: As `predict`; or the job has a member of this name that is another one. Of results that cannot be used the job
            never knows.
    """
    own_images = make_manifest(dataset)
    member = located_member(member)
    sha = fingerprint(name, member)
    ledger = Ledger(out)
    job = ledger.job()
    manifest = with_joined_images(ledger, job, own_images, dataset)
    images = images_of_job(manifest, dataset)
    if job is None:
        rows = settings.label.rows_per_block
        job = {"images": images, "members": {}, "views": view_names(settings.label), "label.rows_per_block": rows, "groups": []}
        job |= {"data.exif": settings.data.exif, "added": {}}
    else:
        claim_job(ledger, job, job | {"images": images}, manifest, dataset, title)
        job |= {"images": images}
    # The job's own, whatever the settings say.
    views = tuple(view_of(each) for each in job["views"])
    label = settings.label.model_copy(update={"rows_per_block": job["label.rows_per_block"], "views": views})
    check_views(label, recipes_of({name: member}), AS_TRAINED)
    there = job["members"].get(name)
    added: dict[str, Any] = job.get("added", {})
    if there is not None and (
        name not in added or (there != sha and not may_be_replaced(ledger, job, manifest, dataset, name, member, settings))
    ):
        raise UserError(f"{out}: has a member {name} already, which is another one; choose another name")
    upright = job.get("data.exif") == "upright"
    own = settings.model_copy(update={"label": label})
    groups = job["groups"] if there is not None else [*job["groups"], [name]]
    work = _Job(dataset, manifest, {groups.index([name]): {name: member}}, own, ledger, title, upright=upright, all_groups=groups)
    if there != sha:
        work.read_results()
        added = added | {name: sources_of({name: member}, {name: sha})[name]}
        job = job | {"members": job["members"] | {name: sha}, "groups": groups, "added": added}
        ledger.extend(job)
        ledger.write_manifest(manifest, replace=False)
    if ledger.is_done():
        return out
    note_command(out)
    # Where the others lie, the end of the job before this member said.
    others = {other: {"sha256": each} for other, each in job["members"].items()} | ledger.made_from_before()
    work.run(made_from_of(dataset, own_images, others | added))
    return out


class _Job:
    """One run of one labelling job."""

    def __init__(
        self,
        dataset: Dataset,
        manifest: Manifest,
        groups: Mapping[int, dict[str, MemberSettings]],
        settings: Settings,
        ledger: Ledger,
        title: str,
        given: Given = AS_TRAINED,
        sizes: str = "",
        upright: bool = False,
        all_groups: Sequence[Sequence[str]] | None = None,
        earlier: str | None = None,
        copies: Mapping[int, int] | None = None,
    ) -> None:
        """The groups to predict with, by their numbers in the job.

        sizes: a line that says at which test size the members see the images; upright: as `Plan.upright`.
        all_groups: names of the members of every group of the job; None: it has no others.
        earlier: folder of an earlier job.
        copies: number of a group -> number of the group of the earlier job that has predicted the same.
        """
        self.earlier, self.copies = earlier, copies or {}
        self.dataset, self.manifest, self.groups, self.ledger, self.title = dataset, manifest, dict(groups), ledger, title
        self.settings, self.label, self.given, self.sizes, self.upright = settings, settings.label, given, sizes, upright
        self.all_groups = [list(group) for group in groups.values()] if all_groups is None else all_groups
        self.spans = manifest.spans(self.label.rows_per_block)
        self.shards = range(len(self.spans))
        self.parts = {part_name(group, shard): (group, shard) for group in groups for shard in self.shards}
        self.detectors = {k: group for k, group in groups.items() if not any(m.results for m in group.values())}
        """The groups that actors predict with; the findings of the others lie in files."""
        self.cost = CostFile(storage.join(ledger.out, COST))
        self.results: dict[int, Results] = {}
        """Group -> what the files of its only member hold, of those that have been read."""

    def read_results(self) -> None:
        """Read the files of all members that have some. UserError when they do not fit the images."""
        self.results = {group: self._read(group) for group in self.groups if group not in self.detectors}

    def run(self, made_from: Mapping[str, Any]) -> None:
        """Label what is missing and finish the job.

        made_from: For done.json; files and hashes of members and image list.
        """
        finished = self._less_failed(self.ledger.finished())
        missing = [part for part in self.parts if part not in finished]
        if missing and self.earlier is not None:
            taken = self._from_earlier(self.earlier, set(missing))
            missing = [part for part in missing if part not in taken]
        if missing:
            self._from_files(missing)
            missing = [part for part in missing if self.parts[part][0] in self.detectors]
        if missing:
            self._label(missing)
        finished = self.ledger.finished()
        left = self.parts.keys() - finished
        if left:
            raise RuntimeError(f"{self.ledger.out}: {len(left)} parts are missing, e.g. {min(left)}; give the same command again")
        for number, names in enumerate(self.all_groups):
            if not finished.issuperset(part_name(number, shard) for shard in self.shards):
                raise UserError(
                    f"{self.ledger.out}: is not finished, parts of {', '.join(names)} are missing; give its command again: "
                    "i3cl label predict, or i3cl label add-member NAME for a member that was added"
                )
        failures = self.ledger.failures(finished)
        self._check_share(len(failures), len(self.manifest), len(self.manifest))
        for failure in failures[:_SHOWN]:
            self._say(f"skipped {failure.reason}", level="WARNING")
        errors = storage.join(self.ledger.out, "errors.csv")
        self.ledger.finish({"images": len(self.manifest), "failed": len(failures), "made_from": dict(made_from)}, failures)
        text = (
            f"{len(self.manifest)} images labelled"
            if not failures
            else (f"{len(self.manifest) - len(failures)} images labelled, {len(failures)} with errors: {errors}")
        )
        self._say(text, images=len(self.manifest), errors=len(failures))

    def _less_failed(self, finished: set[str]) -> set[str]:
        """The finished parts, less those with errors when there are so many that the job has stopped: they may be repaired."""
        finished &= self.parts.keys()
        seen = sum(self.spans[shard][1] for shard in {self.parts[part][1] for part in finished})
        failed = len(self.ledger.failures(finished)) if finished else 0
        if failed <= self.label.max_error_share * seen:
            return finished
        forgotten = self.ledger.forget_failed(finished)
        self._say(f"{failed} images that could not be labelled are tried again, and what is in the same shards", failed=failed)
        return finished - set(forgotten)

    def _from_earlier(self, folder: str, missing: set[str]) -> set[str]:
        """Take the missing parts that an earlier job has from it; returns their names."""
        there, taken = Ledger(folder).finished(), set[str]()
        for group, number in self.copies.items():
            names = [(part_name(group, shard), part_name(number, shard)) for shard in self.shards]
            pairs = [(part, source) for part, source in names if part in missing and source in there]
            with ThreadPoolExecutor(_COPIED) as pool:
                taken |= set(pool.map(lambda pair: self._copy(storage.join(folder, pair[1]), pair[0]), pairs))
            if pairs:
                self._say(f"what {', '.join(self.all_groups[group])} found is taken from {folder}")
        return taken

    def _copy(self, source: str, part: str) -> str:
        table = pq.read_table(pa.BufferReader(storage.read_bytes(source)), schema=PREDICTION_SCHEMA)
        rows = table.select(["image_id", "file_name", "error"]).to_pylist()
        # One reason for each image, as an actor gives it.
        failures = {row["image_id"]: Failure(row["image_id"], row["file_name"], row["error"]) for row in rows if row["error"]}
        self.ledger.write(part, table, list(failures.values()))
        return part

    def _from_files(self, missing: Sequence[str]) -> None:
        """Write the missing parts of members whose results come from files."""
        for group, members in self.groups.items():
            parts = [part for part in missing if self.parts[part][0] == group]
            if not parts or group in self.detectors:
                continue
            [(name, member)] = members.items()
            results = self.results.get(group) or self._read(group)
            for note in results.notes:
                self._say(note)
            granularity = granularity_of(member)
            for part in parts:
                shard = self.manifest.shard(self.spans[self.parts[part][1]]).to_pylist()
                table = [result_row(image, name, view_name(self.label.views[0]), granularity, results) for image in shard]
                failures = [Failure(row["image_id"], row["file_name"], row["error"]) for row in table if row["error"]]
                self.ledger.write(part, prediction_table(table), failures)
            self._say(f"{name}: results of {len(results.found)} images from {', '.join(member.results)}")

    def _read(self, group: int) -> Results:
        """What the files of the only member of a group hold, checked against the images and what others have found there."""
        [(name, member)] = self.groups[group].items()
        results = read_member(name, member, self.dataset, self.settings.data.skip_bad)
        check_frame(name, results, self.dataset, self._found_by_others(group))
        if len(self.manifest) - len(results.found) > self.label.max_error_share * len(self.manifest):
            raise UserError(
                f"label.members.{name}.results: hold {len(results.found)} of {len(self.manifest)} images; give the files of "
                f"all images or raise label.max_error_share ({self.label.max_error_share:g})"
            )
        return results

    def _found_by_others(self, own: int) -> dict[int, list[Found]]:
        """Image id -> what members of finished parts have found, of the first images of the job."""
        finished = self.ledger.finished()
        found: dict[int, list[Found]] = {}
        for shard in self.shards:
            for number in range(len(self.all_groups)):
                part = part_name(number, shard)
                if number == own or part not in finished:
                    continue
                for rows in read_predictions(storage.join(self.ledger.out, part)):
                    good = [
                        (row["polygons"], row["scores"]) for row in rows if row["error"] is None and row["granularity"] != "line"
                    ]
                    found.setdefault(rows[0]["image_id"], []).extend(good)
            if len(found) >= _COMPARED:
                break
        return found

    def _say(self, text: str, **numbers: Any) -> None:
        observe.say(f"{self.title}: {text}", stage=self.title, **numbers)

    def _label(self, missing: list[str]) -> None:
        spread = plan_of_cluster(self.settings, len(missing), self._say)
        groups = self.detectors.values()
        total = len(self.manifest) * len(groups)
        to_do = sum(self.spans[self.parts[part][1]][1] for part in missing)
        if self.sizes:
            self._say(self.sizes)
        before = len(self.ledger.failures()) if len(missing) < len(self.parts) else 0
        meter = Meter(total, total - to_do, before, spread.gpus_per_actor, self.label.price_per_hour)
        self._say(
            f"{len(self.manifest)} images x {sum(map(len, groups))} members x {len(self.label.views)} views"
            + (f" in {len(groups)} passes" if len(groups) > 1 else "")
            + (f", {meter.done} of {total} done already" if meter.done else "")
            + f"; starting {spread.actors} actors of {spread.threads} threads"
            + (f", {spread.gpus_per_actor:g} GPUs each, up to {spread.most} as GPUs join" if spread.gpus_per_actor else ""),
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
        estimate = read(storage.join(self.ledger.out, ESTIMATE))
        if estimate is not None:
            self._say(compared(estimate, cost))

    def _drain(self, missing: list[str], spread: Layout, meter: Meter) -> None:
        show, save = Every(5), Every(_COST_EVERY)
        tasks = [(part, *self.parts[part]) for part in missing]
        with closing(labelled(self.plan(spread), self.manifest, tasks, self.label, spread)) as reports:
            for report in reports:
                meter.add(report)
                observe.labelling(self.title, report["images"], report["errors"], meter.numbers())
                self._check_share(meter.errors, meter.done + meter.worked, meter.total)
                self._check_limits(meter)
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
            self.detectors,
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
            # A CPU has nothing to do beside the network.
            2 if spread.gpus_per_actor else 1,
        )

    def _check_limits(self, meter: Meter) -> None:
        """UserError when this run and those before it have used up what the settings allow."""
        for key, limit in (("money", self.label.max_money), ("gpu_hours", self.label.max_gpu_hours)):
            if limit is not None and self.cost.total(meter)[key] >= limit:
                raise UserError(
                    f"label.max_{key}: {limit:g} is used up, {meter.done + meter.worked} of {meter.total} images are labelled; "
                    "what is done stays: raise it and give the same command again"
                )

    def _check_share(self, failed: int, seen: int, total: int) -> None:
        """UserError when too many images fail: of those seen, or so many that the rest cannot make up for it."""
        allowed = self.label.max_error_share
        if failed > allowed * total or (seen >= _EARLY and failed > allowed * seen):
            example = next((f.reason for f in self.ledger.failures()), "")
            raise UserError(
                f"{self.dataset.name}: {failed} of {seen} images cannot be labelled, e.g. {example}; "
                f"repair them or raise label.max_error_share ({allowed:g})"
            )

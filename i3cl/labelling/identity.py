"""What a labelling job is: its images, its members and the groups in which they work, as job.json says.

Two calls with equal identities are the same job, whichever of them began it. A job may get further images and members.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from i3cl import observe, storage
from i3cl.claims import recorded
from i3cl.config import LabelSettings, MemberSettings, Settings
from i3cl.data.formats.predictions import prediction_table, read_predictions
from i3cl.data.formats.records import Dataset
from i3cl.errors import UserError
from i3cl.inference.recipe import Given, recipe_of, test_size
from i3cl.labelling.actor import view_name
from i3cl.labelling.ledger import Ledger, part_name
from i3cl.labelling.manifest import Manifest, joined
from i3cl.labelling.results import read_member, result_row, results_hash
from i3cl.members.member import OURS, kind_of
from i3cl.members.ours import located, weights_bytes

_TOGETHER_BYTES = 4 << 30
"""Weights for which any GPU in use today has room beside the working memory of one network."""


def view_names(label: LabelSettings) -> list[str]:
    """The names of the views. UserError when there is none, or two are the same."""
    names = [view_name(view) for view in label.views]
    if not names or len(set(names)) < len(names):
        raise UserError(f"label.views: {', '.join(names) or 'is empty'}; name every view once")
    return names


def recipes_of(detectors: Mapping[str, MemberSettings]) -> dict[str, Settings]:
    """The recipes of those detectors that are checkpoints of this project."""
    return {name: recipe_of(m.weights) for name, m in detectors.items() if m.use == OURS and m.weights is not None}


def check_views(label: LabelSettings, recipes: Mapping[str, Settings], given: Given) -> None:
    """UserError when two views show a member, of which `recipes` has the recipe, the same picture.

    It would be paid twice, and outlines that are the same would count as outlines that agree.
    """
    for member, recipe in recipes.items():
        size = test_size(recipe, given)
        seen: dict[tuple[int, bool], str] = {}
        for view in label.views:
            # The short side of an image never exceeds the long one, so more than that has no effect.
            key = (min(view.short_side or size.short_side, size.long_side), view.flip)
            if key in seen:
                raise UserError(
                    f"label.views: {view_name(view)} shows {member} the same picture as {seen[key]}, because its test size is "
                    f"{size}; leave the view out, or give data.test_long_side={view.short_side or size.short_side} or more"
                )
            seen[key] = view_name(view)


def images_of_job(manifest: Manifest, dataset: Dataset) -> dict[str, Any]:
    """The images of a job, as job.json describes them."""
    images: dict[str, Any] = {"count": len(manifest), "sha256": manifest.digest, "root": dataset.images_root}
    return images | ({"grown": list(manifest.grown)} if manifest.grown else {})


def with_joined_images(ledger: Ledger, job: Mapping[str, Any] | None, given: Manifest, dataset: Dataset) -> Manifest:
    """The images of the job in the folder, with those of `given` that are new behind them; of a new folder, `given`."""
    if job is None:
        return given
    images = job["images"]
    if images["sha256"] == given.digest:
        return replace(given, grown=tuple(images.get("grown", ())))
    there = ledger.manifest(images)
    # Earlier versions wrote no list of images. Their jobs cannot grow: the claim refuses.
    return given if there is None else joined(there, given, dataset.name)


def claim_job(
    ledger: Ledger, there: Mapping[str, Any] | None, job: Mapping[str, Any], manifest: Manifest, dataset: Dataset, title: str
) -> None:
    """Claim the folder for the job, which may have more images than the one `there`. UserError as `Ledger.claim`."""
    fresh = 0 if there is None or not manifest.grown else len(manifest) - there["images"]["count"]
    if not fresh or there is None:
        ledger.claim(job)
        ledger.write_manifest(manifest, replace=False)
        return
    ledger.claim({**job, "images": {**there["images"], "root": dataset.images_root}})
    observe.say(f"{title}: {fresh} images of {dataset.name} join the {len(manifest) - fresh} of the job", stage=title)
    ledger.write_manifest(manifest, replace=True)
    ledger.extend(job)


def may_be_replaced(
    ledger: Ledger,
    job: Mapping[str, Any],
    manifest: Manifest,
    dataset: Dataset,
    name: str,
    member: MemberSettings,
    settings: Settings,
) -> bool:
    """Whether a member that was added to the job may be this one from now on.

    So it is when no part of it is finished; or when its results say what its finished parts say, and other parts are missing.
    """
    group, finished = job["groups"].index([name]), ledger.finished()
    spans = manifest.spans(job["label.rows_per_block"])
    parts = [part_name(group, shard) for shard in range(len(spans))]
    done = [part for part in parts if part in finished]
    if not done:
        return True
    if len(done) == len(parts) or not member.results:
        return False
    results = read_member(name, member, dataset, settings.data.skip_bad)
    for part in done:
        for [row] in read_predictions(storage.join(ledger.out, part)):
            now = result_row(row, name, row["view"], row["granularity"], results)
            if not prediction_table([now]).equals(prediction_table([row])):
                return False
    return True


def known_groups(earlier: str | None, identity: Mapping[str, Any]) -> dict[int, list[str]]:
    """Number -> names of the members of those groups of an earlier job that would predict the same in this one."""
    job = None if earlier is None else Ledger(earlier).job()
    if job is None:
        return {}
    same = {key: value for key, value in job.items() if key not in ("members", "groups", "added")}
    wanted = {key: value for key, value in identity.items() if key != "members"}
    if same != json.loads(json.dumps(wanted)):
        return {}
    there, here = job["members"], identity["members"]
    return {number: names for number, names in enumerate(job["groups"]) if all(here.get(n) == there[n] for n in names)}


def sources_of(members: Mapping[str, MemberSettings], hashes: Mapping[str, str]) -> dict[str, Any]:
    """File and hash of each member, as records name what an artefact was made from; of foreign members, their settings too."""
    found: dict[str, Any] = {}
    for name, member in members.items():
        found[name] = {"file": ", ".join(member.results) or member.weights or member.use, "sha256": hashes[name]}
        if member.results or member.use != OURS:
            found[name]["member"] = member.model_dump(mode="json")
    return found


def made_from_of(dataset: Dataset, manifest: Manifest, members: Mapping[str, Any]) -> dict[str, Any]:
    """What predictions are made from, for done.json. manifest: of the images as they were given; members: their records."""
    made_from: dict[str, Any] = {"members": dict(members)}
    if dataset.annotations:
        made_from["images"] = recorded(dataset.annotations) | {"images": manifest.digest}
    return made_from


def as_member(given: str | MemberSettings) -> MemberSettings:
    """A member's settings; a text is a checkpoint."""
    return MemberSettings(weights=given) if isinstance(given, str) else given


def located_member(member: MemberSettings) -> MemberSettings:
    """The member with paths that any process finds."""
    changes: dict[str, Any] = {"results": tuple(map(storage.absolute, member.results))}
    if member.weights is not None:
        changes["weights"] = located(member.weights) if member.use == OURS else storage.absolute(member.weights)
    return member.model_copy(update=changes)


def fingerprint(name: str, member: MemberSettings) -> str:
    """SHA-256 of all on which a member's findings depend. UserError that names the setting."""
    if member.results:
        return results_hash(member)
    try:
        return kind_of(member.use, f"label.members.{name}").fingerprint(member)
    except UserError as error:
        if member.use == OURS:
            raise
        raise UserError(f"label.members.{name}.{error}") from None


def groups_of(
    members: Mapping[str, MemberSettings], label: LabelSettings, known: Sequence[Sequence[str]] = ()
) -> list[list[str]]:
    """Names of the members in groups that an actor holds at the same time. Results from files are a group each.

    known: groups that stay as they are.
    """
    kept = [list(names) for names in known if all(name in members and not members[name].results for name in names)]
    files = [[name] for name, member in members.items() if member.results]
    held = {name: member for name, member in members.items() if not member.results and not any(name in g for g in kept)}
    apart = label.passes == "per_member"
    if label.passes == "auto" and len(held) > 1:
        # Others' detectors are small.
        ours = [member.weights for member in held.values() if member.use == OURS and member.weights is not None]
        apart = sum(map(weights_bytes, ours)) > _TOGETHER_BYTES
    return kept + ([[name] for name in held] if apart else [list(held)] if held else []) + files

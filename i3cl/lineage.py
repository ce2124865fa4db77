"""What a run was made from, back to its sources, and what of it is stale.

Every artefact records the SHA-256 of its inputs when it is made; nothing here writes anything.

    checkpoint      made_from.json in it, or annotations.json of its run: annotation files, and the weights that it started from
    predictions     job.json and done.json: members' settings and weights, ids and names of the images
    pseudo labels   NAME.made_from.json beside the json, _settings.json among the shards: predictions, thresholds, calibration
    report          made_from in summary.json (selftrain) or study.json: checkpoints, pseudo labels, validation images

An input is stale when its content is no longer what was recorded; an artefact is stale when one of its inputs is, or was made
from something stale. What earlier versions did not record is "not recorded", which says nothing against it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import yaml

from i3cl import claims, storage
from i3cl.config import MemberSettings
from i3cl.data.formats.coco import read_coco
from i3cl.data.formats.parts import unfinished
from i3cl.errors import UserError
from i3cl.labelling.calibration import read_calibration
from i3cl.labelling.identity import fingerprint
from i3cl.labelling.manifest import make_manifest
from i3cl.labelling.pseudo import record_of
from i3cl.model.shipped import folder_of
from i3cl.training.launch import MADE_FROM

State = Literal["fresh", "stale", "missing", "not recorded"]
SETTINGS, WEIGHTS = claims.CHECKPOINT_FILES
REPORTS = ("summary.json", "study.json")
"""The files of a run whose key `made_from` names what its report shows."""
_SHOWN = 12
"""Letters of a hash that are printed."""


@dataclass(eq=False)
class Artefact:
    """Something that was made, or a source."""

    place: str
    """Path or URL, or the name of a detector in the package."""
    inputs: list[Input] = field(default_factory=list)
    """What it was made from; empty for a source."""
    note: str = ""
    """What else there is to say, in words."""
    changed: bool = False
    """Whether it is no longer what its own command wrote."""

    @property
    def stale(self) -> bool:
        """Whether it was made from something else than is there now, at any distance."""
        return self.changed or any(each.state == "stale" or each.artefact.stale for each in self.inputs)

    def every(self) -> Iterator[Input]:
        """All inputs at any distance."""
        for each in self.inputs:
            yield each
            yield from each.artefact.every()


@dataclass(eq=False)
class Input:
    """One of the things that an artefact was made from."""

    role: str
    """What it is for the artefact, e.g. 'data.train.1.annotations' or 'member a'."""
    artefact: Artefact
    recorded: str | None
    """SHA-256 when the artefact was made."""
    now: str | None
    """SHA-256 of what is there; None when nothing is."""

    @property
    def state(self) -> State:
        """How what was recorded compares with what is there."""
        if self.recorded is None:
            return "not recorded"
        if self.now is None:
            return "missing"
        return "fresh" if self.recorded == self.now else "stale"


@dataclass(frozen=True)
class Lineage:
    """The artefacts of a run that no other one of them was made from, each with all that it was made from."""

    run: str
    artefacts: list[tuple[str, Artefact]]
    """(what it is, the artefact)."""

    @property
    def fresh(self) -> bool:
        """Whether nothing is stale and nothing missing."""
        inputs = (each for _, artefact in self.artefacts for each in artefact.every())
        return not any(a.stale for _, a in self.artefacts) and all(each.state not in ("stale", "missing") for each in inputs)

    def lines(self) -> list[str]:
        """An indented tree as text; what has been shown above is not unfolded again."""
        shown: set[int] = set()
        found: list[str] = []

        def show(role: str, artefact: Artefact, depth: int, recorded: str | None, remark: str) -> None:
            words = [role, artefact.place, (recorded or "")[:_SHOWN], remark, artefact.note]
            again = id(artefact) in shown and bool(artefact.inputs)
            words += ["(see above)"] if again else []
            found.append("  " * depth + "  ".join(word for word in words if word))
            if again:
                return
            shown.add(id(artefact))
            for each in artefact.inputs:
                show(each.role, each.artefact, depth + 1, each.recorded, _remark(each))

        for role, artefact in self.artefacts:
            show(role, artefact, 0, None, "stale" if artefact.stale else "")
        return found

    def as_json(self) -> dict[str, Any]:
        """The same for machines: run, fresh, and artefacts as nested {role, place, state, recorded, now, note, inputs}."""

        def tree(artefact: Artefact) -> dict[str, Any]:
            return {
                "place": artefact.place,
                "stale": artefact.stale,
                "note": artefact.note,
                "inputs": [
                    {"role": i.role, "state": i.state, "recorded": i.recorded, "now": i.now, **tree(i.artefact)}
                    for i in artefact.inputs
                ],
            }

        artefacts = [{"role": role, **tree(artefact)} for role, artefact in self.artefacts]
        return {"run": self.run, "fresh": self.fresh, "artefacts": artefacts}


def lineage(run: str) -> Lineage:
    """What is in a run and what it was made from.

    Args:
        run: The folder, local or s3://, of a training, a labelling, a selftrain circle or a study; also a checkpoint directory, a
            folder of predictions, or pseudo labels.

    Raises:
        UserError: There is no such folder, or nothing in it says what it was made from.
    """
    if not storage.exists(run):
        raise UserError(f"{run}: no such file or folder; give the folder of a run, <storage>/<name>")
    found = _Reader().top(run)
    if not found:
        raise UserError(f"{run}: holds no checkpoint, predictions, pseudo labels or report; give the folder of a run")
    below = {id(each.artefact) for _, artefact in found for each in artefact.every()}
    return Lineage(run, [(role, artefact) for role, artefact in found if id(artefact) not in below])


def _remark(each: Input) -> str:
    if each.state == "stale":
        return f"stale (now {(each.now or '')[:_SHOWN]})"
    if each.state == "fresh":
        return "stale" if each.artefact.stale else ""
    return each.state


class _Reader:
    """Reads every artefact, and hashes every file, once."""

    def __init__(self) -> None:
        self.artefacts: dict[str, Artefact] = {}
        self.hashes: dict[str, str | None] = {}

    def top(self, folder: str) -> list[tuple[str, Artefact]]:
        """The artefacts of a folder, what it shows last first."""
        if storage.is_file(folder) or storage.is_file(storage.join(folder, WEIGHTS)):
            return [("artefact", self.at(folder))]
        names = storage.list_dir(folder)
        if "job.json" in names or "_settings.json" in names:
            return [("artefact", self.at(folder))]
        found: list[tuple[str, Artefact]] = []
        for name in REPORTS:
            if name in names:
                artefact = self.report(storage.join(folder, name))
                found += [("report", artefact)] if artefact.inputs else []
        if "annotations.json" in names and ("best" in names or "ray" in names):
            best = storage.join(folder, "best")
            found.append(("checkpoint", self.at(best) if "best" in names else self.unfinished_training(folder)))
        for name in names:
            place = storage.join(folder, name)
            if name.endswith(".made_from.json"):
                labels = f"{place.removesuffix('.made_from.json')}.json"
                found.append(("labels", self.at(labels)))
            elif name == "predictions":
                found += [("predictions", self.at(storage.join(place, each))) for each in storage.list_dir(place)]
            elif name.partition("-")[0] in ("round", "seed"):
                found += self.top(place)
            elif "." not in name and storage.is_file(storage.join(place, "_settings.json")):
                found.append(("labels", self.at(place)))
            elif "." not in name and name != "best" and storage.is_file(storage.join(place, SETTINGS)):
                found += self.top(place)
        return found

    def at(self, place: str) -> Artefact:
        """The artefact of a path, URL or packaged detector, with its inputs."""
        if place not in self.artefacts:
            # Put there first, so that a record which names itself cannot go on for ever.
            artefact = self.artefacts[place] = Artefact(place)
            where = folder_of(place)
            if storage.is_file(storage.join(where, WEIGHTS)):
                self.checkpoint(artefact, where)
            elif storage.is_file(storage.join(where, "job.json")):
                self.predictions(artefact)
            elif storage.is_file(record_of(where)):
                self.labels(artefact)
        return self.artefacts[place]

    def input(self, role: str, record: Mapping[str, Any]) -> Input:
        """An input that a record names by `file` and `sha256`; either may be absent."""
        place, recorded = record.get("file"), record.get("sha256")
        if place is None:
            return Input(role, Artefact("where it lies is not recorded"), None, None)
        return Input(role, self.at(place), recorded, None if recorded is None else self.hash(place))

    def member(self, role: str, record: Mapping[str, Any]) -> Input:
        """A member of an ensemble; one that is no checkpoint of ours is known by its fingerprint."""
        if "member" not in record:
            return self.input(role, record)
        settings = MemberSettings.model_validate(record["member"])
        try:
            now = fingerprint(role, settings)
        except UserError:
            # Its package, weights or results are not here any more.
            now = None
        artefact = self.at(settings.results[0]) if len(settings.results) == 1 else Artefact(record["file"])
        return Input(role, artefact, record.get("sha256"), now)

    def hash(self, place: str) -> str | None:
        """SHA-256 of what is at a place; None when nothing is."""
        if place not in self.hashes:
            where = folder_of(place)
            there = storage.is_file(where) or claims.parts(where) or storage.is_file(storage.join(where, WEIGHTS))
            self.hashes[place] = claims.content_hash(where) if there else None
        return self.hashes[place]

    def checkpoint(self, artefact: Artefact, where: str) -> None:
        """Fill in what a checkpoint was made from."""
        folder, _, name = where.rstrip("/").rpartition("/")
        found = claims.read(storage.join(where, MADE_FROM))
        if found is None and name == "best":
            found = claims.inputs_of(folder)
        if found is None:
            artefact.note = "" if where != artefact.place else "what it was made from is not recorded"
            return
        artefact.inputs = [self.input(key, record) for key, record in found.items()]
        settings = storage.join(where, SETTINGS)
        tree = yaml.safe_load(storage.read_text(settings)) if storage.is_file(settings) else {}
        start = (tree.get("train") or {}).get("start_from")
        if start and "train.start_from" not in found:
            artefact.inputs.append(self.input("train.start_from", {"file": start}))

    def unfinished_training(self, run: str) -> Artefact:
        """A training that has no result yet."""
        inputs = [self.input(key, record) for key, record in (claims.inputs_of(run) or {}).items()]
        return Artefact(run, inputs, "not finished")

    def predictions(self, artefact: Artefact) -> None:
        """Fill in what predictions were made from."""
        folder = artefact.place
        job = claims.read(storage.join(folder, "job.json")) or {}
        done = claims.read(storage.join(folder, "done.json")) or {}
        lacks = unfinished(folder)
        artefact.note = "" if lacks is None else f"not finished, {lacks}"
        made_from = done.get("made_from") or {}
        members = made_from.get("members") or {name: {} for name in job.get("members", {})}
        artefact.inputs = [self.member(f"member {name}", record) for name, record in members.items()]
        images = made_from.get("images")
        if images is None:
            artefact.inputs.append(self.input("images", {}))
            return
        listed = self.input("images", images)
        if listed.state == "stale":
            # Labels in the file do not matter to predictions, only which images it names.
            listed.recorded, listed.now = images["images"], _image_list(images["file"])
        artefact.inputs.append(listed)

    def labels(self, artefact: Artefact) -> None:
        """Fill in what pseudo labels were made from."""
        record = claims.read(record_of(artefact.place)) or {}
        lacks = None if storage.is_file(artefact.place) else unfinished(artefact.place)
        artefact.note = "" if lacks is None else f"not finished, {lacks}"
        made = record.get("labels")
        if made is not None and made != self.hash(artefact.place):
            artefact.changed, artefact.note = True, "changed since select wrote it"
        there = record.get("predictions")
        there = there if isinstance(there, dict) else {}
        artefact.inputs = [self.input("predictions", {"file": there.get("folder"), "sha256": there.get("sha256")})]
        file = (record.get("select") or {}).get("calibration")
        if file:
            now = None
            if storage.is_file(file):
                calibration = read_calibration(file)
                now = _digest([list(calibration.scores), list(calibration.precision)])
            artefact.inputs.append(Input("calibration", self.at(file), _digest(record.get("calibration")), now))

    def report(self, file: str) -> Artefact:
        """What the report of a circle or a study was made from."""
        if file not in self.artefacts:
            artefact = self.artefacts[file] = Artefact(file)
            made_from = (claims.read(file) or {}).get("made_from") or {}
            artefact.inputs = [self.input(role, record) for role, record in made_from.items()]
        return self.artefacts[file]


def _image_list(annotations: str) -> str:
    """The digest of a data set's image ids and names, as predictions record it; empty when it cannot be read."""
    try:
        return make_manifest(read_coco(annotations, "", skip_bad=True, check_files=False)).digest
    except UserError:
        return ""


def _digest(tree: Any) -> str:
    return hashlib.sha256(json.dumps(tree).encode()).hexdigest()

"""How far a labelling job has come. The files in its folder say it; there is no other state.

    job.json                    what the job is; another job in the same folder is refused
    _manifest.parquet           the images of the job in the order of its shards
    part-GG-KKKKKK.parquet      the rows of shard K for group G of members; it exists if and only if the shard is done
    errors.csv, cost.json       for people
    done.json                   written last
    _work/command.json          the command line that finishes the job
    _work/tries/PART.json       how often an unfinished shard was started
    _work/errors/PART.json      the images of a part that could not be labelled
    _work/done.json             the end of the job before a member was added

A part has one name and appears whole, so a shard that is done twice (a repeated task, two drivers) still leaves one file.
The shards that remain are those whose file names are missing.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from i3cl import storage
from i3cl.claims import claim, is_part, read
from i3cl.errors import UserError
from i3cl.labelling.manifest import SCHEMA as MANIFEST_SCHEMA
from i3cl.labelling.manifest import Manifest, make_manifest_of

_WORK = "_work"
_MANIFEST = "_manifest.parquet"
_TOGETHER = 32
"""Small files read at the same time: on S3 a read is mostly waiting."""


@dataclass
class Attempt:
    """One start of a shard."""

    number: int
    """1 for the first."""
    deaths: dict[int, int] = field(default_factory=dict)
    """Image id -> how often a worker died while it was working on this image alone."""


@dataclass(frozen=True)
class Failure:
    """An image without predictions."""

    image_id: int
    file_name: str
    reason: str


def part_name(group: int, shard: int) -> str:
    """File name of a shard's rows."""
    return f"part-{group:02d}-{shard:06d}.parquet"


def shard_of(part: str) -> str:
    """What the parts of one shard have in common: the number of the shard; of any other file, its whole name."""
    pieces = part.removesuffix(".parquet").split("-")
    return pieces[2] if len(pieces) == 3 and pieces[0] == "part" else part


class Ledger:
    """The files of one labelling job; any process may open it."""

    def __init__(self, out: str) -> None:
        self.out = out
        self._known: dict[str, list[Failure]] = {}
        """Failures of finished parts that were read before: what a part says never changes."""

    # ------------------------------------------------------------------------------------------------- whole job

    def claim(self, job: Mapping[str, Any]) -> None:
        """Write job.json into a new folder, compare it in an old one. UserError that names the first difference."""
        path = storage.join(self.out, "job.json")
        if not storage.exists(path) and any(map(is_part, storage.list_dir(self.out))):
            raise UserError(f"{self.out}: holds Parquet files of something else; give another name=… or remove it")
        claim(path, job, "predictions of another job", {"data.exif": "stored"})

    def job(self) -> dict[str, Any] | None:
        """What job.json holds; None in a new folder. UserError when it is damaged."""
        path = storage.join(self.out, "job.json")
        there = read(path)
        if there is not None and not isinstance(there, dict):
            raise UserError(f"{path}: damaged; remove the folder and give the command again")
        return there

    def manifest(self, images: Mapping[str, Any]) -> Manifest | None:
        """The images that job.json describes as `images`; None when they were not written down. UserError when damaged."""
        path = storage.join(self.out, _MANIFEST)
        if not storage.is_file(path):
            return None
        try:
            table = pq.read_table(io.BytesIO(storage.read_bytes(path)), schema=MANIFEST_SCHEMA)
        except pa.ArrowException as error:
            raise UserError(
                f"{path}: not Parquet ({error}); remove it and give the command again with the earlier images"
            ) from None
        # Written before job.json when the job grows, so after a kill in between it holds more.
        return make_manifest_of(table.slice(0, images["count"]), tuple(images.get("grown", ())))

    def write_manifest(self, manifest: Manifest, *, replace: bool) -> None:
        """Write down the images of the job; `replace` them, or leave what is there."""
        path = storage.join(self.out, _MANIFEST)
        if replace or not storage.is_file(path):
            buffer = io.BytesIO()
            pq.write_table(manifest.table, buffer, compression="zstd")
            storage.write_bytes_atomic(path, buffer.getvalue())

    def extend(self, job: Mapping[str, Any]) -> None:
        """Replace job.json by that of a job with more members or images. A finished job is unfinished then."""
        # In this order: killed in between, the folder holds the earlier job without its end, which is soon found again.
        done = storage.join(self.out, "done.json")
        if storage.exists(done):
            storage.write_text_atomic(storage.join(self.out, _WORK, "done.json"), storage.read_text(done))
            storage.remove_tree(done)
        storage.write_text_atomic(storage.join(self.out, "job.json"), json.dumps(job, indent=1) + "\n")

    def made_from_before(self) -> dict[str, Any]:
        """Name -> record of the members that the end of the job named before `extend`; empty when it had not ended."""
        there = read(storage.join(self.out, _WORK, "done.json")) or {}
        return dict((there.get("made_from") or {}).get("members") or {})

    def is_done(self) -> bool:
        """Whether the whole job is done."""
        return storage.exists(storage.join(self.out, "done.json"))

    def finished(self) -> set[str]:
        """Names of all parts that exist. Costs one listing."""
        return {name for name in storage.list_dir(self.out) if name.startswith("part-") and name.endswith(".parquet")}

    def failures(self, finished: set[str] | None = None) -> list[Failure]:
        """Images that could not be labelled so far, each once, ordered by id.

        Costs one listing, and one request for each part with such images that was not asked before, many at a time.

        finished: as `finished` found it.
        """
        finished = self.finished() if finished is None else finished
        names = storage.list_dir(storage.join(self.out, _WORK, "errors"))
        # A worker that died between the two writes leaves errors of a part that will be made again.
        parts = [part for part in (name.removesuffix(".json") for name in names) if part in finished]
        new = [part for part in parts if part not in self._known]
        with ThreadPoolExecutor(_TOGETHER) as pool:
            self._known |= zip(new, pool.map(self._read_failures, new), strict=True)
        found = {failure.image_id: failure for part in parts for failure in self._known[part]}
        return [found[key] for key in sorted(found)]

    def forget_failed(self, finished: Iterable[str]) -> list[str]:
        """Remove those of the finished parts in which images could not be labelled; returns their names."""
        names = {name.removesuffix(".json") for name in storage.list_dir(storage.join(self.out, _WORK, "errors"))}
        parts = sorted(names.intersection(finished))

        def forget(part: str) -> None:
            self._known.pop(part, None)
            # First the part: as long as it counts, its errors must.
            for path in (storage.join(self.out, part), self._errors(part), self._tries(part)):
                storage.remove_tree(path)

        with ThreadPoolExecutor(_TOGETHER) as pool:
            list(pool.map(forget, parts))
        return parts

    def finish(self, summary: Mapping[str, Any], failures: Iterable[Failure]) -> None:
        """Write errors.csv, then done.json, which ends the job, and remove what only an unfinished job needs."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(["image_id", "file_name", "reason"])
        writer.writerows([f.image_id, f.file_name, f.reason] for f in failures)
        storage.write_text_atomic(storage.join(self.out, "errors.csv"), text.getvalue())
        storage.write_text_atomic(storage.join(self.out, "done.json"), json.dumps(summary) + "\n")
        self.clean()

    def clean(self) -> None:
        """Remove a finished job's work files and what killed writers left behind. Nobody writes there any more."""
        assert self.is_done()
        for name in storage.list_dir(self.out):
            if name == _WORK or name.startswith(".tmp-"):
                storage.remove_tree(storage.join(self.out, name))

    # --------------------------------------------------------------------------------------------------- one part

    def is_finished(self, part: str) -> bool:
        """Whether this part exists."""
        return storage.is_file(storage.join(self.out, part))

    def begin(self, part: str) -> Attempt:
        """Record that this process starts a part, before it reads any of the part's images."""
        path = self._tries(part)
        there = storage.read_text_if_there(path)
        before = json.loads(there) if there is not None else {"number": 0, "at": None, "deaths": {}}
        attempt = Attempt(before["number"] + 1, {int(key): count for key, count in before["deaths"].items()})
        if before["at"] is not None:
            attempt.deaths[before["at"]] = attempt.deaths.get(before["at"], 0) + 1
        self.hold(part, attempt, None)
        return attempt

    def hold(self, part: str, attempt: Attempt, image_id: int | None) -> None:
        """Record the one image that this process is about to work on alone; None: it has let go of it."""
        state = {"number": attempt.number, "at": image_id, "deaths": attempt.deaths}
        storage.write_text_atomic(self._tries(part), json.dumps(state))

    def write(self, part: str, table: pa.Table, failures: list[Failure]) -> None:
        """Put a finished part in place, its errors first."""
        self._known.pop(part, None)
        if failures:
            rows = [[f.image_id, f.file_name, f.reason] for f in failures]
            storage.write_text_atomic(self._errors(part), json.dumps(rows))
        elif storage.is_file(self._errors(part)):
            # Of an earlier try, whose images have been repaired since.
            storage.remove_tree(self._errors(part))
        buffer = io.BytesIO()
        pq.write_table(table, buffer)
        storage.write_bytes_atomic(storage.join(self.out, part), buffer.getvalue())

    def part_failures(self, part: str) -> list[Failure]:
        """Images of a finished part that could not be labelled."""
        return self._read_failures(part) if storage.is_file(self._errors(part)) else []

    def _read_failures(self, part: str) -> list[Failure]:
        return [Failure(*row) for row in json.loads(storage.read_text(self._errors(part)))]

    def _tries(self, part: str) -> str:
        return storage.join(self.out, _WORK, "tries", f"{part}.json")

    def _errors(self, part: str) -> str:
        return storage.join(self.out, _WORK, "errors", f"{part}.json")

"""The import of a whole data set: in this process when it is small, through Ray Data when it is large; the result is the same."""

from __future__ import annotations

import json
import logging
import os
import posixpath
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from itertools import chain, count, islice
from typing import TypeVar

import pyarrow as pa

from i3cl import storage
from i3cl.data.formats.coco import read_coco, write_coco
from i3cl.data.formats.records import ImageRecord, Problem
from i3cl.data.formats.table import write_parquet
from i3cl.data.importers.archives import is_archive, unpack
from i3cl.data.importers.base import LABEL_ENDINGS, Folder, Importer, Item, stem
from i3cl.data.importers.records import Outcome, outcomes_of, outcomes_table, printable, read_image
from i3cl.data.importers.registry import importer_named
from i3cl.data.loading.endings import HEIF_ENDINGS, IMAGE_ENDINGS
from i3cl.errors import UserError
from i3cl.runtime.cluster import connect, quiet
from i3cl.runtime.pace import duration

logger = logging.getLogger(__name__)

_CHUNK = 16_384
"""Number of images handed out at a time, and of rows in a Parquet part."""
_BLOCK = 256
"""Number of images in one Ray Data task."""
_RAY_FROM_LOCAL, _RAY_FROM_REMOTE = 50_000, 2_000
"""Number of images from which Ray Data is used: reading a header takes 0.1 ms locally and about 50 ms from S3."""
_PROGRESS_EVERY = 10.0
"""Seconds between two progress lines."""
_T = TypeVar("_T")


@dataclass
class Summary:
    """The result of an import."""

    annotations: str = ""
    """Path of the COCO json or the Parquet folder."""
    images_root: str = ""
    """Folder that file names are relative to."""
    images: int = 0
    fresh: int | None = None
    """Images that an earlier import into the same place did not have; None when there was none."""
    instances: int = 0
    """Text instances, without don't-care regions."""
    dont_care: int = 0
    kinds: Counter[str] = field(default_factory=Counter)
    """Number of problems by kind."""
    rejected: int = 0
    """Images and instances left out."""
    repaired: int = 0
    """Instances repaired."""
    passed_over: list[str] = field(default_factory=list)
    """Names of files in the source that are neither images nor labels."""
    problems: str | None = None
    """Path of the list of all problems; None when there are none."""
    keywords: str | None = None
    """Path of the weak labels; None when there are none."""

    def lines(self) -> list[str]:
        """The table that the command prints at its end."""
        rows: list[tuple[str, object]] = [
            ("images", self.images if self.fresh is None else f"{self.images}, {self.fresh} of them new"),
            ("instances", self.instances),
            ("don't care", self.dont_care),
            ("repaired", self.repaired),
            ("rejected", self.rejected),
        ]
        rows += [(f"  {kind}", count) for kind, count in sorted(self.kinds.items())]
        if self.passed_over:
            rows.append(("passed over", f"{len(self.passed_over)} files: {_by_ending(self.passed_over)}"))
        rows += [("annotations", self.annotations), ("images root", self.images_root)]
        rows += [(name, path) for name, path in (("problems", self.problems), ("keywords", self.keywords)) if path]
        return [f"{name:12} {value}" for name, value in rows]


def _by_ending(names: list[str]) -> str:
    """Files counted by ending, with an example of each."""
    examples: dict[str, str] = {}
    for name in names:
        examples.setdefault(posixpath.splitext(name)[1].lower(), name)
    counts = Counter(posixpath.splitext(name)[1].lower() for name in names)
    found = ", ".join(f"{n} {ending or 'without ending'} ({examples[ending]})" for ending, n in counts.most_common(8))
    found += ", ..." if len(counts) > 8 else ""
    heif = any(ending in HEIF_ENDINGS for ending in counts)
    return found + ("; pip install pillow-heif to read .heic" if heif else "")


def import_dataset(
    name: str,
    source: str,
    out: str,
    *,
    split: str = "train",
    parquet: bool = False,
    skip_bad: bool = False,
    through_ray: bool | None = None,
    upright: bool = False,
) -> Summary:
    """Write a public data set as COCO json, `<out>/<split>.json`, or as Parquet parts, `<out>/<split>.parquet/`.

    source: folder in the layout of docs/datasets.md, local or s3://, or an archive of one, which is unpacked below `out`.
    The result of a set without polygons is named 'unlabelled' and not after its split. `<split>-problems.jsonl` and, for weak
    labels, `<split>-keywords.jsonl` are written beside it. Images are neither copied nor decoded. Image ids count from 1 in the
    order of the file names (for SynthText, of gt.mat); images that are left out count too, so ids do not depend on skip_bad.
    A set without labels may grow: images that an earlier import into the same place has keep their ids, new ones come after.
    through_ray: None decides by size. upright: sizes are those of the pictures turned as their EXIF orientation says, and
    labels must be in those pixels. UserError at the first image or label file that cannot be read, unless `skip_bad`.
    Instances that are degenerate or outside the image are always left out and listed: official files hold some.
    """
    importer, out = importer_named(name), storage.absolute(out)
    folder = Folder(_unpacked(storage.absolute(source), out))
    base = storage.join(out, split if importer.labelled else "unlabelled")
    summary = Summary(f"{base}.parquet" if parquet else f"{base}.json", folder.root)
    problems: list[Problem] = []
    keywords: list[str] = []
    known = {} if importer.labelled else _known_ids(summary.annotations, folder.root)
    summary.fresh = 0 if known else None
    new_ids = count(max(known.values(), default=0) + 1)

    def numbered(record: ImageRecord) -> ImageRecord:
        if summary.fresh is None:
            return record
        there = known.get(record.file_name)
        summary.fresh += there is None
        return replace(record, id=next(new_ids) if there is None else there)

    def records() -> Iterator[ImageRecord]:
        for outcome in _outcomes(name, importer, folder, split, through_ray, upright):
            if outcome.record is None and not skip_bad:
                raise UserError(f"{outcome.problems[0].message}; or leave such images out with --skip-bad")
            problems.extend(outcome.problems)
            if outcome.record is None:
                continue
            if outcome.keywords:
                keywords.append(_json_line({"file_name": outcome.record.file_name, "keywords": outcome.keywords}))
            ignored = sum(i.ignore for i in outcome.record.instances)
            summary.images += 1
            summary.dont_care += ignored
            summary.instances += len(outcome.record.instances) - ignored
            yield numbered(outcome.record)

    def finish() -> None:
        # Known only now: an importer lists the folder when it needs it, or never.
        summary.passed_over = _passed_over(folder, importer)
        _finish(summary, base, problems, keywords)

    if parquet:
        with storage.atomic_directory(summary.annotations, replace=True) as parts:
            for number, part in enumerate(_chunks(records(), _CHUNK)):
                write_parquet(str(parts / f"part-{number:05d}.parquet"), part, folder.root)
            finish()
    else:
        found = list(records())
        finish()
        write_coco(summary.annotations, found, {"source": name, "labelled": importer.labelled})
    return summary


def _known_ids(annotations: str, root: str) -> dict[str, int]:
    """File name -> id in what an earlier import has written; empty when there is nothing."""
    if not storage.exists(annotations):
        return {}
    return {record.file_name: record.id for record in read_coco(annotations, root, skip_bad=True, check_files=False).records}


def _passed_over(folder: Folder, importer: Importer) -> list[str]:
    """Files that are neither images nor, in a labelled set, possible labels: photographs in a format that is not read, say."""
    if not folder.listed:
        return []
    known = IMAGE_ENDINGS + LABEL_ENDINGS if importer.labelled else IMAGE_ENDINGS
    return [printable(name) for name in folder.names if not name.lower().endswith(known)]


def _finish(summary: Summary, base: str, problems: list[Problem], keywords: list[str]) -> None:
    """Count the problems and write the lists beside the annotations, which come last."""
    if not summary.images:
        reason = problems[0].message if problems else "it is empty"
        raise UserError(f"{summary.images_root}: no image of it can be used; {reason}")
    summary.kinds = Counter(p.kind for p in problems)
    summary.rejected = sum(p.left_out for p in problems)
    summary.repaired = len({p.where for p in problems if not p.left_out})
    listed = [*problems, *(Problem("passed over", name, "is not read as an image or label") for name in summary.passed_over)]
    lists = {"problems": [_json_line(asdict(p)) for p in listed], "keywords": keywords}
    for kind, lines in lists.items():
        path = f"{base}-{kind}.jsonl"
        if lines:
            storage.write_text_atomic(path, "".join(lines))
            setattr(summary, kind, path)
        else:
            storage.remove_tree(path)


def _json_line(value: object) -> str:
    return json.dumps(value, ensure_ascii=False) + "\n"


def _unpacked(source: str, out: str) -> str:
    if not (is_archive(source) and storage.is_file(source)):
        return source
    target = storage.join(out, f"source-{stem(source)}")
    if storage.is_complete(target):
        logger.info("%s: is unpacked in %s already; remove that folder to unpack it again", source, target)
    else:
        logger.info("unpacking %s", source)
        unpack(source, target)
    return target


def _chunks(items: Iterable[_T], size: int) -> Iterator[list[_T]]:
    iterator = iter(items)
    while chunk := list(islice(iterator, size)):
        yield chunk


def _outcomes(
    name: str, importer: Importer, folder: Folder, split: str, through_ray: bool | None, upright: bool
) -> Iterator[Outcome]:
    """Every image's outcome, in order; logs progress."""
    items = iter(importer.items(folder, split))
    if through_ray is None:
        few = _RAY_FROM_REMOTE if storage.is_remote(folder.root) else _RAY_FROM_LOCAL
        first = list(islice(items, few))
        items, through_ray = chain(first, items), len(first) == few
    started = shown = time.monotonic()
    number = 0
    for chunk in _chunks(items, _CHUNK):
        read = _through_ray_data if through_ray else _in_this_process
        for outcome in read(name, folder, chunk, number + 1, upright):
            number += 1
            yield outcome
            if time.monotonic() - shown > _PROGRESS_EVERY:
                shown = time.monotonic()
                rate = number / (shown - started)
                logger.info("import: %d images, %.0f/s, %s", number, rate, duration(shown - started))


def _in_this_process(name: str, folder: Folder, items: list[Item], first: int, upright: bool) -> Iterator[Outcome]:
    for image_id, item in enumerate(items, first):
        yield read_image(importer_named(name), folder, item, image_id, name, upright=upright)


def _through_ray_data(name: str, folder: Folder, items: list[Item], first: int, upright: bool) -> Iterator[Outcome]:
    connect()
    import ray.data
    from ray.data import DataContext

    quiet(DataContext.get_current())
    # Results come in any order: keeping the order would hold finished blocks back. They are sorted below.
    table = pa.table(
        {
            "position": pa.array(range(first, first + len(items)), pa.int64()),
            # As bytes: not every name of a file is text.
            "file_name": pa.array([os.fsencode(item.file_name) for item in items], pa.binary()),
            "label": pa.array([None if item.label is None else os.fsencode(item.label) for item in items], pa.large_binary()),
        }
    )
    blocks = [table.slice(i, _BLOCK).combine_chunks() for i in range(0, len(table), _BLOCK)]
    work = partial(_read_rows, name=name, root=folder.root, upright=upright)
    done = ray.data.from_arrow(blocks).map_batches(work, batch_size=None, batch_format="pyarrow")
    found: dict[int, Outcome] = {}
    for batch in done.iter_batches(batch_size=None, batch_format="pyarrow"):
        assert isinstance(batch, pa.Table)
        found.update(outcomes_of(batch))
    assert len(found) == len(items)
    return (found[position] for position in sorted(found))


def _read_rows(rows: pa.Table, name: str, root: str, upright: bool) -> pa.Table:
    folder = Folder(root)
    outcomes = []
    for row in rows.to_pylist():
        item = Item(os.fsdecode(row["file_name"]), None if row["label"] is None else os.fsdecode(row["label"]))
        outcomes.append(read_image(importer_named(name), folder, item, row["position"], name, upright=upright))
    return outcomes_table(outcomes, rows["position"].to_pylist())

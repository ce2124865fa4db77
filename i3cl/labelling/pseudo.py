"""From stored predictions to pseudo labels: fusion and selection, written as COCO json or Parquet. Never needs a GPU.

The predictions of a large corpus go in bundles of parts to Ray tasks, each of which writes its own shard, so that no process
holds more than one bundle. A small set is done in this process, which takes less time than starting Ray.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from i3cl import claims, observe, storage
from i3cl.config import LabelSettings, Settings
from i3cl.data.formats.coco import write_coco
from i3cl.data.formats.parts import note_command, parts_of
from i3cl.data.formats.predictions import read_batches
from i3cl.data.formats.records import (
    ImageRecord,
    Instance,
    from_table,
    record_table,
)
from i3cl.data.formats.table import write_parquet
from i3cl.errors import UserError
from i3cl.labelling.calibration import Calibration, read_calibration
from i3cl.labelling.fused import FusedStore, fused_images, record_of_predictions
from i3cl.labelling.ledger import part_name, shard_of
from i3cl.labelling.manifest import shard_spans
from i3cl.labelling.select import SelectionSummary, select
from i3cl.runtime.parts import fan_out

_BUNDLE = 2048
"""Images of one Ray task and one shard, at least."""
_IN_PROCESS = 4096
"""Up to this many images this process does all the work."""
_ONE_JSON = 20_000
"""From this many images on the format 'auto' means Parquet."""


def label_parts(
    parts: Sequence[str], settings: LabelSettings, calibration: Calibration | None = None, store: FusedStore | None = None
) -> tuple[list[ImageRecord], SelectionSummary]:
    """Pseudo labels of the images in some parts, ordered by image id, and the counts."""
    summary = SelectionSummary()
    records: list[ImageRecord] = []
    for item in fused_images(parts, settings) if store is None else store.images(settings, parts):
        chosen = select(item.fused, settings.select, calibration)
        summary.update(chosen)
        if settings.select.drop_empty and not np.any(~chosen.ignore):
            continue
        instances = tuple(
            Instance(
                polygon,
                ignore=bool(ignore),
                lossweight=float(weight),
                outlineweight=float(outline),
                score=float(score),
                votes=int(votes),
            )
            for polygon, ignore, weight, outline, score, votes in zip(
                chosen.polygons,
                chosen.ignore,
                chosen.lossweight,
                chosen.outlineweight,
                chosen.scores,
                chosen.votes,
                strict=True,
            )
        )
        records.append(ImageRecord(item.image_id, item.file_name, item.height, item.width, instances))
    return sorted(records, key=lambda record: record.id), summary


@dataclass(frozen=True)
class Bundles:
    """Parts of a predictions folder in groups that can be read independently."""

    groups: list[list[str]]
    images: int
    members: list[str]
    """Sorted names, of all parts."""


def bundles(predictions: str, least: int = _BUNDLE) -> Bundles:
    """Groups of parts with at least `least` images each (the last one may have fewer).

    All rows of an image are in one part, or in the parts of one shard: each group of members has written its own. Of a labelling
    job, job.json and the names of the parts say which; elsewhere every part is opened, and where rows of one image are spread
    otherwise, for example in parts of several runs, everything becomes one group. UserError when there is no part, one that does
    not hold predictions, or when the folder is not finished.
    """
    paths = parts_of(predictions)
    if len(paths) < 2:
        ids, names_there = _heads(paths[0] if paths else predictions)
        return Bundles([[predictions]], len(ids), sorted(names_there))
    shards: dict[str, list[str]] = {}
    for path in paths:
        shards.setdefault(shard_of(path.rpartition("/")[2]), []).append(path)
    found = _sizes_by_job(predictions, shards) or _sizes_by_content(shards)
    if found is None:
        heads = _all_heads(paths)
        ids = np.unique(np.concatenate([ids for ids, _ in heads]))
        return Bundles([[predictions]], len(ids), sorted(set().union(*(names for _, names in heads))))
    sizes, members = found
    groups: list[list[str]] = [[]]
    held = 0
    for shard, size in sizes.items():
        if held >= least:
            groups.append([])
            held = 0
        groups[-1] += shards[shard]
        held += size
    return Bundles(groups, sum(sizes.values()), sorted(members))


def _sizes_by_job(folder: str, shards: Mapping[str, Sequence[str]]) -> tuple[dict[str, int], set[str]] | None:
    """Images of every shard, and the members, as job.json says; None when the parts are not those of one job."""
    job = claims.read(storage.join(folder, "job.json"))
    try:
        images, rows, groups = job["images"], job["label.rows_per_block"], job["groups"]
        spans = shard_spans(images.get("grown") or [images["count"]], rows)
    except (KeyError, TypeError):
        return None
    wanted = {part_name(group, shard) for group in range(len(groups)) for shard in range(len(spans))}
    if not all(path.rpartition("/")[2] in wanted for paths in shards.values() for path in paths):
        return None
    return {shard: spans[int(shard)][1] for shard in shards}, {name for group in groups for name in group}


def _sizes_by_content(shards: Mapping[str, Sequence[str]]) -> tuple[dict[str, int], set[str]] | None:
    """Images of every shard, and the members, as the parts themselves say; None when an image is in two shards."""
    heads = {shard: _all_heads(paths) for shard, paths in shards.items()}
    ids = {shard: np.unique(np.concatenate([ids for ids, _ in each])) for shard, each in heads.items()}
    if len(np.unique(np.concatenate(list(ids.values())))) < sum(map(len, ids.values())):
        return None
    members = {name for each in heads.values() for _, names in each for name in names}
    return {shard: len(each) for shard, each in ids.items()}, members


def _all_heads(paths: Sequence[str]) -> list[tuple[NDArray[np.int64], set[str]]]:
    with ThreadPoolExecutor(16) as pool:
        return list(pool.map(_heads, paths))


def spread_parts(predictions: str, images: int) -> list[str]:
    """Whole shards with about so many images, evenly over the folder; all of its parts when it has no more.

    UserError as `bundles`.
    """
    shards = bundles(predictions, least=1)
    return [part for group in shards.groups[:: max(1, shards.images // images)] for part in group]


def _heads(path: str) -> tuple[NDArray[np.int64], set[str]]:
    ids: list[NDArray[np.int64]] = [np.zeros(0, np.int64)]
    members: set[str] = set()
    for batch in read_batches(path, ["image_id", "member"]):
        ids.append(np.unique(batch["image_id"].to_numpy(zero_copy_only=False)))
        members |= set(batch["member"].unique().to_pylist())
    return np.unique(np.concatenate(ids)), members


def with_pseudo_labels(settings: Settings, pseudo: str, images_root: str) -> list[dict[str, Any]]:
    """data.train of a student: the labelled sources, and the pseudo-labelled one as selftrain.pseudo_* say.

    UserError for selftrain.labelled_per_step where it does not fit data.train.
    """
    return [*_labelled_sources(settings), {"annotations": pseudo, "images": images_root, **_pseudo_options(settings)}]


def without_pseudo_labels(settings: Settings) -> list[dict[str, Any]]:
    """data.train of a control: the student's, with labelled images in the place of the pseudo-labelled ones.

    Where the sets are mixed by weight these are the labelled sources alone. With selftrain.pseudo_per_step the labelled sources
    appear a second time, with the augmentation of the pseudo-labelled images and their share of a step.
    """
    labelled = _labelled_sources(settings)
    count = settings.selftrain.pseudo_per_step
    if count is None:
        return labelled
    # In proportion to their own shares, in whole images.
    shares = np.cumsum([source["per_step"] or 0 for source in labelled], dtype=np.float64)
    ends = np.rint(shares / max(shares[-1], 1) * count).astype(int)
    parts = np.diff(ends, prepend=0).tolist()
    options = _pseudo_options(settings) | {"loss_scale": 1.0}
    again = [source | options | {"per_step": part} for source, part in zip(labelled, parts, strict=True) if part]
    return [*labelled, *again]


def _labelled_sources(settings: Settings) -> list[dict[str, Any]]:
    sources = [source.model_dump() for source in settings.data.train]
    count = settings.selftrain.labelled_per_step
    if count is None:
        return sources
    if len(sources) != 1 or sources[0]["per_step"] is not None:
        raise UserError("selftrain.labelled_per_step: fits one set in data.train without a per_step; use data.train.N.per_step")
    return [sources[0] | {"per_step": count, "weight": 1.0}]


def _pseudo_options(settings: Settings) -> dict[str, Any]:
    circle = settings.selftrain
    options: dict[str, Any] = {"loss_scale": circle.pseudo_loss_scale, "transform": circle.pseudo_transform}
    if circle.pseudo_per_step is None:
        return options | {"weight": circle.pseudo_weight}
    return options | {"per_step": circle.pseudo_per_step}


def pseudo_path(run: str, predictions: str, settings: LabelSettings, name: str = "pseudo") -> str:
    """Where the pseudo labels of a run belong: <run>/<name>.json, or for Parquet shards the folder <run>/<name>."""
    form = settings.select.format
    if form == "auto":
        form = "parquet" if bundles(predictions).images >= _ONE_JSON else "json"
    return storage.join(run, f"{name}.json" if form == "json" else name)


def make_pseudo_labels(
    predictions: str, settings: LabelSettings, out: str, images_root: str = "", store: FusedStore | None = None
) -> dict[str, Any]:
    """Write the pseudo labels of stored predictions to `out` and return their counts (`SelectionSummary.summary`).

    Args:
        predictions: Folder of predictions, or one part.
        settings: Of which `fusion` and `select` count.
        out: A name that ends in .json becomes one COCO json, whole or not at all. Any other becomes a folder of Parquet shards,
            complete once `_done.json` is in it; the same call continues one that was stopped.
        images_root: Put before the file names in the column `path` of the shards.
        store: Of these predictions, for callers that select from them more than once.

    Raises:
        UserError: The predictions cannot be read or are not finished, or the calibration was learned from other members.
    """
    found = bundles(predictions)
    calibration = None
    if settings.select.calibration is not None:
        calibration = read_calibration(settings.select.calibration)
        calibration.check(found.members, settings.fusion, settings.select.calibration)
    made_from = _made_from(store.predictions if store else record_of_predictions(predictions), settings, calibration)
    if out.endswith(".json"):
        counts = _one_json(found, settings, calibration, store, out)
        record = made_from | {"labels": claims.content_hash(out)}
        storage.write_text_atomic(record_of(out), json.dumps(record, indent=1) + "\n")
    else:
        counts = _shards(found, settings, calibration, store, out, images_root, made_from)
    observe.pseudo_labels(out, counts["instances"], counts["ignored"])
    return counts


def _one_json(
    found: Bundles, settings: LabelSettings, calibration: Calibration | None, store: FusedStore | None, out: str
) -> dict[str, Any]:
    summary = SelectionSummary()
    records: list[ImageRecord] = []
    if found.images <= _IN_PROCESS:
        records, summary = label_parts([part for group in found.groups for part in group], settings, calibration, store)
    else:
        calls = [(group, settings, calibration, store) for group in found.groups]
        for _, (table, counts) in fan_out("select", _labelled_table, calls, in_process=0, unit="bundle"):
            records += from_table(table)
            summary.merge(counts)
    records.sort(key=lambda record: record.id)
    write_coco(out, records, info={"description": "pseudo labels", "thresholds": settings.select.model_dump()})
    return summary.summary()


def _labelled_table(
    parts: Sequence[str], settings: LabelSettings, calibration: Calibration | None, store: FusedStore | None
) -> tuple[pa.Table, dict[str, float]]:
    records, summary = label_parts(parts, settings, calibration, store)
    return record_table(records, ""), summary.summary()


def record_of(labels: str) -> str:
    """The file that says from what pseudo labels were made: NAME.made_from.json beside a json, _settings.json among shards."""
    stem = labels.removesuffix(".json")
    return storage.join(labels, "_settings.json") if stem == labels else f"{stem}.made_from.json"


def _made_from(predictions: Mapping[str, Any], settings: LabelSettings, calibration: Calibration | None) -> dict[str, Any]:
    """What pseudo labels depend on. Equal records mean equal labels."""
    return {
        "predictions": dict(predictions),
        "fusion": settings.fusion.model_dump(mode="json"),
        "select": settings.select.model_dump(mode="json"),
        "member_scores": claims.read(settings.fusion.member_scores) if settings.fusion.member_scores else None,
        "calibration": None if calibration is None else [list(calibration.scores), list(calibration.precision)],
    }


def _same_labels(there: Any, here: Mapping[str, Any]) -> bool:
    """Whether shards with the record `there` are those of `here`."""
    if not isinstance(there, dict):
        return False
    before, now = there.get("predictions"), here["predictions"]
    if isinstance(before, dict):
        # The same predictions may lie in another place.
        before, now = ({**each, "folder": ""} for each in (before, now))
    else:
        # Earlier versions recorded a hash of job.json alone.
        job = storage.join(now["folder"], "job.json")
        now = hashlib.sha256(storage.read_bytes(job)).hexdigest() if storage.is_file(job) else None
    return claims.first_difference({**there, "predictions": before}, {**here, "predictions": now}) is None


def _shards(
    found: Bundles,
    settings: LabelSettings,
    calibration: Calibration | None,
    store: FusedStore | None,
    out: str,
    images_root: str,
    made_from: dict[str, Any],
) -> dict[str, Any]:
    made_from = made_from | {"parts": [[part.rsplit("/", 1)[-1] for part in group] for group in found.groups]}
    marker = record_of(out)
    if not _same_labels(claims.read(marker), made_from):
        # Shards of other settings or predictions, or the rest of a stopped deletion. A run keeps the labels of its last `select`.
        storage.remove_tree(out)
        storage.write_text_atomic(marker, json.dumps(made_from, indent=1) + "\n")
    present = set(storage.list_dir(out))
    summary = SelectionSummary()
    waiting = []
    for number, group in enumerate(found.groups):
        if {f"_part-{number:05d}.json", f"part-{number:05d}.parquet"} <= present:
            summary.merge(json.loads(storage.read_text(storage.join(out, f"_part-{number:05d}.json"))))
        else:
            waiting.append((group, settings, calibration, store, out, number, images_root))
    if "_done.json" not in present:
        note_command(out)
    in_process = len(waiting) if found.images <= _IN_PROCESS else 0
    for _, counts in fan_out("select", _write_shard, waiting, in_process=in_process, unit="bundle"):
        summary.merge(counts)
    storage.write_text_atomic(storage.join(out, "_done.json"), json.dumps(summary.summary()) + "\n")
    storage.remove_tree(storage.join(out, "_work"))
    return summary.summary()


def _write_shard(
    parts: Sequence[str],
    settings: LabelSettings,
    calibration: Calibration | None,
    store: FusedStore | None,
    out: str,
    number: int,
    images_root: str,
) -> dict[str, float]:
    records, summary = label_parts(parts, settings, calibration, store)
    write_parquet(storage.join(out, f"part-{number:05d}.parquet"), records, images_root)
    counts = summary.summary()
    # Written after the shard, because it says that the shard is done.
    storage.write_text_atomic(storage.join(out, f"_part-{number:05d}.json"), json.dumps(counts) + "\n")
    return counts

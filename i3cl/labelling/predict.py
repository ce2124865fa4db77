"""Ensemble prediction: Ray Data shards the images over actors that hold all members; one Parquet row an image, member and view.

Paths travel, pixels do not: an actor decodes an image once for all members and views. Reading an image never stops the job:
its reason becomes the row's `error`.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from i3cl import storage
from i3cl.config import Settings, UserError, ViewSettings
from i3cl.data.coco import Dataset
from i3cl.data.images import ImageError, decode_image
from i3cl.data.predictions import read_batches, to_table
from i3cl.job import connect, duration, quiet

MANIFEST_SCHEMA = pa.schema([("image_id", pa.int64()), ("file_name", pa.string()), ("path", pa.string())])


def view_name(view: ViewSettings) -> str:
    """'default', 's800', 's800-flip', ...: the view's name in the predictions."""
    scale = "default" if view.short_side is None else f"s{view.short_side}"
    return scale + ("-flip" if view.flip else "")


class Labeller:
    """The state of one actor: every member on one device. Called with blocks of manifest rows."""

    def __init__(self, members: dict[str, str], views: Sequence[ViewSettings], batch: int, threads: int) -> None:
        import torch

        from i3cl.predict import load

        torch.set_num_threads(threads)
        self.members = {name: load(checkpoint) for name, checkpoint in members.items()}
        self.views = views
        self.batch = batch

    def __call__(self, block: pa.Table) -> pa.Table:
        from concurrent.futures import ThreadPoolExecutor

        rows: list[dict[str, Any]] = []
        entries = block.to_pylist()
        with ThreadPoolExecutor(max_workers=2) as pool:
            loaded = list(pool.map(_read, [entry["path"] for entry in entries]))
        readable = []
        for entry, image in zip(entries, loaded, strict=True):
            if isinstance(image, str):
                rows += [self._row(entry, name, view, error=image) for name in self.members for view in self.views]
            else:
                readable.append((entry, image))
        readable.sort(key=lambda pair: pair[1].shape)
        for start in range(0, len(readable), self.batch):
            rows += self._predict(readable[start : start + self.batch])
        return to_table(rows)

    def _predict(self, group: list[tuple[dict[str, Any], np.ndarray]]) -> list[dict[str, Any]]:
        from i3cl.predict import detect_arrays

        rows = []
        images = [image for _, image in group]
        for name, model in self.members.items():
            for view in self.views:
                assert model.recipe is not None
                found = detect_arrays(model, images, model.recipe, view)
                for (entry, image), detections in zip(group, found, strict=True):
                    row = self._row(entry, name, view, height=image.shape[0], width=image.shape[1])
                    row["polygons"] = detections.polygons
                    row["scores"] = detections.scores
                    rows.append(row)
        return rows

    def _row(
        self,
        entry: dict[str, Any],
        member: str,
        view: ViewSettings,
        height: int = 0,
        width: int = 0,
        error: str | None = None,
    ) -> dict[str, Any]:
        return {
            "image_id": entry["image_id"],
            "file_name": entry["file_name"],
            "height": height,
            "width": width,
            "member": member,
            "view": view_name(view),
            "polygons": [],
            "scores": [],
            "error": error,
        }


def _read(path: str) -> np.ndarray | str:
    try:
        return decode_image(path)
    except ImageError as error:
        return str(error)


def predict(dataset: Dataset, members: dict[str, str], settings: Settings, out: str, title: str) -> str:
    """Write the members' predictions for every image of `dataset` as Parquet parts under `out`; return `out`.

    done.json is written last: a folder without it is begun anew, one with it is returned at once.
    UserError when there is no member, or
    when a larger share of the images than label.max_error_share cannot be read.
    """
    if not members:
        raise UserError("label.members: names no checkpoint; add label.members.NAME=CHECKPOINT_DIRECTORY")
    if not dataset.records:
        raise UserError(f"{dataset.name}: has no images")
    if storage.exists(storage.join(out, "done.json")):
        return out
    connect()
    import os

    import ray
    import ray.data
    from ray.data import ActorPoolStrategy

    label = settings.label
    storage.remove_tree(out)
    records = dataset.records
    manifest = pa.Table.from_pylist(
        [
            {"image_id": r.id, "file_name": r.file_name, "path": storage.join(dataset.images_root, r.file_name)}
            for r in records
        ],
        schema=MANIFEST_SCHEMA,
    )
    gpus = ray.cluster_resources().get("GPU", 0)
    gpu = settings.cluster.gpu
    on_gpu = gpus > 0 if gpu == "auto" else gpu
    threads = settings.cluster.threads or max(1, (os.cpu_count() or 1) // label.actors)
    absolute = {name: storage.absolute(path) for name, path in members.items()}
    blocks = [manifest.slice(i, label.rows_per_block).combine_chunks() for i in range(0, len(records), label.rows_per_block)]
    filesystem, path = storage.filesystem(out)
    quiet(ray.data.DataContext.get_current())
    pipeline = ray.data.from_arrow(blocks).map_batches(
        Labeller,
        fn_constructor_args=(absolute, label.views, label.batch, threads),
        batch_size=label.rows_per_block,
        batch_format="pyarrow",
        compute=ActorPoolStrategy(size=min(label.actors, max(1, len(blocks)))),
        num_cpus=1,
        num_gpus=1 if on_gpu else 0,
    )
    with _Watch(title, out, len(records), label.rows_per_block):
        pipeline.write_parquet(path, filesystem=filesystem)
    failed = _failed(out)
    if len(failed) > label.max_error_share * len(records):
        example = next(iter(failed.values()))
        raise UserError(f"{dataset.name}: {len(failed)} of {len(records)} images cannot be read, e.g. {example}")
    for reason in list(failed.values())[:5]:
        print(f"{title}: skipped {reason}", flush=True)
    storage.write_text_atomic(storage.join(out, "done.json"), f'{{"images": {len(records)}, "failed": {len(failed)}}}\n')
    return out


def _failed(out: str) -> dict[int, str]:
    import pyarrow.compute as pc

    failed: dict[int, str] = {}
    for batch in read_batches(out, ["image_id", "error"]):
        batch = batch.filter(pc.is_valid(batch["error"]))
        failed.update(zip(batch["image_id"].to_pylist(), batch["error"].to_pylist(), strict=True))
    return failed


class _Watch:
    """Prints, while Ray Data works, how many images are written and the time left."""

    def __init__(self, title: str, out: str, images: int, rows_per_block: int) -> None:
        self.title, self.out, self.images, self.block = title, out, images, rows_per_block
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._follow, daemon=True)

    def __enter__(self) -> None:
        print(f"{self.title}: {self.images} images, starting actors", flush=True)
        self._started = time.monotonic()
        self._thread.start()

    def __exit__(self, kind: type | None, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        if kind is None:
            spent = time.monotonic() - self._started
            print(
                f"{self.title}: {self.images} images in {duration(spent)} ({self.images / max(spent, 1e-9):.1f}/s "
                "with start-up)",
                flush=True,
            )

    def _follow(self) -> None:
        shown = 0
        while not self._stop.wait(5.0):
            parts = storage.list_dir(self.out) if storage.exists(self.out) else []
            done = min(self.images, self.block * sum(name.endswith(".parquet") for name in parts))
            if done > shown:
                shown = done
                left = (time.monotonic() - self._started) / done * (self.images - done)
                print(f"{self.title}: {done}/{self.images} images  {duration(left)} left", flush=True)

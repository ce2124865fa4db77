"""Fused predictions image by image: from stored predictions, or from where an earlier choice of thresholds has kept them.

Thresholds do not change the fusion. A sweep over thresholds therefore reads and fuses the predictions once, and every further
trial reads the fused instances, which are smaller than the predictions of several members in several views.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from i3cl import claims, storage
from i3cl.config import FusionSettings, LabelSettings
from i3cl.data.formats.parts import unfinished
from i3cl.data.formats.predictions import polygons_of, read_predictions
from i3cl.errors import UserError
from i3cl.labelling.fusion import FusedInstances, MemberPrediction, fuse_images
from i3cl.labelling.member_scores import read_member_scores

_TOGETHER = 64
"""Images fused in one call."""
_SCHEMA = pa.schema(
    [
        ("image_id", pa.int64()),
        ("file_name", pa.string()),
        ("height", pa.int32()),
        ("width", pa.int32()),
        ("polygons", pa.list_(pa.list_(pa.float32()))),
        ("scores", pa.list_(pa.float64())),
        ("votes", pa.list_(pa.int64())),
        ("agreement", pa.list_(pa.float64())),
        ("lines", pa.list_(pa.list_(pa.float32()))),
        ("line_scores", pa.list_(pa.float64())),
    ]
)
"""The columns of `FusedImage` without its members; polygons are flat x0, y0, x1, y1, ..."""


@dataclass(frozen=True)
class FusedImage:
    """The fused instances of one image."""

    image_id: int
    file_name: str
    height: int
    width: int
    fused: FusedInstances
    members: tuple[MemberPrediction, ...] = ()
    """What was fused."""


def fused_images(predictions: str | Sequence[str], settings: LabelSettings) -> Iterator[FusedImage]:
    """Every readable image of a predictions folder, or of parts that hold all rows of their images, with its members fused."""
    # A member that cannot take an image, or has no results for it, is not asked there: it neither supports nor contradicts.
    every = ([row for row in rows if row["error"] is None] for rows in read_predictions(predictions))
    readable = (rows for rows in every if rows)
    meaning = None if settings.fusion.member_scores is None else read_member_scores(settings.fusion.member_scores)
    for group in _batched(readable, _TOGETHER):
        members = [members_of(rows) for rows in group]
        if meaning is not None:
            weights = settings.fusion.member_weights
            members = [
                tuple(
                    # Of a member that is left out nothing was learned, perhaps.
                    replace(m, scores=meaning(m.member, m.scores)) if weights.get(m.member, 1.0) > 0 else m
                    for m in parts
                )
                for parts in members
            ]
        for rows, parts, fused in zip(group, members, fuse_images(members, settings.fusion)):
            first = rows[0]
            yield FusedImage(first["image_id"], first["file_name"], first["height"], first["width"], fused, parts)


def members_of(rows: Sequence[Mapping[str, Any]]) -> tuple[MemberPrediction, ...]:
    """The input of fusion, from the rows of one readable image as `read_predictions` gives them."""
    return tuple(
        MemberPrediction(
            row["member"],
            polygons_of(row),
            np.asarray(row["scores"]),
            view=row["view"] or "default",
            lines=row.get("granularity") == "line",
        )
        for row in rows
    )


def _batched(items: Iterator[Any], size: int) -> Iterator[list[Any]]:
    group: list[Any] = []
    for item in items:
        group.append(item)
        if len(group) == size:
            yield group
            group = []
    if group:
        yield group


def record_of_predictions(predictions: str) -> dict[str, Any]:
    """What says which predictions something was made from: folder, sha256 of the content, job.json and missing parts.

    Reads all of them. UserError when there is none.
    """
    lacks = None if storage.is_file(predictions) else unfinished(predictions)
    return {
        "folder": storage.absolute(predictions),
        "sha256": claims.content_hash(predictions),
        "job": claims.read(storage.join(predictions, "job.json")),
        "missing_parts": lacks.missing if lacks else 0,
    }


@dataclass(frozen=True)
class FusedStore:
    """Keeps what was fused of some predictions, for other thresholds. Several processes may use one at the same time."""

    folder: str
    """Local or s3://, with one folder in it for every choice of fusion settings."""
    predictions: Mapping[str, Any]
    """`record_of_predictions`. The predictions must stay as they are while the store is used."""

    @classmethod
    def of(cls, predictions: str, folder: str) -> FusedStore:
        """A store for this predictions folder as it is now."""
        return cls(folder, record_of_predictions(predictions))

    def path(self, settings: FusionSettings, parts: Sequence[str]) -> str:
        """Where the fused images of some parts of the predictions are kept."""
        scores = claims.read(settings.member_scores) if settings.member_scores else None
        names = [part.rpartition("/")[2] for part in parts]
        key = [self.predictions["sha256"], settings.model_dump(mode="json"), scores, names]
        digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
        return storage.join(self.folder, f"{digest[:32]}.parquet")

    def images(self, settings: LabelSettings, parts: Sequence[str]) -> Iterable[FusedImage]:
        """`fused_images` of these parts without `members`, read from the store where they are in it and put there where not."""
        path = self.path(settings.fusion, parts)
        if not storage.is_file(path):
            images = list(fused_images(parts, settings))
            _write(path, images)
            return images
        return _read(path)


def _write(path: str, images: Sequence[FusedImage]) -> None:
    rows = [
        {
            "image_id": image.image_id,
            "file_name": image.file_name,
            "height": image.height,
            "width": image.width,
            "polygons": [ring.ravel() for ring in image.fused.polygons],
            "scores": image.fused.scores,
            "votes": image.fused.votes,
            "agreement": image.fused.agreement,
            "lines": [ring.ravel() for ring in image.fused.lines],
            "line_scores": image.fused.line_scores,
        }
        for image in images
    ]
    with storage.atomic_file(path) as out:
        pq.write_table(pa.Table.from_pylist(rows, _SCHEMA), out, compression="zstd")


def _read(path: str) -> Iterator[FusedImage]:
    try:
        with storage.open_arrow(path) as source, pq.ParquetFile(source) as file:
            for batch in file.iter_batches(1024):
                for row in batch.cast(_SCHEMA).to_pylist():
                    fused = FusedInstances(
                        polygons=polygons_of(row),
                        scores=np.array(row["scores"], np.float64),
                        votes=np.array(row["votes"], np.int64),
                        agreement=np.array(row["agreement"], np.float64),
                        lines=polygons_of({"polygons": row["lines"]}),
                        line_scores=np.array(row["line_scores"], np.float64),
                    )
                    yield FusedImage(row["image_id"], row["file_name"], row["height"], row["width"], fused)
    except (OSError, pa.ArrowException) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"{path}: cannot be read as fused predictions ({reason}); remove the file") from error

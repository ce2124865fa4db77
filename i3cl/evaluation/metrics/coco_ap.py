"""COCO average precision of polygons and of their boxes: a training monitor, no text benchmark.

AP is the mean over IoU 0.50, 0.55 ... 0.95 of the 101-point interpolated precision, one class, as pycocotools
has it. A don't-care truth is a COCO crowd: a detection that lies in it by the IoU threshold's share of itself
counts neither way.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from pycocotools import mask as mask_codec
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from i3cl.geometry import as_polygon, polygon_box


@dataclass(frozen=True)
class ImageRecord:
    """Truth and detections of one image. Polygons are (P, 2) pixels of the original image."""

    height: int
    """Pixels."""
    width: int
    truths: Sequence[ArrayLike]
    ignore: ArrayLike
    """(N,) bool, True for don't-care."""
    detections: Sequence[ArrayLike]
    scores: ArrayLike
    """(M,) float; only their order counts."""
    masks: Sequence[dict[str, Any] | None] | None = None
    """M COCO RLE masks of `height` x `width` to use in place of the detections' polygons, None where there is none."""


def coco_mask_ap(records: Iterable[ImageRecord], max_detections: int = 300) -> dict[str, float]:
    """AP, AP50 and AP75 (0-1) of the polygons' masks, cut at the image frame; -1 without a care truth.

    max_detections: best detections used per image. COCO's own number is 100; dense photographs hold more
    words. ValueError when the lengths inside a record differ or a polygon is none.
    """
    return _average_precision(records, "segm", max_detections)


def coco_box_ap(records: Iterable[ImageRecord], max_detections: int = 300) -> dict[str, float]:
    """As `coco_mask_ap`, of the polygons' axis-aligned boxes."""
    return _average_precision(records, "bbox", max_detections)


def _average_precision(records: Iterable[ImageRecord], kind: str, max_detections: int) -> dict[str, float]:
    if max_detections < 1:
        raise ValueError(f"max_detections must be at least 1, not {max_detections}")
    images: list[dict[str, Any]] = []
    truths: list[dict[str, Any]] = []
    detections: list[dict[str, Any]] = []
    for image_id, record in enumerate(records, start=1):
        ignore = np.asarray(record.ignore, bool).reshape(-1)
        scores = np.asarray(record.scores, np.float64).reshape(-1)
        if len(ignore) != len(record.truths) or len(scores) != len(record.detections):
            raise ValueError(
                f"record {image_id}: {len(record.truths)} truths and {len(ignore)} ignore flags,"
                f" {len(record.detections)} detections and {len(scores)} scores"
            )
        images.append({"id": image_id, "height": record.height, "width": record.width})
        for polygon, flag in zip(record.truths, ignore.tolist()):
            truths.append(_annotation(polygon, record, image_id, len(truths) + 1) | {"iscrowd": int(flag)})
        masks = record.masks if record.masks is not None else [None] * len(record.detections)
        for polygon, score, mask in zip(record.detections, scores.tolist(), masks):
            shape = _annotation(polygon, record, image_id, len(detections) + 1)
            if mask is not None:
                runs = mask if isinstance(mask["counts"], str | bytes) else mask_codec.frPyObjects(mask, *mask["size"])
                shape |= {"segmentation": runs, "area": float(mask_codec.area(runs))}
                if kind == "bbox":
                    shape["bbox"] = mask_codec.toBbox(runs).tolist()
            detections.append(shape | {"iscrowd": 0, "score": score})

    # pycocotools reports by printing.
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation = COCOeval(_dataset(images, truths), _dataset(images, detections), kind)
        evaluation.params.maxDets = [max_detections]
        evaluation.params.areaRng = [[0, 1e10]]
        evaluation.params.areaRngLbl = ["all"]
        if images:
            evaluation.evaluate()
            evaluation.accumulate()
    # Not by summarize(): it looks for 100 detections by name and answers -1 for any other limit.
    precision = evaluation.eval["precision"] if images else np.full((10, 101, 1, 1, 1), -1.0)
    assert precision.shape == (10, 101, 1, 1, 1), precision.shape
    per_iou = precision.reshape(10, 101).mean(axis=1)
    return {"AP": float(per_iou.mean()), "AP50": float(per_iou[0]), "AP75": float(per_iou[5])}


def _annotation(polygon: ArrayLike, record: ImageRecord, image_id: int, number: int) -> dict[str, Any]:
    points = as_polygon(polygon)
    x0, y0, x1, y1 = polygon_box(points).tolist()
    ring = points.astype(np.float64).ravel().tolist()
    mask = mask_codec.frPyObjects([ring], record.height, record.width)[0]
    return {
        # From 1: pycocotools takes id 0 for "no match".
        "id": number,
        "image_id": image_id,
        "category_id": 1,
        "bbox": [x0, y0, x1 - x0, y1 - y0],
        "segmentation": mask,
        "area": float(mask_codec.area(mask)),
    }


def _dataset(images: list[dict[str, Any]], annotations: list[dict[str, Any]]) -> COCO:
    coco = COCO()
    coco.dataset = {
        "images": images,
        "annotations": annotations,
        "categories": [{"id": 1, "name": "text"}],
    }
    coco.createIndex()
    return coco

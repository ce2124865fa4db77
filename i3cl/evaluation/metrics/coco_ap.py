"""COCO average precision of polygons and of their boxes: a training monitor, not a text benchmark.

AP is the mean over IoU 0.50, 0.55 ... 0.95 of the 101-point interpolated precision, one class, as pycocotools
has it. A don't-care truth is a COCO crowd: a detection that lies in it by the IoU threshold's share of itself
counts neither way.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from pycocotools import mask as mask_codec
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from i3cl.evaluation.metrics.batch import EvalImage
from i3cl.geometry import as_polygon, polygon_box


def coco_mask_ap(images: Iterable[EvalImage], max_detections: int = 300) -> dict[str, float]:
    """AP, AP50 and AP75 (0-1) of the polygons' masks, cut at the image frame; -1 without a care truth.

    Args:
        images: Only the order of their scores counts. An image without height and width reaches as far as its polygons.
            Truths of fewer than 3 points are left out.
        max_detections: Best detections used per image. COCO's own number is 100; dense photographs hold more words.

    Raises:
        ValueError: `max_detections` is under 1 or a polygon is broken.
    """
    return _average_precision(images, "segm", max_detections)


def coco_box_ap(images: Iterable[EvalImage], max_detections: int = 300) -> dict[str, float]:
    """As `coco_mask_ap`, of the polygons' axis-aligned boxes."""
    return _average_precision(images, "bbox", max_detections)


def _average_precision(evaluated: Iterable[EvalImage], kind: str, max_detections: int) -> dict[str, float]:
    if max_detections < 1:
        raise ValueError(f"max_detections must be at least 1, not {max_detections}")
    images: list[dict[str, Any]] = []
    truths: list[dict[str, Any]] = []
    detections: list[dict[str, Any]] = []
    for image_id, image in enumerate(evaluated, start=1):
        height, width = _frame(image)
        images.append({"id": image_id, "height": height, "width": width})
        for polygon, flag in zip(image.truths, np.asarray(image.ignore, bool).tolist()):
            if len(polygon) >= 3:
                truths.append(_annotation(polygon, height, width, image_id, len(truths) + 1) | {"iscrowd": int(flag)})
        masks = image.masks if image.masks is not None else [None] * len(image.detections)
        for polygon, score, mask in zip(image.detections, np.asarray(image.scores, np.float64).tolist(), masks):
            shape = _annotation(polygon, height, width, image_id, len(detections) + 1)
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


def _frame(image: EvalImage) -> tuple[int, int]:
    """Height and width of the image; where the truth does not say, as far as the polygons reach."""
    if image.height and image.width:
        return image.height, image.width
    polygons = [p for p in (*image.truths, *image.detections) if len(p)]
    if not polygons:
        return 1, 1
    far = np.ceil(np.concatenate(polygons).max(axis=0)).astype(int)
    return max(1, min(int(far[1]), 20_000)), max(1, min(int(far[0]), 20_000))


def _annotation(polygon: ArrayLike, height: int, width: int, image_id: int, number: int) -> dict[str, Any]:
    points = as_polygon(polygon)
    x0, y0, x1, y1 = polygon_box(points).tolist()
    ring = points.astype(np.float64).ravel().tolist()
    mask = mask_codec.frPyObjects([ring], height, width)[0]
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

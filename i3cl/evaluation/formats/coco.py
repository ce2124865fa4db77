"""COCO: data sets (json or Parquet) as truth, results lists, and data sets with scores (pseudo labels) as results."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from i3cl import storage
from i3cl.data.formats.checks import MAX_SIDE, BadItem, Faults, rle_outline, shown, whole_number
from i3cl.data.formats.coco import read_coco
from i3cl.data.formats.records import ImageRecord
from i3cl.data.importers import parse
from i3cl.errors import UserError
from i3cl.evaluation.formats.sets import ImageDetections, ImageTruth, PolygonSet, Ring, ring, score_of
from i3cl.geometry import polygon_area

RESULTS = "COCO results"
"""`PolygonSet.format` of a results list, whose images have ids and no names."""


def coco_truth(path: str, skip_bad: bool) -> PolygonSet[ImageTruth]:
    """A COCO data set or its Parquet twin."""
    data = read_coco(path, "", skip_bad=skip_bad, check_files=False)
    warnings = [data.summary()] if data.problems else []
    return PolygonSet(path, "COCO", [truth_of_record(record) for record in data.records], warnings=warnings)


def truth_of_record(record: ImageRecord) -> ImageTruth:
    """The truth of one image of a data set."""
    image = ImageTruth(record.file_name, id=record.id, height=record.height, width=record.width, file_name=record.file_name)
    for i in record.instances:
        image.add(np.asarray(i.polygon, np.float64), i.ignore, i.text, i.language)
    return image


def coco_as_results(path: str, skip_bad: bool) -> PolygonSet[ImageDetections]:
    """A COCO data set whose instances are the detections; an instance without a score has 1, ignore regions are left out."""
    records = read_coco(path, "", skip_bad=skip_bad, check_files=False).records
    return PolygonSet(path, "COCO data set with scores", [detections_of_record(record) for record in records])


def detections_of_record(record: ImageRecord) -> ImageDetections:
    """The instances of one image of a data set as detections."""
    kept = [i for i in record.instances if not i.ignore]
    scores = np.array([1.0 if i.score is None else i.score for i in kept])
    polygons = [np.asarray(i.polygon, np.float64) for i in kept]
    return ImageDetections(record.file_name, polygons, scores, record.id, record.height, record.width)


def is_predicted(path: str) -> bool:
    """Whether a path is a folder that the command `predict` wrote."""
    return storage.is_dir(path) and {"coco.json", "images.json"} <= set(storage.list_dir(path))


def predicted_results(path: str, faults: Faults) -> PolygonSet[ImageDetections]:
    """A folder that the command `predict` wrote; its images are known by their file names, whose ids are its own."""
    texts = {name: storage.join(path, name) for name in ("coco.json", "images.json")}
    content, heads = (parse.parse_json(storage.read_bytes(file), file) for file in texts.values())
    found = {image.id: image for image in coco_results(texts["coco.json"], content, faults).images}
    images = []
    for head in heads:
        image = found.get(head["id"], ImageDetections("", [], np.zeros(0)))
        images.append(replace(image, name=head["file_name"], id=None, height=head["height"], width=head["width"]))
    return PolygonSet(path, "folder of predict", images)


def coco_results(path: str, content: list[Any], faults: Faults) -> PolygonSet[ImageDetections]:
    """A list of {image_id, score, segmentation or bbox}; polygons, RLE masks and boxes may be mixed.

    The list does not say which category_id is text, so all must have the same. UserError otherwise.
    """
    _check_categories(path, content)
    images: dict[int, ImageDetections] = {}
    scores: dict[int, list[float]] = {}
    for position, entry in enumerate(content):
        where = f"{path}: result {position + 1}"
        try:
            if not isinstance(entry, dict):
                raise BadItem("type", "is not an object with image_id, segmentation or bbox, and score")
            identity = whole_number(entry.get("image_id"))
            if identity is None:
                raise BadItem("type", f"image_id is {shown(entry.get('image_id'))}; write the image's number in the truth")
            score = score_of(entry.get("score"))
            segmentation = entry.get("segmentation")
            polygon = _segmentation(segmentation) if segmentation else _box(entry.get("bbox"))
        except BadItem as error:
            faults.bad(where, error)
            continue
        image = images.setdefault(identity, ImageDetections(str(identity), [], np.zeros(0), identity, masks=[]))
        mask = segmentation if isinstance(segmentation, dict) else None
        if mask is not None and image.height is None:
            image.height, image.width = mask["size"]
        if mask is not None and mask["size"] != [image.height, image.width]:
            size = f"{image.height} x {image.width}"
            faults.bad(where, BadItem("rle", f"RLE size is {mask['size']}, but {size} before in this image; correct one"))
            continue
        image.polygons.append(polygon)
        assert image.masks is not None
        image.masks.append(mask)
        scores.setdefault(identity, []).append(score)
    for identity, image in images.items():
        image.scores = np.array(scores.get(identity, []))
    return PolygonSet(path, RESULTS, list(images.values()))


def _check_categories(path: str, content: list[Any]) -> None:
    first: tuple[int, Any] | None = None
    for position, entry in enumerate(content, 1):
        category = entry.get("category_id") if isinstance(entry, dict) else None
        if category is None:
            continue
        first = first or (position, category)
        if category != first[1]:
            raise UserError(
                f"{path}: result {position} has category_id {shown(category)} and result {first[0]} {shown(first[1])}; "
                "keep the results of the category 'text' alone"
            )


def _segmentation(segmentation: Any) -> Ring:
    if isinstance(segmentation, dict):
        size = segmentation.get("size")
        if not (isinstance(size, list) and len(size) == 2 and all(type(s) is int and 0 < s <= MAX_SIDE for s in size)):
            raise BadItem("rle", f"RLE size is {shown(size)}; write [height, width]")
        return np.asarray(rle_outline(segmentation, size[0], size[1], []), np.float64)
    if not isinstance(segmentation, list):
        raise BadItem("type", "segmentation is neither polygons nor an RLE object; write one of them")
    parts = segmentation if isinstance(segmentation[0], list) else [segmentation]
    return max((ring(part) for part in parts), key=polygon_area)


def _box(box: Any) -> Ring:
    if box is None:
        raise BadItem("polygon", "has neither segmentation nor bbox; add one")
    if not isinstance(box, list) or len(box) != 4:
        raise BadItem("type", f"bbox is {shown(box)}; write [x, y, width, height]")
    if not set(map(type, box)) <= {int, float}:
        raise BadItem("type", f"bbox is {box!r:.60}; write four numbers, not text: [x, y, width, height]")
    x, y, width, height = box
    if width < 0 or height < 0:
        raise BadItem("type", f"bbox is {width:g} x {height:g}; write [x, y, width, height] with x, y of the top left corner")
    return ring([x, y, x + width, y, x + width, y + height, x, y + height])

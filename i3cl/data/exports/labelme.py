"""LabelMe: one json an image, out and back."""

from __future__ import annotations

import json
import posixpath
from collections.abc import Iterable, Iterator
from pathlib import PurePosixPath
from typing import Any

from i3cl import storage
from i3cl.data.exports.common import (
    Region,
    Reviewed,
    are_numbers,
    box_points,
    files_under,
    flat_points,
    label_of,
    parse_json,
    points_of,
    with_size,
)
from i3cl.data.formats.checks import kind_of, shown
from i3cl.data.formats.records import ImageRecord
from i3cl.errors import UserError


def write(out: str, records: Iterable[ImageRecord], prefix: str = "") -> int:
    """Write a folder with ``<image>.json`` in the sub-folders of the images, whole or not at all; return their number.

    prefix: what stands before the image's own name in imagePath; none where the files are laid beside the images.
    UserError when two images would have the same file, e.g. a.jpg and a.png.
    """
    count = 0
    with storage.atomic_directory(out) as folder:
        for record in with_size(records):
            count += 1
            file = folder / PurePosixPath(record.file_name).with_suffix(".json")
            if file.exists():
                raise UserError(f"{record.file_name}: a second image would be {file.name}; LabelMe keeps one json a name")
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps(_content(record, prefix), ensure_ascii=False, allow_nan=False), encoding="utf-8")
    return count


def _content(record: ImageRecord, prefix: str) -> dict[str, Any]:
    shapes: list[dict[str, Any]] = [
        {
            "label": label_of(instance),
            "points": points_of(instance),
            "group_id": None,
            "description": instance.text or "",
            "shape_type": "polygon",
            "flags": {},
        }
        for instance in record.instances
    ]
    return {
        "version": "5.5.0",
        "flags": {},
        "shapes": shapes,
        "imagePath": prefix + posixpath.basename(record.file_name),
        "imageData": None,
        "imageHeight": record.height,
        "imageWidth": record.width,
    }


def read(source: str) -> Iterator[Reviewed]:
    """Images of a folder of LabelMe files, or of one file. UserError for a file that is not of LabelMe."""
    names = [""] if storage.is_file(source) else files_under(source, ".json")
    for name in names:
        where = storage.join(source, name)
        content = parse_json(storage.read_text(where), where)
        if not isinstance(content, dict) or not isinstance(content.get("shapes"), list):
            raise UserError(f"{where}: has no list of shapes; is it a file of LabelMe?")
        image = content.get("imagePath")
        if not isinstance(image, str) or not image:
            raise UserError(f"{where}: imagePath is {shown(image)}; write the image's name")
        width, height = content.get("imageWidth"), content.get("imageHeight")
        if any(s is not None and (not isinstance(s, int) or isinstance(s, bool)) for s in (width, height)):
            raise UserError(f"{where}: imageWidth or imageHeight is no whole number; save it again")
        # The folder tells images of one name apart; imagePath may lead out of it.
        own = posixpath.join(posixpath.dirname(name), image.replace("\\", "/").rsplit("/", 1)[-1])
        yield Reviewed(own, where, [_region(shape) for shape in content["shapes"]], width, height)


def _region(shape: Any) -> Region:
    if not isinstance(shape, dict):
        return Region(None, fault=f"is {kind_of(shape)}, not a shape")
    kind, points, label = shape.get("shape_type", "polygon"), flat_points(shape.get("points")), shape.get("label")
    text = shape.get("description")
    text = text if isinstance(text, str) and text else None
    if kind == "polygon":
        return Region(points, label, text)
    if kind == "rectangle":
        if len(points) != 4:
            return Region(points, label, text)
        if not are_numbers(points):
            return Region(None, label, fault="is a rectangle without usable corners")
        return Region(box_points(*points), label, text)
    return Region(None, label, fault=f"is of shape_type {shown(kind)}; draw polygons or rectangles")

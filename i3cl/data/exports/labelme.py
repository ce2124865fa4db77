"""LabelMe: one json per image, out and back."""

from __future__ import annotations

import json
import posixpath
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import PurePosixPath
from typing import Any

from i3cl import storage
from i3cl.data.exports.common import (
    ExportOptions,
    Format,
    Region,
    Reviewed,
    are_numbers,
    box_points,
    files_under,
    flat_points,
    label_of,
    points_of,
    with_size,
)
from i3cl.data.formats.checks import kind_of, parse_json, shown
from i3cl.data.formats.records import ImageRecord
from i3cl.errors import UserError


def write(out: str, records: Iterable[ImageRecord], options: ExportOptions) -> str:
    """Write a folder with ``<image>.json`` in the sub-folders of the images, atomically.

    The prefix stands before the image's own name in imagePath; leave it empty when the files go beside the images. UserError
    when two images would have the same file, e.g. a.jpg and a.png.
    """
    count = 0
    written: dict[PurePosixPath, str] = {}
    with storage.atomic_directory(out) as folder:
        for record in with_size(records):
            count += 1
            name = PurePosixPath(record.file_name).with_suffix(".json")
            if name in written:
                raise UserError(f"{record.file_name} and {written[name]}: both would be {name}; rename one of them")
            written[name] = record.file_name
            file = folder / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps(_content(record, options.prefix), ensure_ascii=False, allow_nan=False), encoding="utf-8")
    return f"{count} images"


def _content(record: ImageRecord, prefix: str) -> dict[str, Any]:
    shapes: list[dict[str, Any]] = [
        {
            "label": label_of(instance),
            "points": points_of(instance),
            "group_id": None,
            "description": instance.text or "",
            "shape_type": "polygon",
            "flags": {instance.problem[0]: True} if instance.problem else {},
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
    """Images of a folder of LabelMe files, or of one file. UserError for a file that LabelMe did not write.

    Shapes with one label and one group_id are parts of one instance.
    """
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
            raise UserError(f"{where}: imageWidth or imageHeight is not a whole number; save it again")
        # The folder tells images of one name apart; imagePath may lead out of it.
        own = posixpath.join(posixpath.dirname(name), image.replace("\\", "/").rsplit("/", 1)[-1])
        yield Reviewed(own, where, _regions(content["shapes"]), width, height)


def _regions(shapes: list[Any]) -> list[Region]:
    """The shapes as regions, with shapes of one group joined: LabelMe's way to say that a word is in several pieces."""
    regions: list[Region] = []
    groups: dict[tuple[Any, Any], int] = {}
    for shape in shapes:
        region = _region(shape)
        group = shape.get("group_id") if isinstance(shape, dict) else None
        # Shapes of other labels may share a group, too: there it links a key and its value, say.
        if region.fault is None and isinstance(region.label, str) and isinstance(group, int | str):
            first = groups.setdefault((group, region.label), len(regions))
            if first < len(regions):
                known = regions[first]
                regions[first] = replace(known, more_parts=(*known.more_parts, region.points), text=known.text or region.text)
                continue
        regions.append(region)
    return regions


def _region(shape: Any) -> Region:
    if not isinstance(shape, dict):
        return Region(None, fault=f"is {kind_of(shape)}, not a shape")
    kind, points, label = shape.get("shape_type", "polygon"), flat_points(shape.get("points")), shape.get("label")
    text = shape.get("description")
    text = text if isinstance(text, str) and text else None
    # X-AnyLabeling, which writes LabelMe's files, calls a turned box a "rotation" and gives its four corners.
    if kind in ("polygon", "rotation"):
        return Region(points, label, text)
    if kind == "rectangle":
        if len(points) != 4:
            return Region(points, label, text)
        if not are_numbers(points):
            return Region(None, label, fault="is a rectangle without usable corners")
        return Region(box_points(*points), label, text)
    return Region(None, label, fault=f"is of shape_type {shown(kind)}; draw polygons or rectangles")


LABELME = Format(write, read)

"""COCO json with our `lossweight`, `outlineweight`, `score` and `votes`, and its Parquet twin: checked reading, whole writing.

Reading gives either a right data set or one line that names the file, the id and the remedy; with `skip_bad`
bad items are listed and left out instead. Choices where COCO leaves room:
- one class: category "text"; further categories may be listed but an annotation may not use them;
- `iscrowd` or `ignore` makes an ignore region;
- of a segmentation in several parts, polygons or RLE, the largest part is the instance (listed as "parts");
- a polygon that is partly outside the image is clipped to it (listed as "clipped");
- without a segmentation the bbox is the polygon.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from i3cl import geometry, storage
from i3cl.data.formats.checks import (
    CATEGORY,
    BadItem,
    Faults,
    PresentFiles,
    checked_instance,
    identity_of,
    image_head,
    kind_of,
    named,
    set_name,
    shown,
    whole_number,
)
from i3cl.data.formats.records import Dataset, ImageRecord, Instance
from i3cl.data.formats.table import read_table
from i3cl.errors import UserError

# ---------------------------------------------------------------------------------------------------- reading


def read_coco(
    annotations: str,
    images_root: str,
    *,
    skip_bad: bool = False,
    check_files: bool = True,
    lossweight: float | None = None,
) -> Dataset:
    """Read a COCO json, or a Parquet file or folder as ``write_shards`` writes, and check every item of it.

    `annotations` and `images_root` are local paths or s3:// URLs. `check_files` asks whether every image is
    there (it is not opened). `lossweight` replaces that of every instance. A json is held in memory as a
    whole, a Parquet table never is. UserError at the first bad item, or with `skip_bad` only when the file as
    a whole cannot be used.
    """
    if annotations.rstrip("/").endswith(".parquet") or storage.is_dir(annotations):
        return read_table(annotations, images_root, skip_bad=skip_bad, check_files=check_files, lossweight=lossweight)
    content = _parse_json(annotations)
    if not isinstance(content, dict):
        raise UserError(f"{annotations}: is {kind_of(content)}, not a COCO object with images and annotations")
    images = _list_of(content, "images", annotations, required=True)
    entries = _list_of(content, "annotations", annotations, required=False)
    categories = _categories(_list_of(content, "categories", annotations, required=False), annotations)

    faults = Faults(skip_bad)
    present = PresentFiles(images_root) if check_files else None
    heads: dict[int, tuple[str, int, int, str | None]] = {}
    instances: dict[int, list[Instance]] = {}
    bad_images: set[int] = set()
    for position, image in enumerate(images):
        try:
            identity = identity_of(image, position)
            if identity in heads or identity in bad_images:
                raise BadItem("duplicate image id", "occurs twice; give every image its own id")
            bad_images.add(identity)
            head = image_head(image)
            if present is not None and not present.has(head[0]):
                path = storage.join(images_root, head[0])
                raise BadItem("missing image", f"{path} is not there; correct the images root or the file name")
            bad_images.discard(identity)
            heads[identity], instances[identity] = head, []
        except BadItem as error:
            faults.bad(f"{annotations}: {named('image', image, position)}", error)

    seen: set[int] = set()
    for position, entry in enumerate(entries):
        try:
            identity = identity_of(entry, position)
            if identity in seen:
                raise BadItem("duplicate annotation id", "occurs twice; give every annotation its own id")
            seen.add(identity)
            image_id = whole_number(entry.get("image_id"))
            if image_id is None:
                raise BadItem("type", f"image_id is {shown(entry.get('image_id'))}; write the image's whole number")
            if image_id not in heads:
                if image_id in bad_images:
                    raise BadItem("image left out", f"its image {image_id} is left out; correct that first")
                raise BadItem("unknown image", f"image_id {image_id} is not in images; add the image or remove this")
            _, height, width, _ = heads[image_id]
            instance, mended = checked_instance(entry, categories, height, width)
            if lossweight is not None:
                instance = replace(instance, lossweight=lossweight)
            instances[image_id].append(instance)
            faults.mended(f"{annotations}: annotation {identity}", mended)
        except BadItem as error:
            faults.bad(f"{annotations}: {named('annotation', entry, position)}", error)

    records = tuple(ImageRecord(i, *head[:3], tuple(instances[i]), head[3]) for i, head in heads.items())
    return Dataset(set_name(annotations), images_root, records, tuple(faults.problems))


def _parse_json(path: str) -> Any:
    text = storage.read_text(path)
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(
            f"{path}: line {error.lineno} column {error.colno}: not valid JSON ({error.msg}); is the file complete?"
        ) from None
    except RecursionError:
        raise UserError(f"{path}: JSON nested too deeply for an annotation file") from None
    except ValueError as error:  # e.g. an integer of thousands of digits
        raise UserError(f"{path}: not usable JSON ({error})") from None


def _list_of(content: dict[str, Any], key: str, path: str, required: bool) -> list[Any]:
    value = content.get(key)
    if value is None and not required:
        return []
    if not isinstance(value, list):
        state = f"is {kind_of(value)}" if key in content else "is missing"
        raise UserError(f"{path}: {key} {state}; a COCO file has a list there")
    return value


def _categories(entries: list[Any], path: str) -> dict[int, bool]:
    """Category id -> whether it is the text category."""
    result: dict[int, bool] = {}
    for entry in entries:
        identity = whole_number(entry.get("id")) if isinstance(entry, dict) else None
        name = entry.get("name") if isinstance(entry, dict) else None
        if identity is None or not isinstance(name, str):
            raise UserError(f"{path}: categories: {shown(entry)} is not {{'id': whole number, 'name': text}}")
        if identity in result:
            raise UserError(f"{path}: categories: id {identity} occurs twice")
        result[identity] = name.strip().lower() == "text"
    if entries and sum(result.values()) != 1:
        raise UserError(f"{path}: categories: {sum(result.values())} of {len(result)} are named 'text'; name one so")
    return result


def read_for_command(annotations: str, images_root: str = "", *, skip_bad: bool, check_files: bool = False) -> Dataset:
    """As ``read_coco``; what `skip_bad` left out or mended is printed."""
    dataset = read_coco(annotations, images_root, skip_bad=skip_bad, check_files=check_files)
    if skip_bad:
        dataset.list_problems()
    return dataset


# ---------------------------------------------------------------------------------------------------- writing


def write_coco(path: str, records: Iterable[ImageRecord], info: Mapping[str, Any] | None = None) -> None:
    """Write records as COCO json, whole or not at all, holding one of them at a time.

    Coordinates survive exactly; annotation ids are numbered from 1. ValueError when two records share an id:
    such a file could not be read back.
    """
    seen: set[int] = set()
    number = 0
    # In the file the images stand before the annotations, which meanwhile wait in a file of their own.
    with storage.atomic_file(path) as out, tempfile.TemporaryFile("w+b") as annotations:
        out.write(f'{{"info": {_dumps({"description": "text polygons", **(info or {})})}, "images": ['.encode())
        for record in records:
            if record.id in seen:
                raise ValueError(f"two records have the id {record.id}")
            image = {"id": record.id, "file_name": record.file_name, "height": record.height, "width": record.width}
            image = image if record.source is None else {**image, "source": record.source}
            out.write(((",\n" if seen else "\n") + _dumps(image)).encode())
            seen.add(record.id)
            for instance in record.instances:
                number += 1
                entry = _dumps(_annotation(instance, number, record.id))
                annotations.write(((",\n" if number > 1 else "\n") + entry).encode())
        out.write(f'], "categories": {_dumps([CATEGORY])}, "annotations": ['.encode())
        annotations.seek(0)
        shutil.copyfileobj(annotations, out, 1 << 20)
        out.write(b"]}\n")


def _dumps(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False)


def _annotation(instance: Instance, identity: int, image_id: int) -> dict[str, Any]:
    # The shortest decimal that gives the same float32 back.
    points = [float(str(v)) for v in np.asarray(instance.polygon, np.float32).ravel()]
    xs, ys = points[::2], points[1::2]
    entry = {
        "id": identity,
        "image_id": image_id,
        "category_id": CATEGORY["id"],
        "bbox": [min(xs), min(ys), round(max(xs) - min(xs), 4), round(max(ys) - min(ys), 4)],
        "area": round(geometry.polygon_area(instance.polygon), 4),
        "segmentation": [points],
        # Evaluation tools look at iscrowd, data loaders at ignore.
        "iscrowd": int(instance.ignore),
        "ignore": int(instance.ignore),
        "lossweight": float(instance.lossweight),
    }
    if instance.outlineweight != 1:
        entry["outlineweight"] = float(instance.outlineweight)
    if instance.score is not None:
        entry["score"] = float(instance.score)
    if instance.votes is not None:
        entry["votes"] = int(instance.votes)
    if instance.text is not None:
        entry["text"] = instance.text
    if instance.language is not None:
        entry["language"] = instance.language
    return entry

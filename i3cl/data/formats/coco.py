"""COCO json with our `lossweight`, `outlineweight`, `score` and `votes`, and the same content as Parquet.

Reading is checked and writing is atomic.

Reading gives either a correct data set or one line that names the file, the id and the remedy; with `skip_bad` bad items are
listed and left out instead. Where COCO leaves room, these are the choices:
- one class: category "text"; further categories may be listed but an annotation may not use them;
- `iscrowd` or `ignore` makes an ignore region;
- when a segmentation has several parts, polygons or RLE, the largest part is the instance (listed as "parts");
- repeated points are dropped, a ring that crosses itself is untangled and a polygon that is partly outside the image is clipped
  to it (listed as "repeated", "crossing", "clipped"; see rings.py);
- without a segmentation the bbox is the polygon;
- a file may stand under one id only: each of two entries would teach the words of the other one as background;
- with `skip_bad`, an image none of whose annotations can be read is left out: it must not pass for one without text.
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
    DUPLICATE_ANNOTATION,
    BadItem,
    Faults,
    PresentFiles,
    checked_instance,
    identity_of,
    image_head,
    kind_of,
    may_hide_text,
    named,
    nothing_read,
    parse_json,
    same_file,
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
    same_files: bool = False,
) -> Dataset:
    """Read a COCO json, or a Parquet file or folder in our columns, and check every item of it.

    annotations, images_root: local paths or s3:// URLs. check_files: ask whether every image is there (it is not opened).
    lossweight: replaces that of every instance. same_files: let a file stand under several ids, for ``join_same_files``. A json
    is held in memory as a whole, a Parquet table never is. UserError at the first bad item, or with `skip_bad` only when the
    file as a whole cannot be used.
    """
    if annotations.rstrip("/").endswith(".parquet") or storage.is_dir(annotations):
        return read_table(
            annotations,
            images_root,
            skip_bad=skip_bad,
            check_files=check_files,
            lossweight=lossweight,
            same_files=same_files,
        )
    content = parse_json(storage.read_text(annotations), annotations)
    if not isinstance(content, dict):
        raise UserError(f"{annotations}: is {kind_of(content)}, not a COCO object with images and annotations")
    images = _list_of(content, "images", annotations, required=True)
    entries = _list_of(content, "annotations", annotations, required=False)
    categories = _categories(_list_of(content, "categories", annotations, required=False), annotations)

    faults = Faults(skip_bad)
    present = PresentFiles(images_root) if check_files else None
    heads, bad_images = _read_heads(images, annotations, faults, present, same_files)
    instances: dict[int, list[Instance]] = {identity: [] for identity in heads}
    left_out: dict[int, list[str]] = {}
    seen: set[int] = set()
    for position, entry in enumerate(entries):
        image_id = None
        try:
            identity = identity_of(entry)
            image_id = whole_number(entry.get("image_id"))
            if identity in seen:
                raise BadItem(DUPLICATE_ANNOTATION, "occurs twice; give every annotation its own id")
            seen.add(identity)
            if image_id is None:
                raise BadItem("type", f"image_id is {shown(entry.get('image_id'))}; write the image's whole number")
            if image_id not in heads:
                if image_id in bad_images:
                    raise BadItem("image left out", f"its image {image_id} is left out; correct that first")
                raise BadItem("unknown image", f"image_id {image_id} is not in images; add the image or remove this")
            _, height, width, _ = heads[image_id]
            instance, notes = checked_instance(entry, categories, height, width)
            if lossweight is not None:
                instance = replace(instance, lossweight=lossweight)
            instances[image_id].append(instance)
            faults.repaired(f"{annotations}: annotation {identity}", notes)
        except BadItem as error:
            faults.bad(f"{annotations}: {named('annotation', entry, position)}", error)
            if image_id in heads:
                left_out.setdefault(image_id, []).append(error.kind)

    for image_id, kinds in left_out.items():
        if may_hide_text(kinds, len(instances[image_id])):
            faults.bad(f"{annotations}: image {image_id}", nothing_read(len(kinds)))
            del heads[image_id]
    records = tuple(ImageRecord(i, *head[:3], tuple(instances[i]), head[3]) for i, head in heads.items())
    return Dataset(set_name(annotations), images_root, records, tuple(faults.problems), annotations)


_Head = tuple[str, int, int, str | None]


def _read_heads(
    images: list[Any], annotations: str, faults: Faults, present: PresentFiles | None, same_files: bool
) -> tuple[dict[int, _Head], set[int]]:
    """File name, height, width and source by image id, and the ids of images that are left out."""
    heads: dict[int, _Head] = {}
    bad: set[int] = set()
    owner: dict[str, int] = {}
    doubled: dict[int, int] = {}
    for position, image in enumerate(images):
        try:
            identity = identity_of(image)
            if identity in heads or identity in bad:
                raise BadItem("duplicate image id", "occurs twice; give every image its own id")
            bad.add(identity)
            head = image_head(image)
            if present is not None and not present.has(head[0]):
                path = storage.join(present.root, head[0])
                raise BadItem("missing image", f"{path} is not there; correct the images root or the file name")
            first = owner.setdefault(head[0], identity)
            if first != identity and not same_files:
                doubled.setdefault(first, identity)
                raise same_file(first, head[0])
            bad.discard(identity)
            heads[identity] = head
        except BadItem as error:
            faults.bad(f"{annotations}: {named('image', image, position)}", error)
    # Each entry may lack words that the other one has, so neither is used.
    for first, other in doubled.items():
        faults.bad(f"{annotations}: image {first}", same_file(other, heads.pop(first)[0]))
        bad.add(first)
    return heads, bad


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


def read_for_command(
    annotations: str, images_root: str = "", *, skip_bad: bool, check_files: bool = False, same_files: bool = False
) -> Dataset:
    """As ``read_coco``; logs what was repaired and, with `skip_bad`, left out."""
    dataset = read_coco(annotations, images_root, skip_bad=skip_bad, check_files=check_files, same_files=same_files)
    dataset.list_problems()
    return dataset


# ---------------------------------------------------------------------------------------------------- writing


def write_coco(path: str, records: Iterable[ImageRecord], info: Mapping[str, Any] | None = None) -> None:
    """Write records as COCO json, atomically, with one record in memory at a time.

    Coordinates survive exactly; annotation ids count from 1. info: further keys of the file's `info`. ValueError when two
    records share an id: such a file could not be read back.
    """
    seen: set[int] = set()
    number = 0
    # The annotations come after the images in the file, so they wait in a temporary file.
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
    if instance.problem is not None:
        entry["problem"], entry["problem_score"] = instance.problem
    return entry

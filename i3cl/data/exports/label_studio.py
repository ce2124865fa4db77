"""Label Studio: pre-annotated tasks out, its JSON export back. Points are percent of width and height."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any
from urllib.parse import parse_qs, quote, unquote, urlsplit
from xml.sax.saxutils import quoteattr

import numpy as np

from i3cl import geometry, storage
from i3cl.data.exports.common import (
    IGNORE,
    TEXT,
    ExportOptions,
    Format,
    Region,
    Reviewed,
    are_numbers,
    box_points,
    dumps,
    flat_points,
    label_of,
    with_size,
)
from i3cl.data.formats.checks import kind_of, parse_json, shown
from i3cl.data.formats.records import ImageRecord
from i3cl.data.loading.endings import IMAGE_ENDINGS
from i3cl.errors import UserError

MANY_POINTS = 64
"""A polygon with more points is simplified: the page stalls when it must draw thousands of points."""
_OF_BUCKETS = ("s3://", "gs://", "azure-blob://")
"""URLs that Label Studio splits itself, without decoding percent signs: the object's key stands in them unescaped."""
_NOT_REGIONS = ("textarea", "choices", "relation", "rating", "labels", "taxonomy", "number", "datetime", "pairwise")
"""Types of results that describe a region or the image, or link two regions."""


def labelling_config(from_name: str = "label", to_name: str = "image") -> str:
    """The labelling interface (XML) that a project needs to show the exported tasks."""
    return (
        f'<View><Image name={quoteattr(to_name)} value="$image"/>'
        f"<PolygonLabels name={quoteattr(from_name)} toName={quoteattr(to_name)}>"
        f'<Label value="{TEXT}"/><Label value="{IGNORE}"/></PolygonLabels></View>'
    )


def write(out: str, records: Iterable[ImageRecord], options: ExportOptions) -> str:
    """Write tasks with predictions as one json.

    The prefix stands before the file name in the image's URL. from_name and to_name must be those of the project's labelling
    interface: with other names nothing is drawn.
    """
    names = options.from_name, options.to_name
    count = 0
    with storage.atomic_file(out) as file:
        for record in with_size(records):
            file.write((("," if count else "[") + "\n" + dumps(_task(record, options.prefix, *names))).encode())
            count += 1
        file.write(b"\n]\n" if count else b"[]\n")
    return f"labelling interface of the project: {labelling_config(*names)}\n{count} tasks"


def _task(record: ImageRecord, prefix: str, from_name: str, to_name: str) -> dict[str, Any]:
    result = []
    scale = np.array([100 / record.width, 100 / record.height])
    for number, instance in enumerate(record.instances):
        polygon = instance.polygon
        if len(polygon) > MANY_POINTS:
            polygon = geometry.simplify(polygon, 0.001)
        value = {"points": np.round(polygon * scale, 6).tolist(), "closed": True, "polygonlabels": [label_of(instance)]}
        entry: dict[str, Any] = {
            "id": f"r{number}",
            "type": "polygonlabels",
            "from_name": from_name,
            "to_name": to_name,
            "original_width": record.width,
            "original_height": record.height,
            "image_rotation": 0,
            "value": value,
        }
        if instance.score is not None:
            entry["score"] = float(instance.score)
        if instance.text is not None:
            entry["meta"] = {"text": [instance.text]}
        result.append(entry)
    scores = [float(i.score) for i in record.instances if i.score is not None]
    prediction: dict[str, Any] = {"model_version": "i3cl", "result": result}
    if scores:
        # The weakest label, so that images that need a look come first when tasks are sorted by score.
        prediction["score"] = min(scores)
    name = record.file_name if prefix.startswith(_OF_BUCKETS) else quote(record.file_name)
    data = {"image": prefix + name, "file_name": record.file_name, "image_id": record.id}
    problems = ["{} {:.2f}".format(*i.problem) for i in record.instances if i.problem is not None]
    if problems:
        data["problems"] = ", ".join(problems)
    return {"data": data, "predictions": [prediction]}


def read(source: str) -> Iterator[Reviewed]:
    """Images of an export 'JSON' that somebody has annotated; when a task has several annotations, the one updated last.

    Cancelled (skipped) annotations and tasks that have only predictions are passed over. UserError for anything else.
    """
    content = parse_json(storage.read_text(source), source)
    if not isinstance(content, list):
        raise UserError(f"{source}: is {kind_of(content)}, not a list of tasks; export the project as 'JSON'")
    for number, task in enumerate(content, 1):
        where = f"{source}: task {task['id'] if isinstance(task, dict) and isinstance(task.get('id'), int) else number}"
        if not isinstance(task, dict) or not isinstance(task.get("data"), dict):
            raise UserError(f"{where}: has no data; export the project as 'JSON', not 'JSON-MIN'")
        annotations = task.get("annotations", [])
        if not isinstance(annotations, list) or not all(isinstance(a, dict) for a in annotations):
            raise UserError(f"{where}: annotations is not a list of objects; export the project again as 'JSON'")
        done = [a for a in annotations if not a.get("was_cancelled")]
        if done:
            last = max(done, key=lambda a: str(a.get("updated_at") or ""))
            yield _reviewed(task["data"], last, where)


def _reviewed(data: dict[str, Any], annotation: dict[str, Any], where: str) -> Reviewed:
    name = data.get("file_name")
    if not isinstance(name, str):
        name = _name_in(_url_in(data, where))
    result = annotation.get("result", [])
    if not isinstance(result, list) or not all(isinstance(r, dict) for r in result):
        raise UserError(f"{where}: result is not a list of objects; export the project again as 'JSON'")
    sizes = [(r.get("original_width"), r.get("original_height")) for r in result if r.get("original_width") is not None]
    width = height = None
    if sizes:
        width, height = sizes[0]
        same = all(size == sizes[0] for size in sizes)
        if not same or not all(isinstance(s, int) and not isinstance(s, bool) and s > 0 for s in (width, height)):
            raise UserError(f"{where}: original_width and original_height are not one size; export the project again")
    if any(r.get("image_rotation") for r in result):
        raise UserError(f"{where}: image {shown(name)} is rotated in Label Studio; rotate it back and export again")
    words = {kind: _by_region(result, kind, key) for kind, key in _DESCRIBING.items()}
    regions = [region for r in result if (region := _region(r, width or 1, height or 1, words)) is not None]
    return Reviewed(name, where, regions, width, height, percent=True)


def _url_in(data: dict[str, Any], where: str) -> str:
    """The URL of the task's image: `image`, or the only value that looks like an image, whatever its key. UserError for none."""
    if isinstance(data.get("image"), str):
        return str(data["image"])
    texts = {key: value for key, value in data.items() if isinstance(value, str) and value.strip()}
    images = {key: value for key, value in texts.items() if _name_in(value).lower().endswith(IMAGE_ENDINGS)}
    # An image's address need not have an ending; a caption has blanks.
    images = images or {key: value for key, value in texts.items() if "/" in value and " " not in value}
    if len(images) > 1:
        raise UserError(f"{where}: data has several images ({', '.join(map(shown, images))}); keep the annotated one, as 'image'")
    if not images:
        keys = ", ".join(map(shown, data)) or "nothing"
        raise UserError(
            f"{where}: data has neither file_name nor the address of an image, but {keys}; add the address as 'image'"
        )
    return next(iter(images.values()))


_DESCRIBING = {"labels": "labels", "choices": "choices", "textarea": "text"}
"""Type of a result that describes the region with the same id -> the key of its words."""


def _by_region(result: list[dict[str, Any]], kind: str, key: str) -> dict[Any, str]:
    """The first word of every result of this type, by the id of its region."""
    found: dict[Any, str] = {}
    for entry in result:
        value, identity = entry.get("value"), entry.get("id")
        word = value.get(key) if isinstance(value, dict) and entry.get("type") == kind else None
        word = word[0] if isinstance(word, list) and word else word
        if isinstance(word, str) and isinstance(identity, str | int):
            found.setdefault(identity, word)
    return found


def _region(result: dict[str, Any], width: int, height: int, words: dict[str, dict[Any, str]]) -> Region | None:
    """The region of one result, with label and text from other results of its id; None for results that are not regions.

    words: for each type in ``_DESCRIBING``, the word by region id. A shape without any label but with a transcription is text.
    """
    kind, value, identity = result.get("type"), result.get("value"), result.get("id")
    if isinstance(kind, str) and kind in _NOT_REGIONS:
        return None
    if not isinstance(kind, str) or not isinstance(value, dict):
        return Region(None, fault="has no type or value")
    identity = identity if isinstance(identity, str | int) else None
    meta = result.get("meta")
    text = words["textarea"].get(identity) or (meta.get("text") if isinstance(meta, dict) else None)
    text = text[0] if isinstance(text, list) and text else text
    text = text if isinstance(text, str) else None
    labels = value.get(kind)
    label = labels[0] if isinstance(labels, list) and labels else None
    label = label or words["labels"].get(identity) or words["choices"].get(identity)
    if label is None and text:
        label = TEXT
    if kind in ("polygonlabels", "polygon"):
        return Region(flat_points(value.get("points")), label, text)
    if kind in ("rectanglelabels", "rectangle"):
        sides: list[Any] = [value.get(key) for key in ("x", "y", "width", "height")]
        turn = value.get("rotation") or 0
        if not are_numbers((*sides, turn)):
            return Region(None, label, fault="is a rectangle without usable x, y, width and height")
        x, y, w, h = sides
        # Turned in pixels: a percent of the width and one of the height differ in length.
        pixels = box_points(x * width, y * height, (x + w) * width, (y + h) * height, turn, (x * width, y * height))
        return Region([v / (height if i % 2 else width) for i, v in enumerate(pixels)], label, text)
    return Region(None, label, fault=f"is of type {shown(kind)}; draw polygons or rectangles")


def _name_in(url: str) -> str:
    """Path of the image in a task's URL; for local storage the part after ``?d=``."""
    if url.startswith(_OF_BUCKETS):
        return url
    try:
        parts = urlsplit(url)
        # Other addresses may have a parameter d too.
        inside = parse_qs(parts.query).get("d") if "local-files" in parts.path else None
    except ValueError:
        return url
    return inside[0] if inside else unquote(parts.path)


LABEL_STUDIO = Format(write, read)

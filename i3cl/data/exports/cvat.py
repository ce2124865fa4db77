"""CVAT: its 'CVAT for images 1.1' xml, out and back."""

from __future__ import annotations

import math
import re
import zipfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import IO, Any
from xml.etree.ElementTree import ParseError
from xml.sax.saxutils import escape, quoteattr

from defusedxml import DefusedXmlException
from defusedxml.ElementTree import iterparse

from i3cl import storage
from i3cl.data.exports.common import ExportOptions, Format, Region, Reviewed, box_points, label_of, points_of, with_size
from i3cl.data.formats.checks import ZIP_FAULTS, shown
from i3cl.data.formats.records import ImageRecord, Instance
from i3cl.errors import UserError

_MAX_XML = 4 << 30
"""Bytes; a zip whose xml unpacks to more is refused."""
_NOT_REGIONS = {"tag", "attribute"}
_NOT_XML = re.compile("[^\t\n\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
"""Characters that cannot stand in XML, not even escaped."""


def write(out: str, records: Iterable[ImageRecord], options: ExportOptions) -> str:
    """Write `out`, to be uploaded to a task that has the same images.

    The prefix stands before the file name in the task, e.g. a folder with its '/'. Scores, votes and transcriptions are
    attributes of the polygons.
    """
    count = 0
    with storage.atomic_file(out) as file:
        file.write(b'<?xml version="1.0" encoding="utf-8"?>\n<annotations>\n<version>1.1</version>\n')
        for count, record in enumerate(with_size(records), 1):
            if _NOT_XML.search(record.file_name):
                raise UserError(f"{shown(record.file_name)}: has a character that XML cannot hold; rename the image")
            file.write(_image(record, count - 1, options.prefix).encode())
        file.write(b"</annotations>\n")
    return f"{count} images"


def _image(record: ImageRecord, number: int, prefix: str) -> str:
    lines = [
        f'<image id="{number}" name={quoteattr(prefix + record.file_name)} width="{record.width}" height="{record.height}">\n'
    ]
    for instance in record.instances:
        points = ";".join(f"{x!r},{y!r}" for x, y in points_of(instance))
        lines.append(f'<polygon label="{label_of(instance)}" source="auto" occluded="0" points="{points}" z_order="0"')
        attributes = _attributes(instance)
        lines.append(f">{attributes}</polygon>\n" if attributes else "/>\n")
    return "".join([*lines, "</image>\n"])


def _attributes(instance: Instance) -> str:
    """Score, votes, text and problem of an instance as CVAT's attribute elements; CVAT shows those that its labels declare."""
    score = None if instance.score is None else f"{instance.score:.3f}"
    values = {"score": score, "votes": instance.votes, "text": instance.text}
    if instance.problem is not None:
        values["problem"] = "{} {:.2f}".format(*instance.problem)
    clean = {key: _NOT_XML.sub("", str(value)) for key, value in values.items() if value is not None}
    return "".join(f'<attribute name="{key}">{escape(value)}</attribute>' for key, value in clean.items())


def read(source: str) -> Iterator[Reviewed]:
    """Images of an export 'CVAT for images 1.1': its xml, or the zip that holds it.

    Reads polygons and boxes, turned ones too; a shape marked occluded becomes an ignore region. UserError for any other xml,
    and for xml that declares a document type.
    """
    where = source
    with _opened(source) as file:
        try:
            root: Any = None
            for event, element in iterparse(file, events=("start", "end"), forbid_dtd=True):
                if root is None:
                    root = element
                    if element.tag != "annotations":
                        raise UserError(f"{source}: its root is {shown(element.tag)}, not annotations; is it an export of CVAT?")
                if event == "end" and element.tag == "track":
                    raise UserError(f"{source}: holds tracks of a video; export as 'CVAT for images 1.1'")
                if event == "end" and element.tag == "image":
                    where = f"{source}: image {shown(element.get('name'))}"
                    yield _reviewed(element, where)
                    root.clear()
        except DefusedXmlException as error:
            raise UserError(f"{source}: refused ({type(error).__name__}): declares a document type or entities") from None
        except (ParseError, ValueError, LookupError) as error:
            raise UserError(f"{where}: not usable xml ({' '.join(str(error).split())[:200]}); export it again") from None


@contextmanager
def _opened(source: str) -> Iterator[IO[bytes]]:
    with storage.open_read(source) as file:
        zipped = source.lower().endswith(".zip")
        if not zipped and file.seekable():  # a browser may have saved it without its ending
            zipped = file.read(4) == b"PK\x03\x04"
            file.seek(0)
        if not zipped:
            yield file
            return
        try:
            with zipfile.ZipFile(file) as archive:
                if archive.getinfo("annotations.xml").file_size > _MAX_XML:
                    raise UserError(f"{source}: annotations.xml unpacks to more than {_MAX_XML >> 30} GiB; unpack it yourself")
                with archive.open("annotations.xml") as inside:
                    yield inside
        except KeyError:
            raise UserError(f"{source}: has no annotations.xml; export as 'CVAT for images 1.1'") from None
        except ZIP_FAULTS as error:
            raise UserError(f"{source}: not a usable zip ({' '.join(str(error).split())}); export it again") from None


def _reviewed(image: Any, where: str) -> Reviewed:
    name = image.get("name")
    if not name:
        raise UserError(f"{where}: has no name; export it again")
    try:
        width, height = int(image.get("width", "")), int(image.get("height", ""))
    except ValueError:
        raise UserError(f"{where}: width or height is not a whole number; export it again") from None
    regions = [_region(shape) for shape in image if shape.tag not in _NOT_REGIONS]
    return Reviewed(name, where, regions, width, height)


def _region(shape: Any) -> Region:
    label = shape.get("label")
    text = next((a.text for a in shape if a.tag == "attribute" and a.get("name") in ("text", "transcription")), None)
    if shape.get("occluded") == "1":
        label = "occluded"
    try:
        if shape.tag == "polygon":
            pairs = [point.split(",") for point in shape.get("points", "").split(";")]
            # A decimal comma makes four numbers of two, which would be two corners.
            if any(len(pair) != 2 for pair in pairs):
                return Region(None, label, fault="has a point that is not x,y")
            return Region(_numbers([word for pair in pairs for word in pair]), label, text)
        if shape.tag == "box":
            x0, y0, x1, y1 = _numbers([shape.get(key, "") for key in ("xtl", "ytl", "xbr", "ybr")])
            (turn,) = _numbers([shape.get("rotation", "0")])
            return Region(box_points(x0, y0, x1, y1, turn, ((x0 + x1) / 2, (y0 + y1) / 2)), label, text)
    except ValueError:
        return Region(None, label, fault="has a coordinate that is not a number")
    return Region(None, label, fault=f"is a {shape.tag}; draw polygons or boxes")


def _numbers(words: list[str]) -> list[float]:
    numbers = [float(word) for word in words]
    if not all(map(math.isfinite, numbers)):
        raise ValueError("not finite")
    return numbers


CVAT = Format(write, read)

"""SCUT-CTW1500 in all its label forms, which are told apart by content.

- XML (2020, train): `box` elements with `segs` (x, y pairs) and `label`;
- text `x1,y1,...,xn,yn,####TEXT` (2020, test): split at the first `,####`, so don't-care lines end in `#######`;
- text of 32 integers (2017): xmin,ymin,xmax,ymax, then 14 pairs of offsets from (xmin, ymin); no text;
- text `x1,y1,...,x14,y14,TEXT` (copies made for evaluation scripts).
"""

from __future__ import annotations

from xml.etree.ElementTree import Element

import numpy as np

from i3cl.data.importers import base, parse
from i3cl.errors import UserError

_LAYOUT = "images and <dddd>.xml or <dddd>.txt, e.g. train_images/1001.jpg, ctw1500_train_labels/1001.xml"
_MARK = ",####"


def items(folder: base.Folder, split: str) -> list[base.Item]:
    """Images and label files matched by number: test labels have leading zeros that the images do not have."""
    return base.paired(folder, split, (".xml", ".txt"), _number, _LAYOUT)


def _number(name: str) -> str:
    name = base.stem(name)
    return name.lstrip("0").zfill(4) if name.isascii() and name.isdigit() else name


def read(folder: base.Folder, item: base.Item) -> base.LabelledImage:
    """Ignore regions are instances transcribed `###`; the 2017 files have none."""
    name = base.required_label(folder, item)
    where, data = folder.path(name), folder.read(name)
    if name.lower().endswith(".xml"):
        found = _read_xml(parse.parse_xml(data, where), where)
    else:
        found = [_read_line(line, place) for place, line in parse.lines(data, where)]
    return base.LabelledImage(item.file_name, tuple(found))


def _read_xml(root: Element, where: str) -> list[base.LabelledInstance]:
    images = [root] if root.tag == "image" else root.findall("image")
    if len(images) != 1:
        raise UserError(f"{where}: {len(images)} image elements; expected one file per image")
    found = []
    for number, box in enumerate(images[0].findall("box"), 1):
        place = f"{where}: box {number}"
        segments = box.findtext("segs")
        if segments is None:
            raise UserError(f"{place}: has no segs; expected x,y pairs there")
        # An empty element has the text "", a missing one none.
        text = box.findtext("label")
        found.append(
            base.instance(parse.points([number.strip() for number in segments.split(",")], place), base.dont_care(text), text)
        )
    return found


def _read_line(line: str, where: str) -> base.LabelledInstance:
    numbers, mark, text = line.partition(_MARK)
    if mark:
        return base.instance(parse.points(numbers.split(","), where), base.dont_care(text), text)
    fields = line.split(",")
    if len(fields) == 32 and all(map(parse.is_number, fields)):
        polygon = parse.points(fields, where)
        offsets = polygon[2:].astype(np.float64) + polygon[0]
        return base.instance(offsets.astype(np.float32))
    fields = line.split(",", 28)
    if len(fields) < 29:
        raise UserError(f"{where}: neither x1,y1,...,xn,yn,####TEXT nor 32 numbers nor x1,y1,...,x14,y14,TEXT")
    return base.instance(parse.points(fields[:28], where), base.dont_care(fields[28]), fields[28])


CTW1500 = base.Importer(items, read)

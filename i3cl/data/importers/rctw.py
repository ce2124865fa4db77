"""RCTW-17: a text file an image, lines `x1,y1,...,x4,y4,difficult,"text"`; the text may hold commas and quotes."""

from __future__ import annotations

from i3cl.config import UserError
from i3cl.data.importers import parse
from i3cl.data.importers.base import (
    Folder,
    Importer,
    Item,
    LabelledImage,
    LabelledInstance,
    dont_care,
    instance,
    paired,
    required_label,
    stem,
)

_LAYOUT = "image_<n>.jpg and image_<n>.txt, e.g. train_images/image_0.jpg, train_gts/image_0.txt"


def items(folder: Folder, split: str) -> list[Item]:
    """Images and label files matched by name."""
    return paired(folder, split, (".txt",), stem, _LAYOUT)


def read(folder: Folder, item: Item) -> LabelledImage:
    """Ignored are instances that are difficult or transcribed `###`."""
    name = required_label(folder, item)
    rows = parse.lines(folder.read(name), folder.path(name))
    return LabelledImage(item.file_name, tuple(_read_line(line, where) for where, line in rows))


def _read_line(line: str, where: str) -> LabelledInstance:
    fields = line.split(",", 9)
    if len(fields) != 10:
        raise UserError(f'{where}: {len(fields)} fields; expected x1,y1,x2,y2,x3,y3,x4,y4,difficult,"text"')
    polygon = parse.points(fields[:8], where)
    if fields[8].strip() not in ("0", "1"):
        raise UserError(f"{where}: difficult is {parse.shown(fields[8])}; expected 0 or 1")
    text = fields[9].strip()
    if len(text) >= 2 and text.startswith('"') and text.endswith('"'):
        text = text[1:-1]
    return instance(polygon, fields[8].strip() == "1" or dont_care(text), text)


RCTW = Importer(items, read)

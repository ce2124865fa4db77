"""RCTW-17: one text file per image, lines `x1,y1,...,x4,y4,difficult,"text"`; the text may contain commas and quotes."""

from __future__ import annotations

from i3cl.data.importers import parse
from i3cl.data.importers.base import (
    Folder,
    Importer,
    Item,
    LabelledImage,
    LabelledInstance,
    dont_care,
    instance,
    line_by_line,
    paired,
    stem,
)
from i3cl.errors import UserError

_LAYOUT = "image_<n>.jpg and image_<n>.txt, e.g. train_images/image_0.jpg, train_gts/image_0.txt"


def items(folder: Folder, split: str) -> list[Item]:
    """Images and label files matched by name."""
    return paired(folder, split, (".txt",), stem, _LAYOUT)


def read(folder: Folder, item: Item) -> LabelledImage:
    """Ignore regions are instances that are difficult or transcribed `###`."""
    return line_by_line(folder, item, _read_line)


def _read_line(line: str, where: str) -> LabelledInstance:
    polygon, difficult, quoted = parse.quadrilateral(line, where, "difficult", '"text"')
    if difficult.strip() not in ("0", "1"):
        raise UserError(f"{where}: difficult is {parse.shown(difficult)}; expected 0 or 1")
    text = parse.unquoted(quoted)
    return instance(polygon, difficult.strip() == "1" or dont_care(text), text)


RCTW = Importer(items, read)

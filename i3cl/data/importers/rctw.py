"""RCTW-17: one text file per image, lines `x1,y1,...,x4,y4,difficult,"text"`; the text may contain commas and quotes."""

from __future__ import annotations

from i3cl.data.importers import base, parse
from i3cl.errors import UserError

_LAYOUT = "image_<n>.jpg and image_<n>.txt, e.g. train_images/image_0.jpg, train_gts/image_0.txt"


def items(folder: base.Folder, split: str) -> list[base.Item]:
    """Images and label files matched by name."""
    return base.paired(folder, split, (".txt",), base.stem, _LAYOUT)


def read(folder: base.Folder, item: base.Item) -> base.LabelledImage:
    """Ignore regions are instances that are difficult or transcribed `###`."""
    return base.line_by_line(folder, item, _read_line)


def _read_line(line: str, where: str) -> base.LabelledInstance:
    polygon, difficult, quoted = parse.quadrilateral(line, where, "difficult", '"text"')
    if difficult.strip() not in ("0", "1"):
        raise UserError(f"{where}: difficult is {parse.shown(difficult)}; expected 0 or 1")
    text = parse.unquoted(quoted)
    return base.instance(polygon, difficult.strip() == "1" or base.dont_care(text), text)


RCTW = base.Importer(items, read)

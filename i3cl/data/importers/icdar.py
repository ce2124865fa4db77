"""ICDAR 2013 (focused) and 2015 (incidental) scene text: one text file per image, `gt_<image>.txt`."""

from __future__ import annotations

import re

from i3cl.data.importers import base, parse
from i3cl.errors import UserError

_LAYOUT = "<image>.jpg and gt_<image>.txt, e.g. train_images/img_1.jpg, train_gt/gt_img_1.txt"
_BOX = re.compile(r"([^ ,]+)(?: *, *| +)([^ ,]+)(?: *, *| +)([^ ,]+)(?: *, *| +)([^ ,]+)(?: *, *| +)(.*)")


def items(folder: base.Folder, split: str) -> list[base.Item]:
    """Images and label files matched by name, without the labels' prefix `gt_`."""
    return base.paired(folder, split, (".txt",), lambda name: base.stem(name).removeprefix("gt_"), _LAYOUT)


def read_2013(folder: base.Folder, item: base.Item) -> base.LabelledImage:
    """Lines `x1 y1 x2 y2 "text"` or `x1, y1, x2, y2, "text"`: corners of an upright box. `###` makes an ignore region."""
    return base.line_by_line(folder, item, _box_line)


def read_2015(folder: base.Folder, item: base.Item) -> base.LabelledImage:
    """Lines `x1,y1,...,x4,y4,text`, the text is not escaped. `###` makes an ignore region."""
    return base.line_by_line(folder, item, _quad_line)


def _box_line(line: str, where: str) -> base.LabelledInstance:
    found = _BOX.fullmatch(line.strip())
    if not found:
        raise UserError(f'{where}: not x1 y1 x2 y2 "text", with blanks or commas between')
    (x1, y1), (x2, y2) = parse.points(found.groups()[:4], where, minimum=2).tolist()
    text = parse.unquoted(found[5])
    return base.instance(parse.points([x1, y1, x2, y1, x2, y2, x1, y2], where), base.dont_care(text), text)


def _quad_line(line: str, where: str) -> base.LabelledInstance:
    polygon, text = parse.quadrilateral(line, where, "text")
    return base.instance(polygon, base.dont_care(text), text)


ICDAR2013 = base.Importer(items, read_2013)
ICDAR2015 = base.Importer(items, read_2015)

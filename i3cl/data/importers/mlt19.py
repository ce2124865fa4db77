"""ICDAR2019-MLT: one text file per image, lines `x1,y1,...,x4,y4,script,transcription`; the transcription is not escaped."""

from __future__ import annotations

from i3cl.data.importers import base, parse
from i3cl.errors import UserError

_LAYOUT = "<image>.jpg and gt_<image>.txt or <image>.txt, e.g. ImagesPart1/tr_img_00001.jpg, train_gt/tr_img_00001.txt"
_SCRIPTS = ("Arabic", "Latin", "Chinese", "Japanese", "Korean", "Bangla", "Hindi", "Symbols", "Mixed", "None")


def items(folder: base.Folder, split: str) -> list[base.Item]:
    """Images and label files matched by name, without the labels' prefix `gt_`."""
    return base.paired(folder, split, (".txt",), lambda name: base.stem(name).removeprefix("gt_"), _LAYOUT)


def read(folder: base.Folder, item: base.Item) -> base.LabelledImage:
    """Ignore regions are instances transcribed `###`."""
    return base.line_by_line(folder, item, _read_line)


def _read_line(line: str, where: str) -> base.LabelledInstance:
    polygon, script, text = parse.quadrilateral(line, where, "script", "transcription")
    script = script.strip()
    if script not in _SCRIPTS:
        raise UserError(f"{where}: {parse.shown(script)} is not a script; expected one of {', '.join(_SCRIPTS)}")
    return base.instance(polygon, base.dont_care(text), text, None if script == "None" else script)


MLT19 = base.Importer(items, read)

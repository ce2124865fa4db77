"""PaddleOCR and PPOCRLabel: Label.txt, one line per image, out and back."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from i3cl import storage
from i3cl.data.exports.common import (
    IGNORE,
    TEXT,
    UNREADABLE,
    ExportOptions,
    Format,
    Region,
    Reviewed,
    dumps,
    flat_points,
    points_of,
    with_size,
)
from i3cl.data.formats.checks import BadItem, flag, kind_of, parse_json, shown
from i3cl.data.formats.records import ImageRecord
from i3cl.errors import UserError


def write(out: str, records: Iterable[ImageRecord], options: ExportOptions) -> str:
    """Write `out`. The transcription of an ignore region is '###', an unknown one is empty.

    The prefix stands before the file name; PPOCRLabel expects the name of the images' folder and '/'.
    """
    count = 0
    with storage.atomic_file(out) as file:
        for record in with_size(records):
            count += 1
            items = [
                {
                    "transcription": UNREADABLE if instance.ignore else instance.text or "",
                    "points": points_of(instance),
                    "difficult": False,
                }
                for instance in record.instances
            ]
            file.write(f"{options.prefix}{record.file_name}\t{dumps(items)}\n".encode())
    return f"{count} images"


def read(source: str) -> Iterator[Reviewed]:
    """Images of a Label.txt. '###', '*' and difficult make an ignore region. UserError for any other line."""
    # Not splitlines: a transcription may hold Unicode's other line separators.
    for number, line in enumerate(storage.read_text(source).split("\n"), 1):
        if not line.strip():
            continue
        where = f"{source}: line {number}"
        name, tab, rest = line.rstrip("\r").partition("\t")
        if not tab or not name:
            raise UserError(f"{where}: is not a path, a tab and a JSON list; is it a Label.txt?")
        items = parse_json(rest, where, lines=False)
        if not isinstance(items, list):
            raise UserError(f"{where}: is {kind_of(items)}, not a list of texts")
        yield Reviewed(name, where, [_region(item) for item in items])


def _region(item: Any) -> Region:
    if not isinstance(item, dict):
        return Region(None, fault=f"is {kind_of(item)}, not a text with points")
    text = item.get("transcription", "")
    if not isinstance(text, str):
        return Region(None, fault=f"has the transcription {shown(text)}; write text")
    try:
        ignore = flag(item, "difficult") or text in (UNREADABLE, "*")
    except BadItem as error:
        return Region(None, fault=error.message)
    return Region(flat_points(item.get("points")), IGNORE if ignore else TEXT, None if ignore else text or None)


PADDLE = Format(write, read)

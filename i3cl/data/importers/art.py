"""ICDAR2019-ArT: `train_labels.json`, image stem -> list of {transcription, points [[x, y], ...], language, illegibility}."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from i3cl.data.importers import base, parse


def items(folder: base.Folder, split: str) -> Iterator[base.Item]:
    """Every image of `<split>_labels.json` and of the split's folders."""
    layout = f"{split}_labels.json and {split}_images/gt_<n>.jpg"
    name = base.one_file(folder, f"{split}_labels.json", layout)
    entries = read_object(folder, name)
    return base.whole_set(folder, name, base.files(folder, split, base.IMAGE_ENDINGS), entries, layout)


def read_object(folder: base.Folder, name: str) -> dict[str, object]:
    """The object in the label file of a whole set. UserError when it is not one."""
    where = folder.path(name)
    return parse.an_object(parse.parse_json(folder.read(name, base.MAX_SET_BYTES), where), where)


def read(folder: base.Folder, item: base.Item) -> base.LabelledImage:
    """Ignore regions are instances that are illegible or transcribed `###`."""
    entries, where = base.own_entries(folder, base.required_label(folder, item))
    return base.LabelledImage(item.file_name, tuple(read_entry(e, f"{where}: entry {i}") for i, e in enumerate(entries, 1)))


def read_entry(entry: Any, where: str) -> base.LabelledInstance:
    """One instance. LSVT's entries are the same, without `language`."""
    entry = parse.an_object(entry, where)
    text = parse.a_text(entry, "transcription", where)
    pairs = parse.a_list(entry.get("points"), f"{where}: points")
    flat = [number for pair in pairs for number in _pair(pair, where)]
    language = parse.a_text(entry, "language", where) if "language" in entry else None
    ignore = parse.a_flag(entry, "illegibility", where) or base.dont_care(text)
    return base.instance(parse.points(flat, where, minimum=1), ignore, text, language)


def _pair(pair: Any, where: str) -> list[Any]:
    pair = parse.a_list(pair, f"{where}: points")
    if len(pair) != 2:
        raise parse.UserError(f"{where}: a point has {len(pair)} numbers; expected [x, y]")
    return pair


ART = base.Importer(items, read)

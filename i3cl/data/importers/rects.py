"""ICDAR2019-ReCTS: one json file per image; detection uses `lines`, each {points [8 numbers], transcription, ignore 0|1}."""

from __future__ import annotations

from i3cl.data.importers import base, parse

_LAYOUT = "<image>.jpg and <image>.json, e.g. img/train_ReCTS_000001.jpg, gt/train_ReCTS_000001.json"


def items(folder: base.Folder, split: str) -> list[base.Item]:
    """Images and label files matched by name. The download has two label folders, gt and gt_unicode; the second is read."""
    images = base.by_key(base.files(folder, split, base.IMAGE_ENDINGS), base.stem, folder)
    names = base.files(folder, split, (".json",))
    preferred = [name for name in names if "gt_unicode" in name.split("/")[:-1]]
    return base.join_pairs(folder, split, images, base.by_key(preferred or names, base.stem, folder), _LAYOUT)


def read(folder: base.Folder, item: base.Item) -> base.LabelledImage:
    """Ignore regions are lines with `ignore` set or transcribed `###`."""
    name = base.required_label(folder, item)
    where = folder.path(name)
    content = parse.an_object(parse.parse_json(folder.read(name), where), where)
    entries = parse.a_list(content.get("lines"), f"{where}: lines")
    return base.LabelledImage(
        item.file_name, tuple(_read_entry(e, f"{where}: lines: entry {i}") for i, e in enumerate(entries, 1))
    )


def _read_entry(entry: object, where: str) -> base.LabelledInstance:
    entry = parse.an_object(entry, where)
    text = parse.a_text(entry, "transcription", where)
    numbers = parse.a_list(entry.get("points"), f"{where}: points")
    if len(numbers) != 8:
        raise parse.UserError(f"{where}: points has {len(numbers)} numbers; expected 8")
    ignore = parse.a_flag(entry, "ignore", where) or base.dont_care(text)
    return base.instance(parse.points(numbers, where), ignore, text)


RECTS = base.Importer(items, read)

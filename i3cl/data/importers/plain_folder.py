"""A folder of images without labels, at any depth."""

from __future__ import annotations

from i3cl.data.importers.base import IMAGE_ENDINGS, Folder, Importer, Item, unlabelled
from i3cl.errors import UserError


def items(folder: Folder, split: str) -> list[Item]:
    """Every image; folder names mean nothing here, so the split does not matter."""
    found = [Item(name, None) for name in folder.names if name.lower().endswith(IMAGE_ENDINGS)]
    if not found:
        raise UserError(f"{folder.root}: no images ({', '.join(IMAGE_ENDINGS)}) in it or below")
    return found


FOLDER = Importer(items, unlabelled, labelled=False)

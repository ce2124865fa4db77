"""ICDAR2019-LSVT's test images: unlabelled."""

from __future__ import annotations

from i3cl.data.importers.base import IMAGE_ENDINGS, Folder, Importer, Item, files
from i3cl.data.importers.plain_folder import read
from i3cl.errors import UserError


def items(folder: Folder, split: str) -> list[Item]:
    """Every image that is not below a train folder, whatever split is asked for."""
    found = [Item(name, None) for name in files(folder, "test", IMAGE_ENDINGS)]
    if not found:
        raise UserError(f"{folder.root}: no test images; expected test_part1_images/gt_<n>.jpg, test_part2_images/...")
    return found


LSVT_TEST = Importer(items, read, labelled=False)

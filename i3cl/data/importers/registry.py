"""The table of data sets that can be imported. A new one is a file of its own and one line here; see ``base.Importer``."""

from __future__ import annotations

from collections.abc import Iterator

from i3cl.data.importers.art import ART
from i3cl.data.importers.base import Folder, Importer, LabelledImage
from i3cl.data.importers.ctw1500 import CTW1500
from i3cl.data.importers.icdar import ICDAR2013, ICDAR2015
from i3cl.data.importers.lsvt import LSVT, LSVT_TEST, LSVT_WEAK
from i3cl.data.importers.mlt19 import MLT19
from i3cl.data.importers.plain_folder import FOLDER
from i3cl.data.importers.rctw import RCTW
from i3cl.data.importers.rects import RECTS
from i3cl.data.importers.synthtext import SYNTHTEXT
from i3cl.data.importers.totaltext import TOTALTEXT
from i3cl.errors import UserError

IMPORTERS: dict[str, Importer] = {
    "art": ART,
    "lsvt": LSVT,
    "lsvt_weak": LSVT_WEAK,
    "lsvt_test": LSVT_TEST,
    "mlt19": MLT19,
    "rctw": RCTW,
    "rects": RECTS,
    "ctw1500": CTW1500,
    "totaltext": TOTALTEXT,
    "synthtext": SYNTHTEXT,
    "icdar2013": ICDAR2013,
    "icdar2015": ICDAR2015,
    "folder": FOLDER,
}
"""By the name that ``prepare.py import`` takes."""


def importer_named(name: str) -> Importer:
    """The importer of a data set. UserError when there is none of this name."""
    if name not in IMPORTERS:
        raise UserError(f"{name}: not a data set that can be imported; known: {', '.join(IMPORTERS)}")
    return IMPORTERS[name]


def read_labels(name: str, source: str, split: str = "train", problems: list[str] | None = None) -> Iterator[LabelledImage]:
    """The labels of a data set, image by image in a fixed order. Images are not opened and need not be there.

    name: a key of IMPORTERS; source: folder, local or s3://, laid out as docs/datasets.md says; split: 'train' or 'test'.
    UserError at the first image whose labels cannot be read; when `problems` is a list, the message is appended to it and the
    image is left out. What makes the whole source unusable is a UserError either way.
    """
    importer, folder = importer_named(name), Folder(source)
    for item in importer.items(folder, split):
        try:
            yield importer.read(folder, item)
        except UserError as error:
            if problems is None:
                raise
            problems.append(str(error))

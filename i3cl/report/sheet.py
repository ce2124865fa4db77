"""A contact sheet: images of a data set in rows, with their outlines."""

from __future__ import annotations

import cv2
import numpy as np

from i3cl import storage
from i3cl.data.formats.records import Dataset
from i3cl.data.loading.images import check_size, decode_image
from i3cl.errors import UserError
from i3cl.report.draw import IGNORED, Picture, draw_polygons

_WORD = (60, 230, 60)


def contact_sheet(dataset: Dataset, count: int = 12, columns: int = 3, tile: int = 480, *, upright: bool = False) -> Picture:
    """(H, W, 3) uint8 RGB: `count` images, spread evenly over the data set, in tiles of `tile` x 3/4 `tile` pixels.

    Words are green, ignore regions grey; with `upright` images are turned as their EXIF orientation says. UserError for an
    empty data set, an image that cannot be read or has another size than its annotation says, or counts below 1.
    """
    if not dataset.records:
        raise UserError(f"{dataset.name}: has no images")
    if min(count, columns) < 1 or tile < 16:
        raise UserError(f"sheet: {count} images in {columns} columns of {tile} pixels cannot be drawn; use at least 1, 1 and 16")
    count = min(count, len(dataset.records))
    chosen = [dataset.records[i * len(dataset.records) // count] for i in range(count)]
    high = tile * 3 // 4
    sheet = np.full((-(-count // columns) * high, columns * tile, 3), 255, np.uint8)
    for place, record in enumerate(chosen):
        image = decode_image(dataset.path(record), upright=upright)
        check_size(record.file_name, image.shape[:2], (record.height, record.width))
        scale = min(tile / image.shape[1], high / image.shape[0])
        size = (max(1, int(image.shape[1] * scale)), max(1, int(image.shape[0] * scale)))
        small = cv2.resize(image, size, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR)
        colours = [IGNORED if instance.ignore else _WORD for instance in record.instances]
        drawn = draw_polygons(small.astype(np.uint8), [i.polygon * scale for i in record.instances], colours, 1)
        row, column = divmod(place, columns)
        sheet[row * high : row * high + size[1], column * tile : column * tile + size[0]] = drawn
    return sheet


def write_contact_sheet(
    path: str, dataset: Dataset, count: int = 12, columns: int = 3, tile: int = 480, *, upright: bool = False
) -> None:
    """Write ``contact_sheet`` as an image file in the format of the name's ending. UserError for an unknown ending."""
    ending = "." + path.rsplit(".", 1)[-1].lower()
    if ending not in (".jpg", ".jpeg", ".png", ".webp"):
        raise UserError(f"{path}: the sheet's name must end with .jpg, .png or .webp")
    storage.refuse_to_overwrite(path, *(dataset.path(record) for record in dataset.records))
    encoded, data = cv2.imencode(ending, contact_sheet(dataset, count, columns, tile, upright=upright)[:, :, ::-1])
    assert encoded
    storage.write_bytes_atomic(path, data.tobytes())

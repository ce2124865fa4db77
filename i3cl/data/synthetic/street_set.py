"""Sets of synthetic street scenes on disk, made part by part by any number of workers."""

from __future__ import annotations

import json
import logging
from functools import partial

import cv2

from i3cl import storage
from i3cl.config import SceneTextSettings
from i3cl.data.formats.coco import read_coco, write_coco
from i3cl.data.formats.records import ImageRecord
from i3cl.data.formats.table import write_parquet
from i3cl.data.synthetic.backgrounds import photograph_files
from i3cl.data.synthetic.fonts import find_faces
from i3cl.data.synthetic.street import make_scene
from i3cl.errors import UserError
from i3cl.runtime.parts import IN_PROCESS, run_parts

logger = logging.getLogger(__name__)


def write_scene_text(
    settings: SceneTextSettings, folder: str, images: int, seed: int, table: bool = False, in_process: int = IN_PROCESS
) -> str:
    """Write `images` images of the set `seed` under `folder` and return the path of their annotations.

    Images go to folder/part-NNNNN/, annotations to folder/set.json (COCO) or, with `table`, to folder/set.parquet/ with one
    file per part, for sets too large for one json. The same settings and seed make the same files on any number of workers. A
    finished part is not made again; set.json is written last. in_process: number of parts up to which no Ray is started.
    UserError when the folder holds a set with other settings.
    """
    if images < 1 or seed < 0:
        raise UserError(f"scene-text: images must be at least 1 and the seed at least 0, not {images} and {seed}")
    # Tasks may run in another folder or on another machine.
    own = {"fonts": settings.fonts, "backgrounds": settings.backgrounds}
    settings = settings.model_copy(update={key: storage.absolute(path) for key, path in own.items() if path})
    if settings.backgrounds:
        photograph_files(settings.backgrounds)  # fails now for a wrong folder, not when the first photograph is needed
    faces = find_faces(settings.fonts)
    if faces.missing:
        logger.info(
            "scene-text: %d font packages are missing (%s, ...); using %d Latin and %d CJK families; "
            "pip install 'i3cl[fonts]' for all",
            len(faces.missing),
            ", ".join(faces.missing[:3]),
            len(faces.latin),
            len(faces.cjk),
        )
    _same_set(settings, folder, images, seed)
    shards = storage.join(folder, "set.parquet")
    there = set(storage.list_dir(shards))
    parts = -(-images // settings.images_per_part)
    wanted = [part for part in range(parts) if _shard(part) not in there]
    left = sum(min(settings.images_per_part, images - part * settings.images_per_part) for part in wanted)
    run_parts("scene-text", wanted, left, partial(_write_part, settings, folder, images, seed), in_process)
    if table:
        return shards
    annotations = storage.join(folder, "set.json")
    if not storage.exists(annotations):
        write_coco(annotations, read_coco(shards, folder, check_files=False).records)
    return annotations


def _shard(part: int) -> str:
    return f"part-{part:05d}.parquet"


def _same_set(settings: SceneTextSettings, folder: str, images: int, seed: int) -> None:
    """Write down what the folder will hold, or compare with what was written. UserError when it differs."""
    note = storage.join(folder, "scene_text.json")
    families = find_faces(settings.fonts)
    content = {
        "images": images,
        "seed": seed,
        "scene_text": settings.model_dump(mode="json"),
        "families": [len(families.latin), len(families.cjk)],
    }
    if not storage.exists(note):
        storage.write_text_atomic(note, json.dumps(content, indent=1) + "\n")
        return
    try:
        found = json.loads(storage.read_text(note))
    except json.JSONDecodeError:
        raise UserError(f"{note}: not readable as JSON; remove the folder or choose another one") from None
    if found != content:
        key = next((k for k in content if not isinstance(found, dict) or found.get(k) != content[k]), "scene_text")
        raise UserError(f"{note}: the folder holds a set with other {key}; choose another folder or remove it")


def _write_part(settings: SceneTextSettings, folder: str, images: int, seed: int, part: int) -> list[str]:
    name = f"part-{part:05d}"
    first = part * settings.images_per_part
    records = []
    with storage.atomic_directory(storage.join(folder, name), replace=True) as work:
        for index in range(first, min(first + settings.images_per_part, images)):
            scene = make_scene(index, seed, settings)
            encoded, jpeg = cv2.imencode(".jpg", scene.image[:, :, ::-1], [cv2.IMWRITE_JPEG_QUALITY, scene.quality])
            assert encoded
            file = f"{index:08d}.jpg"
            (work / file).write_bytes(jpeg.tobytes())
            height, width = scene.image.shape[:2]
            records.append(ImageRecord(index + 1, f"{name}/{file}", height, width, tuple(scene.instances), "scene-text"))
    # Written last: a part counts as done when its table is there.
    write_parquet(storage.join(folder, "set.parquet", _shard(part)), records, folder)
    return []

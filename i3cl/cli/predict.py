"""Find text in images with a checkpoint: an ArT submission json, COCO results and drawn pictures.

Writes to --out: art.json, coco.json, images.json (the id of every image of coco.json), pictures/, and parts/, from which the
same command continues after an interruption. An image is called by its file name, relative to the folder that all images share.
Where all names are those of ArT (gt_7.jpg, res_7.jpg, 7.jpg), art.json says res_7 and coco.json 7.
"""

from __future__ import annotations

import argparse
import json
import os
import posixpath
import re
import time
from collections import Counter
from typing import Any

from i3cl.cli.command_line import run
from i3cl.config import Settings
from i3cl.errors import UserError
from i3cl.model.shipped import DEFAULT, folder_of, is_shipped

_ROWS_PER_PART = 100
_SECONDS_PER_PART = 10.0
_ABSENT = {"data.exif": "stored"}
"""Values of a claim that folders of earlier versions lack."""
_ART = re.compile(r"(?:gt_|res_)?(\d+)")


def work(settings: Settings, options: argparse.Namespace) -> None:
    """Predict every image that has no stored result yet, then write the files of the whole."""
    from i3cl import storage
    from i3cl.inference.device import choose_device
    from i3cl.inference.predictor import Predictor
    from i3cl.inference.recipe import chosen_exif, describe_sizes, describe_tiles, given_size, recipe_of, test_size, tiles

    if not 0 <= options.score <= 1:
        raise UserError(f"--score {options.score:g}: give a number from 0 to 1")
    files = find_images(options.images)
    names = relative_names(files)
    numbers = art_numbers(files, names)
    pictures = picture_names(names)
    out = storage.absolute(options.out)
    storage.make_dirs(out)
    given = given_size(settings)
    recipe = recipe_of(options.checkpoint)
    tile = tiles(recipe, given)
    exif = chosen_exif({options.checkpoint: recipe}, settings)
    # Without tiles as in folders that were begun before there were any.
    sizes = {"test size": str(test_size(recipe, given)), "data.tile": tile and describe_tiles(tile), "data.exif": exif}
    results = Results(out, {"checkpoint": _identity(options.checkpoint), "score": options.score, **sizes})
    versions = [_version(file) for file in files]
    waiting = [index for index, file in enumerate(files) if not results.has(file, versions[index])]
    if len(waiting) < len(files):
        print(f"{len(files) - len(waiting)} of {len(files)} images have their result in {out} already", flush=True)
    try:
        predictor = None
        if waiting:
            turned = ", images turned upright (data.exif)" if exif == "upright" else ""
            print(describe_sizes({options.checkpoint: recipe}, given) + turned, flush=True)
            predictor = Predictor.load(options.checkpoint, choose_device(settings.cluster.gpu), given, upright=exif == "upright")
        for index in waiting:
            row = _predict(predictor, files[index], storage.join(out, "pictures", pictures[index]), options.score)
            results.add({"file": files[index], "version": versions[index], **row})
            if "error" not in row:
                print(f"{index + 1}/{len(files)} {names[index]}: {len(row['coco'])} texts", flush=True)
    finally:
        results.flush()
    rows = [results.rows[file] for file in files]
    art: dict[str, list[dict[str, Any]]] = {}
    coco: list[dict[str, Any]] = []
    images = []
    for index, row in enumerate(rows):
        if "error" in row:
            continue
        identity = numbers[index] if numbers else index + 1
        art[f"res_{numbers[index]}" if numbers else names[index]] = row["art"]
        coco += [{**found, "image_id": identity} for found in row["coco"]]
        images.append({"id": identity, "file_name": names[index], "height": row["height"], "width": row["width"]})
    for name, content in (("art.json", art), ("coco.json", coco), ("images.json", images)):
        storage.write_text_atomic(storage.join(out, name), json.dumps(content))
    bad = [row["error"] for row in rows if "error" in row]
    if len(bad) == len(files):
        raise UserError(f"{bad[0]}; none of the {len(files)} images can be read" if len(bad) > 1 else bad[0])
    for reason in bad:
        print(f"skipped {reason}")
    print(f"{len(files) - len(bad)} images, {len(coco)} texts: {out}")


def find_images(given: list[str]) -> list[str]:
    """Paths of the images, each once: those given, and those directly in the folders given. Says what it leaves out.

    Raises:
        UserError: a path is missing, or there is not a single image.
    """
    from i3cl import storage
    from i3cl.data.loading.endings import IMAGE_ENDINGS, is_image, left_out

    found: dict[str, None] = {}
    for path in given:
        if not storage.exists(path):
            raise UserError(f"{path}: no such image or folder")
        if not storage.is_dir(path):
            found[storage.absolute(path)] = None
            continue
        names = storage.list_dir(path)
        folders = set() if storage.is_remote(path) else {name for name in names if storage.is_dir(storage.join(path, name))}
        special = [name for name in names if is_image(name) and name not in folders and _is_special(storage.join(path, name))]
        images = [name for name in names if is_image(name) and name not in folders and name not in special]
        found |= dict.fromkeys(storage.absolute(storage.join(path, name)) for name in images)
        if special:
            print(f"{path}: left out {len(special)} pipes, sockets or devices: {', '.join(special[:5])}")
        others = left_out([name for name in names if not is_image(name) and name not in folders])
        if others:
            print(f"{path}: {others}")
        if folders:
            print(f"{path}: left out {len(folders)} folders; name them after --images too: {', '.join(sorted(folders)[:5])}")
    if not found:
        raise UserError(f"{given[0]}: has no image ({', '.join(IMAGE_ENDINGS)})")
    return list(found)


def _is_special(path: str) -> bool:
    """Whether a path in a folder is a pipe, socket or device, reading which could wait for ever; a broken link is none."""
    from i3cl import storage

    return not storage.is_remote(path) and os.path.exists(path) and not os.path.isfile(path)


def _version(file: str) -> str | None:
    """As `storage.version`; None on S3, where it costs a request, and for links in a loop, which reading will tell."""
    from i3cl import storage

    try:
        return None if storage.is_remote(file) else storage.version(file)
    except UserError:
        return None


def relative_names(files: list[str]) -> list[str]:
    """The files' names relative to the folder that all share; whole paths where they share none, as local files and s3://."""
    if len({file.partition("://")[0] if "://" in file else "" for file in files}) > 1:
        return files
    shared = os.path.commonpath([posixpath.dirname(file) for file in files])
    return [posixpath.relpath(file, shared) for file in files]


def art_numbers(files: list[str], names: list[str]) -> list[int] | None:
    """The images' numbers, where all are called as in ArT (gt_7, res_7 or 7) and no two folders have the same number.

    Raises:
        UserError: two images of one folder have the same number.
    """
    numbers: list[int] = []
    first: dict[int, str] = {}
    apart = False
    for file, name in zip(files, names, strict=True):
        matched = _ART.fullmatch(posixpath.splitext(posixpath.basename(name))[0])
        if not matched:
            return None
        numbers.append(int(matched[1]))
        other = first.setdefault(numbers[-1], file)
        if other != file and posixpath.dirname(other) == posixpath.dirname(file):
            raise UserError(
                f"{other} and {file}: both would be res_{numbers[-1]} in art.json; rename one, or give each its own --out"
            )
        apart |= other != file
    return None if apart else numbers


def picture_names(names: list[str]) -> list[str]:
    """Name of every image's picture: .jpg instead of its ending, or after it where two would be the same."""
    relative = [name.partition("://")[2] if "://" in name else name.lstrip("/") for name in names]
    pictures = [f"{posixpath.splitext(name)[0]}.jpg" for name in relative]
    # Again and again: a.jpg beside a.png becomes a.jpg.jpg, which may be the picture of a.jpg.jpg.
    while len(counts := Counter(pictures)) < len(set(relative)):
        pictures = [f"{name}.jpg" if counts[picture] > 1 else picture for name, picture in zip(relative, pictures, strict=True)]
    return pictures


class Results:
    """The stored result of every image, as JSON lines in <out>/parts; written as it goes.

    UserError when the folder holds results of another checkpoint, score, test size or tile setting.
    """

    def __init__(self, out: str, claim: dict[str, Any]) -> None:
        from i3cl import storage

        self.rows: dict[str, dict[str, Any]] = {}
        """Absolute path or URL of an image -> its result; the latest one counts."""
        self._folder = storage.join(out, "parts")
        self._new: list[dict[str, Any]] = []
        self._written = time.monotonic()
        note = storage.join(self._folder, "job.json")
        if storage.exists(note):
            there = _own(storage.read_text(note), note, out)
            for key, value in claim.items():
                if there.get(key, _ABSENT.get(key)) != value:
                    raise UserError(f"{out}: holds results of another {key}; name another --out, or remove the folder")
        else:
            storage.write_text_atomic(note, json.dumps(claim))
        parts = [name for name in storage.list_dir(self._folder) if re.fullmatch(r"[0-9]+\.jsonl", name)]
        for name in parts:
            path = storage.join(self._folder, name)
            for line in storage.read_text(path).splitlines():
                row = _own(line, path, out, "file", "version")
                self.rows[row["file"]] = row
        self._next = 1 + max((int(name.removesuffix(".jsonl")) for name in parts), default=-1)

    def has(self, file: str, version: str | None) -> bool:
        """Whether the result of this very file is there. version: as `storage.version`; None where it costs a request."""
        return file in self.rows and self.rows[file]["version"] == version

    def add(self, row: dict[str, Any]) -> None:
        """Keep a result; it is written with the next part."""
        self.rows[row["file"]] = row
        self._new.append(row)
        if len(self._new) >= _ROWS_PER_PART or time.monotonic() - self._written > _SECONDS_PER_PART:
            self.flush()

    def flush(self) -> None:
        """Write what is not written yet."""
        from i3cl import storage

        if self._new:
            text = "".join(json.dumps(row) + "\n" for row in self._new)
            storage.write_text_atomic(storage.join(self._folder, f"{self._next:06}.jsonl"), text)
            self._next += 1
            self._new = []
        self._written = time.monotonic()


def _own(text: str, path: str, out: str, *keys: str) -> dict[str, Any]:
    """An object that an earlier run wrote to `path`, with these keys. UserError when it is damaged, or of something else."""
    try:
        found = json.loads(text)
    except ValueError:
        found = None
    if not isinstance(found, dict) or not set(keys) <= set(found):
        raise UserError(f"{path}: is damaged or was not written by predict; name another --out, or remove the folder {out}")
    return found


def _identity(checkpoint: str) -> str:
    """A checkpoint's path, and what changes with its weights."""
    from i3cl import storage

    path = storage.absolute(folder_of(checkpoint))
    name = checkpoint if is_shipped(checkpoint) else path
    return f"{name} {storage.version(storage.join(path, 'weights.safetensors'))}"


def _predict(predictor: Any, file: str, picture: str, score: float) -> dict[str, Any]:
    """Result of one image, its picture written; {"error": reason} when the image cannot be read."""
    import cv2

    from i3cl import storage
    from i3cl.data.loading.images import ImageError, decode_image

    try:
        image = decode_image(file, upright=predictor.upright)
    except ImageError as error:
        return {"error": str(error)}
    found = predictor.detect([image], score)[0]
    drawn = cv2.cvtColor(found.draw(image), cv2.COLOR_RGB2BGR)
    if storage.is_remote(picture):  # keys on S3 are UTF-8, names of files need not be
        picture = picture.encode("utf-8", "backslashreplace").decode()
    storage.write_bytes_atomic(picture, cv2.imencode(".jpg", drawn)[1].tobytes())
    return {"height": found.height, "width": found.width, "art": found.to_art(score), "coco": found.to_coco(0)}


def arguments(parser: argparse.ArgumentParser) -> None:
    """The options of predict."""
    parser.add_argument(
        "--checkpoint", default=DEFAULT, metavar="DIR", help=f"directory that training wrote (default: {DEFAULT} of the package)"
    )
    parser.add_argument("--images", required=True, nargs="+", metavar="PATH", help="images or folders of images")
    parser.add_argument("--out", default="runs/predict", metavar="FOLDER")
    parser.add_argument("--score", type=float, default=0.45, help="lowest score, 0-1 (default 0.45)")


def main() -> None:
    """Run the command line of predict."""
    run(work, __doc__, arguments)

"""Which result belongs to which image of the truth."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from i3cl import storage
from i3cl.data.loading.endings import without_ending
from i3cl.data.loading.images import check_size
from i3cl.errors import UserError
from i3cl.evaluation.formats.coco import RESULTS
from i3cl.evaluation.formats.sets import ImageDetections, ImageTruth, PolygonSet
from i3cl.evaluation.metrics.batch import EvalImage


@dataclass(frozen=True)
class Paired:
    """Truth and results, image by image."""

    images: list[EvalImage]
    """In the order of the truth."""
    missing: list[str]
    """Truth images that the results do not name; they count as empty."""
    how: str
    """What tied the images together."""
    others: list[str] = field(default_factory=list)
    """Results of images that the truth does not have; only where `pair` is allowed to leave them out."""


_PREFIX = re.compile(r"^(?:task\d+_|res_|gt_|poly_|det_)+(?=.)")


_BY_NAME, _BY_ID = "file name", "image id"


def pair(truth: PolygonSet[ImageTruth], results: PolygonSet[ImageDetections], others: bool = False) -> Paired:
    """Ties every result to its truth image.

    By file name, else by COCO image id where both have one, else by name without extension and the prefixes gt_, res_, poly_gt_,
    task1_, else by the number in the name: the first of these that leaves no result over. Names come before ids, because every
    set counts its images from 1.

    others: results may hold images that the truth does not have; those are left out. Only where names tie them together, or ids
    that are all that the results have: with anything else a wrong match would not be noticed.

    Raises:
        UserError: Results are of images that the truth does not have, images cannot be told apart, or an image has another
            size than its truth says.
    """
    _check_names(truth)
    ways: list[tuple[str, Callable[[Any], Any]]] = []
    if results.format != RESULTS:
        ways.append((_BY_NAME, lambda image: image.name.rsplit(".", 1)[0]))
    if all(t.id is not None for t in truth.images) and all(f.id is not None for f in results.images):
        ways.append((_BY_ID, lambda image: image.id))
    if results.format != RESULTS:
        ways.append(("name without prefix and extension", lambda image: _short(image.name)))
    ways.append(("number in the name", lambda image: image_number(image.name)))
    sure = (_BY_ID,) if results.format == RESULTS else (_BY_NAME,)
    best: tuple[int, str, dict[Any, ImageTruth], dict[Any, ImageDetections]] | None = None
    for how, key in ways:
        truths = {key(image): image for image in truth.images}
        found = {key(image): image for image in results.images}
        if len(truths) != len(truth.images) or len(found) != len(results.images) or None in truths:
            continue
        strangers = sum(k not in truths for k in found)
        if best is None or strangers < best[0]:
            best = (strangers, how, truths, found)
        if strangers == 0 or (others and how in sure and strangers < len(found)):
            break
    if best is None:
        stems = (Counter(_stem(image.name) for image in images) for images in (truth.images, results.images))
        twice = [name for counted in stems for name, count in counted.items() if count > 1]
        raise UserError(
            f"{results.path}: images cannot be told apart by name or number"
            + (f" ({twice[0]} occurs twice)" if twice else "")
            + "; give the results the truth's file names"
        )
    strangers, how, truths, found = best
    names = [image.name for key, image in found.items() if key not in truths]
    if strangers and not (others and how in sure and strangers < len(found)):
        raise UserError(
            f"{results.path}: {strangers} of {len(found)} results are of images that the truth does not have "
            f"({', '.join(names[:3])}{', ...' if strangers > 3 else ''}){_shift_hint(truth, results)}; remove or rename them"
        )
    missing = [image.name for key, image in truths.items() if key not in found]
    return Paired([image_of(image, found.get(key)) for key, image in truths.items()], missing, how, names)


def image_of(truth: ImageTruth, found: ImageDetections | None) -> EvalImage:
    """Truth and detections of one image. UserError when both state its size and the sizes differ."""
    if found is not None and found.height and found.width and truth.height and truth.width:
        check_size(truth.name, (found.height, found.width), (truth.height, truth.width))
    height, width = truth.height, truth.width
    return EvalImage(
        truth.name,
        truth.polygons,
        np.array(truth.ignore, bool),
        found.polygons if found else [],
        found.scores if found else np.zeros(0),
        truth.texts,
        truth.languages,
        height,
        width,
        truth.file_name,
        # A mask needs a frame; without one the outlines stand in for it.
        found.masks if found and height and width else None,
    )


def image_number(name: str) -> int | None:
    """The last number in an image's name: 7 of 'train/gt_007.jpg'."""
    numbers = re.findall(r"\d+", _stem(name))
    return int(numbers[-1]) if numbers and len(numbers[-1]) < 18 else None


def listed_names(path: str) -> set[str]:
    """Image names of a list file: one per line, compared without folder, prefix and extension."""
    return {_short(line.strip()) for line in storage.read_text(path).splitlines() if line.strip()}


def on_list(images: Iterable[EvalImage], names: set[str]) -> list[bool]:
    """Whether each image is on a list that `listed_names` read."""
    return [_short(image.name) in names for image in images]


def _check_names(truth: PolygonSet[ImageTruth]) -> None:
    first: dict[str, ImageTruth] = {}
    for image in truth.images:
        other = first.setdefault(image.name, image)
        if other is not image:
            ids = f" (image ids {other.id} and {image.id})" if image.id is not None else ""
            raise UserError(f"{truth.path}: {image.name} is there twice{ids}; join its labels under one image")


def _stem(name: str) -> str:
    # macOS writes é as two characters, other systems as one.
    return unicodedata.normalize("NFC", without_ending(name))


def _short(name: str) -> str:
    return _PREFIX.sub("", _stem(name))


def _shift_hint(truth: PolygonSet[ImageTruth], results: PolygonSet[ImageDetections]) -> str:
    known = {image_number(image.name) if image.id is None else image.id for image in truth.images}
    given = [image_number(image.name) if image.id is None else image.id for image in results.images]
    shifts = {shift: sum(n is not None and n + shift in known for n in given) for shift in (1, -1)}
    shift, hits = max(shifts.items(), key=lambda item: item[1])
    now = sum(n in known for n in given)
    if hits > now and hits == len(given):
        return f": the numbers look shifted, {shift:+d} would fit them all"
    return ""

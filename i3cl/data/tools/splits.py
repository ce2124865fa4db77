"""Dividing a data set, leaving images out by lists, and finding images that look the same."""

from __future__ import annotations

import hashlib
import logging
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from itertools import pairwise
from pathlib import PurePosixPath

import numpy as np
from numpy.typing import NDArray

from i3cl import storage
from i3cl.data.formats.coco import read_for_command, write_coco
from i3cl.data.formats.records import Dataset, ImageRecord, TableRecords
from i3cl.data.formats.table import write_shards
from i3cl.data.loading.endings import without_ending
from i3cl.data.loading.images import ImageError, decode_image
from i3cl.errors import UserError

logger = logging.getLogger(__name__)

_POOL_FROM = 500
"""Number of images from which hashing runs in several processes."""


# ----------------------------------------------------------------------------------------------------- dividing


def split_of(file_name: str, fractions: Mapping[str, float], seed: int) -> str:
    """Name of the part that an image belongs to. `fractions` add up to 1.

    It depends on the file name and the seed alone, so an image stays in its part when others are added or left out.
    """
    digest = hashlib.blake2b(file_name.encode(), digest_size=8, key=str(seed).encode()).digest()
    place = int.from_bytes(digest, "big") / 2**64
    total = 0.0
    for name, fraction in fractions.items():
        total += fraction
        if place < total:
            return name
    return list(fractions)[-1]


def parse_fractions(words: Sequence[str]) -> dict[str, float]:
    """{'train': 0.9, ...} from ['train=0.9', ...]. UserError for a bad word, or when they do not add up to 1."""
    fractions: dict[str, float] = {}
    for word in words:
        name, _, share = word.partition("=")
        try:
            fraction = float(share)
        except ValueError:
            fraction = math.nan
        if not re.fullmatch(r"\w[\w.-]*", name) or not 0 < fraction <= 1 or name in fractions:
            raise UserError(f"--fractions {word}: write NAME=SHARE, each with its own name and a share from 0 to 1")
        fractions[name] = fraction
    if abs(sum(fractions.values()) - 1) > 1e-6:
        raise UserError(f"--fractions add up to {sum(fractions.values()):g}; make them add up to 1")
    return fractions


def read_removals(listed: str) -> tuple[set[str], set[int]]:
    """Image stems and, with a column, numbers from a list with one or more ids per line.

    listed: path, or path:COLUMN. Fields are separated by blanks, tabs, commas, semicolons or '->'; folders and suffixes of
    images are cut off; blank lines and lines that begin with '#' are ignored. Without a column every field counts as the whole
    name of an image: in a list that pairs img12 with gt_34, only gt_34 names an image of a set of gt_<n>. With COLUMN (from 1)
    only that field counts, and a field of digits alone stands for the number at the end of a name. UserError for a list without
    ids.
    """
    path, _, column = listed.rpartition(":")
    if not (path and column.isdecimal() and not storage.exists(listed)):
        path, column = listed, ""
    stems: set[str] = set()
    numbers: set[int] = set()
    for line in storage.read_text(path).splitlines():
        if line.lstrip().startswith("#"):
            continue
        words = [word for word in re.split(r"[\s,;]+|->", line.strip()) if word]
        for word in words[int(column) - 1 : int(column)] if column else words:
            stem = without_ending(word)
            stems.add(stem)
            if column and re.fullmatch(r"[0-9]{1,18}", stem):
                numbers.add(int(stem))
    if not stems:
        raise UserError(f"{path}: lists no image; write one id or file name a line")
    return stems, numbers


def _listed(record: ImageRecord, stems: set[str], numbers: set[int]) -> bool:
    stem = PurePosixPath(record.file_name).stem
    last = re.search(r"[0-9]{1,18}$", stem) if numbers else None
    return stem in stems or (last is not None and int(last[0]) in numbers)


def write_splits(
    source: str, out: str, *, fractions: Sequence[str], seed: int, remove: Sequence[str] = (), skip_bad: bool = False
) -> dict[str, int]:
    """Write every part as ``<out>/<name>.json``, or ``<out>/<name>/`` of shards when the source is a Parquet table.

    remove: lists of images to leave out. Returns the number of images in each part, and under 'removed' of those left out. The
    folder is written atomically. UserError for bad fractions, and when a list names no image of the source.
    """
    shares = parse_fractions(fractions)
    records = read_for_command(source, skip_bad=skip_bad).records
    removed: set[int] = set()
    for path in remove:
        stems, numbers = read_removals(path)
        gone = {record.id for record in records if _listed(record, stems, numbers)}
        if not gone:
            raise UserError(f"{path}: none of its {len(stems)} ids names an image of {source}; give LIST:COLUMN for bare numbers")
        removed |= gone
    counts = dict.fromkeys(shares, 0)

    def part(name: str) -> Iterator[ImageRecord]:
        for record in records:
            if record.id not in removed and split_of(record.file_name, shares, seed) == name:
                counts[name] += 1
                yield record

    with storage.atomic_directory(out) as folder:
        for name in shares:
            if isinstance(records, TableRecords):
                write_shards(str(folder / name), part(name))
            else:
                write_coco(str(folder / f"{name}.json"), part(name), info={"description": f"{name} of a split, seed {seed}"})
    return counts | ({"removed": len(removed)} if remove else {})


# --------------------------------------------------------------------------------------------------- duplicates


def image_hash(path: str, *, upright: bool = False) -> int:
    """64-bit perceptual hash (low frequencies of the cosine transform, above or below their median) of an image.

    upright: turn it as its EXIF orientation says.
    """
    import imagehash
    from PIL import Image

    bits = imagehash.phash(Image.fromarray(decode_image(path, upright=upright))).hash
    return int.from_bytes(np.packbits(bits).tobytes(), "big")


def hash_images(dataset: Dataset, *, upright: bool = False) -> tuple[NDArray[np.uint64], list[str]]:
    """(N,) uint64 hashes of the readable images and their N file names; in processes of this machine when there are many.

    Unreadable images are logged and left out. upright: as `image_hash`. UserError when none can be read.
    """
    names = [record.file_name for record in dataset.records]
    paths = [storage.join(dataset.images_root, name) for name in names]
    read = partial(_hash_or_reason, upright=upright)
    workers = min(os.cpu_count() or 1, 16)
    if len(paths) < _POOL_FROM or workers == 1:
        results: Iterable[int | str] = map(read, paths)
        pairs = list(zip(names, results, strict=True))
    else:
        with ProcessPoolExecutor(workers) as pool:
            pairs = []
            for name, result in zip(names, pool.map(read, paths, chunksize=32), strict=True):
                pairs.append((name, result))
                if len(pairs) % 5000 == 0:
                    logger.info("%s: %d/%d images hashed", dataset.name, len(pairs), len(paths))
    for _, result in pairs:
        if isinstance(result, str):
            logger.info("left out: %s", result)
    kept = [(name, result) for name, result in pairs if isinstance(result, int)]
    if pairs and not kept:
        raise UserError(f"{dataset.images_root}: none of the {len(pairs)} images can be read; correct --images")
    return np.array([result for _, result in kept], np.uint64), [name for name, _ in kept]


def _hash_or_reason(path: str, upright: bool) -> int | str:
    try:
        return image_hash(path, upright=upright)
    except ImageError as error:
        return str(error)


def near_pairs(first: NDArray[np.uint64], second: NDArray[np.uint64], distance: int) -> NDArray[np.int64]:
    """(K, 3) int64: index into `first`, index into `second`, Hamming distance, of all pairs within `distance` (0-16) bits.

    Exact: when the 64 bits are cut into distance + 1 bands, such a pair has at least one equal band, so only pairs with an equal
    band are compared (Manku et al., Detecting near-duplicates for web crawling, 2007). Ascending.
    """
    assert 0 <= distance <= 16
    edges = np.linspace(0, 64, distance + 2).astype(int)
    found: set[tuple[int, int, int]] = set()
    for low, high in pairwise(edges.tolist()):
        mask = np.uint64((1 << (high - low)) - 1)
        keys_a, keys_b = (first >> np.uint64(low)) & mask, (second >> np.uint64(low)) & mask
        order = np.argsort(keys_b, kind="stable")
        begin = np.searchsorted(keys_b[order], keys_a, "left")
        count = np.searchsorted(keys_b[order], keys_a, "right") - begin
        # In chunks of candidates, so that memory stays small whatever the hashes are.
        for chosen in np.array_split(np.arange(len(first)), max(1, int(count.sum()) // 4_000_000 + 1)):
            a = np.repeat(chosen, count[chosen])
            offsets = np.arange(len(a)) - np.repeat(np.cumsum(count[chosen]) - count[chosen], count[chosen])
            b = order[np.repeat(begin[chosen], count[chosen]) + offsets]
            bits = np.bitwise_count(first[a] ^ second[b])
            near = bits <= distance
            found.update(zip(a[near].tolist(), b[near].tolist(), bits[near].tolist(), strict=True))
    return np.array(sorted(found), np.int64).reshape(-1, 3)


def report_duplicates(
    source: tuple[str, str],
    against: tuple[str, str],
    distance: int,
    out: str | None = None,
    *,
    skip_bad: bool = False,
    upright: bool = False,
) -> int:
    """Log, or write to `out`, a line 'distance, image, image' (tab-separated) per pair that looks the same; return their number.

    source, against: annotations and images root of two sets; the same set twice gives the pairs within it, each once. upright:
    as `image_hash`. UserError as ``read_coco``.
    """
    if not 0 <= distance <= 16:
        raise UserError(f"--distance {distance}: give 0 to 16 bits; unrelated images differ in about 32")
    if out is not None:
        storage.refuse_to_overwrite(out, source[0], against[0])
    first = hash_images(read_for_command(*source, skip_bad=skip_bad), upright=upright)
    second = first if against == source else hash_images(read_for_command(*against, skip_bad=skip_bad), upright=upright)
    pairs = near_pairs(first[0], second[0], distance)
    if against == source:
        pairs = pairs[pairs[:, 0] < pairs[:, 1]]
    lines = [f"{bits}\t{first[1][a]}\t{second[1][b]}\n" for a, b, bits in pairs.tolist()]
    if out is None:
        for line in lines:
            logger.info("%s", line.rstrip("\n"))
    else:
        storage.write_text_atomic(out, "".join(lines))
    return len(lines)

"""Broken label files by the thousand: ``python tests/data/importers/fuzz_importers.py [COUNT] [SEED]``.

Every mutated sample has to give a UserError of one line, or records whose points are finite; never anything else, and soon.
"""

from __future__ import annotations

import random
import re
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import numpy as np
from importer_samples import SAMPLES

from i3cl.data.importers.base import LabelledImage
from i3cl.data.importers.records import to_record
from i3cl.data.importers.registry import read_labels
from i3cl.errors import UserError

LIMIT = 2.0
"""Seconds of processor time for one small file; the usual one takes a millisecond."""

TOKENS = [
    *(b"-1", b"0", b"1e999", b"nan", b"NaN", b"-Infinity", b"9" * 400, b"1.5", b"--1", b"0x10", b"1_000", b"true", b"null"),
    *(b"{}", b'""', b"[]", b"[[]]", b"[" * 5000, b"{" * 5000, b'"', b"'", b"\\", b",", b",,", b",####", b"####", b"###"),
    *(b"#", b"\n", b"\r", b"\r\n", b"\0", b"\xff", b"\xef\xbb\xbf", b"\xff\xfe", b"\xed\xa0\x80", b"\\ud800", b"x:"),
    *(b"]]", b"[[", b"u'", b"../", b"/", b"\\x", b"<", b"</box>", b"<box>", b"&amp;", b"&x;", b"]]>", b"<!--", b"<![CDATA["),
    b"\xe2\x80\xa8",
    b'<!DOCTYPE a [<!ENTITY x "y"><!ENTITY z "&x;&x;">]>',
    *("永".encode(), "٣".encode(), b" " * 3000, b"," * 3000, b"(" * 3000, b"\\'" * 1000),
]


def mutate(data: bytes, chance: random.Random) -> bytes:
    """The data with one to four changes of bytes, numbers, lines or tokens."""
    for _ in range(chance.randint(1, 4)):
        at, end = sorted(chance.randrange(len(data) + 1) for _ in range(2))
        kind = chance.randrange(9)
        if kind == 0 and data:
            at = min(at, len(data) - 1)
            data = data[:at] + bytes([chance.randrange(256)]) + data[at + 1 :]
        elif kind == 1 and data:
            at = min(at, len(data) - 1)
            data = data[:at] + bytes([data[at] ^ 1 << chance.randrange(8)]) + data[at + 1 :]
        elif kind == 2:
            data = data[:at] + data[min(end, at + chance.randint(1, 20)) :]
        elif kind == 3:
            data = data[:at] + chance.choice(TOKENS) + data[at:]
        elif kind == 4:
            data = data[:at] + data[at:end] * 2 + data[end:]
        elif kind == 5:
            data = data[:at]
        elif kind == 6:
            lines = data.split(b"\n")
            chance.shuffle(lines)
            data = b"\n".join(lines)
        else:
            # A number or word in place of another one: keeps the structure, so it gets deeper into the reader.
            words = list(re.finditer(rb"-?[0-9]+|\w+", data))
            if words:
                word = chance.choice(words)
                data = data[: word.start()] + chance.choice(TOKENS) + data[word.end() :]
    return data


def check(dataset: str, root: Path, split: str) -> str:
    """'read' or 'refused'. AssertionError for a wrong record or message, or when it takes too long."""
    started = time.process_time()
    found: list[LabelledImage] = []
    verdict = "read"
    try:
        found += read_labels(dataset, str(root), split)
    except UserError as error:
        verdict = "refused"
        assert str(error) and "\n" not in str(error) and len(str(error)) < 2000, repr(str(error))
        str(error).encode()
    for image in found:
        for instance in image.instances or ():
            polygon = instance.polygon
            assert polygon.dtype == np.float32 and polygon.ndim == 2 and polygon.shape[1] == 2 and len(polygon)
            assert np.isfinite(polygon).all()
            (instance.text or "").encode()
        record, _ = to_record(image, 1, 120, 160, dataset)
        for kept in record.instances:
            assert (kept.polygon >= 0).all() and (kept.polygon <= [160, 120]).all() and len(kept.polygon) >= 3
    assert time.process_time() - started < LIMIT, "too slow"
    return verdict


def fuzz(sample: str, root: Path, count: int, seed: int) -> Counter[str]:
    """Verdicts over `count` mutations of one sample, written below `root`."""
    dataset, write = SAMPLES[sample]
    labels = [(path, path.read_bytes()) for path in write(root)]
    chance = random.Random(f"{sample} {seed}")
    verdicts: Counter[str] = Counter()
    for number in range(count):
        path, valid = chance.choice(labels)
        data = mutate(valid, chance)
        path.write_bytes(data)
        try:
            verdicts[check(dataset, root, "test" if "test" in str(path.relative_to(root)) else "train")] += 1
        except BaseException:
            print(f"{sample}, seed {seed}, mutation {number}: {data[:3000]!r}", file=sys.stderr)
            raise
        path.write_bytes(valid)
    return verdicts


FUZZED = [name for name in SAMPLES if name not in ("lsvt_test", "folder")]

if __name__ == "__main__":
    total, base = int((sys.argv[1:] or [10_000])[0]), int((sys.argv[2:] or [0])[0])
    for sample_name in FUZZED:
        with tempfile.TemporaryDirectory() as folder:
            begun = time.perf_counter()
            result = fuzz(sample_name, Path(folder), -(-total // len(FUZZED)), base)
            print(f"{sample_name:16} {dict(result)} {time.perf_counter() - begun:.1f} s", flush=True)

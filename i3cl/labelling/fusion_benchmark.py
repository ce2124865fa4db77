"""How long fusion takes: 1,000 images, 5 members, 30 instances each, on all cores of the machine."""

from __future__ import annotations

import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import numpy as np
from numpy.typing import NDArray

from i3cl.config import FusionSettings
from i3cl.labelling.fusion import MemberPrediction, fuse_images

_IMAGES, _MEMBERS, _INSTANCES = 1000, 5, 30
_CHUNK = 50


def crowded_image(seed: int) -> list[MemberPrediction]:
    """Bent words of 14 points. Every member finds them slightly displaced and misses one in ten."""
    rng = np.random.default_rng(seed)
    words = [_word(rng) for _ in range(_INSTANCES)]
    result = []
    for member in range(_MEMBERS):
        seen = [ring + rng.normal(0, 2, 2) + rng.normal(0, 0.7, ring.shape) for ring in words if rng.random() < 0.9]
        polygons = [ring.astype(np.float32) for ring in seen]
        result.append(MemberPrediction(f"m{member}", polygons, rng.uniform(0.1, 1, len(polygons))))
    return result


def _word(rng: np.random.Generator) -> NDArray[np.float64]:
    width, height, angle = rng.uniform(40, 160), rng.uniform(12, 40), rng.uniform(-0.6, 0.6)
    along = np.linspace(-0.5, 0.5, 7)
    sag = rng.uniform(-0.3, 0.3) * width * (4 * along**2 - 1)
    upper = np.stack([along * width, sag - height / 2], 1)
    lower = np.stack([along * width, sag + height / 2], 1)[::-1]
    turn = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
    moved: NDArray[np.float64] = np.concatenate([upper, lower]) @ turn + rng.uniform(0, 1500, 2)
    return moved


def _fuse_chunk(first: int) -> tuple[float, int]:
    """CPU seconds and fused instances of `_CHUNK` images; making them does not count."""
    images = [crowded_image(seed) for seed in range(first, first + _CHUNK)]
    started = time.process_time()
    fused = fuse_images(images, FusionSettings())
    return time.process_time() - started, sum(map(len, fused))


def fusion_report(processes: int) -> str:
    """One line: CPU seconds in all, and seconds when shared evenly by so many processes."""
    # Spawned, not forked: the parent may hold threads.
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        rows = list(pool.map(_fuse_chunk, range(0, _IMAGES, _CHUNK)))
    spent = sum(seconds for seconds, _ in rows)
    return (
        f"fusion: {_IMAGES} images x {_MEMBERS} members x {_INSTANCES} instances -> {sum(n for _, n in rows)} fused: "
        f"{spent:.1f} CPU s, {spent / processes:.1f} s on {processes} processes"
    )

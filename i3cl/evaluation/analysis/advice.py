"""Why is my F so low? Tries the usual mistakes of result files and says what F each remedy would give."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from i3cl.evaluation.formats.pairing import image_number
from i3cl.evaluation.metrics.batch import EvalImage
from i3cl.evaluation.metrics.metric import DetectionMetric, Summary
from i3cl.evaluation.metrics.protocols import Rules

_IMAGES = 200
"""Images that a trial looks at."""
_GAIN = 0.1
"""F that a remedy must add before it is named."""
_WORDS = 3
"""Additional words that it must find, unless F becomes 0.5: one or two hits in a small set are chance."""
_SIDES = (512, 640, 736, 800, 1024, 1280, 1333, 1600, 1920, 2048)
"""Pixels; sides to which detectors usually scale images."""

Move = Callable[[EvalImage], Sequence[NDArray[np.floating]]]


@dataclass(frozen=True)
class Advice:
    """One mistake that explains the score."""

    kind: str
    text: str
    hmean: float
    """F of the images tried, with the remedy."""


def diagnose(images: Sequence[EvalImage], rules: Rules, threshold: float | None = None) -> list[Advice]:
    """Remedies that would raise F by 0.1 or more, the best first; only the best one of each kind.

    images: all images, as scored; at most 200 of those with truths and detections are tried.
    """
    number = sum(len(s.detections) for s in images)
    if not images or not number:
        return [Advice("empty", f"the results hold no detection: all {len(images)} images are empty", 0.0)]
    advice: list[Advice] = []
    if not any((~np.asarray(s.ignore, bool)).any() for s in images):
        words = "every truth is don't-care" if any(len(s.ignore) for s in images) else "no image of the truth has any text"
        advice.append(Advice("all don't-care", f"{words}: there is nothing to find", 0.0))
    elif not all(s.height and s.width for s in images) and all((np.abs(p) <= 1.5).all() for s in images for p in s.detections):
        text = "coordinates look relative to the image (0-1); multiply by width and height (the truth has no sizes to try)"
        advice.append(Advice("scale", text, 0.0))
    alike = [s for s in images if len(s.detections) and len(s.truths)]
    chosen = (
        [alike[k] for k in np.unique(np.linspace(0, len(alike) - 1, min(len(alike), _IMAGES)).round().astype(int))]
        if alike
        else []
    )
    as_it_is = _summary(chosen, rules, threshold)
    now, found_now = as_it_is.hmean, as_it_is.recall_hits
    if threshold is not None:
        kept = sum(int(np.count_nonzero(s.scores > threshold)) for s in images)
        open_f = _summary(chosen, rules, None).hmean
        if kept == 0:
            highest = max(float(s.scores.max()) for s in images if len(s.scores))
            text = f"no detection has a score above {threshold:g}; the highest is {highest:.3g}; "
            text += f"without a threshold F = {open_f:.3f}"
            return [*advice, Advice("threshold", text, open_f)]
        if open_f >= now + _GAIN:
            advice.append(
                Advice(
                    "threshold",
                    f"the threshold {threshold:g} costs much: without it F = {open_f:.3f} instead of {now:.3f}",
                    open_f,
                )
            )
    empty = sum(not len(s.detections) for s in images)
    if empty > len(images) / 2:
        advice.append(Advice("empty", f"{empty} of {len(images)} images have no detection at all", now))

    best: dict[str, Advice] = {}

    def consider(kind: str, text: str, trial: Sequence[EvalImage]) -> None:
        tried = _summary(trial, rules, threshold)
        f = tried.hmean
        sure = f >= 0.5 or tried.recall_hits >= found_now + _WORDS
        if f >= now + _GAIN and sure and (kind not in best or f > best[kind].hmean):
            best[kind] = Advice(kind, f"{text}: F would be {f:.3f} instead of {now:.3f}", f)

    for kind, text, move in _moves(chosen):
        consider(kind, text, [replace(s, detections=list(move(s))) for s in chosen])
    for text, trial in _other_images(images):
        consider("image ids", text, trial)
    # A shift by a few pixels and a scale can look alike; the one that explains most comes first.
    return advice + sorted(best.values(), key=lambda a: -a.hmean)


def _summary(images: Sequence[EvalImage], rules: Rules, threshold: float | None) -> Summary:
    metric = DetectionMetric(rules)
    metric.update(images)
    return metric.summary(threshold)


def _moves(images: Sequence[EvalImage]) -> Iterator[tuple[str, str, Move]]:
    if not images:
        return
    swapped = "x and y look swapped; read the results in the other order, --point-order yx for files of y, x"
    yield "swapped", swapped, lambda s: [p[:, ::-1] for p in s.detections]
    if all(_is_box(p) for s in images for p in s.detections):
        yield "boxes", "boxes look like x, y, width, height that were written as two corners", _boxes(lambda a, b: (a, a + b))
        yield "boxes", "boxes look like two corners that were written as x, y, width, height", _boxes(lambda a, b: (a, b - a))
    if all(s.height and s.width for s in images):
        for whole in (1, 100, 1000):
            share = "" if whole == 1 else f" / {whole}"
            yield (
                "scale",
                f"coordinates look relative to the image (0-{whole}); multiply by width{share} and height{share}",
                lambda s, whole=whole: [p * (s.width / whole, s.height / whole) for p in s.detections],  # type: ignore[misc]
            )
        yield (
            "flipped",
            "y looks counted from the bottom of the image; write height - y",
            lambda s: [p * (1, -1) + np.array([0, s.height]) for p in s.detections],
        )
    for scale in _scales(images):
        text = f"the results look scaled by {1 / scale[0]:.3g}"
        if abs(scale[0] / scale[1] - 1) > 0.02:
            text += f" in x and {1 / scale[1]:.3g} in y"
        text += f"; multiply them by {scale[0]:.4g}" + (f" and {scale[1]:.4g}" if abs(scale[0] / scale[1] - 1) > 0.02 else "")
        yield "scale", text, lambda s, scale=scale: [p * scale for p in s.detections]  # type: ignore[misc]
    if all(s.height and s.width for s in images):
        for side in _SIDES:
            for name, of in (("long", max), ("short", min)):
                yield (
                    "scale",
                    f"the results look like coordinates of images scaled to a {name} side of {side}; map them back",
                    lambda s, side=side, of=of: [p * (of(s.height, s.width) / side) for p in s.detections],  # type: ignore[misc]
                )
            yield (
                "scale",
                f"the results look like coordinates of images scaled to {side} x {side}; map them back",
                lambda s, side=side: [p * (s.width / side, s.height / side) for p in s.detections],  # type: ignore[misc]
            )
    offset = _offset(images)
    if offset is not None and np.abs(offset).max() >= 1:
        text = f"the results look moved by ({-offset[0]:.0f}, {-offset[1]:.0f}) pixels; add ({offset[0]:.0f}, {offset[1]:.0f})"
        yield "offset", text, lambda s: [p + offset for p in s.detections]


def _is_box(polygon: NDArray[np.floating]) -> bool:
    return len(polygon) == 4 and len(np.unique(polygon[:, 0])) <= 2 and len(np.unique(polygon[:, 1])) <= 2


def _boxes(ends: Callable[[float, float], tuple[float, float]]) -> Move:
    def move(sample: EvalImage) -> list[NDArray[np.float64]]:
        moved = []
        for polygon in sample.detections:
            # Not the smallest and the largest: a box written wrongly may stand with its corners swapped.
            (x0, y0), (x1, y1) = polygon[0], polygon[2]
            (x0, x1), (y0, y1) = ends(x0, x1), ends(y0, y1)
            moved.append(np.array([[x0, y0], [x1, y0], [x1, y1], [x0, y1]], np.float64))
        return moved

    return move


def _scales(images: Sequence[EvalImage]) -> Iterator[NDArray[np.float64]]:
    """Common factors that could take detections to the truth, by the extents and by the sizes of both."""
    extents = []
    for s in images:
        truth, found = np.concatenate(list(s.truths)), np.concatenate(list(s.detections))
        if (found.max(axis=0) > 0).all() and (truth.max(axis=0) > 0).all():
            extents.append(truth.max(axis=0) / found.max(axis=0))
    if not extents:
        return
    ratio = np.array(extents)
    middle = np.median(ratio, axis=0)
    # The mode is right even where most extents are spoiled by a missed or false detection at the border.
    guesses = [middle, np.array([_mode(ratio[:, 0]), _mode(ratio[:, 1])]), np.full(2, _mode(ratio.ravel()))]
    for guess in guesses:
        for fine in (1.0, 0.97, 1.03):
            if np.abs(guess * fine - 1).max() > 0.02:
                yield guess * fine


def _mode(values: NDArray[np.float64]) -> float:
    logs = np.sort(np.log(values))
    width = 0.04
    counts = np.searchsorted(logs, logs + width, side="right") - np.arange(len(logs))
    start = int(counts.argmax())
    return float(np.exp(np.median(logs[start : start + counts[start]])))


def _offset(images: Sequence[EvalImage]) -> NDArray[np.float64] | None:
    """The most frequent difference of a truth's centre to a detection's, (2,) pixels."""
    parts = []
    for s in images:
        truth = np.array([p.mean(axis=0) for p in s.truths])
        found = np.array([p.mean(axis=0) for p in s.detections])
        parts.append((truth[:, None] - found[None]).reshape(-1, 2)[:2000])
    differences = np.concatenate(parts)
    if not len(differences):
        return None
    cells, counts = np.unique(np.floor(differences / 8), axis=0, return_counts=True)
    centre = (cells[counts.argmax()] + 0.5) * 8
    near = differences[(np.abs(differences - centre) <= 8).all(axis=1)]
    return np.median(near, axis=0)


def _other_images(images: Sequence[EvalImage]) -> Iterator[tuple[str, list[EvalImage]]]:
    """The detections of every image given to another one: numbers shifted by one, or counted in another order."""
    if len(images) < 2:
        return
    numbers = [image_number(s.file_name or s.name) for s in images]
    if None not in numbers and len(set(numbers)) == len(numbers):
        at = {number: k for k, number in enumerate(numbers)}
        for shift in (1, -1):
            yield (
                f"image numbers look shifted by {shift:+d}",
                _sampled([(s, images[at[n + shift]]) for s, n in zip(images, numbers) if n + shift in at]),  # type: ignore[operator]
            )
        by_number = sorted(range(len(images)), key=lambda k: numbers[k] or 0)
    else:
        by_number = list(range(len(images)))
    by_text = sorted(range(len(images)), key=lambda k: str(images[k].name))
    for one, other, text in (
        (by_text, by_number, "results look numbered by file names sorted as text (1, 10, 2, ...)"),
        (by_number, by_text, "results look numbered by number where the truth counts names sorted as text"),
    ):
        if one != other:
            yield text, _sampled([(images[a], images[b]) for a, b in zip(one, other)])
    for shift in (1, -1):
        turned = by_number[shift:] + by_number[:shift]
        text = f"results look shifted by {shift:+d} image in the order of the numbers"
        yield text, _sampled([(images[a], images[b]) for a, b in zip(by_number, turned)])


def _sampled(pairs: list[tuple[EvalImage, EvalImage]]) -> list[EvalImage]:
    chosen = pairs[:: max(1, len(pairs) // _IMAGES)]
    return [replace(truth, detections=found.detections, scores=found.scores) for truth, found in chosen]

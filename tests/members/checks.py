"""What every detector behind `Member` must do, on small drawn images."""

from __future__ import annotations

import pickle
import socket
from contextlib import contextmanager
from pathlib import Path

import cv2
import numpy as np
import pytest

from i3cl.config import MemberSettings, ViewSettings
from i3cl.errors import UserError
from i3cl.geometry import overlaps
from i3cl.members.member import Place

VIEW = ViewSettings()


def photo(height: int, width: int, texts: dict[str, tuple[int, int]], scale: float = 1.5, grey: bool = False) -> np.ndarray:
    """A noisy, uneven background of (height, width) pixels with texts, each from its bottom left corner x, y."""
    rng = np.random.default_rng(height + width)
    small = rng.integers(60, 130, (max(2, height // 40), max(2, width // 40), 3)).astype(np.uint8)
    image = cv2.resize(small, (width, height), interpolation=cv2.INTER_CUBIC)
    image = np.clip(image + rng.normal(0, 5, image.shape), 0, 255).astype(np.uint8)
    for text, place in texts.items():
        cv2.putText(image, text, place, cv2.FONT_HERSHEY_DUPLEX, scale, (245, 245, 235), 3, cv2.LINE_AA)
    if grey:
        image = np.repeat(image.mean(axis=2, keepdims=True).astype(np.uint8), 3, axis=2)
    return image


def where(text: str, place: tuple[int, int], scale: float = 1.5) -> np.ndarray:
    """x0, y0, x1, y1 of the drawn letters."""
    (width, height), _ = cv2.getTextSize(text, cv2.FONT_HERSHEY_DUPLEX, scale, 3)
    return np.array([place[0], place[1] - height, place[0] + width, place[1]], float)


def box_iou(a: np.ndarray, b: np.ndarray) -> float:
    low, high = np.maximum(a[:2], b[:2]), np.minimum(a[2:], b[2:])
    both = np.prod(np.clip(high - low, 0, None))
    return float(both / (np.prod(a[2:] - a[:2]) + np.prod(b[2:] - b[:2]) - both))


def check_detections(found, image: np.ndarray) -> None:
    """Of the image's size, every polygon inside of it and with area, every score in 0-1."""
    assert (found.height, found.width) == image.shape[:2]
    for polygon, score in found:
        assert polygon[:, 0].min() >= 0 and polygon[:, 0].max() <= image.shape[1]
        assert polygon[:, 1].min() >= 0 and polygon[:, 1].max() <= image.shape[0]
        assert cv2.contourArea(polygon) > 0
        assert 0 <= score <= 1


def check_any_image(member) -> None:
    """Grey, odd, tiny and very thin images; several at once give what each gives alone."""
    images = [
        photo(97, 163, {"odd": (20, 70)}),
        photo(90, 200, {"grey": (20, 70)}, grey=True),
        np.full((1, 1, 3), 200, np.uint8),
        photo(5, 2000, {}),
        np.ascontiguousarray(photo(3, 500, {}).transpose(1, 0, 2)),
        np.zeros((40, 40, 3), np.uint8),
    ]
    together = member(images, VIEW)
    assert len(together) == len(images)
    for image, found in zip(images, together, strict=True):
        check_detections(found, image)
        (alone,) = member([image], VIEW)
        assert len(alone) == len(found)
        np.testing.assert_allclose(alone.scores, found.scores, atol=1e-5)
        for one, other in zip(alone.polygons, found.polygons, strict=True):
            # Not point by point: a pixel on the edge of a mask may fall to either side, and the outline has another point then.
            assert overlaps([one], [other]).dense_iou()[0, 0] > 0.95
    assert member([], VIEW) == []


@contextmanager
def no_network(monkeypatch):
    """Inside, whoever opens a connection or looks up a host fails the test."""

    def refuse(*arguments, **named):
        raise AssertionError(f"asked for the network: {arguments}")

    with monkeypatch.context() as patch:
        patch.setattr(socket.socket, "connect", refuse)
        patch.setattr(socket, "getaddrinfo", refuse)
        yield


class Trap:
    """What makes a file when it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def check_wrong_files(kind, settings_of, folder: Path, ending: str, others: dict[str, Path]) -> None:
    """Files that are not its weights are one line that names them, and nothing in them is run.

    settings_of: file -> MemberSettings; others: name -> further wrong files.
    """
    sprung = folder / "sprung"
    text, trap, empty = (folder / f"{name}{ending}" for name in ("text", "trap", "empty"))
    text.write_text("404: not found\n")
    trap.write_bytes(pickle.dumps({"weights": Trap(sprung)}))
    empty.write_bytes(b"")
    for file in (text, trap, empty, *others.values()):
        with pytest.raises(UserError) as caught:
            kind.load(settings_of(str(file)), Place())
        message = str(caught.value)
        assert message.startswith("weights: ") and str(file) in message and "\n" not in message, message
    assert not sprung.exists()
    for file, words in ((str(folder / "nowhere.pth"), "no such file"), (str(folder), "is a folder"), ("s3://b/a.pth", "local")):
        for call in (
            lambda file=file: kind.fingerprint(settings_of(file)),
            lambda file=file: kind.load(settings_of(file), Place()),
        ):
            with pytest.raises(UserError, match=words) as caught:
                call()
            assert file in str(caught.value)


def check_fingerprints(*settings, kind) -> None:
    """The first two settings find the same; every further one finds something else than all others."""
    prints = [kind.fingerprint(each) for each in settings]
    assert all(len(each) == 64 for each in prints)
    assert prints[0] == prints[1] == kind.fingerprint(settings[0])
    assert len(set(prints)) == len(prints) - 1


def check_missing_package(kind, settings: MemberSettings, command: str) -> None:
    """A package that is not installed is one line that says which one and how to install it. command: a pattern."""

    class Absent(kind):
        packages = ("no-such-package-i3cl",)

    for call in (lambda: Absent.fingerprint(settings), lambda: Absent.load(settings, Place())):
        with pytest.raises(UserError, match=rf"^use: {settings.use} needs no-such-package-i3cl.*{command}$"):
            call()

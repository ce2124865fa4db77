"""Tiled prediction: every word once and whole, wherever the tiles are cut."""

from __future__ import annotations

import json
import resource
import sys
import threading
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import i3cl
from i3cl import geometry
from i3cl.cli import predict
from i3cl.config import EvaluateSettings, SceneTextSettings, Settings, ViewSettings, load_settings
from i3cl.data.formats.records import ImageRecord
from i3cl.data.synthetic.street import make_scene
from i3cl.errors import UserError
from i3cl.evaluation.metrics.model_score import score_predictions
from i3cl.inference import recipe
from i3cl.inference.predictor import Predictor
from i3cl.inference.tiles import Found, Tile, join, tiles_of

SIDE, OVERLAP = 128, 64


class Rectangles(nn.Module):
    """Finds the white rectangles by their pixels, so that cutting and joining are all that is tested."""

    def __init__(self, room: int = 100) -> None:
        super().__init__()
        self.unused = nn.Parameter(torch.zeros(1))
        self.room = room
        self.batches: list[list[tuple[int, ...]]] = []

    def forward(self, images):
        if len(images) > self.room:
            raise torch.OutOfMemoryError("too many images")
        self.batches.append([tuple(image.shape[1:]) for image in images])
        return [self.one(image) for image in images]

    def one(self, image):
        white = (image[0].numpy() > 128).astype(np.uint8)
        x, y, w, h = cv2.connectedComponentsWithStats(white)[2][1:, :4].T
        boxes = torch.from_numpy(np.stack([x, y, x + w, y + h], axis=1)).float()
        return {"boxes": boxes, "scores": torch.full((len(x),), 0.9), "masks": torch.ones(len(x), 28, 28)}


def predictor(tile: dict | None, network: nn.Module | None = None, size: int = SIDE) -> Predictor:
    data = {"test_short_side": size, "test_long_side": size, "test_upscale": False, "tile": tile}
    return Predictor(network or Rectangles(), Settings.model_validate({"data": data}))


def page(height: int, width: int, words) -> np.ndarray:
    """words: x0, y0, x1, y1."""
    image = np.zeros((height, width, 3), np.uint8)
    for x0, y0, x1, y1 in words:
        image[y0:y1, x0:x1] = 255
    return image


def check(found, words, iou: float = 0.95) -> None:
    """Each word once and whole, and nothing else."""
    corners = [np.array([[a, b], [c, b], [c, d], [a, d]], np.float32) for a, b, c, d in words]
    matrix = geometry.overlaps(corners, found.polygons).dense_iou() if len(found) else np.zeros((len(words), 0))
    assert len(found) == len(words), f"{len(words)} words, {len(found)} found: {found.boxes.tolist()}"
    assert not len(words) or (matrix.max(axis=1) > iou).all(), f"{matrix.max(axis=1)}"
    assert ((found.scores > 0) & (found.scores <= 1)).all()


TILE = {"side": SIDE, "overlap": OVERLAP}
VIEWS = [ViewSettings(), ViewSettings(flip=True), ViewSettings(short_side=256), ViewSettings(short_side=100, flip=True)]


@st.composite
def pages(draw, longest: int):
    """An image and words of 8 to `longest` pixels, at least 8 apart."""
    height, width = draw(st.integers(20, 300)), draw(st.integers(20, 420))
    words, y = [], draw(st.integers(0, 40))
    while (h := draw(st.integers(8, 40))) + y <= height:
        x = draw(st.integers(0, 60))
        while (w := draw(st.integers(8, longest))) + x <= width:
            words.append((x, y, x + w, y + h))
            x += w + draw(st.integers(8, 40))
        y += h + draw(st.integers(8, 40))
    return height, width, words


@settings(max_examples=15, deadline=None)
@given(pages(longest=OVERLAP - 4))
def test_words_up_to_the_overlap_come_out_once_and_whole(drawn):
    height, width, words = drawn
    check(predictor(TILE)([page(height, width, words)])[0], words)


@settings(max_examples=15, deadline=None)
@given(pages(longest=400))
def test_words_longer_than_the_overlap_and_than_a_tile_are_united(drawn):
    height, width, words = drawn
    check(predictor(TILE)([page(height, width, words)])[0], words)


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 360), st.integers(0, 260), st.integers(8, 140), st.integers(8, 140))
def test_a_block_larger_than_the_overlap_both_ways_is_united(x, y, w, h):
    word = (x, y, x + w, y + h)
    check(predictor(TILE)([page(400, 500, [word])])[0], [word])


@pytest.mark.parametrize("length", [6, 30, 60, 64, 70, 130])
def test_no_offset_loses_or_repeats_a_word(length):
    tiled = predictor(TILE)
    for offset in range(0, 330 - length):
        across, down = (offset, 30, offset + length, 50), (30, offset, 50, offset + length)
        check(tiled([page(80, 330, [across])])[0], [across])
        if offset % 7 == 0:
            check(tiled([page(330, 80, [down])])[0], [down])


@pytest.mark.parametrize("view", VIEWS)
def test_views_and_flips_of_tiles_come_back_in_original_pixels(view):
    words = [(x, y, x + 56, y + 24) for y in range(3, 300, 45) for x in range(5, 400, 83)]
    tiled = predictor(TILE, size=256)
    check(tiled([page(330, 480, words)], view)[0], words, 0.9)


@pytest.mark.parametrize("shape", [(100, 500), (500, 100), (128, 129), (129, 128)])
def test_an_image_longer_than_a_tile_in_one_direction_only(shape):
    height, width = shape
    words = [(x, y, x + 40, y + 14) for y in range(2, height - 14, 30) for x in range(3, width - 40, 55)]
    network = Rectangles()
    check(predictor(TILE, network)([page(height, width, words)])[0], words)
    assert {size for batch in network.batches for size in batch} == {(min(height, SIDE), min(width, SIDE))}


def test_an_image_not_larger_than_a_tile_is_predicted_as_without_tiles(tiny_checkpoints, tiny_set):
    image = cv2.imread(str(tiny_set / "images" / "0.jpg"))
    plain = Predictor.load(tiny_checkpoints["a"], "cpu")
    tiled = Predictor.load(tiny_checkpoints["a"], "cpu", {"data.tile": {"side": 96, "overlap": 32}})
    for view in (ViewSettings(), ViewSettings(flip=True)):
        (one,), (other,) = plain([image], view), tiled([image], view)
        assert len(one) and np.array_equal(one.scores, other.scores) and np.array_equal(one.boxes, other.boxes)
        assert all(np.array_equal(p, q) for p, q in zip(one.polygons, other.polygons, strict=True))


def test_large_and_small_images_share_a_call_and_few_tiles_go_through_together():
    words = [(10, 10, 60, 30), (100, 90, 150, 115)]
    images = [page(300, 300, words), page(60, 80, words[:1]), page(300, 300, []), page(128, 128, words[:1])]
    network = Rectangles()
    found = predictor(TILE, network)(images)
    for result, expected, image in zip(found, (words, words[:1], [], words[:1]), images, strict=True):
        check(result, expected)
        assert (result.height, result.width) == image.shape[:2]
    assert max(map(len, network.batches)) == 4


def test_tiles_are_views_of_the_image():
    image = page(300, 500, [])
    assert all(np.shares_memory(tile.cut(image), image) for tile in tiles_of(300, 500, SIDE, OVERLAP))


def test_tiles_that_do_not_fit_into_memory_together_go_through_in_halves():
    words = [(10, 10, 60, 30), (100, 90, 150, 115), (250, 250, 299, 290)]
    network = Rectangles(room=1)
    check(predictor(TILE, network)([page(300, 300, words)])[0], words)
    assert {len(batch) for batch in network.batches} == {1}
    with pytest.raises(torch.OutOfMemoryError):
        predictor(TILE, Rectangles(room=0))([page(300, 300, words)])


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 700), st.integers(1, 700), st.integers(40, 300), st.data())
def test_tiles_cover_the_image_and_share_the_overlap(height, width, side, data):
    overlap = data.draw(st.integers(1, side // 2))
    tiles = tiles_of(height, width, side, overlap)
    for low, high, length in (("x0", "x1", width), ("y0", "y1", height)):
        spans = sorted({(getattr(tile, low), getattr(tile, high)) for tile in tiles})
        assert spans[0][0] == 0 and spans[-1][1] == length
        assert all(end - start == min(side, length) for start, end in spans)
        assert all(before[1] - after[0] >= overlap for before, after in pairwise(spans))


def box(x0, y0, x1, y1) -> np.ndarray:
    return np.array([[x0, y0], [x1, y0], [x1, y1], [x0, y1]], np.float32)


LEFT, RIGHT = Tile(0, 0, 100, 50), Tile(60, 0, 160, 50)


def test_what_one_tile_missed_or_saw_otherwise_is_not_lost():
    found = [
        # Only the left tile finds the first; the second is one word to the left tile and two to the right one.
        Found(LEFT, [box(65, 5, 90, 15), box(64, 25, 96, 35)], np.array([0.6, 0.7], np.float32)),
        Found(RIGHT, [box(64, 25, 79, 35), box(81, 25, 96, 35)], np.array([0.9, 0.8], np.float32)),
    ]
    polygons, scores = join(found, 50, 160)
    boxes = sorted(geometry.polygon_box(p).tolist() for p in polygons)
    assert boxes == [[64, 25, 79, 35], [65, 5, 90, 15], [81, 25, 96, 35]]
    assert sorted(scores.tolist()) == pytest.approx([0.6, 0.8, 0.9])


def test_a_word_within_a_larger_one_stays():
    large, small = box(62, 2, 98, 48), box(70, 10, 90, 20)
    found = [Found(tile, [large, small], np.array([0.9, 0.8], np.float32)) for tile in (LEFT, RIGHT)]
    polygons, _ = join(found, 50, 160)
    assert sorted(map(geometry.polygon_area, polygons)) == [200, 36 * 46]


def test_a_whole_word_takes_the_place_of_its_surer_piece():
    word, piece = box(70, 10, 130, 30), box(70, 12, 99, 28)
    polygons, scores = join(
        [Found(LEFT, [piece], np.array([0.95], np.float32)), Found(RIGHT, [word], np.array([0.5], np.float32))], 50, 160
    )
    assert len(polygons) == 1 and np.array_equal(polygons[0], word) and scores.tolist() == [0.5]


def test_nothing_found_anywhere():
    polygons, scores = join([Found(LEFT, [], np.zeros(0, np.float32))] * 2, 50, 160)
    assert polygons == [] and scores.shape == (0,)


def test_given_tiles_count_else_those_of_the_checkpoint():
    plain = Settings()
    own = Settings.model_validate({"data": {"tile": {"side": 1000, "overlap": 0.2}}})
    asked = recipe.given_size(load_settings(None, ["data.tile={side: 64, overlap: 32}"]))
    off = recipe.given_size(load_settings(None, ["data.tile=null"]))
    assert asked == {"data.tile": {"side": 64, "overlap": 32}} and off == {"data.tile": None}
    assert recipe.tiles(plain) is None and recipe.tiles(own, off) is None
    assert Predictor(Rectangles(), own).tile.overlap_pixels == 200
    assert Predictor(Rectangles(), own, asked).tile.side == 64
    both = {"a": plain, "b": own}
    assert recipe.effective(both, asked) == asked and recipe.effective({"a": plain}, off) == {}
    assert recipe.effective({"b": own}, {"data.tile": {"side": 1000, "overlap": 200}}) == {}, "a share and pixels, the same tiles"
    size = "test size 1185/1950 from the checkpoint"
    assert recipe.describe_sizes({"a": plain}, off) == size
    assert recipe.describe_sizes({"a": plain}, asked) == f"{size}; tiles of 64 px that share 32 (data.tile as given)"
    assert recipe.describe_sizes({"b": own}, {}) == f"{size}; tiles of 1000 px that share 200 from the checkpoint"
    assert recipe.describe_sizes(both, {}).endswith("; a no tiles, b tiles of 1000 px that share 200 from the checkpoints")


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("{side: 64, overlap: 40}", r"data\.tile.*overlap: 40 is more than half of side \(64\)"),
        ("{side: 0}", r"data\.tile\.side"),
        ("{side: 64, overlap: 0}", r"data\.tile\.overlap"),
        ("{overlap: 8}", r"data\.tile\.side"),
        ("64", r"data\.tile"),
    ],
)
def test_impossible_tiles_are_one_line(value, message):
    with pytest.raises(UserError, match=message) as caught:
        load_settings(None, [f"data.tile={value}"])
    assert len(str(caught.value).splitlines()) == 1


def test_predict_with_tiles_says_so_and_refuses_the_folder_of_other_tiles(
    tiny_checkpoints, tiny_set, tmp_path, monkeypatch, capsys
):
    out = tmp_path / "out"
    argv = ["predict", "--checkpoint", tiny_checkpoints["a"], "--images", str(tiny_set / "images" / "0.jpg"), "--score", "0"]

    def call(*more: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", [*argv, "--out", str(out), *more])
        status = 0
        try:
            predict.main()
        except SystemExit as end:
            status = int(end.code or 0)
        return status, *capsys.readouterr()

    status, printed, _ = call("data.tile={side: 64, overlap: 32}")
    assert status == 0 and "tiles of 64 px that share 32 (data.tile as given)" in printed
    found = json.loads((out / "coco.json").read_text())
    assert found and all(0 <= v <= 97 for each in found for v in each["segmentation"][0])
    assert call("data.tile={side: 64, overlap: 0.5}")[0] == 0, "the same tiles"
    for other in (["data.tile={side: 48, overlap: 16}"], []):
        status, _, error = call(*other)
        assert status == 2 and "another data.tile" in error and len(error.splitlines()) == 1


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_scan_of_eighty_million_pixels_finds_what_its_parts_find_in_bounded_memory():
    """The numbers of docs/labelling.md: 270 scenes in one picture, in tiles and one by one."""
    scenes = [make_scene(index, 7, SceneTextSettings(words=12)) for index in range(270)]
    picture = np.full((8000, 10000, 3), 128, np.uint8)
    corners = [np.array([100 + index % 15 * 640, 100 + index // 15 * 427], np.float32) for index in range(len(scenes))]
    for scene, (x, y) in zip(scenes, corners, strict=True):
        height, width = scene.image.shape[:2]
        picture[int(y) : int(y) + height, int(x) : int(x) + width] = scene.image
    instances = [
        replace(word, polygon=word.polygon + corner)
        for scene, corner in zip(scenes, corners, strict=True)
        for word in scene.instances
    ]
    truth = [ImageRecord(1, "scan", 8000, 10000, tuple(instances))]
    network = i3cl.load(device="cpu")

    def score(polygons, scores):
        return score_predictions("scan", truth, {1: (polygons, np.asarray(scores, np.float32))}, EvaluateSettings()).score

    tile = {"data.tile": {"side": 1024, "overlap": 256}, "data.test_short_side": 1024, "data.test_long_side": 1024}
    with peak_memory() as peak:
        (found,) = Predictor(network, network.recipe, tile)([picture])
    tiled = score(found.polygons, found.scores)

    alone = Predictor(network, network.recipe, {"data.test_short_side": 427})
    parts = [alone([scene.image])[0] for scene in scenes]
    moved = [polygon + corner for part, corner in zip(parts, corners, strict=True) for polygon in part.polygons]
    apart = score(moved, np.concatenate([part.scores for part in parts]))

    words = [word.polygon for word in instances if not word.ignore]
    kept = [polygon for polygon, value in zip(found.polygons, found.scores, strict=True) if value > tiled.threshold]
    seen = geometry.overlaps(words, kept).dense_iou().max(axis=1) > 0.5
    tiles = tiles_of(8000, 10000, 1024, 256)
    columns = {x for t in tiles for x in (t.x0, t.x1)}
    rows = {y for t in tiles for y in (t.y0, t.y1)}
    crossed = np.array(
        [
            any(word[:, 0].min() < x < word[:, 0].max() for x in columns)
            or any(word[:, 1].min() < y < word[:, 1].max() for y in rows)
            for word in words
        ]
    )
    at_seams, elsewhere = seen[crossed].mean(), seen[~crossed].mean()
    print(
        f"{len(words)} words, {crossed.sum()} across a border: F {tiled.hmean:.3f} in tiles, {apart.hmean:.3f} one by one; found "
        f"{at_seams:.3f} across a border, {elsewhere:.3f} elsewhere; {peak[0] / 1e9:.2f} GB beyond the picture"
    )
    assert tiled.hmean > apart.hmean - 0.01 and at_seams > elsewhere - 0.02
    assert peak[0] < 2.5e9


@contextmanager
def peak_memory():
    """In a list: by how many bytes the memory of this process has grown at most so far."""

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()

    before, peak, done = resident(), [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.02):
            peak[0] = max(peak[0], resident() - before)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield peak
    finally:
        done.set()
        watcher.join()

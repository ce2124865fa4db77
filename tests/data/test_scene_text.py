from __future__ import annotations

import json

import cv2
import numpy as np
import pytest
import shapely

from i3cl.config import SceneTextSettings
from i3cl.data.formats.coco import read_coco
from i3cl.data.synthetic import bend, fonts, street, words
from i3cl.data.synthetic.backgrounds import background
from i3cl.data.synthetic.street import make_scene
from i3cl.data.synthetic.street_set import write_scene_text
from i3cl.errors import UserError
from i3cl.geometry import clip_polygon, short_side, to_shapely
from i3cl.report.sheet import contact_sheet, write_contact_sheet

SMALL = SceneTextSettings(width=256, height=192, size=18, images_per_part=2)


def ink_outlines(mask, polygons):
    """The ink of each word: the pixels of `mask` that lie in its polygon grown by 3 pixels and in no other one."""
    for place, polygon in enumerate(polygons):
        others = shapely.union_all(to_shapely([p for i, p in enumerate(polygons) if i != place]))
        near = shapely.buffer(to_shapely([polygon])[0], 3).difference(others)
        y, x = np.nonzero(mask > 100)
        yield np.stack([x, y], 1)[shapely.contains_xy(near, x + 0.5, y + 0.5)] + 0.5


@pytest.mark.parametrize("kind", ["straight", "arc", "sine"])
def test_polygons_are_tight_around_the_ink(kind, monkeypatch):
    """Letters are rendered alone; no ink may lie outside its polygon, and every edge of the band touches ink."""
    checked = 0
    settings = SMALL.model_copy(update={"width": 640, "height": 480, "cjk": 0.0})
    faces = fonts.find_faces()
    for seed in range(25):
        rng = np.random.default_rng(seed)
        line = street._draw_line(rng, ["Sign", "made", "BY"], street._face(rng, faces, "latin"), "latin", 40, 900)
        if kind != "straight":
            # The first draw of bend_line chooses between arc and sine.
            seeds = range(1000 * seed, 1000 * seed + 99)
            fitting = next(s for s in seeds if (np.random.default_rng(s).random() < 0.65) == (kind == "arc"))
            line = bend.bend_line(np.random.default_rng(fitting), line, 12)
        group = street._stack(rng, [line], 0, 40)
        placed = street._place(rng, (480, 640), group.mask.shape, np.zeros((121, 161)), np.zeros((120, 160), np.uint8))
        assert placed is not None
        matrix, _ = placed
        shift = np.array([[1, 0, 0.5], [0, 1, 0.5], [0, 0, 1]])
        mask = cv2.warpPerspective(group.mask, np.linalg.inv(shift) @ matrix @ shift, (640, 480))
        inside = [i.polygon for i in street._instances(group, matrix, settings) if not i.ignore]
        for polygon, ink in zip(inside, ink_outlines(mask, inside), strict=True):
            if clip_polygon(polygon, 638, 478) is None or short_side(polygon) < 12:
                continue
            ring = to_shapely([polygon])[0]
            outside = ~shapely.contains_xy(ring.buffer(1.0), ink[:, 0], ink[:, 1])
            assert outside.mean() < 0.01
            half = len(polygon) // 2
            sides = (polygon[:half], polygon[half - 1 : half + 1], polygon[half:], polygon[[-1, 0]])
            distances = [shapely.distance(shapely.points(ink), shapely.LineString(side)).min() for side in sides]
            assert max(distances) < 1.8, "the ink reaches all four sides"
            if kind == "straight":
                flat = street._map(ink, np.linalg.inv(matrix))
                (x0, y0), (x1, y1) = flat.min(axis=0) - 0.5, flat.max(axis=0) + 0.5
                hull = to_shapely([street._map(np.array([(x0, y0), (x1, y0), (x1, y1), (x0, y1)]), matrix)])[0]
                assert hull.intersection(ring).area / hull.union(ring).area > 0.9, "hull of the ink along the line"
            checked += 1
    assert checked > 20


@pytest.mark.parametrize("radius", [150.0, -90.0])
def test_arc_maps_are_inverse(radius):
    forward, inverse = bend._arc(radius, 200.0, 40.0)
    points = np.random.default_rng(0).uniform(0, 1, (50, 2)) * [200, 40]
    bent = forward(points).astype(np.float32)
    assert np.allclose(np.stack(inverse(bent[:, 0], bent[:, 1]), 1), points, atol=0.01)


def test_an_image_depends_on_seed_and_index_alone():
    first, again = make_scene(5, 3, SMALL), make_scene(5, 3, SMALL)
    assert np.array_equal(first.image, again.image) and first.quality == again.quality
    assert [i.text for i in first.instances] == [i.text for i in again.instances]
    assert not np.array_equal(first.image, make_scene(6, 3, SMALL).image)
    assert not np.array_equal(first.image, make_scene(5, 4, SMALL).image)


def test_words_lie_inside_and_carry_text():
    count = 0
    for index in range(20):
        scene = make_scene(index, 0, SMALL)
        assert scene.image.shape == (192, 256, 3) and scene.image.dtype == np.uint8
        for word in scene.instances:
            assert word.text and word.language in ("latin", "digits", "cjk")
            assert len(word.polygon) >= 3 and (word.polygon >= -1e-3).all()
            assert (word.polygon <= np.array([256, 192]) + 1e-3).all()
            assert word.ignore or short_side(word.polygon) > 3
            count += 1
    assert count > 60


def test_words_do_not_overlap():
    for index in range(10):
        polygons = to_shapely([i.polygon for i in make_scene(index, 0, SMALL).instances])
        for i, j in shapely.STRtree(polygons).query(polygons).T:
            if i < j:
                assert polygons[i].intersection(polygons[j]).area <= 0.15 * min(polygons[i].area, polygons[j].area)


@pytest.mark.parametrize(
    "changes",
    [
        {"latin": 0, "digits": 0, "cjk": 1},
        {"curved": 1.0, "words": 30},
        {"size": 300.0},
        {"size": 3.0, "size_spread": 0.0},
        {"width": 64, "height": 64},
        {"width": 1500, "height": 80, "noise": 5.0},
        {"noise": 0, "blur": 0, "clutter": 0, "photographs": 1},
    ],
)
def test_unusual_settings_make_scenes(changes):
    settings = SceneTextSettings.model_validate(SMALL.model_dump() | changes)
    for index in range(4):
        assert make_scene(index, 0, settings).image.shape == (settings.height, settings.width, 3)


def test_tiny_words_are_ignored():
    settings = SMALL.model_copy(update={"size": 5.0, "size_spread": 0.0, "ignore_below": 30.0})
    scenes = [make_scene(index, 0, settings) for index in range(5)]
    assert all(word.ignore for scene in scenes for word in scene.instances)
    assert any(scene.instances for scene in scenes)


def test_every_typeface_has_the_letters_of_the_words():
    rng = np.random.default_rng(0)
    text = set("".join(words.latin_word(rng) + words.digits_word(rng) for _ in range(500))) & set(map(chr, range(33, 127)))
    for family in fonts.find_faces().latin:
        assert fonts.covers(family[0], "".join(text)), family[0]


def test_own_typefaces_and_photographs(tmp_path):
    with pytest.raises(UserError, match=r"scene_text\.fonts"):
        fonts.find_faces(str(tmp_path))
    (tmp_path / "broken.ttf").write_bytes(b"no font")
    with pytest.raises(UserError, match=r"broken\.ttf"):
        fonts.find_faces(str(tmp_path) + "/")
    with pytest.raises(UserError, match=r"scene_text\.backgrounds"):
        background(np.random.default_rng(0), 64, 64, 1.0, str(tmp_path))
    folder = tmp_path / "photographs"
    folder.mkdir()
    cv2.imwrite(str(folder / "red.png"), np.full((50, 90, 3), (0, 0, 200), np.uint8))
    picture = background(np.random.default_rng(0), 64, 96, 1.0, str(folder))
    assert picture.shape == (64, 96, 3) and picture[..., 0].mean() > 60 and picture[..., 1:].max() == 0


def test_a_set_is_whole_resumable_and_does_not_depend_on_the_parts(tmp_path):
    first = write_scene_text(SMALL, str(tmp_path / "a"), 5, 1, in_process=9)
    dataset = read_coco(first, str(tmp_path / "a"))
    assert [r.id for r in dataset.records] == [1, 2, 3, 4, 5]
    other = SMALL.model_copy(update={"images_per_part": 5})
    write_scene_text(other, str(tmp_path / "b"), 5, 1)
    names = [f"{i:08d}.jpg" for i in range(5)]
    content = {name: next((tmp_path / "a").rglob(name)).read_bytes() for name in names}
    assert content == {name: next((tmp_path / "b").rglob(name)).read_bytes() for name in names}
    (tmp_path / "a" / "set.json").unlink()
    (tmp_path / "a" / "set.parquet" / "part-00001.parquet").unlink()
    stamp = (tmp_path / "a" / "part-00000" / names[0]).stat().st_mtime_ns
    assert write_scene_text(SMALL, str(tmp_path / "a"), 5, 1, in_process=9) == first
    assert content == {name: next((tmp_path / "a").rglob(name)).read_bytes() for name in names}
    assert (tmp_path / "a" / "part-00000" / names[0]).stat().st_mtime_ns == stamp, "what is there is not made again"
    shards = write_scene_text(SMALL, str(tmp_path / "a"), 5, 1, table=True, in_process=9)
    assert len(read_coco(shards, str(tmp_path / "a")).records) == 5
    with pytest.raises(UserError, match="other seed"):
        write_scene_text(SMALL, str(tmp_path / "a"), 5, 2)
    sheet = contact_sheet(dataset, 4, 2, 80)
    assert sheet.shape == (120, 160, 3)
    write_contact_sheet(str(tmp_path / "sheet.png"), dataset, 2, 2, 40)
    assert cv2.imread(str(tmp_path / "sheet.png")).shape == (30, 80, 3)
    with pytest.raises(UserError, match=r"\.jpg"):
        write_contact_sheet(str(tmp_path / "sheet.pdf"), dataset)


def test_bad_numbers_and_notes_are_named(tmp_path):
    with pytest.raises(UserError, match="at least 1"):
        write_scene_text(SMALL, str(tmp_path), 0, 0)
    with pytest.raises(UserError, match=r"correct scene_text\.backgrounds"):
        write_scene_text(SMALL.model_copy(update={"backgrounds": str(tmp_path / "none")}), str(tmp_path), 1, 0)
    assert not list(tmp_path.iterdir())
    (tmp_path / "scene_text.json").write_text(json.dumps({})[:1])
    with pytest.raises(UserError, match="not readable"):
        write_scene_text(SMALL, str(tmp_path), 1, 0)
    with pytest.raises(ValueError, match="at least 0"):
        make_scene(-1, 0, SMALL)

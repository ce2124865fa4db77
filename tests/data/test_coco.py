import copy
import json
import math
import time

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import shapely
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pycocotools import mask as mask_codec

from i3cl import geometry
from i3cl.data.formats import checks
from i3cl.data.formats import records as records_module
from i3cl.data.formats.coco import read_coco, write_coco
from i3cl.data.formats.join import join_same_files
from i3cl.data.formats.records import ImageRecord, Instance
from i3cl.data.formats.table import write_parquet
from i3cl.errors import UserError

SQUARE = [10, 20, 30, 20, 30, 40, 10, 40]


def small() -> dict:
    """A right file: two images of 100 x 60, three annotations."""
    return {
        "images": [
            {"id": 1, "file_name": "a.jpg", "height": 60, "width": 100},
            {"id": 2, "file_name": "sub/b.jpg", "height": 60, "width": 100},
        ],
        "categories": [{"id": 7, "name": "Text"}],
        "annotations": [
            {"id": 1, "image_id": 1, "category_id": 7, "segmentation": [SQUARE], "bbox": [10, 20, 20, 20]},
            {
                "id": 2,
                "image_id": 1,
                "category_id": 7,
                "segmentation": [SQUARE],
                "iscrowd": 1,
                "lossweight": 0.25,
            },
            {
                "id": 3,
                "image_id": 2,
                "category_id": 7,
                "bbox": [1, 2, 3, 4],
                "score": 0.5,
                "votes": 2,
                "ignore": False,
            },
        ],
    }


@pytest.fixture
def read(tmp_path):
    (tmp_path / "images" / "sub").mkdir(parents=True)
    (tmp_path / "images" / "a.jpg").touch()
    (tmp_path / "images" / "sub" / "b.jpg").touch()

    def call(content, **options):
        path = tmp_path / "file.json"
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        return read_coco(str(path), str(tmp_path / "images"), **options)

    return call


def test_reads_a_right_file(read, tmp_path):
    data = read(small())
    assert data.name == "file" and len(data) == 2 and not data.problems
    assert data.summary() == "file: 2 images, 2 instances, 1 ignore regions"
    first, second = data.records
    assert (first.id, first.file_name, first.height, first.width) == (1, "a.jpg", 60, 100)
    plain, crowd = first.instances
    assert plain.polygon.dtype == np.float32
    np.testing.assert_array_equal(plain.polygon, [[10, 20], [30, 20], [30, 40], [10, 40]])
    assert not plain.ignore and plain.lossweight == 1 and plain.score is None and plain.votes is None
    assert crowd.ignore and crowd.lossweight == 0.25
    (boxed,) = second.instances
    np.testing.assert_array_equal(boxed.polygon, [[1, 2], [4, 2], [4, 6], [1, 6]])
    assert boxed.score == 0.5 and boxed.votes == 2 and not boxed.ignore
    assert data.path(second) == str(tmp_path / "images") + "/sub/b.jpg"


def test_unlabelled_images_need_neither_annotations_nor_categories(read):
    content = {"images": small()["images"]}
    assert [len(r.instances) for r in read(content).records] == [0, 0]
    assert len(read({"images": [], "annotations": []})) == 0


def put(where: str, value):
    """A change of the small file: '/images/0/id' -> value; ... removes it."""

    def change(content: dict) -> None:
        *path, last = [int(k) if k.isdigit() else k for k in where.strip("/").split("/")]
        node = content
        for key in path:
            node = node[key]
        if value is ...:
            del node[last]
        else:
            node[last] = value

    return change


BAD = [
    # what is changed, the kind in the summary, what the message says
    (put("images/0/file_name", "c.jpg"), "missing image", r"image 1: .*c\.jpg is not there"),
    (put("images/0/file_name", "sub"), "missing image", "is not there"),
    (
        put("images/0/file_name", "../a.jpg"),
        "file name",
        "image 1: file_name '../a.jpg' leaves the images root",
    ),
    (put("images/0/file_name", "sub/../../a.jpg"), "file name", "leaves the images root"),
    (put("images/0/file_name", "/etc/passwd"), "file name", "leaves the images root"),
    (put("images/0/file_name", "~/a.jpg"), "file name", "leaves the images root"),
    (put("images/0/file_name", "..\\a.jpg"), "file name", "leaves the images root"),
    (put("images/0/file_name", "C:a.jpg"), "file name", "leaves the images root"),
    (put("images/0/file_name", "http://host/a.jpg"), "file name", "leaves the images root"),
    (put("images/0/file_name", "s3://bucket/a.jpg"), "file name", "leaves the images root"),
    (put("images/0/file_name", "a\0.jpg"), "file name", "no path can hold"),
    (put("images/0/file_name", "a\ud800.jpg"), "file name", "no path can hold"),
    (put("images/0/file_name", "a\n.jpg"), "file name", "no path can hold"),
    (put("images/0/file_name", "sub/"), "file name", "names a folder"),
    (put("images/0/file_name", "."), "file name", "names a folder"),
    (put("images/0/file_name", ""), "type", "file_name is ''"),
    (put("images/0/file_name", None), "type", "file_name is missing"),
    (put("images/0/file_name", 5), "type", "file_name is 5"),
    (put("images/0", "a.jpg"), "type", "image number 1 of the list: is a string"),
    (put("images/0/id", "1"), "type", "image number 1 of the list: id is '1'"),
    (put("images/0/id", True), "type", "id is True"),
    (put("images/0/id", 10**40), "type", "id is a huge number"),
    (put("images/0/id", 1.5), "type", "id is 1.5"),
    (put("images/1/id", 1), "duplicate image id", "image 1: occurs twice"),
    (put("images/0/height", 0), "image size", "image 1: height is 0"),
    (put("images/0/width", "100"), "image size", "width is '100'"),
    (put("images/0/width", ...), "image size", "width is missing"),
    (put("images/0/width", 10**9), "image size", "width is 1000000000"),
    (put("annotations/0", [1]), "type", "annotation number 1 of the list: is a list"),
    (put("annotations/0/id", ...), "type", "id is missing"),
    (put("annotations/1/id", 1), "duplicate annotation id", "annotation 1: occurs twice"),
    (put("annotations/0/image_id", 9), "unknown image", "annotation 1: image_id 9 is not in images"),
    (put("annotations/0/image_id", "1"), "type", "image_id is '1'"),
    (put("annotations/0/category_id", 8), "unknown category", "category_id 8 is not in categories"),
    (put("annotations/0/category_id", [7]), "unknown category", "category_id a list of 1"),
    (put("annotations/0/segmentation", [SQUARE[:4]]), "polygon", "4 numbers; it needs"),
    (put("annotations/0/segmentation", [SQUARE[:7]]), "polygon", "7 numbers; it needs"),
    (put("annotations/0/segmentation", [[]]), "polygon", "0 numbers"),
    (put("annotations/0/segmentation", [[*SQUARE[:7], math.nan]]), "coordinates", "not finite"),
    (put("annotations/0/segmentation", [[*SQUARE[:7], -math.inf]]), "coordinates", "not finite"),
    (put("annotations/0/segmentation", [[*SQUARE[:7], 10**400]]), "coordinates", "not finite"),
    (put("annotations/0/segmentation", [[*SQUARE[:7], "4"]]), "type", "write a list of numbers"),
    (put("annotations/0/segmentation", [[*SQUARE[:7], None]]), "type", "write a list of numbers"),
    (put("annotations/0/segmentation", [[*SQUARE[:7], True]]), "type", "write a list of numbers"),
    (put("annotations/0/segmentation", "polygon"), "type", "segmentation is a string"),
    (put("annotations/0/segmentation", [SQUARE, "x"]), "type", "segmentation holds 'x'"),
    (
        put("annotations/0/segmentation", [[200, 20, 230, 20, 230, 40]]),
        "outside",
        "is outside the image of 100 x 60",
    ),
    (put("annotations/0/segmentation", [[-5, -5, 0, -5, 0, 0]]), "outside", "is outside the image"),
    (put("annotations/0/segmentation", [[10, 10, 20, 20, 30, 30]]), "zero area", "no area"),
    (put("annotations/0/segmentation", [[10, 10] * 4]), "zero area", "no area"),
    (put("annotations/0/segmentation", [[90, -30, 190, 70, 191, 70]]), "outside", "nothing of it is inside"),
    (put("annotations/2/bbox", [1, 2, 0, 4]), "zero area", "bbox is 0 x 4"),
    (put("annotations/2/bbox", [1, 2, 3]), "type", "bbox is a list of 3"),
    (put("annotations/2/bbox", [1, 2, 3, math.inf]), "coordinates", "bbox is not finite"),
    (put("annotations/2/bbox", ...), "polygon", r"neither segmentation nor bbox"),
    (put("annotations/0/lossweight", -1), "lossweight", "lossweight is -1; write a finite number from 0"),
    (put("annotations/0/lossweight", math.nan), "lossweight", "lossweight is nan"),
    (put("annotations/0/lossweight", math.inf), "lossweight", "lossweight is inf"),
    (put("annotations/0/lossweight", 1e300), "lossweight", r"lossweight is 1e\+300"),
    (put("annotations/0/lossweight", "1"), "lossweight", "lossweight is '1'"),
    (put("annotations/0/lossweight", True), "lossweight", "lossweight is True"),
    (put("annotations/0/score", 1.5), "score", "score is 1.5; write a number from 0 to 1"),
    (put("annotations/0/votes", 1.5), "type", "votes is 1.5"),
    (put("annotations/0/iscrowd", 2), "type", "iscrowd is 2; write 0 or 1"),
    (put("annotations/0/ignore", "0"), "type", "ignore is '0'"),
    (put("annotations/0/segmentation", {"size": [60, 100]}), "type", "RLE counts is missing"),
    (put("annotations/0/segmentation", {"size": [100, 60], "counts": [6000]}), "rle", "RLE size"),
    (put("annotations/0/segmentation", {"size": [60, 100], "counts": [6001]}), "rle", "do not add up"),
    (put("annotations/0/segmentation", {"size": [60, 100], "counts": [-1, 6001]}), "rle", "do not add up"),
    (put("annotations/0/segmentation", {"size": [60, 100], "counts": [6000]}), "zero area", "mask is empty"),
    (put("annotations/0/segmentation", {"size": [60, 100], "counts": "~~~"}), "rle", "not a COCO RLE string"),
    (
        put("annotations/0/segmentation", {"size": [60, 100], "counts": "oooooooooooo"}),
        "rle",
        "not a COCO RLE",
    ),
    (put("annotations/0/segmentation", {"size": [60, 100], "counts": "o"}), "rle", "middle of a number"),
]


@pytest.mark.parametrize(("change", "kind", "message"), BAD)
def test_a_bad_item_is_named_and_can_be_skipped(read, change, kind, message):
    content = small()
    change(content)
    with pytest.raises(UserError, match=message) as caught:
        read(content)
    text = str(caught.value)
    assert "file.json: " in text and "\n" not in text and "skip_bad" in text and len(text) < 400
    data = read(content, skip_bad=True)
    assert data.problems[0].kind == kind and data.problems[0].left_out
    assert f"1 {kind}" in data.summary()
    # What is bad goes alone, but an image takes its annotations with it.
    gone = 3 - sum(len(r.instances) for r in data.records)
    assert gone == sum("annotation" in p.where for p in data.problems)
    assert len(data.records) == 2 - sum("image" in p.where.split(": ")[1] for p in data.problems)


WHOLE = [
    ("[]", "is a list, not a COCO object"),
    ("null", "is null, not a COCO object"),
    ("{}", "images is missing"),
    ('{"images": {}}', "images is an object; a COCO file has a list there"),
    ('{"images": [], "annotations": 3}', "annotations is a number"),
    ('{"images": [], "categories": [{"id": 1}]}', "categories: an object of 1 is not"),
    ('{"images": [], "categories": [{"id": 1, "name": "cat"}]}', "0 of 1 are named 'text'"),
    (
        '{"images": [], "categories": [{"id": 1, "name": "text"}, {"id": 2, "name": "text"}]}',
        "2 of 2 are named 'text'",
    ),
    (
        '{"images": [], "categories": [{"id": 1, "name": "text"}, {"id": 1, "name": "a"}]}',
        "id 1 occurs twice",
    ),
    ('{"images": [\n  1,,\n]}', "line 2 column 5: not valid JSON"),
    ("", "line 1 column 1: not valid JSON"),
    ("[" * 100_000, "nested too deeply"),
    ("1" * 5000, "not usable JSON"),
]


@pytest.mark.parametrize(("text", "message"), WHOLE)
def test_a_file_that_is_no_coco_file_is_refused_even_with_skip_bad(read, text, message):
    for skip_bad in (False, True):
        with pytest.raises(UserError, match=message) as caught:
            read(text, skip_bad=skip_bad)
        assert "\n" not in str(caught.value)


def test_missing_files(tmp_path):
    with pytest.raises(UserError, match=r"none\.json: no such file"):
        read_coco(str(tmp_path / "none.json"), str(tmp_path))
    with pytest.raises(UserError, match=r"none\.parquet: no such file"):
        read_coco(str(tmp_path / "none.parquet"), str(tmp_path))


def test_files_are_only_looked_for_when_asked(tmp_path):
    (tmp_path / "file.json").write_text(json.dumps(small()))
    assert len(read_coco(str(tmp_path / "file.json"), str(tmp_path / "none"), check_files=False)) == 2
    with pytest.raises(UserError, match="is not there"):
        read_coco(str(tmp_path / "file.json"), str(tmp_path / "none"))


def test_other_classes_may_be_listed_but_not_used(read):
    content = small()
    content["categories"] += [{"id": 8, "name": "a"}, {"id": 9, "name": "b"}]
    assert len(read(content)) == 2
    content["annotations"][0]["category_id"] = 8
    with pytest.raises(UserError, match="annotation 1: category_id 8 is not 'text'"):
        read(content)


def test_partly_outside_is_clipped_and_counted(read):
    content = small()
    content["annotations"][0]["segmentation"] = [[90, 20, 110, 20, 110, 40, 90, 40]]
    data = read(content)
    polygon = data.records[0].instances[0].polygon
    np.testing.assert_array_equal(geometry.polygon_box(polygon), [90, 20, 100, 40])
    assert [(p.kind, p.left_out) for p in data.problems] == [("clipped", False)]
    assert "repaired: 1 clipped" in data.summary()


def test_the_largest_part_is_kept(read):
    content = small()
    content["annotations"][0]["segmentation"] = [[1, 1, 3, 1, 3, 3], SQUARE, [5, 5, 8, 5, 8, 8]]
    data = read(content)
    assert geometry.polygon_area(data.records[0].instances[0].polygon) == 400
    assert [p.message for p in data.problems] == ["the largest of 3 parts is kept"]


@pytest.mark.parametrize("segmentation", [None, [], ...])
def test_without_segmentation_the_box_is_the_polygon(read, segmentation):
    content = small()
    put("annotations/0/segmentation", segmentation)(content)
    polygon = read(content).records[0].instances[0].polygon
    np.testing.assert_array_equal(polygon, np.reshape(SQUARE, (4, 2)))


def test_flat_and_closed_polygons(read):
    content = small()
    content["annotations"][0]["segmentation"] = [*SQUARE, *SQUARE[:2]]
    np.testing.assert_array_equal(read(content).records[0].instances[0].polygon, np.reshape(SQUARE, (4, 2)))


CROSSED = [10, 10, 50, 10, 10, 30, 50, 30]
"""Corners row by row, as some tools write them."""


def test_a_crossed_quadrilateral_becomes_its_hull_and_is_counted(read):
    content = small()
    content["annotations"][0]["segmentation"] = [CROSSED]
    data = read(content)
    assert geometry.polygon_area(data.records[0].instances[0].polygon) == 800
    assert [(p.kind, p.left_out) for p in data.problems] == [("crossing", False)]


def test_a_crossed_word_beside_a_speck_is_the_largest_part(read):
    content = small()
    content["annotations"][0]["segmentation"] = [CROSSED, [80, 40, 82, 40, 82, 42]]
    data = read(content)
    assert geometry.polygon_area(data.records[0].instances[0].polygon) == 800
    assert [p.kind for p in data.problems] == ["parts", "crossing"]


def test_a_longer_crossing_ring_becomes_its_largest_part(read):
    content = small()
    content["annotations"][0]["segmentation"] = [[10, 10, 50, 10, 50, 30, 45, 35, 45, 25, 50, 26, 50, 30, 10, 30]]
    (polygon, _) = (i.polygon for i in read(content).records[0].instances)
    assert shapely.Polygon(polygon).is_valid and 780 < geometry.polygon_area(polygon) < 820


def test_numbers_written_as_text_are_named(read):
    for key, value in (("bbox", ["10", "20", "30", "40"]), ("segmentation", [["10", 1, 20, 1, 20, 20]])):
        content = small()
        content["annotations"][2] |= {"segmentation": None, key: value}
        with pytest.raises(UserError, match=rf"annotation 3: {key} holds '10'; write"):
            read(content)


@pytest.mark.parametrize("other_first", [False, True])
def test_one_file_under_two_ids(read, tmp_path, other_first):
    content = small()
    entry = {"id": 5, "file_name": "./a.jpg", "height": 60, "width": 100}
    content["images"] = [entry, *content["images"]] if other_first else [*content["images"], entry]
    double = {"id": 9, "image_id": 5, "category_id": 7, "segmentation": [[11, 20, 30, 20, 30, 40, 11, 40]]}
    new = {"id": 10, "image_id": 5, "category_id": 7, "segmentation": [[60, 20, 80, 20, 80, 40, 60, 40]]}
    content["annotations"] += [double, new]
    with pytest.raises(UserError, match=r"image (1|5): is the file 'a\.jpg', as image (1|5) is; .*--join-same-files"):
        read(content)
    left = read(content, skip_bad=True)
    assert [r.id for r in left.records] == [2], "each entry lacks words of the other one"
    assert sorted(p.kind for p in left.problems if p.kind != "image left out") == ["same file", "same file"]
    both = read(content, same_files=True)
    assert len(both) == 3
    joined = {r.file_name: r for r in join_same_files(both.records)}
    assert len(joined) == 2 and joined["a.jpg"].id == (5 if other_first else 1)
    words = [i for i in joined["a.jpg"].instances if not i.ignore]
    assert sorted(int(i.polygon[:, 0].max()) for i in words) == [30, 80], "the word that both have is kept once"
    # The same of a Parquet table.
    write_parquet(str(tmp_path / "t.parquet"), both.records, "")
    with pytest.raises(UserError, match=r"image (1|5): is the file 'a\.jpg', as image (1|5) is"):
        read_coco(str(tmp_path / "t.parquet"), "", check_files=False)
    table = read_coco(str(tmp_path / "t.parquet"), "", check_files=False, skip_bad=True)
    assert [r.id for r in table.records] == [2] and [p.kind for p in table.problems] == ["same file", "same file"]
    assert len(read_coco(str(tmp_path / "t.parquet"), "", check_files=False, same_files=True)) == 3


def test_entries_of_a_file_that_disagree_on_its_size_are_not_joined(read):
    content = small()
    content["images"].append({"id": 5, "file_name": "a.jpg", "height": 100, "width": 60})
    with pytest.raises(UserError, match=r"a\.jpg: image 1 says 100 x 60 and image 5 says 60 x 100"):
        list(join_same_files(read(content, same_files=True).records))


def test_an_image_of_unreadable_labels_is_not_one_without_text(read):
    content = small()
    content["annotations"][2]["segmentation"] = {"size": [60, 100], "counts": "?"}
    data = read(content, skip_bad=True)
    assert [r.id for r in data.records] == [1]
    assert [p.kind for p in data.problems] == ["rle", "no label readable"]
    assert "image 2: none of its 1 annotations can be read" in str(data.problems[1])
    # What is read as something else than text hides none.
    content = small()
    content["categories"].append({"id": 8, "name": "logo"})
    content["annotations"][2]["category_id"] = 8
    assert [len(r.instances) for r in read(content, skip_bad=True).records] == [2, 0]


@pytest.mark.parametrize("packed", [True, False])
def test_rle_becomes_its_outline(read, packed):
    angles = np.linspace(0, 2 * np.pi, 60, endpoint=False)
    ellipse = np.stack([50 + 30 * np.cos(angles), 30 + 12 * np.sin(angles)], axis=1)
    mask = mask_codec.decode(mask_codec.frPyObjects([ellipse.ravel().tolist()], 60, 100))[..., 0]
    mask[2:4, 2:5] = 1
    rle = mask_codec.encode(np.asfortranarray(mask))
    counts = rle["counts"].decode()
    if not packed:
        flat = mask.T.ravel()
        edges = np.flatnonzero(np.diff(np.concatenate([[0], flat, [1 - flat[-1]]])))
        counts = np.diff(np.concatenate([[0], edges])).tolist()
    content = small()
    content["annotations"][0]["segmentation"] = {"size": [60, 100], "counts": counts}
    data = read(content)
    polygon = data.records[0].instances[0].polygon
    assert geometry.overlaps([polygon], [ellipse]).iou[0] > 0.95
    assert [p.message for p in data.problems] == ["the largest of 2 parts is kept"]


@pytest.mark.parametrize(("top", "left", "bottom", "right"), [(0, 0, 60, 100), (5, 7, 6, 8), (5, 7, 6, 40)])
def test_rle_of_a_rectangle_is_exact(read, top, left, bottom, right):
    mask = np.zeros((60, 100), np.uint8)
    mask[top:bottom, left:right] = 1
    counts = mask_codec.encode(np.asfortranarray(mask))["counts"].decode()
    content = small()
    content["annotations"][0]["segmentation"] = {"size": [60, 100], "counts": counts}
    polygon = read(content).records[0].instances[0].polygon
    np.testing.assert_allclose(geometry.polygon_box(polygon), [left, top, right, bottom])
    assert geometry.polygon_area(polygon) == (bottom - top) * (right - left)


def test_runs_unpack_as_pycocotools_packs_them():
    rng = np.random.default_rng(0)
    for side in (1, 7, 300):
        mask = np.asfortranarray(rng.integers(0, 2, (side, side)).astype(np.uint8))
        runs = checks._unpack_runs(mask_codec.encode(mask)["counts"].decode())
        np.testing.assert_array_equal(np.repeat(np.arange(len(runs)) & 1, runs).reshape(side, side).T, mask)


# ------------------------------------------------------------------------------------------------ round trips


def records() -> list[ImageRecord]:
    rng = np.random.default_rng(1)
    polygon = lambda: (np.reshape(SQUARE, (4, 2)) + rng.uniform(0, 5, (4, 2))).astype(np.float32)  # noqa: E731
    return [
        ImageRecord(5, "a.jpg", 60, 100, (Instance(polygon()), Instance(polygon(), True, 0.5, 0.25, 3))),
        ImageRecord(3, "sub/ü.jpg", 60, 100, (Instance(polygon(), score=0.0, votes=0),)),
        ImageRecord(9, "empty.jpg", 60, 100),
    ]


def same(first: ImageRecord, second: ImageRecord) -> bool:
    head = lambda r: (r.id, r.file_name, r.height, r.width, len(r.instances))  # noqa: E731
    return head(first) == head(second) and all(
        np.array_equal(a.polygon, b.polygon)
        and (a.ignore, a.lossweight, a.score, a.votes) == (b.ignore, b.lossweight, b.score, b.votes)
        for a, b in zip(first.instances, second.instances, strict=True)
    )


def test_what_is_written_is_read_back_exactly(tmp_path):
    path = str(tmp_path / "new" / "out.json")
    write_coco(path, records(), info={"version": "2"})
    data = read_coco(path, str(tmp_path), check_files=False)
    assert all(map(same, data.records, records()))
    content = json.loads((tmp_path / "new" / "out.json").read_text())
    assert content["info"]["version"] == "2" and content["categories"] == [{"id": 1, "name": "text"}]
    assert [a["lossweight"] for a in content["annotations"]] == [1, 0.5, 1]
    assert [a["iscrowd"] for a in content["annotations"]] == [a["ignore"] for a in content["annotations"]] == [0, 1, 0]
    assert "score" not in content["annotations"][0]


def test_what_is_written_is_coco_for_others(tmp_path):
    from pycocotools.coco import COCO

    write_coco(str(tmp_path / "out.json"), records())
    loaded = COCO(str(tmp_path / "out.json"))
    annotation = loaded.loadAnns([1])[0]
    x, y, width, height = annotation["bbox"]
    rows, columns = np.nonzero(loaded.annToMask(annotation))
    assert columns.min() >= x - 1 and columns.max() <= x + width and rows.min() >= y - 1 and rows.max() <= y + height
    assert annotation["area"] == pytest.approx(loaded.annToMask(annotation).sum(), rel=0.1)


def test_two_records_with_one_id_are_not_written(tmp_path):
    with pytest.raises(ValueError, match="two records have the id 5"):
        write_coco(str(tmp_path / "out.json"), [records()[0], records()[0]])
    assert not (tmp_path / "out.json").exists()


def test_table_round_trip():
    table = records_module.record_table(records(), "s3://bucket/root")
    assert table.schema == records_module.IMAGE_SCHEMA
    assert table["path"].to_pylist()[1] == "s3://bucket/root/sub/ü.jpg"
    assert all(map(same, records_module.from_table(table), records()))
    assert records_module.record_table([], "root").num_rows == 0


def test_record_from_rows_as_ray_data_hands_them():
    rows = records_module.record_table(records(), "root").to_pylist()
    for row, record in zip(rows, records(), strict=True):
        assert same(records_module.record_from_row(row), record)
        # Numpy format: arrays of objects, and NaN for what is absent.
        instances = np.empty(len(row["instances"]), object)
        for i, instance in enumerate(row["instances"]):
            instances[i] = {
                key: np.array(value, np.float32) if key == "polygon" else math.nan if value is None else value
                for key, value in instance.items()
            }
        assert same(
            records_module.record_from_row({**row, "image_id": np.int64(row["image_id"]), "instances": instances}),
            record,
        )


def test_parquet_is_read_by_the_same_call(tmp_path):
    path = str(tmp_path / "set.parquet")
    write_parquet(path, records(), "root")
    data = read_coco(path, str(tmp_path), check_files=False)
    assert data.name == "set" and all(map(same, data.records, records()))
    # A folder of parts too.
    (tmp_path / "parts").mkdir()
    for i, record in enumerate(records()):
        write_parquet(str(tmp_path / "parts" / f"{i}.parquet"), [record], "root")
    data = read_coco(str(tmp_path / "parts"), str(tmp_path), check_files=False)
    assert all(map(same, data.records, records()))


def test_parquet_passes_the_same_checks(tmp_path):
    path = str(tmp_path / "set.parquet")
    bad = [ImageRecord(1, "../a.jpg", 60, 100), records()[0]]
    write_parquet(path, bad, "root")
    with pytest.raises(UserError, match=r"image 1: .*leaves the images root"):
        read_coco(path, str(tmp_path), check_files=False)
    assert len(read_coco(path, str(tmp_path), check_files=False, skip_bad=True)) == 1


@pytest.mark.parametrize("kind", ["text", "other columns", "other types", "cut off"])
def test_other_parquet_is_refused(tmp_path, kind):
    path = tmp_path / "set.parquet"
    write_parquet(str(path), records(), "root")
    if kind == "text":
        path.write_text("no table")
    elif kind == "other columns":
        pq.write_table(pa.table({"a": [1]}), path)
    elif kind == "other types":
        table = records_module.record_table(records(), "root")
        pq.write_table(table.set_column(5, "instances", [[["x"]] * 3]), path)
    else:
        path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(UserError, match=r"set\.parquet: "):
        read_coco(str(path), str(tmp_path), check_files=False)


# ------------------------------------------------------------------------------------------------------- fuzz

ODD = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.sampled_from([0, -1, 10**30, 1e308, math.nan, math.inf, "", "text", [], {}, [[]], [[[]]], {"size": [60, 100]}]),
    st.floats(),
    st.text(max_size=5),
    st.lists(st.one_of(st.integers(-100, 200), st.floats()), max_size=9),
    st.lists(st.lists(st.floats(-200, 200), max_size=9), max_size=3),
    st.builds(lambda c: {"size": [60, 100], "counts": c}, st.text(max_size=12) | st.lists(st.integers(), max_size=5)),
)


def places(node, path=()):
    """Every (path) to a value in nested json."""
    yield path
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, value in items:
        yield from places(value, (*path, key))


PLACES = [p for p in places(small()) if p]


@settings(max_examples=250, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(changes=st.lists(st.tuples(st.sampled_from(PLACES), ODD), min_size=1, max_size=3), skip_bad=st.booleans())
def test_any_mutation_is_an_error_or_a_right_reading(read, changes, skip_bad):
    content = small()
    for path, value in changes:
        node = content
        try:
            for key in path[:-1]:
                node = node[key]
            node[path[-1]] = copy.deepcopy(value)
        except (KeyError, IndexError, TypeError):
            continue
    try:
        data = read(content, skip_bad=skip_bad, check_files=False)
    except UserError as error:
        assert "\n" not in str(error)
        return
    for record in data.records:
        for instance in record.instances:
            polygon = instance.polygon
            assert polygon.dtype == np.float32 and polygon.shape[1] == 2 and len(polygon) >= 3
            assert (polygon >= -1e-3).all() and (polygon <= [record.width + 1e-3, record.height + 1e-3]).all()
            assert 0 <= instance.lossweight < math.inf
    data.summary().encode()


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cut=st.integers(0, 2000), put=st.characters(), keep=st.booleans())
def test_any_damage_to_the_text_is_an_error_or_a_right_reading(read, cut, put, keep):
    text = json.dumps(small())
    cut %= len(text)
    damaged = text[:cut] + (put.encode("ascii", "backslashreplace").decode() + text[cut + 1 :] if keep else "")
    try:
        read(damaged, check_files=False)
    except UserError as error:
        assert "\n" not in str(error)


def test_twenty_thousand_annotations_take_a_second_or_two(tmp_path):
    rng = np.random.default_rng(0)
    images = [{"id": i, "file_name": f"{i}.jpg", "height": 1000, "width": 1000} for i in range(2_000)]
    corners = rng.uniform(0, 800, (20_000, 1, 2)) + rng.uniform(1, 200, (20_000, 4, 2))
    square = [np.round([*p[0], 900, *p[1][1:], *p[2], *p[3]], 1).tolist() for p in corners]
    annotations = [{"id": i, "image_id": i // 10, "category_id": 1, "segmentation": [s]} for i, s in enumerate(square)]
    path = tmp_path / "big.json"
    path.write_text(json.dumps({"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "text"}]}))
    started = time.process_time()
    data = read_coco(str(path), str(tmp_path), check_files=False)
    seconds = time.process_time() - started
    print(f"reading 20,000 annotations: {seconds:.1f} s")
    assert sum(len(r.instances) for r in data.records) == 20_000
    assert seconds < 10


def test_a_key_that_occurs_twice_is_refused(tmp_path):
    (tmp_path / "s.json").write_text('{"images": [], "annotations": [], "images": []}')
    with pytest.raises(UserError, match=r"s\.json: key 'images' occurs twice"):
        read_coco(str(tmp_path / "s.json"), "")

"""Truth and result files of every form, right and broken."""

import json
import struct
import zipfile

import numpy as np
import pytest

from i3cl.data.formats import predictions
from i3cl.data.formats.coco import read_coco, write_coco
from i3cl.data.formats.records import ImageRecord, Instance
from i3cl.data.formats.table import write_parquet
from i3cl.errors import UserError
from i3cl.evaluation.formats.pairing import pair
from i3cl.evaluation.formats.read import read_results, read_truth
from i3cl.evaluation.formats.table import check_image_sizes

SQUARE = "0,0,100,0,100,20,0,20"
RING = [[0, 0], [100, 0], [100, 20], [0, 20]]


def zipped(path, **files):
    with zipfile.ZipFile(path, "w") as archive:
        for name, text in files.items():
            archive.writestr(f"{name}.txt", text)
    return str(path)


def folder(path, **files):
    path.mkdir()
    for name, text in files.items():
        (path / f"{name}.txt").write_text(text, "utf-8")
    return str(path)


def write(path, content):
    path.write_text(json.dumps(content))
    return str(path)


# --------------------------------------------------------------------------------------------------------------- truth


def test_text_truth(tmp_path):
    source = read_truth(
        zipped(
            tmp_path / "gt.zip",
            gt_img_1=f'\ufeff{SQUARE},SHOP, "A"\r\n\r\n{SQUARE},###\r\n{SQUARE}, "###" \n{SQUARE},####\n',
            gt_img_2="",
        )
    )
    one, two = source.images
    assert one.texts[0] == 'SHOP, "A"'
    assert one.ignore == [False, True, True, False]
    assert one.polygons[0].tolist() == RING
    assert not two.polygons


@pytest.mark.parametrize(
    ("line", "points", "text"),
    [
        (f"{SQUARE},2019", 4, "2019"),
        (f"{SQUARE},7,ELEVEN", 4, "7,ELEVEN"),
        (f"{SQUARE},", 4, ""),
        (f"{SQUARE},1e5x", 4, "1e5x"),
        ("0,0,50,0,100,0,100,20,50,20,0,20,1912", 6, "1912"),
        ("-3,-4.5,100,0,100,20,0,20,NaN", 4, "NaN"),
    ],
)
def test_transcriptions_that_look_like_numbers(tmp_path, line, points, text):
    source = read_truth(folder(tmp_path / "gt", a=f"{SQUARE},SHOP\n{line}\n"))
    assert len(source.images[0].polygons[1]) == points
    assert source.images[0].texts[1] == text


def test_commas_in_numbers_are_text_where_all_lines_have_one_length(tmp_path):
    source = read_truth(folder(tmp_path / "gt", a=f"{SQUARE},SHOP\n" * 12 + f"{SQUARE},1,000,000\n{SQUARE},12,50\n"))
    assert source.images[0].texts[-2:] == ["1,000,000", "12,50"]


@pytest.mark.parametrize("price", ["900,50", "5,99,-", "12,50,99,00", "1,2,3,4,5,6"])
@pytest.mark.parametrize("lines", [2, 6, 40])
def test_numbers_in_texts_never_become_corners(tmp_path, price, lines):
    words = "".join(f"10,{20 * k},110,{20 * k},110,{20 * k + 15},10,{20 * k + 15},WORD\n" for k in range(lines - 1))
    source = read_truth(folder(tmp_path / "gt", a=words + f"300,400,420,410,419,440,299,430,{price}\n", b=words))
    last = source.images[0]
    assert (len(last.polygons[-1]), last.texts[-1]) == (4, price)
    assert source.format == "text files, 4 points a line, then the text; 1 texts begin with numbers"


def test_a_set_of_prices_only(tmp_path):
    lines = [f"10,{20 * k},110,{20 * k},110,{20 * k + 15},10,{20 * k + 15},{k},99,-" for k in range(9)]
    lines.append("300,0,400,0,400,20,300,20,SUM")
    image = read_truth(folder(tmp_path / "gt", a="\n".join(lines))).images[0]
    assert {len(polygon) for polygon in image.polygons} == {4}
    assert image.texts[3] == "3,99,-"
    with pytest.raises(UserError, match="far from the first corner"):
        read_truth(folder(tmp_path / "one", a=f"{SQUARE},900,50"))


def test_outlines_of_different_length_are_kept(tmp_path):
    """Unmarked lines of 4 to 10 points, as copies of Total-Text have them; what cannot be told apart is refused."""
    rng = np.random.default_rng(0)
    lines, sizes = [], []
    for k in range(40):
        half = [2, 3, 4, 5][k % 4]
        top = np.stack([np.linspace(0, 100, half), 6 * np.sin(np.linspace(0, 3, half))], axis=1) + rng.uniform(0, 900, 2)
        outline = np.concatenate([top, top[::-1] + np.array([0, 25])]).round()
        lines.append(",".join(f"{v:.0f}" for v in outline.ravel()) + ",WORD")
        sizes.append(2 * half)
    source = read_truth(folder(tmp_path / "gt", a="\n".join(lines)))
    assert [len(polygon) for polygon in source.images[0].polygons] == sizes
    assert source.format == "text files, 4-10 points a line, then the text"
    for text, words in (("900,50", "cannot tell"), ("5,99,-", "far from the first corner")):
        doubtful = "\n".join([*lines, f"700,700,800,700,800,720,700,720,{text}"])
        with pytest.raises(UserError, match=rf"line 41: .*{words}.*####TEXT"):
            read_truth(folder(tmp_path / words[:3], a=doubtful))


def test_what_macos_adds_is_passed_over(tmp_path):
    with zipfile.ZipFile(tmp_path / "r.zip", "w") as archive:
        archive.writestr("res_1.txt", SQUARE)
        for name in ("._res_1.txt", "__MACOSX/._res_1.txt", ".DS_Store"):
            archive.writestr(name, b"\x00\x05\x16\x07 Mac OS X \xff")
    (tmp_path / "r").mkdir()
    (tmp_path / "r" / "res_1.txt").write_text(SQUARE)
    (tmp_path / "r" / "._res_1.txt").write_bytes(b"\x00\x05\x16\x07\xff")
    for name in ("r.zip", "r"):
        assert [image.name for image in read_results(str(tmp_path / name)).images] == ["res_1.txt"]
    (tmp_path / "t").mkdir()
    row = {"image_id": 1, "file_name": "a.jpg", "height": 50, "width": 120, "polygons": [RING], "scores": [0.5], "member": "m"}
    predictions.pq.write_table(predictions.prediction_table([row]), tmp_path / "t" / "part.parquet")
    (tmp_path / "t" / "._part.parquet").write_bytes(b"\x00\x05\x16\x07")
    assert len(read_results(str(tmp_path / "t")).images) == 1


def test_marked_truth_of_ctw1500(tmp_path):
    line = "12,10,40,8,70,8,100,12,98,30,70,26,40,26,14,28"
    source = read_truth(folder(tmp_path / "gt", a=f"{line},####SEA, SUN\n{line},#######\n"))
    assert source.images[0].texts == ["SEA, SUN", "###"]
    assert source.images[0].ignore == [False, True]
    assert len(source.images[0].polygons[0]) == 8


def test_ctw1500_v1_offsets(tmp_path):
    top = [(x, 0) for x in np.linspace(0, 100, 7)]
    offsets = [v for point in [*top, *((x, 40) for x, _ in reversed(top))] for v in point]
    line = ",".join(f"{v:.0f}" for v in [200, 50, 300, 90, *offsets])
    for read in (read_truth, read_results):
        source = read(folder(tmp_path / read.__name__, a=line))
        assert "v1" in source.format
        polygon = source.images[0].polygons[0]
        assert polygon.shape == (14, 2)
        assert (polygon.min(axis=0).tolist(), polygon.max(axis=0).tolist()) == ([200, 50], [300, 90])


def test_mlt_and_rctw_lines(tmp_path):
    mlt = read_truth(folder(tmp_path / "mlt", a=f"{SQUARE},Latin,Rue de l'Or, 12\n{SQUARE},None,###\n")).images[0]
    assert (mlt.texts, mlt.languages, mlt.ignore) == (["Rue de l'Or, 12", "###"], ["Latin", "None"], [False, True])
    rctw = read_truth(folder(tmp_path / "rctw", a=f'{SQUARE},0,"a, b"\n{SQUARE},1,"c"\n')).images[0]
    assert rctw.ignore == [False, True]


def test_art_truth(tmp_path):
    entry = {"transcription": "A", "points": RING, "language": "Latin", "illegibility": False}
    labels = {"gt_7": [entry, entry | {"illegibility": True}, entry | {"transcription": "###"}], "gt_8": []}
    seven, eight = read_truth(write(tmp_path / "t.json", labels)).images
    assert seven.ignore == [False, True, True]
    assert seven.languages[0] == "Latin"
    assert not eight.polygons
    with pytest.raises(UserError, match=r"gt_9: instance 1: has no points"):
        read_truth(write(tmp_path / "weak.json", {"gt_9": [{"transcription": "A"}]}))


def test_our_truth_as_json_and_table(tmp_path):
    ring = np.array(RING, np.float32)
    instances = (Instance(ring), Instance(ring, ignore=True))
    records = [ImageRecord(3, "a/one.jpg", 100, 200, instances), ImageRecord(4, "b.jpg", 9, 9)]
    write_coco(str(tmp_path / "set.json"), records)
    write_parquet(str(tmp_path / "set.parquet"), records, "images")
    for name in ("set.json", "set.parquet"):
        one, two = read_truth(str(tmp_path / name)).images
        assert (one.id, one.ignore, one.height, one.width) == (3, [False, True], 100, 200)
        assert not two.polygons


def test_hash_marks_dont_care_in_total_text_only(tmp_path):
    path = folder(tmp_path / "gt", a=f"{SQUARE},#\n")
    assert read_truth(path).images[0].ignore == [False]
    assert read_truth(path, hash_is_dont_care=True).images[0].ignore == [True]


# ------------------------------------------------------------------------------------------------------------- results


def test_text_results(tmp_path):
    plain = read_results(folder(tmp_path / "plain", res_1=f"{SQUARE}\n\n{SQUARE},####\n", res_2=""))
    assert [len(f.polygons) for f in plain.images] == [2, 0]
    assert plain.images[0].scores.tolist() == [1, 1]
    scored = read_results(folder(tmp_path / "scored", res_1=f"{SQUARE},0.25\n{SQUARE},1\n"))
    assert scored.images[0].scores.tolist() == [0.25, 1]
    swapped = read_results(folder(tmp_path / "yx", img1="1,2,3,4,5,7\n"), point_order="yx")
    assert swapped.images[0].polygons[0].tolist() == [[2, 1], [4, 3], [7, 5]]


def test_art_submission_plain_and_zipped(tmp_path):
    content = {"res_0": [{"points": RING, "confidence": 0.93}], "res_1": []}
    path = write(tmp_path / "r.json", content)
    with zipfile.ZipFile(tmp_path / "r.zip", "w") as archive:
        archive.write(path, "r.json")
    for name in ("r.json", "r.zip"):
        one, two = read_results(str(tmp_path / name)).images
        assert (one.name, one.scores.tolist(), len(two.polygons)) == ("res_0", [0.93], 0)


def test_coco_results(tmp_path):
    flat = [v for point in RING for v in point]
    rle = {"size": [30, 120], "counts": [0] + [20, 10] * 99 + [20, 10 + 20 * 30]}
    entries = [
        {"image_id": 4, "category_id": 1, "segmentation": [flat], "score": 0.9},
        {"image_id": 4, "category_id": 1, "segmentation": rle, "score": 0.8},
        {"image_id": 4, "category_id": 1, "bbox": [0, 0, 100, 20], "score": 0.7},
    ]
    image = read_results(write(tmp_path / "r.json", entries)).images[0]
    assert (image.id, image.scores.tolist()) == (4, [0.9, 0.8, 0.7])
    for polygon in image.polygons:
        assert (polygon.min(axis=0).tolist(), polygon.max(axis=0).tolist()) == ([0, 0], [100, 20])


def test_predictions_table(tmp_path):
    row = {"image_id": 1, "file_name": "a.jpg", "height": 50, "width": 120, "polygons": [RING], "scores": [0.5]}
    rows = [row | {"member": "m1"}, row | {"member": "m2", "scores": [0.75]}]
    predictions.pq.write_table(predictions.prediction_table(rows), tmp_path / "part.parquet")
    assert read_results(str(tmp_path), member="m2").images[0].scores.tolist() == [0.75]
    with pytest.raises(UserError, match="--member"):
        read_results(str(tmp_path))
    with pytest.raises(UserError, match="m1, m2"):
        read_results(str(tmp_path), member="m3")


# -------------------------------------------------------------------------------------------------------------- broken


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("0,0,10,10", "a box and not a polygon; write its four corners"),
        ("0,0,10,0,10,10,5", "odd"),
        ("0,0,10,0,nan,10", "'nan' is not a number"),
        ("0,0,10,0,1e300,10", "beyond any image"),
        ("0,0,10,0,inf,10", "'inf' is not a number"),
        ("0,0,ten,0,10,10", "not x1,y1"),
        ("hello", "not x1,y1"),
        ("0,0,1_0,0,10,10", "not x1,y1"),
    ],
)
def test_broken_result_lines(tmp_path, line, words):
    path = folder(tmp_path / "r", a=f"{SQUARE}\n{SQUARE}\n{line}\n")
    with pytest.raises(UserError, match=rf"a\.txt: line 3: .*{words}"):
        read_results(path)
    source = read_results(path, skip_bad=True)
    assert len(source.images[0].polygons) == 2
    assert len(source.left_out) == 1


@pytest.mark.parametrize(
    "line", ["0,0,10,10,TEXT", "0,0,10,0,10,10,7,TEXT", "0,0,10,0,10,10,0,nan,TEXT", "TEXT", "0,0,10,0,10,1e99,TEXT"]
)
def test_broken_truth_lines(tmp_path, line):
    path = folder(tmp_path / "t", a=f"{SQUARE},SHOP\n{line}\n")
    with pytest.raises(UserError, match=r"a\.txt: line 2: "):
        read_truth(path)
    assert len(read_truth(path, skip_bad=True).images[0].polygons) == 1


@pytest.mark.parametrize(
    "content",
    [
        {"res_1": [{"points": [[0, 0], [1, 1]], "confidence": 1}]},
        {"res_1": [{"points": [[0, 0], [1, 1], [2, float("nan")]], "confidence": 1}]},
        {"res_1": [{"points": [[0, 0, 0], [1, 1, 1], [2, 2, 2]], "confidence": 1}]},
        {"res_1": [{"points": RING, "confidence": 7}]},
        {"res_1": ["x"]},
        {"res_1": 5},
        [{"image_id": 1, "score": 0.5}],
        [{"image_id": "one", "segmentation": [[0, 0, 1, 1, 2, 0]], "score": 0.5}],
        [{"image_id": 1, "bbox": [0, 0, "a", 1], "score": 0.5}],
        [{"image_id": 1, "bbox": ["0", "0", "9", "9"], "score": 0.5}],
        [{"image_id": 1, "segmentation": {"size": [10, 10], "counts": [5]}, "score": 0.5}],
        ["x"],
        7,
    ],
)
def test_broken_json_results(tmp_path, content):
    with pytest.raises(UserError, match=r"r\.json"):
        read_results(write(tmp_path / "r.json", content))


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_a_damaged_zip_of_any_compression_is_a_users_mistake(tmp_path, method):
    with zipfile.ZipFile(tmp_path / "whole.zip", "w", method) as archive:
        archive.writestr("res_1.txt", "\n".join(f"{n},{n},99,{n},99,99,{n},99" for n in range(90)))
    whole = (tmp_path / "whole.zip").read_bytes()
    start, end = whole.index(b"res_1.txt") + 9, whole.index(b"PK\x01\x02")
    # Not the header and the end mark of LZMA, in which some bits mean nothing.
    for place in range(start + 12, end - 20, (end - start) // 12):
        damaged = bytearray(whole)
        damaged[place] ^= 0xFF
        (tmp_path / "r.zip").write_bytes(damaged)
        with pytest.raises(UserError, match=r"r\.zip: the zip cannot be unpacked"):
            read_results(str(tmp_path / "r.zip"))


def test_unreadable_files(tmp_path):
    (tmp_path / "cut.json").write_text('{"res_1": [')
    (tmp_path / "none.zip").write_bytes(b"nothing")
    (tmp_path / "empty").mkdir()
    (tmp_path / "latin").mkdir()
    (tmp_path / "latin" / "a.txt").write_bytes(b"0,0,1,0,1,1,caf\xe9")
    for name, words in [
        ("cut.json", "line 1"),
        ("none.zip", "not a zip"),
        ("empty", "neither"),
        ("latin", "UTF-8"),
        ("absent", "no such file"),
    ]:
        for read in (read_truth, read_results):
            with pytest.raises(UserError, match=words):
                read(str(tmp_path / name))


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["../a.txt"], "folder"),
        (["/etc/a.txt"], "folder"),
        (["sub/a.txt"], "without their folder"),
        (["a\\b.txt"], "lies in a folder"),
        (["inner.zip"], "zip in a zip"),
        (["a.txt", "notes.doc"], "notes.doc"),
        ([], "not a zip"),
    ],
)
def test_zips_that_are_refused(tmp_path, names, words):
    with zipfile.ZipFile(tmp_path / "r.zip", "w") as archive:
        for name in names:
            archive.writestr(name, SQUARE)
    with pytest.raises(UserError, match=words):
        read_results(str(tmp_path / "r.zip"))


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_zips_that_lie(tmp_path, monkeypatch):
    with zipfile.ZipFile(tmp_path / "twice.zip", "w") as archive:
        archive.writestr("a.txt", SQUARE)
        archive.writestr("a.txt", SQUARE)
    with pytest.raises(UserError, match="occurs twice"):
        read_results(str(tmp_path / "twice.zip"))

    with zipfile.ZipFile(tmp_path / "bomb.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.txt", " " * 300_000)
    monkeypatch.setattr("i3cl.evaluation.formats.files.MAX_FILE_BYTES", 100_000)
    with pytest.raises(UserError, match="unpacks to more"):
        read_results(str(tmp_path / "bomb.zip"))

    data = bytearray((tmp_path / "bomb.zip").read_bytes())
    struct.pack_into("<I", data, 14, 1)  # a wrong checksum
    (tmp_path / "broken.zip").write_bytes(data[: len(data) // 2])
    with pytest.raises(UserError, match="cannot be unpacked"):
        read_results(str(tmp_path / "broken.zip"))


def test_image_sizes_are_compared(tmp_path):
    """Labels in the upright frame of an image that was predicted as it is stored."""
    ring = np.array(RING, np.float32)
    write_coco(str(tmp_path / "t.json"), [ImageRecord(1, "a.jpg", 427, 640, (Instance(ring),))])
    row = {"image_id": 1, "file_name": "a.jpg", "height": 640, "width": 427, "polygons": [RING], "scores": [0.5], "member": "m"}
    predictions.pq.write_table(predictions.prediction_table([row]), tmp_path / "p.parquet")
    mask = {"size": [640, 427], "counts": [0, 40, 640 * 427 - 40]}
    results = write(tmp_path / "r.json", [{"image_id": 1, "segmentation": mask, "score": 0.5}])
    truth = read_truth(str(tmp_path / "t.json"))
    message = r"a.jpg: the image is 427 x 640 but its annotation says 640 x 427 \(turned"
    for path in (str(tmp_path / "p.parquet"), results):
        with pytest.raises(UserError, match=message):
            pair(truth, read_results(path))
    with pytest.raises(UserError, match=message):
        check_image_sizes(str(tmp_path / "p.parquet"), read_coco(str(tmp_path / "t.json"), "", check_files=False).records)


def test_one_file_under_two_ids_is_refused(tmp_path):
    from i3cl.evaluation.formats.sets import ImageTruth, PolygonSet

    truth = PolygonSet("t.json", "COCO", [ImageTruth("a.jpg", id=3), ImageTruth("a.jpg", id=7)])
    with pytest.raises(UserError, match=r"a.jpg is there twice \(image ids 3 and 7\)"):
        pair(truth, PolygonSet("r", "text files", []))


# ------------------------------------------------------------------------------------------------------------- pairing


def paired(tmp_path, truth_names, result_names):
    truth = read_truth(zipped(tmp_path / "t.zip", **{name: f"{SQUARE},A" for name in truth_names}))
    return pair(truth, read_results(zipped(tmp_path / "r.zip", **{name: SQUARE for name in result_names})))


@pytest.mark.parametrize(
    ("truth", "result"),
    [
        ("1001", "1001"),
        ("gt_img_1", "res_img_1"),
        ("poly_gt_img12", "img12"),
        ("gt_img_5", "task1_img_5"),
        ("0001001", "1001"),
    ],
)
def test_names_that_belong_together(tmp_path, truth, result):
    both = paired(tmp_path, [truth, "gt_img_77"], [result])
    assert len(both.images[0].detections) == 1
    assert both.missing == ["gt_img_77.txt"]


def test_results_of_unknown_images(tmp_path):
    with pytest.raises(UserError, match=r"1 of 2 results are of images that the truth does not have \(res_9.txt\)"):
        paired(tmp_path, ["gt_1", "gt_2"], ["res_1", "res_9"])
    with pytest.raises(UserError, match=r"shifted, \+1"):
        paired(tmp_path, ["gt_1", "gt_2", "gt_3"], ["res_0", "res_1", "res_2"])


def test_coco_ids_and_numbers(tmp_path):
    write_coco(str(tmp_path / "t.json"), [ImageRecord(5, "x/gt_9.jpg", 50, 200), ImageRecord(9, "x/gt_5.jpg", 50, 200)])
    truth = read_truth(str(tmp_path / "t.json"))
    by_id = pair(truth, read_results(write(tmp_path / "c.json", [{"image_id": 5, "bbox": [0, 0, 9, 9], "score": 1}])))
    assert [len(s.detections) for s in by_id.images] == [1, 0]
    by_name = pair(truth, read_results(write(tmp_path / "a.json", {"res_5": [{"points": RING, "confidence": 1}]})))
    assert [len(s.detections) for s in by_name.images] == [0, 1]


def result(**more):
    return {"image_id": 1, "category_id": 1, "score": 0.9, "bbox": [10, 10, 50, 20], **more}


def test_results_of_several_categories_are_refused(tmp_path):
    path = tmp_path / "r.json"
    path.write_text(json.dumps([result(), result(category_id=44)]))
    with pytest.raises(UserError, match="result 2 has category_id 44 and result 1 1"):
        read_results(str(path))


def test_image_ids_may_be_written_with_a_point_and_boxes_not_from_the_other_corner(tmp_path):
    path = tmp_path / "r.json"
    path.write_text(json.dumps([result(image_id=1.0)]))
    assert read_results(str(path)).images[0].id == 1
    path.write_text(json.dumps([result(bbox=[60, 30, -50, -20])]))
    with pytest.raises(UserError, match="result 1: bbox is -50 x -20"):
        read_results(str(path))


def test_illegibility_as_a_text_is_refused(tmp_path):
    path = tmp_path / "t.json"
    ring = [[10, 10], [60, 10], [60, 30]]
    path.write_text(json.dumps({"gt_1": [{"points": ring, "transcription": "a", "illegibility": "false"}]}))
    with pytest.raises(UserError, match="gt_1: instance 1: illegibility is 'false'"):
        read_truth(str(path))


def test_two_rings_do_not_become_one_polygon(tmp_path):
    path = tmp_path / "r.json"
    one, other = [[10, 10], [60, 10], [60, 30]], [[100, 50], [160, 50], [160, 80]]
    path.write_text(json.dumps({"res_1": [{"points": [one, other], "confidence": 1}]}))
    with pytest.raises(UserError, match="res_1: polygon 1: points are several lists"):
        read_results(str(path))
    # A contour of OpenCV has a dimension of length 1 in the middle.
    path.write_text(json.dumps({"res_1": [{"points": [[point] for point in one], "confidence": 1}]}))
    assert read_results(str(path)).images[0].polygons[0].tolist() == one


def test_accents_and_other_endings_pair(tmp_path):
    line = "10,10,60,10,60,30,10,30"
    truth = read_truth(folder(tmp_path / "t", **{"gt_\u00e9.txt": f"{line},x\n", "gt_b.txt": f"{line},y\n"}))
    paired = pair(truth, read_results(folder(tmp_path / "r", **{"res_e\u0301.txt": f"{line}\n", "res_b.txt": f"{line}\n"})))
    assert [len(image.detections) for image in paired.images] == [1, 1]


def test_line_ends_of_old_macintosh_files_are_named(tmp_path):
    path = folder(tmp_path / "t", **{"gt_1.txt": "10,10,60,10,60,30,10,30,a\r20,20,60,20,60,30,20,30,b\r"})
    with pytest.raises(UserError, match=r"gt_1.*: line 1: holds a CR"):
        read_truth(path)

"""Exports, and what comes back when a person has changed something."""

import io
import json
import logging
import random
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from defusedxml.ElementTree import fromstring
from pycocotools.coco import COCO

from i3cl import geometry
from i3cl.data.exports.common import ExportOptions
from i3cl.data.exports.corrections import import_corrections
from i3cl.data.exports.export import export_labels
from i3cl.data.exports.registry import FORMATS
from i3cl.data.exports.registry import REVIEW_FORMATS as READERS
from i3cl.data.exports.sources import read_labels
from i3cl.data.formats import predictions
from i3cl.data.formats.coco import read_coco, write_coco
from i3cl.data.formats.records import ImageRecord, Instance
from i3cl.data.formats.table import write_shards
from i3cl.errors import UserError

CURVE = np.array([[10.1, 20], [60.7, 12.3], [110, 20], [108, 44], [60, 36], [12, 44.9]], np.float32)
BOX = np.array([[5, 50], [30, 50], [30, 60], [5, 60]], np.float32)


def labels() -> list[ImageRecord]:
    """Three images: one with everything, one empty, one in a folder with blanks and other scripts in its name."""
    odd = Instance(BOX, text='永安, "药" & <b>店', language="Chinese", lossweight=0.3, score=0.6, votes=1)
    usual = (Instance(CURVE, score=0.9, votes=2, lossweight=0.7), Instance(BOX, True, 0.0, 0.2, 1))
    return [
        ImageRecord(3, "gt_3.jpg", 80, 120, usual),
        ImageRecord(4, "gt_4.jpg", 80, 120),
        ImageRecord(9, "größe & co/永 安 'x' 100%_5.jpg", 80, 333, (odd,), "art"),
    ]


@pytest.fixture
def pseudo(tmp_path) -> str:
    path = str(tmp_path / "pseudo.json")
    write_coco(path, labels())
    return path


def export(format: str, source: str, tmp_path: Path, **options) -> str:
    json_formats = ("art", "coco", "coco-results", "label-studio")
    suffix = {"icdar": ".zip", "cvat": ".xml", "paddle": ".txt", **dict.fromkeys(json_formats, ".json")}.get(format, "")
    out = str(tmp_path / f"{format}{suffix}")
    chosen = {key: options.pop(key) for key in ("prefix", "confidence") if key in options}
    export_labels(format, source, out, options=ExportOptions(**chosen), **options)
    return out


def predicted(folder: Path) -> str:
    folder.mkdir()
    rows = []
    for record in labels():
        for member, shift in (("a", 0), ("b", 0.01)):
            row = {"image_id": record.id, "file_name": record.file_name, "height": record.height, "width": record.width}
            kept = [i for i in record.instances if not i.ignore]
            polygons, scores = [i.polygon for i in kept], [i.score - shift for i in kept]
            rows.append(row | {"member": member, "view": "default", "polygons": polygons, "scores": scores})
    gone = {"image_id": 12, "file_name": "gt_12.jpg", "height": 0, "width": 0, "error": "gt_12.jpg: empty"}
    rows += [gone | {"member": m, "view": "default", "polygons": [], "scores": []} for m in "ab"]
    pq.write_table(predictions.prediction_table(rows[::-1]), folder / "0.parquet")
    return str(folder)


def same_shapes(found: ImageRecord, wanted: ImageRecord, tolerance: float) -> None:
    assert (found.id, found.file_name, found.height, found.width, found.source) == (
        wanted.id,
        wanted.file_name,
        wanted.height,
        wanted.width,
        wanted.source,
    )
    assert len(found.instances) == len(wanted.instances)
    for a, b in zip(found.instances, wanted.instances, strict=True):
        assert np.abs(a.polygon - b.polygon).max() <= tolerance
        assert (a.ignore, a.lossweight, a.score, a.votes) == (b.ignore, 1.0, None, None)
        assert (a.text, a.language) == (b.text, b.language)


@pytest.mark.parametrize("prefix", ["", "photos/"])
@pytest.mark.parametrize("format", READERS)
def test_what_goes_out_comes_back(format, prefix, pseudo, tmp_path):
    out = export(format, pseudo, tmp_path, prefix=prefix)
    if format == "label-studio":
        as_annotated(out)
    result = str(tmp_path / "corrected.json")
    done = import_corrections(format, out, pseudo, result, prefix=prefix)
    assert (done.images, done.corrected, done.instances, done.ignored, done.removed) == (3, 3, 2, 1, 3)
    for found, wanted in zip(read_coco(result, "", check_files=False).records, labels(), strict=True):
        same_shapes(found, wanted, 0.01 if format == "label-studio" else 0)


@pytest.mark.parametrize("format", READERS)
def test_an_ignore_region_that_became_text_has_no_mark_for_a_transcription(format, tmp_path):
    base = str(tmp_path / "base.json")
    regions = (Instance(CURVE, True, text="###"), Instance(BOX, True, text="\u96be", language="Chinese"))
    write_coco(base, [ImageRecord(1, "gt_1.jpg", 80, 120, regions)])
    out = Path(export(format, base, tmp_path))
    if format == "label-studio":
        as_annotated(str(out))
    path = out / "gt_1.json" if out.is_dir() else out
    if format == "paddle":
        name, items = path.read_text().split("\t")
        first, second = json.loads(items)
        path.write_text(name + "\t" + json.dumps([first | {"transcription": ""}, second]))
    else:
        # The last region of a label, so that the other one stays an ignore region.
        path.write_text(path.read_text().replace('"ignore"', '"text"', 1) if format == "cvat" else made_text(path))
    import_corrections(format, str(out), base, str(tmp_path / "c.json"))
    (record,) = read_coco(str(tmp_path / "c.json"), "", check_files=False).records
    assert [(i.ignore, i.text, i.language) for i in record.instances] == [(False, None, None), (True, "\u96be", "Chinese")]


def made_text(path: Path) -> str:
    content = json.loads(path.read_text())
    if isinstance(content, dict):
        content["shapes"][0]["label"] = "text"
    else:
        content[0]["annotations"][0]["result"][0]["value"]["polygonlabels"] = ["text"]
    return json.dumps(content)


@pytest.mark.parametrize("prefix", ["s3://bucket/photos/", "https://host/photos/", "/data/local-files/?d=photos/"])
def test_label_studio_finds_images_by_their_url_alone(prefix, pseudo, tmp_path):
    out = export("label-studio", pseudo, tmp_path, prefix=prefix)
    as_annotated(out)
    tasks = json.loads(Path(out).read_text())
    # Keys of buckets stand as they are, all else as in any URL.
    assert tasks[2]["data"]["image"].endswith("永 安 'x' 100%_5.jpg") == prefix.startswith("s3")
    for task in tasks:
        del task["data"]["file_name"]
    Path(out).write_text(json.dumps(tasks))
    for given in ("", prefix):
        done = import_corrections("label-studio", out, pseudo, str(tmp_path / "c.json"), prefix=given)
        assert (done.corrected, done.instances) == (3, 2)


def as_annotated(path: str) -> None:
    """A Label Studio export in which a person has accepted every task."""
    tasks = json.loads(Path(path).read_text())
    for task in tasks:
        (prediction,) = task["predictions"]
        task["annotations"] = [{"result": prediction["result"], "updated_at": "2024-05-01T00:00:00Z", "was_cancelled": False}]
    Path(path).write_text(json.dumps(tasks))


def test_images_nobody_has_annotated_keep_their_labels(pseudo, tmp_path):
    out = tmp_path / "Label.txt"
    out.write_text('gt_4.jpg\t[{"transcription": "", "points": [[1, 1], [9, 1], [9, 9]], "difficult": false}]\n\ngt_3.jpg\t[]\n')
    import_corrections("paddle", str(out), pseudo, str(tmp_path / "c.json"))
    first, second, third = read_coco(str(tmp_path / "c.json"), "", check_files=False).records
    assert first.instances == () and len(second.instances) == 1
    assert third.instances[0].score == pytest.approx(0.6) and third.instances[0].lossweight == pytest.approx(0.3)
    done = import_corrections("paddle", str(out), pseudo, str(tmp_path / "only"), only_corrected=True)
    assert done.images == 2 and [r.id for r in read_coco(str(tmp_path / "only"), "", check_files=False).records] == [3, 4]


def region(kind: str, value: dict, **more) -> dict:
    return {"id": "a", "type": kind, "original_width": 120, "original_height": 80, "image_rotation": 0, "value": value, **more}


def tasks(tmp_path, *annotations, data=None) -> str:
    path = tmp_path / "export.json"
    data = data or {"image": "/data/local-files/?d=x/gt_3.jpg"}
    path.write_text(json.dumps([{"id": 7, "data": data, "annotations": annotations}]))
    return str(path)


def test_label_studio_regions(pseudo, tmp_path):
    polygon = {"points": [[10, 10], [50, 10], [50, 50]], "polygonlabels": ["text"]}
    box = {"x": 50, "y": 50, "width": 10, "height": 10, "rotation": 90, "rectanglelabels": ["###"]}
    area = region("textarea", {"text": ["CAFE"]})
    old = {"updated_at": "2024-01-01", "result": []}
    new = {"updated_at": "2024-02-01", "result": [region("polygonlabels", polygon), region("rectanglelabels", box, id="b"), area]}
    skipped = {"updated_at": "2024-03-01", "was_cancelled": True, "result": []}
    import_corrections("label-studio", tasks(tmp_path, old, new, skipped), pseudo, str(tmp_path / "c.json"))
    first, second = read_coco(str(tmp_path / "c.json"), "", check_files=False).records[0].instances
    np.testing.assert_allclose(first.polygon, [[12, 8], [60, 8], [60, 40]], atol=1e-4)
    assert first.text == "CAFE" and second.ignore
    # Turned by 90 degrees about its top left corner at (60, 40): 12 wide becomes 12 high, to the left.
    np.testing.assert_allclose(second.polygon, [[60, 40], [60, 52], [52, 52], [52, 40]], atol=1e-4)


def ocr(kind: str, value: dict, identity: str, text: str | None, label: str | None, by: str = "labels") -> list[dict]:
    """A region as Label Studio's OCR template has it: shape, label and transcription are results of one id."""
    found = [region(kind, value, id=identity)]
    if label is not None:
        found.append(region(by, {**value, by: [label]}, id=identity))
    if text is not None:
        found.append(region("textarea", {**value, "text": [text]}, id=identity))
    return found


@pytest.mark.parametrize("by", ["labels", "choices"])
@pytest.mark.parametrize("key", ["image", "ocr", "my photo"])
def test_label_studio_templates_with_shape_and_label_apart(by, key, pseudo, tmp_path):
    box = {"x": 10, "y": 10, "width": 20, "height": 10, "rotation": 0}
    ring = {"points": [[50, 50], [70, 50], [70, 60], [50, 60]], "closed": True}
    result = [
        *ocr("rectangle", box, "a", "HELLO", "Text", by),
        *ocr("polygon", ring, "b", "WORLD", None),
        *ocr("polygon", ring, "c", "x", "ignore", by),
        {"type": "relation", "from_id": "a", "to_id": "b", "direction": "right"},
        {"type": "choices", "value": {"choices": ["good picture"]}, "from_name": "q", "to_name": "image"},
    ]
    data = {key: "https://host/photos/gt_3.jpg?x=1", "caption": "a street"}
    done = import_corrections("label-studio", tasks(tmp_path, {"result": result}, data=data), pseudo, str(tmp_path / "c.json"))
    assert (done.instances, done.ignored, done.problems) == (2, 1, ())
    found = read_coco(str(tmp_path / "c.json"), "", check_files=False).records[0].instances
    assert [(i.text, i.ignore) for i in found] == [("HELLO", False), ("WORLD", False), (None, True)]
    np.testing.assert_allclose(found[0].polygon, [[12, 8], [36, 8], [36, 16], [12, 16]], atol=1e-4)


def test_a_task_with_two_images_and_another_label(pseudo, tmp_path):
    with pytest.raises(UserError, match="task 7: data has several images \\('a', 'b'\\)"):
        source = tasks(tmp_path, {"result": []}, data={"a": "x/1.jpg", "b": "x/2.jpg"})
        import_corrections("label-studio", source, pseudo, str(tmp_path / "c.json"))
    box = {"x": 10, "y": 10, "width": 20, "height": 10}
    source = tasks(tmp_path, {"result": ocr("rectangle", box, "a", "HELLO", "Handwriting")})
    done = import_corrections("label-studio", source, pseudo, str(tmp_path / "c.json"))
    assert done.ignored == 1 and "label 'Handwriting' is not 'text'" in str(done.problems[0]), (
        "said, because it may be a surprise"
    )


@pytest.mark.parametrize("format", READERS)
def test_a_crossed_quadrilateral_comes_back_as_its_hull(format, tmp_path):
    base = str(tmp_path / "base.json")
    write_coco(base, [ImageRecord(1, "gt_1.jpg", 80, 120, (Instance(BOX),))])
    out = Path(export(format, base, tmp_path))
    if format == "label-studio":
        as_annotated(str(out))
    path = out / "gt_1.json" if out.is_dir() else out
    content = path.read_text()
    # The last two corners change places.
    if format == "cvat":
        content = content.replace("30.0,60.0;5.0,60.0", "5.0,60.0;30.0,60.0")
    else:
        value = json.loads(content.partition("\t")[2] or content) if format == "paddle" else json.loads(content)
        holder = {"paddle": lambda: value[0], "labelme": lambda: value["shapes"][0]}.get(
            format, lambda: value[0]["annotations"][0]["result"][0]["value"]
        )()
        first, second, third, fourth = holder["points"]
        holder["points"] = [first, second, fourth, third]
        content = ("gt_1.jpg\t" if format == "paddle" else "") + json.dumps(value)
    path.write_text(content)
    done = import_corrections(format, str(out), base, str(tmp_path / "c.json"))
    assert [p.kind for p in done.problems] == ["crossing"] and done.instances == 1
    (record,) = read_coco(str(tmp_path / "c.json"), "", check_files=False).records
    assert geometry.polygon_area(record.instances[0].polygon) == pytest.approx(250, abs=0.1)


def test_labelme_groups_are_one_instance_and_companions_are_passed_over(pseudo, tmp_path):
    out = tmp_path / "labelme"
    export("labelme", pseudo, tmp_path)
    (out / "._gt_3.json").write_bytes(b"\0\5\26\7")
    content = json.loads((out / "gt_3.json").read_text())

    def shape(x: float, width: float, group: object, label: str = "text") -> dict:
        points = [[x, 10], [x + width, 10], [x + width, 20], [x, 20]]
        return {"label": label, "points": points, "group_id": group, "shape_type": "polygon"}

    shapes = [
        shape(10, 10, 1),
        shape(40, 30, 1),
        shape(80, 5, 1, "ignore"),
        shape(90, 5, 2),
        shape(100, 5, None),
        shape(110, 5, None),
    ]
    (out / "gt_3.json").write_text(json.dumps(content | {"shapes": shapes}))
    done = import_corrections("labelme", str(out), pseudo, str(tmp_path / "c.json"))
    assert [p.kind for p in done.problems] == ["parts"]
    found = read_coco(str(tmp_path / "c.json"), "", check_files=False).records[0].instances
    assert [(int(i.polygon[:, 0].min()), i.ignore) for i in found] == [
        (40, False),
        (80, True),
        (90, False),
        (100, False),
        (110, False),
    ]


def test_cvat_carries_scores_votes_and_texts(pseudo, tmp_path):
    root = fromstring(Path(export("cvat", pseudo, tmp_path)).read_text())
    polygons = root.findall("image/polygon")
    attributes = [{a.get("name"): a.text for a in polygon} for polygon in polygons]
    assert attributes[0] == {"score": "0.900", "votes": "2"}
    assert attributes[2] == {"score": "0.600", "votes": "1", "text": '永安, "药" & <b>店'}


def test_what_a_reviewer_trips_over_is_named(tmp_path, caplog):
    caplog.set_level(logging.INFO, "i3cl")
    inner, line = BOX * 0.2 + [10, 44], np.array([[5, 5], [60, 5], [60, 6], [5, 6]])
    instances = tuple(Instance(np.asarray(p, np.float32)) for p in (BOX, inner, line))
    write_coco(str(tmp_path / "s.json"), [ImageRecord(1, "a.jpg", 80, 120, instances)])
    for format in READERS:
        caplog.clear()
        export(format, str(tmp_path / "s.json"), tmp_path)
        assert "1 polygons lie inside another one, 1 are less than 2 px wide" in caplog.text
        assert "a.jpg: polygon 3 is less than 2 px wide" in caplog.text
        assert "a.jpg: polygon 2 lies inside polygon 1" in caplog.text
    caplog.clear()
    export("coco", str(tmp_path / "s.json"), tmp_path)
    assert "reviewer" not in caplog.text


def test_entries_of_one_file_are_joined_on_request(pseudo, tmp_path, caplog):
    caplog.set_level(logging.INFO, "i3cl")
    content = json.loads(Path(pseudo).read_text())
    content["images"].append({"id": 20, "file_name": "gt_4.jpg", "height": 80, "width": 120})
    content["annotations"].append({"id": 99, "image_id": 20, "category_id": 1, "segmentation": [BOX.ravel().tolist()]})
    Path(pseudo).write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"image 20: is the file 'gt_4\.jpg', as image 4 is"):
        export("coco", pseudo, tmp_path)
    records = read_coco(export("coco", pseudo, tmp_path, join=True), "", check_files=False).records
    assert [r.id for r in records] == [3, 9, 4] and len(records[2].instances) == 1
    assert "joined 2 entries of 1 files" in caplog.text


def test_only_skipped_tasks_are_nothing_to_bring_back(pseudo, tmp_path):
    source = tasks(tmp_path, {"was_cancelled": True, "result": []})
    with pytest.raises(UserError, match="no annotated image"):
        import_corrections("label-studio", source, pseudo, str(tmp_path / "c.json"))


@pytest.mark.parametrize(
    ("result", "data", "message"),
    [
        ([], {"image": "gt_77.jpg"}, r"task 7: image 'gt_77.jpg' is not in .*pseudo.json"),
        ([region("brushlabels", {"rle": [1]})], None, "task 7: region 1: is of type 'brushlabels'"),
        ([region("polygonlabels", {"points": [[1, 1], [2, 2]], "polygonlabels": ["text"]})], None, "at least 3 points"),
        ([region("polygonlabels", {"points": [[1, 1], [9, 2], [5, 5]]})], None, "label is missing"),
        ([region("polygonlabels", {"points": "x", "polygonlabels": ["text"]})], None, "list of numbers"),
        ([region("polygonlabels", {"points": [[1, 1e999], [9, 2], [5, 5]], "polygonlabels": ["text"]})], None, "not finite"),
        ([region("polygonlabels", {}, original_width=80, original_height=120)], None, "width 80 there and 120"),
        ([region("polygonlabels", {}, image_rotation=90)], None, "rotated"),
        ([region("polygonlabels", {}, original_width="x")], None, "not one size"),
        ([region("polygonlabels", {}, original_width=[120])], None, "not one size"),
        ([region("rectanglelabels", {"x": 10**400, "y": 1, "width": 1, "height": 1})], None, "without usable x"),
        ([region("rectanglelabels", {"x": 1, "y": 1, "width": 1, "height": 1, "rotation": 10**400})], None, "without usable x"),
        (5, None, "result is not a list"),
        ([], {"x": 1}, "neither file_name nor the address of an image, but 'x'"),
    ],
)
def test_broken_label_studio_exports(result, data, message, pseudo, tmp_path):
    with pytest.raises(UserError, match=message) as caught:
        import_corrections("label-studio", tasks(tmp_path, {"result": result}, data=data), pseudo, str(tmp_path / "c.json"))
    assert "\n" not in str(caught.value) and not (tmp_path / "c.json").exists()


def test_skip_bad_lists_regions_that_cannot_be_used(pseudo, tmp_path):
    source = tasks(tmp_path, {"result": [region("brushlabels", {"rle": [1]})]})
    done = import_corrections("label-studio", source, pseudo, str(tmp_path / "c.json"), skip_bad=True)
    assert [p.kind for p in done.problems] == ["region", "no region usable"]
    assert (done.images, done.corrected, done.instances, done.removed) == (3, 0, 0, 0)
    assert len(read_coco(str(tmp_path / "c.json"), "", check_files=False).records[0].instances) == 2, "not one without text"


def cvat(tmp_path, shapes: str, name="gt_3.jpg", head="") -> str:
    path = tmp_path / "annotations.xml"
    image = f'<image id="0" name="{name}" width="120" height="80">{shapes}</image>'
    path.write_text(f"{head}<annotations><version>1.1</version>{image}</annotations>")
    return str(path)


def test_cvat_shapes_and_its_zip(pseudo, tmp_path):
    source = cvat(
        tmp_path,
        '<tag label="x"/><polygon label="Text" points="1,1;9.5,1;9,9" occluded="0"><attribute name="text">A</attribute></polygon>'
        '<polygon label="text" points="1,1;9.5,1;9,9" occluded="1"/><box label="ignore" xtl="10" ytl="20" xbr="30" ybr="40"/>',
    )
    with zipfile.ZipFile(tmp_path / "cvat.zip", "w") as archive:
        archive.write(source, "annotations.xml")
    for path in (source, str(tmp_path / "cvat.zip")):
        import_corrections("cvat", path, pseudo, str(tmp_path / "c.json"))
        found = read_coco(str(tmp_path / "c.json"), "", check_files=False).records[0].instances
        assert [(i.ignore, i.text) for i in found] == [(False, "A"), (True, None), (True, None)]
        np.testing.assert_array_equal(found[2].polygon, [[10, 20], [30, 20], [30, 40], [10, 40]])


@pytest.mark.parametrize(
    ("shapes", "options", "message"),
    [
        ('<polygon label="text" points="1,1;2"/>', {}, "region 1: has a point that is not x,y"),
        ('<polygon label="text" points="1,1;x,2;3,3"/>', {}, "not a number"),
        ('<polygon label="text" points="1,1;nan,2;3,3"/>', {}, "not a number"),
        ('<polygon points="1,1;9,2;3,3"/>', {}, "label is missing"),
        ('<mask label="text" rle="1" />', {}, "is a mask; draw polygons"),
        ("<polygon", {}, "not usable xml"),
        ("</image><track/><image>", {}, "tracks of a video"),
        ("&a;", {"head": '<!DOCTYPE x [<!ENTITY a "b">]>'}, "refused"),
        ("", {"name": "../../etc/passwd"}, r"'../../etc/passwd' is not in"),
        ("", {"name": ""}, "has no name"),
    ],
)
def test_broken_cvat_exports(shapes, options, message, pseudo, tmp_path):
    with pytest.raises(UserError, match=message) as caught:
        import_corrections("cvat", cvat(tmp_path, shapes, **options), pseudo, str(tmp_path / "c.json"))
    assert "\n" not in str(caught.value)


def test_a_zip_without_annotations_and_no_zip(pseudo, tmp_path):
    zipfile.ZipFile(tmp_path / "empty.zip", "w").close()
    (tmp_path / "text.zip").write_text("x")
    good = io.BytesIO()
    with zipfile.ZipFile(good, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("annotations.xml", "<annotations/>" + " " * 99)
    data = bytearray(good.getvalue())
    body = 30 + len("annotations.xml")
    (tmp_path / "damaged.zip").write_bytes(data[:body] + b"\xff" * 9 + data[body + 9 :])
    data[6] |= 1
    data[data.rindex(b"PK\1\2") + 8] |= 1
    (tmp_path / "encrypted.zip").write_bytes(data)
    for name, method in (("bzip2.zip", zipfile.ZIP_BZIP2), ("lzma.zip", zipfile.ZIP_LZMA)):
        with zipfile.ZipFile(tmp_path / name, "w", method) as archive:
            archive.writestr("annotations.xml", "<annotations/>" + " " * 99)
        data = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(data[: body + 12] + b"\xff" * 9 + data[body + 21 :])
    for name in ("empty.zip", "text.zip", "damaged.zip", "encrypted.zip", "bzip2.zip", "lzma.zip"):
        with pytest.raises(UserError, match=name):
            import_corrections("cvat", str(tmp_path / name), pseudo, str(tmp_path / "c.json"))


def test_labelme_rectangles_and_other_shapes(pseudo, tmp_path):
    out = tmp_path / "labelme"
    export("labelme", pseudo, tmp_path)
    assert json.loads((out / "größe & co" / "永 安 'x' 100%_5.json").read_text())["imagePath"] == "永 安 'x' 100%_5.jpg"
    content = json.loads((out / "gt_3.json").read_text())
    content["shapes"] = [{"label": "text", "points": [[30, 40], [10, 20]], "shape_type": "rectangle"}]
    (out / "gt_3.json").write_text(json.dumps(content))
    import_corrections("labelme", str(out), pseudo, str(tmp_path / "c.json"))
    (instance,) = read_coco(str(tmp_path / "c.json"), "", check_files=False).records[0].instances
    assert instance.polygon.min() == 10 and instance.polygon.max() == 40
    content["shapes"][0]["shape_type"] = "circle"
    (out / "gt_3.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"gt_3\.json: region 1: is of shape_type 'circle'"):
        import_corrections("labelme", str(out), pseudo, str(tmp_path / "c.json"))
    content["shapes"] = [{"label": "text", "points": [[10**400, 40], [10, 20]], "shape_type": "rectangle"}]
    (out / "gt_3.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"gt_3\.json: region 1: .*without usable corners"):
        import_corrections("labelme", str(out), pseudo, str(tmp_path / "c.json"))


def test_images_of_one_name_in_two_folders(tmp_path):
    base = str(tmp_path / "base.json")
    write_coco(base, [ImageRecord(1, "a/x.jpg", 80, 120), ImageRecord(2, "b/x.jpg", 80, 120)])
    (tmp_path / "Label.txt").write_text("root/b/x.jpg\t[]\n")
    assert import_corrections("paddle", str(tmp_path / "Label.txt"), base, str(tmp_path / "c.json")).corrected == 1
    (tmp_path / "Label.txt").write_text("x.jpg\t[]\n")
    with pytest.raises(UserError, match=r"'x.jpg' may be a/x.jpg or b/x.jpg|may be b/x.jpg or a/x.jpg"):
        import_corrections("paddle", str(tmp_path / "Label.txt"), base, str(tmp_path / "c.json"))
    with pytest.raises(UserError, match=r"a/x.jpg: both would be res_x\.txt"):
        export_labels("icdar", base, str(tmp_path / "c.zip"))
    assert not (tmp_path / "c.zip").exists()


@pytest.mark.parametrize("format", READERS)
def test_damaged_files_are_user_errors(format, pseudo, tmp_path):
    """Bytes changed, cut and doubled at random: the reader either copes or names the file in one line."""
    out = Path(export(format, pseudo, tmp_path))
    if format == "label-studio":
        as_annotated(str(out))
    file = out / "gt_3.json" if out.is_dir() else out
    right = file.read_bytes()
    rng = random.Random(5)
    for _ in range(80):
        wrong = bytearray(right)
        for _ in range(rng.randint(1, 3)):
            place = rng.randrange(len(wrong) - 1)
            action = rng.randrange(4)
            if action == 0:
                wrong[place] = rng.choice(b'0"[]{}<>,.-ex\x00\xff\n\t')
            elif action == 1:
                del wrong[place : place + rng.randint(1, 30)]
            elif action == 2:
                wrong[place:place] = wrong[place : place + rng.randint(1, 30)]
            else:
                wrong[place:place] = rng.choice([b"null", b"1e999", b"-", b"[]", b"9" * 400, b"\xed\xa0\x80", b"&x;"])
        file.write_bytes(bytes(wrong))
        try:
            import_corrections(format, str(out), pseudo, str(tmp_path / "c.json"))
        except UserError as error:
            assert "\n" not in str(error) and str(tmp_path) in str(error)


# ------------------------------------------------------------------------------------------------------ one way


def test_art_submission(tmp_path):
    source = predicted(tmp_path / "predictions")
    out = json.loads(Path(export("art", source, tmp_path, member="a", score=0.7)).read_text())
    assert set(out) == {"res_3", "res_4", "res_5", "res_12"} and out["res_4"] == out["res_5"] == out["res_12"] == []
    (found,) = out["res_3"]
    assert found["confidence"] == pytest.approx(0.9) and [10, 20] in found["points"]
    x, y = np.array(found["points"]).T
    assert (x * np.roll(y, -1) - np.roll(x, -1) * y).sum() > 0, "clockwise on screen"
    assert len(json.loads(Path(export("art", source, tmp_path, member="a")).read_text())["res_5"]) == 1


def test_names_that_art_cannot_have(tmp_path):
    for names, message in ((["x.jpg"], "no number"), (["gt_1.jpg", "a/gt_1.jpg"], "both would be res_1")):
        write_coco(str(tmp_path / "s.json"), [ImageRecord(i, name, 8, 8) for i, name in enumerate(names)])
        with pytest.raises(UserError, match=message):
            export("art", str(tmp_path / "s.json"), tmp_path)
        assert not (tmp_path / "art.json").exists()


def test_members_must_be_chosen(tmp_path):
    source = predicted(tmp_path / "predictions")
    with pytest.raises(UserError, match="predictions of a, b; choose one"):
        read_labels(source)
    with pytest.raises(UserError, match="no predictions of c; it has a, b"):
        read_labels(source, member="c")
    assert next(i for r in read_labels(source, member="b") for i in r.instances).score == pytest.approx(0.59)


def test_coco_results_are_what_pycocotools_loads(pseudo, tmp_path):
    results = COCO(pseudo).loadRes(export("coco-results", pseudo, tmp_path))
    assert {a["image_id"] for a in results.anns.values()} == {3, 9}
    first = results.loadAnns(results.getAnnIds([3]))[0]
    mask = results.annToMask(first)
    assert mask.shape == (80, 120) and mask[25, 60] == 1 and first["score"] == pytest.approx(0.9)


def test_icdar_zip_is_flat(pseudo, tmp_path):
    with zipfile.ZipFile(export("icdar", pseudo, tmp_path)) as archive:
        assert archive.namelist() == ["res_gt_3.txt", "res_gt_4.txt", "res_永 安 'x' 100%_5.txt"]
        assert archive.read("res_gt_4.txt") == b"" and archive.read("res_gt_3.txt").endswith(b",0.9000\n")
    with zipfile.ZipFile(export("icdar", pseudo, tmp_path, confidence=False)) as archive:
        assert len(archive.read("res_gt_3.txt").split(b",")) % 2 == 0


@pytest.mark.parametrize("format", FORMATS)
def test_every_format_takes_every_source(format, pseudo, tmp_path):
    shards, empty = str(tmp_path / "shards"), str(tmp_path / "empty.json")
    write_shards(shards, labels())
    write_coco(empty, [])
    for name, source in (("p", predicted(tmp_path / "predictions")), ("s", shards), ("j", pseudo), ("e", empty)):
        (tmp_path / name).mkdir()
        out = Path(export(format, source, tmp_path / name, member="a" if name == "p" else None, score=0.5))
        assert out.exists()
        if out.suffix == ".json":
            json.loads(out.read_text())


def test_scores_leave_out_what_is_weak_and_keep_what_has_none(tmp_path):
    certain = replace(labels()[0].instances[0], score=None)
    write_coco(str(tmp_path / "s.json"), [replace(labels()[0], instances=(certain, *labels()[0].instances))])
    (record,) = read_labels(str(tmp_path / "s.json"), score=0.95)
    assert [i.score for i in record.instances] == [None]


@pytest.mark.parametrize("options", [{"score": 45}, {"score": float("nan")}, {"member": "a"}])
def test_choices_that_fit_no_labels(options, pseudo, tmp_path):
    with pytest.raises(UserError, match=r"--score|--member"):
        export_labels("cvat", pseudo, str(tmp_path / "a.xml"), **options)


def test_what_skip_bad_leaves_out_is_listed(pseudo, tmp_path, caplog):
    caplog.set_level(logging.INFO, "i3cl")
    content = json.loads(Path(pseudo).read_text())
    content["annotations"][0]["segmentation"] = [[1, 2, 3, 4]]
    Path(pseudo).write_text(json.dumps(content))
    export_labels("cvat", pseudo, str(tmp_path / "a.xml"), skip_bad=True)
    printed = caplog.text
    assert "left out: " in printed and "annotation 1: " in printed and "left out: 1 polygon" in printed


def test_long_polygons_are_simplified_for_label_studio(tmp_path):
    turn = np.linspace(0, 2 * np.pi, 900, endpoint=False)
    circle = np.stack([60 + 30 * np.cos(turn), 40 + 30 * np.sin(turn)], 1).astype(np.float32)
    write_coco(str(tmp_path / "s.json"), [ImageRecord(1, "a.jpg", 80, 120, (Instance(circle),))])
    (task,) = json.loads(Path(export("label-studio", str(tmp_path / "s.json"), tmp_path)).read_text())
    points = task["predictions"][0]["result"][0]["value"]["points"]
    assert 10 < len(points) < 100
    pixels = np.array(points) * [1.2, 0.8] - [60, 40]
    assert np.abs(np.hypot(*pixels.T) - 30).max() < 0.3


def test_a_source_that_is_nothing(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        read_labels(str(tmp_path / "none"))
    with pytest.raises(UserError, match="no Parquet"):
        read_labels(str(tmp_path))


def one_image(tmp_path, name: str = "a.jpg", text: str | None = None) -> str:
    path = str(tmp_path / "base.json")
    word = Instance(np.array([[100, 10], [150, 10], [150, 30]], np.float32), text=text)
    write_coco(path, [ImageRecord(1, name, 100, 200, (word,))])
    return path


def label_txt(tmp_path, name: str = "a.jpg", **more) -> str:
    path = tmp_path / "Label.txt"
    item = {"transcription": "HI", "points": [[10, 10], [60, 10], [60, 30], [10, 30]], **more}
    path.write_text(f"{name}\t{json.dumps([item])}\n")
    return str(path)


@pytest.mark.parametrize("known", ["\u00e9.jpg", "e\u0301.jpg"])
def test_accents_written_as_one_or_as_two_characters_name_the_same_image(known, tmp_path):
    other = "e\u0301.jpg" if known == "\u00e9.jpg" else "\u00e9.jpg"
    done = import_corrections("paddle", label_txt(tmp_path, other), one_image(tmp_path, known), str(tmp_path / "c.json"))
    assert (done.corrected, done.instances) == (1, 1)


@pytest.mark.parametrize(("difficult", "ignored"), [(1, 1), (True, 1), (0, 0), (None, 0)])
def test_difficult_in_a_label_txt_may_be_a_number(difficult, ignored, tmp_path):
    source = label_txt(tmp_path, difficult=difficult)
    assert import_corrections("paddle", source, one_image(tmp_path), str(tmp_path / "c.json")).ignored == ignored


def test_difficult_as_a_text_is_refused(tmp_path):
    with pytest.raises(UserError, match="line 1: region 1: difficult is 'true'"):
        source = label_txt(tmp_path, difficult="true")
        import_corrections("paddle", source, one_image(tmp_path), str(tmp_path / "c.json"))


def test_a_decimal_comma_is_not_two_corners(pseudo, tmp_path):
    source = cvat(tmp_path, '<polygon label="text" points="10,5,10,5;60,10;60,30"/>')
    with pytest.raises(UserError, match="region 1: has a point that is not x,y"):
        import_corrections("cvat", source, pseudo, str(tmp_path / "c.json"))


def test_cvat_zip_without_its_ending(pseudo, tmp_path):
    source = cvat(tmp_path, '<polygon label="text" points="1,1;9.5,1;9,9"/>')
    with zipfile.ZipFile(tmp_path / "task_12", "w") as archive:
        archive.write(source, "annotations.xml")
    assert import_corrections("cvat", str(tmp_path / "task_12"), pseudo, str(tmp_path / "c.json")).instances == 1


def test_cvat_export_has_no_character_that_xml_forbids(tmp_path):
    source = one_image(tmp_path, text="A\uffff\ufffe\x1bB<&>")
    export_labels("cvat", source, str(tmp_path / "o.xml"))
    assert fromstring((tmp_path / "o.xml").read_bytes()).findtext("image/polygon/attribute") == "AB<&>"
    with pytest.raises(UserError, match="XML cannot hold; rename"):
        export_labels("cvat", one_image(tmp_path, "a\uffff.jpg"), str(tmp_path / "o.xml"))


def test_a_parameter_of_a_signed_address_is_not_the_image(tmp_path):
    shape = region("polygonlabels", {"points": [[10, 10], [50, 10], [50, 50]], "polygonlabels": ["text"]})
    shape |= {"original_width": 200, "original_height": 100}
    source = tasks(tmp_path, {"result": [shape]}, data={"image": "https://host/x/a.jpg?signature=1&d=2"})
    assert import_corrections("label-studio", source, one_image(tmp_path), str(tmp_path / "c.json")).instances == 1


def test_turned_boxes_of_x_anylabeling(tmp_path):
    shape = {"label": "text", "shape_type": "rotation", "points": [[10, 10], [60, 10], [60, 30], [10, 30]], "direction": 0.1}
    (tmp_path / "a.json").write_text(json.dumps({"imagePath": "a.jpg", "shapes": [shape]}))
    base, out = one_image(tmp_path), str(tmp_path / "c.json")
    assert import_corrections("labelme", str(tmp_path / "a.json"), base, out).instances == 1
    found = read_coco(out, "", check_files=False).records[0].instances[0]
    assert geometry.polygon_area(found.polygon) == 1000


def test_a_key_that_occurs_twice_is_refused(tmp_path):
    (tmp_path / "a.json").write_text('{"imagePath": "a.jpg", "shapes": [1], "shapes": []}')
    with pytest.raises(UserError, match="key 'shapes' occurs twice"):
        import_corrections("labelme", str(tmp_path / "a.json"), one_image(tmp_path), str(tmp_path / "c.json"))


def test_an_export_does_not_replace_its_source(pseudo, tmp_path):
    before = Path(pseudo).read_bytes()
    (tmp_path / "link.json").symlink_to(pseudo)
    for format, out in (("paddle", pseudo), ("label-studio", str(tmp_path / "link.json"))):
        with pytest.raises(UserError, match="would be overwritten"):
            export_labels(format, pseudo, out)
    assert Path(pseudo).read_bytes() == before
    source = label_txt(tmp_path)
    with pytest.raises(UserError, match="would be overwritten"):
        import_corrections("paddle", source, one_image(tmp_path), source)


def test_images_that_could_not_be_predicted_are_named(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    records = [ImageRecord(1, "a.jpg", 10, 10), ImageRecord(2, "broken.jpg", 0, 0)]
    FORMATS["paddle"].write(str(tmp_path / "Label.txt"), records, ExportOptions())
    assert (tmp_path / "Label.txt").read_text() == "a.jpg\t[]\n"
    assert "left out 1 images that could not be read when they were predicted: broken.jpg" in caplog.text

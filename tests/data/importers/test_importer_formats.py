"""Every data set's own format: what its traps are, and that they are read right."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
from importer_samples import QUAD, RING, RING14, SAMPLES, flat, image, pairs, text

from i3cl.data.importers.base import LabelledImage
from i3cl.data.importers.registry import IMPORTERS, read_labels
from i3cl.errors import UserError


def sample(name: str, root: Path, split: str = "train") -> list[LabelledImage]:
    if name in ("synthtext", "synthtext_plain", "totaltext_mat"):
        pytest.importorskip("scipy.io", reason="scipy writes these samples")
    dataset, write = SAMPLES[name]
    write(root)
    return list(read_labels(dataset, str(root), split))


def rings(image: LabelledImage) -> list[list[tuple[float, ...]]]:
    assert image.instances is not None
    return [[tuple(point) for point in i.polygon.tolist()] for i in image.instances]


def facts(image: LabelledImage) -> list[tuple]:
    assert image.instances is not None
    return [(i.text, i.ignore, i.language) for i in image.instances]


def test_every_importer_has_a_sample():
    assert {dataset for dataset, _ in SAMPLES.values()} == set(IMPORTERS)


def test_art(tmp_path):
    first, second = sample("art", tmp_path)
    assert first.file_name == "train_images/gt_7.jpg"
    assert facts(first) == [("CAFE", False, "Latin"), ("###", True, "Latin")]
    assert rings(first)[0] == RING
    assert second.instances == ()


def test_art_survives_the_way_there_and_back(tmp_path):
    """Labels -> records -> labels is the same object."""
    images = sample("art", tmp_path)
    again = {
        Path(i.file_name).stem: [
            {
                "transcription": x.text,
                "points": x.polygon.astype(int).tolist(),
                "language": x.language,
                "illegibility": x.ignore,
            }
            for x in i.instances
        ]
        for i in images
    }
    assert again == json.loads((tmp_path / "train_labels.json").read_text())


def test_labels_without_their_images_are_read(tmp_path):
    sample("art", tmp_path)
    (tmp_path / "train_images/gt_7.jpg").unlink()
    assert [i.file_name for i in read_labels("art", str(tmp_path))] == ["gt_7.jpg", "train_images/gt_8.jpg"]


def test_an_image_without_labels_is_named(tmp_path):
    sample("art", tmp_path)
    image(tmp_path / "train_images/gt_9.jpg")
    with pytest.raises(UserError, match=r"gt_9\.jpg: no labels"):
        list(read_labels("art", str(tmp_path)))
    problems: list[str] = []
    assert len(list(read_labels("art", str(tmp_path), problems=problems))) == 2
    assert len(problems) == 1


def test_lsvt_reads_both_folders_and_treats_the_mark_as_ignore(tmp_path):
    first, second = sample("lsvt", tmp_path)
    assert (first.file_name, second.file_name) == ("train_full_images_0/gt_3.jpg", "train_full_images_1/gt_4.jpg")
    assert facts(first) == [("永安药店", False, None)]
    assert facts(second) == [("###", True, None)]


def test_lsvt_in_a_folder_of_another_name(tmp_path):
    sample("lsvt", tmp_path)
    (tmp_path / "train_full_images_0").rename(tmp_path / "train_images")
    (tmp_path / "train_full_images_1/gt_4.jpg").rename(tmp_path / "train_images/gt_4.jpg")
    found = [i.file_name for i in read_labels("lsvt", str(tmp_path))]
    assert found == ["train_images/gt_3.jpg", "train_images/gt_4.jpg"]


def test_lsvt_keeps_full_and_weak_images_of_one_name_apart(tmp_path):
    sample("lsvt", tmp_path)
    SAMPLES["lsvt_weak"][1](tmp_path)
    image(tmp_path / "train_weak_images_0/gt_3.jpg")
    image(tmp_path / "test_part1_images/gt_3.jpg")
    assert len(list(read_labels("lsvt", str(tmp_path)))) == 2
    assert [i.file_name for i in read_labels("lsvt_weak", str(tmp_path))] == [
        "train_weak_images_0/gt_3.jpg",
        "train_weak_images_0/gt_900.jpg",
    ]
    assert [i.file_name for i in read_labels("lsvt_test", str(tmp_path))] == ["test_part1_images/gt_3.jpg"]


@pytest.mark.parametrize("name", ["lsvt_weak", "lsvt_test", "folder"])
def test_sets_without_polygons_are_unlabelled_and_not_empty(name, tmp_path):
    images = sample(name, tmp_path)
    assert images
    assert all(i.instances is None for i in images)
    assert [i.keywords for i in images if i.keywords] == ([("永安药店",)] if name == "lsvt_weak" else [])


def test_mlt19_text_with_a_comma(tmp_path):
    (only,) = sample("mlt19", tmp_path)
    assert facts(only) == [("Rue de l'Or, 12", False, "Latin"), ("###", True, None)]
    assert only.file_name == "ImagesPart1/tr_img_00001.jpg"


def test_mlt19_prefix_of_the_label_file(tmp_path):
    sample("mlt19", tmp_path)
    (tmp_path / "train_gt/tr_img_00001.txt").rename(tmp_path / "train_gt/gt_tr_img_00001.txt")
    assert len(list(read_labels("mlt19", str(tmp_path)))) == 1


def test_rctw_text_with_a_comma_and_quotes(tmp_path):
    (only,) = sample("rctw", tmp_path)
    assert facts(only) == [("光明,眼镜", False, None), ('a ""b""', True, None)]


def test_rects(tmp_path):
    (only,) = sample("rects", tmp_path)
    assert facts(only) == [("米线", False, None), ("x", True, None)]
    assert rings(only)[0] == QUAD


def test_rects_with_both_label_folders_of_the_download(tmp_path):
    (before,) = sample("rects", tmp_path)
    (path,) = (tmp_path / "gt").iterdir()
    text(tmp_path / "gt_unicode" / path.name, path.read_text())
    path.write_bytes(b"\xff")
    (found,) = read_labels("rects", str(tmp_path))
    assert facts(found) == facts(before)


def test_ctw1500_xml_and_test_text(tmp_path):
    first, second = sample("ctw1500", tmp_path)
    assert facts(first) == [("HELLO & Co", False, None), ("###", True, None)]
    assert rings(first)[0] == RING14
    assert second.instances == ()
    (test,) = read_labels("ctw1500", str(tmp_path), "test")
    assert test.file_name == "test_images/1001.jpg"
    assert facts(test) == [("SEA, SUN", False, None), ("###", True, None)]
    assert rings(test)[0] == RING


def test_ctw1500_xml_with_blanks_around_numbers(tmp_path):
    content = b"<image><box><label/><segs>\n 1, 2,\n30 ,2,30,20\n</segs></box></image>"
    found = next(read_labels("ctw1500", write(tmp_path, "ctw1500", content)))
    np.testing.assert_array_equal(found.instances[0].polygon, [[1, 2], [30, 2], [30, 20]])


def test_ctw1500_offsets_give_the_ring_of_the_absolute_points(tmp_path):
    (old,) = sample("ctw1500_v1", tmp_path / "v1")
    new, _ = sample("ctw1500", tmp_path / "v2")
    assert rings(old)[0] == rings(new)[0]
    assert facts(old) == [(None, False, None)]


def test_ctw1500_copy_with_numbers_as_text(tmp_path):
    (only,) = sample("ctw1500_copy", tmp_path)
    assert facts(only) == [("12,30", False, None), ("###", True, None)]
    assert rings(only)[0] == RING14


def test_totaltext_legacy_text(tmp_path):
    (only,) = sample("totaltext", tmp_path)
    assert facts(only) == [("L'OR", False, None), ("#", True, None), ("", False, None), ("a, bé", True, None)]
    assert rings(only)[0] == RING
    assert rings(only)[2][0] == (-4, 20)
    assert rings(only)[3] == [(5, 6)]


def test_totaltext_mat_gives_the_ring_of_the_text(tmp_path):
    (from_mat,) = sample("totaltext_mat", tmp_path / "mat")
    (from_text,) = sample("totaltext", tmp_path / "txt")
    assert rings(from_mat)[0] == rings(from_text)[0]
    assert facts(from_mat) == [("L'OR", False, None), ("#", True, None), ("a", True, None)]


def test_totaltext_rectangles_are_read_only_where_there_is_no_polygon(tmp_path):
    sample("totaltext_mat", tmp_path)
    from scipy.io import savemat

    image(tmp_path / "Images/Train/img2.jpg")
    row = np.empty((1, 8), object)
    row[0] = [10, 20, 50, 40, 40, 20, "BOX", "h"]
    folder = tmp_path / "Groundtruth/Rectangular/Train"
    folder.mkdir(parents=True)
    for number in (1, 2):
        savemat(folder / f"rect_gt_img{number}.mat", {"rectgt": row})
    first, second = read_labels("totaltext", str(tmp_path))
    assert len(first.instances or ()) == 3
    assert rings(second) == [[(10, 20), (50, 20), (50, 40), (10, 40)]]
    assert facts(second) == [("BOX", False, None)]


def test_totaltext_copies(tmp_path):
    first, second = sample("totaltext_copy", tmp_path)
    assert facts(first) == [("PAUL, 3", False, None), ("###", True, None), ("2008", False, None)]
    assert facts(second) == [("PAUL, 3", False, None), ("###", True, None)]
    assert rings(first)[0] == rings(second)[0] == RING


def test_synthtext(tmp_path):
    images = sample("synthtext", tmp_path)
    assert [[i.text for i in x.instances or ()] for x in images] == [
        ["Lines:", "lost", "Kevin", "are"],
        ["one"],
        ["two", "words"],
    ]
    assert images[1].file_name == "8/ballet_1.jpg"
    for labelled in images:
        for i in labelled.instances or ():
            np.testing.assert_allclose(i.polygon - i.polygon[0], [[0, 0], [30, 0], [30, 12], [0, 12]], atol=1e-4)


def test_synthtext_in_the_folder_of_its_archive(tmp_path):
    before = sample("synthtext", tmp_path / "SynthText")
    found = list(read_labels("synthtext", str(tmp_path)))
    assert [i.file_name for i in found] == [f"SynthText/{i.file_name}" for i in before]
    sample("synthtext", tmp_path / "other")
    with pytest.raises(UserError, match="several"):
        list(read_labels("synthtext", str(tmp_path)))


def test_synthtext_boxes_are_those_that_scipy_reads(tmp_path):
    images = sample("synthtext", tmp_path)
    from scipy.io import loadmat

    whole = loadmat(tmp_path / "gt.mat")
    for labelled, box in zip(images, whole["wordBB"][0], strict=True):
        words = box.reshape(2, 4, -1)
        for k, i in enumerate(labelled.instances or ()):
            np.testing.assert_array_equal(i.polygon, words[:, :, k].T.astype(np.float32))


def test_icdar2013_blanks_and_commas(tmp_path):
    first, second = sample("icdar2013", tmp_path)
    assert facts(first) == [("Tiredness", False, None), ('a, "b" c', False, None)]
    assert facts(second) == [("Kill, A", False, None), ("###", True, None)]
    assert rings(first)[0] == rings(second)[0] == [(38, 43), (92, 43), (92, 115), (38, 115)]


def test_icdar2015(tmp_path):
    (only,) = sample("icdar2015", tmp_path)
    assert facts(only) == [("Genaxis, Theatre", False, None), ("###", True, None)]


TEXT_SAMPLES = ["art", "mlt19", "rctw", "icdar2013", "icdar2015", "totaltext", "totaltext_copy", "ctw1500_copy"]


@pytest.mark.parametrize("name", TEXT_SAMPLES)
def test_byte_order_mark_and_line_ends_change_nothing(name, tmp_path):
    before = sample(name, tmp_path)
    for path in SAMPLES[name][1](tmp_path):
        data = path.read_bytes().removeprefix(b"\xef\xbb\xbf").replace(b"\r\n", b"\n")
        path.write_bytes(data)
        plain = list(read_labels(SAMPLES[name][0], str(tmp_path)))
        path.write_bytes(b"\xef\xbb\xbf" + data.replace(b"\n", b"\r\n"))
    marked = list(read_labels(SAMPLES[name][0], str(tmp_path)))
    for other in (plain, marked):
        assert [(i.file_name, facts(i), rings(i)) for i in other] == [(i.file_name, facts(i), rings(i)) for i in before]


def test_real_icdar_files():
    folder = Path(os.environ.get("I3CL_SHARED", Path(__file__).parents[4] / "shared")) / "realtext/icdar_sample"
    if not folder.is_dir():
        pytest.skip("no real sample files here")
    images = list(read_labels("icdar2015", str(folder)))
    assert len(images) == 6
    lines = sum(len(p.read_text("utf-8-sig").split()) for p in folder.glob("*.txt"))
    assert sum(len(i.instances or ()) for i in images) == lines
    assert all(i.ignore == (i.text == "###") for x in images for i in x.instances or ())


def write(root: Path, name: str, content: bytes) -> str:
    """A folder in which the sample's first label file has this content."""
    paths = SAMPLES[name][1](root)
    paths[0].write_bytes(content)
    return str(root)


ART_ENTRY = {"transcription": "a", "points": pairs(QUAD), "language": "Latin", "illegibility": False}


def art_with(**changes) -> bytes:
    return json.dumps({"gt_7": [{**ART_ENTRY, **changes}], "gt_8": []}).encode()


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("art", b"", "not valid JSON"),
        ("art", b"[]", "a list of 0; expected an object"),
        ("art", b"[" * 200_000, "nested too deeply"),
        ("art", b'{"gt_7": ' + b"1" * 5000 + b"}", "not usable JSON"),
        ("art", b'{"gt_7": [], "gt_7": []}', "'gt_7' occurs twice"),
        ("art", b'{"../gt_7": []}', "is not an image's name"),
        ("art", b'{"gt_7": {}, "gt_8": []}', "expected a list"),
        ("art", b"\xff\xfe{\0}\0", "not UTF-8 text"),
        ("art", art_with(points=[[1, 2], [3, float("nan")], [5, 5]]), "not finite or beyond any image"),
        ("art", art_with(points=[[1, 2], [3, 10**400], [5, 5]]), "not finite or beyond any image"),
        ("art", art_with(points=[[1, 2], [3, True], [5, 5]]), "True is not a number"),
        ("art", art_with(points=[[1, 2, 3], [3, 4, 5], [5, 5, 5]]), "a point has 3 numbers"),
        ("art", art_with(points=None), "points: is missing"),
        ("art", art_with(transcription=7), "train_labels.json: key gt_7: entry 1: transcription is 7; expected text"),
        ("art", art_with(illegibility="no"), "illegibility is 'no'"),
        ("lsvt_weak", b'{"gt_900": [7]}', "train_weak_labels.json: key gt_900: entry 1: is 7"),
        ("mlt19", b"1,2,3,4,5,6,7,8,Latin\n", "line 1: 9 fields"),
        ("mlt19", b"\n1,2,3,4,5,6,7,8,Klingon,x\n", "line 2: 'Klingon' is not a script"),
        ("mlt19", b"1,2,3,4,5,6,7,1e999,Latin,x\n", "not finite"),
        ("mlt19", "1,2,3,4,5,6,7,٨,Latin,x\n".encode(), "is not a number"),
        ("mlt19", b"1,2,3,4,5,6,7,\x1f8,Latin,x\n", "'\\x1f8' is not a number"),
        ("rctw", b'1,2,3,4,5,6,7,8,2,"x"', "difficult is '2'"),
        ("rctw", b"1,2,3,4,nan,6,7,8,0,x", "'nan' is not a number"),
        ("rects", b'{"chars": []}', "lines: is missing"),
        ("rects", b'{"lines": [{"points": [1, 2], "transcription": "a", "ignore": 0}]}', "2 numbers; expected 8"),
        ("ctw1500", b"<Annotations>", "not valid XML"),
        ("ctw1500", b"<Annotations/>", "0 image elements"),
        ("ctw1500", b"<image><box><label>a</label></box></image>", "box 1: has no segs"),
        (
            "ctw1500",
            b'<!DOCTYPE a [<!ENTITY x "' + b"y" * 1000 + b'">]><image><box><label>&x;</label></box></image>',
            "entities",
        ),
        ("ctw1500", b'<?xml version="1.0" encoding="klingon"?><image/>', "XML"),
        ("ctw1500_v1", b"1,2,3,4,5", "neither"),
        ("totaltext", b"x: [[1 2 3]], y: [[1 2]], ornt: [u'c'], transcriptions: [u'a']", "3 x but 2 y"),
        ("totaltext", b"x: [[1 2 3]], y: [[1 2 3]], ornt: [u'c'], transcriptions: [u'a", "no closing quote"),
        ("totaltext", b"x: [[1 2 3]], y: [[1 2 3]], ornt: [u'c']", "no transcriptions:"),
        ("totaltext", b"x: [[__import__('os') 2 3]], y: [[1 2 3]], ornt: [u'c'], transcriptions: [u'a']", "is not a number"),
        ("totaltext_copy", b"1,2,3,4,5,6,7,8\n", "cannot tell coordinates from text"),
        ("icdar2013", b"1 2 3\n", "line 1: not x1 y1 x2 y2"),
        ("icdar2013", b"1" + b" " * 200_000 + b"x", "line 1"),
        ("icdar2015", b"1,2,3,4,5,6,7,8\n", "8 fields"),
    ],
)
def test_a_broken_label_file_is_one_clear_line(name, content, words, tmp_path):
    root = write(tmp_path, name, content)
    with pytest.raises(UserError) as caught:
        list(read_labels(SAMPLES[name][0], root))
    message = str(caught.value)
    assert words in message
    assert str(tmp_path) in message
    assert "\n" not in message


def test_a_read_me_is_no_label_but_a_label_without_its_image_counts(tmp_path):
    sample("mlt19", tmp_path)
    text(tmp_path / "readme.txt", "All rights reserved.")
    assert len(list(read_labels("mlt19", str(tmp_path)))) == 1
    text(tmp_path / "train_gt/tr_img_00002.txt", "")
    assert [i.file_name for i in read_labels("mlt19", str(tmp_path))][1] == "tr_img_00002.jpg"


def test_a_hostile_size_costs_little_time(tmp_path):
    """Many keys, one twice; a ring of many crossings; deep XML."""
    keys = ",".join(f'"gt_{i}": []' for i in range(100_000))
    root = write(tmp_path / "keys", "art", ("{" + keys + ',"gt_99999": []}').encode())
    with pytest.raises(UserError, match="'gt_99999' occurs twice"):
        list(read_labels("art", root))
    random = np.random.default_rng(0).integers(0, 1000, (5000, 2)).tolist()
    root = write(tmp_path / "ring", "art", art_with(points=random))
    with pytest.raises(UserError, match="a polygon of 5000 points"):
        list(read_labels("art", root))
    root = write(tmp_path / "xml", "ctw1500", b"<image>" * 100_000 + b"</image>" * 100_000)
    assert next(iter(read_labels("ctw1500", root))).instances == ()


def test_two_images_of_one_name_are_refused(tmp_path):
    sample("mlt19", tmp_path)
    image(tmp_path / "ImagesPart2/tr_img_00001.jpg")
    with pytest.raises(UserError, match="stand for the same image"):
        list(read_labels("mlt19", str(tmp_path)))


@pytest.mark.parametrize("name", list(IMPORTERS))
def test_an_empty_or_missing_source_is_named(name, tmp_path):
    for source in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(UserError, match=str(source)):
            list(read_labels(name, str(source)))
    text(tmp_path / "readme.txt", "nothing")
    with pytest.raises(UserError):
        list(read_labels(name, str(tmp_path)))


def test_an_unknown_data_set_is_named():
    with pytest.raises(UserError, match="coco17: not a data set that can be imported; known: art"):
        list(read_labels("coco17", "."))


def test_links_inside_a_source_are_followed_and_circles_end(tmp_path):
    sample("icdar2015", tmp_path / "a")
    (tmp_path / "b").mkdir()
    for name in ("train_images", "train_gt"):
        (tmp_path / "b" / name).symlink_to(tmp_path / "a" / name)
    (tmp_path / "b/up").symlink_to(tmp_path / "b")
    (only,) = read_labels("icdar2015", str(tmp_path / "b"))
    assert only.file_name == "train_images/img_1.jpg"
    assert len(only.instances or ()) == 2


def test_half_a_surrogate_pair_becomes_text_that_a_table_can_hold(tmp_path):
    root = write(tmp_path, "art", art_with(transcription="x\ud800"))
    assert next(iter(read_labels("art", root))).instances[0].text == "x?"


def test_every_line_separator_but_line_feed_belongs_to_the_text(tmp_path):
    root = write(tmp_path, "icdar2015", f"{flat(QUAD)},a\u2028b\x0bc\x85d\n".encode())
    assert facts(next(iter(read_labels("icdar2015", root)))) == [("a\u2028b\x0bc\x85d", False, None)]


def test_doubled_line_ends_are_no_text_and_lone_ones_are_named(tmp_path):
    image(tmp_path / "img_1.jpg")
    path = text(tmp_path / "gt_img_1.txt", f"{flat(QUAD)},one\r\r\n{flat(QUAD)},two\r\r\n")
    assert [i.text for labelled in read_labels("icdar2015", str(tmp_path)) for i in labelled.instances] == ["one", "two"]
    path.write_bytes(f"{flat(QUAD)},one\r{flat(QUAD)},two\r".encode())
    with pytest.raises(UserError, match="line 1: holds a CR"):
        list(read_labels("icdar2015", str(tmp_path)))


def test_a_pipe_among_the_labels_is_named(tmp_path):
    os.mkfifo(tmp_path / "gt_img_1.txt")
    with pytest.raises(UserError, match=r"gt_img_1\.txt: is a pipe"):
        list(read_labels("icdar2015", str(tmp_path)))


def test_an_archive_that_is_not_unpacked_is_told(tmp_path):
    (tmp_path / "set.rar").write_bytes(b"Rar!")
    with pytest.raises(UserError, match=r"set\.rar: is a file and none of \.zip"):
        list(read_labels("icdar2015", str(tmp_path / "set.rar")))

"""One small valid source folder of every data set, invented, in the layout of docs/datasets.md."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image

RING = [(12, 10), (40, 8), (70, 8), (100, 12), (98, 30), (70, 26), (40, 26), (14, 28)]
RING14 = [(10, 24), (25, 20), (40, 18), (55, 17), (70, 18), (85, 20), (100, 24)]
RING14 += [(100, 44), (85, 40), (70, 38), (55, 37), (40, 38), (25, 40), (10, 44)]
QUAD = [(10, 20), (60, 22), (58, 40), (12, 44)]


def flat(ring) -> str:
    return ",".join(f"{x},{y}" for x, y in ring)


def pairs(ring) -> list[list[int]]:
    return [list(point) for point in ring]


def image(path: Path, size: tuple[int, int] = (160, 120)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, "white").save(path)


def text(path: Path, content: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode())
    return path


def art(root: Path) -> list[Path]:
    for number in (7, 8):
        image(root / f"train_images/gt_{number}.jpg")
    labels = {
        "gt_7": [
            {"transcription": "CAFE", "points": pairs(RING), "language": "Latin", "illegibility": False},
            {"transcription": "###", "points": pairs(QUAD), "language": "Latin", "illegibility": True},
        ],
        "gt_8": [],
    }
    return [text(root / "train_labels.json", json.dumps(labels))]


def lsvt(root: Path) -> list[Path]:
    image(root / "train_full_images_0/gt_3.jpg")
    image(root / "train_full_images_1/gt_4.jpg")
    labels = {
        "gt_3": [{"transcription": "永安药店", "points": pairs(QUAD), "illegibility": False}],
        "gt_4": [{"transcription": "###", "points": pairs(QUAD), "illegibility": False}],
    }
    return [text(root / "train_full_labels.json", json.dumps(labels, ensure_ascii=False))]


def lsvt_weak(root: Path) -> list[Path]:
    image(root / "train_weak_images_0/gt_900.jpg")
    return [text(root / "train_weak_labels.json", json.dumps({"gt_900": [{"transcription": "永安药店"}]}))]


def lsvt_test(root: Path) -> list[Path]:
    image(root / "test_part1_images/gt_0.jpg")
    return []


def mlt19(root: Path) -> list[Path]:
    image(root / "ImagesPart1/tr_img_00001.jpg")
    lines = "100,40,150,44,148,90,98,86,Latin,Rue de l'Or, 12\n\n30,10,60,10,60,30,30,30,None,###\n"
    return [text(root / "train_gt/tr_img_00001.txt", lines)]


def rctw(root: Path) -> list[Path]:
    image(root / "train_images/image_0.jpg")
    lines = '39,10,85,10,85,25,39,25,0,"光明,眼镜"\r\n20,30,60,30,60,50,20,50,1,"a ""b"""\r\n'
    return [text(root / "train_gts/image_0.txt", "\ufeff" + lines)]


def rects(root: Path) -> list[Path]:
    image(root / "img/train_ReCTS_000001.jpg")
    points = [number for point in QUAD for number in point]
    labels = {
        "chars": [{"points": points, "transcription": "米", "ignore": 0}],
        "lines": [
            {"points": points, "transcription": "米线", "ignore": 0},
            {"points": points, "transcription": "x", "ignore": 1},
        ],
    }
    return [text(root / "gt/train_ReCTS_000001.json", json.dumps(labels, ensure_ascii=False))]


def ctw1500(root: Path) -> list[Path]:
    """Train in XML, test in the 2020 text form."""
    for name in ("train_images/0200.jpg", "train_images/0201.jpg", "test_images/1001.jpg"):
        image(root / name)
    box = (
        '<box height="40" left="10" top="20" width="120"><label>{}</label><segs>'
        + flat(RING14)
        + '</segs><pts x="20" y="30"/></box>'
    )
    xml = '<Annotations>\n<image file="0200.jpg">\n{}\n</image>\n</Annotations>\n'
    return [
        text(root / "ctw1500_train_labels/0200.xml", xml.format(box.format("HELLO &amp; Co") + box.format("###"))),
        text(root / "ctw1500_train_labels/0201.xml", xml.format("")),
        text(root / "gt_ctw1500_test/0001001.txt", f"{flat(RING)},####SEA, SUN\n5,5,20,5,20,12,5,12,#######\n"),
    ]


def ctw1500_v1(root: Path) -> list[Path]:
    image(root / "train_images/0200.jpg")
    xs, ys = zip(*RING14)
    offsets = [(x - min(xs), y - min(ys)) for x, y in RING14]
    line = f"{min(xs)},{min(ys)},{max(xs)},{max(ys)},{flat(offsets)}\n"
    return [text(root / "train_labels/0200.txt", line)]


def ctw1500_copy(root: Path) -> list[Path]:
    image(root / "train_images/0200.jpg")
    return [text(root / "train_labels/0200.txt", f"{flat(RING14)},12,30\n{flat(RING14)},###\n")]


LEGACY = (
    "x: [[ 12  40  70 100\n   98  70  40  14]], y: [[10 8 8 12 30 26 26 28]], ornt: [u'c'], transcriptions: [u\"L'OR\"]\r\n"
    "x: [[400 478 494 436]], y: [[398 380 448 465]], ornt: [u'#'], transcriptions: [u'#']\n"
    "x: [[-4 60 60 -4]], y: [[20 20 40 40]], ornt: [], transcriptions: []\n"
    "x: [[5]], y: [[6]], ornt: [u'h'], transcriptions: [u'a', u' b\\u00e9']\n"
)


def totaltext(root: Path) -> list[Path]:
    image(root / "Images/Train/img1.JPG")
    return [text(root / "Groundtruth/Text/Train/poly_gt_img1.txt", LEGACY)]


def totaltext_copy(root: Path) -> list[Path]:
    image(root / "Images/Train/img1.jpg")
    image(root / "Images/Train/img2.jpg")
    return [
        text(root / "gt/Train/poly_gt_img1.txt", f"{flat(RING)},PAUL, 3\n{flat(QUAD)},###\n{flat(QUAD)},2008\n"),
        text(root / "gt/Train/0000002.txt", f"{flat(RING)},####PAUL, 3\n{flat(QUAD)},#######\n"),
    ]


def polygt(rows) -> np.ndarray:
    """The cell array of (ring, text, orientation) rows."""
    cells = np.empty((len(rows), 6), object)
    for i, (ring, transcription, orientation) in enumerate(rows):
        x, y = np.array(ring, np.int16).reshape(-1, 2).T
        cells[i] = ["x:", x[None], "y:", y[None], transcription, orientation]
    return cells


def totaltext_mat(root: Path) -> list[Path]:
    from scipy.io import savemat

    image(root / "Images/Train/img1.JPG")
    path = text(root / "Groundtruth/Polygon/Train/poly_gt_img1.mat", "")
    rows = [(RING, "L'OR", "c"), ([(40, 39), (47, 38), (49, 44), (43, 46)], "#", "#"), ([(5, 6)], "a", "h")]
    savemat(path, {"polygt": polygt(rows)})
    return [path]


def synthtext_cells(words_of_images: list[list[str]], seed: int = 0) -> dict[str, np.ndarray]:
    """imnames, wordBB, txt and charBB of images with these words, as MATLAB has them."""
    random = np.random.default_rng(seed)
    count = len(words_of_images)
    cells = {name: np.empty((1, count), object) for name in ("charBB", "imnames", "txt", "wordBB")}
    for i, words in enumerate(words_of_images):
        corner = random.uniform(5, 60, (2, 1, len(words)))
        shape = np.array([[0, 30, 30, 0], [0, 0, 12, 12]], float)[:, :, None]
        boxes = corner + shape
        cells["wordBB"][0, i] = boxes[:, :, 0] if len(words) == 1 else boxes
        cells["charBB"][0, i] = np.zeros((2, 4, sum(map(len, words))))
        cells["imnames"][0, i] = f"8/ballet_{i}.jpg"
        # As in the original: several words to a string, blanks and line ends between.
        cells["txt"][0, i] = np.array([" ".join(words[:2]) + "\n", *words[2:]])
    return cells


def synthtext(root: Path) -> list[Path]:
    from scipy.io import savemat

    root.mkdir(parents=True, exist_ok=True)
    for number in range(3):
        image(root / f"8/ballet_{number}.jpg")
    words = [["Lines:", "lost", "Kevin", "are"], ["one"], ["two", "words"]]
    savemat(root / "gt.mat", synthtext_cells(words), do_compression=True)
    return [root / "gt.mat"]


def synthtext_plain(root: Path) -> list[Path]:
    """The same, not compressed."""
    from scipy.io import loadmat, savemat

    (path,) = synthtext(root)
    savemat(path, {name: value for name, value in loadmat(path).items() if not name.startswith("__")})
    return [path]


def icdar2013(root: Path) -> list[Path]:
    image(root / "train_images/100.jpg")
    image(root / "train_images/101.jpg")
    return [
        text(root / "train_gt/gt_100.txt", '38 43 92 115 "Tiredness"\n5 5 20 15 "a, "b" c"\n'),
        text(root / "train_gt/gt_101.txt", '38, 43, 92, 115, "Kill, A"\r\n5, 5, 20, 15, "###"\r\n'),
    ]


def icdar2015(root: Path) -> list[Path]:
    image(root / "train_images/img_1.jpg")
    lines = "37,17,46,18,46,30,37,29,Genaxis, Theatre\r\n20,30,60,30,60,50,20,50,###\r\n"
    return [text(root / "train_gt/gt_img_1.txt", "\ufeff" + lines)]


def plain_folder(root: Path) -> list[Path]:
    image(root / "a/1.jpg")
    image(root / "b.PNG")
    return []


SAMPLES = {
    "art": ("art", art),
    "lsvt": ("lsvt", lsvt),
    "lsvt_weak": ("lsvt_weak", lsvt_weak),
    "lsvt_test": ("lsvt_test", lsvt_test),
    "mlt19": ("mlt19", mlt19),
    "rctw": ("rctw", rctw),
    "rects": ("rects", rects),
    "ctw1500": ("ctw1500", ctw1500),
    "ctw1500_v1": ("ctw1500", ctw1500_v1),
    "ctw1500_copy": ("ctw1500", ctw1500_copy),
    "totaltext": ("totaltext", totaltext),
    "totaltext_copy": ("totaltext", totaltext_copy),
    "totaltext_mat": ("totaltext", totaltext_mat),
    "synthtext": ("synthtext", synthtext),
    "synthtext_plain": ("synthtext", synthtext_plain),
    "icdar2013": ("icdar2013", icdar2013),
    "icdar2015": ("icdar2015", icdar2015),
    "folder": ("folder", plain_folder),
}
"""Sample -> data set and the function that writes it below a folder and gives its label files."""

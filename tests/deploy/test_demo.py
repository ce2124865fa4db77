"""The page's server: what it answers, what it refuses."""

import io
import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("starlette", reason="needs the packages of the extra 'demo'")
pytest.importorskip("httpx", reason="starlette's test client needs httpx")
from starlette.testclient import TestClient

from i3cl.data.exports import labelme
from i3cl.data.formats.coco import read_coco
from i3cl.data.loading.images import decode_image
from i3cl.deploy.demo import Limits, make_app
from i3cl.detections import Detections

SQUARE = np.array([[2, 3], [12, 3], [12, 9], [2, 9]], np.float32)
ADDRESS = "http://127.0.0.1:8000"


def squares(image):
    """One text of score .9 and one of .3, in any image."""
    return Detections([SQUARE, SQUARE + 4], np.array([0.9, 0.3], np.float32), image.shape[0], image.shape[1])


def client(detector=squares, **limits) -> TestClient:
    return TestClient(make_app(detector, "a <test>", Limits(**limits)), base_url=ADDRESS, raise_server_exceptions=False)


def encoded(width=40, height=30, kind="PNG", **options) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), (200, 10, 10)).save(buffer, kind, **options)
    return buffer.getvalue()


def test_page_loads_nothing_from_elsewhere():
    page = client()
    answers = {path: page.get(path) for path in ("/", "/page.css", "/page.js")}
    assert {path: a.status_code for path, a in answers.items()} == dict.fromkeys(answers, 200)
    assert "a &lt;test>" in answers["/"].text and "At most 20 MB" in answers["/"].text and "{{" not in answers["/"].text
    for answer in answers.values():
        without_namespace = answer.text.replace("http://www.w3.org/2000/svg", "")
        assert "http:" not in without_namespace and "https:" not in without_namespace and "//cdn" not in without_namespace
        assert answer.headers["content-security-policy"].startswith("default-src 'none'")
        assert answer.headers["x-content-type-options"] == "nosniff"
    assert page.get("/../demo.py").status_code == 404
    assert page.get("/page.html").status_code == 404


def test_detects_in_pixels_of_the_photograph():
    answer = client().post("/detect", content=encoded())
    assert answer.status_code == 200
    found = answer.json()
    assert (found["width"], found["height"]) == (40, 30)
    assert [t["score"] for t in found["texts"]] == [0.9, 0.3]
    assert found["texts"][0]["points"] == SQUARE.tolist()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_photograph_is_turned_as_a_browser_shows_it(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    pixels = np.arange(4 * 6 * 3, dtype=np.uint8).reshape(4, 6, 3)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", exif=exif)
    from PIL import ImageOps

    with Image.open(io.BytesIO(buffer.getvalue())) as file:
        wanted = np.array(ImageOps.exif_transpose(file))
    np.testing.assert_array_equal(decode_image(buffer.getvalue(), upright=True), wanted)


@pytest.mark.parametrize(
    ("content", "status", "message"),
    [
        (b"", 415, "empty"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", 415, "not an image in a known format"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n", 415, "not an image in a known format"),
        (encoded()[:60], 415, "cannot be decoded"),
        (encoded(300, 200), 415, "300 x 200 is more than 50000 pixels"),
        (b"\0" * 200_001, 413, "larger than"),
    ],
)
def test_refuses_what_is_not_a_usable_image(content, status, message):
    answer = client(pixels=50_000, bytes=200_000).post("/detect", content=content)
    assert answer.status_code == status and message in answer.json()["error"]


def test_size_is_bounded_without_a_declared_length():
    sent = 0

    def endless():
        nonlocal sent
        while True:
            sent += 1
            yield b"x" * 1000
            if sent > 1000:
                return

    answer = client(bytes=10_000).post("/detect", content=endless())
    assert answer.status_code == 413


def test_no_file_is_read_by_name(tmp_path):
    (tmp_path / "there.png").write_bytes(encoded())
    for content in (str(tmp_path / "there.png").encode(), f"file://{tmp_path}/there.png".encode()):
        assert client().post("/detect", content=content).status_code == 415
    assert client().get("/detect").status_code == 405


@pytest.mark.parametrize("host", ["evil.example", "evil.example:8000", "127.0.0.1.evil.example", "192.168.0.7"])
def test_a_name_that_is_led_here_is_refused(host):
    for path in ("/", "/page.js"):
        assert client().get(path, headers={"host": host}).status_code == 400
    assert client().post("/detect", content=encoded(), headers={"host": host}).status_code == 400
    assert client().get("/", headers={"host": "localhost:8000"}).status_code == 200


def test_another_sites_page_is_refused():
    for origin in ("http://evil.example", "null", "http://127.0.0.1:9"):
        answer = client().post("/detect", content=encoded(), headers={"origin": origin})
        assert answer.status_code == 403
    assert client().post("/detect", content=encoded(), headers={"origin": ADDRESS}).status_code == 200


def test_one_photograph_at_a_time_and_a_short_queue():
    going, most, lock, door = 0, 0, threading.Lock(), threading.Event()

    def slow(image):
        nonlocal going, most
        with lock:
            going += 1
            most = max(most, going)
        door.wait(30)
        with lock:
            going -= 1
        return squares(image)

    with client(slow, waiting=2) as page, ThreadPoolExecutor(8) as pool:
        answers = [pool.submit(page.post, "/detect", content=encoded()) for _ in range(6)]
        deadline = time.monotonic() + 60
        while sum(a.done() for a in answers) < 3 and time.monotonic() < deadline:
            time.sleep(0.05)
        door.set()
        status = sorted(a.result(60).status_code for a in answers)
        refused = [a.result() for a in answers if a.result().status_code == 503]
        # The queue is free again.
        assert page.post("/detect", content=encoded()).status_code == 200
    assert status == [200, 200, 200, 503, 503, 503] and most == 1
    assert refused[0].headers["retry-after"] == "5" and "try again" in refused[0].json()["error"]


def test_a_failing_detector_is_not_shown_in_detail():
    def broken(image):
        raise RuntimeError("secret /path")

    answer = client(broken).post("/detect", content=encoded())
    assert answer.status_code == 500 and "secret" not in answer.text and "terminal" in answer.json()["error"]


def labels(**changes):
    texts = [{"points": SQUARE.tolist(), "score": 0.9}, {"points": (SQUARE + 4).tolist(), "score": 0.3}]
    return {"format": "coco", "name": "shop 7.jpg", "height": 30, "width": 40, "texts": texts, **changes}


def test_coco_is_read_back(tmp_path):
    answer = client().post("/labels", json=labels())
    (tmp_path / "coco.json").write_bytes(answer.content)
    (tmp_path / "shop 7.jpg").write_bytes(encoded(kind="JPEG"))
    (record,) = read_coco(str(tmp_path / "coco.json"), str(tmp_path)).records
    assert (record.file_name, record.height, record.width) == ("shop 7.jpg", 30, 40)
    assert [round(i.score, 4) for i in record.instances] == [0.9, 0.3]
    np.testing.assert_allclose(record.instances[0].polygon, SQUARE)


def test_art_is_a_submission():
    answer = client().post("/labels", json=labels(format="art")).json()
    assert list(answer) == ["res_7"]
    assert [round(text["confidence"], 4) for text in answer["res_7"]] == [0.9, 0.3]
    assert np.asarray(answer["res_7"][0]["points"]).shape == (4, 2)


def test_labelme_is_read_back(tmp_path):
    answer = client().post("/labels", json=labels(format="labelme", name="../../etc/passwd.jpg"))
    (tmp_path / "a.json").write_bytes(answer.content)
    (reviewed,) = labelme.read(str(tmp_path / "a.json"))
    assert reviewed.name == "passwd.jpg" and (reviewed.width, reviewed.height) == (40, 30)
    assert len(reviewed.regions) == 2


def test_labels_of_an_image_without_text():
    for kind in ("art", "coco", "labelme"):
        answer = client().post("/labels", json=labels(format=kind, texts=[]))
        assert answer.status_code == 200 and isinstance(json.loads(answer.content), dict)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": "csv"}, "format"),
        ({"name": ""}, "name"),
        ({"height": 0}, "height"),
        ({"texts": [{"points": [[0, 0], [1, 1]], "score": 0.5}]}, "points"),
        ({"texts": [{"points": [[0, 0], [1, 1], ["a", 2]], "score": 0.5}]}, "points"),
        ({"texts": [{"points": SQUARE.tolist(), "score": 2}]}, "score"),
        ({"texts": [{"points": [[0, 0], [1e300, 1], [1, 2]], "score": 0.5}]}, "less than or equal"),
    ],
)
def test_labels_that_are_not_usable(changes, message):
    answer = client().post("/labels", json=labels(**changes))
    assert answer.status_code == 422 and message in answer.json()["error"]

"""The page in a real browser: headless Chromium, driven through its own driver."""

import io
import json
import threading
import time

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("starlette", reason="needs the packages of the extra 'demo'")
pytest.importorskip("selenium", reason="needs the package selenium")

from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait

from i3cl.deploy.demo import serve
from i3cl.detections import Detections

SQUARE = np.array([[20, 30], [120, 30], [120, 90], [20, 90]], np.float32)


def squares(image):
    return Detections([SQUARE, SQUARE + 60], np.array([0.9, 0.3], np.float32), image.shape[0], image.shape[1])


@pytest.fixture(scope="module")
def address():
    told: list[str] = []
    threading.Thread(target=serve, args=(squares, "test detector", 0, told.append), daemon=True).start()
    deadline = time.monotonic() + 60
    while not told and time.monotonic() < deadline:
        time.sleep(0.05)
    return told[0]


@pytest.fixture
def photo(tmp_path):
    pixels = np.zeros((200, 300, 3), np.uint8)
    pixels[...] = (90, 120, 160)
    Image.fromarray(pixels).save(tmp_path / "street 12.jpg")
    return tmp_path / "street 12.jpg"


def wait(browser, found):
    return WebDriverWait(browser, 60).until(lambda _: found())


def choose(browser, address, path):
    browser.get(address)
    browser.find_element(By.ID, "file").send_keys(str(path))


def outlines(browser):
    return browser.find_elements(By.CSS_SELECTOR, "#overlay polygon")


def downloaded(browser, name):
    path = browser.downloads / name
    wait(browser, lambda: path.is_file() and path.stat().st_size > 0)
    return path


def test_photograph_threshold_and_downloads(browser, address, photo):
    choose(browser, address, photo)
    wait(browser, lambda: len(outlines(browser)) == 1)
    assert outlines(browser)[0].get_attribute("points") == "20,30 120,30 120,90 20,90"
    assert "1 of 2 texts shown" in browser.find_element(By.ID, "status").text
    # The outline lies on the picture: 300 pixels of the photograph are as wide as the overlay.
    overlay, picture = (browser.find_element(By.ID, name).rect for name in ("overlay", "photo"))
    assert all(abs(overlay[key] - picture[key]) < 1 for key in ("x", "y", "width", "height"))
    # The slider by keyboard alone: from .50 down to .25.
    slider = browser.find_element(By.ID, "threshold")
    slider.send_keys(Keys.ARROW_LEFT * 25)
    wait(browser, lambda: len(outlines(browser)) == 2)
    assert browser.find_element(By.ID, "threshold-value").text == "0.25"
    for kind, name in (("art", "street 12_art.json"), ("coco", "street 12_coco.json"), ("labelme", "street 12.json")):
        browser.find_element(By.CSS_SELECTOR, f"[data-format={kind}]").click()
        content = json.loads(downloaded(browser, name).read_text())
        texts = {"art": lambda c: c["res_12"], "coco": lambda c: c["annotations"], "labelme": lambda c: c["shapes"]}[kind](
            content
        )
        assert len(texts) == 2
    browser.find_element(By.CSS_SELECTOR, "[data-format=picture]").click()
    with Image.open(downloaded(browser, "street 12_texts.png")) as drawn:
        assert drawn.size == (300, 200)
        red, green, blue = drawn.convert("RGB").getpixel((70, 30))
        assert green > 180 and red < 80 and blue < 130
        assert drawn.convert("RGB").getpixel((250, 20)) == pytest.approx((90, 120, 160), abs=4)
    # A text is pointed out by its button.
    browser.find_element(By.CSS_SELECTOR, "#list button").send_keys(Keys.ENTER)
    wait(browser, lambda: browser.find_elements(By.CSS_SELECTOR, "#overlay .chosen"))
    assert browser.switch_to.active_element.get_attribute("aria-pressed") == "true"


def test_what_is_not_an_image(browser, address, tmp_path):
    (tmp_path / "notes.jpg").write_text("not an image")
    choose(browser, address, tmp_path / "notes.jpg")
    error = browser.find_element(By.ID, "error")
    wait(browser, lambda: "not an image in a known format" in error.text)
    assert not outlines(browser) and not browser.find_element(By.ID, "controls").is_displayed()


def test_photograph_that_lies_on_its_side(browser, address, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    buffer = io.BytesIO()
    Image.new("RGB", (300, 200), (90, 120, 160)).save(buffer, "JPEG", exif=exif)
    (tmp_path / "turned.jpg").write_bytes(buffer.getvalue())
    choose(browser, address, tmp_path / "turned.jpg")
    wait(browser, lambda: outlines(browser))
    picture = browser.find_element(By.ID, "photo")
    assert browser.execute_script("return [arguments[0].naturalWidth, arguments[0].naturalHeight]", picture) == [200, 300]
    assert browser.find_element(By.ID, "overlay").get_dom_attribute("viewBox") == "0 0 200 300"


def test_fits_a_phone_and_is_reached_by_keyboard(browser, address, photo):
    browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride", {"width": 360, "height": 740, "deviceScaleFactor": 2, "mobile": True}
    )
    try:
        choose(browser, address, photo)
        wait(browser, lambda: outlines(browser))
        assert browser.execute_script("return document.documentElement.scrollWidth <= 360")
        reached = []
        browser.find_element(By.TAG_NAME, "body").click()
        browser.execute_script("document.activeElement.blur()")
        for _ in range(12):
            ActionChains(browser).send_keys(Keys.TAB).perform()
            active = browser.switch_to.active_element
            reached.append(active.get_attribute("id") or active.get_attribute("data-format") or active.tag_name)
        assert {"file", "threshold", "scores", "picture", "art", "coco", "labelme"} <= set(reached)
    finally:
        browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_nothing_is_loaded_from_elsewhere_and_nothing_fails(browser, address, photo):
    browser.get_log("browser")
    choose(browser, address, photo)
    wait(browser, lambda: outlines(browser))
    loaded = browser.execute_script("return performance.getEntriesByType('resource').map((r) => r.name)")
    assert loaded and all(name.startswith((address, f"blob:{address}")) for name in loaded)
    assert [entry for entry in browser.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")] == []

"""The page of images to check, in a real browser: marks, answers that survive a closed page, and the estimate from them."""

import json
import time

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("selenium", reason="needs the package selenium")

from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys

from i3cl.data.formats.records import Dataset, ImageRecord
from i3cl.report.check import estimate, write_check_page

IMAGES = 12


@pytest.fixture
def page(tmp_path):
    records, found = [], {}
    for k in range(IMAGES):
        name = f"shop & co {k}.jpg"
        Image.fromarray(np.full((90, 160, 3), 60 + 10 * k, np.uint8)).save(tmp_path / name)
        records.append(ImageRecord(k + 1, name, 90, 160))
        ring = np.array([[10, 10], [60, 10], [60, 30], [10, 30]], np.float32)
        found[k + 1] = (
            [ring, ring + np.array([70, 0], np.float32), ring + np.array([0, 40], np.float32)],
            np.array([0.9, 0.8, 0.2]),
        )
    write_check_page(str(tmp_path / "check.html"), Dataset("set", str(tmp_path), records), found, "Is this right?")
    return tmp_path / "check.html"


def saved(browser):
    for old in browser.downloads.glob("answers*.json"):
        old.unlink()
    browser.find_element(By.ID, "save").click()
    deadline = time.monotonic() + 30
    while not (browser.downloads / "answers.json").is_file() and time.monotonic() < deadline:
        time.sleep(0.05)
    return browser.downloads / "answers.json"


def test_a_person_checks_the_images(browser, page):
    browser.get(page.as_uri())
    articles = browser.find_elements(By.TAG_NAME, "article")
    assert len(articles) == IMAGES and len(browser.find_elements(By.TAG_NAME, "polygon")) == 2 * IMAGES
    status = browser.find_element(By.ID, "count")
    assert status.text == f"0 of {IMAGES} images checked"
    for number, article in enumerate(articles):
        first, second = article.find_elements(By.TAG_NAME, "polygon")
        if number < 6:
            # By mouse and by keyboard.
            first.click() if number % 2 else second.send_keys(Keys.ENTER)
        missed = article.find_element(By.CLASS_NAME, "missed")
        missed.clear()
        missed.send_keys("1")
        article.find_element(By.CLASS_NAME, "checked").click()
    assert status.text == f"{IMAGES} of {IMAGES} images checked"
    # A second look takes one mark back.
    articles[0].find_elements(By.TAG_NAME, "polygon")[1].click()
    content = json.loads(saved(browser).read_text())
    assert content["images"]["shop & co 1.jpg"] == {"found": 2, "wrong": [0], "missed": 1}
    assert content["images"]["shop & co 0.jpg"]["wrong"] == [] and content["images"]["shop & co 2.jpg"]["wrong"] == [1]

    # Opened again, the page knows what was answered.
    browser.get(page.as_uri())
    assert browser.find_element(By.ID, "count").text == f"{IMAGES} of {IMAGES} images checked"
    again = saved(browser)
    assert json.loads(again.read_text()) == content
    found = estimate(str(again))
    # 24 found, 5 of them wrong; 12 missed.
    assert (found.images, found.precision, found.recall) == (12, pytest.approx(19 / 24), pytest.approx(19 / 31))
    assert not [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]

"""The forecast of a labelling job, beside what the job then takes."""

import json
import os

import cv2
import numpy as np
import pytest

from i3cl import observe, storage
from i3cl.config import LabelSettings, MemberSettings, Settings
from i3cl.data.formats.records import Dataset, ImageRecord
from i3cl.errors import UserError
from i3cl.labelling.cost import compared
from i3cl.labelling.estimate import estimate
from i3cl.labelling.predict import predict

COUNT = 10


@pytest.fixture
def images(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    generator = np.random.default_rng(0)
    for number in range(COUNT):
        cv2.imwrite(str(folder / f"{number}.jpg"), generator.integers(0, 255, (60 + number, 90, 3), np.uint8))
    return Dataset("set", str(folder), [ImageRecord(k, f"{k}.jpg", 60 + k, 90) for k in range(COUNT)])


@pytest.mark.slow
def test_a_forecast_of_the_job_that_follows(images, tiny_checkpoints, tmp_path, ray_cluster, monkeypatch):
    out, said = str(tmp_path / "predictions"), []
    monkeypatch.setattr(observe, "say", lambda text, **_: said.append(text))
    settings = Settings(label=LabelSettings(rows_per_block=4, actors=1, price_per_hour=3.0))
    found = estimate(images, tiny_checkpoints, settings, out)
    assert os.listdir(out) == ["estimate.json"], "nothing else stays"
    assert (found.images, found.passes, found.actors, found.measured) == (COUNT, 1, 1, COUNT)
    sizes = [os.path.getsize(f"{images.images_root}/{k}.jpg") for k in range(COUNT)]
    assert found.bytes_read == sum(sizes)
    assert found.requests == COUNT + 4 * 3
    assert found.money == pytest.approx(3 * found.actor_hours, rel=1e-3) and found.gpu_hours == 0
    assert found.seconds == pytest.approx(3600 * found.actor_hours, rel=1e-2)
    predict(images, tiny_checkpoints, settings, out, "t")
    cost = json.loads(storage.read_text(f"{out}/cost.json"))
    written = sum(os.path.getsize(f"{out}/{name}") for name in os.listdir(out) if name.startswith("part-"))
    # One part in the measurement, three in the job, each with a footer of its own.
    assert 0.2 * written < found.bytes_written < written
    line = next(text for text in said if "estimated" in text)
    assert line == f"t: {compared(json.loads(storage.read_text(f'{out}/estimate.json')), cost)}"
    assert any("10 images on 1 actors: about" in text for text in found.lines())


def test_results_from_files_take_nothing(images, tmp_path):
    member = MemberSettings(results=(str(tmp_path / "r.json"),))
    with pytest.raises(UserError, match="findings of all members come from files"):
        estimate(images, {"craft": member}, Settings(), str(tmp_path / "out"))


def test_nothing_to_measure(tiny_checkpoints, tmp_path):
    with pytest.raises(UserError, match="set: has no images"):
        estimate(Dataset("set", str(tmp_path), []), tiny_checkpoints, Settings(), str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_what_was_forecast_and_what_it_took():
    there = {"seconds": 3600 * 9.2, "gpu_hours": 73.5, "actor_hours": 73.5}
    cost = {"seconds": 3600 * 9.5, "gpu_hours": 75.25, "actor_hours": 75.25}
    assert compared(there, cost) == "estimated: 9 h 12 min, 73.500 GPU-hours; taken: 9 h 30 min, 75.250 GPU-hours"

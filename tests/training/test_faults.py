"""Unusable images in a real training on Ray: one line with the file and the reason, on one worker and on several."""

import json
import shutil

import pytest

from i3cl import observe, storage
from i3cl.config import to_yaml, with_overrides
from i3cl.errors import UserError
from i3cl.training import loop
from i3cl.training.launch import fit, located, train


def cut_off(folder):
    """One photograph is cut off in the middle."""
    for path in (folder / "images").iterdir():
        path.write_bytes(path.read_bytes()[:-400])
    return r"images/\d+\.jpg: cannot be decoded"


def page_instead_of_image(folder):
    for path in (folder / "images").iterdir():
        path.write_text("<html><body>Not found</body></html>")
    return r"images/\d+\.jpg: not an image in a known format"


def turned(folder):
    """A labelling tool wrote the size of the upright picture, the files lie on their side."""
    tree = json.loads((folder / "set.json").read_text())
    for image in tree["images"]:
        image["height"] = 120
    (folder / "set.json").write_text(json.dumps(tree))
    return r"\d+\.jpg: the image is 96 x 96 but its annotation says 96 x 120; correct the annotation"


@pytest.fixture
def recipe(tiny_set, tiny_settings, tmp_path):
    shutil.copytree(tiny_set, tmp_path / "set")
    source = {"annotations": str(tmp_path / "set" / "set.json"), "images": str(tmp_path / "set" / "images")}
    changes = {"data.train": [source], "data.validation": None, "storage": str(tmp_path / "runs"), "data.ray_data": True}
    changes |= {"train.steps": 4, "train.checkpoint_every": 4, "train.batch": 1}
    return with_overrides(tiny_settings, changes, "test"), tmp_path / "set"


@pytest.mark.parametrize(
    ("fault", "workers"),
    [
        (cut_off, 1),
        pytest.param(page_instead_of_image, 2, marks=pytest.mark.slow),
        pytest.param(turned, 2, marks=pytest.mark.slow),
    ],
)
def test_an_unusable_image_ends_the_run_with_one_line(recipe, ray_cluster, fault, workers):
    settings, folder = recipe
    message = fault(folder)
    with pytest.raises(UserError, match=rf"^[^\n]*training stopped: [^\n]*{message}[^\n]*$"):
        train(with_overrides(settings, {"cluster.workers": workers}, "test"))


def test_skip_bad_trains_on_the_rest_and_counts_what_it_left_out(recipe, ray_cluster, capfd):
    settings, folder = recipe
    (folder / "images" / "3.jpg").write_text("<html></html>")
    with observe.console():
        result = train(with_overrides(settings, {"cluster.workers": 2, "train.steps": 8, "data.skip_bad": True}, "test"))
    assert result.metrics["step"] == 8
    rows = [json.loads(line) for line in (folder.parent / "runs" / "tiny" / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["skipped_images"] == 1, "12 images, 16 places"
    printed = capfd.readouterr().out
    assert "left out: " in printed and "3.jpg: not an image" in printed and "left out so far: 1 images" in printed


@pytest.mark.slow
def test_memory_that_runs_out_on_one_of_several_workers_is_not_tried_again(recipe, ray_cluster, tmp_path, monkeypatch):
    """The step would fail again and again, max_failures times; the workers that Ray starts once more only carry the message."""
    settings, _ = recipe
    settings = located(with_overrides(settings, {"cluster.workers": 2, "cluster.max_failures": 3}, "test"))
    run = tmp_path / "runs" / "tiny"
    storage.write_text_atomic(str(run / "settings.yaml"), to_yaml(settings))

    def worker(config):
        import ray.train
        import torch

        from i3cl.training import loop

        rank = ray.train.get_context().get_world_rank()

        def full(tensor, *_, **__):
            with open(f"{config['run']}/tries.txt", "a") as file:
                file.write("x")
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

        if rank == 1:
            torch.Tensor.backward = full
        return loop.train_worker(config)

    monkeypatch.setattr(loop, "train_worker", worker)
    message = fit(settings)
    assert message is not None and message.startswith("step 1: out of memory (this machine) for a batch of 1 images of 96 x 96")
    assert (run / "tries.txt").read_text() == "x"
    assert not (run / "stopped.txt").exists(), "the same command must be able to go on after the remedy"

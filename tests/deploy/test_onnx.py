"""The exported file against the network it comes from, and without torch."""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import cv2
import numpy as np
import pytest

pytest.importorskip("onnx", reason="needs the packages of the extra 'onnx'")
pytest.importorskip("onnxscript", reason="needs the packages of the extra 'onnx'")
pytest.importorskip("onnxruntime", reason="needs the packages of the extra 'onnx'")
import torch

import i3cl
from i3cl.config import to_yaml, with_overrides
from i3cl.data.synthetic.plain import make_split
from i3cl.deploy import OnnxPredictor
from i3cl.deploy.compare import compare, reference
from i3cl.deploy.export import export_onnx, halve
from i3cl.errors import UserError
from i3cl.geometry import overlaps
from i3cl.model.checkpoint import save_checkpoint
from i3cl.model.network import I3CL

ROOT = Path(__file__).resolve().parents[2]


def images(count: int, seed: int = 3) -> list[np.ndarray]:
    """Pictures with words, cut to different shapes."""
    random = np.random.default_rng(seed)
    cut = [(int(h), int(w)) for h, w in random.integers(40, 129, (count, 2))]
    return [
        np.ascontiguousarray(m.image[:h, :w]) for m, (h, w) in zip(make_split(0, count, seed=seed, side=128), cut, strict=True)
    ]


@pytest.fixture(scope="module")
def checkpoint(tiny_settings, tmp_path_factory) -> str:
    """A network of random weights that finds up to 12 texts of two classes anywhere."""
    changes = {
        "model.backbone.weights": "none",
        "model.num_classes": 2,
        "model.score_threshold": 0.3,
        "model.detections_per_image": 12,
    }
    settings = with_overrides(tiny_settings, changes, "test")
    torch.manual_seed(4)
    folder = tmp_path_factory.mktemp("network") / "best"
    save_checkpoint(I3CL(settings.model), folder, to_yaml(settings))
    return str(folder)


@pytest.fixture(scope="module")
def network(checkpoint) -> I3CL:
    return i3cl.load(checkpoint, device="cpu")


@pytest.fixture(scope="module")
def exported(checkpoint, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("onnx") / "model.onnx"
    export_onnx(checkpoint, str(out))
    return out


def assert_same(predictor: OnnxPredictor, wanted: dict[str, torch.Tensor], image: np.ndarray) -> int:
    """Boxes, scores and masks of the graph are the network's; the number of detections."""
    boxes, scores, masks = predictor.run(image)
    assert boxes.shape == tuple(wanted["boxes"].shape)
    np.testing.assert_allclose(boxes, wanted["boxes"].numpy(), atol=1e-3)
    np.testing.assert_allclose(scores, wanted["scores"].numpy(), atol=1e-4)
    np.testing.assert_allclose(masks, wanted["masks"].numpy(), atol=1e-3)
    return len(boxes)


def test_fifty_images_of_any_size_as_by_torch(exported, network):
    predictor = OnnxPredictor(exported, threads=1)
    found = 0
    for image in images(50):
        (wanted,) = network([torch.from_numpy(image).permute(2, 0, 1).float()])
        found += assert_same(predictor, wanted, image)
    assert found > 200


def test_polygons_in_pixels_of_the_photograph(exported, network, tmp_path):
    predictor = OnnxPredictor(exported, threads=1)
    shared: list[float] = []
    for number, image in enumerate(images(6, seed=8)):
        path = tmp_path / f"{number}.png"
        cv2.imwrite(str(path), image[:, :, ::-1])
        (wanted,) = i3cl.detect(network, [image], 0.31)
        for given in (path, str(path), image):
            found = predictor.detect(given, 0.31)
            assert (found.height, found.width) == image.shape[:2] and len(found) == len(wanted)
            np.testing.assert_allclose(found.scores, wanted.scores, atol=1e-4)
            shared += overlaps(found.polygons, wanted.polygons).dense_iou().diagonal().tolist()
    # Masks of random weights are near 0.5 everywhere: rounding may move a pixel of an outline.
    assert len(shared) > 20 and np.quantile(shared, 0.05) > 0.99 and min(shared) > 0.95
    report = compare(network, predictor, images(6, seed=8))
    assert report.images == 6 and report.texts > 20 and report.lost == report.added <= report.texts // 10
    assert report.box < 1e-3 and report.score < 1e-4 and report.iou > 0.99 and "6 images" in str(report)


@pytest.mark.slow
def test_command_writes_a_fixed_size_that_pads_inside_the_graph(checkpoint, network, tmp_path):
    out = tmp_path / "fixed.onnx"
    done = export_by_command(checkpoint, "--out", str(out), "--size", "96x128")
    assert done.returncode == 0, done.stderr
    assert "images up to 96 x 128 pixels" in done.stdout
    predictor = OnnxPredictor(out, threads=1)
    assert (predictor.info.max_height, predictor.info.max_width) == (96, 128)
    for image in images(6):
        scale = predictor.scale(*image.shape[:2])
        assert round(image.shape[0] * scale) <= 96 and round(image.shape[1] * scale) <= 128
        image = image[:96]
        assert_same(predictor, reference(network, image, (96, 128)), image)
    assert len(predictor.detect(images(1)[0], 0.3))


def export_by_command(*arguments: str) -> subprocess.CompletedProcess[str]:
    code = "from i3cl.cli.export_onnx import main; main()"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, env=environment, timeout=900)


def test_command_names_a_size_that_is_none(tmp_path):
    done = export_by_command("nowhere", "--out", str(tmp_path / "x.onnx"), "--size", "9x")
    assert done.returncode == 2 and "HEIGHTxWIDTH" in done.stderr
    done = export_by_command("nowhere", "--out", str(tmp_path / "x.onnx"), "--size", "90x100")
    assert done.returncode == 2 and "96x128" in done.stderr


def test_image_without_text(exported, tmp_path):
    import onnx

    # The same graph with a threshold that nothing reaches.
    model = onnx.load(exported)
    changed = 0
    for node in model.graph.node:
        for attribute in node.attribute:
            if node.op_type == "Constant" and attribute.name in ("value_float", "value"):
                value = attribute.f if attribute.name == "value_float" else onnx.numpy_helper.to_array(attribute.t)
                if np.size(value) == 1 and np.isclose(float(np.asarray(value).reshape(())), 0.3):
                    changed += 1
                    attribute.CopyFrom(onnx.helper.make_attribute("value_float", 0.9999))
    for tensor in model.graph.initializer:
        value = onnx.numpy_helper.to_array(tensor)
        if value.size == 1 and value.dtype == np.float32 and np.isclose(value.reshape(()), 0.3):
            changed += 1
            tensor.CopyFrom(onnx.numpy_helper.from_array(np.full(value.shape, 0.9999, np.float32), tensor.name))
    assert changed
    onnx.save(model, tmp_path / "none.onnx")
    predictor = OnnxPredictor(tmp_path / "none.onnx", threads=1)
    boxes, scores, masks = predictor.run(images(1)[0])
    assert boxes.shape == (0, 4) and scores.shape == (0,) and masks.shape == (0, 28, 28)
    assert len(predictor.detect(images(1)[0], 0.0)) == 0


def test_half_is_half_as_large_and_nearly_the_same(exported, tmp_path):
    import onnx

    model = onnx.load(exported)
    halve(model)
    onnx.save(model, tmp_path / "half.onnx")
    assert (tmp_path / "half.onnx").stat().st_size < 0.6 * exported.stat().st_size
    full, half = OnnxPredictor(exported, threads=1), OnnxPredictor(tmp_path / "half.onnx", threads=1)
    for image in images(5):
        (boxes, scores, _), (wanted, wanted_scores, _) = half.run(image), full.run(image)
        # The best text: ties between the others may fall differently.
        assert abs(scores[0] - wanted_scores[0]) < 0.01 and np.abs(boxes[:, None] - wanted[:1]).max(-1).min() < 1


def test_numbers_beyond_float16_stay_as_they_are():
    from onnx import TensorProto, helper, numpy_helper

    values = {"kernel": np.full((20, 30), 0.5), "large": np.full((20, 30), 7e4), "variance": np.full(600, 8e5)}
    tensors = [numpy_helper.from_array(value.astype(np.float32), name) for name, value in values.items()]
    model = helper.make_model(helper.make_graph([], "three", [], [], tensors))
    halve(model)
    kept = {tensor.name: tensor for tensor in model.graph.initializer}
    assert {name: tensor.data_type for name, tensor in kept.items()} == {
        "kernel_half": TensorProto.FLOAT16,
        "large": TensorProto.FLOAT,
        "variance": TensorProto.FLOAT,
    }
    for name in ("large", "variance"):
        assert np.array_equal(numpy_helper.to_array(kept[name]), values[name].astype(np.float32))


def test_what_the_file_says_about_itself(exported, tiny_settings):
    import onnx

    model = onnx.load(exported)
    info = json.loads({entry.key: entry.value for entry in model.metadata_props}["i3cl"])
    assert info["test_short_side"] == tiny_settings.data.test_short_side == 96
    assert (info["name"], info["num_classes"], info["score_threshold"]) == ("tiny", 2, 0.3)
    assert [i.name for i in model.graph.input] == ["image"]
    assert [o.name for o in model.graph.output] == ["boxes", "scores", "labels", "masks"]
    assert {n.domain for n in model.graph.node} <= {"", "ai.onnx"} and not model.functions


def test_runs_where_torch_and_ray_are_not_installed(exported, tmp_path):
    cv2.imwrite(str(tmp_path / "photo.jpg"), images(1)[0][:, :, ::-1])
    code = """
        import sys

        MISSING = {"torch", "torchvision", "timm", "ray", "pyarrow", "fsspec", "s3fs", "botocore", "pycocotools", "safetensors",
                   "onnx", "onnxscript", "tenacity", "rich"}

        class Blocker:
            def find_spec(self, name, path=None, target=None):
                if name.split(".")[0] in MISSING:
                    raise ModuleNotFoundError(f"No module named {name!r}", name=name)

        sys.meta_path.insert(0, Blocker())
        try:
            import torch
        except ModuleNotFoundError:
            pass
        else:
            raise SystemExit("torch is there")
        from i3cl.deploy import OnnxPredictor
        from i3cl.errors import UserError

        predictor = OnnxPredictor(sys.argv[1], threads=1)
        found = predictor.detect(sys.argv[2], 0.3)
        print(len(found), sum(len(p) for p, _ in found))
        print(len(found.to_coco(1)), len(found.to_art(0.0)))
        try:
            predictor.detect(sys.argv[2] + ".missing")
        except UserError as error:
            print(error)
    """
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", textwrap.dedent(code), str(exported), str(tmp_path / "photo.jpg")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    first, second, third = done.stdout.splitlines()
    assert int(first.split()[0]) > 0 and int(first.split()[1]) >= 3 * int(first.split()[0])
    assert second.split()[0] == first.split()[0]
    assert "photo.jpg.missing: No such file" in third


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such file"),
        (b"", "cannot be loaded"),
        (b"not onnx at all", "cannot be loaded"),
        ("foreign", "export-onnx wrote"),
    ],
)
def test_other_files_are_refused(tmp_path, content, message):
    path = tmp_path / "x.onnx"
    if content == "foreign":
        import onnx
        from onnx import TensorProto, helper

        value = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1])
        result = helper.make_tensor_value_info("y", TensorProto.FLOAT, [1])
        graph = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "g", [value], [result])
        onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)
    elif content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        OnnxPredictor(path)


def test_bad_requests(exported, tmp_path):
    with pytest.raises(UserError, match="96x128"):
        export_onnx("nowhere", str(tmp_path / "x.onnx"), size=(90, 100))
    with pytest.raises(UserError, match="nowhere"):
        export_onnx("nowhere", str(tmp_path / "x.onnx"))
    predictor = OnnxPredictor(exported, threads=1)
    (tmp_path / "bad.jpg").write_text("text")
    with pytest.raises(UserError, match=r"bad\.jpg: not an image"):
        predictor.detect(tmp_path / "bad.jpg")
    with pytest.raises(UserError, match="uint8 RGB"):
        predictor.detect(np.zeros((10, 10), np.uint8))

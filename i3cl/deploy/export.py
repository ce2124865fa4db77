"""From a checkpoint to one ONNX file that `i3cl.deploy.onnx_predictor` runs without torch."""

from __future__ import annotations

import importlib.util
import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch

import i3cl
from i3cl import storage
from i3cl.config import Settings
from i3cl.deploy.graph import DetectionGraph, onnx_operators
from i3cl.deploy.onnx_predictor import METADATA, ModelInfo
from i3cl.errors import UserError
from i3cl.model.network import I3CL, MULTIPLE, padded_size

logger = logging.getLogger(__name__)

OPSET = 20
"""ONNX operator set of the file; onnxruntime 1.17 and later have it."""
Weights = Literal["float32", "float16"]
_LARGEST_SIDE = 8192
"""Pixels that a graph of dynamic size is exported for; onnxruntime does not check it."""
_SMALL = 256
"""Values up to which a tensor stays float32 in a file of float16 weights: they save nothing, and sizes may not be rounded."""
_OUTPUTS = ("boxes", "scores", "labels", "masks")


@dataclass(frozen=True)
class Exported:
    """What `export_onnx` wrote."""

    info: ModelInfo
    bytes: int
    """Size of the file."""
    nodes: int
    """Operators in the graph."""


def export_onnx(checkpoint: str, out: str, size: tuple[int, int] | None = None, weights: Weights = "float32") -> Exported:
    """Write the whole network of a checkpoint to one ONNX file.

    The graph takes ``image``, uint8 RGB (height, width, 3), and gives ``boxes`` (n, 4) float32 x0, y0, x1, y1 in its pixels,
    ``scores`` (n,) float32 0-1, ``labels`` (n,) int64 and ``masks`` (n, 28, 28) float32 0-1 in the frames of the boxes, by
    descending score. Normalising and padding are inside.

    Args:
        checkpoint: directory (local or s3://) that training wrote.
        out: the file to write (local or s3://); replaced when it is there, whole or not at all.
        size: height and width in pixels, multiples of 32, to which every image is padded inside the graph; None: images of any
            size.
        weights: float16 halves the file. Computation stays in float32.

    Raises:
        UserError: the packages onnx and onnxscript are not installed, `checkpoint` is not one, `size` is not usable.
    """
    for package in ("onnx", "onnxscript"):
        if importlib.util.find_spec(package) is None:
            raise UserError(f"export needs the package {package}: pip install 'i3cl[onnx]'")
    if size is not None and (padded_size(size) != tuple(size) or min(size) < MULTIPLE):
        height, width = padded_size((max(size[0], 1), max(size[1], 1)))
        raise UserError(f"--size {size[0]}x{size[1]}: give multiples of {MULTIPLE}, e.g. {height}x{width}")
    network = i3cl.load(checkpoint, device="cpu")
    settings = network.recipe or Settings(model=network.settings)
    model = build(network, size)
    if weights == "float16":
        halve(model)
    info = ModelInfo(
        name=settings.name,
        num_classes=network.settings.num_classes,
        score_threshold=network.settings.score_threshold,
        test_short_side=settings.data.test_short_side,
        test_long_side=settings.data.test_long_side,
        test_upscale=settings.data.test_upscale,
        exif=settings.data.exif,
        max_height=size[0] if size else None,
        max_width=size[1] if size else None,
        weights=weights,
    )
    entry = model.metadata_props.add()
    entry.key, entry.value = METADATA, info.model_dump_json()
    content = model.SerializeToString()
    storage.write_bytes_atomic(out, content)
    logger.info("%s: %.1f MB, %d operators", out, len(content) / 1e6, len(model.graph.node))
    return Exported(info, len(content), len(model.graph.node))


def build(network: I3CL, size: tuple[int, int] | None = None) -> Any:
    """The network as an ``onnx.ModelProto``; `size` and the graph's inputs and outputs as in `export_onnx`."""
    import onnx

    graph = DetectionGraph(network).eval()
    height, width = size or (10 * MULTIPLE, 12 * MULTIPLE)
    shapes = None
    if size is None:
        rows, columns = (torch.export.Dim(name, min=2, max=_LARGEST_SIDE // MULTIPLE) for name in ("rows", "columns"))
        shapes = ({2: MULTIPLE * rows, 3: MULTIPLE * columns}, None)
    with _exportable(), torch.no_grad():
        program = torch.onnx.export(
            graph,
            (torch.zeros(1, 3, height, width), torch.tensor([height, width], dtype=torch.float32)),
            dynamo=True,
            opset_version=OPSET,
            custom_translation_table=onnx_operators(OPSET),
            dynamic_shapes=shapes,
            input_names=["batch", "size"],
            output_names=list(_OUTPUTS),
            verbose=False,
        )
    assert program is not None
    model = program.model_proto
    _take_images(model, network, size)
    # Names of source lines and modules that the exporter leaves on every operator: they are larger than the graph.
    for node in model.graph.node:
        del node.metadata_props[:]
        node.doc_string = ""
    del model.graph.value_info[:]
    onnx.checker.check_model(model)
    return model


@contextmanager
def _exportable() -> Iterator[None]:
    """Inside, PyTorch's fused transformer layer, which no exporter knows, is off, and warnings about foreign code are silent."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


def _take_images(model: Any, network: I3CL, size: tuple[int, int] | None) -> None:
    """Puts normalising and padding before the graph, in place: `batch` and `size` come from `image` then."""
    from onnx import TensorProto, helper, numpy_helper

    constants: dict[str, np.ndarray[Any, Any]] = {
        "image_mean": network.mean.reshape(3).numpy().astype(np.float32),
        "image_std": network.std.reshape(3).numpy().astype(np.float32),
        "image_multiple": np.array([MULTIPLE, MULTIPLE], np.int64),
        "image_fixed": np.array(size or (0, 0), np.int64),
        "image_no_pad": np.zeros(4, np.int64),
        "image_no_pad_before": np.zeros(2, np.int64),
        "image_first": np.zeros(1, np.int64),
    }
    nodes = [
        helper.make_node("Shape", ["image"], ["image_size"], start=0, end=2),
        helper.make_node("Cast", ["image_size"], ["size"], to=TensorProto.FLOAT),
        helper.make_node("Cast", ["image"], ["image_float"], to=TensorProto.FLOAT),
        helper.make_node("Sub", ["image_float", "image_mean"], ["image_centred"]),
        helper.make_node("Div", ["image_centred", "image_std"], ["image_normalised"]),
        helper.make_node("Transpose", ["image_normalised"], ["image_planes"], perm=[2, 0, 1]),
        helper.make_node("Unsqueeze", ["image_planes", "image_first"], ["image_batch"]),
    ]
    if size is None:
        nodes += [
            helper.make_node("Neg", ["image_size"], ["image_negative"]),
            helper.make_node("Mod", ["image_negative", "image_multiple"], ["image_missing"]),
        ]
        del constants["image_fixed"]
    else:
        nodes.append(helper.make_node("Sub", ["image_fixed", "image_size"], ["image_missing"]))
        del constants["image_multiple"]
    nodes += [
        # begin of the four axes, then their ends
        helper.make_node("Concat", ["image_no_pad", "image_no_pad_before", "image_missing"], ["image_pads"], axis=0),
        helper.make_node("Pad", ["image_batch", "image_pads"], ["batch"], mode="constant"),
    ]
    graph = model.graph
    graph.initializer.extend(numpy_helper.from_array(value, name) for name, value in constants.items())
    rest = list(graph.node)
    del graph.node[:]
    graph.node.extend([*nodes, *rest])
    del graph.input[:]
    graph.input.append(helper.make_tensor_value_info("image", TensorProto.UINT8, ["height", "width", 3]))
    side = 2 * 14
    kinds: Sequence[tuple[int, list[Any]]] = (
        (TensorProto.FLOAT, ["n", 4]),
        (TensorProto.FLOAT, ["n"]),
        (TensorProto.INT64, ["n"]),
        (TensorProto.FLOAT, ["n", side, side]),
    )
    del graph.output[:]
    graph.output.extend(helper.make_tensor_value_info(name, *kind) for name, kind in zip(_OUTPUTS, kinds, strict=True))


def halve(model: Any) -> None:
    """Stores the large float32 tensors as float16, in place, each with a Cast behind it that the runtime folds when it loads.

    Tensors of one dimension stay as they are, and so do those with values beyond float16's range: variances often are.
    """
    from onnx import TensorProto, helper, numpy_helper

    graph = model.graph
    casts = []
    for tensor in graph.initializer:
        if tensor.data_type != TensorProto.FLOAT or len(tensor.dims) < 2 or np.prod(tensor.dims) <= _SMALL:
            continue
        name, values = tensor.name, numpy_helper.to_array(tensor)
        if np.abs(values).max() > np.finfo(np.float16).max:
            continue
        tensor.CopyFrom(numpy_helper.from_array(values.astype(np.float16), f"{name}_half"))
        casts.append(helper.make_node("Cast", [f"{name}_half"], [name], to=TensorProto.FLOAT))
    rest = list(graph.node)
    del graph.node[:]
    graph.node.extend([*casts, *rest])

"""Text in photographs from an exported ONNX file, run by onnxruntime: needs neither torch nor Ray.

    from i3cl.deploy import OnnxPredictor
    found = OnnxPredictor("model.onnx").detect("photo.jpg", score_threshold=0.5)
    for polygon, score in found: ...

Needs numpy, opencv-python-headless, shapely, pillow, pydantic and onnxruntime.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, Field, ValidationError

from i3cl.data.loading.images import decode_image, resize, test_scale
from i3cl.detections import Detections
from i3cl.errors import UserError
from i3cl.geometry import outlines_from_masks

METADATA = "i3cl"
"""Key of the ONNX metadata under which `ModelInfo` is stored as json."""
FORMAT = 1
"""Version of the graph's inputs, outputs and metadata; a file of another version is refused."""


class ModelInfo(BaseModel):
    """What a predictor must know about an exported file; stored in the file itself."""

    format: int = FORMAT
    name: str
    """Name of the run that the checkpoint comes from."""
    num_classes: int = Field(ge=1)
    score_threshold: float = Field(ge=0, le=1)
    """The graph returns detections above this score."""
    test_short_side: int = Field(ge=1)
    """Pixels: an image is scaled so that its short side is at most this ..."""
    test_long_side: int = Field(ge=1)
    """... and its long side at most this."""
    test_upscale: bool = True
    """Enlarge images that are smaller than that."""
    exif: Literal["stored", "upright"] = "stored"
    """Whether the detector was trained on pixels as stored, or on pictures turned as their EXIF orientation says."""
    max_height: int | None = None
    """Pixels of a graph of fixed size: every image is padded to it inside the graph; null: of any size."""
    max_width: int | None = None
    weights: Literal["float32", "float16", "int8"] = "float32"
    """Precision of the stored weights."""


class OnnxPredictor:
    """An exported detector. Calls may come from several threads; they share the threads of the runtime."""

    info: ModelInfo

    def __init__(self, path: str | Path, threads: int = 0) -> None:
        """Load `path`.

        Args:
            path: a file that ``i3cl export-onnx`` wrote.
            threads: CPU threads that one image uses; 0: as many as the machine has cores.

        Raises:
            UserError: onnxruntime is not installed, or the file is missing, damaged or of another kind.
        """
        try:
            import onnxruntime
        except ImportError:
            raise UserError("onnxruntime is not installed: pip install onnxruntime") from None
        if not Path(path).is_file():
            raise UserError(f"{path}: no such file; i3cl export-onnx writes it")
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        # Warnings about tensors that are empty for an image without text mean nothing to a user.
        options.log_severity_level = 3
        try:
            self._session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception as error:
            # onnxruntime has no common class of errors, and whatever it raises here is about the file.
            raise UserError(f"{path}: cannot be loaded by onnxruntime ({_first_line(error)})") from error
        self.info = read_info(self._session.get_modelmeta().custom_metadata_map, str(path))

    def run(self, image: NDArray[np.uint8]) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.float32]]:
        """The graph's own answer for one image at the size at which the network is to see it.

        Args:
            image: (H, W, 3) uint8 RGB.

        Returns:
            Boxes (n, 4) float32 x0, y0, x1, y1 in pixels of `image`, scores (n,) float32 0-1, best first, and masks (n, 28, 28)
            float32 0-1, each in the frame of its box.
        """
        boxes, scores, masks = self._session.run(["boxes", "scores", "masks"], {"image": np.ascontiguousarray(image)})
        return boxes, scores, masks

    def detect(self, image: str | Path | NDArray[np.uint8], score_threshold: float = 0.5) -> Detections:
        """Text polygons of one photograph, in its own pixels: those of the file as stored, or turned as `ModelInfo.exif` says.

        Args:
            image: path of a local image file, or (H, W, 3) uint8 RGB of any size.
            score_threshold: only detections above it, 0-1.

        Raises:
            UserError: the file cannot be read as an image.
        """
        if isinstance(image, str | Path):
            image = read_image(image, upright=self.upright)
        if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8 or not image.size:
            raise UserError(f"image: expected (H, W, 3) uint8 RGB, not {image.shape} {image.dtype}")
        sized = resize(image, self.scale(image.shape[0], image.shape[1]))
        return to_detections(*self.run(sized), sized.shape[:2], image.shape[:2]).filter(score_threshold)

    @property
    def upright(self) -> bool:
        """Whether `detect` turns image files as their EXIF orientation says."""
        return self.info.exif == "upright"

    def scale(self, height: int, width: int) -> float:
        """Factor by which an image of `height` x `width` pixels is resized before the network sees it."""
        info = self.info
        scale = test_scale(height, width, info.test_short_side, info.test_long_side, info.test_upscale)
        if info.max_height and info.max_width:
            scale = min(scale, info.max_height / height, info.max_width / width)
        return scale


def read_info(metadata: dict[str, str], path: str) -> ModelInfo:
    """The metadata of an exported file. UserError, naming `path`, when the file was not written by this program."""
    if METADATA not in metadata:
        raise UserError(f"{path}: is not a detector that i3cl export-onnx wrote (its metadata has no '{METADATA}')")
    try:
        info = ModelInfo.model_validate_json(metadata[METADATA])
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or METADATA
        raise UserError(f"{path}: metadata {where}: {first['msg']}; export the checkpoint again") from error
    if info.format != FORMAT:
        raise UserError(f"{path}: has format {info.format}, this program reads {FORMAT}; export the checkpoint again")
    return info


def read_image(path: str | Path, *, upright: bool = False) -> NDArray[np.uint8]:
    """(H, W, 3) uint8 RGB of a local image file; `upright` as for `decode_image`. UserError that names an unreadable file."""
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}; check the path") from error
    try:
        return decode_image(data, upright=upright)
    except UserError as error:
        raise UserError(f"{path}: {str(error).removeprefix('image: ')}") from error


def to_detections(
    boxes: NDArray[np.float32],
    scores: NDArray[np.float32],
    masks: NDArray[np.float32],
    seen: tuple[int, ...],
    original: tuple[int, ...],
) -> Detections:
    """Outlines of the masks, in pixels of the original image.

    Args:
        boxes: (n, 4) float32 in pixels of the image that the network saw.
        scores: (n,) float32, 0-1.
        masks: (n, S, S) float32 probabilities in the frames of the boxes.
        seen: height and width of that image.
        original: height and width of the photograph.
    """
    scale = np.array([seen[1] / original[1], seen[0] / original[0]], np.float32)
    pairs = [(o, s) for o, s in zip(outlines_from_masks(masks, boxes), scores.tolist(), strict=True) if o is not None]
    polygons = [(outline / scale).astype(np.float32) for outline, _ in pairs]
    return Detections(polygons, np.array([s for _, s in pairs], np.float32), height=original[0], width=original[1])


def _first_line(error: Any) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__

"""From photographs to polygons: load a checkpoint, run the network on images of any size, map back to original pixels."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from i3cl import storage
from i3cl.config import Settings, ViewSettings, load_settings
from i3cl.data.formats.records import ImageRecord
from i3cl.data.loading.images import decode_image, resize, test_scale
from i3cl.detections import Detections
from i3cl.errors import UserError
from i3cl.geometry import outlines_from_masks
from i3cl.model.checkpoint import STATE, load_weights
from i3cl.model.network import I3CL

ImageArray = NDArray[np.uint8]


def load(checkpoint: str, device: str | torch.device | None = None) -> I3CL:
    """The network of a checkpoint directory (local or s3://), in eval mode, with its settings as ``model.recipe``.

    UserError when the directory is no checkpoint or its weights do not fit its settings.
    """
    with storage.local_copy(checkpoint, without=STATE) as folder:
        if not (folder / "settings.yaml").is_file():
            raise UserError(f"{checkpoint}: is no checkpoint (it has no settings.yaml); give a directory that train.py wrote")
        settings = load_settings(folder / "settings.yaml")
        backbone = settings.model.backbone.model_copy(update={"weights": "none"})
        model = I3CL(settings.model.model_copy(update={"backbone": backbone}))
        report = load_weights(model, folder)
    if report.missing or report.unexpected:
        raise UserError(f"{checkpoint}: weights do not fit settings.yaml ({report})")
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    model = model.to(device).to(memory_format=torch.channels_last).eval()
    model.recipe = settings
    return model


def detect(model: I3CL, images: Sequence[str | ImageArray], score_threshold: float = 0.5, batch: int = 4) -> list[Detections]:
    """Text in images: paths, URLs or (H, W, 3) uint8 RGB arrays of any size. One Detections each, in original pixels.

    Scores are above `score_threshold` (0-1). UserError for an image that cannot be read.
    """
    settings = model.recipe or Settings(model=model.settings)
    result: list[Detections] = []
    for start in range(0, len(images), batch):
        arrays = [decode_image(image) if isinstance(image, str) else image for image in images[start : start + batch]]
        result += [found.filter(score_threshold) for found in detect_arrays(model, arrays, settings)]
    return result


@torch.inference_mode()
def detect_arrays(
    model: nn.Module, images: Sequence[ImageArray], settings: Settings, view: ViewSettings | None = None
) -> list[Detections]:
    """One batch of (H, W, 3) uint8 RGB images through one model in one view; all detections above the model's own threshold."""
    device = next(model.parameters()).device
    view = view or ViewSettings()
    tensors, scales = [], []
    for image in images:
        scale = test_scale(
            image.shape[0],
            image.shape[1],
            view.short_side or settings.data.test_short_side,
            settings.data.test_long_side,
            settings.data.test_upscale,
        )
        sized = resize(image, scale)
        scales.append(np.array([sized.shape[1] / image.shape[1], sized.shape[0] / image.shape[0]], np.float32))
        tensor = torch.from_numpy(np.ascontiguousarray(sized[:, ::-1] if view.flip else sized)).permute(2, 0, 1)
        tensors.append(tensor.to(device).float())
    half = device.type == "cuda" and settings.train.precision != "float32"
    was_training = model.training
    model.eval()
    with torch.autocast("cuda", torch.bfloat16) if half else nullcontext():
        outputs = model(tensors)
    model.train(was_training)
    return [
        _to_detections(output, image, scale, tensor.shape[2] if view.flip else None)
        for output, image, scale, tensor in zip(outputs, images, scales, tensors, strict=True)
    ]


def _to_detections(
    output: dict[str, torch.Tensor], image: ImageArray, scale: NDArray[np.float32], mirrored_width: int | None
) -> Detections:
    boxes = output["boxes"].float().cpu().numpy()
    scores = output["scores"].float().cpu().numpy()
    outlines = outlines_from_masks(output["masks"].float().cpu().numpy(), boxes)
    kept = [i for i, outline in enumerate(outlines) if outline is not None]
    polygons = []
    for i in kept:
        outline = outlines[i]
        assert outline is not None
        if mirrored_width is not None:
            outline = (np.array([mirrored_width, 0], np.float32) + outline * np.array([-1, 1], np.float32))[::-1]
        polygons.append((outline / scale).astype(np.float32))
    return Detections(polygons, scores[kept], height=image.shape[0], width=image.shape[1])


def detect_records(
    model: nn.Module, records: Iterable[ImageRecord], images_root: str, settings: Settings, batch: int = 4
) -> Iterator[tuple[ImageRecord, Detections]]:
    """Detections of the records' images, similar shapes together, decoded by threads while the model works."""
    ordered = sorted(records, key=lambda r: (r.height, r.width))
    groups = [ordered[i : i + batch] for i in range(0, len(ordered), batch)]
    with ThreadPoolExecutor(max_workers=2) as pool:

        def decode(group: list[ImageRecord]) -> list[ImageArray]:
            return [decode_image(storage.join(images_root, record.file_name)) for record in group]

        pending = [pool.submit(decode, group) for group in groups[:2]]
        for index, group in enumerate(groups):
            images = pending.pop(0).result()
            if index + 2 < len(groups):
                pending.append(pool.submit(decode, groups[index + 2]))
            yield from zip(group, detect_arrays(model, images, settings), strict=True)

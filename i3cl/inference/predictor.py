"""From photographs to polygons: load a checkpoint, run the network on images of any size, map back to original pixels."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from i3cl import storage
from i3cl.config import Settings, ViewSettings, load_settings
from i3cl.data.formats.records import ImageRecord
from i3cl.data.loading.images import decode_image, resize
from i3cl.detections import Detections
from i3cl.errors import UserError
from i3cl.geometry import outlines_from_masks
from i3cl.inference.device import Precision, autocast, choose_device, full_float32
from i3cl.inference.recipe import AS_TRAINED, Given, test_size, tiles
from i3cl.inference.tiles import Found, Tile, join, tiles_of
from i3cl.model.checkpoint import STATE, load_weights
from i3cl.model.network import I3CL
from i3cl.model.placement import to_device
from i3cl.model.shipped import folder_of, not_a_checkpoint

ImageArray = NDArray[np.uint8]
"""(H, W, 3) RGB."""
_Output = tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.float32]]
"""Boxes (N, 4), scores (N,) and masks (N, S, S) of one image, in the CPU's memory."""
_TILES = 4
"""Tiles that go through the network together, unless a call has more images than this."""


class Predictor:
    """One network on one device, at one test size and precision. Everything in the project that predicts does so with one.

    With the setting data.tile, images that are larger than a tile are cut, and what is found in their tiles is joined. Besides
    the image itself this takes memory for a few tiles only.

    The network's mode is the same after a call as before it, so that a network in training can be used.
    """

    def __init__(
        self,
        network: nn.Module,
        recipe: Settings,
        given: Given = AS_TRAINED,
        precision: Precision | None = None,
        upright: bool | None = None,
        turn: AbstractContextManager[Any] | None = None,
    ) -> None:
        """Wrap a network where it is.

        Args:
            network: On its device already.
            recipe: What it was trained with: its test size, tiles and precision count.
            given: What the user gives in place of the recipe's test size and tiles.
            precision: In place of the recipe's train.precision; None keeps that.
            upright: Whether image files are turned as their EXIF orientation says; None: as data.exif of the recipe.
            turn: Held while the network works, for threads that share a device; preparing images and tracing outlines goes on
                beside it.
        """
        self.network = network
        self.recipe = recipe
        self.size = test_size(recipe, given)
        self.tile = tiles(recipe, given)
        self.upright = recipe.data.upright if upright is None else upright
        self.turn = turn or nullcontext()
        self.precision: Precision = precision or recipe.train.precision
        full_float32(self.precision)

    @classmethod
    def load(
        cls,
        checkpoint: str,
        device: str | torch.device | None = None,
        given: Given = AS_TRAINED,
        precision: Precision | None = None,
        upright: bool | None = None,
        turn: AbstractContextManager[Any] | None = None,
    ) -> Predictor:
        """The predictor of a checkpoint directory; arguments and errors as `load` and the constructor."""
        network = load(checkpoint, device)
        assert network.recipe is not None
        return cls(network, network.recipe, given, precision, upright, turn)

    @property
    def device(self) -> torch.device:
        """Where the network is."""
        return next(self.network.parameters()).device

    def __call__(self, images: Sequence[ImageArray], view: ViewSettings | None = None) -> list[Detections]:
        """One batch of (H, W, 3) uint8 RGB images in one view; all detections above the network's own score threshold."""
        view = view or ViewSettings()
        if self.tile is None:
            return self._whole(images, view)
        side, overlap = self.tile.side, self.tile.overlap_pixels
        sizes = [image.shape[:2] for image in images]
        work = [(i, tile) for i, (height, width) in enumerate(sizes) for tile in tiles_of(height, width, side, overlap)]
        parts: list[list[tuple[Tile, Detections]]] = [[] for _ in images]
        step = max(_TILES, len(images))
        for start in range(0, len(work), step):
            batch = work[start : start + step]
            found = self._tiles([tile.cut(images[index]) for index, tile in batch], view)
            for (index, tile), detections in zip(batch, found, strict=True):
                parts[index].append((tile, detections))
        return [_joined(image, part) for image, part in zip(images, parts, strict=True)]

    def _tiles(self, cuts: Sequence[ImageArray], view: ViewSettings) -> list[Detections]:
        """As `_whole`; where they do not fit into the GPU's memory together, in halves."""
        try:
            return self._whole(cuts, view)
        except torch.OutOfMemoryError:
            if len(cuts) == 1:
                raise
        # Outside the handler, whose traceback holds on to the tensors.
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        half = len(cuts) // 2
        return self._tiles(cuts[:half], view) + self._tiles(cuts[half:], view)

    @torch.inference_mode()
    def _whole(self, images: Sequence[ImageArray], view: ViewSettings) -> list[Detections]:
        """The images, or tiles, as they are, through the network together."""
        tensors, scales = [], []
        for image in images:
            sized = resize(image, self.size.scale(image.shape[0], image.shape[1], view.short_side))
            scales.append(np.array([sized.shape[1] / image.shape[1], sized.shape[0] / image.shape[0]], np.float32))
            tensors.append(torch.from_numpy(np.ascontiguousarray(sized[:, ::-1] if view.flip else sized)).permute(2, 0, 1))
        with self.turn:
            outputs = self._through_network(tensors)
        return [
            _to_detections(output, image, scale, tensor.shape[2] if view.flip else None)
            for output, image, scale, tensor in zip(outputs, images, scales, tensors, strict=True)
        ]

    def _through_network(self, tensors: Sequence[torch.Tensor]) -> list[_Output]:
        """The output for each uint8 image (3, H, W), in the CPU's memory."""
        device = self.device
        was_training = self.network.training
        self.network.eval()
        with autocast(self.precision, device):
            outputs = self.network([to_device(tensor, device).float() for tensor in tensors])
        self.network.train(was_training)
        boxes, scores, masks = ([output[key].float().cpu().numpy() for output in outputs] for key in ("boxes", "scores", "masks"))
        return list(zip(boxes, scores, masks, strict=True))

    def detect(self, images: Sequence[str | ImageArray], score_threshold: float = 0.5, batch: int = 4) -> list[Detections]:
        """As the function `detect`."""
        result: list[Detections] = []
        for start in range(0, len(images), batch):
            group = images[start : start + batch]
            arrays = [decode_image(image, upright=self.upright) if isinstance(image, str) else image for image in group]
            result += [found.filter(score_threshold) for found in self(arrays)]
        return result

    def detect_records(
        self, records: Iterable[ImageRecord], images_root: str, batch: int = 4
    ) -> Iterator[tuple[ImageRecord, Detections]]:
        """Detections of the records' images, similar shapes together, decoded by threads while the network works."""
        ordered = sorted(records, key=lambda r: (r.height, r.width))
        groups = [ordered[i : i + batch] for i in range(0, len(ordered), batch)]
        with ThreadPoolExecutor(max_workers=2) as pool:

            def decode(group: list[ImageRecord]) -> list[ImageArray]:
                return [decode_image(storage.join(images_root, record.file_name), upright=self.upright) for record in group]

            pending = [pool.submit(decode, group) for group in groups[:2]]
            for index, group in enumerate(groups):
                images = pending.pop(0).result()
                if index + 2 < len(groups):
                    pending.append(pool.submit(decode, groups[index + 2]))
                yield from zip(group, self(images), strict=True)


def load(checkpoint: str, device: str | torch.device | None = None) -> I3CL:
    """The network of a checkpoint directory (local or s3://), in eval mode, with its settings as ``network.recipe``.

    checkpoint: the directory, or the name of a detector in the package. device: None takes a GPU when there is one. UserError
    when it is not a checkpoint or its weights do not fit its settings.
    """
    with storage.local_copy(folder_of(checkpoint), without=STATE) as folder:
        if not (folder / "settings.yaml").is_file():
            raise not_a_checkpoint(checkpoint)
        settings = load_settings(folder / "settings.yaml")
        backbone = settings.model.backbone.model_copy(update={"weights": "none"})
        network = I3CL(settings.model.model_copy(update={"backbone": backbone}))
        report = load_weights(network, folder)
    if report.missing or report.unexpected:
        raise UserError(f"{checkpoint}: weights do not fit settings.yaml ({report})")
    network = network.to(device or choose_device()).to(memory_format=torch.channels_last).eval()
    network.recipe = settings
    return network


def detect(
    model: I3CL | Predictor, images: Sequence[str | ImageArray], score_threshold: float = 0.5, batch: int = 4
) -> list[Detections]:
    """Text in images: paths, URLs or (H, W, 3) uint8 RGB arrays of any size. One Detections each, in original pixels.

    Scores are above `score_threshold` (0-1). UserError for an image that cannot be read.
    """
    predictor = model if isinstance(model, Predictor) else Predictor(model, model.recipe or Settings(model=model.settings))
    return predictor.detect(images, score_threshold, batch)


def _joined(image: ImageArray, parts: Sequence[tuple[Tile, Detections]]) -> Detections:
    """What was found in an image, in its own pixels, from what was found in each of its tiles."""
    if len(parts) == 1:
        return parts[0][1]
    moved = [
        Found(tile, [polygon + np.array([tile.x0, tile.y0], np.float32) for polygon in found.polygons], found.scores)
        for tile, found in parts
    ]
    height, width = image.shape[:2]
    return Detections(*join(moved, height, width), height=height, width=width)


def _to_detections(output: _Output, image: ImageArray, scale: NDArray[np.float32], mirrored_width: int | None) -> Detections:
    """One image's output in the frame that the network saw, as polygons in original pixels."""
    boxes, scores, masks = output
    outlines = outlines_from_masks(masks, boxes)
    kept = [i for i, outline in enumerate(outlines) if outline is not None]
    polygons = []
    for i in kept:
        outline = outlines[i]
        assert outline is not None
        if mirrored_width is not None:
            outline = (np.array([mirrored_width, 0], np.float32) + outline * np.array([-1, 1], np.float32))[::-1]
        polygons.append((outline / scale).astype(np.float32))
    return Detections(polygons, scores[kept], height=image.shape[0], width=image.shape[1])

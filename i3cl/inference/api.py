"""`i3cl.load` and `i3cl.detect`: what Python users call, with whatever they have as an image."""

from __future__ import annotations

import os
from collections.abc import Iterable
from itertools import islice
from numbers import Integral, Real

import torch

from i3cl.data.loading.any_image import AnyImage, as_images, as_rgb, describe
from i3cl.detections import Detections
from i3cl.errors import UserError
from i3cl.inference import predictor
from i3cl.model.network import I3CL
from i3cl.model.shipped import DEFAULT


def load(checkpoint: str | os.PathLike[str] = DEFAULT, device: str | torch.device | None = None) -> I3CL:
    """The network of a checkpoint directory (path or s3:// URL), in eval mode, with its settings as ``model.recipe``.

    Args:
        checkpoint: directory that training wrote, or the name of a detector that comes with the package.
        device: None: a GPU when there is one.

    Raises:
        UserError: it is not a checkpoint directory, or its weights do not fit its settings.
    """
    if not isinstance(checkpoint, str | os.PathLike):
        raise UserError(f"checkpoint: got {describe(checkpoint)}; it takes the path or URL of a checkpoint directory")
    try:
        device = None if device is None else torch.device(device)
    except RuntimeError:
        raise UserError(f"device: got {device!r}; it takes a device of PyTorch, such as cpu or cuda") from None
    return predictor.load(os.fspath(checkpoint), device)


def detect(
    model: I3CL,
    images: AnyImage | Iterable[AnyImage],
    score_threshold: float = 0.5,
    batch: int = 4,
    *,
    upright: bool | None = None,
) -> list[Detections]:
    """Text in one image or in several: one `Detections` each, in original pixels.

    Args:
        model: as `load` gives it.
        images: a path, an s3:// URL, the bytes of an image file, a Pillow image, an array (H, W) or (H, W, 1|3|4) in RGB order of
            uint8, uint16 or float 0-1; or an iterable of them, of any sizes. It is read as it is needed.
        score_threshold: 0-1; detections up to it are left out.
        batch: images that go through the network together.
        upright: True turns files and Pillow images as their EXIF orientation says, and polygons are in the turned picture; False
            takes their pixels as stored; None: as data.exif in the model's recipe. Arrays are never turned.

    Raises:
        UserError: an image cannot be read, or is something else; the message says what it got and what it takes. Also for a
            threshold or a batch that makes no sense.
    """
    if not isinstance(model, I3CL):
        raise UserError(f"model: got {describe(model)}; it takes a network, as i3cl.load gives it")
    if not isinstance(score_threshold, Real) or not 0 <= score_threshold <= 1:
        raise UserError(f"score_threshold: got {score_threshold!r}; it takes a number from 0 to 1")
    if not isinstance(batch, Integral) or batch < 1:
        raise UserError(f"batch: got {batch!r}; it takes a whole number from 1")
    found: list[Detections] = []
    waiting = as_images(images)
    if upright is None:
        upright = model.recipe is not None and model.recipe.data.upright
    while group := [as_rgb(image, upright=upright) for image in islice(waiting, batch)]:
        found += predictor.detect(model, group, score_threshold, batch)
    return found

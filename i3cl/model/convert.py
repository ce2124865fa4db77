"""Converts weights: a file of the original release into a checkpoint of this project, a checkpoint into one of half the size."""

from __future__ import annotations

import re
from collections.abc import Mapping

from safetensors.torch import save_file
from torch import Tensor

from i3cl import storage
from i3cl.config import BackboneSettings, ModelSettings, Settings, load_settings, to_yaml
from i3cl.errors import UserError
from i3cl.model.checkpoint import SETTINGS, STATE, WEIGHTS, check_finite, load_tensors, save_checkpoint
from i3cl.model.network import I3CL
from i3cl.model.original import UNUSED, cut_classes, to_our_names
from i3cl.model.shipped import folder_of, not_a_checkpoint
from i3cl.model.weights_file import read_tensors

RESNETS: dict[tuple[tuple[int, ...], int], str] = {
    ((3, 4, 6, 3), 64): "resnet50",
    ((3, 4, 23, 3), 64): "resnet101",
    ((3, 4, 23, 3), 8): "resnext101",
    ((3, 8, 36, 3), 8): "resnext151",
}
"""(Blocks of each stage, channels that each group of the first 3x3 convolution reads) -> name."""


def convert_original(source: str, out: str, classes: int | None = None) -> str:
    """Writes the checkpoint directory `out` (local or s3://) from a weights file; returns one line that describes it.

    source: a checkpoint of the original I3CL or of an mmdetection Mask R-CNN, local or s3://; backbone, blocks and classes are
    recognised by the names and shapes of its tensors. classes: keep only the first so many classes. Raises UserError when the
    file is not such a checkpoint, is incomplete or has fewer classes, and when `out` exists.
    """
    with storage.local_copy(source) as path:
        state = read_tensors(path, source)
    tensors = to_our_names(state, source)
    settings = recognise(tensors, source)
    if classes is not None:
        if not 1 <= classes <= settings.num_classes:
            raise UserError(f"--classes {classes}: {source} has {settings.num_classes}; give 1 to {settings.num_classes}")
        tensors = cut_classes(tensors, classes)
    before = settings.num_classes
    settings = settings.model_copy(update={"num_classes": classes or before})
    model = I3CL(settings)
    report = load_tensors(model, tensors, source)
    if report.missing:
        raise UserError(f"{source}: is incomplete: {len(report.missing)} tensors are missing ({report.missing[0]}, ...)")
    with storage.atomic_directory(out) as folder:
        save_checkpoint(model, folder, to_yaml(Settings(name="converted", model=settings)))
    blocks = [name for name, there in (("intra", settings.intra), ("inter", settings.inter)) if there]
    text = f"{settings.backbone.name}, {settings.num_classes} class{'es' * (settings.num_classes > 1)}, "
    text += f"{' and '.join(blocks) or 'neither intra nor inter'} block{'s' * (len(blocks) != 1)}: {report}"
    unused = sum(name.endswith(UNUSED) for name in state)
    if unused:
        text += f"; {unused} that the network does not use are left out"
    if settings.num_classes < before:
        text += f"; scores differ from those of {before} classes, as the softmax has fewer terms: choose new thresholds"
    return text


def halve_checkpoint(source: str, out: str) -> int:
    """Writes the checkpoint `source` to the new directory `out` with weights in float16; returns the bytes of the weights.

    For detectors that are handed on: the settings leave out the paths of data, storage and initial weights. Loading makes the
    weights float32 again. Raises UserError when `source` is not a checkpoint directory and when `out` exists.
    """
    with storage.local_copy(folder_of(source), without=STATE) as folder:
        if not (folder / SETTINGS).is_file():
            raise not_a_checkpoint(source)
        settings = load_settings(folder / SETTINGS)
        tensors = read_tensors(folder / WEIGHTS, source)
    check_finite(tensors, source)
    halves = {name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}
    for name, half in halves.items():
        if half.is_floating_point() and not half.isfinite().all():
            raise UserError(f"{source}: {name} has values beyond the range of float16; hand on the checkpoint as it is")
    data = settings.data.model_copy(update={"train": (), "validation": None})
    train = settings.train.model_copy(update={"start_from": None})
    with storage.atomic_directory(out) as made:
        save_file(halves, made / WEIGHTS)
        kept = Settings(name=settings.name, model=settings.model, data=data, train=train)
        (made / SETTINGS).write_text(to_yaml(kept), encoding="utf-8")
        return (made / WEIGHTS).stat().st_size


def recognise(tensors: Mapping[str, Tensor], source: str) -> ModelSettings:
    """Settings of the network that tensors under our names belong to. Raises UserError, naming `source`, if it is unknown."""
    logits = tensors.get("heads.mask.logits.bias")
    if logits is None:
        raise UserError(
            f"{source}: is not a checkpoint of the original release or of an mmdetection Mask R-CNN; use a torchvision one "
            "as train.start_from, and an image network as model.backbone.weights"
        )
    return ModelSettings(
        backbone=_backbone(tensors, source),
        num_classes=len(logits),
        intra=any(name.startswith("intra.") for name in tensors),
        inter=any(name.startswith("heads.inter.") for name in tensors),
    )


def _backbone(tensors: Mapping[str, Tensor], source: str) -> BackboneSettings:
    body = "backbone.body."
    if f"{body}stages.0.0.pyramid.0.weight" in tensors:
        return BackboneSettings(name="vitaev2_s", frozen_stages=0, norm_eval=False)
    blocks = [
        len({m[1] for name in tensors if (m := re.match(rf"backbone\.body\.layer{i}\.(\d+)\.", name))}) for i in range(1, 5)
    ]
    convolution = tensors.get(f"{body}layer1.0.conv2.weight")
    name = RESNETS.get((tuple(blocks), convolution.shape[1])) if convolution is not None else None
    if name is None:
        raise UserError(
            f"{source}: its backbone is not one of ViTAEv2-S, {', '.join(RESNETS.values())} (it has {blocks} blocks in its four "
            "stages)"
        )
    return BackboneSettings(name=name)

"""Renames tensors: between the original release's names and ours, and from torchvision's Mask R-CNN to ours."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from i3cl.errors import UserError
from i3cl.model.intra import ROUNDS
from i3cl.model.vitae import STAGES, WINDOW
from i3cl.model.weights_file import plain_names

LEVELS = 5
"""Pyramid levels, each with an intra-instance block."""


UNUSED = ("relative_position_bias_table", "relative_position_index")
"""Last parts of the names of ViTAE tensors that the original stores but does not use."""


def _vitae_prefixes() -> list[tuple[str, str]]:
    pairs = []
    for i, stage in enumerate(STAGES):
        theirs, ours = f"backbone.layers.{i}.RC.", f"backbone.body.stages.{i}.0."
        pairs += [(f"{theirs}PRM.convs.{j}.0.", f"{ours}pyramid.{j}.") for j in range(len(stage.dilations))]
        pairs += [(theirs + "PCM.", ours + "conv.")]
        pairs += [(theirs + "attn.attn.", ours + "attention."), (theirs + "attn.", ours)]
        for j in range(stage.depth):
            theirs, ours = f"backbone.layers.{i}.NC.{j}.", f"backbone.body.stages.{i}.{j + 1}."
            pairs += [(theirs + "PCM.", ours + "conv."), (theirs + "attn.", ours + "attention."), (theirs, ours)]
    return pairs


def _prefixes() -> list[tuple[str, str]]:
    """(theirs, ours); where two fit a name, the longer one comes first."""
    pairs = [*_vitae_prefixes(), ("backbone.", "backbone.body.")]
    for i in range(4):
        pairs += [
            (f"neck.lateral_convs.{i}.conv.", f"pyramid.lateral.{i}."),
            (f"neck.fpn_convs.{i}.conv.", f"pyramid.output.{i}."),
        ]
    for i in range(LEVELS):
        theirs, ours = f"intra_cl_module.{i}.", f"intra.{i}."
        pairs += [
            (theirs + "conv1x1_reduce_channel.", ours + "reduce."),
            (theirs + "conv1x1_return_channel.", ours + "expand."),
            (theirs + "bn.", ours + "norm."),
        ]
        for j, k in enumerate(ROUNDS):
            pairs += [
                (f"{theirs}c_layer_{k}x{k}.", f"{ours}square.{j}."),
                (f"{theirs}v_layer_{k}x1.", f"{ours}column.{j}."),
                (f"{theirs}q_layer_1x{k}.", f"{ours}row.{j}."),
            ]
    pairs += [
        ("rpn_head.rpn_conv.", "proposals.conv."),
        ("rpn_head.rpn_cls.", "proposals.cls."),
        ("rpn_head.rpn_reg.", "proposals.reg."),
        ("roi_head.bbox_head.shared_fcs.0.", "heads.box.fc1."),
        ("roi_head.bbox_head.shared_fcs.1.", "heads.box.fc2."),
        ("roi_head.bbox_head.fc_cls.", "heads.box.cls."),
        ("roi_head.bbox_head.fc_reg.", "heads.box.reg."),
        ("roi_head.mask_head.upsample.", "heads.mask.upsample."),
        ("roi_head.mask_head.conv_logits.", "heads.mask.logits."),
    ]
    pairs += [(f"roi_head.mask_head.convs.{i}.conv.", f"heads.mask.convs.{i}.") for i in range(4)]
    theirs, ours = "roi_head.inter_cl_module.", "heads.inter."
    pairs += [
        (theirs + "conv1x1_reduce_channel.", ours + "reduce."),
        (theirs + "conv1x1_return_channel.", ours + "expand."),
        (theirs + "transformer_encoder_instance.", ours + "encoder."),
        (theirs + "global_context_extract_module.conv1x1_list.", ours + "context."),
        (theirs + "conv3x3_out.", ours + "conv3."),
        (theirs + "conv1x1_out.", ours + "conv1."),
        (theirs + "bn.", ours + "norm."),
    ]
    return pairs


_PREFIXES = _prefixes()


def our_name(name: str) -> str:
    """Our name of the original's tensor `name`. KeyError when the original has no such tensor."""
    for theirs, ours in _PREFIXES:
        if name.startswith(theirs):
            return ours + name[len(theirs) :]
    raise KeyError(name)


def original_name(name: str) -> str:
    """The original's name of our tensor `name`. KeyError when it has none."""
    for theirs, ours in _PREFIXES:
        if name.startswith(ours):
            return theirs + name[len(ours) :]
    raise KeyError(name)


def to_our_names(state: Mapping[str, Tensor], source: str) -> dict[str, Tensor]:
    """A detector's state dict under our names; it may have ours, the original release's or torchvision's.

    Unknown names stay. Raises UserError, naming `source`, for a detector that computes something else.
    """
    # Lightning and others keep the network under this name.
    if state and all(name.startswith("model.") for name in state):
        state = plain_names({name.removeprefix("model."): tensor for name, tensor in state.items()})
    if any(name.startswith("backbone.bottom_up.") for name in state):
        raise UserError(
            f"{source}: is a detectron2 model; those expect BGR input on another scale and may have their stride in another "
            "convolution, which the file does not say. Start from a checkpoint of the original release or of torchvision"
        )
    if is_original(state):
        return from_original(state)
    if is_torchvision(state):
        return from_torchvision(state)
    return dict(state)


def is_original(names: Mapping[str, object]) -> bool:
    """Whether a state dict is named as the original release (and mmdetection) names it."""
    return any(name.startswith("roi_head.") for name in names)


def is_torchvision(names: Mapping[str, object]) -> bool:
    """Whether a state dict is named as torchvision's detectors with a feature pyramid."""
    return any(name.startswith("backbone.fpn.") for name in names)


def from_torchvision(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Backbone and pyramid of torchvision's Mask R-CNN under our names; the rest keeps its names and is not loaded.

    The rest computes something else: its anchors are rounded, its RoIAlign has no half-pixel shift, its background is the first
    class. A pyramid with BatchNorm (of version 2) keeps its names too.
    """
    plain = not any(name.startswith("backbone.fpn.inner_blocks.0.1.") for name in state)
    renamed = {}
    for name, tensor in state.items():
        parts = name.split(".")
        ours = {"inner_blocks": "lateral", "layer_blocks": "output"}.get(parts[2] if len(parts) > 2 else "")
        if plain and ours is not None and parts[:2] == ["backbone", "fpn"]:
            name = f"pyramid.{ours}.{parts[3]}.{parts[-1]}"
        renamed[name] = tensor
    return renamed


def from_original(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """An original state dict under our names.

    The unused tensors (`UNUSED`) are left out; others that the network does not have keep their names.
    """
    renamed = {}
    for name, tensor in state.items():
        if name.endswith(UNUSED):
            continue
        try:
            renamed[our_name(name)] = tensor
        except KeyError:
            renamed[name] = tensor
    return renamed


def to_original(state: Mapping[str, Tensor], unused: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """Our state dict under the original's names, complete. KeyError on a tensor that the original does not have.

    The original's loader needs the tensors of `UNUSED` too. They are taken from `unused` (original names) if it has them; else
    the index is computed and the table, whose values have no effect, is zero.
    """
    renamed = {original_name(name): tensor for name, tensor in state.items()}
    given = unused or {}
    for name, qkv in list(renamed.items()):
        parts = name.split(".")
        if parts[:2] != ["backbone", "layers"] or parts[-2:] != ["qkv", "weight"]:
            continue
        stage = STAGES[int(parts[2])]
        if not stage.windowed:
            continue
        heads = stage.reduction_heads if parts[3] == "RC" else stage.heads
        blank = {UNUSED[0]: qkv.new_zeros((2 * WINDOW - 1) ** 2, heads), UNUSED[1]: relative_position_index()}
        for last, tensor in blank.items():
            whole = ".".join([*parts[:-2], last])
            renamed[whole] = given.get(whole, tensor)
    return renamed


def relative_position_index() -> Tensor:
    """(49, 49) int64: row of the bias table for each pair of a window's tokens, as Swin (arXiv 2103.14030) counts them."""
    y, x = torch.meshgrid(torch.arange(WINDOW), torch.arange(WINDOW), indexing="ij")
    y, x = y.flatten(), x.flatten()
    down, across = y[:, None] - y[None] + WINDOW - 1, x[:, None] - x[None] + WINDOW - 1
    return down * (2 * WINDOW - 1) + across


def cut_classes(state: Mapping[str, Tensor], classes: int) -> dict[str, Tensor]:
    """Our state dict with only the first `classes` foreground classes (and the background, which stays last).

    Raises ValueError when it has fewer.
    """
    present = len(state["heads.mask.logits.bias"])
    if not 1 <= classes <= present:
        raise ValueError(f"cannot cut {present} classes down to {classes}")
    result = dict(state)
    for part in ("weight", "bias"):
        cls = state[f"heads.box.cls.{part}"]
        result[f"heads.box.cls.{part}"] = cls[[*range(classes), present]]
        result[f"heads.box.reg.{part}"] = state[f"heads.box.reg.{part}"][: 4 * classes]
        result[f"heads.mask.logits.{part}"] = state[f"heads.mask.logits.{part}"][:classes]
    return result

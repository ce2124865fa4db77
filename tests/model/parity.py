"""Reads a directory of numbers recorded from the original implementation (its README describes the files)."""

from __future__ import annotations

import importlib.util
import json
import os
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from i3cl.config import BackboneSettings, ModelSettings
from i3cl.model.network import I3CL
from i3cl.model.original import from_original

ROOT = Path(__file__).resolve().parents[2]


def default_directory() -> Path:
    return Path(os.environ.get("I3CL_SHARED", ROOT.parent / "shared")) / "parity"


def strided(candidates: Tensor, count: int) -> Tensor:
    """The i-th of k choices out of n is candidate floor(i * n / k)."""
    return candidates[torch.arange(count) * len(candidates) // count]


def first(candidates: Tensor, count: int) -> Tensor:
    return candidates[:count]


CHOICES = {"strided": strided, "first": first}
BACKBONES = {
    "r50": BackboneSettings(),
    "vitae": BackboneSettings(name="vitaev2_s", frozen_stages=0, norm_eval=False),
}
"""As the original's recipes train them."""


class Parity:
    """One directory of recorded numbers, with the images, weights and truths that made them."""

    def __init__(self, directory: Path | None = None) -> None:
        self.directory = directory or default_directory()
        if not (self.directory / "spec.json").is_file():
            pytest.skip(f"no parity data in {self.directory}; set I3CL_SHARED")
        self.spec = self.json("spec.json")
        self._weights: dict[str, dict[str, Tensor]] = {}

    def json(self, name: str) -> Any:
        return json.loads((self.directory / name).read_text())

    def npz(self, name: str) -> dict[str, np.ndarray]:
        with np.load(self.directory / name) as archive:
            return {key: archive[key] for key in archive.files}

    @cached_property
    def maker(self) -> ModuleType:
        spec = importlib.util.spec_from_file_location("make_weights", self.directory / "make_weights.py")
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    def weights(self, network: str) -> dict[str, Tensor]:
        """Original names -> tensors of 'r50' or 'vitae'; what the generator leaves to the architecture is absent."""
        if network not in self._weights:
            arrays = self.maker.weights(
                self.json(f"state_dict_{network}.json"), self.spec["weight_seed"], self.spec["background_bias"][network]
            )
            assert self.maker.checksum(arrays) == self.spec["weights_crc32"][network]
            self._weights[network] = {name: torch.from_numpy(np.array(array)) for name, array in arrays.items()}
        return self._weights[network]

    def network(self, network: str, **settings: Any) -> I3CL:
        """The network with the recorded weights and nothing random in it."""
        backbone = BACKBONES[network].model_copy(update={"drop_path": 0.0})
        model = I3CL(ModelSettings(backbone=backbone, inter_dropout=0.0, **settings))
        model.load_state_dict(from_original(self.weights(network)))
        return model

    def image(self, spec: dict[str, int]) -> Tensor:
        """(3, H, W) float32, 0-255."""
        array = self.maker.image(spec["seed"], spec["height"], spec["width"])
        return torch.from_numpy(array).permute(2, 0, 1).float()

    def target(self, spec: dict[str, int], weights: list[float] | None = None) -> dict[str, Tensor]:
        boxes, labels, masks, _ = self.maker.ground_truth(spec["seed"], spec["height"], spec["width"], spec["n_gt"])
        target = {"boxes": torch.from_numpy(boxes), "labels": torch.from_numpy(labels), "masks": torch.from_numpy(masks)}
        if weights is not None:
            target["lossweight"] = torch.tensor(weights)
        return target


def noise(seed: int, *shape: int) -> Tensor:
    return torch.from_numpy(np.random.RandomState(seed).standard_normal(shape).astype(np.float32))


def relative_error(actual: Tensor | np.ndarray, expected: Tensor | np.ndarray) -> float:
    """Largest absolute difference over the largest absolute expected value."""
    actual = np.asarray(actual.detach() if isinstance(actual, Tensor) else actual, np.float64)
    expected = np.asarray(expected.detach() if isinstance(expected, Tensor) else expected, np.float64)
    assert actual.shape == expected.shape, (actual.shape, expected.shape)
    if not expected.size:
        return 0.0
    return float(np.abs(actual - expected).max() / max(np.abs(expected).max(), 1e-12))


def map_error(x: Tensor, recorded: dict[str, np.ndarray], name: str) -> float:
    """Relative error of a feature map against `name`.values, .channel_mean and .stats."""
    x = x.detach().double()
    assert list(x.shape) == recorded[f"{name}.shape"].tolist()
    stats = torch.stack([x.mean(), x.std(correction=0), x.min(), x.max()])
    return max(
        relative_error(x[:, torch.from_numpy(recorded[f"{name}.channels"])], recorded[f"{name}.values"]),
        relative_error(x.mean((2, 3)), recorded[f"{name}.channel_mean"]),
        relative_error(stats, recorded[f"{name}.stats"]),
    )

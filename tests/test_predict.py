"""Views and sizes: whatever the network saw, polygons come back in the original's pixels."""

import numpy as np
import pytest
import torch
from torch import nn

from i3cl.config import Settings, ViewSettings
from i3cl.errors import UserError
from i3cl.inference.predictor import detect_arrays, load


class OneBox(nn.Module):
    """Finds the white rectangle by its pixels, so that the mapping back is all that is tested."""

    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Parameter(torch.zeros(1))

    def forward(self, images):
        results = []
        for image in images:
            ys, xs = torch.where(image[0] > 128)
            if not len(xs):
                results.append({"boxes": torch.zeros(0, 4), "scores": torch.zeros(0), "masks": torch.zeros(0, 28, 28)})
                continue
            box = torch.tensor([[xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]], dtype=torch.float32)
            results.append({"boxes": box, "scores": torch.tensor([0.9]), "masks": torch.ones(1, 28, 28)})
        return results


@pytest.mark.parametrize(
    "view", [ViewSettings(), ViewSettings(short_side=300), ViewSettings(flip=True), ViewSettings(short_side=75, flip=True)]
)
def test_polygons_come_back_in_original_pixels(view):
    image = np.zeros((150, 200, 3), np.uint8)
    image[40:80, 20:120] = 255
    empty = np.zeros((50, 50, 3), np.uint8)
    settings = Settings.model_validate({"data": {"test_short_side": 150, "test_long_side": 2000}})
    found, nothing = detect_arrays(OneBox(), [image, empty], settings, view)
    assert found.boxes[0] == pytest.approx([20, 40, 120, 80], abs=1.6)
    assert len(nothing) == 0


def test_detection_leaves_the_mode_as_it_was():
    model = OneBox().train()
    detect_arrays(model, [np.zeros((32, 32, 3), np.uint8)], Settings())
    assert model.training


def test_a_folder_that_is_no_checkpoint(tmp_path):
    with pytest.raises(UserError, match=r"no checkpoint.*settings\.yaml"):
        load(str(tmp_path))

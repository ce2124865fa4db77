"""Learning rate, parameter groups, running average: against hand-computed values."""

import pytest
import torch
from torch import nn

from i3cl.config import TrainSettings
from i3cl.training.schedule import WeightAverage, describe_rate, learning_rate, make_optimizer


def test_steps_schedule_by_hand():
    settings = TrainSettings(learning_rate=0.1, warmup_steps=10, warmup_factor=0.1, milestones=(0.5, 0.8))
    rates = [learning_rate(step, 100, 2, settings) for step in (0, 5, 10, 49, 50, 79, 80, 99)]
    assert rates == pytest.approx([0.01, 0.055, 0.1, 0.1, 0.01, 0.01, 0.001, 0.001])


def test_rate_scales_with_the_total_batch():
    settings = TrainSettings(learning_rate=0.01, reference_batch=8, warmup_steps=0)
    assert learning_rate(0, 10, 32, settings) == pytest.approx(0.04)
    assert learning_rate(0, 10, 32, settings.model_copy(update={"reference_batch": None})) == pytest.approx(0.01)


@pytest.mark.parametrize(("images", "rate", "warmup"), [(4, 0.001, 1000), (8, 0.002, 500), (32, 0.008, 500), (1, 0.00025, 4000)])
def test_rate_and_warm_up_follow_the_images_of_a_step(images, rate, warmup):
    """The paper's 1000 iterations of 4 images are 4000 images at any batch, but never fewer than 500 iterations."""
    settings = TrainSettings(learning_rate=0.001, reference_batch=4, warmup_steps=1000, warmup_factor=0.001, milestones=())
    at = [learning_rate(step, 100_000, images, settings) for step in (0, warmup // 2, warmup - 1, warmup)]
    assert at[0] == pytest.approx(0.001 * rate)
    assert at[1] == pytest.approx(rate * (0.001 + 0.999 * (warmup // 2) / warmup))
    assert at[2] < rate and at[3] == pytest.approx(rate)


def test_warm_up_keeps_a_floor_when_many_workers_share_a_step():
    """A paper's 1000 iterations of 8 images, on 64 workers of 2: not the 62 steps that the images alone would give."""
    settings = TrainSettings(learning_rate=0.01, reference_batch=8, warmup_steps=1000, milestones=())
    assert learning_rate(499, 100_000, 128, settings) < 0.16 == pytest.approx(learning_rate(500, 100_000, 128, settings))
    lower = settings.model_copy(update={"warmup_min_steps": 0})
    assert learning_rate(62, 100_000, 128, lower) == pytest.approx(0.16)
    short = settings.model_copy(update={"warmup_steps": 20})
    assert learning_rate(20, 100_000, 128, short) == pytest.approx(0.16), "a recipe's own short warm-up stays"


@pytest.mark.parametrize(("optimizer", "factor"), [("sgd", 16), ("adamw", 4)])
def test_adamw_scales_by_the_square_root(optimizer, factor):
    settings = TrainSettings(optimizer=optimizer, learning_rate=1e-4, reference_batch=8, warmup_steps=0, milestones=())
    assert learning_rate(0, 100, 8, settings) == pytest.approx(1e-4)
    assert learning_rate(0, 100, 128, settings) == pytest.approx(factor * 1e-4)


def test_the_resulting_rate_is_said():
    """64 workers of 2 images, with recipes written for 8 and 4 images a step."""
    sgd = TrainSettings(learning_rate=0.01, reference_batch=8, warmup_steps=1000)
    assert describe_rate(100_000, 128, sgd) == (
        "learning rate 0.16 (0.01 for 8 images a step, scaled to 128: linear, SGD), warm-up over 500 of 100000 steps"
    )
    adamw = TrainSettings(optimizer="adamw", learning_rate=1e-4, reference_batch=4, warmup_steps=1000)
    assert describe_rate(100_000, 256, adamw) == (
        "learning rate 0.0008 (0.0001 for 4 images a step, scaled to 256: by the square root, AdamW), "
        "warm-up over 500 of 100000 steps"
    )
    plain = sgd.model_copy(update={"reference_batch": None})
    assert describe_rate(100, 128, plain) == "learning rate 0.01 (train.learning_rate as it stands), warm-up over 20 of 100 steps"


def test_warm_up_takes_at_most_a_fifth_of_a_short_run():
    settings = TrainSettings(learning_rate=1.0, warmup_steps=1000, milestones=())
    assert learning_rate(20, 100, 1, settings) == 1.0


def test_cosine_ends_at_a_hundredth():
    settings = TrainSettings(learning_rate=1.0, warmup_steps=0, schedule="cosine")
    assert learning_rate(0, 100, 1, settings) == pytest.approx(1.0)
    assert learning_rate(50, 100, 1, settings) == pytest.approx(0.505)
    assert learning_rate(100, 100, 1, settings) == pytest.approx(0.01)


def test_adamw_decays_matrices_only():
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4))
    model[0].bias.requires_grad_(False)
    optimizer = make_optimizer(model, TrainSettings(optimizer="adamw", weight_decay=0.05))
    decayed, plain = optimizer.param_groups
    assert [p.shape for p in decayed["params"]] == [torch.Size([4, 3])] and decayed["weight_decay"] == 0.05
    assert len(plain["params"]) == 2 and plain["weight_decay"] == 0


def test_running_average_by_hand():
    model = nn.Linear(1, 1, bias=False)
    nn.init.constant_(model.weight, 0.0)
    average = WeightAverage(model, decay=0.5)
    nn.init.constant_(model.weight, 1.0)
    average.update()
    # First update: keep min(0.5, 2 / 11).
    assert average.model.weight.item() == pytest.approx(1 - 2 / 11)
    for _ in range(100):
        average.update()
    assert average.model.weight.item() == pytest.approx(1.0)


def test_the_average_follows_statistics_and_weights_that_are_loaded_later():
    model = nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2), nn.Conv2d(2, 1, 1)).requires_grad_(True)
    model[2].requires_grad_(False)
    average = WeightAverage(model, decay=0.5)
    model.load_state_dict({name: torch.full_like(tensor, 3) for name, tensor in model.state_dict().items()})
    for _ in range(60):
        average.update()
    for name, tensor in average.model.state_dict().items():
        if not name.startswith("2."):
            assert (tensor.float() - 3).abs().max() < 1e-5, name
    assert not any(p.requires_grad for p in average.model.parameters())

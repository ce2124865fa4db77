"""The numbers of a narrow network stay what they were; small.py says how they are made and recorded."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
import torch

from i3cl.model import align, heads, proposals
from tests.model import small


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def recorded() -> dict[str, list]:
    return json.loads(small.RECORDED.read_text())


def test_every_loss_box_score_and_mask_is_the_recorded_one() -> None:
    expected = recorded()
    assert {label for name, rows in expected.items() if name.startswith("labels") for label in rows} == {0, 1}
    assert small.differences(small.measure() | small.measure_vitae(), expected) == []


def _shifted_sample(original):
    def sample(*arguments):
        return [type(drawn)(drawn.positive[:-1], drawn.negative) for drawn in original(*arguments)]

    return sample


CHANGES = {
    "RoIAlign reads another level": (align, "FINEST", lambda x: 28, "loss_cls"),
    "the box head's offsets have another scale": (heads, "BOX_STDS", lambda x: (0.1, 0.1, 0.2, 0.21), "boxes 0"),
    "boxes are clipped one pixel earlier": (proposals, "clip", lambda f: lambda b, h, w: f(b, h, w - 1), "proposals"),
    "suppression keeps boxes that overlap a little more": (
        proposals,
        "grouped_nms",
        lambda f: lambda b, s, g, t, n: f(b, s, g, t + 0.05, n),
        "objectness",
    ),
    "one positive less is sampled": (proposals, "sample", _shifted_sample, "loss_rpn_cls"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_noticed(change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module, name, make, where = CHANGES[change]
    monkeypatch.setattr(module, name, make(getattr(module, name)))
    wrong = small.differences(small.measure(), recorded())
    assert any(line.startswith(f"{where}:") for line in wrong), wrong


def test_a_change_of_a_setting_is_noticed() -> None:
    for setting, value, where in (
        ("weight_mask_loss", True, "loss_mask"),
        ("ignore_iof", None, "loss_rpn_cls"),
        ("mean", (123.675, 116.28, 104.53), "map 0"),
    ):
        wrong = small.differences(small.measure(**{setting: value}), recorded())
        assert any(line.startswith(f"{where}:") for line in wrong), (setting, wrong)

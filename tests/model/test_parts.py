"""Boxes, anchors, matching, mask targets and region reading, by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torchvision.ops import roi_align

from i3cl.model import matching, targets
from i3cl.model.align import region_levels, sparse_roi_align
from i3cl.model.anchors import Anchors, base_anchors
from i3cl.model.boxes import _nms_by_group, _nms_side_by_side, clip, decode, encode, grouped_nms, iof, iou
from i3cl.model.heads import paste_masks
from i3cl.model.inter import InterBlock
from i3cl.model.intra import IntraBlock
from i3cl.model.matching import NEGATIVE, UNUSED, assign, random_choice, sample
from i3cl.model.targets import _targets_by_instance, _targets_together, mask_targets, read_truth

CPU = torch.device("cpu")


def boxes(*rows: tuple[float, float, float, float]) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.float32).reshape(-1, 4)


def test_base_anchors_keep_their_area() -> None:
    wide = 32 * math.sqrt(2) / 2
    expected = boxes((-wide, -wide / 2, wide, wide / 2), (-16, -16, 16, 16), (-wide / 2, -wide, wide / 2, wide))
    assert torch.allclose(base_anchors(4, 8.0, (0.5, 1.0, 2.0)), expected)


def test_anchors_go_by_row_column_ratio_without_half_cell() -> None:
    anchors = Anchors((4, 8), 8.0, (0.5, 1.0, 2.0))
    everything = anchors([(2, 3), (1, 2)], CPU)
    assert len(everything) == (6 + 2) * 3 and anchors.counts([(2, 3), (1, 2)]) == [18, 6]
    centres = (everything[:, :2] + everything[:, 2:]) / 2
    assert centres[1::3].round().tolist() == [[0, 0], [4, 0], [8, 0], [0, 4], [4, 4], [8, 4], [0, 0], [8, 0]]


def test_anchors_past_an_images_own_padding_are_not_valid() -> None:
    anchors = Anchors((4, 8), 8.0, (1.0,))
    assert anchors.valid([(8, 8), (4, 4)], (32, 32), CPU) is None
    valid = anchors.valid([(8, 16), (4, 8)], (32, 32), CPU)
    assert valid is not None
    cells = torch.zeros(8 * 16 + 4 * 8, dtype=torch.bool)
    cells[valid] = True
    assert valid.diff().min() > 0
    assert cells[:128].reshape(8, 16).tolist() == [[True] * 8 + [False] * 8] * 8
    assert cells[128:].reshape(4, 8).tolist() == [[True] * 4 + [False] * 4] * 4


def test_encode_and_decode_by_hand_and_back() -> None:
    anchor, box = boxes((0, 0, 10, 20)), boxes((5, 0, 25, 20))
    assert torch.allclose(encode(anchor, box), torch.tensor([[1.0, 0.0, math.log(2), 0.0]]))
    assert torch.allclose(encode(anchor, box, (0.1, 0.1, 0.2, 0.2)), torch.tensor([[10, 0, 5 * math.log(2), 0]]))
    assert torch.allclose(decode(anchor, encode(anchor, box)), box)
    wild = decode(boxes((0, 0, 16, 16)), torch.tensor([[0.0, 0.0, 50.0, -50.0]]))
    assert torch.allclose(wild[0, 2:] - wild[0, :2], torch.tensor([1000.0, 0.256]), rtol=1e-4)


def test_overlaps_and_clip() -> None:
    a, b = boxes((0, 0, 2, 2), (5, 5, 5, 5)), boxes((1, 0, 3, 2), (5, 5, 5, 5))
    assert torch.allclose(iou(a, b), torch.tensor([[1 / 3, 0], [0, 0]]))
    assert torch.allclose(iof(a[:1], boxes((1, 0, 9, 9))), torch.tensor([[0.5]]))
    assert clip(boxes((-3, 2, 50, 60)), 40, 30).tolist() == [[0, 2, 30, 40]]
    assert iou(boxes(), b).shape == (0, 2)


def test_nms_keeps_groups_apart() -> None:
    same = boxes((0, 0, 9, 9), (0, 0, 9, 9), (0, 0, 9, 9), (20, 20, 30, 30))
    scores, groups = torch.tensor([0.5, 0.9, 0.7, 0.1]), torch.tensor([0, 0, 62, 0])
    assert grouped_nms(same, scores, groups, 0.5, 10).tolist() == [1, 2, 3]
    assert grouped_nms(same, scores, groups, 0.5, 1).tolist() == [1]
    assert grouped_nms(same[:0], scores[:0], groups[:0], 0.5, 10).tolist() == []


CANDIDATES = boxes((0, 0, 10, 10), (0, 0, 10, 6), (0, 0, 10, 4), (0, 0, 10, 1), (50, 50, 60, 60))


def test_assignment_thresholds() -> None:
    truth = boxes((0, 0, 10, 10))
    assert assign(CANDIDATES, truth, 0.7, 0.3, 0.3).tolist() == [0, UNUSED, UNUSED, NEGATIVE, NEGATIVE]


def test_a_truth_without_a_good_candidate_takes_its_best_ones() -> None:
    truth = boxes((0, 0, 10, 10))
    tied = boxes((0, 0, 10, 4), (0, 6, 10, 10), (0, 0, 10, 3.5))
    assert assign(tied, truth, 0.7, 0.3, 0.3).tolist() == [0, 0, UNUSED]
    assert assign(tied, truth, 0.7, 0.3, 0.45).tolist() == [UNUSED] * 3


def test_the_later_of_two_truths_that_claim_one_candidate_has_it() -> None:
    assert assign(boxes((0, 0, 10, 10)), boxes((0, 0, 10, 5), (0, 5, 10, 10)), 0.7, 0.3, 0.3).tolist() == [1]


def test_ignored_regions_take_negatives_out_but_not_positives() -> None:
    truth, ignored = boxes((0, 0, 10, 10)), boxes((0, 0, 10, 10), (52, 50, 70, 70))
    assert assign(CANDIDATES, truth, 0.7, 0.3, 0.3, ignored, 0.5).tolist() == [0] + [UNUSED] * 4
    assert assign(CANDIDATES, truth, 0.7, 0.3, 0.3, ignored, 0.9).tolist()[-1] == NEGATIVE
    assert assign(CANDIDATES, truth, 0.7, 0.3, 0.3, ignored, None).tolist()[-1] == NEGATIVE
    assert assign(CANDIDATES, boxes(), 0.7, 0.3, 0.3, ignored, 0.5).tolist() == [UNUSED] * 5


def test_assignment_of_nothing() -> None:
    assert assign(CANDIDATES, boxes(), 0.7, 0.3, 0.3).tolist() == [NEGATIVE] * 5
    assert assign(boxes(), boxes((0, 0, 1, 1)), 0.7, 0.3, 0.3).tolist() == []


def test_assignment_in_pieces_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    corner = torch.rand(500, 2) * 80
    many, truths = torch.cat([corner, corner + 5 + torch.rand(500, 2) * 20], 1), boxes((5, 5, 30, 25), (40, 40, 60, 70))
    whole = assign(many, truths, 0.5, 0.3, 0.3, truths[:1] + 40, 0.5)
    monkeypatch.setattr(matching, "PAIRS_AT_ONCE", 64)
    assert assign(many, truths, 0.5, 0.3, 0.3, truths[:1] + 40, 0.5).equal(whole)
    assert len(whole.unique()) == 4


def test_sample_limits_positives_and_fills_with_negatives() -> None:
    assigned = torch.tensor([0, NEGATIVE, 1, UNUSED, 2, NEGATIVE, NEGATIVE, NEGATIVE])
    (drawn,) = sample([assigned], 4, 0.5, lambda candidates, count: candidates[-count:].flip(0))
    assert drawn.positive.tolist() == [2, 4] and drawn.negative.tolist() == [6, 7]
    drawn, nothing = sample([assigned, assigned[:0]], 6, 0.5, random_choice())
    assert drawn.positive.tolist() == [0, 2, 4] and len(drawn.negative) == 3
    assert len(nothing.positive) == len(nothing.negative) == 0


def test_random_choice_repeats_with_its_generator() -> None:
    candidates = torch.arange(100)
    first = random_choice(torch.Generator().manual_seed(3))(candidates, 10)
    assert first.equal(random_choice(torch.Generator().manual_seed(3))(candidates, 10))
    assert len(first.unique()) == 10


def test_region_levels() -> None:
    sides = torch.tensor([0.0, 56.0, 111.9, 112.0, 224.0, 448.0, 5000.0])
    assert region_levels(torch.stack([sides * 0, sides * 0, sides, sides], 1)).tolist() == [0, 0, 0, 1, 2, 3, 3]


def test_sparse_roi_align_is_roi_align() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 5, 13, 17)
    corner = torch.rand(60, 2) * 70 - 10
    regions = torch.cat([torch.arange(60)[:, None] % 2, corner, corner + torch.rand(60, 2) * 60], 1)
    odd = torch.tensor(
        [[0, 3, 3, 3, 9], [1, 3, 3, 9, 3], [0, 500, 500, 520, 520], [0, -90, -90, -80, -80], [1, -40, 4, 200, 9.0]]
    )
    regions = torch.cat([regions, odd])
    for side in (7, 14):
        results = []
        for function in (
            lambda x: roi_align(x, regions, side, 0.25, 0, True),  # noqa: B023
            lambda x: sparse_roi_align(x, regions, side, 0.25),  # noqa: B023
        ):
            own = x.clone().requires_grad_()
            y = function(own)
            (y * torch.arange(y.numel()).reshape(y.shape).cos()).sum().backward()
            results.append((y.detach(), own.grad))
        assert torch.allclose(results[0][0], results[1][0], atol=1e-5)
        assert torch.allclose(results[0][1], results[1][1], atol=1e-4)
    assert sparse_roi_align(x, regions[:0], 7, 0.25).shape == (0, 5, 7, 7)


def polygon_mask(height: int, width: int, x0: int, y0: int, x1: int, y1: int) -> torch.Tensor:
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return ((x >= x0) & (x < x1) & (y >= y0) & (y < y1) & (x + y < x0 + y1)).to(torch.uint8)


def test_crops_and_full_bitmaps_give_identical_mask_targets() -> None:
    frames = boxes((0, 0, 40, 30), (17, 21, 61, 64), (30, 5, 31, 7))
    full = torch.stack([polygon_mask(64, 61, *map(int, f)) for f in frames.tolist()])
    labels = torch.zeros(3, dtype=torch.int64)
    crops = [m[int(y0) : int(y1), int(x0) : int(x1)] for m, (x0, y0, x1, y1) in zip(full, frames.tolist())]
    whole = read_truth({"boxes": frames, "labels": labels, "masks": full}, CPU)
    cut = read_truth({"boxes": frames, "labels": labels, "masks": crops, "mask_origins": frames[:, :2].long()}, CPU)
    torch.manual_seed(0)
    indices = torch.arange(60) % 3
    shifted = frames[indices] + torch.cat([torch.zeros(3, 4), torch.randn(57, 4) * 4])
    shifted[:, 2:] = torch.maximum(shifted[:, 2:], shifted[:, :2] + 0.5)
    wanted = mask_targets(whole, shifted, indices, 28)
    assert mask_targets(cut, shifted, indices, 28).equal(wanted)
    assert 0.2 < wanted.mean() < 0.8 and wanted[0].sum() > 300


def test_a_bad_target_is_refused() -> None:
    good = {"boxes": boxes((0, 0, 4, 4)), "labels": torch.zeros(1, dtype=torch.int64), "masks": torch.ones(1, 8, 8)}
    read_truth(good, CPU)
    for wrong in (
        {"labels": torch.zeros(2, dtype=torch.int64)},
        {"masks": torch.ones(2, 8, 8)},
        {"lossweight": torch.ones(3)},
        {"boxes": boxes((4, 0, 4, 4))},
    ):
        with pytest.raises(ValueError, match="target"):
            read_truth({**good, **wrong}, CPU)


def test_pasted_mask_fills_its_box() -> None:
    masks = torch.ones(2, 28, 28)
    pasted = paste_masks(masks, boxes((2, 3, 10, 7), (5, 5, 5, 5)), 12, 16) >= 0.5
    assert pasted[0].sum() == 8 * 4 and pasted[0, 3:7, 2:10].all() and not pasted[1].any()


def test_a_merged_intra_round_is_the_sum_of_its_convolutions() -> None:
    torch.manual_seed(0)
    block = IntraBlock(32).eval()
    x = torch.randn(2, 32, 9, 11)
    y = block.reduce(x)
    for i in range(3):
        y = block.square[i](y) + block.column[i](y) + block.row[i](y)
    expected = x + block.norm(block.expand(y)).relu()
    assert torch.allclose(block(x), expected, atol=1e-5)
    block.train()(torch.randn(1, 32, 1, 1)).sum().backward()


def test_inter_block_sees_one_image_at_a_time() -> None:
    torch.manual_seed(0)
    block = InterBlock(16, inner=4, layers=2, heads=2, feedforward=32).eval()
    levels = [torch.randn(3, 16, 16 >> i, 16 >> i) for i in range(4)]
    rois = torch.randn(5, 16, 14, 14)
    together = block(rois, levels, [2, 0, 3])
    first = block(rois[:2], [x[:1] for x in levels], [2])
    last = block(rois[2:], [x[2:] for x in levels], [3])
    assert torch.allclose(together, torch.cat([first, last]), atol=1e-5)
    assert block(rois[:0], levels, [0, 0, 0]).shape == (0, 16, 14, 14)
    context = block.expand(block.instance_tokens(rois[:2], [2]).reshape(2, 4, 3, 3))
    context = torch.nn.functional.interpolate(context, size=14, mode="bilinear", align_corners=True)
    image = sum(torch.nn.functional.conv2d(x[:1], c.weight, padding=1).mean((2, 3)) for c, x in zip(block.context, levels))
    y = block.conv1(block.conv3(rois[:2] + context + image[:, :, None, None]))
    assert torch.allclose(first, block.norm(y).relu(), atol=1e-5)


def test_suppression_side_by_side_is_suppression_group_by_group() -> None:
    torch.manual_seed(0)
    corner = torch.rand(3000, 2) * 1500
    many = torch.cat([corner, corner + torch.rand(3000, 2) * 200], 1)
    # Exact duplicates, equal scores, boxes without area, pairs of IoU 0.5 and boxes of all sizes.
    many[100:200], many[200:220, 2:] = many[:100], many[200:220, :2]
    many[300:302] = boxes((0, 0, 10, 10), (0, 0, 10, 5))
    scores, groups = torch.rand(3000).mul(500).round() / 500, torch.arange(3000) % 5
    groups[300:302] = 0
    for threshold in (0.3, 0.5, 0.7):
        apart = _nms_by_group(many, scores, groups, threshold)
        together = _nms_side_by_side(many, scores, groups, threshold)
        assert sorted(apart.tolist()) == sorted(together.tolist()) and 200 < len(apart) < 3000
        assert scores[apart].equal(scores[together])
    nothing = torch.zeros(0, 4), torch.zeros(0), torch.zeros(0, dtype=torch.int64)
    assert _nms_side_by_side(*nothing, 0.5).tolist() == []


@pytest.mark.parametrize("at_once", [1 << 26, 64 * 61 * 2, 1])
def test_mask_targets_together_are_those_one_by_one(at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(targets, "CELLS_AT_ONCE", at_once)
    torch.manual_seed(0)
    frames = boxes((0, 0, 40, 30), (17, 21, 61, 64), (30, 5, 31, 7), (3, 40, 20, 60), (0, 0, 61, 64))
    masks = [(torch.rand(int(y1 - y0), int(x1 - x0)) < 0.6).to(torch.uint8) for x0, y0, x1, y1 in frames.tolist()]
    truth = read_truth(
        {"boxes": frames, "labels": torch.zeros(5, dtype=torch.int64), "masks": masks, "mask_origins": frames[:, :2].long()}, CPU
    )
    indices = torch.arange(100) % 5
    shifted = frames[indices] + torch.cat([torch.zeros(5, 4), torch.randn(95, 4) * 6])
    shifted[:, 2:] = torch.maximum(shifted[:, 2:], shifted[:, :2] + 0.5)
    one_by_one = _targets_by_instance(truth, shifted, indices, 28)
    assert _targets_together(truth, shifted, indices, 28).equal(one_by_one) and 0.3 < one_by_one.mean() < 0.7

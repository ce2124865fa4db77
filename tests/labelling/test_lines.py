"""Fusion of words with lines: a line supports, contradicts, and never lends its outline."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from i3cl.config import FusionSettings, SelectSettings
from i3cl.labelling.fusion import MemberPrediction, fuse
from i3cl.labelling.select import select


def box(x0, y0, x1, y1):
    return np.array([[x0, y0], [x1, y0], [x1, y1], [x0, y1]], np.float32)


WORDS = [box(10, 10, 60, 30), box(70, 10, 120, 30), box(10, 100, 60, 120)]
LINE = box(8, 8, 125, 32)


def words(scores=(0.8, 0.8, 0.8), member="ours", polygons=WORDS):
    return MemberPrediction(member, list(polygons), np.array(scores))


def lines(polygons=(LINE,), scores=(0.9,), member="ppocr", weight=None, view="default"):
    return MemberPrediction(member, list(polygons), np.array(scores), weight, view, lines=True)


def test_a_line_supports_the_words_that_it_covers_and_speaks_against_the_others():
    fused = fuse([words(), lines()], FusionSettings())
    # (0.8 + 0.9) / 2 for the two words in the line, 0.8 / 2 for the one where the member of lines saw nothing.
    assert fused.scores == pytest.approx([0.85, 0.85, 0.4]) and fused.votes.tolist() == [2, 2, 1]
    assert sorted(ring.tobytes() for ring in fused.polygons) == sorted(ring.tobytes() for ring in WORDS)
    # A line is no second outline: nothing confirms the outlines of the words.
    assert fused.agreement.tolist() == [0, 0, 0] and fused.lines == []


def test_of_several_lines_the_best_counts_once():
    fused = fuse([words(), lines([LINE, box(0, 0, 130, 40)], (0.4, 0.6))], FusionSettings())
    assert fused.scores[:2] == pytest.approx([0.7, 0.7])


@pytest.mark.parametrize(("end", "supported"), [(36, True), (34, False)])
def test_half_of_the_word_must_be_covered(end, supported):
    fused = fuse([words((0.8,), polygons=WORDS[:1]), lines([box(0, 0, end, 40)])], FusionSettings())
    assert fused.scores == pytest.approx([0.85 if supported else 0.4])


def test_lines_without_words_are_ignore_regions_and_never_labels():
    lonely = box(200, 200, 400, 230)
    fused = fuse([words(), lines([LINE, lonely], (0.9, 1.0))], FusionSettings())
    assert len(fused) == 3 and len(fused.lines) == 1 and fused.line_scores == pytest.approx([0.5])
    chosen = select(fused, SelectSettings(low=0.3, high=0.4, ignore=0.2))
    assert chosen.ignore.tolist() == [False, False, False, True] and np.array_equal(chosen.polygons[3], lonely)
    assert chosen.lossweight[3] == 0 and chosen.dropped == 0
    assert select(fused, SelectSettings(low=0.6, high=0.8, ignore=0.55)).dropped == 2

    alone = fuse([lines([LINE], (1.0,))], FusionSettings())
    assert len(alone) == 0 and alone.line_scores == pytest.approx([1.0])
    assert select(alone, SelectSettings(low=0.1, high=0.2, ignore=0.1)).ignore.tolist() == [True]


def random_scene(seed):
    rng = np.random.default_rng(seed)
    centres = rng.uniform(20, 380, (8, 2))
    parts = []
    for member in "ab":
        moved = centres + rng.normal(0, 3, centres.shape)
        parts.append(words(rng.uniform(0.1, 1, 8), member, [box(x - 15, y - 6, x + 15, y + 6) for x, y in moved]))
    rows = rng.uniform(0, 400, (4, 2))
    found = lines([box(x - 80, y - 12, x + 80, y + 12) for x, y in rows], rng.uniform(0.1, 1, 4))
    return parts, found


seeds = st.integers(0, 2**32 - 1)
short = hypothesis_settings(max_examples=25, deadline=None)


@short
@given(seed=seeds)
def test_lines_change_scores_and_votes_and_no_outline(seed):
    parts, found = random_scene(seed)
    nothing = MemberPrediction("ppocr", [], np.zeros(0), lines=True)
    # IoU 1: no result gives way to another, whatever their scores.
    settings = FusionSettings(iou=1.0)
    with_lines, without = fuse([*parts, found], settings), fuse([*parts, nothing], settings)
    kept = {ring.tobytes(): score for ring, score in zip(without.polygons, without.scores)}
    assert {ring.tobytes() for ring in with_lines.polygons} == kept.keys()
    for ring, score, votes in zip(with_lines.polygons, with_lines.scores, with_lines.votes):
        assert kept[ring.tobytes()] - 1e-12 <= score <= min(1.0, kept[ring.tobytes()] + 1 / 3 + 1e-12)
        assert 1 <= votes <= 3


@short
@given(seed=seeds, order=st.permutations(range(3)))
def test_the_order_of_members_does_not_matter(seed, order):
    parts, found = random_scene(seed)
    members = [*parts, found]
    one, other = fuse(members, FusionSettings()), fuse([members[k] for k in order], FusionSettings())
    assert one.scores.tolist() == other.scores.tolist() and one.line_scores.tolist() == other.line_scores.tolist()
    for a, b in zip(one.polygons + one.lines, other.polygons + other.lines, strict=True):
        assert np.array_equal(a, b)


@short
@given(seed=seeds)
def test_lines_of_weight_zero_equal_absence(seed):
    parts, found = random_scene(seed)
    light = MemberPrediction("ppocr", found.polygons, found.scores, 0.0, lines=True)
    one, other = fuse([*parts, light], FusionSettings()), fuse(parts, FusionSettings())
    assert one.scores.tolist() == other.scores.tolist() and not one.lines
    assert all(np.array_equal(a, b) for a, b in zip(one.polygons, other.polygons, strict=True))

"""Splits that stay, removal lists, and images that look the same."""

import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from i3cl.data.formats.coco import read_coco, write_coco
from i3cl.data.formats.records import ImageRecord
from i3cl.data.formats.table import write_shards
from i3cl.data.tools.splits import (
    near_pairs,
    parse_fractions,
    read_removals,
    report_duplicates,
    split_of,
    write_splits,
)
from i3cl.errors import UserError

HALVES = ["train=0.5", "val=0.5"]


def records(count: int) -> list[ImageRecord]:
    return [ImageRecord(i, f"gt_{i}.jpg", 8, 8) for i in range(count)]


def names(path: Path) -> set[str]:
    return {r.file_name for r in read_coco(str(path), "", check_files=False).records}


def test_parts_are_the_whole_and_stay_when_images_come(tmp_path):
    write_coco(str(tmp_path / "few.json"), records(500))
    write_shards(str(tmp_path / "many"), records(1000))
    counts = write_splits(str(tmp_path / "few.json"), str(tmp_path / "a"), fractions=HALVES, seed=0)
    write_splits(str(tmp_path / "many"), str(tmp_path / "b"), fractions=HALVES, seed=0)
    train, val = names(tmp_path / "a" / "train.json"), names(tmp_path / "a" / "val.json")
    assert len(train) == counts["train"] and len(train) + len(val) == 500 and not train & val and 200 < len(train) < 300
    assert train <= names(tmp_path / "b" / "train") and val <= names(tmp_path / "b" / "val")
    assert any(split_of(n, {"a": 0.5, "b": 0.5}, 0) != split_of(n, {"a": 0.5, "b": 0.5}, 1) for n in train)


def test_shares_are_kept():
    shares = {"train": 0.7, "val": 0.2, "test": 0.1}
    found = [split_of(f"{i}.jpg", shares, 3) for i in range(20_000)]
    for name, share in shares.items():
        assert abs(found.count(name) / 20_000 - share) < 0.02


@pytest.mark.parametrize("words", ["train", "train=x", "train=0.5", "a=0.5 a=0.5", "../a=1", "a=nan", "a=2 b=-1"])
def test_bad_fractions(words):
    with pytest.raises(UserError, match="--fractions"):
        parse_fractions(words.split())


def test_removal_lists(tmp_path):
    write_coco(str(tmp_path / "s.json"), records(20))
    (tmp_path / "pairs.list").write_text("# Total-Text, ArT\nimg12.jpg gt_3.jpg\r\nimg5.jpg\ttrain_images/gt_4.jpg\n\n")
    (tmp_path / "numbers.txt").write_text("1001, 7\n1002, 8\n")
    options = {"fractions": ["all=1"], "seed": 0}
    lists = [str(tmp_path / "pairs.list"), str(tmp_path / "numbers.txt") + ":2"]
    counts = write_splits(str(tmp_path / "s.json"), str(tmp_path / "out"), remove=lists, **options)
    assert counts == {"all": 16, "removed": 4}
    assert {r.id for r in records(20)} - {int(n[3:-4]) for n in names(tmp_path / "out" / "all.json")} == {3, 4, 7, 8}
    for wrong in (str(tmp_path / "numbers.txt"), str(tmp_path / "numbers.txt") + ":1"):
        with pytest.raises(UserError, match="none of its"):
            write_splits(str(tmp_path / "s.json"), str(tmp_path / "no"), remove=[wrong], **options)
    (tmp_path / "empty").write_text("\n")
    with pytest.raises(UserError, match="lists no image"):
        read_removals(str(tmp_path / "empty"))


@given(st.integers(0, 6), st.integers(0, 2**32 - 1))
@settings(max_examples=30, deadline=None)
def test_pairs_are_those_of_all_against_all(distance, seed):
    rng = np.random.default_rng(seed)
    first = rng.integers(0, 2**64, 60, np.uint64)
    flips = np.array([sum(1 << int(b) for b in rng.choice(64, rng.integers(0, 10), replace=False)) for _ in first], np.uint64)
    second = np.concatenate([first ^ flips, rng.integers(0, 2**64, 20, np.uint64)])
    bits = np.bitwise_count(first[:, None] ^ second[None])
    a, b = np.nonzero(bits <= distance)
    assert np.array_equal(near_pairs(first, second, distance), np.stack([a, b, bits[a, b]], 1))


def test_no_hashes():
    none = np.zeros(0, np.uint64)
    assert near_pairs(none, none, 3).shape == (0, 3) and near_pairs(np.zeros(1, np.uint64), none, 3).shape == (0, 3)


def test_a_smaller_copy_is_found(tmp_path, tiny_set, caplog):
    caplog.set_level("INFO", "i3cl")
    (tmp_path / "images").mkdir()
    with Image.open(tiny_set / "images" / "4.jpg") as image:
        image.resize((70, 70)).save(tmp_path / "images" / "copy.png")
    (tmp_path / "images" / "bad.jpg").write_text("no image")
    heads = [ImageRecord(1, "copy.png", 70, 70), ImageRecord(2, "bad.jpg", 70, 70)]
    write_coco(str(tmp_path / "copies.json"), heads)
    ours = (str(tiny_set / "set.json"), str(tiny_set / "images"))
    assert report_duplicates(ours, (str(tmp_path / "copies.json"), str(tmp_path / "images")), 6) == 1
    printed = caplog.text
    assert "\t4.jpg\tcopy.png\n" in printed and "left out" in printed and "bad.jpg" in printed
    assert report_duplicates(ours, ours, 0, str(tmp_path / "pairs.tsv")) == 0 and os.path.getsize(tmp_path / "pairs.tsv") == 0
    with pytest.raises(UserError, match=f"{tmp_path}: none of the .* images can be read"):
        report_duplicates(ours, (ours[0], str(tmp_path)), 4)
    with pytest.raises(UserError, match="--distance"):
        report_duplicates(ours, ours, 30)


def test_removal_lists_know_every_ending_of_an_image(tmp_path):
    (tmp_path / "list.txt").write_text("a.jfif\nx\\b.JPE\nc.d\n")
    assert read_removals(str(tmp_path / "list.txt")) == ({"a", "b", "c.d"}, set())

"""A few hundred broken files of every format; fuzz_importers.py as a script makes any number."""

from __future__ import annotations

import pytest
from fuzz_importers import FUZZED, fuzz


@pytest.mark.parametrize("sample", FUZZED)
def test_a_mutated_file_is_read_or_refused(sample, tmp_path):
    if sample in ("synthtext", "synthtext_plain", "totaltext_mat"):
        pytest.importorskip("scipy.io", reason="scipy writes this sample")
    verdicts = fuzz(sample, tmp_path, 150, seed=1)
    assert sum(verdicts.values()) == 150
    assert verdicts["refused"] > 10

"""The numbers of every protocol on a small set of our own, recorded in golden/expected.json: needs nothing from outside."""

import json
from pathlib import Path

import pytest

from i3cl.errors import UserError
from i3cl.evaluation import scoring
from i3cl.evaluation.command import Options, evaluate_files
from i3cl.evaluation.metrics.matching import MATCHINGS
from i3cl.evaluation.metrics.protocols import AP_PROTOCOLS, PROTOCOLS

GOLDEN = Path(__file__).parent / "golden"
KEYS = ("recall", "precision", "hmean", "truths", "dont_cares", "detections", "dropped", "skipped", "repaired")


def cases():
    """Name -> options of every protocol, matching and variant that is recorded."""
    found = {name: {"protocol": name} for name in (*PROTOCOLS, *AP_PROTOCOLS)}
    del found["ctw1500-v1"]  # it refuses images without truth, see below
    found |= {f"icdar {m}": {"protocol": "icdar", "matching": m} for m in MATCHINGS}
    found["icdar above 0.5"] = {"protocol": "icdar", "threshold": 0.5}
    found["icdar buffer0"] = {"protocol": "icdar", "repair": "buffer0"}
    found["totaltext-deteval matlab"] = {"protocol": "totaltext-deteval", "merge": "matlab"}
    return found


def measured(options):
    values = evaluate_files(Options(str(GOLDEN / "truth"), str(GOLDEN / "results"), **options)).values
    if "mask" in values:
        return {kind: {k: round(v, 4) for k, v in values[kind].items()} for kind in ("mask", "bbox")}
    if "AP" in values:
        return {"AP": round(values["AP"], 4)}
    rows = [values, *values["variants"]]
    return [{key: round(row[key], 4) for key in KEYS} for row in rows]


@pytest.mark.parametrize("name", cases())
def test_recorded_numbers(name):
    expected = json.loads((GOLDEN / "expected.json").read_text())
    assert name in expected, "record its numbers: python tests/evaluation/test_golden.py, see CONTRIBUTING.md"
    assert measured(cases()[name]) == expected[name]


def test_ctw1500_v1():
    """Every truth counts, crossed and empty detections are skipped, and an image without truth cannot be scored."""
    paired, _ = scoring.load(str(GOLDEN / "truth"), str(GOLDEN / "results"))
    rules = PROTOCOLS["ctw1500-v1"]
    with pytest.raises(UserError, match="no truth"):
        scoring.score(paired.images, rules)
    s = scoring.score([image for image in paired.images if len(image.truths)], rules).summary
    assert (s.true_positives, s.truths, s.detections, s.skipped) == (8, 14, 15, 2)


if __name__ == "__main__":
    print(json.dumps({name: measured(options) for name, options in cases().items()}, indent=1))

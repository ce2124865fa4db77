"""The figures of docs/members.md, on photographs that are not part of the repository."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest
from members.checks import VIEW, check_detections

from i3cl.config import MemberSettings
from i3cl.data.formats.coco import read_coco
from i3cl.data.loading.images import decode_image
from i3cl.evaluation.metrics.model_score import image_of_record
from i3cl.evaluation.metrics.protocols import iou_rules
from i3cl.evaluation.scoring import best_threshold
from i3cl.members.adapting import installed
from i3cl.members.member import Place, kind_of

SHARED = Path(os.environ.get("I3CL_SHARED", Path(__file__).resolve().parents[2].parent / "shared"))


@pytest.mark.slow
@pytest.mark.timeout(5400)
@pytest.mark.parametrize(("use", "least"), [("ppocr", 0.23), ("craft", 0.57)])
def test_words_of_photographs(use, least):
    """F by word IoU 0.5 at the best threshold, and CPU seconds; I3CL_KEEP_RESULTS=FOLDER keeps the detections as COCO results."""
    root = SHARED / "realtext"
    if not root.is_dir():
        pytest.skip(f"no photographs in {root}; set I3CL_SHARED")
    kind = kind_of(use)
    missing = [package for package in kind.packages if installed(package) is None]
    if missing:
        pytest.skip(f"needs {', '.join(missing)}: {kind.install}")
    member = kind.load(MemberSettings(use=use), Place())
    images, results, seconds = [], [], 0.0
    for record in read_coco(str(root / "val.json"), str(root / "val")).records:
        image = decode_image(str(root / "val" / record.file_name))
        before = time.process_time()
        (found,) = member([image], VIEW)
        seconds += time.process_time() - before
        check_detections(found, image)
        images.append(image_of_record(record, found.polygons, found.scores))
        results += found.to_coco(record.id)
    threshold, hmean = best_threshold(images, iou_rules(0.5))
    print(f"{use}: F {hmean:.3f} at {threshold:g}, {seconds / len(images):.2f} CPU seconds an image, {len(images)} images")
    if "I3CL_KEEP_RESULTS" in os.environ:
        Path(os.environ["I3CL_KEEP_RESULTS"], f"{use}-val.json").write_text(json.dumps(results))
    assert hmean >= least

"""The ledger and the actor with everything on S3, against a local server."""

from __future__ import annotations

import json

import cv2
import numpy as np

from i3cl import storage
from i3cl.config import MemberSettings, ViewSettings
from i3cl.data.formats.predictions import read_predictions
from i3cl.data.formats.records import Dataset, ImageRecord
from i3cl.labelling.actor import Labeller, Plan
from i3cl.labelling.ledger import Ledger, part_name
from i3cl.labelling.manifest import make_manifest
from i3cl.members.ours import checkpoint_hash


def test_images_checkpoint_and_parts_on_s3(bucket, tiny_checkpoints):
    bucket = bucket.url
    for name in ("settings.yaml", "weights.safetensors"):
        data = storage.read_bytes(storage.join(tiny_checkpoints["a"], name))
        storage.write_bytes_atomic(f"{bucket}/a/{name}", data)
    assert checkpoint_hash(f"{bucket}/a") == checkpoint_hash(tiny_checkpoints["a"])
    noise = np.random.default_rng(0).integers(0, 255, (96, 96, 3), np.uint8)
    storage.write_bytes_atomic(f"{bucket}/images/x.jpg", cv2.imencode(".jpg", noise)[1].tobytes())
    records = [ImageRecord(i, name, 96, 96) for i, name in enumerate(["x.jpg", "missing.jpg", "x.jpg"])]
    manifest = make_manifest(Dataset("set", f"{bucket}/images", records))
    out = f"{bucket}/runs/x/predictions"
    ledger = Ledger(out)
    ledger.claim({"images": manifest.digest})
    ledger.claim({"images": manifest.digest})
    plan = Plan(out, f"{bucket}/images", {0: {"a": MemberSettings(weights=f"{bucket}/a")}}, (ViewSettings(),), 2, 1, 1, 1, 3)
    tasks = [(part_name(0, k), 0, k) for k in range(2)]
    # A shard that was done before the worker ended is not done again.
    Labeller(plan)(manifest.block(tasks[:1], manifest.spans(2)))
    assert ledger.finished() == {part_name(0, 0)}
    reports = Labeller(plan)(manifest.block(tasks, manifest.spans(2))).to_pylist()
    assert [(r["images"], r["errors"]) for r in reports] == [(2, 1), (1, 0)]
    ledger.finish({"images": 3}, ledger.failures())
    rows = {row["image_id"]: row["error"] for rows in read_predictions(out) for row in rows}
    assert rows.keys() == {0, 1, 2} and rows[0] is rows[2] is None and "missing.jpg" in rows[1]
    assert storage.list_files(out) == {"done.json", "errors.csv", "job.json", part_name(0, 0), part_name(0, 1)}
    assert "missing.jpg" in storage.read_text(f"{out}/errors.csv")
    assert json.loads(storage.read_text(f"{out}/done.json")) == {"images": 3}

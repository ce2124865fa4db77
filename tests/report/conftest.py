"""A made-up but plausible run to report."""

from __future__ import annotations

import numpy as np
import pytest

from i3cl.data.synthetic.plain import make_split
from i3cl.report.html import TRUTH, Curve, OutlinedPicture, ReportData, Result, WeightedPicture

NAMES = ("teacher-a", "teacher-b", "student")


def make_report(pictures: int = 4, side: int = 256) -> ReportData:
    rng = np.random.default_rng(0)
    curves, metrics = {}, {}
    for name, end in zip(NAMES, (0.72, 0.75, 0.8), strict=True):
        recall = np.linspace(0, end, 2000)
        precision = 0.97 - 0.6 * (recall / end) ** 4 + 0.004 * np.sin(recall * 90)
        place = int(np.argmax(2 * recall * precision / (recall + precision)))
        curves[name] = Curve(recall, precision, (recall[place], precision[place]))
        rows: list[dict[str, float | int]] = []
        for step in range(10, 601, 10):
            parts = {
                f"loss_{part}": size * (0.25 + np.exp(-step / 150)) * float(rng.lognormal(0, 0.2))
                for part, size in (
                    ("rpn_cls", 0.4),
                    ("rpn_box", 0.15),
                    ("cls", 0.5),
                    ("box", 0.4),
                    ("mask", 0.6),
                )
            }
            rows.append({"step": step, "loss": sum(parts.values()), **parts})
            if step % 100 == 0:
                rows.append({"step": step, "hmean": end * (1 - float(np.exp(-step / 200)))})
        metrics[name] = rows

    results = []
    for name in NAMES:
        found_recall, found_precision = curves[name].best or (0.0, 0.0)
        f = 2 * found_recall * found_precision / (found_recall + found_precision)
        results.append(
            Result(
                name,
                "student" if name == "student" else "teacher",
                found_recall,
                found_precision,
                f,
                threshold=0.52,
                hmean_without_small=f + 0.025,
                mask_ap=f - 0.3,
            )
        )
    results.insert(2, Result("pseudo labels", "pseudo", 0.583, 0.889, 0.704))
    validation, pseudo = [], []
    for item in make_split(0, pictures, seed=3, side=side):
        outlines: dict[str, list[np.ndarray]] = {TRUTH: list(item.polygons)}
        for name in NAMES:
            outlines[name] = [
                (polygon + rng.normal(0, 1.2, polygon.shape)).astype(np.float32)
                for polygon in item.polygons
                if rng.random() < 0.8
            ]
        validation.append(OutlinedPicture(" · ".join(item.texts), item.image, outlines))
    for item in make_split(100, pictures, seed=3, side=side):
        weights = [None if rng.random() < 0.2 else float(rng.uniform(0.2, 1)) for _ in item.polygons]
        pseudo.append(WeightedPicture(f"{len(weights)} labels", item.image, item.polygons, weights))
    return ReportData(
        title="quickstart: teachers, pseudo labels, student",
        facts=[
            ("Labelled pictures", "120"),
            ("Unlabelled pictures", "400"),
            ("Validation pictures", "80"),
            ("Backbone", "efficientnet_lite0"),
            ("Steps", "600"),
            ("Thresholds", "ignore 0.2, low 0.4, high 0.9"),
        ],
        results=results,
        curves=curves,
        metrics=metrics,
        validation=validation,
        pseudo_labels=pseudo,
        seconds={
            "data": 14.2,
            "teacher-a": 131.0,
            "teacher-b": 128.4,
            "label": 61.5,
            "student": 204.8,
            "report": 3.1,
        },
        settings="name: quickstart\nmodel:\n  backbone: {name: efficientnet_lite0}\n",
    )


@pytest.fixture(scope="session")
def report() -> ReportData:
    return make_report()

"""ArT and LSVT json.

Labels are `gt_N: [{points, transcription, illegibility, language}]`, submissions `res_N: [{points, confidence}]`.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from i3cl.data.formats.checks import BadItem, Faults, flag
from i3cl.evaluation.formats.sets import ImageDetections, ImageTruth, PolygonSet, ring, score_of


def is_art(content: Any) -> bool:
    """Whether a json value is an object of lists, as labels and submissions are."""
    return isinstance(content, dict) and all(isinstance(value, list) for value in content.values())


def art_truth(path: str, content: dict[str, list[Any]], faults: Faults) -> PolygonSet[ImageTruth]:
    """Don't-care are instances that are illegible or transcribed `###`."""
    images = []
    for key, entries in content.items():
        image = ImageTruth(key)
        for position, entry in enumerate(entries):
            try:
                if not isinstance(entry, dict) or "points" not in entry:
                    raise BadItem("polygon", "has no points; weak labels without places cannot be truth for detection")
                polygon, illegible = ring(entry["points"]), flag(entry, "illegibility")
            except BadItem as error:
                faults.bad(f"{path}: {key}: instance {position + 1}", error)
                continue
            text, language = (value if isinstance(value := entry.get(k), str) else None for k in ("transcription", "language"))
            image.add(polygon, illegible, text, language)
        images.append(image)
    return PolygonSet(path, "ArT/LSVT labels", images)


def art_results(path: str, content: dict[str, list[Any]], faults: Faults) -> PolygonSet[ImageDetections]:
    """A polygon without confidence has the score 1."""
    images = []
    for key, entries in content.items():
        polygons, scores = [], []
        for position, entry in enumerate(entries):
            try:
                if not isinstance(entry, dict) or "points" not in entry:
                    raise BadItem("polygon", "has no points; write points and confidence")
                polygon, score = ring(entry["points"]), score_of(entry.get("confidence", 1.0))
            except BadItem as error:
                faults.bad(f"{path}: {key}: polygon {position + 1}", error)
                continue
            polygons.append(polygon)
            scores.append(score)
        images.append(ImageDetections(key, polygons, np.array(scores, np.float64)))
    return PolygonSet(path, "ArT submission", images)

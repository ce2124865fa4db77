"""A public data set's own labels as truth, read by its importer."""

from __future__ import annotations

import numpy as np

from i3cl.data.formats.checks import MAX_SIDE, BadItem, Faults
from i3cl.data.importers.registry import read_labels
from i3cl.evaluation.formats.sets import ImageTruth, PolygonSet


def imported_truth(path: str, name: str, split: str, skip_bad: bool, faults: Faults) -> PolygonSet[ImageTruth]:
    """The labels of the data set `name` ('totaltext', 'mlt19', ...) in the folder `path`; split: 'train' or 'test'."""
    unread: list[str] = []
    images = []
    for labelled in read_labels(name, path, split, unread if skip_bad else None):
        where = f"{path}: {labelled.file_name}"
        if labelled.instances is None:
            faults.bad(where, BadItem("unlabelled", "has no labels, so it cannot be truth; label it or remove it"))
            continue
        image = ImageTruth(labelled.file_name, file_name=labelled.file_name)
        for instance in labelled.instances:
            points = np.asarray(instance.polygon, np.float64).reshape(-1, 2)
            if not (np.abs(points) <= MAX_SIDE).all():
                faults.bad(where, BadItem("coordinates", "a coordinate is not finite or beyond any image; correct it"))
                continue
            image.add(points, instance.ignore, instance.text, instance.language)
        images.append(image)
    return PolygonSet(path, f"importer {name} {split}", images, left_out=unread)

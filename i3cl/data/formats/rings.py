"""Repairing the outline of an instance: every reader of annotations and labels does it this way, and counts it."""

from __future__ import annotations

import numpy as np
import shapely
from numpy.typing import NDArray

from i3cl import geometry

Notes = list[tuple[str, str]]
"""(kind, message) of everything that was changed; kinds: 'repeated', 'crossing', 'clipped', 'parts'."""


def degenerate(polygon: NDArray[np.float32]) -> bool:
    """Whether a ring has fewer than 3 points, or no area even after a crossing is untangled."""
    if len(polygon) < 3:
        return True
    return geometry.polygon_area(polygon) <= 1e-6 and geometry.to_shapely([polygon])[0].area <= 1e-6


def untangle(polygon: NDArray[np.float32]) -> tuple[NDArray[np.float32], Notes]:
    """A simple ring without repeated points, made from a ring that is not ``degenerate``, and what was changed.

    A crossing ring of four points nearly always has two points in the wrong order, so it becomes its convex hull; a longer
    one becomes its largest part.
    """
    notes: Notes = []
    kept = (polygon != np.roll(polygon, 1, axis=0)).any(axis=1)
    if not kept.all():
        polygon = polygon[kept]
        notes.append(("repeated", f"{int((~kept).sum())} repeated points dropped"))
    if not shapely.is_valid(shapely.Polygon(polygon)):
        shape = shapely.convex_hull(shapely.MultiPoint(polygon)) if len(polygon) == 4 else geometry.to_shapely([polygon])[0]
        ring = geometry.largest_ring(shape)
        assert ring is not None, "a ring with area has a part with area"
        polygon = np.asarray(geometry.clockwise(ring), np.float32)
        notes.append(("crossing", "the ring crossed itself; untangled"))
    return polygon, notes


def repair(polygon: NDArray[np.float32], height: int, width: int) -> tuple[NDArray[np.float32] | None, Notes]:
    """A simple ring inside the image of height x width pixels, and what was changed; or None, and why nothing is left."""
    if degenerate(polygon):
        return None, [("degenerate", f"{len(polygon)} points without area")]
    polygon, notes = untangle(polygon)
    low, high = polygon.min(axis=0), polygon.max(axis=0)
    if low[0] >= 0 and low[1] >= 0 and high[0] <= width and high[1] <= height:
        return polygon, notes
    inside = geometry.clip_polygon(polygon, width, height)
    if inside is None or degenerate(inside):
        return None, [("outside", f"nothing of it is inside the image of {width} x {height}")]
    return inside, [*notes, ("clipped", f"partly outside the image of {width} x {height}; clipped to it")]

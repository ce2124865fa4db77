"""The detections of one image, checked, and their export formats."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import cv2
import numpy as np
import shapely
from numpy.typing import NDArray

from i3cl import geometry


@dataclass(frozen=True, eq=False)
class Detections:
    """Text polygons of one image in its original pixels. ValueError when the parts do not fit together."""

    polygons: list[NDArray[np.float32]]
    """N arrays (K, 2) float32 x, y, K >= 3, finite."""
    scores: NDArray[np.float32]
    """(N,) float32, 0-1."""
    height: int
    """Pixels of the image."""
    width: int
    boxes: NDArray[np.float32] = field(default_factory=lambda: np.zeros((0, 4), np.float32))
    """(N, 4) float32 x0, y0, x1, y1; the polygons' own tight boxes when left out."""
    image_id: int | None = None
    name: str | None = None
    """File name or path of the image."""

    def __post_init__(self) -> None:
        if self.height < 1 or self.width < 1:
            raise ValueError(f"an image of {self.height} x {self.width} pixels has no detections")
        polygons = [geometry.as_polygon(p) for p in self.polygons]
        scores = np.asarray(self.scores, np.float32)
        boxes = np.asarray(self.boxes, np.float32)
        if not len(boxes):
            boxes = geometry.boxes_of(polygons)
        # An empty list may come with any empty shape.
        if scores.shape != (len(polygons),) and not scores.size == len(polygons) == 0:
            raise ValueError(f"{len(polygons)} polygons but scores of shape {scores.shape}")
        if boxes.shape != (len(polygons), 4):
            raise ValueError(f"{len(polygons)} polygons but boxes of shape {boxes.shape}")
        # Written so that NaN fails too.
        if not ((scores >= 0) & (scores <= 1)).all():
            raise ValueError(f"scores {scores.min()} to {scores.max()} are not in 0-1")
        if not np.isfinite(boxes).all():
            raise ValueError("a box has a coordinate that is not finite")
        for name, value in (("polygons", polygons), ("scores", scores.reshape(-1)), ("boxes", boxes)):
            object.__setattr__(self, name, value)

    def __len__(self) -> int:
        return len(self.polygons)

    def __iter__(self) -> Iterator[tuple[NDArray[np.float32], float]]:
        """Pairs of polygon and score."""
        return zip(self.polygons, self.scores.tolist(), strict=True)

    def filter(self, score_threshold: float) -> Detections:
        """The detections with a score above the threshold."""
        keep = np.flatnonzero(self.scores > score_threshold)
        return replace(self, polygons=[self.polygons[i] for i in keep], scores=self.scores[keep], boxes=self.boxes[keep])

    def to_coco(self, image_id: int | None = None) -> list[dict[str, Any]]:
        """COCO results: image_id, category_id 1, bbox [x, y, width, height], segmentation, score.

        ValueError when an image id is given neither here nor at construction.
        """
        identity = self.image_id if image_id is None else image_id
        if identity is None:
            raise ValueError("to_coco needs an image id")
        return [
            {
                "image_id": int(identity),
                "category_id": 1,
                "bbox": [float(x0), float(y0), float(x1 - x0), float(y1 - y0)],
                "segmentation": [polygon.ravel().tolist()],
                "score": score,
            }
            for (polygon, score), (x0, y0, x1, y1) in zip(self, self.boxes.astype(np.float64), strict=True)
        ]

    def to_art(self, score_threshold: float = 0.45) -> list[dict[str, Any]]:
        """The image's list in an ArT submission: {"points": [[x, y], ...], "confidence": score}.

        Points are whole pixels, clockwise on screen, of the outline simplified with a tolerance of 0.005 x perimeter. A ring that
        has no area after rounding is left out, and one that crosses itself is replaced by its largest part: the official script
        refuses both.
        """
        result = []
        for polygon, score in self.filter(score_threshold):
            ring = _whole_ring(polygon)
            if ring is not None:
                result.append({"points": ring.tolist(), "confidence": score})
        return result

    def to_icdar_text(self, with_score: bool = False) -> str:
        """One line x1,y1,x2,y2,... per polygon, clockwise, in whole pixels; the score last when asked for."""
        lines = []
        for polygon, score in self:
            ring = _whole_ring(polygon)
            if ring is not None:
                lines.append(",".join(map(str, ring.ravel().tolist())) + (f",{score:.4f}" if with_score else ""))
        return "".join(line + "\n" for line in lines)

    def draw(
        self, image: NDArray[np.uint8], colour: tuple[int, int, int] = (0, 200, 0), scores: bool = True
    ) -> NDArray[np.uint8]:
        """A copy of the image (H, W, 3) uint8 RGB with the outlines and, unless turned off, the scores.

        ValueError when the image has another size than the one to which the detections belong.
        """
        if image.shape != (self.height, self.width, 3):
            raise ValueError(f"image of shape {image.shape} for detections of {self.height} x {self.width}")
        canvas = np.array(image, np.uint8)
        size = max(self.height, self.width) / 1000
        thickness = max(1, round(2 * size))
        for polygon, score in self:
            # The line is drawn through pixel centres, in sixteenths of a pixel.
            points = np.round((polygon - 0.5) * 16).astype(np.int32)
            cv2.polylines(canvas, [points], True, colour, thickness, cv2.LINE_AA, 4)
            if scores:
                x, y = polygon[np.argmin(polygon.sum(axis=1))]
                place = (int(np.clip(x, 0, self.width)), int(np.clip(y - 2, 8, self.height)))
                cv2.putText(
                    canvas,
                    f"{score:.2f}",
                    place,
                    cv2.FONT_HERSHEY_SIMPLEX,
                    max(0.35, 0.5 * size),
                    colour,
                    1,
                    cv2.LINE_AA,
                )
        return canvas


def _whole_ring(polygon: NDArray[np.float32]) -> NDArray[np.int64] | None:
    """The polygon as a rounded, simplified, clockwise (K, 2) int64 ring without crossings; None when no area is left."""
    ring = geometry.simplify(np.round(polygon))
    if not shapely.Polygon(ring).is_valid:
        part = geometry.largest_ring(geometry.to_shapely([ring])[0])
        if part is None:
            return None
        # Crossings are not always at whole pixels; after rounding there may be no ring left.
        ring = np.round(part)
    if not shapely.Polygon(ring).is_valid or geometry.polygon_area(ring) == 0:
        return None
    return geometry.clockwise(ring).astype(np.int64)

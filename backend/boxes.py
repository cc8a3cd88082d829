"""Boxes of detected objects, and how much two of them overlap. Pure: no I/O, no torch."""

from __future__ import annotations

from dataclasses import dataclass

Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Detection:
    """One detected object.

    Attributes:
        box_xyxy: corners in pixels of the original image, with its EXIF orientation applied.
        score: confidence in 0..1.
        label: name of a label in the labeling config; empty where the annotator has to choose one.
    """

    box_xyxy: Box
    score: float
    label: str


def iou(a: Box, b: Box) -> float:
    """Intersection over union of two xyxy boxes; 0 where both are empty."""
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    intersection = max(width, 0) * max(height, 0)
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - intersection
    return intersection / union if union > 0 else 0.0

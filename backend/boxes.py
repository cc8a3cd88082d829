"""Detected objects and their boxes. Pure: no I/O, no torch."""

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

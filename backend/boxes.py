"""Boxes: conversion, clipping, IoU and non-maximum suppression. Pure: no I/O, no torch."""

from __future__ import annotations

from collections.abc import Sequence
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


def cxcywh_to_xyxy(box_cxcywh: Sequence[float], width: float, height: float) -> Box:
    """Converts a box relative to the image (centre and size in 0..1) to pixel corners, clipped to the image."""
    cx, cy, w, h = box_cxcywh
    x1, x2 = (cx - w / 2) * width, (cx + w / 2) * width
    y1, y2 = (cy - h / 2) * height, (cy + h / 2) * height
    return clip_box(x1, y1, x2, y2, width, height)


def clip_box(x1: float, y1: float, x2: float, y2: float, width: float, height: float) -> Box:
    """Clips a box to an image of `width` x `height`; all in the same unit."""
    return min(max(x1, 0), width), min(max(y1, 0), height), min(max(x2, 0), width), min(max(y2, 0), height)


def iou(a: Box, b: Box) -> float:
    """Intersection over union of two xyxy boxes; 0 where both are empty."""
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    intersection = max(width, 0) * max(height, 0)
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - intersection
    return intersection / union if union > 0 else 0.0


def non_max_suppression(detections: Sequence[Detection], nms_iou: float) -> list[Detection]:
    """Drops each detection that overlaps a better one by more than `nms_iou`; 1 keeps all.

    Greedy and class-agnostic: one object gets one box, whatever the labels. Returns the best first.
    """
    kept: list[Detection] = []
    for detection in sorted(detections, key=lambda d: -d.score):
        if nms_iou >= 1 or all(iou(detection.box_xyxy, better.box_xyxy) <= nms_iou for better in kept):
            kept.append(detection)
    return kept

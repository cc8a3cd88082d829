"""Boxes: conversion, clipping, overlap, suppression. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Detection:
    """One box: `box_xyxy` in pixels of the original picture (EXIF orientation applied), score in 0..1, label."""

    box_xyxy: Box
    score: float
    label: str


def cxcywh_to_xyxy(box_cxcywh: Sequence[float], width: float, height: float) -> Box:
    """A box relative to the picture (centre and size in 0..1) -> corners in pixels, clipped to the picture."""
    cx, cy, w, h = box_cxcywh
    return clip((cx - w / 2) * width, (cy - h / 2) * height, (cx + w / 2) * width, (cy + h / 2) * height, width, height)


def clip(x1: float, y1: float, x2: float, y2: float, width: float, height: float) -> Box:
    """The part of a box that lies inside a picture of `width` x `height`."""
    return min(max(x1, 0), width), min(max(y1, 0), height), min(max(x2, 0), width), min(max(y2, 0), height)


def iou(a: Box, b: Box) -> float:
    """Intersection over union of two xyxy boxes; 0 where both are empty."""
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    intersection = max(width, 0) * max(height, 0)
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - intersection
    return intersection / union if union > 0 else 0.0


def non_max_suppression(detections: Sequence[Detection], nms_iou: float) -> list[Detection]:
    """Greedy non-maximum suppression, blind to labels: a thing gets one box. Best first."""
    kept: list[Detection] = []
    for detection in sorted(detections, key=lambda d: -d.score):
        if nms_iou >= 1 or all(iou(detection.box_xyxy, better.box_xyxy) <= nms_iou for better in kept):
            kept.append(detection)
    return kept

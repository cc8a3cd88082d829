"""Overlap and suppression of boxes in their plainest form, as a measure for the fast ones in Python and JavaScript."""

from collections.abc import Sequence

from backend.boxes import Box, Detection


def iou(a: Box, b: Box) -> float:
    """Intersection over union of two xyxy boxes; 0 where both are empty."""
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    intersection = max(width, 0) * max(height, 0)
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - intersection
    return intersection / union if union > 0 else 0.0


def suppress_greedily(detections: Sequence[Detection], nms_iou: float) -> list[Detection]:
    kept: list[Detection] = []
    for detection in sorted(detections, key=lambda d: -d.score):
        if nms_iou >= 1 or all(iou(detection.box_xyxy, better.box_xyxy) <= nms_iou for better in kept):
            kept.append(detection)
    return kept

"""Non-maximum suppression in its plainest form: what the fast ones, in Python and JavaScript, have to equal."""

from collections.abc import Sequence

from backend.boxes import Detection, iou


def suppress_greedily(detections: Sequence[Detection], nms_iou: float) -> list[Detection]:
    kept: list[Detection] = []
    for detection in sorted(detections, key=lambda d: -d.score):
        if nms_iou >= 1 or all(iou(detection.box_xyxy, better.box_xyxy) <= nms_iou for better in kept):
            kept.append(detection)
    return kept

"""Detections to Label Studio results. Pure: no I/O, no torch."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from backend.labelstudio.targets import View

Box = tuple[float, float, float, float]
Region = dict[str, Any]  # as Label Studio stores it


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


def best_of_overlapping(detections: Sequence[Detection], nms_iou: float) -> list[Detection]:
    """Greedy non-maximum suppression, blind to labels: a thing gets one box. Best first."""
    kept: list[Detection] = []
    for detection in sorted(detections, key=lambda d: -d.score):
        if nms_iou >= 1 or all(iou(detection.box_xyxy, better.box_xyxy) <= nms_iou for better in kept):
            kept.append(detection)
    return kept


def to_prediction(results: Sequence[Sequence[Region]], model_version: str) -> dict[str, Any]:
    """One task's prediction: all regions of its controls; its score is the mean of theirs, 0 where there are none."""
    result = [region for regions in results for region in regions]
    scores = [region["score"] for region in result]
    return {
        "result": result,
        "score": sum(scores) / len(scores) if scores else 0.0,
        "model_version": model_version,
    }


def to_regions(detections: Sequence[Detection], view: View, width: int, height: int, seed: str) -> list[Region]:
    """Detections on a picture of `width` x `height` pixels -> Label Studio regions, in percent of the picture.

    A Rectangle with Labels beside it makes two of each, which share an id. Ids are made from `seed` (task and model
    version), so that the same prediction made twice has the same ids. Boxes without area are left out: Label Studio
    cannot show them.
    """
    drawable = [d for d in detections if d.box_xyxy[2] > d.box_xyxy[0] and d.box_xyxy[3] > d.box_xyxy[1]]
    return [
        region
        for number, detection in enumerate(drawable)
        for region in _regions(detection, view, (width, height), f"{seed}/{number}")
    ]


def _regions(detection: Detection, view: View, size: tuple[int, int], seed: str) -> list[Region]:
    box, labels = _percent(detection.box_xyxy, *size), [detection.label] if detection.label else []
    page = "" if view.page is None else f"/{view.page}"
    common = {
        "id": hashlib.sha256(f"{seed}/{view.from_name}/{view.to_name}{page}".encode(errors="replace")).hexdigest()[:12],
        "to_name": view.to_name,
        "original_width": size[0],
        "original_height": size[1],
        "image_rotation": 0,
        "score": round(detection.score, 4),
        **({} if view.page is None else {"item_index": view.page}),
    }
    if not view.labels_name:
        value = {**box, "rectanglelabels": labels}
        return [{**common, "from_name": view.from_name, "type": "rectanglelabels", "value": value}]
    shape = {**common, "from_name": view.from_name, "type": "rectangle", "value": box}
    label = {**common, "from_name": view.labels_name, "type": "labels", "value": {**box, "labels": labels}}
    return [shape, label] if labels else [shape]


def _percent(box_xyxy: Box, width: int, height: int) -> dict[str, float]:
    x1, y1, x2, y2 = box_xyxy
    x, y = 100 * x1 / width, 100 * y1 / height
    return {
        "x": x,
        "y": y,
        "width": min(100 * (x2 - x1) / width, 100 - x),
        "height": min(100 * (y2 - y1) / height, 100 - y),
        "rotation": 0,
    }


def label_of(region: Mapping[str, Any]) -> str:
    """A region's label as Unicode text, empty for one that carries none: a Rectangle keeps its in a second region."""
    value = region.get("value")
    labels = (value.get("rectanglelabels") or value.get("labels")) if isinstance(value, Mapping) else None
    return str(labels[0]).encode(errors="replace").decode() if labels and isinstance(labels, list) else ""


def edges_of(region: Region) -> dict[str, float]:
    """Where a region's box is: x, y, width and height in percent of the picture."""
    return {edge: region["value"][edge] for edge in ("x", "y", "width", "height")}

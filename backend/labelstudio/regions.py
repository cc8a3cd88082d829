"""Detections -> regions and predictions in Label Studio's result format. Pure: no I/O, no torch."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

from backend.boxes import Box, Detection
from backend.labelstudio.targets import ImageTarget

Region = dict[str, Any]  # as Label Studio stores it


def make_prediction(regions_by_target: Sequence[Sequence[Region]], model_version: str) -> dict[str, Any]:
    """Makes one task's prediction from the regions of all its targets.

    Its score is the mean of the regions' scores, 0 without regions.
    """
    result = [region for regions in regions_by_target for region in regions]
    scores = [region["score"] for region in result]
    return {
        "result": result,
        "score": sum(scores) / len(scores) if scores else 0.0,
        "model_version": model_version,
    }


def make_regions(
    detections: Sequence[Detection], target: ImageTarget, width: int, height: int, seed: str
) -> list[Region]:
    """Converts the detections on one image to regions.

    A RectangleLabels control gets one region for each box. A Rectangle with Labels beside it gets two that share an id:
    the shape and its label, or the shape alone where the annotator has to choose the label. Boxes without area are left
    out: Label Studio cannot show them.

    Args:
        detections: boxes in pixels of the image.
        target: the control and image that the regions belong to.
        width: of the image, in pixels.
        height: of the image, in pixels.
        seed: task and model version. Ids are derived from it, so that repeating a prediction repeats its ids.

    Returns:
        Regions with boxes in percent of the image.
    """
    regions = []
    drawable = [d for d in detections if d.box_xyxy[2] > d.box_xyxy[0] and d.box_xyxy[3] > d.box_xyxy[1]]
    for number, detection in enumerate(drawable):
        page = "" if target.page is None else f"/{target.page}"
        key = f"{seed}/{number}/{target.from_name}/{target.to_name}{page}"
        common = {
            "id": hashlib.sha256(key.encode(errors="replace")).hexdigest()[:12],
            "to_name": target.to_name,
            "original_width": width,
            "original_height": height,
            "image_rotation": 0,
            "score": round(detection.score, 4),
            **({} if target.page is None else {"item_index": target.page}),
        }
        box, labels = _to_percent(detection.box_xyxy, width, height), [detection.label] if detection.label else []
        shape = {**common, "from_name": target.from_name}
        if not target.labels_from_name:
            regions.append({**shape, "type": "rectanglelabels", "value": {**box, "rectanglelabels": labels}})
            continue
        regions.append({**shape, "type": "rectangle", "value": box})
        if labels:
            label = {**common, "from_name": target.labels_from_name}
            regions.append({**label, "type": "labels", "value": {**box, "labels": labels}})
    return regions


def _to_percent(box_xyxy: Box, width: int, height: int) -> dict[str, float]:
    x1, y1, x2, y2 = box_xyxy
    x, y = 100 * x1 / width, 100 * y1 / height
    return {
        "x": x,
        "y": y,
        "width": min(100 * (x2 - x1) / width, 100 - x),
        "height": min(100 * (y2 - y1) / height, 100 - y),
        "rotation": 0,
    }


def read_label(region: Mapping[str, Any]) -> str:
    """Returns a region's label as valid Unicode, or an empty text if it has none.

    The shape of a Rectangle has none: its label is in a second region.
    """
    value = region.get("value")
    labels = (value.get("rectanglelabels") or value.get("labels")) if isinstance(value, Mapping) else None
    return str(labels[0]).encode(errors="replace").decode() if labels and isinstance(labels, list) else ""


def read_percent_box(region: Region) -> dict[str, float]:
    """Returns `x`, `y`, `width` and `height` of a region's box, in percent of the image."""
    return {edge: region["value"][edge] for edge in ("x", "y", "width", "height")}

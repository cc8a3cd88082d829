"""Detections to Label Studio results. Pure: no I/O, no torch."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

from backend.boxes import Box, Detection
from backend.labelstudio.targets import ImageTarget

Region = dict[str, Any]  # as Label Studio stores it


def make_prediction(results: Sequence[Sequence[Region]], model_version: str) -> dict[str, Any]:
    """One task's prediction: all regions of its controls; its score is the mean of theirs, 0 where there are none."""
    result = [region for regions in results for region in regions]
    scores = [region["score"] for region in result]
    return {
        "result": result,
        "score": sum(scores) / len(scores) if scores else 0.0,
        "model_version": model_version,
    }


def make_regions(
    detections: Sequence[Detection], view: ImageTarget, width: int, height: int, seed: str
) -> list[Region]:
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


def _regions(detection: Detection, view: ImageTarget, size: tuple[int, int], seed: str) -> list[Region]:
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


def read_label(region: Mapping[str, Any]) -> str:
    """A region's label as Unicode text, empty for one that carries none: a Rectangle keeps its in a second region."""
    value = region.get("value")
    labels = (value.get("rectanglelabels") or value.get("labels")) if isinstance(value, Mapping) else None
    return str(labels[0]).encode(errors="replace").decode() if labels and isinstance(labels, list) else ""


def read_edges(region: Region) -> dict[str, float]:
    """Where a region's box is: x, y, width and height in percent of the picture."""
    return {edge: region["value"][edge] for edge in ("x", "y", "width", "height")}

"""Queries -> detections: thresholds, boxes in pixels, non-maximum suppression; on arrays, for there may be hundreds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from backend.boxes import Detection
from backend.detection.preprocess import ModelInput
from backend.labelstudio.labeling_config import Label

ROWS_PER_BLOCK = 64  # boxes that are compared with all others at a time; their intermediate results fit into the cache

Floats = npt.NDArray[np.float64]
Indices = npt.NDArray[np.int64]


class Candidates(NamedTuple):
    """Boxes of one image at or above the threshold of their label.

    Attributes:
        boxes_xyxy: (boxes, 4), in pixels of the original.
        scores: (boxes,), in 0..1.
        labels: (boxes,), index of the label.
    """

    boxes_xyxy: Floats
    scores: Floats
    labels: Indices


def find_candidates(
    scores: Tensor, best: Tensor, boxes_cxcywh: Tensor, model_input: ModelInput, labels: Tensor, thresholds: Tensor
) -> Candidates:
    """Finds the queries of one image and one caption that pass.

    Args:
        scores: (queries,), of the best phrase.
        best: (queries,), index of the best phrase.
        boxes_cxcywh: (queries, 4), relative to the padded image.
        model_input: the image.
        labels: (phrases,), index of each phrase's label.
        thresholds: (labels,).
    """
    found = labels[best]
    passed = scores >= thresholds[found]
    boxes = boxes_cxcywh[passed].double() * torch.tensor(model_input.padded_size * 2, dtype=torch.float64)
    corners = torch.cat([boxes[:, :2] - boxes[:, 2:] / 2, boxes[:, :2] + boxes[:, 2:] / 2], -1)
    boxes_xyxy = corners.clamp(min=0).minimum(torch.tensor(model_input.size * 2))
    return Candidates(boxes_xyxy.numpy(), scores[passed].double().numpy(), found[passed].numpy())


def make_detections(candidates: Sequence[Candidates], labels: Sequence[Label], nms_iou: float) -> list[Detection]:
    """Joins what the captions found on one image.

    Args:
        candidates: of each caption.
        labels: those that are answered; the boxes of an index beyond them only suppress others.
        nms_iou: as in `non_max_suppression`.

    Returns:
        The detections, best first.
    """
    if not candidates:
        return []
    boxes_xyxy, scores, found = (np.concatenate(arrays) for arrays in zip(*candidates, strict=True))
    kept = non_max_suppression(boxes_xyxy, scores, nms_iou)
    kept = kept[found[kept] < len(labels)]
    rows = zip(boxes_xyxy[kept].tolist(), scores[kept].tolist(), found[kept].tolist(), strict=True)
    return [Detection(tuple(box), score, labels[index].name) for box, score, index in rows]


def non_max_suppression(boxes_xyxy: Floats, scores: Floats, nms_iou: float) -> Indices:
    """Drops each box that overlaps a better one by more than `nms_iou`, greedily; 1 keeps all.

    Class-agnostic: one object gets one box, whatever the labels.

    Args:
        boxes_xyxy: (boxes, 4).
        scores: (boxes,).
        nms_iou: maximum IoU of two boxes.

    Returns:
        The indices of the others, best first.
    """
    order = np.argsort(-scores, kind="stable")
    if nms_iou >= 1:
        return order
    x1, y1, x2, y2 = np.ascontiguousarray(boxes_xyxy[order].T)
    area, is_kept = (x2 - x1) * (y2 - y1), np.ones(len(order), dtype=bool)
    for start in range(0, len(order), ROWS_PER_BLOCK):
        rows = start + np.flatnonzero(is_kept[start : start + ROWS_PER_BLOCK])
        row, others = rows[:, None], slice(start, None)
        width = np.minimum(x2[row], x2[others]) - np.maximum(x1[row], x1[others])
        height = np.minimum(y2[row], y2[others]) - np.maximum(y1[row], y1[others])
        intersection = np.maximum(width, 0) * np.maximum(height, 0)
        with np.errstate(invalid="ignore"):  # two empty boxes: 0 / 0 is above no threshold
            overlaps = intersection / (area[row] + area[others] - intersection) > nms_iou
        for index, is_dropped in zip(rows, overlaps, strict=True):
            if is_kept[index]:
                is_kept[index + 1 :] &= ~is_dropped[index + 1 - start :]
    return order[is_kept]

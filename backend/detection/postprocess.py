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
    boxes, is_kept = boxes_xyxy[order], np.ones(len(order), dtype=bool)
    for start in range(0, len(order), ROWS_PER_BLOCK):
        rows = start + np.flatnonzero(is_kept[start : start + ROWS_PER_BLOCK])
        overlaps = compute_ious(boxes[rows], boxes[start:]) > nms_iou
        for index, is_dropped in zip(rows, overlaps, strict=True):
            if is_kept[index]:
                is_kept[index + 1 :] &= ~is_dropped[index + 1 - start :]
    return order[is_kept]


def compute_ious(boxes_a: Floats, boxes_b: Floats) -> Floats:
    """Returns the IoU (n, m) of each of n boxes with each of m; 0 where both are empty. Boxes are xyxy, (n, 4)."""
    a, b = np.ascontiguousarray(boxes_a.T)[:, :, None], np.ascontiguousarray(boxes_b.T)
    intersection = np.maximum(np.minimum(a[2], b[2]) - np.maximum(a[0], b[0]), 0)
    intersection *= np.maximum(np.minimum(a[3], b[3]) - np.maximum(a[1], b[1]), 0)
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - intersection
    ious: Floats = np.divide(intersection, union, out=np.zeros_like(union), where=union > 0)
    return ious

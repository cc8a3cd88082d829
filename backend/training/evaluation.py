"""Figures of detections against the truth, and the thresholds that suit it best.

Truth is what annotators left: boxes (xyxy in pixels) with their labels, one list a picture.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from backend.boxes import Box, Detection, iou

Truth = Sequence[Sequence[tuple[Box, str]]]
Predictions = Sequence[Sequence[Detection]]


@dataclass(frozen=True)
class Metrics:
    """AP at IoU 0.5 over all boxes; precision and recall at the threshold asked for. All in 0..1."""

    ap50: float
    precision: float
    recall: float
    boxes: int

    @property
    def f1(self) -> float:
        """The harmonic mean of precision and recall."""
        total = self.precision + self.recall
        return 2 * self.precision * self.recall / total if total else 0.0


def evaluate(found: Predictions, truth: Truth, threshold: float = 0.3) -> Metrics:
    """Scores detections against the true boxes of the same pictures.

    A detection is right if its label is and its IoU with a true box, not yet taken by a better one, is at least 0.5.
    AP is the area under the precision envelope, all labels pooled.
    """
    thresholds = {detection.label: threshold for f in found for detection in f}
    return EvalResult(found, truth, [thresholds] * len(found)).metrics()


@dataclass(frozen=True)
class _Rows:
    """All detections, best first: whether right, whether above the threshold, and of which picture."""

    right: Any
    kept: Any
    picture: Any
    boxes: Any  # by picture

    @property
    def pictures(self) -> int:
        return len(self.boxes)

    def figures(self, weights: Any) -> tuple[Any, Any, Any]:
        """AP50, precision and recall, each (draws,), of pictures that count `weights` (draws, pictures) times."""
        each = weights[:, self.picture]
        boxes = np.maximum(weights @ self.boxes, 1e-9)
        hits, all_found = np.cumsum(each * self.right, 1), np.cumsum(each, 1)
        precisions, recalls = hits / np.maximum(all_found, 1e-9), hits / boxes[:, None]
        envelope = np.maximum.accumulate(precisions[:, ::-1], 1)[:, ::-1]
        ap50 = (np.diff(recalls, axis=1, prepend=0) * envelope).sum(1)
        right, kept = (each * self.right * self.kept).sum(1), (each * self.kept).sum(1)
        return ap50, right / np.maximum(kept, 1e-9), right / boxes


def _rows(found: Predictions, truth: Truth, thresholds: Sequence[Mapping[str, float]]) -> _Rows:
    graded = sorted(
        (
            (detection.score, right, detection.score >= thresholds[picture].get(detection.label, 1.0), picture)
            for picture, (f, t) in enumerate(zip(found, truth, strict=True))
            for detection, right in _graded(f, t)
        ),
        key=lambda row: row[:2],
        reverse=True,
    )
    columns = np.array(graded, dtype=float).reshape(-1, 4)
    boxes = np.array([len(t) for t in truth], dtype=float)
    return _Rows(columns[:, 1], columns[:, 2], columns[:, 3].astype(int), boxes)


def _graded(found: Sequence[Detection], truth: Sequence[tuple[Box, str]]) -> list[tuple[Detection, bool]]:
    """One picture's detections, each with whether it is right."""
    free, graded = list(truth), []
    for detection in sorted(found, key=lambda d: -d.score):
        rivals = [(iou(box, detection.box_xyxy), box) for box, label in free if label == detection.label]
        best, box = max(rivals, default=(0.0, None))
        if box is not None and best >= 0.5:
            free.remove((box, detection.label))
        graded.append((detection, best >= 0.5))
    return graded


# -- thresholds -------------------------------------------------------------------------------------------------------


# -- is it better? ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class EvalResult:
    """Detections, the truth of their pictures, and the thresholds of each picture."""

    found: Predictions
    truth: Truth
    thresholds: Sequence[Mapping[str, float]]

    def rows(self) -> _Rows:
        """All detections, best first."""
        return _rows(self.found, self.truth, self.thresholds)

    def metrics(self) -> Metrics:
        """The figures over all pictures."""
        rows = self.rows()
        (ap50,), (precision,), (recall,) = rows.figures(np.ones((1, rows.pictures)))
        return Metrics(float(ap50), float(precision), float(recall), int(rows.boxes.sum()))

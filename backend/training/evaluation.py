"""Metrics of detections against the true boxes.

True boxes are those that annotators left: xyxy in pixels, each with its label, one list per image.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from backend.boxes import Detection
from backend.detection.postprocess import compute_ious
from backend.training.dataset import LabeledBox

MIN_IOU = 0.5  # of a correct detection with its true box

Predictions = Sequence[Sequence[Detection]]  # by image
Truth = Sequence[Sequence[LabeledBox]]  # by image
Thresholds = Mapping[str, float]  # by label


@dataclass(frozen=True)
class Metrics:
    """AP at IoU 0.5, labels pooled; precision and recall at a threshold; number of true boxes. All ratios in 0..1."""

    ap50: float
    precision: float
    recall: float
    boxes: int

    @property
    def f1(self) -> float:
        """The harmonic mean of precision and recall."""
        total = self.precision + self.recall
        return 2 * self.precision * self.recall / total if total else 0.0


def evaluate(predictions: Predictions, truth: Truth, threshold: float = 0.3) -> Metrics:
    """Computes the metrics of predictions, at one threshold for all labels.

    A detection is correct if a true box with its label has an IoU of at least 0.5 with it, and no better detection has
    that box. AP is the area under the precision envelope over recall, all labels pooled.
    """
    thresholds = {detection.label: threshold for detections in predictions for detection in detections}
    return EvalResult(predictions, truth, [thresholds] * len(predictions)).compute_metrics()


@dataclass(frozen=True)
class EvalResult:
    """Predictions, true boxes and thresholds, each by image."""

    predictions: Predictions
    truth: Truth
    thresholds: Sequence[Thresholds]

    def compute_metrics(self) -> Metrics:
        """Computes the metrics over all images."""
        matched = self.match_all()
        (ap50,), (precision,), (recall,) = matched.weighted_metrics(np.ones((1, len(matched.boxes_per_image))))
        return Metrics(float(ap50), float(precision), float(recall), int(matched.boxes_per_image.sum()))

    def match_all(self) -> MatchedDetections:
        """Matches all detections to the true boxes."""
        rows = sorted(
            (
                (detection.score, is_correct, detection.score >= thresholds.get(detection.label, 1.0), image)
                for image, (detections, boxes, thresholds) in enumerate(
                    zip(self.predictions, self.truth, self.thresholds, strict=True)
                )
                for detection, is_correct in match(detections, boxes)
            ),
            key=lambda row: row[:2],
            reverse=True,
        )
        columns = np.array(rows, dtype=float).reshape(-1, 4)
        boxes_per_image = np.array([len(boxes) for boxes in self.truth], dtype=float)
        return MatchedDetections(columns[:, 1], columns[:, 2], columns[:, 3].astype(int), boxes_per_image)


@dataclass(frozen=True)
class MatchedDetections:
    """The detections of all images, best first, as arrays (detections,).

    Attributes:
        is_correct: 1.0 or 0.0.
        is_kept: 1.0 at or above the threshold, else 0.0.
        image: index of the image.
        boxes_per_image: number of true boxes (images,).
    """

    is_correct: Any
    is_kept: Any
    image: Any
    boxes_per_image: Any

    def weighted_metrics(self, weights: Any) -> tuple[Any, Any, Any]:
        """Computes the metrics of several samples of the images, as a bootstrap draws them.

        Args:
            weights: (samples, images), how often each image is in the sample.

        Returns:
            AP50, precision and recall, each (samples,).
        """
        counts = weights[:, self.image]
        box_count = np.maximum(weights @ self.boxes_per_image, 1e-9)
        correct, detected = np.cumsum(counts * self.is_correct, 1), np.cumsum(counts, 1)
        precisions, recalls = correct / np.maximum(detected, 1e-9), correct / box_count[:, None]
        envelope = np.maximum.accumulate(precisions[:, ::-1], 1)[:, ::-1]
        ap50 = (np.diff(recalls, axis=1, prepend=0) * envelope).sum(1)
        kept_correct, kept = (counts * self.is_correct * self.is_kept).sum(1), (counts * self.is_kept).sum(1)
        return ap50, kept_correct / np.maximum(kept, 1e-9), kept_correct / box_count


class Match(NamedTuple):
    """A detection, and whether it is correct."""

    detection: Detection
    is_correct: bool


def match(detections: Sequence[Detection], truth: Sequence[LabeledBox]) -> list[Match]:
    """Matches the detections of one image to its true boxes greedily, best score first."""
    ordered = sorted(detections, key=lambda d: -d.score)
    if not truth:
        return [Match(detection, is_correct=False) for detection in ordered]
    found = np.array([detection.box_xyxy for detection in ordered], dtype=np.float64).reshape(-1, 4)
    overlaps = compute_ious(found, np.array([box for box, _ in truth], dtype=np.float64))
    overlaps *= np.array([[detection.label == label for _, label in truth] for detection in ordered]).reshape(
        overlaps.shape
    )
    matches = []
    for detection, row in zip(ordered, overlaps, strict=True):
        best = row.argmax()
        is_correct = bool(row[best] >= MIN_IOU)
        if is_correct:
            overlaps[:, best] = 0  # each true box is found once
        matches.append(Match(detection, is_correct))
    return matches

"""Figures of detections against the truth, and the thresholds that suit it best.

Truth is what annotators left: boxes (xyxy in pixels) with their labels, one list a picture.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from backend.labelstudio.regions import Box, Detection, iou

Truth = Sequence[Sequence[tuple[Box, str]]]
Found = Sequence[Sequence[Detection]]

PRIOR = 10  # decisions of annotators that weigh as much as the threshold that was there before
FLOOR = 0.05  # lowest score of the detections that a threshold is chosen from, and lowest threshold
DRAWS, DRAWS_AT_ONCE = 400, 20  # of the bootstrap
CERTAINTY = 0.95  # share of the draws in which a gain must be above nothing
LEAST_GAIN = 0.01  # of AP50 and F1 together that is worth another version


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


def evaluate(found: Found, truth: Truth, threshold: float = 0.3) -> Metrics:
    """Scores detections against the true boxes of the same pictures.

    A detection is right if its label is and its IoU with a true box, not yet taken by a better one, is at least 0.5.
    AP is the area under the precision envelope, all labels pooled.
    """
    thresholds = {detection.label: threshold for f in found for detection in f}
    return Judged(found, truth, [thresholds] * len(found)).metrics()


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


def _rows(found: Found, truth: Truth, thresholds: Sequence[Mapping[str, float]]) -> _Rows:
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


def calibrate(found: Found, truth: Truth, thresholds: Mapping[str, float]) -> dict[str, float]:
    """For each label the threshold of the best F1, drawn toward the present one while there is little to judge by.

    Args:
        found: detections with scores down to `FLOOR`.
        truth: of the same pictures.
        thresholds: the present ones; a label without examples keeps its own.
    """
    graded: dict[str, list[tuple[float, bool]]] = {label: [] for label in thresholds}
    boxes = dict.fromkeys(thresholds, 0)
    for f, t in zip(found, truth, strict=True):
        for detection, right in _graded(f, t):
            graded.setdefault(detection.label, []).append((detection.score, right))
        for _, label in t:
            boxes[label] = boxes.get(label, 0) + 1
    return {label: _calibrated(graded[label], boxes[label], now) for label, now in thresholds.items()}


def _calibrated(graded: Sequence[tuple[float, bool]], boxes: int, now: float) -> float:
    if not boxes:
        return now
    best = _best_threshold(sorted(graded, reverse=True), boxes, now)
    decisions = sum(score >= min(best, now) for score, _ in graded)
    return round((decisions * best + PRIOR * now) / (decisions + PRIOR), 3)


def _best_threshold(graded: Sequence[tuple[float, bool]], boxes: int, now: float) -> float:
    """Halfway between the scores that the best cut lies between; the present one where no cut is better."""
    cuts, hits = [], 0
    for kept, (score, right) in enumerate(graded, 1):
        hits += right
        below = graded[kept][0] if kept < len(graded) else FLOOR
        if below < score:
            threshold = (score + below) / 2
            cuts.append((2 * hits / (kept + boxes), -abs(threshold - now), threshold))
    kept = sum(score >= now for score, _ in graded)
    present = 2 * sum(right for score, right in graded if score >= now) / (kept + boxes)
    best = max(cuts, default=(0.0, 0.0, now))
    return max(best[2], FLOOR) if best[0] > present else now


def cross_calibrated(found: Found, truth: Truth, thresholds: Mapping[str, float]) -> list[Mapping[str, float]]:
    """For each picture the thresholds that the other half of the pictures chose: a fair judge of choosing them."""
    halves = [range(start, len(found), 2) for start in (0, 1)]
    chosen = [calibrate([found[i] for i in half], [truth[i] for i in half], thresholds) for half in halves]
    return [chosen[1 - i % 2] for i in range(len(found))]


# -- is it better? ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Judged:
    """Detections, the truth of their pictures, and the thresholds of each picture."""

    found: Found
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


def is_better(before: Judged, after: Judged) -> bool:
    """Whether AP50 and F1 rise by more than the choice of pictures explains (paired bootstrap), and neither falls."""
    count = len(before.truth)
    draws = np.random.default_rng(0).multinomial(count, np.full(count, 1 / count), DRAWS).astype(float)
    gains = _ap50_and_f1(after.rows(), draws) - _ap50_and_f1(before.rows(), draws)
    both = gains.sum(1)
    none_falls = bool((gains.mean(0) > -LEAST_GAIN).all())
    return none_falls and bool(np.quantile(both, 1 - CERTAINTY) > 0 and both.mean() >= LEAST_GAIN)


def _ap50_and_f1(rows: _Rows, draws: Any) -> Any:
    """(draws, 2), some draws at a time: each takes memory for every detection."""
    figures = []
    for start in range(0, len(draws), DRAWS_AT_ONCE):
        ap50, precision, recall = rows.figures(draws[start : start + DRAWS_AT_ONCE])
        figures.append(np.stack([ap50, 2 * precision * recall / np.maximum(precision + recall, 1e-9)], 1))
    return np.concatenate(figures)

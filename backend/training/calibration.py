"""Score thresholds that suit the truth best."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from backend.training.evaluation import Predictions, Truth, _graded

PRIOR_WEIGHT = 10  # decisions of annotators that weigh as much as the threshold that was there before


MIN_SCORE = 0.05  # lowest score of the detections that a threshold is chosen from, and lowest threshold


def calibrate(found: Predictions, truth: Truth, thresholds: Mapping[str, float]) -> dict[str, float]:
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
    return round((decisions * best + PRIOR_WEIGHT * now) / (decisions + PRIOR_WEIGHT), 3)


def _best_threshold(graded: Sequence[tuple[float, bool]], boxes: int, now: float) -> float:
    """Halfway between the scores that the best cut lies between; the present one where no cut is better."""
    cuts, hits = [], 0
    for kept, (score, right) in enumerate(graded, 1):
        hits += right
        below = graded[kept][0] if kept < len(graded) else MIN_SCORE
        if below < score:
            threshold = (score + below) / 2
            cuts.append((2 * hits / (kept + boxes), -abs(threshold - now), threshold))
    kept = sum(score >= now for score, _ in graded)
    present = 2 * sum(right for score, right in graded if score >= now) / (kept + boxes)
    best = max(cuts, default=(0.0, 0.0, now))
    return max(best[2], MIN_SCORE) if best[0] > present else now


def cross_calibrated(found: Predictions, truth: Truth, thresholds: Mapping[str, float]) -> list[Mapping[str, float]]:
    """For each picture the thresholds that the other half of the pictures chose: a fair judge of choosing them."""
    halves = [range(start, len(found), 2) for start in (0, 1)]
    chosen = [calibrate([found[i] for i in half], [truth[i] for i in half], thresholds) for half in halves]
    return [chosen[1 - i % 2] for i in range(len(found))]

"""Calibration: the score threshold of each label that agrees best with annotators."""

from __future__ import annotations

from collections.abc import Sequence

from backend.training.evaluation import Predictions, Thresholds, Truth, match

PRIOR_WEIGHT = 10  # decisions of annotators that weigh as much as the current threshold
MIN_SCORE = 0.05  # lowest threshold, and lowest score of the detections to choose one from


def calibrate(predictions: Predictions, truth: Truth, thresholds: Thresholds) -> dict[str, float]:
    """Chooses the threshold with the best F1 for each label, drawn towards the current one while there is little data.

    Args:
        predictions: by image, with scores down to `MIN_SCORE`.
        truth: of the same images.
        thresholds: the current ones.

    Returns:
        A threshold for each label of `thresholds`; a label without true boxes keeps its own.
    """
    graded: dict[str, list[tuple[float, bool]]] = {label: [] for label in thresholds}  # scores, and if correct
    box_counts = dict.fromkeys(thresholds, 0)
    for detections, boxes in zip(predictions, truth, strict=True):
        for detection, is_correct in match(detections, boxes):
            graded.setdefault(detection.label, []).append((detection.score, is_correct))
        for _, label in boxes:
            box_counts[label] = box_counts.get(label, 0) + 1
    calibrated = {}
    for label, current in thresholds.items():
        calibrated[label] = current
        if box_counts[label]:
            best = _find_best_threshold(sorted(graded[label], reverse=True), box_counts[label], current)
            decisions = sum(score >= min(best, current) for score, _ in graded[label])
            mean = (decisions * best + PRIOR_WEIGHT * current) / (decisions + PRIOR_WEIGHT)
            calibrated[label] = round(mean, 3)
    return calibrated


def _find_best_threshold(graded: Sequence[tuple[float, bool]], box_count: int, current: float) -> float:
    """Returns the threshold of the best F1, halfway between two scores; the current one if no other is better.

    Args:
        graded: scores, best first, each with whether the detection is correct.
        box_count: number of true boxes.
        current: the current threshold.
    """
    candidates, correct = [], 0  # F1, closeness to the current threshold, threshold
    for kept, (score, is_correct) in enumerate(graded, 1):
        correct += is_correct
        next_score = graded[kept][0] if kept < len(graded) else MIN_SCORE
        if next_score < score:
            threshold = (score + next_score) / 2
            candidates.append((2 * correct / (kept + box_count), -abs(threshold - current), threshold))
    kept = sum(score >= current for score, _ in graded)
    current_f1 = 2 * sum(is_correct for score, is_correct in graded if score >= current) / (kept + box_count)
    best_f1, _, best = max(candidates, default=(0.0, 0.0, current))
    return max(best, MIN_SCORE) if best_f1 > current_f1 else current


def cross_calibrate(predictions: Predictions, truth: Truth, thresholds: Thresholds) -> list[Thresholds]:
    """Returns for each image the thresholds that the other half of the images chose, to evaluate calibration fairly."""
    halves = [range(start, len(predictions), 2) for start in (0, 1)]
    chosen = [calibrate([predictions[i] for i in half], [truth[i] for i in half], thresholds) for half in halves]
    return [chosen[1 - i % 2] for i in range(len(predictions))]

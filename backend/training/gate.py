"""The gate: only a candidate that is better than the serving version beyond chance passes."""

from __future__ import annotations

from typing import Any

import numpy as np

from backend.training.evaluation import EvalResult, MatchedDetections

BOOTSTRAP_SAMPLES = 400
SAMPLES_AT_ONCE = 20  # each takes memory for every detection
CONFIDENCE = 0.95  # share of the samples in which the gain must be positive
MIN_GAIN = 0.01  # in AP50 plus F1, below which a new version is not worth it; also how far either may fall


def passes_gate(before: EvalResult, after: EvalResult) -> bool:
    """Returns whether AP50 and F1 together rise significantly (paired bootstrap over images), and neither drops.

    Args:
        before: of the serving version.
        after: of the candidate, on the same images.
    """
    count = len(before.truth)
    weights = np.random.default_rng(0).multinomial(count, np.full(count, 1 / count), BOOTSTRAP_SAMPLES).astype(float)
    gains = _compute_ap50_and_f1(after.match_all(), weights) - _compute_ap50_and_f1(before.match_all(), weights)
    total = gains.sum(1)
    neither_drops = bool((gains.mean(0) > -MIN_GAIN).all())
    return neither_drops and bool(np.quantile(total, 1 - CONFIDENCE) > 0 and total.mean() >= MIN_GAIN)


def _compute_ap50_and_f1(matched: MatchedDetections, weights: Any) -> Any:
    """Computes both for each bootstrap sample: weights (samples, images) -> (samples, 2)."""
    metrics = []
    for start in range(0, len(weights), SAMPLES_AT_ONCE):
        ap50, precision, recall = matched.weighted_metrics(weights[start : start + SAMPLES_AT_ONCE])
        metrics.append(np.stack([ap50, 2 * precision * recall / np.maximum(precision + recall, 1e-9)], 1))
    return np.concatenate(metrics)

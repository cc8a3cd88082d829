"""The gate: whether a candidate is better than what serves, by more than chance."""

from __future__ import annotations

from typing import Any

import numpy as np

from backend.training.evaluation import EvalResult, _Rows

BOOTSTRAP_SAMPLES, DRAWS_AT_ONCE = 400, 20  # of the bootstrap


CERTAINTY = 0.95  # share of the draws in which a gain must be above nothing


MIN_GAIN = 0.01  # of AP50 and F1 together that is worth another version


def passes_gate(before: EvalResult, after: EvalResult) -> bool:
    """Whether AP50 and F1 rise by more than the choice of pictures explains (paired bootstrap), and neither falls."""
    count = len(before.truth)
    draws = np.random.default_rng(0).multinomial(count, np.full(count, 1 / count), BOOTSTRAP_SAMPLES).astype(float)
    gains = _ap50_and_f1(after.rows(), draws) - _ap50_and_f1(before.rows(), draws)
    both = gains.sum(1)
    none_falls = bool((gains.mean(0) > -MIN_GAIN).all())
    return none_falls and bool(np.quantile(both, 1 - CERTAINTY) > 0 and both.mean() >= MIN_GAIN)


def _ap50_and_f1(rows: _Rows, draws: Any) -> Any:
    """(draws, 2), some draws at a time: each takes memory for every detection."""
    figures = []
    for start in range(0, len(draws), DRAWS_AT_ONCE):
        ap50, precision, recall = rows.figures(draws[start : start + DRAWS_AT_ONCE])
        figures.append(np.stack([ap50, 2 * precision * recall / np.maximum(precision + recall, 1e-9)], 1))
    return np.concatenate(figures)

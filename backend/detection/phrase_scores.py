"""Token logits -> phrase scores: the mean of the sigmoids over each phrase's token span."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def make_span_matrix(spans: Sequence[tuple[int, int]], tokens: int) -> Tensor:
    """Returns (tokens, phrases): in each column 1 / length at the tokens of a phrase, and 0 elsewhere.

    Args:
        spans: for each phrase, the half-open range [start, end) of its tokens.
        tokens: number of tokens of the logits that the matrix is for.
    """
    matrix = torch.zeros(tokens, len(spans))
    for column, (start, end) in enumerate(spans):
        matrix[start:end, column] = 1 / (end - start)
    return matrix


def phrase_scores(logits: Tensor, span_matrix: Tensor) -> Tensor:
    """Computes phrase scores (..., queries, phrases) in 0..1 from token logits (..., queries, tokens)."""
    return logits.sigmoid() @ span_matrix

"""Multi-scale deformable attention for the CPU: equal to transformers' up to the rounding of floats, and faster.

The attention output of a query is, for each head, a weighted sum of a few rows of the value table: an `embedding_bag`
with bilinear weights, which are zero outside the feature map. `locate_samples`, one compiled function, computes the
rows and the weights. `SlicedLayer` passes queries through the whole layer slice by slice, so that intermediate results
stay in the processor's cache.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

log = logging.getLogger(__name__)

QUERIES_PER_SLICE = 2048  # queries; their hidden activations (2,048 columns in float32) take 16 MB

SampleLocator = Callable[..., tuple[Tensor, Tensor]]  # the signature of `locate_samples`


class GatheredAttention(nn.Module):
    """Replaces transformers' MultiscaleDeformableAttention; takes its weights over, returns no attention maps."""

    sampling_offsets: nn.Linear
    attention_weights: nn.Linear
    value_proj: nn.Linear
    output_proj: nn.Linear

    def __init__(self, attention: Any, sample: Callable[..., Tensor]) -> None:
        super().__init__()
        self.heads, self.levels, self.points = attention.n_heads, attention.n_levels, attention.n_points
        for name in ("sampling_offsets", "attention_weights", "value_proj", "output_proj"):
            setattr(self, name, getattr(attention, name))
        self.sample = sample

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        position_embeddings: Tensor | None = None,
        reference_points: Tensor | None = None,
        spatial_shapes: Tensor | None = None,
        spatial_shapes_list: Any = None,
        level_start_index: Tensor | None = None,
        output_attentions: bool = False,
    ) -> tuple[Tensor, None]:
        """Takes the arguments of transformers' MultiscaleDeformableAttention."""
        queries = hidden_states if position_embeddings is None else hidden_states + position_embeddings
        values = self.project_values(encoder_hidden_states, attention_mask)
        return self.attend(values, queries, reference_points, spatial_shapes, level_start_index), None

    def project_values(self, features: Any, mask: Tensor | None) -> Tensor:
        """Projects features (batch, tokens, d) to values (batch, tokens, d); the mask is true inside the image."""
        values: Tensor = self.value_proj(features)
        if mask is not None and (mask.is_cuda or not mask.all()):  # `all` would wait for a GPU
            values = values.masked_fill(~mask[..., None], 0.0)
        return values

    def attend(self, values: Tensor, queries: Tensor, reference: Any, shapes: Any, starts: Any) -> Tensor:
        """Returns the attention output (batch, queries, d).

        Args:
            values: (batch, tokens, d), the levels one after the other, each row by row.
            queries: (batch, queries, d), position embeddings included.
            reference: (batch, queries, levels, 2), x and y in 0..1; or (..., 4), with width and height.
            shapes: (levels, 2), height and width of each level in tokens.
            starts: (levels,), index of the first token of each level.
        """
        by_point = (*queries.shape[:2], self.heads, self.levels, self.points)
        offsets = self.sampling_offsets(queries).view(*by_point, 2)
        logits = self.attention_weights(queries).view(*by_point[:3], -1)
        if reference.shape[-1] == 4:
            offsets = offsets / self.points * reference[:, :, None, :, None, 2:] * 0.5
            offsets = offsets * shapes.flip(-1)[:, None]
        output: Tensor = self.output_proj(self.sample(values, reference[..., :2], offsets, logits, shapes, starts))
        return output


def sample_rows(
    locate: SampleLocator,
    values: Tensor,
    reference: Tensor,
    offsets: Tensor,
    logits: Tensor,
    shapes: Tensor,
    starts: Tensor,
) -> Tensor:
    """Returns the weighted sums (batch, queries, d) of the values (batch, tokens, d) at each query's samples.

    `locate` is `locate_samples` or its compiled form; the other arguments are described there.
    """
    batch, tokens, width = values.shape
    rows, weights = locate(shapes, starts, reference, offsets, logits, tokens)
    table = values.view(-1, width // offsets.shape[2])
    sums = nn.functional.embedding_bag(rows, table, per_sample_weights=weights, mode="sum")
    return sums.view(batch, -1, width)


class SlicedLayer(nn.Module):
    """Replaces transformers' DeformableLayer with a GatheredAttention inside; for inference only."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.layer = layer

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor,
        position_embeddings: Tensor,
        reference_points: Tensor,
        spatial_shapes: Tensor,
        level_start_index: Tensor,
        spatial_shapes_list: Any = None,
        output_attentions: bool = False,
    ) -> tuple[Tensor, None]:
        """Takes the arguments of transformers' DeformableLayer."""
        attention = self.layer.self_attn
        values = attention.project_values(hidden_states, attention_mask)
        output = torch.empty_like(hidden_states)
        for start in range(0, hidden_states.shape[1], QUERIES_PER_SLICE):
            rows = slice(start, start + QUERIES_PER_SLICE)
            tokens, reference = hidden_states[:, rows], reference_points[:, rows]
            queries = tokens + position_embeddings[:, rows]
            attended = attention.attend(values, queries, reference, spatial_shapes, level_start_index)
            output[:, rows] = self._feed_forward(tokens + attended)
        return output, None

    def _feed_forward(self, tokens: Tensor) -> Tensor:
        """Runs the feed-forward network; a method of its own, so that its tensors are freed after each slice."""
        normed = self.layer.self_attn_layer_norm(tokens)
        hidden = self.layer.activation_fn(self.layer.fc1(normed))
        output: Tensor = self.layer.final_layer_norm(normed + self.layer.fc2(hidden))
        return output


def locate_samples(
    shapes: Tensor, starts: Tensor, reference: Tensor, offsets: Tensor, logits: Tensor, tokens: int
) -> tuple[Tensor, Tensor]:
    """Returns rows of the value table and their weights: (batch x queries x heads, levels x points x 4) each.

    The four neighbours of each sampling point get the weights of bilinear `grid_sample` with zero padding and
    `align_corners=False`, times the attention of the point.

    Args:
        shapes: (levels, 2), height and width of each level in tokens.
        starts: (levels,), index of the first token of each level.
        reference: (batch, queries, levels, 2), x and y in 0..1.
        offsets: (batch, queries, heads, levels, points, 2), x and y in tokens of the level.
        logits: (batch, queries, heads, levels x points), attention before its softmax.
        tokens: number of tokens of one image, all levels together.
    """
    batch, _, heads, _, _, _ = offsets.shape
    height, width = shapes[:, 0, None], shapes[:, 1, None]  # (levels, 1), against (levels, points)
    x = reference[:, :, None, :, None, 0] * width + offsets[..., 0] - 0.5
    y = reference[:, :, None, :, None, 1] * height + offsets[..., 1] - 0.5
    left, top = x.floor(), y.floor()
    right_share, bottom_share = x - left, y - top
    columns = torch.stack([left, left + 1, left, left + 1], -1)
    lines = torch.stack([top, top, top + 1, top + 1], -1)
    across = torch.stack([1 - right_share, right_share, 1 - right_share, right_share], -1)
    down = torch.stack([1 - bottom_share, 1 - bottom_share, bottom_share, bottom_share], -1)
    inside = (columns >= 0) & (columns < width[..., None]) & (lines >= 0) & (lines < height[..., None])
    attention = logits.softmax(-1).view(x.shape)
    weights = attention[..., None] * across * down * inside
    columns = torch.minimum(columns.clamp(min=0), width[..., None] - 1).int()
    lines = torch.minimum(lines.clamp(min=0), height[..., None] - 1).int()
    token = starts[:, None, None].int() + lines * width[..., None].int() + columns
    image_start = torch.arange(batch, device=token.device, dtype=torch.int32).view(-1, 1, 1, 1, 1, 1) * tokens
    head = torch.arange(heads, device=token.device, dtype=torch.int32).view(1, 1, -1, 1, 1, 1)
    rows = (image_start + token) * heads + head
    return rows.flatten(3).flatten(0, 2), weights.flatten(3).flatten(0, 2)


def compile_locate_samples() -> SampleLocator:
    """Returns `locate_samples` compiled for all sizes; uncompiled, with a warning, if there is no working compiler."""
    compiled = torch.compile(locate_samples, dynamic=True)
    try:
        for height, width in ((3, 4), (5, 7)):  # two sizes: the compiler would take the first for a constant
            for batch in (1, 2):
                compiled(*_example(height, width, batch))
    except Exception as error:  # a missing or broken compiler raises many kinds
        log.warning("torch.compile is unavailable (%s): predictions are about 10%% slower", type(error).__name__)
        return locate_samples
    return compiled


def _example(height: int, width: int, batch: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, int]:
    """Makes random arguments for `locate_samples`: two levels of equal size, 8 heads, 4 points."""
    shapes = torch.tensor([[height, width], [height, width]])
    starts, queries = torch.tensor([0, height * width]), height * width
    offsets = torch.rand(batch, queries, 8, 2, 4, 2)
    reference, logits = torch.rand(batch, queries, 2, 2), torch.rand(batch, queries, 8, 8)
    return shapes, starts, reference, offsets, logits, 2 * height * width

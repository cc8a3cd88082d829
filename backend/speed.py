"""The same numbers, sooner, on the CPU: parts of the model rewritten for inference, equal up to the rounding of floats.

`FoldedFusion`: the fusion layers join N picture tokens (thousands) with T text tokens (tens) in 1,024 columns. Matrix
products associate, so the weights are multiplied onto the text instead, and a picture token meets heads x T columns.

`GatheredAttention`: multi-scale deformable attention is a weighted sum of a few rows of the value map for each query
and head: an `embedding_bag`, with bilinear weights and a zero weight for what lies outside. The weights are compiled.

`PackedLinear`: weights laid out once as oneDNN wants them, with the activation fused in.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

log = logging.getLogger(__name__)

LARGE = 20_000_000  # parameters; on a smaller model the rewritten parts cost more than they save


def is_worth_it(model: Any) -> bool:
    """Whether `speed_up` makes this model faster."""
    return bool(sum(weight.numel() for weight in model.parameters()) >= LARGE)


def speed_up(model: Any) -> None:
    """Replaces what can be replaced in a Grounding DINO of either class, in place; for inference on the CPU only."""
    plan = compiled_gather_plan()
    for layer in model.model.encoder.layers:
        layer.fusion_layer.attn = FoldedFusion(layer.fusion_layer.attn)
        layer.deformable_layer.self_attn.attn = GatheredAttention(plan)
    for layer in model.model.decoder.layers:
        layer.encoder_attn.attn = GatheredAttention(plan)
    if torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        for part in (model.model.backbone, model.model.encoder, model.model.decoder):
            _pack_linears(part)


def _pack_linears(part: nn.Module) -> None:
    for module in list(part.modules()):
        if isinstance(module, FoldedFusion):
            continue
        activation = _fused_activation(module)
        for name, child in list(module.named_children()):
            if type(child) is nn.Linear:
                setattr(module, name, PackedLinear(child, activation if name == "fc1" else "none"))
        if activation != "none":
            module.activation_fn = nn.Identity()


def _fused_activation(module: nn.Module) -> str:
    """What oneDNN calls the activation behind a module's `fc1`; "none" where there is none that it knows."""
    if type(getattr(module, "fc1", None)) is not nn.Linear:
        return "none"
    name = type(getattr(module, "activation_fn", None)).__name__.lower()
    return name.removesuffix("activation") if name in ("relu", "gelu", "geluactivation") else "none"


class FoldedFusion(nn.Module):
    """Stands in for transformers' BiMultiHeadAttention; takes over its weights and returns no attention maps."""

    vision_proj: nn.Linear
    text_proj: nn.Linear
    values_vision_proj: nn.Linear
    values_text_proj: nn.Linear
    out_vision_proj: nn.Linear
    out_text_proj: nn.Linear

    def __init__(self, attention: Any) -> None:
        super().__init__()
        self.heads, self.width, self.scale = attention.num_heads, attention.head_dim, attention.scale
        for name in ("vision", "text", "values_vision", "values_text", "out_vision", "out_text"):
            setattr(self, f"{name}_proj", getattr(attention, f"{name}_proj"))

    def forward(
        self,
        vision_features: Tensor,
        text_features: Tensor,
        vision_attention_mask: Tensor | None = None,
        text_attention_mask: Tensor | None = None,
    ) -> tuple[tuple[Tensor, None], tuple[Tensor, None]]:
        """Fused features of the picture (batch, N, d) and of the text (batch, T, d); masks are true at padding."""
        keys = self._heads(self.text_proj(text_features))
        by_head = self.vision_proj.weight.view(self.heads, self.width, -1)
        folded = torch.einsum("bthe,hed->bhtd", keys, by_head) * self.scale
        offset = torch.einsum("bthe,he->bht", keys, self.vision_proj.bias.view(self.heads, self.width)) * self.scale
        scores = torch.baddbmm(offset.flatten(1)[:, :, None], folded.flatten(1, 2), vision_features.transpose(1, 2))
        scores = scores.view(len(scores), self.heads, -1, scores.shape[-1])  # batch, heads, T, N
        vision = self._to_vision(scores, text_features, text_attention_mask)
        return (vision, None), (self._to_text(scores, vision_features, vision_attention_mask), None)

    def _heads(self, tensor: Tensor) -> Tensor:
        return tensor.view(*tensor.shape[:-1], self.heads, self.width)

    def _to_vision(self, scores: Tensor, text_features: Tensor, padding: Tensor | None) -> Tensor:
        if padding is not None:
            scores = scores.masked_fill(padding[:, None, :, None], float("-inf"))
        values = self._heads(self.values_text_proj(text_features))
        by_head = self.out_vision_proj.weight.view(-1, self.heads, self.width)
        folded = torch.einsum("bthe,dhe->bhtd", values, by_head).flatten(1, 2)
        weights = scores.softmax(2).flatten(1, 2).transpose(1, 2)  # batch, N, heads x T
        return torch.baddbmm(self.out_vision_proj.bias, weights, folded)

    def _to_text(self, scores: Tensor, vision_features: Tensor, padding: Tensor | None) -> Tensor:
        if padding is not None:
            scores = scores.masked_fill(padding[:, None, None, :], float("-inf"))
        seen = torch.bmm(scores.softmax(-1).flatten(1, 2), vision_features).view(*scores.shape[:3], -1)
        by_head = self.values_vision_proj.weight.view(self.heads, self.width, -1)
        values = torch.einsum("bhtd,hed->bthe", seen, by_head).flatten(2) + self.values_vision_proj.bias
        fused: Tensor = self.out_text_proj(values)
        return fused


class GatheredAttention(nn.Module):
    """Stands in for transformers' MultiScaleDeformableAttention; no weights of its own."""

    def __init__(self, plan: Callable[..., tuple[Tensor, Tensor]]) -> None:
        super().__init__()
        self.plan = plan

    def forward(
        self,
        value: Tensor,
        value_spatial_shapes: Tensor,
        value_spatial_shapes_list: list[tuple[int, int]],
        level_start_index: Tensor,
        sampling_locations: Tensor,
        attention_weights: Tensor,
        im2col_step: int,
    ) -> Tensor:
        """Sampled values (batch, queries, heads x width).

        Args:
            value: (batch, tokens, heads, width), levels one after the other, row by row.
            value_spatial_shapes: (levels, 2), height and width.
            value_spatial_shapes_list: the same as numbers; not needed.
            level_start_index: (levels,), first token of each level.
            sampling_locations: (batch, queries, heads, levels, points, 2), x and y in 0..1 of the level.
            attention_weights: (batch, queries, heads, levels, points).
            im2col_step: of the CUDA operator; not needed.
        """
        batch, tokens, heads, width = value.shape
        rows, weights = self.plan(
            value_spatial_shapes, level_start_index, sampling_locations, attention_weights, tokens
        )
        table = value.reshape(-1, width)
        bags = nn.functional.embedding_bag(rows, table, per_sample_weights=weights, mode="sum")
        return bags.view(batch, -1, heads * width)


def gather_plan(
    shapes: Tensor, starts: Tensor, locations: Tensor, attention: Tensor, tokens: int
) -> tuple[Tensor, Tensor]:
    """Rows of the value table and their weights: (batch x queries x heads, levels x points x 4) each.

    Four neighbours of each sampled place, as bilinear `grid_sample` with zero padding has them (`align_corners=False`).
    """
    batch, _, heads, _, _, _ = locations.shape
    height, width = shapes[:, 0, None], shapes[:, 1, None]  # (levels, 1), against (levels, points)
    x = locations[..., 0] * width - 0.5
    y = locations[..., 1] * height - 0.5
    left, top = x.floor(), y.floor()
    right_share, bottom_share = x - left, y - top
    columns = torch.stack([left, left + 1, left, left + 1], -1)
    lines = torch.stack([top, top, top + 1, top + 1], -1)
    across = torch.stack([1 - right_share, right_share, 1 - right_share, right_share], -1)
    down = torch.stack([1 - bottom_share, 1 - bottom_share, bottom_share, bottom_share], -1)
    inside = (columns >= 0) & (columns < width[..., None]) & (lines >= 0) & (lines < height[..., None])
    weights = attention[..., None] * across * down * inside
    columns = torch.minimum(columns.clamp(min=0), width[..., None] - 1).int()
    lines = torch.minimum(lines.clamp(min=0), height[..., None] - 1).int()
    token = starts[:, None, None].int() + lines * width[..., None].int() + columns
    first = torch.arange(batch, device=token.device, dtype=torch.int32).view(-1, 1, 1, 1, 1, 1) * tokens
    head = torch.arange(heads, device=token.device, dtype=torch.int32).view(1, 1, -1, 1, 1, 1)
    rows = (first + token) * heads + head
    return rows.flatten(3).flatten(0, 2), weights.flatten(3).flatten(0, 2)


def compiled_gather_plan() -> Callable[..., tuple[Tensor, Tensor]]:
    """`gather_plan`, compiled for any size; itself, with a line in the log, where there is no working compiler."""
    compiled = torch.compile(gather_plan, dynamic=True)
    try:
        for height, width in ((3, 4), (5, 7)):  # two sizes, or the first would be taken for the only one
            for batch in (1, 2):
                compiled(*_example(height, width, batch))
    except Exception as error:  # whatever a compiler that is missing or broken leads to
        log.warning("no compiler that works (%s): predictions take about a tenth longer", type(error).__name__)
        return gather_plan
    return compiled


def _example(height: int, width: int, batch: int) -> tuple[Tensor, Tensor, Tensor, Tensor, int]:
    shapes = torch.tensor([[height, width], [height, width]])
    starts, queries = torch.tensor([0, height * width]), height * width
    locations = torch.rand(batch, queries, 8, 2, 4, 2)
    return shapes, starts, locations, torch.rand(batch, queries, 8, 2, 4), 2 * height * width


class PackedLinear(nn.Module):
    """A linear layer whose weights lie as oneDNN wants them, with an activation fused in; float32, inference."""

    def __init__(self, linear: nn.Linear, activation: str = "none") -> None:
        super().__init__()
        self.activation = activation
        self.bias = linear.bias
        self.packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight.data, None)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        packed: Tensor = torch.ops.mkldnn._linear_pointwise(
            hidden_states, self.packed, self.bias, self.activation, [], "none"
        )
        return packed

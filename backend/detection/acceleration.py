"""The same numbers, sooner: parts of the model rewritten for inference, equal up to the rounding of floats.

`FoldedFusion`: the fusion layers join N picture tokens (thousands) with T text tokens (tens) in 1,024 columns. Matrix
products associate, so the weights are multiplied onto the text instead, and a picture token meets heads x T columns.

`GatheredAttention` (deformable.py): multi-scale deformable attention as a look-up of a few rows for each query.

On the CPU `PackedLinear`, weights laid out once as oneDNN wants them with the activation fused in; on a GPU
`FullPrecision`, which keeps what half precision would blur out of it.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import sys
from collections.abc import Callable
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from backend.detection.deformable_attention import GatheredAttention, SlicedLayer, compile_gather_plan, sample_rows

log = logging.getLogger(__name__)

LARGE = 20_000_000  # parameters; on a smaller model the parts rewritten for the CPU cost more than they save

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of glibc's malloc.h


def accelerate(model: Any) -> None:
    """Replaces what is worth it in a Grounding DINO of either class, in place, for inference where it now lies."""
    if model.device.type == "cuda":
        accelerate_on_gpu(model)
    elif model.device.type == "cpu" and sum(weight.numel() for weight in model.parameters()) >= LARGE:
        accelerate_on_cpu(model)


def accelerate_on_cpu(model: Any) -> None:
    """Exact up to the rounding of float32."""
    _replace_attention(model, functools.partial(sample_rows, compile_gather_plan()))
    for layer in model.model.encoder.layers:
        layer.deformable_layer = SlicedLayer(layer.deformable_layer)
    if torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        for part in (model.model.backbone, model.model.encoder, model.model.decoder):
            _pack_linears(part)


def accelerate_on_gpu(model: Any) -> None:
    """Exact up to the rounding of the precision that autocast gives; boxes, scores and fusion stay in float32."""
    _replace_attention(model, _gpu_sample(model.device))
    for layer in model.model.encoder.layers:
        layer.fusion_layer.attn = FullPrecision(layer.fusion_layer.attn)
    for heads in (model.bbox_embed, model.class_embed, model.model.decoder.bbox_embed):
        for i, head in enumerate(heads):
            heads[i] = FullPrecision(head)
    model.model.encoder_output_bbox_embed = FullPrecision(model.model.encoder_output_bbox_embed)
    model.model.encoder_output_class_embed = FullPrecision(model.model.encoder_output_class_embed)


def _gpu_sample(device: torch.device) -> Callable[..., Tensor] | None:
    """Our kernel; None, with a line in the log, where Triton is missing or cannot build it."""
    try:
        from backend.detection.deformable_attention_triton import sample

        shapes, starts = torch.tensor([[2, 2]], device=device), torch.tensor([0], device=device)
        numbers = {
            "values": (1, 4, 16),
            "reference": (1, 4, 1, 2),
            "offsets": (1, 4, 1, 1, 4, 2),
            "logits": (1, 4, 1, 4),
        }
        arguments = {name: torch.rand(size, device=device) for name, size in numbers.items()}
        sample(**arguments, shapes=shapes, starts=starts)
    except Exception as error:  # whatever a compiler that is missing or broken leads to
        log.warning("no Triton that works (%s): deformable attention runs slower", type(error).__name__)
        return None
    return sample


def _replace_attention(model: Any, sample: Callable[..., Tensor] | None) -> None:
    for layer in model.model.encoder.layers:
        layer.fusion_layer.attn = FoldedFusion(layer.fusion_layer.attn)
        if sample:
            layer.deformable_layer.self_attn = GatheredAttention(layer.deformable_layer.self_attn, sample)
    for layer in model.model.decoder.layers:
        layer.self_attn = FusedAttention(layer.self_attn)
        layer.encoder_attn_text = FusedAttention(layer.encoder_attn_text)
        if sample:
            layer.encoder_attn = GatheredAttention(layer.encoder_attn, sample)


def keep_freed_memory(keep: bool = True) -> None:
    """Whether glibc keeps the memory of large tensors for the next ones; does nothing where there is no glibc.

    Handed back, it comes again as pages that the kernel has to clear: a third of a forward pass.
    """
    if sys.platform == "linux" and hasattr(ctypes.CDLL(None), "mallopt"):
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_MAX, 0 if keep else 65_536)
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1 if keep else 131_072)


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
        if _matters(padding):
            scores = scores.masked_fill(padding[:, None, :, None], float("-inf"))
        values = self._heads(self.values_text_proj(text_features))
        by_head = self.out_vision_proj.weight.view(-1, self.heads, self.width)
        folded = torch.einsum("bthe,dhe->bhtd", values, by_head).flatten(1, 2)
        weights = scores.softmax(2).flatten(1, 2).transpose(1, 2)  # batch, N, heads x T
        return torch.baddbmm(self.out_vision_proj.bias, weights, folded)

    def _to_text(self, scores: Tensor, vision_features: Tensor, padding: Tensor | None) -> Tensor:
        if _matters(padding):
            scores = scores.masked_fill(padding[:, None, None, :], float("-inf"))
        seen = torch.bmm(scores.softmax(-1).flatten(1, 2), vision_features).view(*scores.shape[:3], -1)
        by_head = self.values_vision_proj.weight.view(self.heads, self.width, -1)
        values = torch.einsum("bhtd,hed->bthe", seen, by_head).flatten(2) + self.values_vision_proj.bias
        fused: Tensor = self.out_text_proj(values)
        return fused


def _matters(padding: Tensor | None) -> TypeGuard[Tensor]:
    """Whether anything is padded; to ask a GPU would be to wait for it."""
    return padding is not None and (padding.is_cuda or bool(padding.any()))


class FusedAttention(nn.Module):
    """Stands in for transformers' MultiheadAttention, in one kernel; returns no attention maps."""

    query: nn.Linear
    key: nn.Linear
    value: nn.Linear
    out_proj: nn.Linear

    def __init__(self, attention: Any) -> None:
        super().__init__()
        self.heads = attention.num_attention_heads
        for name in ("query", "key", "value", "out_proj"):
            setattr(self, name, getattr(attention, name))

    def forward(
        self,
        queries: Tensor,
        keys: Tensor,
        values: Tensor,
        attention_mask: Tensor | None = None,
        output_attentions: bool = False,
    ) -> tuple[Tensor, None]:
        """Queries (batch, Q, d), keys and values (batch, K, d), a mask to be added to the scores -> (batch, Q, d)."""
        query, key, value = map(self._by_head, (self.query(queries), self.key(keys), self.value(values)))
        seen = nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=attention_mask)
        fused: Tensor = self.out_proj(seen.transpose(1, 2).flatten(2))
        return fused, None

    def _by_head(self, tensor: Tensor) -> Tensor:
        return tensor.view(*tensor.shape[:2], self.heads, -1).transpose(1, 2)


class FullPrecision(nn.Module):
    """Runs a part in float32 where autocast would not."""

    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.part = part

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the part."""
        with torch.autocast(next(iter((*args, *kwargs.values()))).device.type, enabled=False):
            return self.part(*map(_full, args), **{name: _full(value) for name, value in kwargs.items()})


def _full(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.is_floating_point() else value


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

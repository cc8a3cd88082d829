"""Faster replacements for modules of the model, for inference; results are equal up to the rounding of floats.

- `FoldedFusion`: the fusion layers attend between N image tokens (thousands) and T text tokens (tens) in 1,024 columns.
  Matrix products associate, so the weights are multiplied with the text instead, and each image token meets only
  heads x T columns.
- `GatheredAttention` (in `deformable_attention`): multi-scale deformable attention as a lookup of a few rows per query.
- `FusedAttention`: the decoder's other attention, in one kernel.
- `PackedLinear` (CPU): weights in oneDNN's own layout, with the activation fused in.
- `FullPrecision` (GPU): float32 for modules that half precision would make inaccurate.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import sys
from collections.abc import Callable, Mapping
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from backend.detection.deformable_attention import GatheredAttention, SlicedLayer, compile_locate_samples, sample_rows

log = logging.getLogger(__name__)

MIN_PARAMETERS_ON_CPU = 20_000_000  # of a model that is not small

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # options of mallopt, from glibc's malloc.h


def accelerate(model: Any, precision: torch.dtype) -> torch.dtype:
    """Replaces modules of a Grounding DINO of either class, in place, for inference on the device where it lies.

    Returns:
        The precision for autocast; float32 where none is needed. On a CPU bfloat16 is that of a few modules.
    """
    if model.device.type == "cuda":
        accelerate_on_gpu(model)
    elif model.device.type == "cpu":
        if precision is torch.bfloat16 or not is_small(model):
            accelerate_on_cpu(model, precision)
        if precision is torch.bfloat16:
            return torch.float32
    return precision


def is_small(model: Any) -> bool:
    """Returns True if the replacements for a CPU, or several threads, cost more time than they save."""
    return bool(sum(weight.numel() for weight in model.parameters()) < MIN_PARAMETERS_ON_CPU)


def accelerate_on_cpu(model: Any, precision: torch.dtype = torch.float32) -> None:
    """Replaces modules for inference on a CPU; in float32 they are exact up to its rounding.

    In bfloat16 are, if it is the precision, the two parts that take most of the time and tolerate it: the linear layers
    of the image backbone, and the feed-forward network of the encoder.
    """
    _replace_attention(model, functools.partial(sample_rows, compile_locate_samples()))
    for layer in model.model.encoder.layers:
        layer.deformable_layer = SlicedLayer(layer.deformable_layer)
    if torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        _pack_linears(model.model.backbone, precision)
        for layer in model.model.encoder.layers:
            _pack_feed_forward(layer.deformable_layer.layer, precision)
        for module in (model.model.encoder, model.model.decoder):
            _pack_linears(module)
        model.model.enc_output = PackedLinear(model.model.enc_output)


def accelerate_on_gpu(model: Any) -> None:
    """Replaces modules for inference on a GPU; boxes and fusion stay in float32 under autocast."""
    _replace_attention(model, _load_triton_kernel(model.device))
    for layer in model.model.encoder.layers:
        layer.fusion_layer.attn = FullPrecision(layer.fusion_layer.attn)
    for heads in (model.bbox_embed, model.model.decoder.bbox_embed):
        for i, head in enumerate(heads):
            heads[i] = FullPrecision(head)
    model.model.encoder_output_bbox_embed = FullPrecision(model.model.encoder_output_bbox_embed)


def reduce_weights(model: nn.Module, precision: torch.dtype) -> dict[str, Tensor]:
    """Converts the weights that autocast would convert in every pass: of linear layers and convolutions.

    Returns:
        The weights in float32 by name, on the CPU, for `restore_weights`; empty if the precision is float32.
    """
    if precision is torch.float32:
        return {}
    kept = {part for module in model.modules() if isinstance(module, FullPrecision) for part in module.modules()}
    weights: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        if type(module) in (nn.Linear, nn.Conv2d) and module not in kept:
            for parameter_name, parameter in module.named_parameters(name):
                weights[parameter_name] = parameter.data.cpu()
                parameter.data = parameter.data.to(precision)
    return weights


def restore_weights(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Undoes `reduce_weights`."""
    for name, weight in weights.items():
        parameter = model.get_parameter(name)
        parameter.data = weight.to(parameter.device)


def _load_triton_kernel(device: torch.device) -> Callable[..., Tensor] | None:
    """Returns our kernel after a trial run; None, with a warning, if Triton is missing or cannot compile it."""
    try:
        from backend.detection.deformable_attention_triton import sample

        sample(
            values=torch.rand(1, 4, 16, device=device),
            reference=torch.rand(1, 4, 1, 2, device=device),
            offsets=torch.rand(1, 4, 1, 1, 4, 2, device=device),
            logits=torch.rand(1, 4, 1, 4, device=device),
            shapes=torch.tensor([[2, 2]], device=device),
            starts=torch.tensor([0], device=device),
        )
    except Exception as error:  # a missing or broken compiler raises many kinds
        log.warning("Triton is unavailable (%s): deformable attention runs slower", type(error).__name__)
        return None
    return sample


def _replace_attention(model: Any, sample: Callable[..., Tensor] | None) -> None:
    """Replaces the attention of fusion and decoder; deformable attention too, unless `sample` is None."""
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
    """Makes glibc keep the memory of freed tensors for later ones, or give it back; has no effect without glibc.

    Memory that was given back returns as pages that the kernel has to clear, which takes a third of a forward pass.
    """
    if sys.platform == "linux" and hasattr(ctypes.CDLL(None), "mallopt"):
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_MAX, 0 if keep else 65_536)
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1 if keep else 131_072)


def _pack_linears(root: nn.Module, precision: torch.dtype = torch.float32) -> None:
    """Replaces the linear layers below a module, those of FoldedFusion excepted: it uses their weights directly."""
    for module in list(root.modules()):
        if isinstance(module, FoldedFusion):
            continue
        _pack_feed_forward(module, precision)
        for name, child in list(module.named_children()):
            if type(child) is nn.Linear:
                setattr(module, name, PackedLinear(child, precision=precision))


def _pack_feed_forward(module: nn.Module, precision: torch.dtype) -> None:
    """Replaces `fc1` and `fc2` of a module, with the activation between them fused in; others stay."""
    activation = _find_fused_activation(module)
    if activation == "none":
        return
    # What lies between the two stays in the reduced precision.
    module.fc1 = PackedLinear(module.fc1, activation, precision, output=precision)
    module.fc2 = PackedLinear(module.fc2, precision=precision)
    module.activation_fn = nn.Identity()


def _find_fused_activation(module: nn.Module) -> str:
    """Returns oneDNN's name for the activation after a module's `fc1`; "none" if it does not support that one."""
    if type(getattr(module, "fc1", None)) is not nn.Linear:
        return "none"
    name = type(getattr(module, "activation_fn", None)).__name__.lower()
    return name.removesuffix("activation") if name in ("relu", "gelu", "geluactivation") else "none"


class FoldedFusion(nn.Module):
    """Replaces transformers' BiMultiHeadAttention; takes its weights over, returns no attention maps."""

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
        """Returns fused features of image (batch, N, d) and text (batch, T, d); the masks are true at padding."""
        keys = self._split_heads(self.text_proj(text_features))
        by_head = self.vision_proj.weight.view(self.heads, self.width, -1)
        folded = torch.einsum("bthe,hed->bhtd", keys, by_head) * self.scale
        offset = torch.einsum("bthe,he->bht", keys, self.vision_proj.bias.view(self.heads, self.width)) * self.scale
        scores = torch.baddbmm(offset.flatten(1)[:, :, None], folded.flatten(1, 2), vision_features.transpose(1, 2))
        scores = scores.view(len(scores), self.heads, -1, scores.shape[-1])  # batch, heads, T, N
        vision = self._to_vision(scores, text_features, text_attention_mask)
        return (vision, None), (self._to_text(scores, vision_features, vision_attention_mask), None)

    def _split_heads(self, tensor: Tensor) -> Tensor:
        return tensor.view(*tensor.shape[:-1], self.heads, self.width)

    def _to_vision(self, scores: Tensor, text_features: Tensor, padding: Tensor | None) -> Tensor:
        if _is_padded(padding):
            scores = scores.masked_fill(padding[:, None, :, None], float("-inf"))
        values = self._split_heads(self.values_text_proj(text_features))
        by_head = self.out_vision_proj.weight.view(-1, self.heads, self.width)
        folded = torch.einsum("bthe,dhe->bhtd", values, by_head).flatten(1, 2)
        weights = scores.softmax(2).flatten(1, 2).transpose(1, 2)  # batch, N, heads x T
        return torch.baddbmm(self.out_vision_proj.bias, weights, folded)

    def _to_text(self, scores: Tensor, vision_features: Tensor, padding: Tensor | None) -> Tensor:
        if _is_padded(padding):
            scores = scores.masked_fill(padding[:, None, None, :], float("-inf"))
        attended = torch.bmm(scores.softmax(-1).flatten(1, 2), vision_features).view(*scores.shape[:3], -1)
        by_head = self.values_vision_proj.weight.view(self.heads, self.width, -1)
        values = torch.einsum("bhtd,hed->bthe", attended, by_head).flatten(2) + self.values_vision_proj.bias
        fused: Tensor = self.out_text_proj(values)
        return fused


def _is_padded(padding: Tensor | None) -> TypeGuard[Tensor]:
    """Returns True if anything is padded, and for any mask on a GPU: reading it would wait for the GPU."""
    return padding is not None and (padding.is_cuda or bool(padding.any()))


class FusedAttention(nn.Module):
    """Replaces transformers' MultiheadAttention with one kernel; takes its weights over, returns no attention maps."""

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
        """Returns the attention output (batch, Q, d).

        Args:
            queries: (batch, Q, d).
            keys: (batch, K, d).
            values: (batch, K, d).
            attention_mask: added to the scores; it broadcasts to (batch, heads, Q, K).
            output_attentions: ignored.
        """
        query, key, value = map(self._split_heads, (self.query(queries), self.key(keys), self.value(values)))
        attended = nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=attention_mask)
        output: Tensor = self.out_proj(attended.transpose(1, 2).flatten(2))
        return output, None

    def _split_heads(self, tensor: Tensor) -> Tensor:
        return tensor.view(*tensor.shape[:2], self.heads, -1).transpose(1, 2)


class FullPrecision(nn.Module):
    """Runs a module in float32 where autocast would not."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Takes and returns what the module does; float arguments are converted to float32."""
        with torch.autocast(next(iter((*args, *kwargs.values()))).device.type, enabled=False):
            return self.module(*map(_to_float32, args), **{name: _to_float32(arg) for name, arg in kwargs.items()})


def _to_float32(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.is_floating_point() else value


class PackedLinear(nn.Module):
    """A linear layer with its weights in oneDNN's layout and an activation fused in; for inference only.

    In bfloat16 the products are summed in float32, on processors that have instructions for it.
    """

    def __init__(
        self,
        linear: Any,
        activation: str = "none",
        precision: torch.dtype = torch.float32,
        output: torch.dtype = torch.float32,
    ) -> None:
        """Packs the weights of a linear layer; `output` is the type of the results."""
        super().__init__()
        self.activation, self.precision, self.output = activation, precision, output
        self.bias = None if linear.bias is None else linear.bias.data.to(precision)
        self.packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight.data.to(precision), None)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Maps (..., in_features) to (..., out_features)."""
        output: Tensor = torch.ops.mkldnn._linear_pointwise(
            hidden_states.to(self.precision), self.packed, self.bias, self.activation, [], "none"
        )
        return output.to(self.output)

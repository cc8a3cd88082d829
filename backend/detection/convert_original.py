"""Converts original checkpoints (GroundingDINO_SwinT_OGC.pth, SwinB_cogcoor, fine-tuned ones) for transformers.

Original names follow the state dict of IDEA-Research/GroundingDINO; the configuration is inferred from the shapes of
the tensors. The result has the names that transformers saves, which each of its versions translates on loading.
"""

from __future__ import annotations

import argparse
import pickle
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor
from transformers import BertConfig, GroundingDinoConfig, SwinConfig

from backend.errors import CheckpointError

ATTENTION_HEADS = 8  # no shape shows it; all published models have eight

UNUSED_TENSORS = re.compile(r"bert\.pooler\.|bert\.embeddings\.position_ids$|.*relative_position_index$|label_enc\.")
SWIN = "model.backbone.conv_encoder.model."

# Applied in this order to each name; several rules may match.
RENAMING_RULES: list[tuple[str, str | Callable[[re.Match[str]], str]]] = [
    (r"^bert\.", "model.text_backbone."),
    (r"^feat_map\.", "model.text_projection."),
    (r"^input_proj\.", "model.input_proj_vision."),
    (r"^backbone\.0\.norm(\d)\.", lambda m: f"{SWIN}hidden_states_norms.stage{int(m[1]) + 1}."),
    (r"^backbone\.0\.patch_embed\.proj\.", f"{SWIN}embeddings.patch_embeddings.projection."),
    (r"^backbone\.0\.patch_embed\.norm\.", f"{SWIN}embeddings.norm."),
    (r"^backbone\.0\.layers\.", f"{SWIN}encoder.layers."),
    (r"(encoder\.layers\.\d+\.blocks\.\d+)\.norm1\.", r"\1.layernorm_before."),
    (r"(encoder\.layers\.\d+\.blocks\.\d+)\.norm2\.", r"\1.layernorm_after."),
    (r"(blocks\.\d+)\.attn\.(query|key|value|relative_position_bias_table)", r"\1.attention.self.\2"),
    (r"(blocks\.\d+)\.attn\.proj\.", r"\1.attention.output.dense."),
    (r"(blocks\.\d+)\.mlp\.fc1\.", r"\1.intermediate.dense."),
    (r"(blocks\.\d+)\.mlp\.fc2\.", r"\1.output.dense."),
    (r"^transformer\.tgt_embed\.", "model.query_position_embeddings."),
    (r"^transformer\.enc_out_bbox_embed\.", "model.encoder_output_bbox_embed."),
    (r"^transformer\.decoder\.norm\.", "model.decoder.layer_norm."),
    (r"^transformer\.decoder\.ref_point_head\.", "model.decoder.reference_points_head."),
    (r"^transformer\.encoder\.layers\.(\d+)\.", r"model.encoder.layers.\1.deformable_layer."),
    (r"^transformer\.encoder\.text_layers\.(\d+)\.", r"model.encoder.layers.\1.text_enhancer_layer."),
    (r"^transformer\.encoder\.fusion_layers\.(\d+)\.", r"model.encoder.layers.\1.fusion_layer."),
    (r"^transformer\.", "model."),
    (r"(deformable_layer)\.norm1\.", r"\1.self_attn_layer_norm."),
    (r"(deformable_layer)\.norm2\.", r"\1.final_layer_norm."),
    (r"(text_enhancer_layer)\.norm1\.", r"\1.layer_norm_before."),
    (r"(text_enhancer_layer)\.norm2\.", r"\1.layer_norm_after."),
    (r"(fusion_layer)\.gamma_v$", r"\1.vision_param"),
    (r"(fusion_layer)\.gamma_l$", r"\1.text_param"),
    (r"(fusion_layer)\.layer_norm_v\.", r"\1.layer_norm_vision."),
    (r"(fusion_layer)\.layer_norm_l\.", r"\1.layer_norm_text."),
    (r"(fusion_layer\.attn)\.(values_|out_)?v_proj\.", r"\1.\2vision_proj."),
    (r"(fusion_layer\.attn)\.(values_|out_)?l_proj\.", r"\1.\2text_proj."),
    (r"(decoder\.layers\.\d+)\.cross_attn\.", r"\1.encoder_attn."),
    (r"(decoder\.layers\.\d+)\.norm1\.", r"\1.encoder_attn_layer_norm."),
    (r"(decoder\.layers\.\d+)\.ca_text\.", r"\1.encoder_attn_text."),
    (r"(decoder\.layers\.\d+)\.catext_norm\.", r"\1.encoder_attn_text_layer_norm."),
    (r"(decoder\.layers\.\d+)\.norm2\.", r"\1.self_attn_layer_norm."),
    (r"(decoder\.layers\.\d+)\.norm3\.", r"\1.final_layer_norm."),
    (r"(deformable_layer|text_enhancer_layer|decoder\.layers\.\d+)\.linear([12])\.", r"\1.fc\2."),
]


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """Loads the tensors of a `.pth` file, at the top level or under the key `model`, without the prefix `module.`.

    Raises:
        CheckpointError: the file is damaged, contains code, or is not an original Grounding DINO checkpoint.
    """
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # of a file that is not a checkpoint, torch raises whatever its bytes lead to
        if isinstance(error, pickle.UnpicklingError) and "GLOBAL" in str(error):  # it names what would have been run
            raise CheckpointError(f"MODEL={path} holds more than tensors: refused; save its state dict alone") from None
        raise CheckpointError(f"MODEL={path} is damaged or not a checkpoint ({type(error).__name__})") from None
    state = content.get("model", content) if isinstance(content, Mapping) else {}
    tensors = {name.removeprefix("module."): value for name, value in state.items() if isinstance(value, Tensor)}
    if "transformer.level_embed" not in tensors or "feat_map.weight" not in tensors:
        raise CheckpointError(f"MODEL={path} is not a Grounding DINO checkpoint of the reference implementation")
    return tensors


def convert_state_dict(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Renames tensors from the original names to those that transformers saves; splits joined attention weights."""
    return {
        _rename(name): tensor
        for original, joined in state.items()
        if not UNUSED_TENSORS.match(original)
        for name, tensor in _split_attention(original, joined)
    }


def _split_attention(name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Splits a tensor that holds query, key and value in three; yields any other as it is."""
    joined = re.search(r"in_proj_(weight|bias)$|qkv\.(weight|bias)$", name)
    if not joined:
        yield name, tensor
        return
    kind = joined[1] or joined[2]
    for projection, third in zip(("query", "key", "value"), tensor.chunk(3), strict=True):
        yield f"{name[: joined.start()]}{projection}.{kind}", third.contiguous()


def _rename(name: str) -> str:
    for pattern, replacement in RENAMING_RULES:
        name = re.sub(pattern, replacement, name)
    return name


def infer_config(state: Mapping[str, Tensor]) -> GroundingDinoConfig:
    """Infers the model's configuration from the names and shapes of its original tensors."""

    def count(pattern: str) -> int:
        """Counts numbered modules; the pattern captures the number."""
        return 1 + max(int(m[1]) for name in state if (m := re.match(pattern, name)))

    level_embed, offsets = state["transformer.level_embed"], "self_attn.sampling_offsets.bias"
    levels, width = level_embed.shape
    points = state[f"transformer.encoder.layers.0.{offsets}"].numel() // (2 * ATTENTION_HEADS * levels)
    return GroundingDinoConfig(
        backbone_config=_infer_swin_config(state, count),
        text_config=_infer_bert_config(state, count),
        d_model=width,
        num_feature_levels=levels,
        num_queries=len(state["transformer.tgt_embed.weight"]),
        encoder_layers=count(r"transformer\.encoder\.layers\.(\d+)\."),
        decoder_layers=count(r"transformer\.decoder\.layers\.(\d+)\."),
        encoder_ffn_dim=len(state["transformer.encoder.layers.0.linear1.bias"]),
        decoder_ffn_dim=len(state["transformer.decoder.layers.0.linear1.bias"]),
        encoder_attention_heads=ATTENTION_HEADS,
        decoder_attention_heads=ATTENTION_HEADS,
        encoder_n_points=points,
        decoder_n_points=points,
    )


def _infer_swin_config(state: Mapping[str, Tensor], count: Callable[[str], int]) -> SwinConfig:
    stages = count(r"backbone\.0\.layers\.(\d+)\.")
    tables = [state[f"backbone.0.layers.{i}.blocks.0.attn.relative_position_bias_table"] for i in range(stages)]
    embed_dim = len(state["backbone.0.patch_embed.proj.weight"])
    return SwinConfig(
        embed_dim=embed_dim,
        depths=[count(rf"backbone\.0\.layers\.{i}\.blocks\.(\d+)\.") for i in range(stages)],
        num_heads=[table.shape[1] for table in tables],
        window_size=(int(len(tables[0]) ** 0.5) + 1) // 2,
        mlp_ratio=len(state["backbone.0.layers.0.blocks.0.mlp.fc1.bias"]) / embed_dim,
        drop_path_rate=0.0,
        out_indices=[i + 1 for i in range(stages) if f"backbone.0.norm{i}.weight" in state],
    )


def _infer_bert_config(state: Mapping[str, Tensor], count: Callable[[str], int]) -> BertConfig:
    vocabulary_size, width = state["bert.embeddings.word_embeddings.weight"].shape
    return BertConfig(
        vocab_size=vocabulary_size,
        hidden_size=width,
        num_hidden_layers=count(r"bert\.encoder\.layer\.(\d+)\."),
        num_attention_heads=max(width // 64, 1),
        intermediate_size=len(state["bert.encoder.layer.0.intermediate.dense.bias"]),
        max_position_embeddings=len(state["bert.embeddings.position_embeddings.weight"]),
    )

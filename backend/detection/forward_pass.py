"""The forward pass of Grounding DINO for inference: transformers' modules, run with as little work as possible.

It gives the logits and boxes of `GroundingDinoForObjectDetection`, up to the rounding of floats. What transformers
computes anew in each pass is kept or left out:

- text features are kept for each caption, and image features are shared by all captions of a batch;
- what depends on the size of the images alone is computed once (`SizeConstants`);
- the encoder's box head sees the selected queries only, and of the decoder's heads the last one runs;
- there are no masks of padded pixels: images of a batch have equal sizes.

A *row* of a pass is one caption on one image. Captions of one batch are padded to the same number of tokens, which
changes no score: padding is masked everywhere. On a GPU that number is one of TEXT_BUCKETS, and the two halves of the
pass are CUDA graphs.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from backend.detection.captions import Caption
from backend.detection.cuda_graphs import Capture, GraphCache, TensorFunction, make_cuda_capture
from backend.detection.deformable_attention import GatheredAttention
from backend.detection.phrase_scores import make_span_matrix
from backend.detection.preprocess import ImageFormat, Size, compute_padding, normalize

TEXT_BUCKETS = (32, 64, 128, 256)  # tokens
MAX_TEXTS_KEPT = 32  # groups of captions; up to 10 MB each
MAX_SIZES_KEPT = {"cuda": 16, "cpu": 2}  # sizes of images, about 20 MB each; graphs are found by them
LOGIT_EPS = 1e-5  # transformers clamps reference points to [eps, 1 - eps] before the logit

Key = TypeVar("Key")
Value = TypeVar("Value")


class LruCache(Generic[Key, Value]):
    """Keeps the most recently used values."""

    def __init__(self, max_size: int) -> None:
        self._max_size = max_size
        self._values: OrderedDict[Key, Value] = OrderedDict()

    def get(self, key: Key, compute: Callable[[Key], Value]) -> Value:
        """Returns the value of a key; computes it if it is not kept."""
        if key not in self._values:
            self._values[key] = compute(key)
            if len(self._values) > self._max_size:
                self._values.popitem(last=False)
        self._values.move_to_end(key)
        return self._values[key]

    def clear(self) -> None:
        """Drops all values."""
        self._values.clear()


@dataclass(frozen=True)
class TextFeatures:
    """Captions as the encoder reads them.

    Attributes:
        features: (captions, tokens, d).
        positions: position embeddings (captions, tokens, d).
        attention_bias: (captions, 1, tokens, tokens), added to attention scores: tokens see those of their phrase.
        padding: (captions, tokens), true at padding.
        span_matrix: (captions, tokens, phrases), for `phrase_scores`; captions with fewer phrases have empty columns.
    """

    features: Tensor
    positions: Tensor
    attention_bias: Tensor
    padding: Tensor
    span_matrix: Tensor


@dataclass(frozen=True, eq=False)
class SizeConstants:
    """What depends only on the size of the images; N is the number of feature tokens of all levels.

    Two of them are equal only if they are one object: graphs read its tensors at their addresses.

    Attributes:
        shapes: height and width of each feature level in tokens.
        shapes_tensor: the same as (levels, 2).
        starts: (levels,), index of the first token of each level.
        positions: position embeddings (1, N, d), those of the levels included.
        references: (1, N, levels, 2), x and y of each token in 0..1.
        proposals: logits (1, N, 4) of the box of each token, cxcywh; infinite where a box would be too near the border.
        is_proposal: (1, N, 1), false at those.
    """

    shapes: list[tuple[int, int]]
    shapes_tensor: Tensor
    starts: Tensor
    positions: Tensor
    references: Tensor
    proposals: Tensor
    is_proposal: Tensor


@dataclass(frozen=True)
class ImageFeatures:
    """Images of equal size as the encoder reads them: feature tokens (images, N, d), and what belongs to their size."""

    tokens: Tensor
    constants: SizeConstants


@dataclass
class ForwardPass:
    """Runs a Grounding DINO of either class for inference; call its methods under `torch.inference_mode`.

    Attributes:
        model: as `load_checkpoint` returns it, accelerated or not.
        image_format: the checkpoint's.
        strides: pixels of a resized image per feature token and axis, for each feature level.
        text_buckets: numbers of tokens to which captions are padded, so that few graphs serve all; empty: no padding.
        batches_captions: whether several captions in one pass are faster than one after the other.
    """

    model: Any
    image_format: ImageFormat
    strides: Sequence[int]
    text_buckets: Sequence[int] = field(init=False)
    batches_captions: bool = field(init=False)
    mean: Tensor = field(init=False)
    std: Tensor = field(init=False)

    def __post_init__(self) -> None:
        device = self.model.device
        self.batches_captions = device.type == "cuda"
        self.text_buckets = TEXT_BUCKETS if self.batches_captions else ()
        self.mean = torch.tensor(self.image_format.mean, device=device)
        self.std = torch.tensor(self.image_format.std, device=device)
        self._texts: LruCache[tuple[Caption, ...], TextFeatures] = LruCache(MAX_TEXTS_KEPT)
        self._constants: LruCache[tuple[int, int], SizeConstants] = LruCache(MAX_SIZES_KEPT.get(device.type, 2))
        self._image_graphs: GraphCache | None = None
        self._text_graphs: GraphCache | None = None
        # transformers' own deformable attention, without our kernel, waits for the device; a graph may not.
        attention = self.model.model.decoder.layers[0].encoder_attn
        if device.type == "cuda" and isinstance(attention, GatheredAttention):
            self.use_graphs(make_cuda_capture)

    def use_graphs(self, make_capture: Callable[[], Capture]) -> None:
        """Runs the two halves of the pass, images alone and images with text, as CUDA graphs from now on.

        Each half has memory of its own: what the first one gives is read by several runs of the second.
        """
        self._image_graphs, self._text_graphs = GraphCache(make_capture), GraphCache(make_capture)

    def clear(self) -> None:
        """Forgets all that was kept: the weights have changed, or memory is short."""
        self._texts.clear()
        self._constants.clear()
        for graphs in filter(None, (self._image_graphs, self._text_graphs)):
            graphs.clear()

    @staticmethod
    def _run(
        graphs: GraphCache | None, function: TensorFunction, constants: Hashable, *arguments: Tensor
    ) -> tuple[Tensor, ...]:
        return graphs(function, constants, *arguments) if graphs else function(constants, *arguments)

    def encode_text(self, captions: Sequence[Caption]) -> TextFeatures:
        """Returns the features of captions, padded to the same number of tokens."""
        return self._texts.get(tuple(captions), self._encode_captions)

    def encode_images(self, pixels: Tensor) -> ImageFeatures:
        """Returns the features of resized images, uint8 (images, height, width, 3) on the device of the model."""
        height, width = pixels.shape[1:3]
        padding = compute_padding(width, height, self.strides, self.model.config.num_queries)
        padded_size = height + padding[1], width + padding[0]
        (tokens,) = self._run(self._image_graphs, self._encode_images, padding, pixels)
        return ImageFeatures(tokens, self._constants.get(padded_size, self._make_constants))

    def detect(self, images: ImageFeatures, text: TextFeatures) -> tuple[Tensor, Tensor]:
        """Detects each caption on each image.

        Returns:
            Token logits (images, captions, queries, tokens), -inf at padding, and boxes_cxcywh (images, captions,
            queries, 4) in 0..1.
        """
        shape = len(images.tokens), len(text.features)
        tokens = images.tokens.repeat_interleave(shape[1], 0) if shape[1] > 1 else images.tokens
        texts = (text.features, text.positions, text.attention_bias, text.padding)
        rows = [tensor.repeat(shape[0], *[1] * (tensor.dim() - 1)) for tensor in texts]
        logits, boxes = self._run(self._text_graphs, self._decode, images.constants, tokens, *rows)
        return logits.view(*shape, *logits.shape[1:]), boxes.view(*shape, *boxes.shape[1:])

    def _encode_captions(self, captions: tuple[Caption, ...]) -> TextFeatures:
        device, model = self.model.device, self.model.model
        length = max(len(caption.input_ids) for caption in captions)
        length = next((bucket for bucket in self.text_buckets if bucket >= length), length)
        input_ids = torch.zeros(len(captions), length, dtype=torch.long)
        position_ids = torch.zeros_like(input_ids)
        is_seen = torch.eye(length, dtype=torch.bool).repeat(len(captions), 1, 1, 1)
        padding = torch.ones_like(input_ids, dtype=torch.bool)
        span_matrix = torch.zeros(len(captions), length, max(len(caption.spans) for caption in captions))
        for row, caption in enumerate(captions):
            count = len(caption.input_ids)
            input_ids[row, :count] = torch.tensor(caption.input_ids)
            padding[row, :count] = False
            span_matrix[row, :, : len(caption.spans)] = make_span_matrix(caption.spans, length)
            for start, end in caption.spans:  # a phrase sees itself and its full stop, and counts from 0
                is_seen[row, 0, start : end + 1, start : end + 1] = True
                position_ids[row, start : end + 1] = torch.arange(end + 1 - start)
        ids, positions, seen = input_ids.to(device), position_ids.to(device), is_seen.to(device)
        states = model.text_backbone(ids, seen, torch.zeros_like(ids), positions).last_hidden_state
        features = model.text_projection(states)
        return TextFeatures(
            features,
            encode_positions(positions[..., None].to(features.dtype), features.shape[-1]),
            _make_bias(seen),
            padding.to(device),
            span_matrix.to(device),
        )

    def _make_constants(self, size: tuple[int, int]) -> SizeConstants:
        """Computes the constants of padded images of a height and width."""
        model, device, (height, width) = self.model.model, self.model.device, size
        shapes = [(-(-height // stride), -(-width // stride)) for stride in self.strides]
        ratios = torch.ones(1, len(shapes), 2, device=device)  # nothing is padded
        positions, proposals = [], []
        for level, (rows, columns) in enumerate(shapes):
            source = torch.empty(1, 1, rows, columns, device=device)
            mask = torch.ones(1, rows, columns, dtype=torch.bool, device=device)
            embedding = model.backbone.position_embedding(source, mask).flatten(2).transpose(1, 2)
            positions.append(embedding + model.level_embed[level])
            y, x = torch.meshgrid(
                torch.arange(rows, device=device) + 0.5, torch.arange(columns, device=device) + 0.5, indexing="ij"
            )
            centres = torch.stack([x / columns, y / rows], -1).view(1, -1, 2)
            proposals.append(torch.cat([centres, torch.full_like(centres, 0.05 * 2**level)], -1))
        boxes = torch.cat(proposals, 1)
        is_proposal = ((boxes > 0.01) & (boxes < 0.99)).all(-1, keepdim=True)
        shapes_tensor = torch.tensor(shapes, device=device)
        return SizeConstants(
            shapes,
            shapes_tensor,
            torch.cat([shapes_tensor.new_zeros(1), shapes_tensor.prod(1).cumsum(0)[:-1]]),
            torch.cat(positions, 1),
            model.encoder.get_reference_points(shapes, ratios, device),
            (boxes / (1 - boxes)).log().masked_fill(~is_proposal, float("inf")),
            is_proposal,
        )

    def _encode_images(self, padding: Size, pixels: Tensor) -> tuple[Tensor]:
        """Returns feature tokens (images, N, d)."""
        model = self.model.model
        values = normalize(pixels, self.mean, self.std, padding)
        maps = list(model.backbone.conv_encoder.model(values, return_dict=True).feature_maps)
        projected = [projection(source) for projection, source in zip(model.input_proj_vision, maps, strict=False)]
        for projection in model.input_proj_vision[len(maps) :]:
            projected.append(projection(maps[-1] if len(projected) == len(maps) else projected[-1]))
        return (torch.cat([source.flatten(2).transpose(1, 2) for source in projected], 1),)

    def _decode(
        self, constants: SizeConstants, features: Tensor, text: Tensor, positions: Tensor, bias: Tensor, padding: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Returns token logits (rows, queries, tokens) and boxes_cxcywh (rows, queries, 4)."""
        features, text = self._encode(constants, features, text, positions, bias, padding)
        queries, references = self._select_queries(constants, features, text, padding)
        return self._run_decoder(constants, features, text, padding, queries, references)

    def _encode(
        self, constants: SizeConstants, features: Tensor, text: Tensor, positions: Tensor, bias: Tensor, padding: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Returns the features of image (rows, N, d) and text (rows, tokens, d) after the encoder."""
        image_positions = constants.positions.expand(len(features), -1, -1)
        references = constants.references.expand(len(features), -1, -1, -1)
        for layer in self.model.model.encoder.layers:
            (features, _), (text, _) = layer.fusion_layer(features, text, attention_mask_text=padding)
            text, _ = layer.text_enhancer_layer(text, bias, positions)
            features, _ = layer.deformable_layer(
                features,
                None,
                position_embeddings=image_positions,
                reference_points=references,
                spatial_shapes=constants.shapes_tensor,
                spatial_shapes_list=constants.shapes,
                level_start_index=constants.starts,
            )
        return features, text

    def _select_queries(
        self, constants: SizeConstants, features: Tensor, text: Tensor, padding: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Returns the decoder's queries (rows, queries, d) and their reference boxes (rows, queries, 4), in 0..1."""
        model, count = self.model.model, self.model.config.num_queries
        embedded = model.enc_output_norm(model.enc_output(features.masked_fill(~constants.is_proposal, 0)))
        scores = compute_token_logits(model.encoder_output_class_embed, embedded, text, padding).amax(-1)
        best = scores.topk(count, 1).indices[..., None]
        selected = embedded.gather(1, best.expand(-1, -1, embedded.shape[-1]))
        proposals = constants.proposals.expand(len(features), -1, -1).gather(1, best.expand(-1, -1, 4))
        references = (model.encoder_output_bbox_embed(selected) + proposals).sigmoid()
        if self.model.config.embedding_init_target:
            selected = model.query_position_embeddings.weight.expand(len(features), -1, -1)
        return selected, references

    def _run_decoder(
        self,
        constants: SizeConstants,
        features: Tensor,
        text: Tensor,
        padding: Tensor,
        hidden: Tensor,
        references: Tensor,
    ) -> tuple[Tensor, Tensor]:
        decoder = self.model.model.decoder
        text_bias = _make_bias(~padding[:, None, None])
        last = len(decoder.layers) - 1
        for index, layer in enumerate(decoder.layers):
            query_positions = decoder.reference_points_head(encode_positions(references, features.shape[-1] // 2))
            hidden = layer(
                hidden,
                position_embeddings=query_positions,
                reference_points=references[:, :, None].expand(-1, -1, len(constants.shapes), -1),
                spatial_shapes=constants.shapes_tensor,
                spatial_shapes_list=constants.shapes,
                level_start_index=constants.starts,
                vision_encoder_hidden_states=features,
                text_encoder_hidden_states=text,
                text_encoder_attention_mask=text_bias,
            )[0]
            if index < last:
                references = (decoder.bbox_embed[index](hidden) + torch.logit(references, eps=LOGIT_EPS)).sigmoid()
        hidden = decoder.layer_norm(hidden)
        logits = compute_token_logits(self.model.class_embed[last], hidden, text, padding)
        boxes = (self.model.bbox_embed[last](hidden) + torch.logit(references, eps=LOGIT_EPS)).sigmoid()
        return logits, boxes.float()


def compute_strides(config: Any) -> list[int]:
    """Returns the pixels of a resized image per feature token and axis, for each feature level."""
    backbone = config.backbone_config
    strides = [backbone.patch_size * 2 ** (stage - 1) for stage in backbone.out_indices]
    while len(strides) < config.num_feature_levels:
        strides.append(2 * strides[-1])
    return strides


def compute_token_logits(class_embed: Any, hidden: Tensor, text: Tensor, padding: Tensor) -> Tensor:
    """Computes the logits (rows, queries, tokens) of a class head, in float32; -inf at padding.

    Args:
        class_embed: transformers' ContrastiveEmbedding; MM Grounding DINO's has a bias and scales the logits.
        hidden: (rows, queries, d).
        text: (rows, tokens, d).
        padding: (rows, tokens), true at padding.
    """
    with torch.autocast(hidden.device.type, enabled=False):
        logits = torch.bmm(hidden.float(), text.float().transpose(1, 2))
        if hasattr(class_embed, "bias"):
            logits = logits / math.sqrt(hidden.shape[-1]) + class_embed.bias
        return logits.masked_fill(padding[:, None], float("-inf"))


def encode_positions(coordinates: Tensor, width: int, temperature: float = 10_000) -> Tensor:
    """Encodes coordinates (..., n) as sines and cosines (..., n x width), y before x, as in DETR."""
    frequencies = torch.arange(0, width, 2, dtype=torch.float32, device=coordinates.device)
    angles = coordinates.float()[..., None] * 2 * math.pi / temperature ** (frequencies / width)
    encoded = torch.stack([angles.sin(), angles.cos()], -1).flatten(-2)
    if coordinates.shape[-1] > 1:
        encoded = torch.cat([encoded[..., 1:2, :], encoded[..., :1, :], encoded[..., 2:, :]], -2)
    return encoded.flatten(-2).to(coordinates.dtype)


def _make_bias(is_seen: Tensor) -> Tensor:
    """Returns what is added to attention scores: 0 where a key is seen, a very low number elsewhere."""
    return (~is_seen).float() * torch.finfo(torch.float32).min

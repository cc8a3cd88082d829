"""The training loss of Grounding DINO.

Queries are matched to boxes as in DETR (Carion et al., "End-to-end object detection with transformers", 2020): the
cheapest one-to-one assignment. The terms are those of Grounding DINO (Liu et al., 2023): a focal loss on the logits of
the tokens (Lin et al., "Focal loss for dense object detection", 2017), L1 and generalised IoU (Rezatofighi et al.,
2019) on the boxes. They apply to the encoder's proposals and to each decoder layer.

The loss is our own because that of transformers mixes up the targets when the captions of a batch differ, and gives the
two-stage heads no gradient.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from backend.detection.captions import Caption
from backend.detection.phrase_scores import make_span_matrix, phrase_scores

FOCAL_ALPHA, FOCAL_GAMMA = 0.25, 2.0
CLASS_WEIGHT, L1_WEIGHT, GIOU_WEIGHT = 2.0, 5.0, 2.0  # of the terms, both in the matching cost and in the loss


@dataclass(frozen=True)
class Target:
    """The boxes to predict on one image.

    Attributes:
        boxes_cxcywh: (boxes, 4) in 0..1 of the padded image.
        phrases: (boxes,) indices of their phrases in the caption.
    """

    boxes_cxcywh: Tensor
    phrases: Tensor


@dataclass(frozen=True)
class Batch:
    """Images of one size (images, 3, height, width), each with its own caption and target."""

    pixel_values: Tensor
    captions: Sequence[Caption]
    targets: Sequence[Target]

    def to(self, device: torch.device) -> Batch:
        """Returns the batch with its tensors on a device."""
        targets = [Target(target.boxes_cxcywh.to(device), target.phrases.to(device)) for target in self.targets]
        return Batch(self.pixel_values.to(device), self.captions, targets)


def boxes_to_xyxy(boxes_cxcywh: Tensor) -> Tensor:
    """Converts (..., 4) centre and size to corners."""
    centre, half = boxes_cxcywh[..., :2], boxes_cxcywh[..., 2:] / 2
    return torch.cat([centre - half, centre + half], -1)


def boxes_to_cxcywh(boxes_xyxy: Tensor) -> Tensor:
    """Converts (..., 4) corners to centre and size."""
    low, high = boxes_xyxy[..., :2], boxes_xyxy[..., 2:]
    return torch.cat([(low + high) / 2, high - low], -1)


def generalized_iou(boxes_a: Tensor, boxes_b: Tensor) -> Tensor:
    """Computes the generalised IoU (Rezatofighi et al., 2019) of xyxy boxes.

    Args:
        boxes_a: (..., 4)
        boxes_b: (..., 4), of a shape that broadcasts with `boxes_a`.

    Returns:
        (...) in -1..1.
    """
    area_a = (boxes_a[..., 2:] - boxes_a[..., :2]).prod(-1)
    area_b = (boxes_b[..., 2:] - boxes_b[..., :2]).prod(-1)
    inner = torch.minimum(boxes_a[..., 2:], boxes_b[..., 2:]) - torch.maximum(boxes_a[..., :2], boxes_b[..., :2])
    outer = torch.maximum(boxes_a[..., 2:], boxes_b[..., 2:]) - torch.minimum(boxes_a[..., :2], boxes_b[..., :2])
    intersection = inner.clamp(min=0).prod(-1)
    union = area_a + area_b - intersection
    hull = outer.prod(-1)
    return intersection / union.clamp(min=1e-7) - (hull - union) / hull.clamp(min=1e-7)


def compute_loss(model: Any, batch: Batch, autocast_dtype: torch.dtype | None = None) -> Tensor:
    """Computes the loss of a batch, divided by its number of boxes.

    Args:
        model: Grounding DINO as `load_checkpoint` returns it; a detector's model lacks what the loss needs.
        batch: on the device of the model.
        autocast_dtype: precision of the forward pass; None for that of the weights. The loss is computed in float32.
    """
    device = batch.pixel_values.device
    inputs = pad_captions(batch.captions, device)
    with torch.autocast(device.type, autocast_dtype, enabled=autocast_dtype is not None):
        output = model.model(pixel_values=batch.pixel_values, **inputs)
        stages = list(_predict_stages(model, output, inputs["attention_mask"].bool()))
    total = sum(_compute_stage_loss(logits.float(), boxes.float(), batch) for logits, boxes in stages)
    box_count = sum(len(target.phrases) for target in batch.targets)
    return torch.as_tensor(total / max(box_count, 1))


def pad_captions(captions: Sequence[Caption], device: str | torch.device = "cpu") -> dict[str, Tensor]:
    """Stacks captions of different lengths as padded `input_ids` and `attention_mask`, each (captions, tokens)."""
    token_ids = [torch.tensor(caption.input_ids) for caption in captions]
    input_ids = nn.utils.rnn.pad_sequence(token_ids, batch_first=True)
    mask = nn.utils.rnn.pad_sequence([torch.ones_like(ids) for ids in token_ids], batch_first=True)
    return {"input_ids": input_ids.to(device), "attention_mask": mask.to(device)}


def _predict_stages(model: Any, output: Any, text_mask: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields the predictions of the encoder (its proposals), then of each decoder layer.

    Args:
        model: that returned the output.
        output: of `model.model`.
        text_mask: (images, tokens), true at the tokens of the captions.

    Yields:
        Token logits (images, queries, tokens), -inf for padding, and boxes_cxcywh (images, queries, 4).
    """
    length = text_mask.shape[1]
    is_valid = torch.isfinite(output.enc_outputs_coord_logits).all(-1, keepdim=True)
    proposals = output.enc_outputs_coord_logits.masked_fill(~is_valid, 0).sigmoid()
    yield output.enc_outputs_class[..., :length].masked_fill(~is_valid, float("-inf")), proposals
    references = [output.init_reference_points, *output.intermediate_reference_points.unbind(1)]
    for layer, hidden in enumerate(output.intermediate_hidden_states.unbind(1)):
        logits = model.class_embed[layer](
            vision_hidden_state=hidden,
            text_hidden_state=output.encoder_last_hidden_state_text,
            text_token_mask=text_mask,
        )
        offset = model.bbox_embed[layer](hidden)
        yield logits[..., :length], (offset + torch.special.logit(references[layer], eps=1e-5)).sigmoid()


def _compute_stage_loss(logits: Tensor, boxes_cxcywh: Tensor, batch: Batch) -> Tensor:
    """Sums the loss of one stage over the batch; shapes as in `_predict_stages`."""
    token_targets = torch.zeros_like(logits)
    box_loss = logits.new_zeros(())
    for i, (caption, target) in enumerate(zip(batch.captions, batch.targets, strict=True)):
        if not len(target.phrases):
            continue
        with torch.no_grad():
            span_matrix = make_span_matrix(caption.spans, logits.shape[-1]).to(logits.device)
            queries, boxes = _match_queries(phrase_scores(logits[i], span_matrix), boxes_cxcywh[i], target)
        for query, box in zip(queries.tolist(), boxes.tolist(), strict=True):
            start, end = caption.spans[int(target.phrases[box])]
            token_targets[i, query, start:end] = 1
        predicted, true = boxes_cxcywh[i, queries], target.boxes_cxcywh[boxes]
        giou = generalized_iou(boxes_to_xyxy(predicted), boxes_to_xyxy(true))
        box_loss = box_loss + L1_WEIGHT * (predicted - true).abs().sum() + GIOU_WEIGHT * (1 - giou).sum()
    is_valid = torch.isfinite(logits)
    focal = _compute_focal_loss(logits.masked_fill(~is_valid, 0), token_targets).masked_fill(~is_valid, 0).sum()
    return CLASS_WEIGHT * focal + box_loss


def _match_queries(scores: Tensor, boxes_cxcywh: Tensor, target: Target) -> tuple[Tensor, Tensor]:
    """Assigns each box of an image to a query, at the lowest total cost.

    Args:
        scores: (queries, phrases) in 0..1.
        boxes_cxcywh: (queries, 4).
        target: of the image.

    Returns:
        Indices of the queries and of the boxes that were assigned to them.
    """
    probability = scores[:, target.phrases].clamp(1e-6, 1 - 1e-6)
    positive = FOCAL_ALPHA * (1 - probability) ** FOCAL_GAMMA * -probability.log()
    negative = (1 - FOCAL_ALPHA) * probability**FOCAL_GAMMA * -(1 - probability).log()
    l1 = torch.cdist(boxes_cxcywh, target.boxes_cxcywh, p=1)
    giou = generalized_iou(boxes_to_xyxy(boxes_cxcywh)[:, None], boxes_to_xyxy(target.boxes_cxcywh)[None])
    cost = CLASS_WEIGHT * (positive - negative) + L1_WEIGHT * l1 - GIOU_WEIGHT * giou
    queries, boxes = linear_sum_assignment(cost.nan_to_num(1e4, 1e4, -1e4).cpu().numpy())
    return torch.as_tensor(queries), torch.as_tensor(boxes)


def _compute_focal_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Computes the focal loss (Lin et al., 2017) of each logit; targets are 0 or 1."""
    probability = logits.sigmoid()
    entropy = nn.functional.binary_cross_entropy_with_logits(logits, targets, reduction="none")
    alpha = FOCAL_ALPHA * targets + (1 - FOCAL_ALPHA) * (1 - targets)
    modulation: Tensor = (targets - probability).abs() ** FOCAL_GAMMA
    return alpha * modulation * entropy

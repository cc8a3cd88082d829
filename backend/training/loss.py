"""The training loss."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from backend.detection.captions import Caption
from backend.detection.detector import phrase_scores

FOCAL_ALPHA, FOCAL_GAMMA = 0.25, 2.0


CLASS_WEIGHT, L1_WEIGHT, GIOU_WEIGHT = 2.0, 5.0, 2.0


@dataclass(frozen=True)
class Target:
    """The truth of one picture: boxes_cxcywh (n, 4) in 0..1 and, per box, the index of its phrase (n,)."""

    boxes_cxcywh: Tensor
    phrases: Tensor


@dataclass(frozen=True)
class Batch:
    """Pictures of one size (n, 3, height, width), each with its own caption and target."""

    pixel_values: Tensor
    captions: Sequence[Caption]
    targets: Sequence[Target]


def boxes_to_xyxy(boxes_cxcywh: Tensor) -> Tensor:
    """(..., 4) centre and size -> (..., 4) corners."""
    centre, half = boxes_cxcywh[..., :2], boxes_cxcywh[..., 2:] / 2
    return torch.cat([centre - half, centre + half], -1)


def generalized_iou(boxes_a: Tensor, boxes_b: Tensor) -> Tensor:
    """Generalised IoU of xyxy boxes in -1..1, broadcast over the leading dimensions (Rezatofighi et al., 2019)."""
    area_a = (boxes_a[..., 2:] - boxes_a[..., :2]).prod(-1)
    area_b = (boxes_b[..., 2:] - boxes_b[..., :2]).prod(-1)
    inner = torch.minimum(boxes_a[..., 2:], boxes_b[..., 2:]) - torch.maximum(boxes_a[..., :2], boxes_b[..., :2])
    outer = torch.maximum(boxes_a[..., 2:], boxes_b[..., 2:]) - torch.minimum(boxes_a[..., :2], boxes_b[..., :2])
    intersection = inner.clamp(min=0).prod(-1)
    union = area_a + area_b - intersection
    hull = outer.prod(-1)
    return intersection / union.clamp(min=1e-7) - (hull - union) / hull.clamp(min=1e-7)


def _match(scores: Tensor, boxes_cxcywh: Tensor, target: Target) -> tuple[Tensor, Tensor]:
    """The cheapest assignment of a picture's boxes to queries: indices of queries and of boxes."""
    chance = scores[:, target.phrases].clamp(1e-6, 1 - 1e-6)
    positive = FOCAL_ALPHA * (1 - chance) ** FOCAL_GAMMA * -chance.log()
    negative = (1 - FOCAL_ALPHA) * chance**FOCAL_GAMMA * -(1 - chance).log()
    l1 = torch.cdist(boxes_cxcywh, target.boxes_cxcywh, p=1)
    giou = generalized_iou(boxes_to_xyxy(boxes_cxcywh)[:, None], boxes_to_xyxy(target.boxes_cxcywh)[None])
    cost = CLASS_WEIGHT * (positive - negative) + L1_WEIGHT * l1 - GIOU_WEIGHT * giou
    rows, columns = linear_sum_assignment(cost.nan_to_num(1e4, 1e4, -1e4).cpu().numpy())
    return torch.as_tensor(rows), torch.as_tensor(columns)


def _focal(logits: Tensor, wanted: Tensor) -> Tensor:
    chance = logits.sigmoid()
    entropy = nn.functional.binary_cross_entropy_with_logits(logits, wanted, reduction="none")
    alpha = FOCAL_ALPHA * wanted + (1 - FOCAL_ALPHA) * (1 - wanted)
    gap: Tensor = (wanted - chance).abs() ** FOCAL_GAMMA
    return alpha * gap * entropy


def _stage_loss(logits: Tensor, boxes_cxcywh: Tensor, batch: Batch) -> Tensor:
    """Loss of one prediction stage, summed over the batch: logits (n, queries, tokens), boxes (n, queries, 4)."""
    wanted = torch.zeros_like(logits)
    box_loss = logits.new_zeros(())
    for i, (caption, target) in enumerate(zip(batch.captions, batch.targets, strict=True)):
        if not len(target.phrases):
            continue
        with torch.no_grad():
            queries, boxes = _match(phrase_scores(logits[i], caption.spans), boxes_cxcywh[i], target)
        for query, box in zip(queries.tolist(), boxes.tolist(), strict=True):
            start, end = caption.spans[int(target.phrases[box])]
            wanted[i, query, start:end] = 1
        guess, truth = boxes_cxcywh[i, queries], target.boxes_cxcywh[boxes]
        giou = generalized_iou(boxes_to_xyxy(guess), boxes_to_xyxy(truth))
        box_loss = box_loss + L1_WEIGHT * (guess - truth).abs().sum() + GIOU_WEIGHT * (1 - giou).sum()
    real = torch.isfinite(logits)
    focal = _focal(logits.masked_fill(~real, 0), wanted).masked_fill(~real, 0).sum()
    return CLASS_WEIGHT * focal + box_loss


def _stages(model: Any, output: Any, text_mask: Tensor) -> Iterable[tuple[Tensor, Tensor]]:
    """Token logits and boxes of the proposals, then of each decoder layer; the mask is true at real tokens."""
    length = text_mask.shape[1]
    real = torch.isfinite(output.enc_outputs_coord_logits).all(-1, keepdim=True)
    proposals = output.enc_outputs_coord_logits.masked_fill(~real, 0).sigmoid()
    yield output.enc_outputs_class[..., :length].masked_fill(~real, float("-inf")), proposals
    references = [output.init_reference_points, *output.intermediate_reference_points.unbind(1)]
    for level, hidden in enumerate(output.intermediate_hidden_states.unbind(1)):
        logits = model.class_embed[level](
            vision_hidden_state=hidden,
            text_hidden_state=output.encoder_last_hidden_state_text,
            text_token_mask=text_mask,
        )
        offset = model.bbox_embed[level](hidden)
        yield logits[..., :length], (offset + torch.special.logit(references[level], eps=1e-5)).sigmoid()


def text_inputs(captions: Sequence[Caption], device: str | torch.device = "cpu") -> dict[str, Tensor]:
    """Captions of different lengths -> padded `input_ids` and `attention_mask` (n, tokens)."""
    rows = [torch.tensor(caption.input_ids) for caption in captions]
    input_ids = nn.utils.rnn.pad_sequence(rows, batch_first=True)
    mask = nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
    return {"input_ids": input_ids.to(device), "attention_mask": mask.to(device)}


def compute_loss(model: Any, batch: Batch, half: torch.dtype | None = None) -> Tensor:
    """The training loss of a batch, per box; `half` is the precision of the forward pass, if it is not float32."""
    device = batch.pixel_values.device
    inputs = text_inputs(batch.captions, device)
    with torch.autocast(device.type, half, enabled=half is not None):
        output = model.model(pixel_values=batch.pixel_values, **inputs)
        stages = list(_stages(model, output, inputs["attention_mask"].bool()))
    total = sum(_stage_loss(logits.float(), boxes.float(), batch) for logits, boxes in stages)
    boxes = sum(len(target.phrases) for target in batch.targets)
    return torch.as_tensor(total / max(boxes, 1))

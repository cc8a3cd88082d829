"""Grounding DINO inference: preprocess, forward, postprocess.

A label's phrases are tokenised one by one and joined, so that each phrase's token span is known by construction. The
score of a phrase is the mean of the sigmoids over its span, as in the reference implementation's evaluation on COCO;
the score of a label is the best of its phrases, and a box carries its best label.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from backend.errors import LabelingConfigError
from backend.labeling import Label
from backend.regions import Detection, best_of_overlapping, cxcywh_to_xyxy

CLS, SEP, STOP = 101, 102, 1012  # transformers' Grounding DINO finds phrase borders by these ids of BERT's vocabulary


@dataclass(frozen=True)
class Caption:
    """Token ids of all phrases and, per phrase, its span [start, end) in them."""

    input_ids: tuple[int, ...]
    spans: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class ImageFormat:
    """How a checkpoint wants its pictures: edges in pixels, mean and deviation per RGB channel in 0..1."""

    shortest_edge: int = 800
    longest_edge: int = 1333
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)

    def size(self, width: int, height: int) -> tuple[int, int]:
        """Width and height after resizing, rounded as transformers rounds: ratio kept, no edge above the longest."""
        small, large = min(width, height), max(width, height)
        short = min(self.shortest_edge, self.longest_edge * small / large)
        edges = max(round(short), 1), max(int(short * large / small), 1)
        return edges if width <= height else edges[::-1]

    def preprocess(self, image: Image.Image) -> Tensor:
        """An RGB picture -> float32 (3, height, width), resized and normalised."""
        resized = image.resize(self.size(*image.size), Image.Resampling.BILINEAR)
        pixels = torch.from_numpy(np.array(resized, dtype=np.float32)).permute(2, 0, 1) / 255
        return (pixels - torch.tensor(self.mean)[:, None, None]) / torch.tensor(self.std)[:, None, None]


def build_caption(tokenizer: Any, phrases: Sequence[str], most_tokens: int = 256) -> Caption:
    """Tokens of `phrases`, each closed by a full stop: without the last one the last phrase would not see itself.

    Raises:
        LabelingConfigError: they make more than `most_tokens`.
    """
    input_ids, spans = [CLS], []
    for phrase in phrases:
        tokens = tokenizer.encode(phrase, add_special_tokens=False)
        spans.append((len(input_ids), len(input_ids) + len(tokens)))
        input_ids += [*tokens, STOP]
    if len(input_ids) >= most_tokens:
        raise LabelingConfigError(
            f"the labels make {len(input_ids) + 1} tokens and the model reads {most_tokens}; use fewer or shorter ones"
        )
    return Caption((*input_ids, SEP), tuple(spans))


def phrase_scores(logits: Tensor, spans: Sequence[tuple[int, int]]) -> Tensor:
    """Token logits (..., tokens) -> phrase scores (..., phrases) in 0..1."""
    probabilities = logits.sigmoid()
    return torch.stack([probabilities[..., start:end].mean(-1) for start, end in spans], dim=-1)


class Detector:
    """A loaded model that answers for pictures of any size; not thread-safe."""

    def __init__(self, model: Any, tokenizer: Any, image_format: ImageFormat, device: str = "cpu") -> None:
        self.model = model.to(device).eval()
        self.tokenizer = tokenizer
        self.image_format = image_format
        self.device = device

    def warm_up(self) -> None:
        """One forward pass, so that the first user does not pay for what is set up lazily."""
        self.detect([Image.new("RGB", (64, 64))], [Label("object", ("object",), 0.5)])

    def detect(
        self, images: Sequence[Image.Image], labels: Sequence[Label], nms_iou: float = 1.0
    ) -> list[list[Detection]]:
        """Boxes of `labels` in each RGB picture, best first, one label a box, scores at or above the label's threshold.

        Of boxes whose IoU is above `nms_iou` only the best stays, whatever their labels.
        Only pictures of equal size share a batch: padding changes scores.
        """
        pixels = [self.image_format.preprocess(image) for image in images]
        groups: dict[tuple[int, ...], list[int]] = defaultdict(list)
        for index, tensor in enumerate(pixels):
            groups[tuple(tensor.shape)].append(index)
        answers: list[list[Detection]] = [[] for _ in images]
        for indices in groups.values():
            batch = torch.stack([pixels[i] for i in indices])
            sizes = [images[i].size for i in indices]
            for index, detections in zip(indices, self._detect_batch(batch, sizes, labels), strict=True):
                answers[index] = best_of_overlapping(detections, nms_iou)
        return answers

    def _detect_batch(
        self, pixel_values: Tensor, sizes: Sequence[tuple[int, int]], labels: Sequence[Label]
    ) -> list[list[Detection]]:
        phrases = [phrase for label in labels for phrase in label.phrases]
        caption = build_caption(self.tokenizer, phrases, self.model.config.max_text_len)
        logits, boxes_cxcywh = self._forward(pixel_values, caption)
        by_phrase = torch.split(phrase_scores(logits, caption.spans), [len(label.phrases) for label in labels], dim=-1)
        scores, best = torch.stack([scores.amax(-1) for scores in by_phrase], dim=-1).max(-1)
        return [_detections(scores[i], best[i], boxes_cxcywh[i], size, labels) for i, size in enumerate(sizes)]

    @torch.inference_mode()
    def _forward(self, pixel_values: Tensor, caption: Caption) -> tuple[Tensor, Tensor]:
        input_ids = torch.tensor([caption.input_ids] * len(pixel_values), device=self.device)
        output = self.model(pixel_values=pixel_values.to(self.device), input_ids=input_ids)
        return output.logits.float().cpu(), output.pred_boxes.float().cpu()


def _detections(
    scores: Tensor, best: Tensor, boxes_cxcywh: Tensor, size: tuple[int, int], labels: Sequence[Label]
) -> list[Detection]:
    """One picture's queries (scores and best labels (queries,), boxes (queries, 4)) -> Detections."""
    rows = zip(scores.tolist(), best.tolist(), boxes_cxcywh.tolist(), strict=True)
    return [
        Detection(cxcywh_to_xyxy(tuple(box), *size), score, labels[index].name)
        for score, index, box in rows
        if score >= labels[index].threshold
    ]

"""Grounding DINO inference: preprocess, forward, postprocess.

The score of a phrase is the mean of the sigmoids over its token span, as in the reference implementation's evaluation
on COCO; the score of a label is the best of its phrases, and a box carries its best label.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from backend.captions import Caption, build_captions
from backend.labeling import Label
from backend.regions import Detection, best_of_overlapping, clip, cxcywh_to_xyxy
from backend.speed import is_worth_it, speed_up

Size = tuple[int, int]  # width and height in pixels


@dataclass(frozen=True)
class ImageFormat:
    """How a checkpoint wants its pictures: edges in pixels, mean and deviation per RGB channel in 0..1."""

    shortest_edge: int = 800
    longest_edge: int = 1333
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)

    def size(self, width: int, height: int) -> Size:
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


def phrase_scores(logits: Tensor, spans: Sequence[tuple[int, int]]) -> Tensor:
    """Token logits (..., tokens) -> phrase scores (..., phrases) in 0..1."""
    probabilities = logits.sigmoid()
    return torch.stack([probabilities[..., start:end].mean(-1) for start, end in spans], dim=-1)


@dataclass(frozen=True)
class Prepared:
    """A picture as the model reads it, padded where it was too narrow.

    `frame` is the width and height that the padded picture would have in pixels of the original, `size` the original's.
    """

    pixels: Tensor
    frame: tuple[float, float]
    size: Size


class SharedBackbone(nn.Module):
    """The picture backbone; all captions of one batch share what it computed for the first."""

    def __init__(self, backbone: Any) -> None:
        super().__init__()
        self.backbone, self.position_embedding = backbone, backbone.position_embedding
        self._pixels: Tensor | None = None
        self._features: tuple[list[Any], list[Any]] = ([], [])

    def forward(self, pixel_values: Tensor, pixel_mask: Tensor) -> tuple[list[Any], list[Any]]:
        """As the backbone; the same tensor object again costs nothing."""
        if self._pixels is not pixel_values:
            self._pixels, self._features = pixel_values, self.backbone(pixel_values, pixel_mask)
        return list(self._features[0]), list(self._features[1])  # the model appends to them

    def forget(self) -> None:
        """Frees the features of the last batch."""
        self._pixels, self._features = None, ([], [])


class Detector:
    """A model that answers for pictures of any shape and labels of any number; not thread-safe.

    It takes the model over: some of its parts are replaced by faster ones that cannot be trained or saved.
    """

    def __init__(self, model: Any, tokenizer: Any, image_format: ImageFormat, device: str = "cpu") -> None:
        self.model = model.to(device).eval()
        self.tokenizer = tokenizer
        self.image_format = image_format
        self.device = device
        if device == "cpu" and is_worth_it(model):
            speed_up(self.model)
        self.backbone = SharedBackbone(model.model.backbone)
        self.model.model.backbone = self.backbone
        self._strides = _strides(model.config)

    def warm_up(self) -> None:
        """One forward pass, so that the first user does not pay for what is set up lazily."""
        self.detect([Image.new("RGB", (64, 64))], [Label("object", ("object",), 0.5)])

    def detect(
        self,
        images: Sequence[Image.Image],
        labels: Sequence[Label],
        negatives: Sequence[str] = (),
        nms_iou: float = 1.0,
        sizes: Sequence[Size] | None = None,
    ) -> list[list[Detection]]:
        """Boxes of `labels` in each picture, best first, one label a box, scores at or above the label's threshold.

        Args:
            images: RGB pictures. Only those of equal size share a batch: padding changes scores.
            labels: what to look for; a phrase that two labels share counts for the first.
            negatives: phrases that attract false boxes; a box that fits one of them best is dropped.
            nms_iou: of boxes whose IoU is above it only the best stays, whatever their labels.
            sizes: of the original pictures, where `images` are reduced copies; boxes are in their pixels.

        Raises:
            LabelingConfigError: a phrase is longer than the model reads.
        """
        lowest = min((label.threshold for label in labels), default=1.0)
        asked = [*labels, *(Label("", (phrase,), lowest) for phrase in negatives)]
        owners = {phrase: label for label in reversed(asked) for phrase in label.phrases}
        phrases = list(dict.fromkeys(phrase for label in asked for phrase in label.phrases))
        captions = build_captions(self.tokenizer, phrases, self.model.config.max_text_len)
        found: list[list[Detection]] = [[] for _ in images]
        for indices, batch in self._batches(images, sizes or [image.size for image in images]):
            for index, detections in zip(indices, self._detect_batch(batch, captions, owners), strict=True):
                kept = best_of_overlapping(detections, nms_iou)
                found[index] = [detection for detection in kept if detection.label]
        return found

    def _batches(
        self, images: Sequence[Image.Image], sizes: Sequence[Size]
    ) -> Iterator[tuple[list[int], list[Prepared]]]:
        """Pictures that are equally large as the model reads them, with their places in `images`."""
        groups: dict[torch.Size, list[tuple[int, Prepared]]] = defaultdict(list)
        for index, (image, size) in enumerate(zip(images, sizes, strict=True)):
            prepared = self._prepare(image, size)
            groups[prepared.pixels.shape].append((index, prepared))
        for rows in groups.values():
            yield [index for index, _ in rows], [prepared for _, prepared in rows]

    def _prepare(self, image: Image.Image, size: Size) -> Prepared:
        pixels = self.image_format.preprocess(image)
        height, width = pixels.shape[1:]
        padded_width, padded_height = self._padded(width, height)
        padded = nn.functional.pad(pixels, (0, padded_width - width, 0, padded_height - height))
        return Prepared(padded, (size[0] * padded_width / width, size[1] * padded_height / height), size)

    def _padded(self, width: int, height: int) -> Size:
        """The short edge grown until there are as many feature tokens as the model picks its queries from."""
        while sum(-(-width // s) * -(-height // s) for s in self._strides) < self.model.config.num_queries:
            step = self._strides[0]
            width, height = (width + step, height) if width < height else (width, height + step)
        return width, height

    def _detect_batch(
        self, batch: Sequence[Prepared], captions: Sequence[Caption], owners: Mapping[str, Label]
    ) -> list[list[Detection]]:
        pixel_values = torch.stack([prepared.pixels for prepared in batch]).to(self.device)
        found: list[list[Detection]] = [[] for _ in batch]
        for caption in captions:
            logits, boxes_cxcywh = self._forward(pixel_values, caption)
            scores, best = phrase_scores(logits, caption.spans).max(-1)
            labels = [owners[phrase] for phrase in caption.phrases]
            for i, prepared in enumerate(batch):
                found[i] += _detections(scores[i], best[i], boxes_cxcywh[i], prepared, labels)
        self.backbone.forget()
        return found

    @torch.inference_mode()
    def _forward(self, pixel_values: Tensor, caption: Caption) -> tuple[Tensor, Tensor]:
        """Token logits (pictures, queries, tokens) and boxes_cxcywh (pictures, queries, 4) in 0..1."""
        input_ids = torch.tensor([caption.input_ids] * len(pixel_values), device=self.device)
        output = self.model(pixel_values=pixel_values, input_ids=input_ids)
        return output.logits.float().cpu(), output.pred_boxes.float().cpu()


def _strides(config: Any) -> list[int]:
    """Pixels of a resized picture per feature token and axis, for each feature level."""
    backbone = config.backbone_config
    strides = [backbone.patch_size * 2 ** (stage - 1) for stage in backbone.out_indices]
    while len(strides) < config.num_feature_levels:
        strides.append(2 * strides[-1])
    return strides


def _detections(
    scores: Tensor, best: Tensor, boxes_cxcywh: Tensor, prepared: Prepared, labels: Sequence[Label]
) -> list[Detection]:
    """One picture's queries: scores and best phrases (queries,), boxes (queries, 4); one label for each phrase."""
    thresholds = torch.tensor([label.threshold for label in labels])
    return [
        Detection(clip(*cxcywh_to_xyxy(boxes_cxcywh[i].tolist(), *prepared.frame), *prepared.size), score, label.name)
        for i in (scores >= thresholds[best]).nonzero().flatten().tolist()
        for score, label in [(scores[i].item(), labels[int(best[i])])]
    ]

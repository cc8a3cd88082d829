"""Grounding DINO inference: preprocess, forward, postprocess.

The score of a phrase is the mean of the sigmoids over its token span, as in the reference implementation's evaluation
on COCO; the score of a label is the best of its phrases, and a box carries its best label.
"""

from __future__ import annotations

import logging
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from backend.boxes import Detection, clip, cxcywh_to_xyxy, non_max_suppression
from backend.detection.acceleration import accelerate
from backend.detection.captions import Caption, build_captions
from backend.detection.preprocess import ImageFormat, ModelInput, Size, prepare_image
from backend.errors import ImageError
from backend.labelstudio.labeling_config import Label
from backend.metrics import BATCH_IMAGES

log = logging.getLogger(__name__)

MAX_BATCH_SIZE = 16  # pictures; more keep an annotator waiting without being much faster each
BATCH_SECONDS = 1.0  # that a batch may take, for the same reason

NEGATIVE = "\0"  # the name of what is looked for only to be dropped; no label's
DetectionsOrError = list[Detection] | ImageError  # what is in one picture, or why it could not be looked at


def phrase_scores(logits: Tensor, spans: Sequence[tuple[int, int]]) -> Tensor:
    """Token logits (..., tokens) -> phrase scores (..., phrases) in 0..1."""
    probabilities = logits.sigmoid()
    return torch.stack([probabilities[..., start:end].mean(-1) for start, end in spans], dim=-1)


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
    """A model that answers for pictures of any shape and labels of any number; not thread-safe, but for `prepare`.

    It takes the model over: some of its parts are replaced by faster ones that cannot be trained or saved.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        image_format: ImageFormat,
        device: str = "cpu",
        precision: torch.dtype = torch.float32,
    ) -> None:
        self.model = model.to(device).eval()
        self.tokenizer = tokenizer
        self.image_format = image_format
        self.device = torch.device(device)
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)  # where Triton and pinned memory go
        self.precision = precision
        self.batch_size = MAX_BATCH_SIZE  # pictures in one forward pass, at most
        self.on_forward: Callable[[], object] = lambda: None  # called before every forward pass
        accelerate(self.model)
        self.backbone = SharedBackbone(model.model.backbone)
        self.model.model.backbone = self.backbone
        self._strides = _strides(model.config)

    def find_batch_size(self) -> int:
        """How many pictures a batch may hold: what takes a second and fits in memory. Also warms the model up."""
        labels, blank = [Label("object", ("object",), 0.5)], Image.new("RGB", (400, 300))
        seconds: list[float] = []
        while sum(seconds) < BATCH_SECONDS and len(seconds) < 3:  # the first also sets up what is set up lazily
            start = time.perf_counter()
            self.detect([blank], labels)
            seconds.append(time.perf_counter() - start)
        size = max(min(int(BATCH_SECONDS / min(seconds)), MAX_BATCH_SIZE), 1)
        while self.device.type != "cpu" and not self._fits([self.prepare(blank)] * size):
            size //= 2
        return size

    def _fits(self, batch: Sequence[ModelInput]) -> bool:
        try:
            self._forward(self._stacked(batch), self._captions(["object"])[0])
        except torch.OutOfMemoryError:
            return len(batch) == 1
        finally:
            self._free()
        return True

    def prepare(self, image: Image.Image, size: Size | None = None) -> ModelInput:
        """An RGB picture as the model reads it; `size` is the original's, where `image` is a reduced copy."""
        return prepare_image(image, size or image.size, self.image_format, self._strides, self.model.config.num_queries)

    def detect(
        self,
        images: Sequence[Image.Image],
        labels: Sequence[Label],
        negatives: Sequence[str] = (),
        nms_iou: float = 1.0,
    ) -> list[list[Detection]]:
        """As `detect_inputs`, for RGB pictures of any size.

        Raises:
            ImageError: a picture needs more memory than there is.
            LabelingConfigError: a phrase is longer than the model reads.
        """
        found = self.detect_inputs([self.prepare(image) for image in images], labels, negatives, nms_iou)
        for error in found:
            if isinstance(error, ImageError):
                raise error
        return found  # type: ignore[return-value]

    def detect_inputs(
        self,
        pictures: Sequence[ModelInput],
        labels: Sequence[Label],
        negatives: Sequence[str] = (),
        nms_iou: float = 1.0,
    ) -> list[DetectionsOrError]:
        """Boxes of `labels` in each picture, best first, one label a box, scores at or above the label's threshold.

        Args:
            pictures: only those of equal size share a batch: padding changes scores.
            labels: what to look for; a phrase that two labels share counts for the first.
            negatives: phrases that attract false boxes; a box that fits one of them best is dropped.
            nms_iou: of boxes whose IoU is above it only the best stays, whatever their labels.

        Returns:
            For each picture its boxes in pixels of the original, or why it could not be looked at.

        Raises:
            LabelingConfigError: a phrase is longer than the model reads.
        """
        lowest = min((label.threshold for label in labels), default=1.0)
        asked = [*labels, *(Label(NEGATIVE, (phrase,), lowest) for phrase in negatives)]
        owners = {phrase: label for label in reversed(asked) for phrase in label.phrases}
        captions = self._captions(list(dict.fromkeys(phrase for label in asked for phrase in label.phrases)))
        found: list[DetectionsOrError] = [[] for _ in pictures]
        for indices in _equal_sized(pictures, self.batch_size):
            answers = self._detect_batch([pictures[i] for i in indices], captions, owners)
            for i, answer in zip(indices, answers, strict=True):
                found[i] = answer if isinstance(answer, ImageError) else _best(answer, nms_iou)
        return found

    def _captions(self, phrases: Sequence[str]) -> list[Caption]:
        return build_captions(self.tokenizer, phrases, self.model.config.max_text_len)

    def _detect_batch(
        self, batch: Sequence[ModelInput], captions: Sequence[Caption], owners: Mapping[str, Label]
    ) -> list[DetectionsOrError]:
        """All boxes of each picture; where memory runs out, of half the batch after the other."""
        try:
            return list(self._detect_together(batch, captions, owners))
        except torch.OutOfMemoryError:
            self._free()
        if len(batch) == 1:
            return [ImageError(f"the picture needs more memory than {self.device} has; give it another DEVICE")]
        log.warning("%s is out of memory with %d pictures; going on with half of them", self.device, len(batch))
        half = len(batch) // 2
        return [f for part in (batch[:half], batch[half:]) for f in self._detect_batch(part, captions, owners)]

    def _detect_together(
        self, batch: Sequence[ModelInput], captions: Sequence[Caption], owners: Mapping[str, Label]
    ) -> list[list[Detection]]:
        pixel_values = self._stacked(batch)
        BATCH_IMAGES.observe(len(batch))
        found: list[list[Detection]] = [[] for _ in batch]
        for caption in captions:
            logits, boxes_cxcywh = self._forward(pixel_values, caption)
            scores, best = phrase_scores(logits, caption.spans).max(-1)
            labels = [owners[phrase] for phrase in caption.phrases]
            for i, prepared in enumerate(batch):
                found[i] += _detections(scores[i], best[i], boxes_cxcywh[i], prepared, labels)
        self.backbone.forget()
        return found

    def _stacked(self, batch: Sequence[ModelInput]) -> Tensor:
        """Pixel values (pictures, 3, height, width) on the device."""
        stacked = torch.stack([prepared.pixels for prepared in batch])
        if self.device.type == "cuda":
            stacked = stacked.pin_memory()  # copied while the processor goes on
        return stacked.to(self.device, non_blocking=True)

    def _free(self) -> None:
        self.backbone.forget()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    @torch.inference_mode()
    def _forward(self, pixel_values: Tensor, caption: Caption) -> tuple[Tensor, Tensor]:
        """Token logits (pictures, queries, tokens) and boxes_cxcywh (pictures, queries, 4) in 0..1, on the CPU."""
        self.on_forward()
        input_ids = torch.tensor([caption.input_ids] * len(pixel_values), device=self.device)
        with torch.autocast(self.device.type, self.precision, enabled=self.precision is not torch.float32):
            output = self.model(pixel_values=pixel_values, input_ids=input_ids)
        logits, boxes = output.logits.float().cpu(), output.pred_boxes.float().cpu()
        if self.precision is not torch.float32 and (logits.isnan().any() or boxes.isnan().any()):
            log.warning("this checkpoint leaves the range of %s; going on in float32", self.precision)
            self.precision = torch.float32
            self.backbone.forget()
            return self._forward(pixel_values, caption)
        return logits, boxes


def _strides(config: Any) -> list[int]:
    """Pixels of a resized picture per feature token and axis, for each feature level."""
    backbone = config.backbone_config
    strides = [backbone.patch_size * 2 ** (stage - 1) for stage in backbone.out_indices]
    while len(strides) < config.num_feature_levels:
        strides.append(2 * strides[-1])
    return strides


def _equal_sized(pictures: Sequence[ModelInput], most: int) -> Iterator[list[int]]:
    """Places of pictures that are equally large as the model reads them, up to `most` at a time."""
    groups: dict[torch.Size, list[int]] = defaultdict(list)
    for i, prepared in enumerate(pictures):
        groups[prepared.pixels.shape].append(i)
    for places in groups.values():
        yield from (places[i : i + most] for i in range(0, len(places), most))


def _best(detections: Sequence[Detection], nms_iou: float) -> list[Detection]:
    return [detection for detection in non_max_suppression(detections, nms_iou) if detection.label != NEGATIVE]


def _detections(
    scores: Tensor, best: Tensor, boxes_cxcywh: Tensor, prepared: ModelInput, labels: Sequence[Label]
) -> list[Detection]:
    """One picture's queries: scores and best phrases (queries,), boxes (queries, 4); one label for each phrase."""
    thresholds = torch.tensor([label.threshold for label in labels])
    return [
        Detection(clip(*cxcywh_to_xyxy(boxes_cxcywh[i].tolist(), *prepared.frame), *prepared.size), score, label.name)
        for i in (scores >= thresholds[best]).nonzero().flatten().tolist()
        for score, label in [(scores[i].item(), labels[int(best[i])])]
    ]

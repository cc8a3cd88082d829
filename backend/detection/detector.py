"""Grounding DINO inference: images and labels in, detections out.

The score of a phrase is the mean of the sigmoids over its token span, as in the reference implementation's evaluation
on COCO. The score of a label is that of its best phrase, and a box gets its best label.
"""

from __future__ import annotations

import logging
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from backend.boxes import Detection, clip_box, cxcywh_to_xyxy, non_max_suppression
from backend.detection.acceleration import accelerate
from backend.detection.captions import Caption, build_captions
from backend.detection.device import with_index
from backend.detection.preprocess import ImageFormat, ModelInput, Size, make_model_input
from backend.errors import ImageError
from backend.labelstudio.labeling_config import Label
from backend.metrics import BATCH_IMAGES

log = logging.getLogger(__name__)

MAX_BATCH_SIZE = 16  # images; in larger batches an annotator waits longer and an image is hardly faster
MAX_BATCH_SECONDS = 1.0  # duration of one forward pass, for the same reason
MAX_TIMED_PASSES = 3  # passes that find_batch_size measures

DetectionsOrError = list[Detection] | ImageError  # of one image


@dataclass(frozen=True)
class NegativeLabel(Label):
    """A negative phrase as a label: its boxes become `NegativeDetection`."""


@dataclass(frozen=True)
class NegativeDetection(Detection):
    """A box that fits a negative phrase best: it takes part in non-maximum suppression and is then dropped."""


def phrase_scores(logits: Tensor, spans: Sequence[tuple[int, int]]) -> Tensor:
    """Computes phrase scores (..., phrases) in 0..1 from token logits (..., tokens)."""
    probabilities = logits.sigmoid()
    return torch.stack([probabilities[..., start:end].mean(-1) for start, end in spans], dim=-1)


class SharedBackbone(nn.Module):
    """Wraps the image backbone so that all captions of a batch share one pass through it."""

    def __init__(self, backbone: Any) -> None:
        super().__init__()
        self.backbone, self.position_embedding = backbone, backbone.position_embedding
        self._pixels: Tensor | None = None
        self._features: tuple[list[Any], list[Any]] = ([], [])

    def forward(self, pixel_values: Tensor, pixel_mask: Tensor) -> tuple[list[Any], list[Any]]:
        """Returns what the backbone returns; computes it only if `pixel_values` is another tensor object."""
        if self._pixels is not pixel_values:
            self._pixels, self._features = pixel_values, self.backbone(pixel_values, pixel_mask)
        return list(self._features[0]), list(self._features[1])  # copies: the model appends to them

    def clear(self) -> None:
        """Frees the features of the last batch."""
        self._pixels, self._features = None, ([], [])


class Detector:
    """Grounding DINO on one device, for images of any size and any number of labels.

    Not thread-safe, except for `prepare_image`. Takes the model over: some of its modules are replaced by faster ones
    that can be neither trained nor saved.

    Attributes:
        device: where the model runs; a GPU always has its index.
        precision: of the modules that tolerate a reduced one; set to float32 at the first NaN.
        batch_size: maximum number of images in one forward pass.
        on_forward: called before each forward pass.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        image_format: ImageFormat,
        device: str = "cpu",
        precision: torch.dtype = torch.float32,
    ) -> None:
        self.device = with_index(device)
        self.model = model.to(self.device).eval()
        self.tokenizer = tokenizer
        self.image_format = image_format
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)  # Triton and pinned memory use the current device
        self.precision = precision
        self.batch_size = MAX_BATCH_SIZE
        self.on_forward: Callable[[], object] = lambda: None
        accelerate(self.model)
        self.backbone = SharedBackbone(model.model.backbone)
        self.model.model.backbone = self.backbone
        self._strides = _compute_strides(model.config)

    def find_batch_size(self) -> int:
        """Finds the largest batch that fits in memory and takes about a second at most; also warms the model up.

        It is measured on a blank image with one short phrase; larger images may need smaller batches.
        """
        labels, blank = [Label("object", ("object",), 0.5)], Image.new("RGB", (400, 300))
        self.detect([blank], labels)  # not timed: the first pass loads libraries and compiles kernels
        seconds: list[float] = []
        while sum(seconds) < MAX_BATCH_SECONDS and len(seconds) < MAX_TIMED_PASSES:
            start = time.perf_counter()
            self.detect([blank], labels)
            seconds.append(time.perf_counter() - start)
        size = max(min(int(MAX_BATCH_SECONDS / min(seconds)), MAX_BATCH_SIZE), 1)
        if self.device.type == "cpu":
            return size
        model_input, caption = self.prepare_image(blank), self._build_captions(["object"])[0]
        while size > 1:
            try:
                self._forward(self._stack_pixels([model_input] * size), caption)
                break
            except torch.OutOfMemoryError:
                size //= 2
            finally:
                self._free_memory()
        return size

    def prepare_image(self, image: Image.Image, size: Size | None = None) -> ModelInput:
        """Preprocesses an RGB image.

        Args:
            image: the original or a reduced copy of it.
            size: width and height of the original in pixels, if `image` is a reduced copy.
        """
        min_tokens = self.model.config.num_queries
        return make_model_input(image, size or image.size, self.image_format, self._strides, min_tokens)

    def detect(
        self,
        images: Sequence[Image.Image],
        labels: Sequence[Label],
        negative_phrases: Sequence[str] = (),
        nms_iou: float = 1.0,
    ) -> list[list[Detection]]:
        """Detects objects on RGB images of any size; arguments and order as for `detect_inputs`.

        Raises:
            ImageError: an image does not fit in memory.
            LabelingConfigError: a phrase is longer than a caption may be.
        """
        inputs = [self.prepare_image(image) for image in images]
        all_detections: list[list[Detection]] = []
        for detections in self.detect_inputs(inputs, labels, negative_phrases, nms_iou):
            if isinstance(detections, ImageError):
                raise detections
            all_detections.append(detections)
        return all_detections

    def detect_inputs(
        self,
        inputs: Sequence[ModelInput],
        labels: Sequence[Label],
        negative_phrases: Sequence[str] = (),
        nms_iou: float = 1.0,
    ) -> list[DetectionsOrError]:
        """Detects objects on prepared images.

        Args:
            inputs: prepared images. Only equal-sized ones share a batch, because padding would change scores.
            labels: what to detect; a phrase that two labels share counts for the first.
            negative_phrases: phrases that attract false boxes; a box that fits one of them best is dropped.
            nms_iou: maximum IoU of two boxes of an image, whatever their labels; of two that overlap more, the better
                stays. 1 keeps all.

        Returns:
            For each image its detections, best first, with boxes in pixels of the original, one label per box and
            scores at or above the label's threshold; or an error if the image does not fit in memory.

        Raises:
            LabelingConfigError: a phrase is longer than a caption may be.
        """
        min_threshold = min((label.threshold for label in labels), default=1.0)
        negatives = [NegativeLabel(phrase, (phrase,), min_threshold) for phrase in negative_phrases]
        label_by_phrase: dict[str, Label] = {}
        for label in (*labels, *negatives):
            for phrase in label.phrases:
                label_by_phrase.setdefault(phrase, label)
        captions = self._build_captions(list(label_by_phrase))
        results: dict[int, DetectionsOrError] = {}
        for indices in _group_by_size(inputs, self.batch_size):
            batch = {index: inputs[index] for index in indices}
            results.update(self._detect_batch(batch, captions, label_by_phrase))
        return [_suppress(results[index], nms_iou) for index in range(len(inputs))]

    def _build_captions(self, phrases: Sequence[str]) -> list[Caption]:
        return build_captions(self.tokenizer, phrases, self.model.config.max_text_len)

    def _detect_batch(
        self, batch: Mapping[int, ModelInput], captions: Sequence[Caption], label_by_phrase: Mapping[str, Label]
    ) -> Mapping[int, DetectionsOrError]:
        """Detects on equal-sized images by their index; if memory runs out, on each half of them in turn."""
        try:
            return self._detect_together(batch, captions, label_by_phrase)
        except torch.OutOfMemoryError:
            self._free_memory()
        if len(batch) == 1:
            error = ImageError(f"the image needs more memory than {self.device} has; give it another DEVICE")
            return dict.fromkeys(batch, error)
        log.warning("%s is out of memory with a batch of %d images; retrying with half", self.device, len(batch))
        indices, half = list(batch), len(batch) // 2
        results: dict[int, DetectionsOrError] = {}
        for half_indices in (indices[:half], indices[half:]):
            half_batch = {index: batch[index] for index in half_indices}
            results.update(self._detect_batch(half_batch, captions, label_by_phrase))
        return results

    def _detect_together(
        self, batch: Mapping[int, ModelInput], captions: Sequence[Caption], label_by_phrase: Mapping[str, Label]
    ) -> dict[int, list[Detection]]:
        """Runs one forward pass per caption over equal-sized images; returns the detections by index."""
        pixel_values = self._stack_pixels(list(batch.values()))
        BATCH_IMAGES.observe(len(batch))
        detections: dict[int, list[Detection]] = {index: [] for index in batch}
        for caption in captions:
            logits, boxes_cxcywh = self._forward(pixel_values, caption)
            scores, best = phrase_scores(logits, caption.spans).max(-1)
            labels = [label_by_phrase[phrase] for phrase in caption.phrases]
            for row, (index, model_input) in enumerate(batch.items()):
                detections[index] += _to_detections(scores[row], best[row], boxes_cxcywh[row], model_input, labels)
        self.backbone.clear()
        return detections

    def _stack_pixels(self, batch: Sequence[ModelInput]) -> Tensor:
        """Returns pixel values (images, 3, height, width) on the device."""
        pixel_values = torch.stack([model_input.pixels for model_input in batch])
        if self.device.type == "cuda":
            pixel_values = pixel_values.pin_memory()  # so that the copy is asynchronous
        return pixel_values.to(self.device, non_blocking=True)

    def _free_memory(self) -> None:
        self.backbone.clear()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    @torch.inference_mode()
    def _forward(self, pixel_values: Tensor, caption: Caption) -> tuple[Tensor, Tensor]:
        """Returns token logits (images, queries, tokens) and boxes_cxcywh (images, queries, 4) in 0..1, on the CPU."""
        self.on_forward()
        input_ids = torch.tensor([caption.input_ids] * len(pixel_values), device=self.device)
        with torch.autocast(self.device.type, self.precision, enabled=self.precision is not torch.float32):
            output = self.model(pixel_values=pixel_values, input_ids=input_ids)
        logits, boxes_cxcywh = output.logits.float().cpu(), output.pred_boxes.float().cpu()
        if self.precision is not torch.float32 and (logits.isnan().any() or boxes_cxcywh.isnan().any()):
            log.warning("this checkpoint gives NaN in %s; falling back to float32", self.precision)
            self.precision = torch.float32
            self.backbone.clear()
            return self._forward(pixel_values, caption)
        return logits, boxes_cxcywh


def _compute_strides(config: Any) -> list[int]:
    """Returns the pixels of a resized image per feature token and axis, for each feature level."""
    backbone = config.backbone_config
    strides = [backbone.patch_size * 2 ** (stage - 1) for stage in backbone.out_indices]
    while len(strides) < config.num_feature_levels:
        strides.append(2 * strides[-1])
    return strides


def _group_by_size(inputs: Sequence[ModelInput], max_batch_size: int) -> Iterator[list[int]]:
    """Yields the indices of inputs that are equally large after preprocessing, up to `max_batch_size` at a time."""
    groups: dict[torch.Size, list[int]] = defaultdict(list)
    for index, model_input in enumerate(inputs):
        groups[model_input.pixels.shape].append(index)
    for indices in groups.values():
        yield from (indices[i : i + max_batch_size] for i in range(0, len(indices), max_batch_size))


def _suppress(detections: DetectionsOrError, nms_iou: float) -> DetectionsOrError:
    """Applies non-maximum suppression to the detections of one image, then drops the negative ones."""
    if isinstance(detections, ImageError):
        return detections
    return [d for d in non_max_suppression(detections, nms_iou) if not isinstance(d, NegativeDetection)]


def _to_detections(
    scores: Tensor, best: Tensor, boxes_cxcywh: Tensor, model_input: ModelInput, labels: Sequence[Label]
) -> list[Detection]:
    """Converts the queries of one image and one caption to detections at or above their label's threshold.

    Args:
        scores: (queries,), of the best phrase.
        best: (queries,), index of the best phrase.
        boxes_cxcywh: (queries, 4), relative to the padded image.
        model_input: the image.
        labels: one for each phrase of the caption.
    """
    thresholds = torch.tensor([label.threshold for label in labels])
    detections: list[Detection] = []
    for query in (scores >= thresholds[best]).nonzero().flatten().tolist():
        box_xyxy = cxcywh_to_xyxy(boxes_cxcywh[query].tolist(), *model_input.padded_size)
        label = labels[int(best[query])]
        kind = NegativeDetection if isinstance(label, NegativeLabel) else Detection
        detections.append(kind(clip_box(*box_xyxy, *model_input.size), scores[query].item(), label.name))
    return detections

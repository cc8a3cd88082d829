"""Grounding DINO inference: images and labels in, detections out.

The score of a phrase is the mean of the sigmoids over its token span, as in the reference implementation's evaluation
on COCO. The score of a label is that of its best phrase, and a box gets its best label.
"""

from __future__ import annotations

import logging
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor

from backend.boxes import Detection
from backend.detection.acceleration import accelerate, reduce_weights, restore_weights
from backend.detection.captions import Caption, build_captions
from backend.detection.cuda_graphs import CAPTURE_AT
from backend.detection.device import with_index
from backend.detection.forward_pass import ForwardPass, ImageFeatures, compute_strides
from backend.detection.phrase_scores import phrase_scores
from backend.detection.postprocess import Candidates, find_candidates, make_detections
from backend.detection.preprocess import ImageFormat, ModelInput, Size, make_model_input
from backend.errors import ImageError
from backend.labelstudio.labeling_config import Label
from backend.metrics import BATCH_IMAGES

log = logging.getLogger(__name__)

MAX_BATCH_SIZE = 16  # images; in larger batches an annotator waits longer and an image is hardly faster
MAX_BATCH_SECONDS = 1.0  # duration of one forward pass, for the same reason
MAX_TIMED_PASSES = 3  # passes that find_batch_size measures

DetectionsOrError = list[Detection] | ImageError  # of one image


class CaptionScores(NamedTuple):
    """What a caption found on a batch of images; on the CPU.

    Attributes:
        caption: the caption.
        scores: (images, queries), of the best phrase.
        best: (images, queries), index of the best phrase.
        boxes_cxcywh: (images, queries, 4), relative to the padded images.
    """

    caption: Caption
    scores: Tensor
    best: Tensor
    boxes_cxcywh: Tensor


class PhraseQuery(NamedTuple):
    """What to look for on all images of a call.

    Attributes:
        captions: with all phrases.
        label_by_phrase: index of the label of each phrase.
        thresholds: (labels,), scores that a box has to reach.
    """

    captions: Sequence[Caption]
    label_by_phrase: Mapping[str, int]
    thresholds: Tensor


class Detector:
    """Grounding DINO on one device, for images of any size and any number of labels.

    Not thread-safe, except for `prepare_image`. Takes the model over: some of its modules are replaced by faster ones
    that can be neither trained nor saved.

    Attributes:
        device: where the model runs; a GPU always has its index.
        precision: of autocast; float32 where it is not used, on a CPU always. Set to float32 at the first NaN.
        batch_size: maximum number of images in one forward pass.
        on_forward: called before each forward pass.
        on_out_of_memory: called when memory ran out; others on the device may free theirs.
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
        self.model = model.to(self.device).eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.image_format = image_format
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)  # Triton and pinned memory use the current device
        self.batch_size = MAX_BATCH_SIZE
        self.on_forward: Callable[[], object] = lambda: None
        self.on_out_of_memory: Callable[[], object] = lambda: None
        self.precision = accelerate(self.model, precision)
        self._full_weights = reduce_weights(self.model, self.precision)
        self._strides = compute_strides(model.config)
        self.forward_pass = ForwardPass(self.model, image_format, self._strides)

    def find_batch_size(self) -> int:
        """Finds the largest batch that fits in memory and takes about a second at most; also warms the model up.

        It is measured on a blank image with one short phrase; larger images may need smaller batches.
        """
        labels, blank = [Label("object", ("object",), 0.5)], Image.new("RGB", (400, 300))
        # Not timed: the first pass loads libraries and compiles kernels, a later one captures CUDA graphs.
        for _ in range(CAPTURE_AT if self.forward_pass.batches_captions else 1):
            self.detect([blank], labels)
        seconds: list[float] = []
        while sum(seconds) < MAX_BATCH_SECONDS and len(seconds) < MAX_TIMED_PASSES:
            start = time.perf_counter()
            self.detect([blank], labels)
            seconds.append(time.perf_counter() - start)
        size = max(min(int(MAX_BATCH_SECONDS / min(seconds)), MAX_BATCH_SIZE), 1)
        if self.device.type == "cpu":
            return size
        while size > 1 and not self._fits(self.prepare_image(blank), size):
            size //= 2
        return size

    def _fits(self, model_input: ModelInput, batch_size: int) -> bool:
        """Returns whether a batch of one image fits in memory."""
        captions, fits = self._build_captions(["object"]), True
        try:
            self._score([model_input] * batch_size, captions)
        except torch.OutOfMemoryError:
            fits = False
        self._free_memory()  # not before the error is gone: its traceback holds tensors
        return fits

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
        phrases: dict[str, int] = {}  # with the index of their label; those of negative phrases come after the labels
        for index, of_label in enumerate([*(label.phrases for label in labels), *((p,) for p in negative_phrases)]):
            for phrase in of_label:
                phrases.setdefault(phrase, index)
        thresholds = [*(label.threshold for label in labels), *(min_threshold for _ in negative_phrases)]
        query = PhraseQuery(self._build_captions(list(phrases)), phrases, torch.tensor(thresholds))
        results: dict[int, list[Candidates] | ImageError] = {}
        for indices in _group_by_size(inputs, self.batch_size):
            batch = {index: inputs[index] for index in indices}
            results.update(self._detect_batch(batch, query, self.batch_size))
        return [
            found if isinstance(found, ImageError) else make_detections(found, labels, nms_iou)
            for _, found in sorted(results.items())
        ]

    def _build_captions(self, phrases: Sequence[str]) -> list[Caption]:
        return build_captions(self.tokenizer, phrases, self.model.config.max_text_len)

    def _detect_batch(
        self, batch: Mapping[int, ModelInput], query: PhraseQuery, max_rows: int
    ) -> dict[int, list[Candidates] | ImageError]:
        """Detects on equal-sized images by their index; if memory runs out, on each half of them in turn.

        `max_rows` limits images x captions of a pass. They are halved too, where a single image is left.
        """
        try:
            return {**self._detect_together(batch, query, max_rows)}
        except torch.OutOfMemoryError:
            pass  # its traceback holds tensors
        self._free_memory()
        self.on_out_of_memory()
        captions = len(query.captions) if self.forward_pass.batches_captions else 1  # of a pass, at most
        max_rows = min(max_rows, len(batch) * captions)
        if max_rows == 1:
            error = ImageError(f"the image needs more memory than {self.device} has; give it another DEVICE")
            return dict.fromkeys(batch, error)
        what = f"a batch of {len(batch)} images" if len(batch) > 1 else f"an image and {max_rows} captions"
        log.warning("%s is out of memory with %s; retrying with half", self.device, what)
        indices, half = list(batch), len(batch) // 2
        results: dict[int, list[Candidates] | ImageError] = {}
        for half_indices in filter(None, (indices[:half], indices[half:])):
            half_batch = {index: batch[index] for index in half_indices}
            results.update(self._detect_batch(half_batch, query, max(max_rows // 2, 1)))
        return results

    def _detect_together(
        self, batch: Mapping[int, ModelInput], query: PhraseQuery, max_rows: int
    ) -> dict[int, list[Candidates]]:
        """Runs all captions over equal-sized images; returns the candidates of each caption by index."""
        BATCH_IMAGES.observe(len(batch))
        candidates: dict[int, list[Candidates]] = {index: [] for index in batch}
        for caption, scores, best, boxes in self._score(list(batch.values()), query.captions, max_rows):
            labels = torch.tensor([query.label_by_phrase[phrase] for phrase in caption.phrases])
            for row, (index, model_input) in enumerate(batch.items()):
                found = find_candidates(scores[row], best[row], boxes[row], model_input, labels, query.thresholds)
                candidates[index].append(found)
        return candidates

    @torch.inference_mode()
    def _score(
        self, batch: Sequence[ModelInput], captions: Sequence[Caption], max_rows: int = 1
    ) -> list[CaptionScores]:
        """Scores each caption on equal-sized images, up to `max_rows` images x captions in a pass."""
        size = max(max_rows // len(batch), 1) if self.forward_pass.batches_captions else 1  # captions of a pass
        groups = [captions[start : start + size] for start in range(0, len(captions), size)]
        pixels = self._stack_pixels(batch)
        results: list[CaptionScores] = []
        images: ImageFeatures | None = None
        for group in groups:
            self.on_forward()
            reduced = self.precision is not torch.float32
            # No cache: it would keep tensors whose memory a CUDA graph reuses, and the weights are converted already.
            with torch.autocast(self.device.type, self.precision, enabled=reduced, cache_enabled=False):
                images = images or self.forward_pass.encode_images(pixels)
                text = self.forward_pass.encode_text(group)
                logits, boxes_cxcywh = self.forward_pass.detect(images, text)
            all_scores, boxes_cxcywh = phrase_scores(logits, text.span_matrix), boxes_cxcywh.cpu()
            for i, caption in enumerate(group):
                scores, best = all_scores[:, i, :, : len(caption.phrases)].max(-1)
                results.append(CaptionScores(caption, scores.cpu(), best.cpu(), boxes_cxcywh[:, i]))
            if reduced and any(row.scores.isnan().any() or row.boxes_cxcywh.isnan().any() for row in results):
                self._fall_back_to_float32()
                return self._score(batch, captions, max_rows)
        return results

    def _stack_pixels(self, batch: Sequence[ModelInput]) -> Tensor:
        """Returns pixels, uint8 (images, height, width, 3), on the device."""
        is_on_gpu = self.device.type == "cuda"
        # A GPU copies from pinned memory while this thread goes on.
        pixels = torch.empty(len(batch), *batch[0].pixels.shape, dtype=torch.uint8, pin_memory=is_on_gpu)
        torch.stack([model_input.pixels for model_input in batch], out=pixels)
        return pixels.to(self.device, non_blocking=True)

    def _fall_back_to_float32(self) -> None:
        log.warning("this checkpoint gives NaN in %s; falling back to float32", self.precision)
        restore_weights(self.model, self._full_weights)
        self.precision, self._full_weights = torch.float32, {}
        self.forward_pass.clear()

    def _free_memory(self) -> None:
        self.forward_pass.clear()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


def _group_by_size(inputs: Sequence[ModelInput], max_batch_size: int) -> Iterator[list[int]]:
    """Yields the indices of inputs that are equally large after preprocessing, up to `max_batch_size` at a time."""
    groups: dict[torch.Size, list[int]] = defaultdict(list)
    for index, model_input in enumerate(inputs):
        groups[model_input.pixels.shape].append(index)
    for indices in groups.values():
        yield from (indices[i : i + max_batch_size] for i in range(0, len(indices), max_batch_size))

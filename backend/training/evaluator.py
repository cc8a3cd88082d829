"""An evaluator: examples on which detectors are compared and thresholds are calibrated."""

from __future__ import annotations

import dataclasses
import functools
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from backend.boxes import Detection
from backend.detection.detector import Detector
from backend.labelstudio.targets import DetectionQuery
from backend.training.batches import ImageProvider
from backend.training.calibration import MIN_SCORE, calibrate, cross_calibrate
from backend.training.dataset import Example, Split
from backend.training.evaluation import EvalResult, Predictions, Thresholds, Truth

IMAGES_PER_CALL = 16

ThresholdsByControl = dict[str, dict[str, float]]  # control -> label -> threshold


@dataclass(frozen=True)
class Evaluator:
    """Examples and their images. Predictions, truth and thresholds are lists in the order of the examples.

    Attributes:
        examples: what to evaluate on.
        images: of the examples.
        labels: by control, the names of the labels that may get other thresholds.
    """

    examples: Sequence[Example]
    images: ImageProvider
    labels: Mapping[str, Collection[str]]

    @functools.cached_property
    def truth(self) -> Truth:
        """The true boxes in pixels."""
        truth = []
        for example in self.examples:
            width, height = self.images.load_input(example.target.uri).size
            boxes = [
                ((x1 * width, y1 * height, x2 * width, y2 * height), label) for (x1, y1, x2, y2), label in example.truth
            ]
            truth.append(boxes)
        return truth

    @functools.cached_property
    def current_thresholds(self) -> list[Thresholds]:
        """The thresholds of the serving version."""
        return [{label.name: label.threshold for label in e.target.query.labels} for e in self.examples]

    def predict(self, detector: Detector) -> Predictions:
        """Runs a detector on the examples, with `MIN_SCORE` as the threshold of all labels."""
        indices_by_query: dict[DetectionQuery, list[int]] = defaultdict(list)
        for i, example in enumerate(self.examples):
            indices_by_query[example.target.query].append(i)
        predictions: list[list[Detection]] = [[] for _ in self.examples]
        for query, indices in indices_by_query.items():
            labels = [dataclasses.replace(label, threshold=MIN_SCORE) for label in query.labels]
            for start in range(0, len(indices), IMAGES_PER_CALL):
                batch = indices[start : start + IMAGES_PER_CALL]
                images = [self.images.load_input(self.examples[i].target.uri) for i in batch]
                results = detector.detect_inputs(images, labels, query.negative_phrases, query.nms_iou)
                for i, detections in zip(batch, results, strict=True):
                    predictions[i] = detections if isinstance(detections, list) else []
        return predictions

    def evaluate(
        self, predictions: Predictions, thresholds: Sequence[Thresholds], split: Split | None = None
    ) -> EvalResult:
        """Evaluates predictions on all examples, or on those of one split."""
        indices = [i for i, example in enumerate(self.examples) if split in (None, example.split)]
        return EvalResult(
            [predictions[i] for i in indices], [self.truth[i] for i in indices], [thresholds[i] for i in indices]
        )

    def calibrate(self, predictions: Predictions) -> ThresholdsByControl:
        """Chooses the best thresholds of each control."""
        thresholds = {}
        for control, indices in self._group_by_control().items():
            chosen = calibrate(*self._select(predictions, indices))
            thresholds[control] = self._drop_fixed(control, chosen)
        return thresholds

    def cross_calibrate(self, predictions: Predictions) -> list[Thresholds]:
        """Chooses thresholds for each example without that example, to evaluate calibration fairly."""
        thresholds = list(self.current_thresholds)
        for control, indices in self._group_by_control().items():
            chosen = cross_calibrate(*self._select(predictions, indices))
            for i, chosen_for_example in zip(indices, chosen, strict=True):
                thresholds[i] = {**self.current_thresholds[i], **self._drop_fixed(control, chosen_for_example)}
        return thresholds

    def _group_by_control(self) -> dict[str, list[int]]:
        """Returns the indices of the examples of each control."""
        indices: dict[str, list[int]] = defaultdict(list)
        for i, example in enumerate(self.examples):
            indices[example.target.control_name].append(i)
        return indices

    def _select(self, predictions: Predictions, indices: Sequence[int]) -> tuple[Predictions, Truth, Thresholds]:
        """Returns predictions and truth of some examples, and the current thresholds of all their labels."""
        current = {label: threshold for i in indices for label, threshold in self.current_thresholds[i].items()}
        return [predictions[i] for i in indices], [self.truth[i] for i in indices], current

    def _drop_fixed(self, control: str, thresholds: Thresholds) -> dict[str, float]:
        """Returns the thresholds of those labels that may get another one."""
        return {label: threshold for label, threshold in thresholds.items() if label in self.labels.get(control, ())}

"""Examples that a detector is judged by: what it finds, against what annotators left, and the thresholds that suit."""

from __future__ import annotations

import dataclasses
import functools
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from backend.boxes import Box, Detection
from backend.detection.detector import Detector
from backend.training.batches import ImageProvider
from backend.training.calibration import MIN_SCORE, calibrate, cross_calibrated
from backend.training.dataset import Example
from backend.training.evaluation import EvalResult, Predictions, Truth

IMAGES_PER_CALL = 16  # pictures looked at together

Thresholds = dict[str, dict[str, float]]  # control -> label -> threshold


@dataclass(frozen=True)
class Evaluator:
    """Examples with their pictures; `labels` by control are those that may get other thresholds."""

    examples: Sequence[Example]
    pictures: ImageProvider
    labels: Mapping[str, Collection[str]]

    @functools.cached_property
    def truth(self) -> Truth:
        """The true boxes in pixels."""
        sizes = [self.pictures.get(example.view.uri).size for example in self.examples]
        return [
            [(_in_pixels(box, size), label) for box, label in example.truth]
            for example, size in zip(self.examples, sizes, strict=True)
        ]

    @functools.cached_property
    def present(self) -> list[Mapping[str, float]]:
        """The thresholds that serve now, for each example."""
        return [{label.name: label.threshold for label in e.view.query.labels} for e in self.examples]

    def take(self, detector: Detector) -> Predictions:
        """What a detector finds, down to the lowest score that a threshold may have."""
        by_asked: dict[Any, list[int]] = defaultdict(list)
        for i, example in enumerate(self.examples):
            by_asked[example.view.query].append(i)
        found: list[list[Detection]] = [[] for _ in self.examples]
        for asked, places in by_asked.items():
            labels = [dataclasses.replace(label, threshold=MIN_SCORE) for label in asked.labels]
            for start in range(0, len(places), IMAGES_PER_CALL):
                piece = places[start : start + IMAGES_PER_CALL]
                shown = [self.pictures.get(self.examples[i].view.uri) for i in piece]
                answers = detector.detect_inputs(shown, labels, asked.negatives, asked.nms_iou)
                for i, answer in zip(piece, answers, strict=True):
                    found[i] = answer if isinstance(answer, list) else []
        return found

    def evaluate(self, found: Predictions, thresholds: Sequence[Mapping[str, float]], part: str = "") -> EvalResult:
        """The examples with these thresholds, or only those of one part."""
        rows = [i for i, example in enumerate(self.examples) if part in ("", example.part)]
        return EvalResult([found[i] for i in rows], [self.truth[i] for i in rows], [thresholds[i] for i in rows])

    def calibrate(self, found: Predictions) -> Thresholds:
        """The thresholds that suit best, by control."""
        return {
            control: self._own(control, calibrate(*self._of(places, found), self._now(places)))
            for control, places in self._by_control().items()
        }

    def cross_calibrate(self, found: Predictions) -> list[Mapping[str, float]]:
        """For each example thresholds that were chosen without it."""
        thresholds = list(self.present)
        for control, places in self._by_control().items():
            crossed = cross_calibrated(*self._of(places, found), self._now(places))
            for i, chosen in zip(places, crossed, strict=True):
                thresholds[i] = {**self.present[i], **self._own(control, chosen)}
        return thresholds

    def _by_control(self) -> dict[str, list[int]]:
        places: dict[str, list[int]] = defaultdict(list)
        for i, example in enumerate(self.examples):
            places[example.view.control].append(i)
        return places

    def _of(self, places: Sequence[int], found: Predictions) -> tuple[Predictions, Truth]:
        return [found[i] for i in places], [self.truth[i] for i in places]

    def _now(self, places: Sequence[int]) -> dict[str, float]:
        return {label: threshold for i in places for label, threshold in self.present[i].items()}

    def _own(self, control: str, thresholds: Mapping[str, float]) -> dict[str, float]:
        return {label: threshold for label, threshold in thresholds.items() if label in self.labels.get(control, ())}


def _in_pixels(box: Box, size: tuple[int, int]) -> Box:
    return box[0] * size[0], box[1] * size[1], box[2] * size[0], box[3] * size[1]

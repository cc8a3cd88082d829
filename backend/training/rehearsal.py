"""Pseudo-labels: examples of what the base model already knows. Training on them too keeps it from forgetting.

The base model detects words of its vocabulary, and pairs of the detected words, on the images of the new examples.
Its detections become the truth of further examples (Li and Hoiem, "Learning without forgetting", 2016).
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from backend.detection.detector import Detector
from backend.detection.preprocess import ModelInput
from backend.labelstudio.labeling_config import Label
from backend.labelstudio.targets import DetectionQuery
from backend.training.batches import ImageProvider
from backend.training.dataset import Example

MAX_IMAGES = 300
MIN_PSEUDO_LABEL_SCORE = 0.3
MAX_WORDS, MAX_PAIRS = 60, 40  # tried on an image
PHRASES_PER_PASS = 6  # each box has only its best phrase; with fewer phrases, fewer of them hide one another
MAX_PHRASES = 8  # of an example
EXAMPLES_PER_IMAGE = 3
SMALL_VOCABULARY = 2000  # words; of a larger vocabulary, only common words are likely to be on images

COMMON_WORDS = (Path(__file__).parent / "rehearsal_vocabulary.txt").read_text().split()

T = TypeVar("T")


def choose_vocabulary(tokenizer: Any) -> list[str]:
    """Returns words that are one token: all of a small vocabulary, the common ones of a large one."""
    vocabulary = tokenizer.get_vocab()
    words = [word for word in vocabulary if word.isalpha() and len(word) > 2]
    return sorted(words) if len(words) <= SMALL_VOCABULARY else [word for word in COMMON_WORDS if word in vocabulary]


def pseudo_label(
    examples: Sequence[Example],
    images: ImageProvider,
    detector: Detector,
    vocabulary: Sequence[str],
    rng: np.random.Generator,
    on_image: Callable[[int, int], object],
) -> list[Example]:
    """Makes examples of the images of other examples, with phrases other than those of their labels.

    Args:
        examples: those to train on; of more than `MAX_IMAGES` images, a random choice is labeled.
        images: of the examples.
        detector: of the base model.
        vocabulary: words to try.
        rng: decides on images and phrases.
        on_image: called after each image with the number of images so far and in all.
    """
    excluded = {phrase for example in examples for label in example.target.query.labels for phrase in label.phrases}
    example_by_uri = {example.target.uri: example for example in examples}
    chosen = _sample(list(example_by_uri.values()), MAX_IMAGES, rng)
    labeled: list[Example] = []
    for done, example in enumerate(chosen, 1):
        image = images.load_input(example.target.uri)
        labeled += _label_image(example, image, detector, vocabulary, excluded, rng)
        on_image(done, len(chosen))
    return labeled


def _label_image(
    example: Example,
    image: ModelInput,
    detector: Detector,
    vocabulary: Sequence[str],
    excluded: Collection[str],
    rng: np.random.Generator,
) -> Iterator[Example]:
    words = _sample(vocabulary, MAX_WORDS, rng)
    detected_words = _detect_phrases(detector, image, [word for word in words if word not in excluded])
    pairs = [f"{a} {b}" for a, b in itertools.permutations(detected_words, 2) if f"{a} {b}" not in excluded]
    pairs = _sample(pairs, MAX_PAIRS, rng)
    detected = [*detected_words, *_detect_phrases(detector, image, pairs)]
    absent = [phrase for phrase in [*words, *pairs] if phrase not in detected and phrase not in excluded]
    width, height = image.size
    for _ in range(EXAMPLES_PER_IMAGE):
        phrases = [*_sample(detected, MAX_PHRASES // 2, rng), *_sample(absent, MAX_PHRASES // 2, rng)]
        labels = _to_labels(list(dict.fromkeys(phrases)))
        detections = detector.detect_inputs([image], labels)[0]
        if isinstance(detections, list):
            target = dataclasses.replace(example.target, query=DetectionQuery(labels, (), 1.0))
            truth = []
            for detection in detections:
                x1, y1, x2, y2 = detection.box_xyxy
                truth.append(((x1 / width, y1 / height, x2 / width, y2 / height), detection.label))
            yield Example(example.task, target, tuple(truth), example.split)


def _detect_phrases(detector: Detector, image: ModelInput, phrases: Sequence[str]) -> list[str]:
    """Returns the phrases that are detected on the image, in alphabetical order."""
    detected: set[str] = set()
    for start in range(0, len(phrases), PHRASES_PER_PASS):
        labels = _to_labels(phrases[start : start + PHRASES_PER_PASS])
        detections = detector.detect_inputs([image], labels)[0]
        if isinstance(detections, list):
            detected |= {detection.label for detection in detections}
    return sorted(detected)


def _to_labels(phrases: Sequence[str]) -> tuple[Label, ...]:
    return tuple(Label(phrase, (phrase,), MIN_PSEUDO_LABEL_SCORE) for phrase in phrases)


def _sample(items: Sequence[T], max_count: int, rng: np.random.Generator) -> list[T]:
    return [items[int(i)] for i in rng.permutation(len(items))[:max_count]]

"""Examples of what a model knows already, made by itself: learned beside new ones, they keep it from forgetting.

The model looks at the new pictures for words that it knows, and for pairs of the words that it finds. What it finds is
the truth of these examples (Li and Hoiem, "Learning without forgetting", 2016).
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from backend.boxes import Detection
from backend.detection.detector import Detector
from backend.detection.preprocess import ModelInput
from backend.labelstudio.labeling_config import Label
from backend.labelstudio.targets import DetectionQuery
from backend.training.batches import ImageProvider
from backend.training.dataset import Example

MAX_IMAGES = 300
MIN_PSEUDO_LABEL_SCORE = 0.3  # lowest score of what counts as known
MAX_WORDS, MAX_PAIRS = 60, 40  # looked for in a picture
PHRASES_PER_PASS = 6  # phrases
MAX_PHRASES = 8  # in one example
EXAMPLES_PER_IMAGE = 3  # examples for each picture
SMALL_VOCABULARY = 2000  # words; of a larger one only common ones are likely to be in pictures

COMMON_WORDS = (Path(__file__).parent / "rehearsal_vocabulary.txt").read_text().split()


def choose_vocabulary(tokenizer: Any) -> list[str]:
    """Words that the tokenizer knows whole: all of a small vocabulary, the common ones of a large one."""
    vocabulary = tokenizer.get_vocab()
    whole = [word for word in vocabulary if word.isalpha() and len(word) > 2]
    return sorted(whole) if len(whole) <= SMALL_VOCABULARY else [word for word in COMMON_WORDS if word in vocabulary]


def pseudo_label(
    examples: Sequence[Example],
    pictures: ImageProvider,
    detector: Detector,
    words: Sequence[str],
    rng: np.random.Generator,
    on_picture: Callable[[int, int], object],
) -> list[Example]:
    """Examples on the same pictures, for other phrases than those that are being learned.

    `on_picture` is called with the number of pictures done and of all.
    """
    learned = {phrase for example in examples for label in example.view.query.labels for phrase in label.phrases}
    by_picture = list({example.view.uri: example for example in examples}.values())
    chosen = [by_picture[int(number)] for number in rng.permutation(len(by_picture))[:MAX_IMAGES]]
    made: list[Example] = []
    for done, example in enumerate(chosen, 1):
        made += _of_picture(example, pictures.get(example.view.uri), detector, words, learned, rng)
        on_picture(done, len(chosen))
    return made


def _of_picture(
    example: Example,
    picture: ModelInput,
    detector: Detector,
    words: Sequence[str],
    learned: set[str],
    rng: np.random.Generator,
) -> Iterator[Example]:
    some = [words[int(i)] for i in rng.permutation(len(words))[:MAX_WORDS]]
    seen = _seen(detector, picture, [word for word in some if word not in learned])
    pairs = [f"{a} {b}" for a, b in itertools.permutations(seen, 2) if f"{a} {b}" not in learned]
    pairs = [pairs[int(i)] for i in rng.permutation(len(pairs))[:MAX_PAIRS]]
    known = [*seen, *_seen(detector, picture, pairs)]
    others = [phrase for phrase in [*some, *pairs] if phrase not in known and phrase not in learned]
    for _ in range(EXAMPLES_PER_IMAGE):
        asked = [*_some(known, MAX_PHRASES // 2, rng), *_some(others, MAX_PHRASES // 2, rng)]
        labels = tuple(Label(phrase, (phrase,), MIN_PSEUDO_LABEL_SCORE) for phrase in dict.fromkeys(asked))
        found = detector.detect_inputs([picture], labels)[0]
        if isinstance(found, list):
            view = dataclasses.replace(example.view, query=DetectionQuery(labels, (), 1.0))
            yield Example(example.task, view, tuple(_as_truth(d, picture.size) for d in found), example.part)


def _some(phrases: Sequence[str], most: int, rng: np.random.Generator) -> list[str]:
    return [phrases[int(i)] for i in rng.permutation(len(phrases))[:most]]


def _seen(detector: Detector, picture: ModelInput, phrases: Sequence[str]) -> list[str]:
    """Those of the phrases that are found in the picture, asked for few at a time: each box tells its best alone."""
    seen: set[str] = set()
    for start in range(0, len(phrases), PHRASES_PER_PASS):
        labels = [
            Label(phrase, (phrase,), MIN_PSEUDO_LABEL_SCORE) for phrase in phrases[start : start + PHRASES_PER_PASS]
        ]
        found = detector.detect_inputs([picture], labels)[0]
        seen |= {detection.label for detection in found} if isinstance(found, list) else set()
    return sorted(seen)


def _as_truth(detection: Detection, size: tuple[int, int]) -> tuple[tuple[float, float, float, float], str]:
    x1, y1, x2, y2 = detection.box_xyxy
    return (x1 / size[0], y1 / size[1], x2 / size[0], y2 / size[1]), detection.label

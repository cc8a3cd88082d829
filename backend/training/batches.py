"""Training batches: images of equal size, each with a random caption and its target."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

from backend.detection.captions import Caption, build_caption, build_captions
from backend.detection.preprocess import ModelInput
from backend.training.dataset import Example
from backend.training.loss import Batch, Target, boxes_to_cxcywh

REHEARSAL_RATIO = 3  # pseudo-labeled examples of an epoch for each annotated one


class ImageProvider(Protocol):
    """Model inputs by URI."""

    def load_input(self, uri: str) -> ModelInput:
        """Loads an image as the model reads it."""

    def get_shape(self, uri: str) -> tuple[int, ...]:
        """Returns height and width of that input, without loading it."""


@dataclass(frozen=True)
class TrainingSet:
    """The examples to train on: those of annotators, and those that the base model labeled itself (`rehearsal`)."""

    examples: Sequence[Example]
    pseudo_labeled: Sequence[Example]
    images: ImageProvider


@dataclass(frozen=True)
class TrainConfig:
    """The training configuration. An epoch has each annotated example once, within the limits on samples."""

    train: str = "encoder"  # a key of FROZEN_PREFIXES
    epochs: int = 30
    min_samples_per_epoch: int = 100  # annotated ones; fewer examples are repeated
    max_samples_per_epoch: int = 500  # likewise; of more examples each epoch has a random choice
    warm_up_steps: int = 25
    batch_size: int = 4
    learning_rate: float = 1e-4
    patience: int = 6  # epochs without a better score before training stops
    seed: int = 0


def draw_batches(
    training_set: TrainingSet, tokenizer: Any, config: TrainConfig, rng: np.random.Generator, max_tokens: int
) -> Iterator[Batch]:
    """Yields the batches of an epoch in random order, at most `max_tokens` tokens a caption."""
    groups: dict[tuple[int, ...], list[Example]] = defaultdict(list)  # by the shape of their images

    def make_batch(group: Sequence[Example]) -> Batch:
        pixels, captions, targets = [], [], []
        for example in group:
            image = training_set.images.load_input(example.target.uri)
            caption, target = sample_caption(example, image, tokenizer, rng, max_tokens)
            pixels.append(image.normalize())
            captions.append(caption)
            targets.append(target)
        return Batch(torch.stack(pixels), captions, targets)

    for example in _sample_epoch(training_set, config, rng):
        group = groups[training_set.images.get_shape(example.target.uri)]
        group.append(example)
        if len(group) == config.batch_size:
            yield make_batch(group)
            group.clear()
    for group in groups.values():
        if group:
            yield make_batch(group)


def _sample_epoch(training_set: TrainingSet, config: TrainConfig, rng: np.random.Generator) -> list[Example]:
    """Draws the examples of an epoch, annotated and pseudo-labeled ones shuffled together."""
    repeats = max(math.ceil(config.min_samples_per_epoch / max(len(training_set.examples), 1)), 1)
    annotated = [int(i) for _ in range(repeats) for i in rng.permutation(len(training_set.examples))]
    annotated = annotated[: config.max_samples_per_epoch]
    pseudo_labeled = rng.permutation(len(training_set.pseudo_labeled))[: REHEARSAL_RATIO * len(annotated)]
    samples = [
        *(training_set.examples[i] for i in annotated),
        *(training_set.pseudo_labeled[int(i)] for i in pseudo_labeled),
    ]
    return [samples[int(i)] for i in rng.permutation(len(samples))]


def sample_caption(
    example: Example, image: ModelInput, tokenizer: Any, rng: np.random.Generator, max_tokens: int
) -> tuple[Caption, Target]:
    """Draws a caption for an example, and makes the target that goes with it.

    The caption has one phrase of each label, in random order: a second phrase of the same label would be taught to find
    nothing. Phrases of labels with boxes come first into the caption; those of the other labels and the negative
    phrases, in random order, take the room that is left. Boxes whose phrase finds no room are not in the target. A
    phrase that two labels with boxes share stands for the first of them.

    Example: the labels are cat ("cat", "kitten"), dog ("dog") and cow ("cow"), a negative phrase is "statue", and the
    image shows one cat. With room for three phrases, a caption is "statue. kitten. cow.", and its target is the box of
    the cat with the phrase 1.

    Args:
        example: an image and its boxes.
        image: the same image, as the model reads it.
        tokenizer: of the model.
        rng: decides on the phrases and their order.
        max_tokens: of the caption.
    """
    query = example.target.query
    phrase_by_label = {label.name: label.phrases[int(rng.integers(len(label.phrases)))] for label in query.labels}
    labels_with_boxes = dict.fromkeys(label for _, label in example.truth)
    label_by_phrase: dict[str, str] = {}
    for label in labels_with_boxes:
        label_by_phrase.setdefault(phrase_by_label[label], label)
    others = [phrase for label, phrase in phrase_by_label.items() if label not in labels_with_boxes]
    others += query.negative_phrases
    candidates = dict.fromkeys([*label_by_phrase, *(others[int(i)] for i in rng.permutation(len(others)))])
    fitting = build_captions(tokenizer, list(candidates), max_tokens)[0].phrases
    caption = build_caption(tokenizer, [fitting[int(i)] for i in rng.permutation(len(fitting))])

    index_by_label = {label_by_phrase[p]: i for i, p in enumerate(caption.phrases) if p in label_by_phrase}
    boxes = [(box, index_by_label[label]) for box, label in example.truth if label in index_by_label]
    scale_x, scale_y = (image.size[axis] / image.padded_size[axis] for axis in (0, 1))
    boxes_xyxy = torch.tensor([box for box, _ in boxes]).reshape(-1, 4)
    boxes_xyxy = boxes_xyxy * torch.tensor([scale_x, scale_y, scale_x, scale_y])
    return caption, Target(boxes_to_cxcywh(boxes_xyxy), torch.tensor([i for _, i in boxes], dtype=torch.long))

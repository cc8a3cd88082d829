"""Training batches."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

from backend.detection.captions import build_caption, build_captions
from backend.detection.preprocess import ModelInput
from backend.training.dataset import Example
from backend.training.loss import Batch, Target

REHEARSAL_RATIO = 3  # examples of what is known for each of the annotators' in a round


class ImageProvider(Protocol):
    """Pictures by address, as the model reads them."""

    def get(self, uri: str) -> ModelInput:
        """One of them."""

    def shape(self, uri: str) -> tuple[int, ...]:
        """Channels, height and width of one of them."""


@dataclass(frozen=True)
class TrainingSet:
    """What is trained on: examples of annotators, and those that the model made of what it knows."""

    examples: Sequence[Example]
    known: Sequence[Example]
    pictures: ImageProvider


@dataclass(frozen=True)
class TrainConfig:
    """How long and how hard; a round looks at every example of the annotators once, within the limits."""

    train: str = "encoder"  # a key of FROZEN
    rounds: int = 30
    least_looks: int = 100
    most_looks: int = 500
    warm_up: int = 25  # batches
    batch_size: int = 4
    learning_rate: float = 1e-4
    patience: int = 6  # rounds without a better score, after which it ends
    seed: int = 0


def draw_batches(
    lesson: TrainingSet, tokenizer: Any, recipe: TrainConfig, rng: np.random.Generator, most_tokens: int
) -> Iterator[Batch]:
    """A round of batches in random order: pictures of equal size, each with its own caption."""
    waiting: dict[tuple[int, ...], list[Example]] = defaultdict(list)
    for example in _in_order(lesson, recipe, rng):
        group = waiting[lesson.pictures.shape(example.view.uri)]
        group.append(example)
        if len(group) == recipe.batch_size:
            yield _batch(group, lesson.pictures, tokenizer, rng, most_tokens)
            group.clear()
    for group in waiting.values():
        if group:
            yield _batch(group, lesson.pictures, tokenizer, rng, most_tokens)


def _in_order(lesson: TrainingSet, recipe: TrainConfig, rng: np.random.Generator) -> list[Example]:
    """The examples of a round, those of annotators and those of the rehearsal among each other."""
    times = max(math.ceil(recipe.least_looks / max(len(lesson.examples), 1)), 1)
    own = [int(i) for _ in range(times) for i in rng.permutation(len(lesson.examples))][: recipe.most_looks]
    known = rng.permutation(len(lesson.known))[: REHEARSAL_RATIO * len(own)]
    looks = [*(lesson.examples[i] for i in own), *(lesson.known[int(i)] for i in known)]
    return [looks[int(i)] for i in rng.permutation(len(looks))]


def _batch(
    group: Sequence[Example], pictures: ImageProvider, tokenizer: Any, rng: np.random.Generator, most_tokens: int
) -> Batch:
    captions, targets, pixels = [], [], []
    for example in group:
        picture = pictures.get(example.view.uri)
        phrases = draw_phrases(example, rng)
        caption = build_captions(tokenizer, list(phrases.values()), most_tokens)[0]  # those of true boxes come first
        caption = build_caption(tokenizer, [caption.phrases[int(i)] for i in rng.permutation(len(caption.phrases))])
        captions.append(caption)
        targets.append(_target(example, picture, phrases, caption.phrases))
        pixels.append(picture.pixels)
    return Batch(torch.stack(pixels), captions, targets)


def draw_phrases(example: Example, rng: np.random.Generator) -> Mapping[str, str]:
    """For each label one of its phrases, labels with boxes first, the others in random order, negatives among them.

    A label's other phrases are left out: beside the chosen one they would be taught to find nothing.
    """
    asked = example.view.query
    chosen = {label.name: label.phrases[int(rng.integers(len(label.phrases)))] for label in asked.labels}
    present = list(dict.fromkeys(label for _, label in example.truth))
    absent = [*(name for name in chosen if name not in present), *(f"\0{phrase}" for phrase in asked.negatives)]
    names = [*present, *(absent[int(i)] for i in rng.permutation(len(absent)))]
    owners: dict[str, str] = {}
    for name in names:  # a phrase that two labels share counts for one
        owners.setdefault(chosen.get(name, name[1:]), name)
    return {name: phrase for phrase, name in owners.items()}


def _target(example: Example, picture: ModelInput, phrases: Mapping[str, str], order: Sequence[str]) -> Target:
    places = {phrase: i for i, phrase in enumerate(order)}
    rows = [(box, places[phrases[label]]) for box, label in example.truth if phrases.get(label) in places]
    share = [picture.size[0] / picture.frame[0], picture.size[1] / picture.frame[1]]
    corners = torch.tensor([box for box, _ in rows]).reshape(-1, 4) * torch.tensor([*share, *share])
    boxes = torch.cat([(corners[:, :2] + corners[:, 2:]) / 2, corners[:, 2:] - corners[:, :2]], -1)
    return Target(boxes, torch.tensor([place for _, place in rows], dtype=torch.long))


def _to(batch: Batch, device: torch.device) -> Batch:
    targets = [Target(t.boxes_cxcywh.to(device), t.phrases.to(device)) for t in batch.targets]
    return Batch(batch.pixel_values.to(device), batch.captions, targets)

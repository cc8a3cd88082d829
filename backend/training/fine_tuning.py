"""Fine-tuning on examples: which weights move, what a batch asks, when to stop, and going on after a kill."""

from __future__ import annotations

import io
import math
import os
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from backend.detection.captions import build_caption, build_captions
from backend.detection.preprocess import Prepared
from backend.training.dataset import Example
from backend.training.loop import Batch, Target, moving_average, train_one_epoch

BACKBONES = ("model.backbone.", "model.text_backbone.")
DECODER = ("model.decoder.", "bbox_embed.", "class_embed.", "model.encoder_output_bbox_embed.")
FROZEN = {"encoder": BACKBONES + DECODER, "head": BACKBONES, "all": ()}  # by the setting TRAIN
AVERAGE_DECAY = 0.99
REHEARSED = 3  # examples of what is known for each of the annotators' in a round
WORTH = 0.002  # of the score, below which a round brought nothing

Tensors = dict[str, Tensor]


class Pictures(Protocol):
    """Pictures by address, as the model reads them."""

    def get(self, uri: str) -> Prepared:
        """One of them."""

    def shape(self, uri: str) -> tuple[int, ...]:
        """Channels, height and width of one of them."""


@dataclass(frozen=True)
class Lesson:
    """What is trained on: examples of annotators, and those that the model made of what it knows."""

    examples: Sequence[Example]
    known: Sequence[Example]
    pictures: Pictures


@dataclass(frozen=True)
class Recipe:
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


def fine_tune(
    model: Any,
    tokenizer: Any,
    lesson: Lesson,
    judge: Callable[[Any], float],
    recipe: Recipe,
    state: Path,
    on_round: Callable[[int], object],
) -> Tensors:
    """The trained tensors by name, as they were when `judge` liked them best; none if that was before training.

    Args:
        model: as `load_model` gives it, not a detector's.
        tokenizer: of the model.
        lesson: what to train on.
        judge: scores a model on examples that it is not trained on; higher is better.
        recipe: how long and how hard.
        state: a file from which it goes on after a kill, and to which it writes.
        on_round: called with the number of rounds done.
    """
    names = choose_parameters(model, recipe.train)
    average, device = moving_average(model), next(model.parameters()).device
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, recipe.learning_rate, betas=(0.9, 0.99), weight_decay=1e-4)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min((step + 1) / recipe.warm_up, 1))
    run = _Run(names, model, average, optimizer, scheduler, best=judge(average))
    run.load(state)
    while run.rounds < recipe.rounds and run.rounds - run.best_round < recipe.patience:
        rng = np.random.default_rng([recipe.seed, run.rounds])
        batches = draw_batches(lesson, tokenizer, recipe, rng, model.config.max_text_len)
        on_device = (_to(batch, device) for batch in batches)
        train_one_epoch(model, on_device, optimizer, scheduler, average, AVERAGE_DECAY, half_precision(device))
        run.finish_round(judge(average))
        run.save(state)
        on_round(run.rounds)
    return run.tensors


def half_precision(device: torch.device) -> torch.dtype | None:
    """bfloat16 on GPUs that have it: unlike float16 it needs no scaling of the loss."""
    has_it = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if has_it else None


class _Run:
    """What a kill must not lose."""

    def __init__(
        self, names: Sequence[str], model: Any, average: Any, optimizer: Any, scheduler: Any, best: float
    ) -> None:
        self._names = names
        self._parts = {"model": model, "average": average, "optimizer": optimizer, "scheduler": scheduler}
        self.rounds, self.best_round, self.best = 0, 0, best
        self.tensors: Tensors = {}

    def finish_round(self, score: float) -> None:
        """Counts a round; its weights are kept if none were better."""
        self.rounds += 1
        if score > self.best + WORTH:
            self.best, self.best_round = score, self.rounds
            self.tensors = _chosen(self._parts["average"], self._names)

    def save(self, path: Path) -> None:
        """Writes all to a file, aside and renamed."""
        values = {key: _chosen(part, self._names) if key in ("model", "average") else part.state_dict()
                  for key, part in self._parts.items()}  # fmt: skip
        own = {"rounds": self.rounds, "best_round": self.best_round, "best": self.best, "tensors": self.tensors}
        aside = path.with_suffix(".new")
        with aside.open("wb") as file:
            buffer = io.BytesIO()
            torch.save({**values, **own}, buffer)
            file.write(buffer.getbuffer())  # torch itself would hide what a full disk says
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)

    def load(self, path: Path) -> None:
        """Goes on from a file, if there is one."""
        if not path.exists():
            return
        values = torch.load(io.BytesIO(path.read_bytes()), map_location="cpu", weights_only=True)
        for key, part in self._parts.items():
            part.load_state_dict(values[key], **({"strict": False} if key in ("model", "average") else {}))
        self.rounds, self.best_round, self.best = values["rounds"], values["best_round"], values["best"]
        self.tensors = values["tensors"]


def choose_parameters(model: Any, train: str) -> list[str]:
    """Lets only what is to be trained have gradients, and names it; `train` is a key of `FROZEN`."""
    names = []
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not name.startswith(FROZEN[train]))
        if parameter.requires_grad:
            names.append(name)
    return names


def _chosen(model: Any, names: Sequence[str]) -> Tensors:
    parameters = dict(model.named_parameters())
    return {name: parameters[name].detach().cpu().clone() for name in names}


# -- batches ----------------------------------------------------------------------------------------------------------


def draw_batches(
    lesson: Lesson, tokenizer: Any, recipe: Recipe, rng: np.random.Generator, most_tokens: int
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


def _in_order(lesson: Lesson, recipe: Recipe, rng: np.random.Generator) -> list[Example]:
    """The examples of a round, those of annotators and those of the rehearsal among each other."""
    times = max(math.ceil(recipe.least_looks / max(len(lesson.examples), 1)), 1)
    own = [int(i) for _ in range(times) for i in rng.permutation(len(lesson.examples))][: recipe.most_looks]
    known = rng.permutation(len(lesson.known))[: REHEARSED * len(own)]
    looks = [*(lesson.examples[i] for i in own), *(lesson.known[int(i)] for i in known)]
    return [looks[int(i)] for i in rng.permutation(len(looks))]


def _batch(
    group: Sequence[Example], pictures: Pictures, tokenizer: Any, rng: np.random.Generator, most_tokens: int
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
    asked = example.view.asked
    chosen = {label.name: label.phrases[int(rng.integers(len(label.phrases)))] for label in asked.labels}
    present = list(dict.fromkeys(label for _, label in example.truth))
    absent = [*(name for name in chosen if name not in present), *(f"\0{phrase}" for phrase in asked.negatives)]
    names = [*present, *(absent[int(i)] for i in rng.permutation(len(absent)))]
    owners: dict[str, str] = {}
    for name in names:  # a phrase that two labels share counts for one
        owners.setdefault(chosen.get(name, name[1:]), name)
    return {name: phrase for phrase, name in owners.items()}


def _target(example: Example, picture: Prepared, phrases: Mapping[str, str], order: Sequence[str]) -> Target:
    places = {phrase: i for i, phrase in enumerate(order)}
    rows = [(box, places[phrases[label]]) for box, label in example.truth if phrases.get(label) in places]
    share = [picture.size[0] / picture.frame[0], picture.size[1] / picture.frame[1]]
    corners = torch.tensor([box for box, _ in rows]).reshape(-1, 4) * torch.tensor([*share, *share])
    boxes = torch.cat([(corners[:, :2] + corners[:, 2:]) / 2, corners[:, 2:] - corners[:, :2]], -1)
    return Target(boxes, torch.tensor([place for _, place in rows], dtype=torch.long))


def _to(batch: Batch, device: torch.device) -> Batch:
    targets = [Target(t.boxes_cxcywh.to(device), t.phrases.to(device)) for t in batch.targets]
    return Batch(batch.pixel_values.to(device), batch.captions, targets)

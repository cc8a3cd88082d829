"""Fine-tuning on examples: which weights move, what a batch asks, when to stop, and going on after a kill."""

from __future__ import annotations

import io
import math
import os
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from backend.captions import build_caption, build_captions
from backend.examples import Example
from backend.preprocess import Prepared
from backend.training import Batch, Target, moving_average, train_one_epoch

BACKBONES = ("model.backbone.", "model.text_backbone.")
DECODER = ("model.decoder.", "bbox_embed.", "class_embed.", "model.encoder_output_bbox_embed.")
FROZEN = {"encoder": BACKBONES + DECODER, "head": BACKBONES, "all": ()}  # by the setting TRAIN
AVERAGE_DECAY = 0.99
WORTH = 0.002  # of the score, below which a round brought nothing

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Recipe:
    """How long and how hard; a round looks at every example once, but at 100 at least and at `most_looks` at most."""

    train: str = "encoder"  # a key of FROZEN
    rounds: int = 30
    least_looks: int = 100
    most_looks: int = 2000
    warm_up: int = 25  # batches
    batch_size: int = 4
    learning_rate: float = 1e-4
    patience: int = 6  # rounds without a better score, after which it ends
    seed: int = 0


def fine_tune(
    model: Any,
    tokenizer: Any,
    examples: Sequence[Example],
    pictures: Callable[[Example], Prepared],
    judge: Callable[[Any], float],
    recipe: Recipe,
    state: Path,
    on_round: Callable[[int, float], object],
) -> Tensors:
    """The trained tensors by name, as they were when `judge` liked them best; none if that was before training.

    Args:
        model: as `load_model` gives it, not a detector's.
        tokenizer: of the model.
        examples: to train on.
        pictures: an example's picture as the model reads it.
        judge: scores a model on examples that are held out; higher is better.
        recipe: how long and how hard.
        state: a file from which it goes on after a kill, and to which it writes.
        on_round: called with the number of rounds done and the mean loss.
    """
    names = choose_parameters(model, recipe.train)
    average = moving_average(model)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, recipe.learning_rate, betas=(0.9, 0.99), weight_decay=1e-4)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min((step + 1) / recipe.warm_up, 1))
    run = _Run(names, model, average, optimizer, scheduler, best=judge(average))
    run.load(state)
    while run.rounds < recipe.rounds and run.rounds - run.best_round < recipe.patience:
        rng = np.random.default_rng([recipe.seed, run.rounds])
        batches = draw_batches(examples, pictures, tokenizer, recipe, rng, model.config.max_text_len)
        on_device = (_to(batch, next(model.parameters()).device) for batch in batches)
        mean_loss = train_one_epoch(model, on_device, optimizer, scheduler, average, AVERAGE_DECAY, half_precision())
        run.finish_round(judge(average))
        run.save(state)
        on_round(run.rounds, mean_loss)
    return run.tensors


def half_precision() -> torch.dtype | None:
    """bfloat16 on GPUs that have it: unlike float16 it needs no scaling of the loss."""
    return torch.bfloat16 if torch.cuda.is_available() and torch.cuda.is_bf16_supported() else None


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
    examples: Sequence[Example],
    pictures: Callable[[Example], Prepared],
    tokenizer: Any,
    recipe: Recipe,
    rng: np.random.Generator,
    most_tokens: int,
) -> Iterator[Batch]:
    """A round of batches in random order: pictures of equal size, each with its own caption."""
    times = max(math.ceil(recipe.least_looks / max(len(examples), 1)), 1)
    order = [int(i) for _ in range(times) for i in rng.permutation(len(examples))][: recipe.most_looks]
    waiting: dict[torch.Size, list[tuple[Example, Prepared]]] = defaultdict(list)
    for number in order:
        example = examples[number]
        picture = pictures(example)
        group = waiting[picture.pixels.shape]
        group.append((example, picture))
        if len(group) == recipe.batch_size:
            yield _batch(group, tokenizer, rng, most_tokens)
            group.clear()
    for group in waiting.values():
        if group:
            yield _batch(group, tokenizer, rng, most_tokens)


def _batch(
    group: Sequence[tuple[Example, Prepared]], tokenizer: Any, rng: np.random.Generator, most_tokens: int
) -> Batch:
    captions, targets = [], []
    for example, picture in group:
        phrases = draw_phrases(example, rng)
        caption = build_captions(tokenizer, list(phrases.values()), most_tokens)[0]  # those of true boxes come first
        caption = build_caption(tokenizer, [caption.phrases[int(i)] for i in rng.permutation(len(caption.phrases))])
        captions.append(caption)
        targets.append(_target(example, picture, phrases, caption.phrases))
    return Batch(torch.stack([picture.pixels for _, picture in group]), captions, targets)


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

"""Fine-tuning on examples: which weights move, what a batch asks, when to stop, and going on after a kill."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from backend.training.batches import TrainConfig, TrainingSet, _to, draw_batches
from backend.training.loop import make_ema, train_one_epoch

BACKBONES = ("model.backbone.", "model.text_backbone.")
DECODER = ("model.decoder.", "bbox_embed.", "class_embed.", "model.encoder_output_bbox_embed.")
FROZEN = {"encoder": BACKBONES + DECODER, "head": BACKBONES, "all": ()}  # by the setting TRAIN
AVERAGE_DECAY = 0.99
MIN_DELTA = 0.002  # of the score, below which a round brought nothing

Tensors = dict[str, Tensor]


def fine_tune(
    model: Any,
    tokenizer: Any,
    lesson: TrainingSet,
    judge: Callable[[Any], float],
    recipe: TrainConfig,
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
    average, device = make_ema(model), next(model.parameters()).device
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
        if score > self.best + MIN_DELTA:
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

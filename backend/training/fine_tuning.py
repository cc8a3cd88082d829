"""Fine-tuning: which weights are trained, early stopping, and resuming after the worker was killed."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from backend.training.batches import TrainConfig, TrainingSet, draw_batches
from backend.training.loop import make_ema, train_one_epoch

BACKBONES = ("model.backbone.", "model.text_backbone.")
DECODER = ("model.decoder.", "bbox_embed.", "class_embed.", "model.encoder_output_bbox_embed.")
FROZEN_PREFIXES = {"encoder": BACKBONES + DECODER, "head": BACKBONES, "all": ()}  # of parameters, by the setting TRAIN
EMA_DECAY = 0.99
MIN_DELTA = 0.002  # smallest gain in score that counts as an improvement

Tensors = dict[str, Tensor]


def fine_tune(
    model: Any,
    tokenizer: Any,
    training_set: TrainingSet,
    score: Callable[[Any], float],
    config: TrainConfig,
    state_path: Path,
    on_epoch: Callable[[int], object],
) -> Tensors:
    """Trains until the score of the averaged weights (EMA) stops rising.

    Args:
        model: as `load_checkpoint` returns it, not a detector's; it is changed.
        tokenizer: of the model.
        training_set: what to train on.
        score: evaluates a model on examples that it is not trained on; higher is better.
        config: how to train and how long.
        state_path: file to resume from, written after each epoch.
        on_epoch: called after each epoch with the number of epochs so far.

    Returns:
        The trained tensors by name, from the epoch of the best score; empty if no epoch improved on the given model.
    """
    names = freeze(model, config.train)
    ema, device = make_ema(model), next(model.parameters()).device
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, config.learning_rate, betas=(0.9, 0.99), weight_decay=1e-4)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min((step + 1) / config.warm_up_steps, 1))
    state = TrainState(names, model, ema, optimizer, scheduler, best_score=score(ema))
    state.load(state_path)
    while state.epochs < config.epochs and state.epochs - state.best_epoch < config.patience:
        rng = np.random.default_rng([config.seed, state.epochs])
        batches = draw_batches(training_set, tokenizer, config, rng, model.config.max_text_len)
        on_device = (batch.to(device) for batch in batches)
        train_one_epoch(model, on_device, optimizer, scheduler, ema, EMA_DECAY, choose_autocast_dtype(device))
        state.finish_epoch(score(ema))
        state.save(state_path)
        on_epoch(state.epochs)
    return state.best_tensors


def freeze(model: Any, train: str) -> list[str]:
    """Freezes the parameters that `train`, a key of `FROZEN_PREFIXES`, excludes; returns the names of the others."""
    names = []
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not name.startswith(FROZEN_PREFIXES[train]))
        if parameter.requires_grad:
            names.append(name)
    return names


def choose_autocast_dtype(device: torch.device) -> torch.dtype | None:
    """Returns bfloat16 for GPUs that support it, else None: unlike float16 it needs no scaling of the loss."""
    is_supported = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if is_supported else None


@dataclass
class TrainState:
    """The state that resuming needs, saved after each epoch.

    Of model and EMA only the trained parameters are saved. A file is not checked against the examples or the config
    that it was saved with: the caller deletes it before another training.
    """

    names: Sequence[str]  # of the trained parameters
    model: Any
    ema: Any
    optimizer: Any
    scheduler: Any
    best_score: float
    epochs: int = 0  # finished
    best_epoch: int = 0  # of the best score; 0 is the model before training
    best_tensors: Tensors = field(default_factory=dict)

    def finish_epoch(self, score: float) -> None:
        """Counts an epoch, and keeps its weights if they are the best."""
        self.epochs += 1
        if score > self.best_score + MIN_DELTA:
            self.best_score, self.best_epoch = score, self.epochs
            self.best_tensors = _copy_tensors(self.ema, self.names)

    def save(self, path: Path) -> None:
        """Saves the state; a crash in between leaves the previous file."""
        values = {  # keys stay as they are: a training may resume after an upgrade
            "model": _copy_tensors(self.model, self.names),
            "average": _copy_tensors(self.ema, self.names),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "rounds": self.epochs,
            "best_round": self.best_epoch,
            "best": self.best_score,
            "tensors": self.best_tensors,
        }
        buffer = io.BytesIO()
        torch.save(values, buffer)
        temporary = path.with_suffix(".new")
        with temporary.open("wb") as file:
            file.write(buffer.getbuffer())  # torch.save to a file would hide the error of a full disk
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)

    def load(self, path: Path) -> None:
        """Loads a saved state; does nothing if the file does not exist."""
        if not path.exists():
            return
        values = torch.load(io.BytesIO(path.read_bytes()), map_location="cpu", weights_only=True)
        self.model.load_state_dict(values["model"], strict=False)
        self.ema.load_state_dict(values["average"], strict=False)
        self.optimizer.load_state_dict(values["optimizer"])
        self.scheduler.load_state_dict(values["scheduler"])
        self.epochs, self.best_epoch, self.best_score = values["rounds"], values["best_round"], values["best"]
        self.best_tensors = values["tensors"]


def _copy_tensors(model: Any, names: Sequence[str]) -> Tensors:
    parameters = dict(model.named_parameters())
    return {name: parameters[name].detach().cpu().clone() for name in names}

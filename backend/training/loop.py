"""One epoch of training, with an exponential moving average (EMA) of the weights."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from backend.training.loss import Batch, compute_loss

MAX_GRADIENT_NORM = 1.0


def train_one_epoch(
    model: Any,
    batches: Iterable[Batch],
    optimizer: torch.optim.Optimizer,
    scheduler: torch.optim.lr_scheduler.LRScheduler,
    ema: nn.Module | None = None,
    ema_decay: float = 0.998,
    autocast_dtype: torch.dtype | None = None,
) -> float:
    """Trains the model on each batch once.

    Args:
        model: Grounding DINO; put into training mode.
        batches: on the device of the model.
        optimizer: of the model's parameters.
        scheduler: of the optimizer, stepped after each batch.
        ema: from `make_ema`; updated after each batch.
        ema_decay: share of the average that an update keeps; less in the first batches, so that the average gets away
            from the initial weights.
        autocast_dtype: precision of the forward pass; None for that of the weights.

    Returns:
        The mean loss.
    """
    losses = []
    model.train()
    for batch in batches:
        optimizer.zero_grad(set_to_none=True)
        loss = compute_loss(model, batch, autocast_dtype)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(model.parameters(), MAX_GRADIENT_NORM)
        optimizer.step()
        scheduler.step()
        losses.append(loss.item())
        if ema is not None:
            update_ema(ema, model, min(ema_decay, (1 + scheduler.last_epoch) / (10 + scheduler.last_epoch)))
    return sum(losses) / max(len(losses), 1)


def make_ema(model: nn.Module) -> nn.Module:
    """Returns a frozen copy of the model to average its weights in: the average scores better than the last step."""
    return copy.deepcopy(model).requires_grad_(False)


@torch.no_grad()
def update_ema(ema: nn.Module, model: nn.Module, decay: float) -> None:
    """Moves the average towards the weights of the model, and keeps the share `decay` of it."""
    torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - decay)

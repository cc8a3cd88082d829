"""Training of Grounding DINO: the loss and one epoch.

The loss is our own: transformers' one mixes up targets when prompts differ within a batch and gives the two-stage heads
no gradient. Matching and terms follow DETR (Hungarian matching; L1 and generalised IoU) and Grounding DINO (focal loss
on tokens, also on the encoder's proposals).
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from backend.training.loss import Batch, compute_loss

# -- geometry ---------------------------------------------------------------------------------------------------------


# -- loss -------------------------------------------------------------------------------------------------------------


# -- loops ------------------------------------------------------------------------------------------------------------


def train_one_epoch(
    model: Any,
    batches: Iterable[Batch],
    optimizer: torch.optim.Optimizer,
    scheduler: torch.optim.lr_scheduler.LRScheduler,
    average: nn.Module | None = None,
    average_decay: float = 0.998,
    half: torch.dtype | None = None,
) -> float:
    """One pass over `batches`; returns the mean loss.

    `average` takes up a moving average of the weights, if given. `half` is the precision of the forward pass, by
    autocast; the loss is computed in float32.
    """
    losses = []
    model.train()
    for batch in batches:
        optimizer.zero_grad(set_to_none=True)
        value = compute_loss(model, batch, half)
        value.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        losses.append(value.item())
        if average is not None:
            update_ema(average, model, min(average_decay, (1 + scheduler.last_epoch) / (10 + scheduler.last_epoch)))
    return sum(losses) / max(len(losses), 1)


@torch.no_grad()
def update_ema(average: nn.Module, model: nn.Module, decay: float) -> None:
    torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 1 - decay)


def make_ema(model: nn.Module) -> nn.Module:
    """A frozen copy that `train_one_epoch` lets follow the model; it scores better than the last step alone."""
    return copy.deepcopy(model).requires_grad_(False)

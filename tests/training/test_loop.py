import numpy as np
import pytest
import torch

from backend.demo.train import build_model, build_tokenizer, draw_batch
from backend.training.loop import train_one_epoch
from backend.training.loss import compute_loss, generalized_iou


def test_generalized_iou() -> None:
    unit = torch.tensor([0.0, 0.0, 1.0, 1.0])
    assert generalized_iou(unit, unit).item() == pytest.approx(1)
    assert generalized_iou(unit, unit + torch.tensor([2.0, 0.0, 2.0, 0.0])).item() == pytest.approx(-1 / 3)


def test_every_weight_used_in_inference_gets_a_gradient() -> None:
    torch.manual_seed(0)
    model = build_model()
    compute_loss(model, draw_batch(np.random.default_rng(0), build_tokenizer(), 2)).backward()
    without = [name for name, weight in model.named_parameters() if weight.grad is None]
    assert not [name for name in without if "swin.layernorm" not in name and "backbone" not in name]


def test_two_images_are_overfitted() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model, batch = build_model(), draw_batch(np.random.default_rng(3), build_tokenizer(), 2)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer, 1)
    first = train_one_epoch(model, [batch] * 5, optimizer, scheduler)
    train_one_epoch(model, [batch] * 50, optimizer, scheduler)
    assert train_one_epoch(model, [batch] * 5, optimizer, scheduler) < 0.5 * first


def test_a_batch_without_boxes_has_a_finite_loss() -> None:
    torch.manual_seed(0)
    model, batch = build_model(), draw_batch(np.random.default_rng(0), build_tokenizer(), 2)
    empty = [type(t)(t.boxes_cxcywh[:0], t.phrases[:0]) for t in batch.targets]
    value = compute_loss(model, type(batch)(batch.pixel_values, batch.captions, empty))
    value.backward()
    assert torch.isfinite(value)

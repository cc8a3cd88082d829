import numpy as np
import pytest
import torch

from backend.demo.train import build_model, build_tokenizer, draw_batch
from backend.evaluation import evaluate
from backend.regions import Detection
from backend.training import generalized_iou, loss, train_one_epoch


def test_generalized_iou() -> None:
    unit = torch.tensor([0.0, 0.0, 1.0, 1.0])
    assert generalized_iou(unit, unit).item() == pytest.approx(1)
    assert generalized_iou(unit, unit + torch.tensor([2.0, 0.0, 2.0, 0.0])).item() == pytest.approx(-1 / 3)


def test_every_weight_that_serves_gets_a_gradient() -> None:
    torch.manual_seed(0)
    model = build_model()
    loss(model, draw_batch(np.random.default_rng(0), build_tokenizer(), 2)).backward()
    without = [name for name, weight in model.named_parameters() if weight.grad is None]
    assert not [name for name in without if "swin.layernorm" not in name and "backbone" not in name]


def test_two_pictures_are_learned_by_heart() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model, batch = build_model(), draw_batch(np.random.default_rng(3), build_tokenizer(), 2)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer, 1)
    first = train_one_epoch(model, [batch] * 5, optimizer, scheduler)
    train_one_epoch(model, [batch] * 50, optimizer, scheduler)
    assert train_one_epoch(model, [batch] * 5, optimizer, scheduler) < 0.5 * first


def test_a_batch_without_boxes_trains_too() -> None:
    torch.manual_seed(0)
    model, batch = build_model(), draw_batch(np.random.default_rng(0), build_tokenizer(), 2)
    empty = [type(t)(t.boxes_cxcywh[:0], t.phrases[:0]) for t in batch.targets]
    value = loss(model, type(batch)(batch.pixel_values, batch.captions, empty))
    value.backward()
    assert torch.isfinite(value)


BOX = (0.0, 0.0, 10.0, 10.0)
FAR = (50.0, 50.0, 60.0, 60.0)


def test_perfect_detections_score_one() -> None:
    metrics = evaluate([[Detection(BOX, 0.9, "a")], []], [[(BOX, "a")], []])
    assert (metrics.ap50, metrics.precision, metrics.recall, metrics.boxes) == (1, 1, 1, 1)


@pytest.mark.parametrize(
    "found",
    [[], [Detection(BOX, 0.9, "b")], [Detection(FAR, 0.9, "a")]],
    ids=["nothing", "wrong label", "wrong place"],
)
def test_wrong_detections_score_nothing(found: list[Detection]) -> None:
    assert evaluate([found], [[(BOX, "a")]]).ap50 == 0


def test_a_true_box_counts_once() -> None:
    twice = [Detection(BOX, 0.9, "a"), Detection(BOX, 0.8, "a")]
    metrics = evaluate([twice], [[(BOX, "a"), (FAR, "a")]])
    assert (metrics.ap50, metrics.precision, metrics.recall) == (0.5, 0.5, 0.5)


def test_average_precision_is_the_area_under_the_envelope() -> None:
    found = [Detection(FAR, 0.9, "a"), Detection(BOX, 0.8, "a")]  # a miss, then the hit: precision 1/2 at recall 1
    assert evaluate([found], [[(BOX, "a")]]).ap50 == pytest.approx(0.5)


def test_the_threshold_decides_precision_and_recall_only() -> None:
    found = [Detection(BOX, 0.2, "a")]
    metrics = evaluate([found], [[(BOX, "a")]], threshold=0.3)
    assert (metrics.ap50, metrics.precision, metrics.recall) == (1, 0, 0)

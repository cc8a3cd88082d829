import time
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from backend.boxes import Detection
from backend.detection.postprocess import compute_ious, find_candidates, make_detections, non_max_suppression
from backend.detection.preprocess import ImageFormat, ModelInput
from backend.labelstudio.labeling_config import Label
from tests.boxes import iou, suppress_greedily

LABELS = [Label("a", ("a",), 0.5), Label("b", ("b",), 0.5)]
coordinates = st.integers(0, 20)  # whole numbers: equal boxes, and overlaps right at the threshold


def suppress(detections: list[Detection], nms_iou: float) -> list[Detection]:
    boxes = np.array([d.box_xyxy for d in detections], dtype=np.float64).reshape(-1, 4)
    kept = non_max_suppression(boxes, np.array([d.score for d in detections]), nms_iou)
    return [detections[index] for index in kept]


def test_iou() -> None:
    boxes_a = np.array([[0, 0, 10, 10], [0, 0, 1, 1], [1, 1, 1, 1]], dtype=np.float64)
    boxes_b = np.array([[5, 0, 15, 10], [2, 2, 3, 3], [1, 1, 1, 1]], dtype=np.float64)
    ious = compute_ious(boxes_a, boxes_b)
    assert ious[0, 0] == pytest.approx(1 / 3)
    assert (ious[1, 1], ious[2, 2]) == (0, 0)
    for a, row in zip(boxes_a, ious, strict=True):
        assert row.tolist() == pytest.approx([iou(tuple(a), tuple(b)) for b in boxes_b])


def test_suppression_keeps_the_best_of_overlapping_boxes_whatever_their_labels() -> None:
    worst, best = Detection((0, 0, 10, 9), 0.5, "a"), Detection((0, 0, 10, 10), 0.9, "b")
    shifted = Detection((5, 0, 15, 10), 0.7, "a")
    assert suppress([worst, shifted, best], 0.7) == [best, shifted]
    assert suppress([worst, shifted, best], 0.2) == [best]
    assert suppress([worst, shifted, best], 1) == [best, shifted, worst]


@given(
    st.lists(
        st.tuples(coordinates, coordinates, coordinates, coordinates, st.sampled_from([0.3, 0.5, 0.9])), max_size=90
    ),
    st.sampled_from([0.0, 0.25, 1 / 3, 0.5, 0.7, 0.9, 1.0]),
)
def test_suppression_equals_its_plainest_form(rows: list[tuple], nms_iou: float) -> None:
    detections = [
        Detection((min(x1, x2), min(y1, y2), max(x1, x2), max(y1, y2)), score, "a") for x1, y1, x2, y2, score in rows
    ]
    assert suppress(detections, nms_iou) == suppress_greedily(detections, nms_iou)


def measure(function: Callable[[], object], repetitions: int) -> float:
    """Returns the least CPU seconds that a function took."""
    seconds = []
    for _ in range(repetitions):
        start = time.process_time()
        function()
        seconds.append(time.process_time() - start)
    return min(seconds)


@pytest.mark.parametrize(("size", "nms_iou"), [(100, 0.7), (500, 0.7), (500, 0.99), (900, 0.3)])
def test_900_boxes_are_suppressed_at_once(size: int, nms_iou: float) -> None:
    rng = np.random.default_rng(0)
    centres, sizes, scores = rng.random((900, 2)) * 1000, rng.random((900, 2)) * size + 10, rng.random(900)
    boxes = np.concatenate([centres - sizes / 2, centres + sizes / 2], 1)
    detections = [Detection(tuple(box), score, "a") for box, score in zip(boxes.tolist(), scores.tolist(), strict=True)]
    assert suppress(detections, nms_iou) == suppress_greedily(detections, nms_iou)
    plain = measure(lambda: suppress_greedily(detections, nms_iou), repetitions=1)
    assert measure(lambda: non_max_suppression(boxes, scores, nms_iou), repetitions=10) < max(0.005, plain / 20)


def test_boxes_are_pixels_of_the_original_without_the_padding() -> None:
    model_input = ModelInput(torch.zeros(50, 100, 3, dtype=torch.uint8), (100, 0), (200, 100), ImageFormat())
    boxes_cxcywh = torch.tensor([[0.25, 0.5, 0.1, 0.4], [0.5, 0.9, 0.2, 0.4], [0.1, 0.1, 0.1, 0.1]])
    found = find_candidates(
        torch.tensor([0.9, 0.6, 0.4]), torch.tensor([1, 0, 0]), boxes_cxcywh, model_input,
        labels=torch.tensor([1, 0]), thresholds=torch.tensor([0.5, 0.5]),
    )  # fmt: skip
    first, second = make_detections([found], LABELS, 1)
    assert first.box_xyxy == pytest.approx((80, 30, 120, 70))
    assert (first.label, first.score) == ("a", pytest.approx(0.9))
    assert second.box_xyxy == pytest.approx((160, 70, 200, 100))  # clipped
    assert second.label == "b"


def test_boxes_of_negative_phrases_suppress_others_and_are_dropped() -> None:
    model_input = ModelInput(torch.zeros(50, 50, 3, dtype=torch.uint8), (0, 0), (50, 50), ImageFormat())
    boxes_cxcywh = torch.tensor([[0.5, 0.5, 0.4, 0.4], [0.5, 0.5, 0.4, 0.41], [0.1, 0.1, 0.1, 0.1]])
    found = find_candidates(
        torch.tensor([0.9, 0.6, 0.6]), torch.tensor([1, 0, 0]), boxes_cxcywh, model_input,
        labels=torch.tensor([0, 2]), thresholds=torch.tensor([0.5, 0.5, 0.5]),
    )  # fmt: skip
    (left,) = make_detections([found], LABELS, 0.7)
    assert left.box_xyxy == pytest.approx((2.5, 2.5, 7.5, 7.5))

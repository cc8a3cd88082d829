import pytest

from backend.boxes import iou


def test_iou() -> None:
    assert iou((0, 0, 10, 10), (5, 0, 15, 10)) == pytest.approx(1 / 3)
    assert iou((0, 0, 1, 1), (2, 2, 3, 3)) == 0
    assert iou((1, 1, 1, 1), (1, 1, 1, 1)) == 0

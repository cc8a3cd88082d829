import pytest

from backend.boxes import Detection, cxcywh_to_xyxy, iou, non_max_suppression


def test_cxcywh_becomes_corners_in_pixels() -> None:
    assert cxcywh_to_xyxy((0.5, 0.5, 0.2, 0.4), 100, 50) == pytest.approx((40, 15, 60, 35))


def test_iou() -> None:
    assert iou((0, 0, 10, 10), (5, 0, 15, 10)) == pytest.approx(1 / 3)
    assert iou((0, 0, 1, 1), (2, 2, 3, 3)) == 0
    assert iou((1, 1, 1, 1), (1, 1, 1, 1)) == 0


def test_nms_keeps_the_best_of_overlapping_boxes_whatever_their_labels() -> None:
    worst, best = Detection((0, 0, 10, 9), 0.5, "a"), Detection((0, 0, 10, 10), 0.9, "b")
    shifted = Detection((5, 0, 15, 10), 0.7, "a")
    assert non_max_suppression([worst, shifted, best], 0.7) == [best, shifted]
    assert non_max_suppression([worst, shifted, best], 0.2) == [best]
    assert non_max_suppression([worst, shifted, best], 1) == [best, shifted, worst]

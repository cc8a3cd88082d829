from typing import Any

import pytest

from backend.monitoring.project_stats import MAX_LABELS, count_outcomes


def region(label: str, **more: Any) -> dict[str, Any]:
    return {"value": {"x": 1, "y": 1, "width": 5, "height": 5, "rectanglelabels": [label]}, **more}


def test_boxes_are_kept_changed_deleted_or_drawn() -> None:
    result = [
        region("car", origin="prediction", score=0.9),
        region("car", origin="prediction-changed", score=0.8),
        region("car", origin="manual"),
        region("dog", origin="manual"),
    ]
    assert count_outcomes({"result": result}, {"car": 4, "cat": 1}) == {
        "car": [1, 1, 2, 1],
        "cat": [0, 0, 1, 0],
        "dog": [0, 0, 0, 1],
    }


def test_what_label_studio_copies_from_a_prediction_is_kept() -> None:
    copied = {"result": [region("car", score=0.9)], "parent_prediction": 5}
    assert count_outcomes(copied, {"car": 1}) == {"car": [1, 0, 0, 0]}
    assert count_outcomes({**copied, "parent_prediction": None}, {}) == {"car": [0, 0, 0, 1]}


def test_a_rectangle_with_labels_beside_counts_once() -> None:
    box = {"x": 1, "y": 1, "width": 5, "height": 5}
    both = [
        {"id": "a", "origin": "prediction", "value": box},
        {"id": "a", "origin": "prediction", "value": {**box, "labels": ["car"]}},
    ]
    assert count_outcomes({"result": both}, {"car": 1}) == {"car": [1, 0, 0, 0]}


def test_a_skipped_task_says_nothing() -> None:
    assert count_outcomes({"result": [], "was_cancelled": True}, {"car": 3}) == {}


ODD = [
    None,
    3,
    {},
    {"value": None},
    {"value": 3},
    *({"value": {"rectanglelabels": odd}} for odd in ([], {"a": 1}, 3, "a")),
]


@pytest.mark.parametrize("result", [None, "x", ODD])
def test_odd_annotations_count_nothing(result: Any) -> None:
    assert count_outcomes({"result": result}, {}) == {}


def test_a_label_that_is_no_text_does_no_harm() -> None:
    (label,) = count_outcomes({"result": [region("\ud800")]}, {})
    label.encode()


def test_labels_of_one_annotation_are_bounded() -> None:
    assert len(count_outcomes({"result": [region(f"label {n}") for n in range(1000)]}, {})) == MAX_LABELS

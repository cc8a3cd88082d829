import itertools
import time
from typing import Any

import pytest
from redis import Redis

from backend.monitoring.feedback import (
    BOX_OUTCOMES,
    MAX_LABELS_PER_ANNOTATION,
    AnnotationEvent,
    AnnotationLog,
    OutcomeCounts,
    count_outcomes,
)
from backend.monitoring.project_stats import get_project_summaries, save_summary


def make_region(label: str, **fields: Any) -> dict[str, Any]:
    return {"value": {"x": 1, "y": 1, "width": 5, "height": 5, "rectanglelabels": [label]}, **fields}


def test_boxes_are_kept_changed_deleted_or_drawn() -> None:
    result = [
        make_region("car", origin="prediction", score=0.9),
        make_region("car", origin="prediction-changed", score=0.8),
        make_region("car", origin="manual"),
        make_region("dog", origin="manual"),
    ]
    assert count_outcomes({"result": result}, {"car": 4, "cat": 1}) == {
        "car": OutcomeCounts(kept=1, changed=1, deleted=2, drawn=1),
        "cat": OutcomeCounts(deleted=1),
        "dog": OutcomeCounts(drawn=1),
    }


def test_regions_that_label_studio_copies_from_a_prediction_count_as_kept() -> None:
    annotation = {"result": [make_region("car", score=0.9)], "parent_prediction": 5}
    assert count_outcomes(annotation, {"car": 1}) == {"car": OutcomeCounts(kept=1)}
    assert count_outcomes({**annotation, "parent_prediction": None}, {}) == {"car": OutcomeCounts(drawn=1)}


def test_a_rectangle_with_separate_labels_counts_once() -> None:
    box = {"x": 1, "y": 1, "width": 5, "height": 5}
    result = [
        {"id": "a", "origin": "prediction", "value": box},
        {"id": "a", "origin": "prediction", "value": {**box, "labels": ["car"]}},
    ]
    assert count_outcomes({"result": result}, {"car": 1}) == {"car": OutcomeCounts(kept=1)}


def test_a_skipped_task_counts_nothing() -> None:
    assert count_outcomes({"result": [], "was_cancelled": True}, {"car": 3}) == {}


MALFORMED = [
    None,
    3,
    {},
    {"value": None},
    {"value": 3},
    *({"value": {"rectanglelabels": labels}} for labels in ([], {"a": 1}, 3, "a")),
]


@pytest.mark.parametrize("result", [None, "x", MALFORMED])
def test_malformed_annotations_count_nothing(result: Any) -> None:
    assert count_outcomes({"result": result}, {}) == {}


def test_a_label_that_is_not_unicode_text_can_be_stored() -> None:
    (label,) = count_outcomes({"result": [make_region("\ud800")]}, {})
    label.encode()


def test_labels_of_one_annotation_are_bounded() -> None:
    result = [make_region(f"label {n}") for n in range(1000)]
    assert len(count_outcomes({"result": result}, {})) == MAX_LABELS_PER_ANNOTATION


EVENTS = [
    AnnotationEvent(1, 10, "2026-01-01T10:00", outcomes={"car": [1, 0, 1, 0]}),
    AnnotationEvent(1, 10, "2026-01-01T11:00", outcomes={"car": [0, 1, 1, 0], "dog": [0, 0, 0, 2]}),
    AnnotationEvent(2, 10, "2026-01-01T10:30", outcomes={"car": [7, 7, 7, 7]}),
    AnnotationEvent(2, None, "", is_deleted=True),
    AnnotationEvent(3, 11, "2026-01-01T12:00", outcomes={"dog": OutcomeCounts(kept=1)}),
]


def test_events_in_any_order_and_repeated_leave_the_same_log_and_counts(connection: Redis) -> None:
    annotations, box_counts = set(), []
    for number, order in enumerate(itertools.permutations(EVENTS)):
        log = AnnotationLog(connection, str(number))
        for event in (*order, order[0]):
            log.record([event])
        log.record(order)
        annotations.add(tuple(log.get_annotations().items()))
        save_summary(connection, str(number), "v", None, "")
        box_counts.append(get_project_summaries(connection)[0]["boxes"])
    assert annotations == {((1, 10), (3, 11))}
    none = dict.fromkeys(BOX_OUTCOMES, 0)
    expected = {"car": {**none, "changed": 1, "deleted": 1}, "dog": {**none, "kept": 1, "drawn": 2}}
    assert all(
        {label: counts for label, counts in by_label.items() if any(counts.values())} == expected
        for by_label in box_counts
    )


def test_10000_annotations_in_one_event_are_recorded_within_a_second(connection: Redis) -> None:
    start = time.perf_counter()
    outcomes = {f"label {n}": [n, 0, 1, 0] for n in range(5)}
    AnnotationLog(connection, "1").record(
        [AnnotationEvent(number, number, "2026", outcomes=outcomes) for number in range(10_000)]
    )
    assert time.perf_counter() - start < 0.9  # Label Studio waits a second
    assert len(AnnotationLog(connection, "1").get_annotations()) == 10_000

from pathlib import Path
from typing import Any

import pytest

from backend.delivery.preannotation import PreannotationSummary, TaskCursor
from backend.errors import LabelStudioUnavailable
from backend.queue.messages import ANSWER
from tests.chunks import PREDICTION, make_chunk, make_error

DAMAGED = "the image is damaged"


def make_cursor(tasks: list[dict[str, Any]], unavailable_at: list[int], size: int = 3) -> TaskCursor:
    """Makes a cursor over tasks; Label Studio is unavailable once at each position in `unavailable_at`."""

    def read(last_id: int) -> list[dict[str, Any]]:
        if last_id in unavailable_at:
            unavailable_at.remove(last_id)
            raise LabelStudioUnavailable("away")
        return [task for task in tasks if task["id"] > last_id][:size]

    return TaskCursor(read, lambda _, page: page[-1]["id"])


def test_a_cursor_hands_out_every_task_once() -> None:
    cursor = make_cursor([{"id": number} for number in range(1, 11)], [])
    taken = [cursor.take(4) for _ in range(4)]
    assert [[task["id"] for task in tasks] for tasks in taken] == [[1, 2, 3, 4], [5, 6, 7, 8], [9, 10], []]


def test_a_page_that_fails_is_read_again_and_no_task_is_lost() -> None:
    cursor = make_cursor([{"id": number} for number in range(1, 8)], [0, 3, 6])
    taken: list[int] = []
    for _ in range(10):
        try:
            taken += [task["id"] for task in cursor.take(4)]
        except LabelStudioUnavailable:
            continue
    assert taken == list(range(1, 8))


def test_a_summary_counts_and_lists_the_failures(tmp_path: Path) -> None:
    summary = PreannotationSummary()
    answers = [ANSWER.validate_python(row) for row in (PREDICTION, make_error(DAMAGED), make_error(DAMAGED))]
    summary.add(make_chunk({"id": 1}, {"id": 2}, {"id": 3}), answers)
    summary.add(make_chunk({"id": 4}), None)
    assert (summary.done, len(summary.failures)) == (4, 3)
    assert summary.count_by_reason().most_common(1) == [(DAMAGED, 2)]
    summary.write_failures(tmp_path / "f.csv")
    assert (tmp_path / "f.csv").read_text().splitlines()[:2] == ["task,code,detail", f"2,image,{DAMAGED}"]


def test_read_at_is_when_the_oldest_task_at_hand_was_read(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 100.0, 200.0, 300.0])
    monkeypatch.setattr("backend.delivery.preannotation.time.time", lambda: next(clock))
    cursor = make_cursor([{"id": number} for number in range(1, 7)], [])
    cursor.take(2)
    assert cursor.read_at == 100
    cursor.take(2)
    assert cursor.read_at == 100  # one of them was read then

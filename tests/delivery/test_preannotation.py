from pathlib import Path
from typing import Any

import pytest

from backend.delivery.preannotation import PreannotationSummary, TaskCursor
from backend.errors import LabelStudioUnavailable
from backend.queue.messages import ANSWER
from tests.chunks import PREDICTION, make_chunk, make_error

DAMAGED = "the image is damaged"


def pages_of(rows: list[dict[str, Any]], away: list[int], size: int = 3) -> TaskCursor:
    """Pages of rows by number; the places in `away` find Label Studio gone once."""

    def read(last: int) -> list[dict[str, Any]]:
        if last in away:
            away.remove(last)
            raise LabelStudioUnavailable("away")
        return [row for row in rows if row["id"] > last][:size]

    return TaskCursor(read, lambda _, page: page[-1]["id"])


def test_pages_give_every_task_once_in_chunks_of_any_size() -> None:
    pages = pages_of([{"id": number} for number in range(1, 11)], [])
    taken = [pages.take(4) for _ in range(4)]
    assert [[row["id"] for row in rows] for rows in taken] == [[1, 2, 3, 4], [5, 6, 7, 8], [9, 10], []]


def test_a_page_that_fails_is_read_again_and_nothing_is_lost() -> None:
    pages = pages_of([{"id": number} for number in range(1, 8)], [0, 3, 6])
    taken: list[int] = []
    for _ in range(10):
        try:
            taken += [row["id"] for row in pages.take(4)]
        except LabelStudioUnavailable:
            continue
    assert taken == list(range(1, 8))


def test_a_tally_counts_and_lists_what_failed(tmp_path: Path) -> None:
    tally = PreannotationSummary()
    answers = [ANSWER.validate_python(row) for row in (PREDICTION, make_error(DAMAGED), make_error(DAMAGED))]
    tally.add(make_chunk({"id": 1}, {"id": 2}, {"id": 3}), answers)
    tally.add(make_chunk({"id": 4}), None)
    assert (tally.done, len(tally.failures)) == (4, 3)
    assert tally.count_by_reason().most_common(1) == [(DAMAGED, 2)]
    tally.write_failures(tmp_path / "f.csv")
    assert (tmp_path / "f.csv").read_text().splitlines()[:2] == ["task,code,detail", f"2,image,{DAMAGED}"]


def test_the_time_of_reading_is_that_of_the_oldest_row_at_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 100.0, 200.0, 300.0])
    monkeypatch.setattr("backend.delivery.preannotation.time.time", lambda: next(clock))
    pages = pages_of([{"id": number} for number in range(1, 7)], [])
    pages.take(2)
    assert pages.read_at == 100
    pages.take(2)
    assert pages.read_at == 100  # one of them was read then

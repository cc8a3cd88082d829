"""The backlogs of bulk work: each project in turn, none in front of an annotator, none through a pause."""

import itertools
from collections.abc import Sequence

import pytest
from redis import Redis

from backend.queue.backlogs import REFILL_TO, Place
from backend.queue.jobs import make_queue
from backend.queue.messages import Chunk
from backend.queue.pauses import PAUSED_BULK_KEY, Pauses
from backend.queue.predict_queue import PredictQueue, count_waiting_by_checkpoint, make_backlogs
from tests.chunks import CHECKPOINT, PREDICT_QUEUE, make_chunk


@pytest.fixture
def queue(connection: Redis) -> PredictQueue:
    return PredictQueue(connection, CHECKPOINT)


def make_chunks(project: str, count: int) -> list[Chunk]:
    return [make_chunk({"id": number}, model_version=project) for number in range(count)]


def list_projects(connection: Redis, chunks: Sequence[Chunk]) -> str:
    """Takes jobs off the queue as a worker does, which refills it; returns the project of each chunk."""
    names = {chunk.id: chunk.model_version for chunk in chunks}
    taken = []
    while job_id := connection.lpop(make_queue(PREDICT_QUEUE, connection).key):
        taken.append(names[job_id.decode()])
        make_backlogs(connection, CHECKPOINT).refill()
    return "".join(taken)


def test_projects_take_turns_whatever_their_sizes(connection: Redis, queue: PredictQueue) -> None:
    large, small = make_chunks("a", 40), make_chunks("b", 3)
    queue.enqueue(large, Place.BACKLOG, "1")
    queue.enqueue(small, Place.BACKLOG, "2")
    assert queue.count_waiting() == 43
    assert count_waiting_by_checkpoint(connection) == {CHECKPOINT: 43}
    order = list_projects(connection, [*large, *small])
    assert sorted(order) == ["a"] * 40 + ["b"] * 3
    assert order.rindex("b") < REFILL_TO + 2 * 3


def test_only_a_few_bulk_chunks_are_ahead_of_a_small_selection(connection: Redis, queue: PredictQueue) -> None:
    large, few = make_chunks("a", 40), make_chunks("b", 2)
    queue.enqueue(large, Place.BACKLOG, "1")
    queue.enqueue(few, Place.QUEUE, "2")
    assert list_projects(connection, [*large, *few]).rindex("b") == REFILL_TO + 1


def test_single_tasks_come_first_in_their_order(connection: Redis, queue: PredictQueue) -> None:
    large, selected, urgent = make_chunks("a", 9), make_chunks("b", 2), make_chunks("c", 2)
    queue.enqueue(large, Place.BACKLOG, "1")
    queue.enqueue(selected, Place.QUEUE, "2")
    for chunk in urgent:
        queue.enqueue([chunk], Place.URGENT, "3")
    waiting = make_queue(PREDICT_QUEUE, connection).job_ids
    assert waiting[:2] == [chunk.id for chunk in urgent]


def test_a_single_task_of_a_backlog_is_taken_out_of_it(connection: Redis, queue: PredictQueue) -> None:
    large = make_chunks("a", 20)
    queue.enqueue(large, Place.BACKLOG, "1")
    queue.enqueue(large[15:16], Place.URGENT, "1")
    assert make_queue(PREDICT_QUEUE, connection).job_ids[0] == large[15].id
    assert len(list_projects(connection, large)) == 20


def test_a_chunk_is_enqueued_once(connection: Redis, queue: PredictQueue) -> None:
    large = make_chunks("a", 8)
    for place in itertools.chain([Place.BACKLOG] * 2, [Place.QUEUE]):
        queue.enqueue(large, place, "1")
    assert len(list_projects(connection, large)) == 8


def test_a_pause_holds_back_the_bulk_work_of_its_project_only(connection: Redis, queue: PredictQueue) -> None:
    pauses, paused, other = Pauses(connection, PAUSED_BULK_KEY), make_chunks("a", 9), make_chunks("b", 9)
    assert pauses.pause("1", "the storage is away")
    queue.enqueue(paused, Place.BACKLOG, "1")
    queue.enqueue(other, Place.BACKLOG, "2")
    queue.enqueue(paused[:1], Place.URGENT, "1")
    assert list_projects(connection, [*paused, *other]) == "a" + "b" * 9
    pauses.resume("1")
    make_backlogs(connection, CHECKPOINT).refill()
    assert list_projects(connection, paused) == "a" * 8


def test_pauses_in_a_row_grow_and_are_listed(connection: Redis) -> None:
    pauses = Pauses(connection, PAUSED_BULK_KEY)
    lengths = []
    for _ in range(6):
        lengths.append(pauses.pause("1", "refused"))
        assert pauses.pause("1", "refused again") is None  # another worker found the same
        assert pauses.list() == [{"project": "1", "reason": "refused", "seconds": lengths[-1]}]
        connection.delete(PAUSED_BULK_KEY + "1")
    assert lengths == sorted(lengths[:4]) + lengths[4:]
    assert lengths[0] <= 5
    assert all(48 <= length <= 72 for length in lengths[4:])
    connection.set("gdino:pauses:bulk:1", 5000)  # after a day of them
    assert 48 <= pauses.pause("1", "refused") <= 72
    pauses.resume("1")
    assert pauses.list() == []

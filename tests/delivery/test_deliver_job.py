"""Each prediction reaches Label Studio exactly once, whatever it, the clocks and other projects do."""

import time
from collections.abc import Iterator

import pytest
from redis import Redis
from rq.results import Result

from backend.delivery import batch_import, deliver_job, outbox
from backend.delivery.failures import Failures
from backend.delivery.outbox import Delivery, Outbox
from backend.errors import LabelStudioError, LabelStudioUnavailable
from backend.labelstudio.client import LabelStudioClient
from backend.queue import predict_queue
from backend.queue.pauses import PAUSED_DELIVERY_KEY, Pauses
from backend.queue.predict_queue import ChunkState, delete_chunk, get_result
from tests.chunks import make_chunk, make_error
from tests.delivery.deliveries import (
    CREATED_AT,
    VERSION,
    add_entries,
    add_project,
    deliver,
    finish_chunk,
    finish_chunks,
    make_deliverer,
    make_due,
    make_prediction,
    make_task_chunks,
)
from tests.label_studio_stand_in import LabelStudioStandIn
from tests.servers import wait_for

AWAY = make_error("the storage is away", is_retryable=True)
BROKEN = make_error("the image is damaged")


@pytest.fixture
def stand_in() -> Iterator[LabelStudioStandIn]:
    with LabelStudioStandIn() as server:
        add_project(server, 1, 40)
        yield server


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shortens the times, all of them in proportion."""
    monkeypatch.setattr(deliver_job, "LOOK_UP_INTERVAL", 0.1)
    monkeypatch.setattr(batch_import, "REFUSED_TIMEOUT", 0.3)
    monkeypatch.setattr(batch_import, "PULL_TIMEOUT", 0.5)
    monkeypatch.setattr(deliver_job, "FIRST_RETRY", 0.05)


def add_finished(connection: Redis, count: int = 4, **options: object) -> list:
    chunks = make_task_chunks(count)
    add_entries(connection, chunks)
    finish_chunks(connection, chunks, **options)
    return chunks


def test_finished_chunks_are_pushed_once(connection: Redis, stand_in: LabelStudioStandIn) -> None:
    deliverer, chunks = make_deliverer(connection, stand_in), add_finished(connection)
    deliver(connection, deliverer)
    make_due(connection, chunks)
    deliver(connection, deliverer)
    assert stand_in.count_by_task(1, VERSION) == dict.fromkeys(range(1, 5), 1)
    assert stand_in.import_sizes == [(1, 4)]  # together, as Label Studio likes it
    assert Outbox(connection).count_by_project() == {}
    assert Outbox(connection).filter_pending("1", VERSION, range(1, 5)) == set()
    assert connection.ttl(f"rq:job:{chunks[0].id}") <= 60  # the answers leave Redis


def test_deleted_tasks_at_the_head_take_no_other_with_them(connection: Redis, stand_in: LabelStudioStandIn) -> None:
    add_finished(connection, 40)
    stand_in.delete_tasks(1, range(1, 9))  # all tasks of the first chunks
    deliver(connection, make_deliverer(connection, stand_in))
    assert stand_in.count_by_task(1, VERSION) == dict.fromkeys(range(9, 41), 1)
    assert not Outbox(connection).is_mismatched("1")
    assert Failures(connection).count("1") == Outbox(connection).count("1") == 0


@pytest.mark.parametrize("status", [403, 404, 429, 500, 502, 504])
def test_one_project_holds_up_no_other(connection: Redis, stand_in: LabelStudioStandIn, status: int) -> None:
    add_project(stand_in, 2, 4, first=101)
    deliverer = make_deliverer(connection, stand_in, import_timeout=1)
    add_finished(connection)
    others = make_task_chunks(4, first=101)
    add_entries(connection, others, "2")
    finish_chunks(connection, others, "2")
    stand_in.fail(1, status)
    for project in ("1", "2"):
        deliver(connection, deliverer, project)
    assert stand_in.count_by_task(2, VERSION) == dict.fromkeys(range(101, 105), 1)
    (pause,) = Pauses(connection, PAUSED_DELIVERY_KEY).list()
    assert (pause["project"], str(status) in pause["reason"] or "has no" in pause["reason"]) == ("1", True)
    assert Outbox(connection).list_due_projects() == []  # it rests
    stand_in.heal()
    wait_for(lambda: deliver(connection, deliverer) or stand_in.count_by_task(1, VERSION), 10, "the others")
    assert stand_in.count_by_task(1, VERSION) == dict.fromkeys(range(1, 5), 1)


def test_nothing_is_lost_while_label_studio_refuses_connections(
    connection: Redis, stand_in: LabelStudioStandIn
) -> None:
    deliverer, _ = make_deliverer(connection, stand_in), add_finished(connection)
    stand_in.stop()
    deliver(connection, deliverer)
    stand_in.start()
    deliver(connection, deliverer)
    assert stand_in.count_by_task(1, VERSION) == dict.fromkeys(range(1, 5), 1)


def test_an_import_that_is_stored_late_is_waited_for(connection: Redis, stand_in: LabelStudioStandIn) -> None:
    deliverer, _ = make_deliverer(connection, stand_in), add_finished(connection)
    stand_in.store_late(1, 1.0, status=504)
    deliver(connection, deliverer)
    start = time.monotonic()
    while Outbox(connection).count("1"):
        assert time.monotonic() - start < 10
        deliver(connection, deliverer)
        time.sleep(0.05)
    assert time.monotonic() - start > 0.5
    assert stand_in.count_by_task(1, VERSION) == dict.fromkeys(range(1, 5), 1)
    assert stand_in.import_sizes == [(1, 4)]
    assert Outbox(connection).count_by_project() == {}


def test_a_double_of_an_import_that_took_longer_than_it_may_is_deleted(
    connection: Redis, stand_in: LabelStudioStandIn
) -> None:
    deliverer, _ = make_deliverer(connection, stand_in, import_timeout=1), add_finished(connection)
    stand_in.store_late(1, 1.6, status=504)
    deliver(connection, deliverer)
    counts = []
    deadline = time.monotonic() + 6
    while time.monotonic() < deadline:
        deliver(connection, deliverer)
        counts.append(stand_in.count_by_task(1, VERSION)[1])
        time.sleep(0.05)
    assert 2 in counts  # the path was taken
    assert stand_in.count_by_task(1, VERSION) == dict.fromkeys(range(1, 5), 1)
    assert min(prediction.id for prediction in stand_in.predictions) == 1


def test_a_double_that_label_studio_stores_itself_is_deleted(
    connection: Redis, stand_in: LabelStudioStandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batch_import, "SLOW_IMPORT", 0)
    add_finished(connection)
    stand_in.double_import(1, seconds=0)
    deliver(connection, make_deliverer(connection, stand_in))
    assert stand_in.count_by_task(1, VERSION) == dict.fromkeys(range(1, 5), 1)


def test_a_pull_that_label_studio_did_not_store_is_pushed(connection: Redis, stand_in: LabelStudioStandIn) -> None:
    deliverer, chunks = make_deliverer(connection, stand_in), make_task_chunks(4)
    add_entries(connection, chunks)
    box = Outbox(connection)
    box.claim(Delivery.PULL, "1", VERSION, {1: 0, 3: 0})  # as the button "Send test request" does for a task
    finish_chunks(connection, chunks)
    deliver(connection, deliverer)
    assert stand_in.count_by_task(1, VERSION) == {2: 1, 4: 1}  # it may be storing the others now
    deliverer._label_studio.import_predictions("1", [{"task": 3, **make_prediction(3)}])  # and it stores one
    wait_for(lambda: deliver(connection, deliverer) or not box.count("1"), 5, "the delivery")
    assert stand_in.count_by_task(1, VERSION) == dict.fromkeys(range(1, 5), 1)


@pytest.mark.parametrize("skew", [-90, 90])
def test_the_clocks_of_machines_do_not_matter(
    connection: Redis, stand_in: LabelStudioStandIn, monkeypatch: pytest.MonkeyPatch, skew: float
) -> None:
    now = time.time
    chunks = make_task_chunks(2)
    add_entries(connection, chunks)
    Outbox(connection).claim(Delivery.PULL, "1", VERSION, {1: 0})
    deliverer = make_deliverer(connection, stand_in)
    deliverer._label_studio.import_predictions("1", [{"task": 1, **make_prediction(1)}])
    monkeypatch.setattr(time, "time", lambda: now() + skew)
    finish_chunks(connection, chunks)
    deliver(connection, deliverer)
    assert stand_in.count_by_task(1, VERSION) == {1: 1, 2: 1}


def test_each_entry_has_its_own_time(connection: Redis, stand_in: LabelStudioStandIn) -> None:
    """A task that is asked for anew is delivered again, also in one batch with an older entry."""
    box, deliverer = Outbox(connection), make_deliverer(connection, stand_in)
    start = box.get_time()
    box.save_claims(Delivery.PUSHED, "1", VERSION, [3])  # and then it was deleted in Label Studio
    old, new = make_task_chunks(4)
    add_entries(connection, [old], since=start - 10)
    add_entries(connection, [new], since=box.get_time())
    finish_chunks(connection, [old, new])
    deliver(connection, deliverer)
    assert stand_in.count_by_task(1, VERSION) == dict.fromkeys(range(1, 5), 1)


def test_what_was_delivered_since_the_request_is_not_delivered_again(
    connection: Redis, stand_in: LabelStudioStandIn
) -> None:
    box, chunks = Outbox(connection), make_task_chunks(2)
    add_entries(connection, chunks)
    box.save_claims(Delivery.PUSHED, "1", VERSION, [1])
    finish_chunks(connection, chunks)
    deliver(connection, make_deliverer(connection, stand_in))
    assert stand_in.count_by_task(1, VERSION) == {2: 1}


def test_unfinished_chunks_hide_no_finished_ones(connection: Redis, stand_in: LabelStudioStandIn) -> None:
    add_project(stand_in, 2, 300, first=101)
    unfinished, finished = make_task_chunks(200, first=101), make_task_chunks(100, first=301)
    add_entries(connection, unfinished, "2", since=1)
    add_entries(connection, finished, "2", since=2)
    make_due(connection, unfinished, "2")
    finish_chunks(connection, finished, "2")
    deliver(connection, make_deliverer(connection, stand_in), "2")
    assert len(stand_in.count_by_task(2, VERSION)) == 100


def test_a_full_queue_keeps_nothing_finished_from_being_pushed(
    connection: Redis, stand_in: LabelStudioStandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    lost, finished = make_task_chunks(4)
    add_entries(connection, [lost, finished])
    finish_chunks(connection, [finished])
    delete_chunk(connection, lost.id)
    make_due(connection, [lost])
    monkeypatch.setattr(predict_queue, "MAX_WAITING_CHUNKS", -1)
    deliver(connection, make_deliverer(connection, stand_in))
    assert stand_in.count_by_task(1, VERSION) == {3: 1, 4: 1}
    assert Outbox(connection).count("1") == 1


def test_a_task_whose_image_is_unavailable_is_tried_again_alone(
    connection: Redis, stand_in: LabelStudioStandIn
) -> None:
    deliverer, _ = make_deliverer(connection, stand_in), add_finished(connection, answers={2: AWAY, 3: BROKEN})
    deliver(connection, deliverer)
    assert stand_in.count_by_task(1, VERSION) == {1: 1, 4: 1}
    assert {failure.task: failure.detail for failure in Failures(connection).iterate("1")} == {
        3: "the image is damaged"
    }
    assert Outbox(connection).filter_pending("1", VERSION, [1, 2, 3, 4]) == {2}
    retry = make_chunk({"id": 2, "data": {"image": "2.png"}}, model_version=VERSION)
    wait_for(
        lambda: deliver(connection, deliverer) or get_result(connection, retry.id).state is ChunkState.WAITING,
        5, "another attempt",
    )  # fmt: skip
    (entry,) = Outbox(connection).load("1", [retry.id])
    assert (entry.attempts, entry.created_at) == (1, CREATED_AT)
    finish_chunks(connection, [retry])
    deliver(connection, deliverer)
    assert stand_in.count_by_task(1, VERSION) == {1: 1, 2: 1, 4: 1}
    assert Outbox(connection).count_by_project() == {}


def test_retries_end_in_a_dead_letter(
    connection: Redis, stand_in: LabelStudioStandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    deliverer, (chunk, _) = make_deliverer(connection, stand_in), add_finished(connection, answers={1: AWAY, 2: AWAY})
    deliver(connection, deliverer)
    now = Outbox.get_time
    monkeypatch.setattr(Outbox, "get_time", lambda box: now(box) + 25 * 3600)
    wait_for(lambda: get_result(connection, chunk.id).state is ChunkState.MISSING, 5, "the old answers' end")
    finish_chunks(connection, [chunk], answers={1: AWAY})
    monkeypatch.setattr(outbox, "get_time", lambda connection: connection.time()[0] + 26 * 3600)
    deliver(connection, deliverer)
    assert [(f.task, f.attempts) for f in Failures(connection).iterate("1")] == [(1, 2)]
    assert stand_in.count_by_task(1, VERSION)[2] == 1
    assert Outbox(connection).filter_pending("1", VERSION, [1, 2]) == set()


def test_entries_of_a_project_that_refuses_for_too_long_become_dead_letters(
    connection: Redis, stand_in: LabelStudioStandIn
) -> None:
    deliverer, _ = make_deliverer(connection, stand_in, retry_hours=1), add_finished(connection)
    stand_in.delete_project(1)
    deliver(connection, deliverer)
    assert Failures(connection).count("1") == 0
    long_ago = int(connection.time()[0]) - 3700
    connection.hset("gdino:outbox:failed:1", mapping=dict.fromkeys(connection.hkeys("gdino:outbox:failed:1"), long_ago))
    later = make_task_chunks(2, first=5)
    add_entries(connection, later)
    finish_chunks(connection, later)
    deliver(connection, deliverer)
    assert Failures(connection).count_by_project() == {"1": 4}
    assert Outbox(connection).count_by_project() == {"1": 1}  # the one that failed only now


def test_a_prediction_that_label_studio_fails_at_is_given_up_alone(
    connection: Redis, stand_in: LabelStudioStandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = LabelStudioClient.import_predictions

    def fail_at_two(client: LabelStudioClient, project: str, rows: list, timeout: float) -> int:
        if any(row["task"] == 2 for row in rows):
            raise LabelStudioUnavailable("Label Studio cannot answer now (HTTP 500)", has_answered=True)
        return original(client, project, rows, timeout)

    monkeypatch.setattr(LabelStudioClient, "import_predictions", fail_at_two)
    monkeypatch.setattr(batch_import, "REFUSED_TIMEOUT", 0)
    monkeypatch.setattr(deliver_job, "LOOK_UP_INTERVAL", 0)
    monkeypatch.setattr(batch_import, "MAX_PREDICTIONS_PER_IMPORT", 64)
    deliverer, chunks = make_deliverer(connection, stand_in), make_task_chunks(20, size=4)
    add_entries(connection, chunks)
    finish_chunks(connection, chunks)
    deadline = time.monotonic() + 20
    while Outbox(connection).count("1") > 1 or len(stand_in.count_by_task(1)) < 19:
        assert time.monotonic() < deadline
        deliver(connection, deliverer)
    connection.hset("gdino:outbox:failed:1", mapping=dict.fromkeys(connection.hkeys("gdino:outbox:failed:1"), 0))
    while Outbox(connection).count("1"):
        assert time.monotonic() < deadline
        deliver(connection, deliverer)
    assert [failure.task for failure in Failures(connection).iterate("1")] == [2]
    assert stand_in.count_by_task(1) == {task: 1 for task in range(1, 21) if task != 2}


def test_a_half_that_is_stored_late_after_a_refusal_is_not_imported_twice(
    connection: Redis, stand_in: LabelStudioStandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, calls = LabelStudioClient.import_predictions, []

    def refuse_then_store_late(client: LabelStudioClient, project: str, rows: list, timeout: float) -> int:
        calls.append(len(rows))
        if len(calls) == 1:
            raise LabelStudioError("a task was deleted meanwhile")
        original(client, project, rows, timeout)
        if len(calls) == 2:
            raise LabelStudioUnavailable("the proxy gave up (HTTP 504)")
        return len(rows)

    monkeypatch.setattr(LabelStudioClient, "import_predictions", refuse_then_store_late)
    deliverer, _ = make_deliverer(connection, stand_in), add_finished(connection)
    wait_for(lambda: deliver(connection, deliverer) or not Outbox(connection).count("1"), 10, "the delivery")
    assert calls == [4, 2, 2]
    assert stand_in.count_by_task(1, VERSION) == dict.fromkeys(range(1, 5), 1)


def test_a_pull_just_before_the_request_is_waited_for(connection: Redis, stand_in: LabelStudioStandIn) -> None:
    box, deliverer, chunks = Outbox(connection), make_deliverer(connection, stand_in), make_task_chunks(2)
    box.claim(Delivery.PULL, "1", VERSION, {1: 0})  # Label Studio is storing this answer
    add_entries(connection, chunks)
    finish_chunks(connection, chunks)
    deliver(connection, deliverer)
    assert stand_in.count_by_task(1, VERSION) == {2: 1}
    deliverer._label_studio.import_predictions("1", [{"task": 1, **make_prediction(1)}])  # now it is stored
    wait_for(lambda: deliver(connection, deliverer) or not box.count("1"), 5, "the delivery")
    assert stand_in.count_by_task(1, VERSION) == {1: 1, 2: 1}


def test_what_label_studio_has_already_is_not_imported(connection: Redis, stand_in: LabelStudioStandIn) -> None:
    deliverer, _ = make_deliverer(connection, stand_in), add_finished(connection)
    deliverer._label_studio.import_predictions("1", [{"task": 1, **make_prediction(1)}])  # by whom, nobody noted
    deliver(connection, deliverer)
    assert stand_in.count_by_task(1, VERSION) == dict.fromkeys(range(1, 5), 1)


def test_rechecks_of_a_deleted_project_end(connection: Redis, stand_in: LabelStudioStandIn) -> None:
    Outbox(connection).recheck("1", VERSION, [1], 0)
    stand_in.delete_project(1)
    deliver(connection, make_deliverer(connection, stand_in))
    assert Outbox(connection).list_due_rechecks("1", 10) == []
    assert Pauses(connection, PAUSED_DELIVERY_KEY).list() == []


def test_a_chunk_that_fails_as_a_whole_is_tried_again(connection: Redis, stand_in: LabelStudioStandIn) -> None:
    deliverer, chunks = make_deliverer(connection, stand_in), make_task_chunks(2)
    add_entries(connection, chunks)
    finish_chunk(connection, chunks[0], Result.Type.FAILED)
    make_due(connection, chunks)
    deliver(connection, deliverer)
    wait_for(
        lambda: deliver(connection, deliverer) or get_result(connection, chunks[0].id).state is ChunkState.WAITING,
        5, "another attempt",
    )  # fmt: skip
    finish_chunks(connection, chunks)
    deliver(connection, deliverer)
    assert stand_in.count_by_task(1, VERSION) == {1: 1, 2: 1}


def test_a_chunk_whose_job_was_lost_is_enqueued_again(connection: Redis, stand_in: LabelStudioStandIn) -> None:
    chunks = make_task_chunks(2)
    add_entries(connection, chunks)
    delete_chunk(connection, chunks[0].id)
    make_due(connection, chunks)
    deliver(connection, make_deliverer(connection, stand_in))
    assert get_result(connection, chunks[0].id).state is ChunkState.WAITING
    assert Outbox(connection).count("1") == 1


def test_a_job_in_an_odd_state_is_looked_at_again_later(connection: Redis, stand_in: LabelStudioStandIn) -> None:
    chunks = make_task_chunks(2)
    add_entries(connection, chunks)
    connection.hset(f"rq:job:{chunks[0].id}", "status", "scheduled")
    make_due(connection, chunks)
    deliver(connection, make_deliverer(connection, stand_in))  # and does not spin
    assert Outbox(connection).count("1") == 1


def test_only_a_task_with_other_data_is_left_out(connection: Redis, stand_in: LabelStudioStandIn) -> None:
    tasks = [{"id": 1, "data": {"image": "1.png"}}, {"id": 2, "data": {"image": "another.png"}}]
    chunk = make_chunk(*tasks, model_version=VERSION)
    add_entries(connection, [chunk])
    finish_chunks(connection, [chunk])
    deliver(connection, make_deliverer(connection, stand_in))
    assert stand_in.count_by_task(1, VERSION) == {1: 1}
    assert [failure.task for failure in Failures(connection).iterate("1")] == [2]
    assert not Outbox(connection).is_mismatched("1")


def test_another_project_of_the_same_number_is_left_alone(
    connection: Redis, stand_in: LabelStudioStandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tests.delivery.deliveries.CREATED_AT", CREATED_AT - 1)
    add_finished(connection)
    deliver(connection, make_deliverer(connection, stand_in))
    assert stand_in.predictions == []
    assert Outbox(connection).is_mismatched("1")
    assert Outbox(connection).count("1") == Failures(connection).count("1") == 0


def test_predictions_that_are_refused_together_are_imported_in_halves(
    connection: Redis, stand_in: LabelStudioStandIn
) -> None:
    add_finished(connection)
    stand_in.fail(1, 400, times=1, routes="import")
    deliver(connection, make_deliverer(connection, stand_in))
    assert stand_in.count_by_task(1, VERSION) == dict.fromkeys(range(1, 5), 1)
    assert stand_in.import_sizes == [(1, 2), (1, 2)]


def test_a_prediction_that_is_refused_alone_is_a_dead_letter(connection: Redis, stand_in: LabelStudioStandIn) -> None:
    add_finished(connection)
    stand_in.fail(1, 400, times=3, routes="import")  # all, the first half, the first of it
    deliver(connection, make_deliverer(connection, stand_in))
    assert stand_in.count_by_task(1, VERSION) == dict.fromkeys(range(2, 5), 1)
    assert [failure.task for failure in Failures(connection).iterate("1")] == [1]


def test_a_worker_that_lost_its_job_imports_nothing(connection: Redis, stand_in: LabelStudioStandIn) -> None:
    deliverer, _ = make_deliverer(connection, stand_in), add_finished(connection)
    deliverer.holds_job = lambda: False  # it was paused too long, and another has the job
    deliver(connection, deliverer)
    assert stand_in.predictions == []
    assert Outbox(connection).count("1") == 2


def test_a_project_rests_after_an_import_while_more_is_made(connection: Redis, stand_in: LabelStudioStandIn) -> None:
    first, second = make_task_chunks(4)
    add_entries(connection, [first, second])
    finish_chunks(connection, [first])
    deliver(connection, make_deliverer(connection, stand_in))
    make_due(connection, [second])
    assert Outbox(connection).list_due_projects() == []
    assert 0 < connection.pttl("gdino:resting:1") <= deliver_job.MAX_IMPORT_REST * 1000

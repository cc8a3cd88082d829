"""Claims on predictions, and the chunks whose predictions are pending."""

import json

import pytest
from redis import Redis

from backend.delivery.outbox import Claim, Delivery, Outbox, OutboxEntry
from backend.queue.messages import Chunk
from tests.chunks import make_chunk

PULL, PUSHED, PUSHING = Delivery.PULL, Delivery.PUSHED, Delivery.PUSHING

CHUNKS = [make_chunk({"id": number}) for number in range(3)]


@pytest.fixture
def outbox(connection: Redis) -> Outbox:
    return Outbox(connection)


def make_entry(chunk: Chunk, project: str = "1") -> OutboxEntry:
    return OutboxEntry.from_chunk(project, chunk, since=10)


def test_an_entry_stays_until_it_is_replaced(outbox: Outbox) -> None:
    outbox.add([make_entry(chunk) for chunk in CHUNKS], delay=0)
    outbox.add([make_entry(CHUNKS[0]).model_copy(update={"since": 20.0})], delay=100)
    due = outbox.list_due("1", 10)
    assert set(due) == {chunk.id for chunk in CHUNKS}
    assert {entry.since for entry in outbox.load("1", due)} == {10}
    assert outbox.filter_pending("1", "v", [0, 1, 2, 3]) == {0, 1, 2}
    outbox.replace(make_entry(CHUNKS[0]), [0], None)
    assert outbox.filter_pending("1", "v", [0, 1, 2, 3]) == {1, 2}
    assert outbox.count_by_project() == {"1": 2}


def test_a_project_is_due_with_its_first_chunk(outbox: Outbox) -> None:
    outbox.add([make_entry(CHUNKS[0])], delay=100)
    outbox.add([make_entry(CHUNKS[1], "2")], delay=0)
    assert outbox.list_due_projects() == ["2"]
    outbox.rest("2", 5)
    assert outbox.list_due_projects() == []
    outbox.postpone("1", [CHUNKS[0].id], 0)
    outbox.schedule("1")
    assert outbox.list_due_projects() == ["1"]
    outbox.replace(make_entry(CHUNKS[0]), [0], None)
    outbox.schedule("1")
    assert outbox.count_by_project() == {"2": 1}


def test_an_entry_of_another_format_is_dropped_alone(
    outbox: Outbox, connection: Redis, caplog: pytest.LogCaptureFixture
) -> None:
    outbox.add([make_entry(chunk) for chunk in CHUNKS], delay=0)
    row = json.loads(connection.hget("gdino:outbox:entries:1", CHUNKS[1].id))
    connection.hset("gdino:outbox:entries:1", CHUNKS[1].id, json.dumps({**row, "format": 1}))
    loaded = outbox.load("1", outbox.list_due("1", 10))
    assert {entry.chunk_id for entry in loaded} == {CHUNKS[0].id, CHUNKS[2].id}
    assert outbox.count("1") == 2
    assert outbox.filter_pending("1", "v", [0, 1, 2]) == {0, 2}  # it may be requested again
    assert f"project 1: dropping outbox entry {CHUNKS[1].id}" in caplog.text


@pytest.mark.parametrize(
    ("before", "delivery", "granted"),
    [
        (PULL, PULL, True),  # two annotators open one task: both get their answer
        (PULL, PUSHING, False),
        (PUSHING, PULL, False),
        (PUSHING, PUSHING, False),
        (PUSHED, PULL, False),
        (PUSHED, PUSHING, False),
    ],
)
def test_a_prediction_is_delivered_once(outbox: Outbox, before: Delivery, delivery: Delivery, granted: bool) -> None:
    now = outbox.get_time()
    outbox.save_claims(before, "1", "v", [5])
    claims = outbox.claim(delivery, "1", "v", {5: now, 6: now})
    assert claims[6] is None
    if granted:
        assert claims[5] is None
    else:
        assert claims[5].delivery is before
        assert now <= claims[5].at <= outbox.get_time()


def test_a_delivery_before_the_request_refuses_no_claim(outbox: Outbox) -> None:
    outbox.save_claims(PUSHED, "1", "v", [5, 6])
    since = {5: outbox.get_time() + 1, 6: outbox.get_time() - 1}  # 5 was deleted in Label Studio meanwhile
    claims = outbox.claim(PUSHING, "1", "v", since)
    assert claims[5] is None
    assert isinstance(claims[6], Claim)


def test_an_unconfirmed_import_refuses_every_other_until_it_is_known(outbox: Outbox) -> None:
    outbox.claim(PUSHING, "1", "v", {5: 0}, stored_within=300)
    claim = outbox.claim(PUSHING, "1", "v", {5: outbox.get_time() + 1000})[5]
    assert claim.delivery is PUSHING
    assert 299 < claim.at - outbox.get_time() <= 300
    outbox.release("1", "v", [5])
    assert outbox.claim(PUSHING, "1", "v", {5: 0}) == {5: None}


def test_claims_of_other_versions_and_projects_are_independent(outbox: Outbox) -> None:
    outbox.claim(PUSHING, "1", "v", {5: 0})
    assert outbox.claim(PUSHING, "1", "w", {5: 0}) == {5: None}
    assert outbox.claim(PUSHING, "2", "v", {5: 0}) == {5: None}

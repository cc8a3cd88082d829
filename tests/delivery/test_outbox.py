"""Claims on predictions, and the chunks whose predictions are pending."""

import pytest
from redis import Redis

from backend.delivery.outbox import Delivery, Outbox
from tests.chunks import make_chunk

PULL, PUSHED, PUSHING = Delivery.PULL, Delivery.PUSHED, Delivery.PUSHING

CHUNKS = [make_chunk({"id": number}) for number in range(3)]


@pytest.fixture
def outbox(connection: Redis) -> Outbox:
    return Outbox(connection)


def test_chunks_keep_their_order_and_place(outbox: Outbox) -> None:
    outbox.add("1", CHUNKS, since=10)
    outbox.add("1", CHUNKS[:1], since=20)
    assert [entry.chunk for entry in outbox.peek(10)] == CHUNKS
    outbox.remove([entry.chunk_id for entry in outbox.peek(1)])
    assert [entry.chunk for entry in outbox.peek(10)] == CHUNKS[1:]
    assert len(outbox) == 2


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
    if before == PUSHED:
        outbox.claim(PUSHING, "1", "v", [5], now=100, since=90)
        outbox.confirm("1", "v", [5], now=100)
    else:
        outbox.claim(before, "1", "v", [5], now=100, since=90)
    expected = {5: None if granted else before, 6: None}
    assert outbox.claim(delivery, "1", "v", [5, 6], now=110, since=95) == expected


def test_a_delivery_before_the_request_refuses_no_claim(outbox: Outbox) -> None:
    outbox.claim(PUSHING, "1", "v", [5], now=100, since=90)
    outbox.confirm("1", "v", [5], now=100)
    assert outbox.claim(PULL, "1", "v", [5], now=300, since=200) == {5: None}  # deleted in Label Studio meanwhile


def test_claims_of_other_versions_and_projects_are_independent(outbox: Outbox) -> None:
    outbox.claim(PUSHING, "1", "v", [5], now=100, since=90)
    assert outbox.claim(PUSHING, "1", "w", [5], now=100, since=90) == {5: None}
    assert outbox.claim(PUSHING, "2", "v", [5], now=100, since=90) == {5: None}

"""Delivery workers: projects side by side, and none of them ends for good."""

import time
from collections.abc import Iterator

import pytest
from redis import Redis

from backend.delivery.deliver_worker import DELIVER, enqueue_due, running_workers
from backend.labelstudio.client import LabelStudioClient
from backend.queue.jobs import make_queue
from tests.delivery.deliveries import VERSION, add_entries, add_project, finish_chunks, make_settings, make_task_chunks
from tests.label_studio_stand_in import LabelStudioStandIn
from tests.servers import wait_for

pytestmark = pytest.mark.timeout(60)


@pytest.fixture
def stand_in() -> Iterator[LabelStudioStandIn]:
    with LabelStudioStandIn() as server:
        for project in (1, 2, 3):
            add_project(server, project, 4, first=100 * project)
        yield server


def add_finished(connection: Redis, project: int) -> None:
    chunks = make_task_chunks(4, first=100 * project)
    add_entries(connection, chunks, str(project))
    finish_chunks(connection, chunks, str(project))


def test_a_slow_project_holds_up_no_other(connection: Redis, redis_url: str, stand_in: LabelStudioStandIn) -> None:
    settings = make_settings(redis_url, stand_in.url)
    stand_in.answer_late(1, 6)
    with running_workers(settings, LabelStudioClient(stand_in.url, "key")):
        add_finished(connection, 1)
        wait_for(lambda: any("/api/projects/1" in path for _, path in stand_in.requests), 10, "the slow project")
        start = time.monotonic()
        for project in (2, 3):
            add_finished(connection, project)
        for project in (2, 3):
            wait_for(lambda project=project: len(stand_in.count_by_task(project, VERSION)) == 4, 10, "the others")
        assert time.monotonic() - start < 5
        assert not stand_in.count_by_task(1)


def test_a_thread_whose_worker_breaks_gets_another(
    connection: Redis, redis_url: str, stand_in: LabelStudioStandIn
) -> None:
    settings, key = make_settings(redis_url, stand_in.url), make_queue(DELIVER, connection).key
    connection.set(key, "not a list")  # as when Redis is out of memory, or has become a read-only replica
    with running_workers(settings, LabelStudioClient(stand_in.url, "key"), threads=1):
        time.sleep(2)
        connection.delete(key)
        add_finished(connection, 1)
        wait_for(lambda: len(stand_in.count_by_task(1, VERSION)) == 4, 20, "the delivery")


def test_what_a_late_heartbeat_leaves_of_a_job_blocks_no_project(connection: Redis) -> None:
    add_finished(connection, 1)
    connection.hset("rq:job:deliver-1", "last_heartbeat", "")
    for _ in range(2):
        connection.delete("gdino:deliver:sweep")
        enqueue_due(connection)
    assert connection.hexists("rq:job:deliver-1", "data")

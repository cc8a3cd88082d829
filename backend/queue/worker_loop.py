"""The process of a worker: it tells the others that it is alive, and runs RQ's loop."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import TypeVar

from redis import Redis
from redis.client import Pipeline
from redis.exceptions import RedisError

from backend.errors import BackendError
from backend.queue.jobs import JobFunction
from backend.queue.live_workers import WorkerInfo, make_worker_name, save_heartbeat
from backend.queue.redis import connect, connect_patiently, redis_errors
from backend.queue.worker import Worker
from backend.queue.worker_metrics import publish_metrics
from backend.settings import Settings

RQ_WORKER_TTL = 20  # s; only RQ's own list of workers depends on it
STOP_MARGIN = 1.5  # s that putting a job back, and the end of the process, may take of STOP_TIMEOUT


AnyWorker = TypeVar("AnyWorker", bound=Worker)


def make_worker(
    settings: Settings,
    queue: str,
    name: str,
    functions: Mapping[str, JobFunction],
    beat: Callable[[], None] = lambda: None,
    begin: Callable[[Pipeline], None] | None = None,
    worker_class: type[AnyWorker] = Worker,  # type: ignore[assignment]
) -> AnyWorker:
    """Makes a worker of one queue that runs these functions and no others; `beat` and `begin` are as for `Worker`."""
    return worker_class(
        queue,
        functions=dict(functions),
        beat=beat,
        begin=begin,
        stop_timeout=max(settings.stop_timeout - STOP_MARGIN, 0),
        name=name,
        connection=connect_patiently(settings.redis_url),
        worker_ttl=RQ_WORKER_TTL,
    )


def run_worker(
    settings: Settings,
    queue: str,
    key: str,
    info: WorkerInfo,
    functions: Mapping[str, JobFunction],
    max_jobs: int | None = None,
    refill: Callable[[Pipeline | None], None] | None = None,
) -> bool:
    """Runs jobs until SIGTERM or SIGINT, or until `max_jobs` are done; returns False if it was asked to stop.

    Args:
        settings: of this process.
        queue: the name of the worker's queue.
        key: READY_KEY or FIT_READY_KEY.
        info: describes this worker to the others.
        functions: what its jobs may run.
        max_jobs: after which it ends.
        refill: refills the queue from its backlogs, in a transaction where one is given.

    Raises:
        QueueUnavailable: Redis does not answer at the start.
        BackendError: RQ's loop ended for another reason.
    """
    name, connection = make_worker_name(), connect_patiently(settings.redis_url)

    def beat() -> None:
        save_heartbeat(connection, key, name, info)
        if refill:
            refill(None)
        publish_metrics(connection, name)

    with redis_errors(), removing_heartbeat(connect(settings.redis_url), key + name):
        connect(settings.redis_url).ping()
        worker = make_worker(settings, queue, name, functions, beat, refill, Worker)
        has_worked = worker.work(logging_level="WARNING", max_jobs=max_jobs)
    if not worker.is_stopped and not (max_jobs and has_worked):
        raise BackendError("the worker's loop ended unexpectedly; its log says why")  # a supervisor starts another
    return not worker.is_stopped


@contextlib.contextmanager
def removing_heartbeat(connection: Redis, key: str) -> Iterator[None]:
    """Takes a worker off the list of the live ones at the end, also when SIGTERM comes before RQ's handler is set."""
    try:
        yield
    finally:
        with contextlib.suppress(RedisError):  # it expires by itself
            connection.delete(key)

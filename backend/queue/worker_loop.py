"""The loop of every worker: heartbeats in a thread, RQ's jobs in the main thread of this one process."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Iterator, Mapping
from typing import Any

from redis import Redis
from redis.exceptions import RedisError
from rq import SimpleWorker
from rq.serializers import JSONSerializer

from backend.queue.jobs import AllowedJob, JobFunction, make_queue
from backend.queue.live_workers import WorkerInfo, make_worker_name, save_heartbeat
from backend.queue.recovery import Recovery
from backend.queue.redis import connect, redis_errors
from backend.queue.worker_metrics import publish_metrics
from backend.settings import Settings

log = logging.getLogger(__name__)

RQ_WORKER_TTL = 20  # s; only RQ's own list of workers depends on it: a lost job is requeued after READY_TTL
HEARTBEAT_INTERVAL = 2  # s; several heartbeats may be late before a worker counts as dead


@contextlib.contextmanager
def heartbeat(settings: Settings, queue: str, key: str, info: WorkerInfo) -> Iterator[str]:
    """Keeps this worker alive in Redis for as long as the context lasts, and requeues lost jobs of its queue.

    Args:
        settings: of this process.
        queue: the name of the worker's queue.
        key: READY_KEY or FIT_READY_KEY.
        info: describes this worker to the others.

    Yields:
        The worker's name.
    """
    name, stop, connection = make_worker_name(), threading.Event(), connect(settings.redis_url)
    recovery = Recovery(connection, make_queue(queue, connection), key)
    thread = threading.Thread(target=_beat, args=(connection, recovery, name, key, info, stop), daemon=True)
    thread.start()
    try:
        yield name
    finally:  # also when SIGTERM comes before RQ has set its handler
        stop.set()
        thread.join()


def _beat(connection: Redis, recovery: Recovery, name: str, key: str, info: WorkerInfo, stop: threading.Event) -> None:
    while True:
        try:
            save_heartbeat(connection, key, name, info)
            recovery.requeue_lost()
            publish_metrics(connection, name)
        except RedisError as error:
            log.warning("heartbeat failed: Redis does not answer (%s)", type(error).__name__)
        except Exception:  # a worker without heartbeats would count as dead
            log.exception("heartbeat failed")
        if stop.wait(HEARTBEAT_INTERVAL):
            break
    with contextlib.suppress(RedisError):  # it expires by itself
        connection.delete(key + name)


class Worker(SimpleWorker):
    """RQ's worker that runs jobs in its own process, and remembers that it was asked to stop."""

    is_stopped = False

    def request_stop(self, signum: Any, frame: Any) -> None:
        """Stops after the current job, as RQ's own method does."""
        self.is_stopped = True
        super().request_stop(signum, frame)  # type: ignore[no-untyped-call]


def make_worker(settings: Settings, queue: str, name: str, functions: Mapping[str, JobFunction]) -> Worker:
    """Makes a worker of one queue that runs these functions and no others."""
    return Worker(
        [queue],
        name=name,
        connection=connect(settings.redis_url, socket_timeout=None),
        serializer=JSONSerializer,
        job_class=AllowedJob.with_functions(functions),
        worker_ttl=RQ_WORKER_TTL,
        log_job_description=False,
    )


def run_worker(
    settings: Settings, queue: str, name: str, functions: Mapping[str, JobFunction], max_jobs: int | None = None
) -> bool:
    """Runs jobs until SIGTERM or SIGINT, or until `max_jobs` are done; returns False if it was asked to stop.

    Raises:
        QueueUnavailable: Redis does not answer.
    """
    worker = make_worker(settings, queue, name, functions)
    with redis_errors():
        worker.work(logging_level="WARNING", max_jobs=max_jobs)
    return not worker.is_stopped

"""What all workers share: signs of life in Redis, lost jobs back into the queue, and RQ's loop in this one process."""

from __future__ import annotations

import contextlib
import json
import logging
import threading
from collections.abc import Callable, Iterator
from typing import Any

from redis import Redis
from redis.exceptions import RedisError
from rq import Queue, SimpleWorker
from rq.serializers import JSONSerializer

from backend.queue.allowed_job import AllowedJob
from backend.queue.predict_queue import worker_name
from backend.queue.recovery import READY_TTL, Recovery
from backend.queue.redis import connect, redis_errors, set_indexed
from backend.queue.worker_metrics import publish_metrics
from backend.settings import Settings

log = logging.getLogger(__name__)

WORKER_TTL = 20  # s; RQ's default of 420 would hide a dead worker for minutes
HEARTBEAT_INTERVAL = 2  # s between signs of life, several of which may be late before a worker counts as gone


@contextlib.contextmanager
def heartbeat(settings: Settings, queue: Callable[[Redis], Queue], key: str, **about: Any) -> Iterator[str]:
    """A worker's name, known as ready as long as this lasts, with what is to be known `about` it."""
    name, stop, connection = worker_name(), threading.Event(), connect(settings.redis_url)
    recovery = Recovery(connection, queue(connection), key)
    beat = threading.Thread(
        target=_stay_ready, args=(connection, recovery, name, key, json.dumps(about), stop), daemon=True
    )
    beat.start()
    yield name
    stop.set()
    beat.join()


class _Worker(SimpleWorker):
    is_stopped = False

    def request_stop(self, signum: Any, frame: Any) -> None:
        """As RQ's, and remembered."""
        self.is_stopped = True
        super().request_stop(signum, frame)  # type: ignore[no-untyped-call]


def run_worker(settings: Settings, queue: str, name: str, max_jobs: int | None = None) -> bool:
    """Takes jobs; false when it was told to stop."""
    worker = make_worker(settings, queue, name)
    with redis_errors():
        worker.work(logging_level="WARNING", max_jobs=max_jobs)
    return not worker.is_stopped


def make_worker(settings: Settings, queue: str, name: str) -> _Worker:
    """RQ's worker as ours are."""
    return _Worker(
        [queue],
        name=name,
        connection=connect(settings.redis_url, socket_timeout=None),
        serializer=JSONSerializer,
        job_class=AllowedJob,
        worker_ttl=WORKER_TTL,
        log_job_description=False,
    )


def _stay_ready(connection: Redis, recovery: Recovery, name: str, key: str, about: str, stop: threading.Event) -> None:
    """Keeps the worker's key in Redis alive and looks for lost jobs; a thread, because a job occupies the main one."""
    while True:
        try:
            set_indexed(connection, key, name, about, READY_TTL)
            recovery.requeue_lost()
            publish_metrics(connection, name)
        except RedisError:
            log.warning("Redis does not answer")
        except Exception:  # without a sign of life the worker would count as dead
            log.exception("a sign of life was not complete")
        if stop.wait(HEARTBEAT_INTERVAL):
            break
    with contextlib.suppress(RedisError):  # it expires by itself
        connection.delete(key + name)

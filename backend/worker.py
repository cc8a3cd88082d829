"""The RQ worker: loads the detector once, then takes chunks from the queue in this one process."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import threading

from redis import Redis
from redis.exceptions import RedisError
from rq import SimpleWorker
from rq.serializers import JSONSerializer

from backend import jobs
from backend.queues import PREDICT, READY_KEY, READY_TTL, AllowedJob, connect, redis_errors, worker_name
from backend.recovery import Recovery
from backend.settings import Settings
from backend.speed import keep_freed_memory

log = logging.getLogger(__name__)

WORKER_TTL = 20  # s; RQ's default of 420 would hide a dead worker for minutes
BEAT = 2  # s between signs of life, several of which may be late before a worker counts as gone


def run(settings: Settings) -> None:
    """Serves the queue "predict" until SIGTERM or SIGINT; the job in progress is finished first.

    Raises:
        CheckpointError: the model cannot be loaded.
        QueueUnavailable: Redis does not answer at the start.
    """
    name = worker_name()
    keep_freed_memory()
    # beside our other data, not in /tmp: kept for the next start, and nobody else's to write
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(settings.model_dir.resolve() / "compiled"))
    tools = jobs.set_up(settings)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # until RQ sets its own: whoever is ready can be stopped
    stop = threading.Event()
    beat = threading.Thread(
        target=_stay_ready, args=(connect(settings.redis_url), name, stop, tools.batch_size), daemon=True
    )
    beat.start()
    log.info("worker %s is ready on %s with %d pictures a batch", name, tools.detector.device, tools.batch_size)
    with redis_errors():
        _rq_worker(settings, name).work(logging_level="WARNING")
    stop.set()
    beat.join()


def _rq_worker(settings: Settings, name: str) -> SimpleWorker:
    return SimpleWorker(
        [PREDICT],
        name=name,
        connection=connect(settings.redis_url, socket_timeout=None),
        serializer=JSONSerializer,
        job_class=AllowedJob,
        worker_ttl=WORKER_TTL,
        log_job_description=False,
    )


def _stay_ready(connection: Redis, name: str, stop: threading.Event, batch_size: int) -> None:
    """Keeps the worker's key in Redis alive and looks for lost jobs; a thread, because a job occupies the main one."""
    recovery = Recovery(connection)
    while True:
        try:
            connection.set(READY_KEY + name, batch_size, ex=READY_TTL)
            recovery.requeue_lost()
        except RedisError:
            log.warning("Redis does not answer")
        if stop.wait(BEAT):
            break
    with contextlib.suppress(RedisError):  # it expires by itself
        connection.delete(READY_KEY + name)

"""The delivery workers: threads of one process, each an RQ worker of the queue "deliver".

A job delivers one project. Jobs are made from what is due, not from events: every few seconds one worker of all
enqueues a job for each project with something due, unless it has one. So no wake-up can be lost, and a project whose
job failed is simply due again.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Iterator

from redis import Redis
from rq.exceptions import DuplicateJobError

from backend.delivery.deliver_job import Deliverer
from backend.delivery.import_job import IMPORT_FUNCTION, ImportPredictor
from backend.delivery.imported_projects import list_imported
from backend.delivery.outbox import Outbox
from backend.labelstudio.client import LabelStudioClient
from backend.queue.jobs import DELIVER_FUNCTION, make_queue
from backend.queue.live_workers import make_worker_name
from backend.queue.pauses import PAUSED_IMPORT_KEY, Pauses
from backend.queue.recovery import allow_lost_attempts
from backend.queue.redis import connect_patiently, redis_errors
from backend.queue.worker import ThreadWorker
from backend.queue.worker_loop import make_worker
from backend.queue.worker_metrics import publish_metrics
from backend.settings import Settings

log = logging.getLogger(__name__)

DELIVER = "deliver"  # the queue's name
SWEEP_KEY, SWEEP_INTERVAL = "gdino:deliver:sweep", 0.9  # s between two sweeps of all workers together
BEAT_INTERVAL = 1  # s
JOB_TIMEOUT = 3600  # s; an import has a limit of its own
FAILED_TTL = 30  # s for which a project whose job failed waits
THREADS = 4  # projects at a time
RESTART_DELAY = 2  # s before a thread gets another worker


def enqueue_due(connection: Redis) -> None:
    """Enqueues a job for each project with something due that has none; raises QueueUnavailable or RedisError."""
    if not connection.set(SWEEP_KEY, 1, nx=True, px=int(SWEEP_INTERVAL * 1000)):
        return
    for project in Outbox(connection).list_due_projects():
        _enqueue(connection, DELIVER_FUNCTION, project)
    paused = {row["project"] for row in Pauses(connection, PAUSED_IMPORT_KEY).list()}
    for project, _ in list_imported(connection):
        if project not in paused:
            _enqueue(connection, IMPORT_FUNCTION, project)


def _enqueue(connection: Redis, function: str, project: str) -> None:
    queue, job_id = make_queue(DELIVER, connection), f"{function}-{project}"
    try:
        queue.enqueue(
            function,
            {"project": project},
            job_id=job_id,
            unique=True,
            job_timeout=JOB_TIMEOUT,
            result_ttl=0,
            failure_ttl=FAILED_TTL,
            retry=allow_lost_attempts(),
            description=f"{function} for project {project}",
        )
    except DuplicateJobError:
        if not connection.hexists(queue.job_class.key_for(job_id), "data"):  # a heartbeat that came late
            connection.delete(queue.job_class.key_for(job_id))


class WorkerThread(threading.Thread):
    """A thread with a worker; it gets another one when RQ's loop ends, as it does at errors of Redis itself."""

    def __init__(self, settings: Settings, label_studio: LabelStudioClient, is_first: bool) -> None:
        super().__init__(daemon=True)
        self._settings, self._label_studio, self._is_first = settings, label_studio, is_first
        self._worker: ThreadWorker | None = None
        self._stop_requested = threading.Event()

    def run(self) -> None:
        """Runs workers until it is stopped."""
        while not self._stop_requested.is_set():
            try:
                self._worker = self._make_worker()
                self._worker.work(logging_level="WARNING")
            except Exception:
                log.exception("a delivery worker failed")
            self._stop_requested.wait(RESTART_DELAY)

    def stop(self) -> None:
        """Stops after the current job."""
        self._stop_requested.set()
        if self._worker:
            self._worker.stop()

    def is_at_work(self) -> bool:
        """Returns whether it runs a job."""
        return bool(self._worker and self._worker.executions)

    def _make_worker(self) -> ThreadWorker:
        name, connection = make_worker_name(), connect_patiently(self._settings.redis_url)
        deliverer = Deliverer(self._settings, connection, self._label_studio)
        importer = ImportPredictor(self._settings, connection, self._label_studio)
        functions = {DELIVER_FUNCTION: deliverer.deliver, IMPORT_FUNCTION: importer.predict}

        def beat() -> None:
            with redis_errors():
                enqueue_due(connection)
                if self._is_first:
                    publish_metrics(connection, name)

        worker = make_worker(self._settings, DELIVER, name, functions, beat, worker_class=ThreadWorker)
        worker.beat_interval = BEAT_INTERVAL
        deliverer.holds_job = worker.holds_job
        return worker


@contextlib.contextmanager
def running_workers(settings: Settings, label_studio: LabelStudioClient, threads: int = THREADS) -> Iterator[None]:
    """Delivers in threads for as long as the context lasts; at its end it waits for what is at work."""
    workers = [WorkerThread(settings, label_studio, is_first=number == 0) for number in range(threads)]
    for worker in workers:
        worker.start()
    try:
        yield
    finally:
        for worker in workers:
            worker.stop()
        deadline = time.monotonic() + settings.stop_timeout - 1
        while any(worker.is_at_work() for worker in workers) and time.monotonic() < deadline:
            time.sleep(0.05)


def run(settings: Settings, stop: threading.Event) -> None:
    """Delivers until `stop` is set, through all outages."""
    label_studio = LabelStudioClient(settings.label_studio_url, settings.label_studio_api_key)
    with running_workers(settings, label_studio):
        stop.wait()

"""Jobs whose worker died go back to the queue within seconds; the task that kills workers is told from the others.

A chunk that was lost once is worked on task by task, with a note of the task in hand. Whoever finds the note beside a
second dead worker knows the task to blame: it fails alone, and the rest goes on.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Mapping
from typing import Any

from redis import Redis
from rq import Queue, get_current_job
from rq.exceptions import NoSuchJobError
from rq.intermediate_queue import IntermediateQueue
from rq.job import Job, JobStatus
from rq.registry import StartedJobRegistry

from backend.errors import WorkerDied
from backend.queue.predict_queue import CHUNK_KEY

log = logging.getLogger(__name__)

LOCK_KEY, LOCK_MS = "gdino:recovery", 1500
NOTES_TTL = 24 * 3600  # s that the notes about a lost job are kept
MAX_WORKER_DEATHS = 20  # of workers over one chunk, before what is left of it fails


class LostChunk:
    """What is known of a chunk at which a worker died; nothing at all of any other chunk."""

    def __init__(self, connection: Redis, job_id: str) -> None:
        self._connection, self._key = connection, CHUNK_KEY + job_id

    @property
    def deaths(self) -> int:
        """Of workers, over this chunk."""
        return int(self._connection.hget(self._key, "deaths") or 0)

    def begin(self, number: int) -> None:
        """Notes that the task of this number is in hand."""
        with self._connection.pipeline() as pipeline:
            pipeline.hset(self._key, "at", number)
            pipeline.expire(self._key, NOTES_TTL)
            pipeline.execute()

    def keep(self, number: int, answer: Mapping[str, Any]) -> None:
        """Keeps the task's answer for the next worker, should this one die."""
        with self._connection.pipeline() as pipeline:
            pipeline.hset(self._key, str(number), json.dumps(answer))
            pipeline.hdel(self._key, "at")
            pipeline.expire(self._key, NOTES_TTL)
            pipeline.execute()

    def answers(self) -> dict[int, dict[str, Any]]:
        """Answers by number of the task."""
        rows: dict[bytes, bytes] = self._connection.hgetall(self._key)  # type: ignore[assignment]
        return {int(number): json.loads(answer) for number, answer in rows.items() if number.isdigit()}

    def forget(self) -> None:
        """All is answered: another run begins anew."""
        self._connection.delete(self._key)

    def record_death(self) -> None:
        """Counts a dead worker; the task that it had in hand, if it had just one, is answered with an error."""
        self._connection.hincrby(self._key, "deaths", 1)
        self._connection.expire(self._key, NOTES_TTL)
        if at := self._connection.hget(self._key, "at"):
            log.error("a task ended two workers and is left out")
            self.keep(int(at), worker_died_answer())


def worker_died_answer() -> dict[str, Any]:
    """The answer for a task that kills workers."""
    return {"error": WorkerDied("the worker died over this task, twice; its picture may be too much for it").to_dict()}


def get_lost_chunk() -> LostChunk | None:
    """The chunk of the job in hand, if a worker died over it before."""
    job = get_current_job()
    chunk = LostChunk(job.connection, job.id) if job else None
    return chunk if chunk and chunk.deaths else None


class Recovery:
    """Finds what dead workers left behind; every worker looks every few seconds, and running it twice does no harm."""

    def __init__(self, connection: Redis, queue: Queue, ready_key: str) -> None:
        """`ready_key` begins the keys by which workers of this queue show that they live."""
        self._connection, self._queue, self._ready_key = connection, queue, ready_key

    def requeue_lost(self) -> None:
        """Puts jobs of dead workers at the front of the queue.

        Raises:
            RedisError: Redis does not answer.
        """
        if not self._connection.set(f"{LOCK_KEY}:{self._queue.name}", 1, nx=True, px=LOCK_MS):
            return  # another worker is looking
        registry: StartedJobRegistry = self._queue.started_job_registry
        for job_id, execution_id in registry.get_job_and_execution_ids(cleanup=False):
            job = self._fetch(job_id)
            if job and (job.get_status(refresh=False) is JobStatus.QUEUED or self._is_alive(job.worker_name)):
                continue  # about to begin, or at work
            self._requeue(job)
            self._connection.zrem(registry.key, f"{job_id}:{execution_id}")
        self._requeue_taken()

    def _requeue(self, job: Job | None) -> None:
        if job is None or job.get_status(refresh=False) is not JobStatus.STARTED:
            return
        log.warning("the worker of %s died; another one takes it", job.description)
        LostChunk(self._connection, job.id).record_death()
        self._queue.enqueue_job(job, at_front=True)

    def _requeue_taken(self) -> None:
        """Jobs that a worker took off the queue and then died, before it began."""
        taken = IntermediateQueue(self._queue.key, self._connection)
        for job_id in taken.get_job_ids():
            job = self._fetch(job_id)
            if job and (taken.set_first_seen(job_id) or not _is_past(taken, job_id)):
                continue
            if job and job.get_status(refresh=False) is JobStatus.QUEUED:
                self._queue.push_job_id(job_id, at_front=True)
            taken.remove(job_id)
            self._connection.delete(taken.get_first_seen_key(job_id))

    def _fetch(self, job_id: str) -> Job | None:
        try:
            return self._queue.job_class.fetch(job_id, self._connection, serializer=self._queue.serializer)
        except NoSuchJobError:
            return None

    def _is_alive(self, worker: str | None) -> bool:
        return bool(self._connection.exists(f"{self._ready_key}{worker}"))


def _is_past(taken: IntermediateQueue, job_id: str) -> bool:
    first = taken.get_first_seen(job_id)
    return first is not None and time.time() - first.timestamp() > READY_TTL


READY_TTL = 10  # s; a killed worker counts as gone after this

"""Recovery of jobs whose worker died: back to the front of the queue within seconds.

A chunk that was lost once is predicted task by task, with a note in Redis of the task at work. If another worker dies
while there is such a note, that task is to blame: it fails alone, and the rest goes on.
"""

from __future__ import annotations

import json
import logging
import time

from redis import Redis
from rq import Queue, get_current_job
from rq.intermediate_queue import IntermediateQueue
from rq.job import Job, JobStatus

from backend.errors import WorkerDied
from backend.queue.jobs import fetch_job
from backend.queue.messages import ANSWER, Answer, TaskError

log = logging.getLogger(__name__)

READY_TTL = 10  # s after its last heartbeat for which a worker counts as alive; then its jobs are requeued
CHUNK_KEY = "gdino:chunk:"  # + job id -> hash: deaths, at (index of the task at work), and answers by index of the task
CHUNK_TTL = 24 * 3600  # s
LOCK_KEY = "gdino:recovery:"  # + queue: held while a worker requeues lost jobs
LOCK_MS = 1500
MAX_WORKER_DEATHS = 20  # over one chunk; what is left of it then fails

WORKER_DIED = TaskError.of(WorkerDied("the worker died over this task, twice; its image may be too large for it"))


class LostChunk:
    """The notes about a chunk over which a worker died; any other chunk has none. Methods raise RedisError."""

    def __init__(self, connection: Redis, job_id: str) -> None:
        self._connection, self._key = connection, CHUNK_KEY + job_id

    def count_deaths(self) -> int:
        """Counts the workers that died over this chunk."""
        return int(self._connection.hget(self._key, "deaths") or 0)

    def mark_started(self, index: int) -> None:
        """Notes that the task of this index is at work."""
        with self._connection.pipeline() as pipeline:
            pipeline.hset(self._key, "at", index)
            pipeline.expire(self._key, CHUNK_TTL)
            pipeline.execute()

    def save_answer(self, index: int, answer: Answer) -> None:
        """Saves a task's answer for the next worker, should this one die."""
        with self._connection.pipeline() as pipeline:
            pipeline.hset(self._key, str(index), json.dumps(answer.model_dump()))
            pipeline.hdel(self._key, "at")
            pipeline.expire(self._key, CHUNK_TTL)
            pipeline.execute()

    def load_answers(self) -> dict[int, Answer]:
        """Loads the saved answers by index of their task."""
        rows: dict[bytes, bytes] = self._connection.hgetall(self._key)  # type: ignore[assignment]
        return {int(index): ANSWER.validate_python(json.loads(row)) for index, row in rows.items() if index.isdigit()}

    def delete(self) -> None:
        """Deletes the notes: another run of the chunk begins without them."""
        self._connection.delete(self._key)

    def record_death(self, job: Job | None = None) -> None:
        """Counts a dead worker, and answers the task that was at work with an error."""
        self._connection.hincrby(self._key, "deaths", 1)
        self._connection.expire(self._key, CHUNK_TTL)
        if at := self._connection.hget(self._key, "at"):
            project, task = _describe_task(job, int(at))
            log.error("project %s, task %s crashed two workers; answering worker_died", project, task)
            self.save_answer(int(at), WORKER_DIED)


def _describe_task(job: Job | None, index: int) -> tuple[str, str]:
    """Returns the project and the id of a chunk's task for the log, as far as the job holds them."""
    try:
        assert job
        return str(job.meta.get("project") or "-"), str(job.args[0]["tasks"][index]["id"])
    except (AssertionError, LookupError, TypeError):
        return "-", f"number {index}"


def get_lost_chunk() -> LostChunk | None:
    """Returns the chunk of the current job if a worker died over it before."""
    job = get_current_job()
    chunk = LostChunk(job.connection, job.id) if job else None
    return chunk if chunk and chunk.count_deaths() else None


class Recovery:
    """Finds the jobs of dead workers. Every worker checks every few seconds; checking twice does no harm.

    It reads what RQ 3.0 keeps of jobs at work; a contract test covers that.
    """

    def __init__(self, connection: Redis, queue: Queue, ready_key: str) -> None:
        """Prepares the recovery of one queue; `ready_key` is the prefix of the keys of its live workers."""
        self._connection, self._queue, self._ready_key = connection, queue, ready_key

    def requeue_lost(self) -> None:
        """Puts the jobs of dead workers at the front of the queue.

        Raises:
            RedisError: Redis does not answer.
        """
        if not self._connection.set(LOCK_KEY + self._queue.name, 1, nx=True, px=LOCK_MS):
            return  # another worker is checking
        registry = self._queue.started_job_registry
        for job_id, execution_id in registry.get_job_and_execution_ids(cleanup=False):
            job = fetch_job(job_id, self._connection)
            status = job.get_status(refresh=False) if job else None
            if job and (status is JobStatus.QUEUED or self._is_alive(job.worker_name)):
                continue  # about to begin, or at work
            if job and status is JobStatus.STARTED:
                log.warning("worker %s died while running %s; requeued", job.worker_name, job.description)
                LostChunk(self._connection, job.id).record_death(job)
                self._queue.enqueue_job(job, at_front=True)
            self._connection.zrem(registry.key, f"{job_id}:{execution_id}")
        self._requeue_intermediate()

    def _requeue_intermediate(self) -> None:
        """Puts back the jobs that a worker took off the queue before it died, and never began."""
        intermediate = IntermediateQueue(self._queue.key, self._connection)
        for job_id in intermediate.get_job_ids():
            job = fetch_job(job_id, self._connection)
            if job:
                is_new = intermediate.set_first_seen(job_id)
                first_seen = intermediate.get_first_seen(job_id)
                if is_new or first_seen is None or time.time() - first_seen.timestamp() <= READY_TTL:
                    continue  # its worker may be about to begin
                if job.get_status(refresh=False) is JobStatus.QUEUED:
                    self._queue.push_job_id(job_id, at_front=True)
            intermediate.remove(job_id)
            self._connection.delete(intermediate.get_first_seen_key(job_id))

    def _is_alive(self, worker: str | None) -> bool:
        return bool(self._connection.exists(f"{self._ready_key}{worker}"))

"""Recovery of the tasks of a chunk whose worker died.

RQ puts the job back (`worker`, `jobs`). From then on the chunk is predicted task by task, with a note in Redis of the
task at work. If another worker dies while there is such a note, that task is to blame: it fails alone, and the rest
goes on.
"""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Iterator

from redis import Redis
from rq import Retry, get_current_job
from rq.job import Job

from backend.errors import WorkerDied
from backend.queue.messages import ANSWER, Answer, TaskError

log = logging.getLogger(__name__)

CHUNK_KEY = "gdino:chunk:"  # + job id -> hash: at (index of the task at work), and answers by index of the task
CHUNK_TTL = 24 * 3600  # s
MAX_LOST_ATTEMPTS = 20  # of one job; what is left of its chunk then fails

WORKER_DIED = TaskError.from_error(
    WorkerDied("the worker died over this task, twice; its image may be too large for it")
)


def allow_lost_attempts() -> Retry:
    """Returns what a job is enqueued with, so that RQ puts it back at the front when its worker has died."""
    return Retry(max=MAX_LOST_ATTEMPTS, enqueue_at_front=True)


def count_lost_attempts(job: Job | None) -> int:
    """Counts the attempts at a job that a dead worker, or an exception, ended."""
    return MAX_LOST_ATTEMPTS - (job.retries_left or 0) if job else 0


class LostChunk:
    """The notes about a chunk over which a worker died; any other chunk has none. Methods raise RedisError."""

    def __init__(self, connection: Redis, job_id: str) -> None:
        self._connection, self._key = connection, CHUNK_KEY + job_id

    @contextlib.contextmanager
    def working_on(self, index: int) -> Iterator[None]:
        """Notes that the task of this index is at work. The note outlasts a death, but not a planned stop."""
        with self._connection.pipeline() as pipeline:
            pipeline.hset(self._key, "at", index)
            pipeline.expire(self._key, CHUNK_TTL)
            pipeline.execute()
        try:
            yield
        except SystemExit:
            self._connection.hdel(self._key, "at")
            raise

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

    def blame_task_at_work(self, job: Job | None = None) -> None:
        """Answers the task that was at work when the last worker died with an error, where there is one."""
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
    """Returns the chunk of the current job if an attempt at it was lost before."""
    job = get_current_job()
    if job is None or not count_lost_attempts(job):
        return None
    chunk = LostChunk(job.connection, job.id)
    chunk.blame_task_at_work(job)
    return chunk

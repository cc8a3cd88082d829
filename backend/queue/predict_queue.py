"""The queue "predict": chunks of tasks in, one answer per task out."""

from __future__ import annotations

import enum
import time
from collections.abc import Sequence
from dataclasses import dataclass

from redis import Redis
from rq import Retry
from rq.exceptions import DuplicateJobError
from rq.job import Job
from rq.results import Result

from backend.errors import MessageError, Overloaded, QueueUnavailable
from backend.logs import REQUEST_ID
from backend.queue.jobs import PREDICT_FUNCTION, fetch_job, get_final_result, make_queue
from backend.queue.live_workers import READY_KEY, get_live_workers
from backend.queue.messages import Answer, Chunk, ChunkAnswers, TaskError, read_message
from backend.queue.recovery import LostChunk
from backend.queue.redis import redis_errors

PREDICT = "predict"  # the queue's name
DEFAULT_BATCH_SIZE = 4  # images, while no worker is ready
JOB_TIMEOUT = 3600  # s; a task of 500 pages on a CPU takes as long, and the watchdog ends what hangs
MAX_WAITING_CHUNKS = 100_000  # about 300 MB of Redis
RESULT_TTL = 3600  # s for which the answers of a chunk are kept, for repeated requests
ENQUEUE_ATTEMPTS = 3  # to replace a job that concurrent requests may replace too
RETRY_POLL = 0.1  # s between two polls of a job that failed once and will run again
POLL_TIMEOUT = 1  # s; shorter than SOCKET_TIMEOUT, so that waiting for a job does not look like a dead Redis

MOVE_TO_FRONT_SCRIPT = "if redis.call('LREM', KEYS[1], 1, ARGV[1]) == 1 then redis.call('LPUSH', KEYS[1], ARGV[1]) end"


class ChunkState(enum.Enum):
    """The state of a chunk. MISSING: it was never enqueued, or its answers are older than `RESULT_TTL`."""

    WAITING = "waiting"
    ANSWERED = "answered"
    FAILED = "failed"
    MISSING = "missing"


@dataclass(frozen=True)
class ChunkResult:
    """A chunk's state, and its answers where it is ANSWERED."""

    state: ChunkState
    answers: list[Answer] | None = None


class PredictQueue:
    """The queue as the web front and the commands use it; safe to share between threads.

    Every method raises QueueUnavailable if Redis does not answer.
    """

    def __init__(self, connection: Redis) -> None:
        self._connection = connection
        self._queue = make_queue(PREDICT, connection)

    def enqueue(self, chunks: Sequence[Chunk], at_front: bool = False, project: str | None = "") -> list[Job]:
        """Enqueues chunks and returns their jobs, in order.

        A chunk that is waiting, at work or answered without an error keeps the job that it has: a repeated request
        goes on where its predecessor stopped at the deadline.

        Args:
            chunks: of one request.
            at_front: whether they go before everything that waits.
            project: whose they are, for the status page; None keeps them off it.

        Raises:
            Overloaded: too many chunks wait; those for the front are always accepted.
        """
        with redis_errors():
            if not at_front and len(self._queue) + len(chunks) > MAX_WAITING_CHUNKS:
                raise Overloaded(f"{len(self._queue)} chunks are waiting already; try again later")
            meta: dict[str, str | None] = {"project": project, "request": REQUEST_ID.get()}
            return [self._enqueue(chunk, at_front, meta) for chunk in chunks]

    def _enqueue(self, chunk: Chunk, at_front: bool, meta: dict[str, str | None]) -> Job:
        for _ in range(ENQUEUE_ATTEMPTS):
            try:
                return self._queue.enqueue(
                    PREDICT_FUNCTION,
                    chunk.payload,
                    job_id=chunk.id,
                    unique=True,
                    at_front=at_front,
                    meta=meta,
                    job_timeout=JOB_TIMEOUT,
                    result_ttl=RESULT_TTL,
                    failure_ttl=RESULT_TTL,
                    retry=Retry(max=1),
                    description=f"predict {len(chunk.tasks)} tasks",  # RQ's own would log addresses with their tokens
                )
            except DuplicateJobError:
                if job := self._reuse_or_delete(chunk.id):
                    if at_front:  # an annotator does not wait behind the bulk request for the same chunk
                        self._connection.eval(MOVE_TO_FRONT_SCRIPT, 1, self._queue.key, chunk.id)
                    return job
        raise QueueUnavailable("concurrent requests keep replacing this job; try again")

    def _reuse_or_delete(self, job_id: str) -> Job | None:
        """Returns the job of this id; deletes one that failed or answered a task with an error, and returns None."""
        job = fetch_job(job_id, self._connection)
        if job is None:
            return None
        result = get_final_result(job)
        if result is None:
            return job
        answers = _read_answers(result)
        if answers is not None and not any(isinstance(answer, TaskError) for answer in answers):
            return job
        job.delete()
        LostChunk(self._connection, job_id).delete()
        return None

    def wait(self, job: Job, deadline: float) -> list[Answer] | None:
        """Waits for a job and returns its answers; None if it failed.

        Args:
            job: from `enqueue`.
            deadline: of `time.monotonic`.

        Raises:
            TimeoutError: the job is not finished at the deadline.
        """
        with redis_errors():
            while True:
                start = time.monotonic()
                is_in_time = start < deadline
                if result := get_final_result(job, POLL_TIMEOUT if is_in_time else 0):
                    return _read_answers(result)
                if not is_in_time:
                    raise TimeoutError
                if time.monotonic() - start < RETRY_POLL:  # the result of an earlier attempt does not block
                    time.sleep(RETRY_POLL)

    def get_result(self, chunk_id: str) -> ChunkResult:
        """Returns the state and answers of a chunk without waiting."""
        with redis_errors():
            job = fetch_job(chunk_id, self._connection)
            result = get_final_result(job) if job else None
        if job is None:
            return ChunkResult(ChunkState.MISSING)
        if result is None:
            return ChunkResult(ChunkState.WAITING)
        answers = _read_answers(result)
        return ChunkResult(ChunkState.FAILED if answers is None else ChunkState.ANSWERED, answers)

    def delete(self, chunk_id: str) -> None:
        """Removes a chunk and its answers from Redis, which would keep them for `RESULT_TTL`."""
        with redis_errors():
            if job := fetch_job(chunk_id, self._connection):
                job.delete()

    def count_waiting(self) -> int:
        """Counts the chunks that wait."""
        with redis_errors():
            return len(self._queue)

    def count_ready_workers(self) -> int:
        """Counts the live workers whose model is loaded."""
        with redis_errors():
            return len(get_live_workers(self._connection, READY_KEY))

    def get_batch_size(self) -> int:
        """Returns the number of images for one job: the smallest batch size among the ready workers."""
        with redis_errors():
            workers = get_live_workers(self._connection, READY_KEY)
        return min((w.batch_size for w in workers.values() if w.batch_size), default=DEFAULT_BATCH_SIZE)


def _read_answers(result: Result) -> list[Answer] | None:
    """Reads the answers of a finished job; None if it failed or answered in a format that is not known here."""
    if result.type is not Result.Type.SUCCESSFUL or not result.return_value:
        return None
    try:
        return read_message(ChunkAnswers, result.return_value).answers
    except MessageError:
        return None

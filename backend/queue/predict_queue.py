"""The queues of the predict workers: chunks of tasks in, one answer per task out.

Each model has a queue of its own, named after the checkpoint, so that a worker never gets the chunks of another model.
"""

from __future__ import annotations

import enum
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from redis import Redis
from rq.job import Job, JobStatus
from rq.results import Result
from rq.utils import now

from backend.errors import MessageError, Overloaded, QueueUnavailable
from backend.logs import REQUEST_ID
from backend.queue.backlogs import Backlogs, Place
from backend.queue.jobs import PREDICT_FUNCTION, fetch_job, get_final_result, make_queue
from backend.queue.live_workers import READY_KEY, WorkerInfo, get_live_workers
from backend.queue.messages import Answer, Chunk, ChunkAnswers, TaskError, read_message
from backend.queue.recovery import LostChunk, allow_lost_attempts
from backend.queue.redis import redis_errors

PREDICT = "predict:"  # + fingerprint of the checkpoint: the queue's name
QUEUES_KEY = "rq:queues"  # set of the keys of all queues that ever had a job
QUEUE_KEY = "rq:queue:"
BATCH_SIZE_KEY = "gdino:batch-size:"  # + fingerprint of the checkpoint -> images of a batch, as of the last workers
DEFAULT_BATCH_SIZE = 4  # images, while no worker was ever ready
JOB_TIMEOUT = 3600  # s; a task of 500 pages on a CPU takes as long, and the watchdog ends what hangs
MAX_WAITING_CHUNKS = 100_000  # about 300 MB of Redis
CHUNKS_PER_PIPELINE = 500
RESULT_TTL = 3600  # s for which the answers of a chunk are kept, for repeated requests
DELIVERED_RESULT_TTL = 60  # s, likewise of a chunk whose predictions Label Studio has
ENQUEUE_ATTEMPTS = 3  # to replace a job that concurrent requests may replace too
RETRY_POLL = 0.1  # s between two polls of a job that failed once and will run again
POLL_TIMEOUT = 1  # s; shorter than SOCKET_TIMEOUT, so that waiting for a job does not look like a dead Redis


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
    """The queue of one model as the web front and the commands use it; safe to share between threads.

    Every method raises QueueUnavailable if Redis does not answer.
    """

    def __init__(self, connection: Redis, checkpoint: str) -> None:
        """Opens the queue of the workers that serve a checkpoint, given its fingerprint."""
        self._connection, self._checkpoint = connection, checkpoint
        self._queue = make_queue(PREDICT + checkpoint, connection)
        self._backlogs = make_backlogs(connection, checkpoint)

    def enqueue(
        self, chunks: Sequence[Chunk], place: Place = Place.QUEUE, project: str | None = "", is_retry: bool = False
    ) -> list[Job]:
        """Enqueues chunks and returns their jobs, in order.

        A chunk that is waiting, at work or answered without an error keeps the job that it has: a repeated request
        goes on where its predecessor stopped at the deadline.

        Args:
            chunks: of one request.
            place: where they wait; chunks for the backlog are refused while too many wait there.
            project: whose they are; None keeps them off the status page.
            is_retry: whether all of their tasks failed before.

        Raises:
            Overloaded: too many chunks wait.
        """
        meta = {
            "project": project,
            "request": REQUEST_ID.get(),
            "is_bulk": place is Place.BACKLOG,
            "is_retry": is_retry,
        }
        if place is not Place.URGENT:
            self.check_room(len(chunks))
        with redis_errors():
            self._connection.sadd(QUEUES_KEY, self._queue.key)
            jobs: list[Job] = []
            for start in range(0, len(chunks), CHUNKS_PER_PIPELINE):
                some = [self._make_job(chunk, meta) for chunk in chunks[start : start + CHUNKS_PER_PIPELINE]]
                jobs += self._enqueue(some, place, project or "")
            return jobs

    def check_room(self, chunks: int) -> None:
        """Raises Overloaded if so many more chunks may not wait."""
        if (waiting := self.count_waiting()) + chunks > MAX_WAITING_CHUNKS:
            raise Overloaded(f"{waiting} chunks are waiting already; try again later")

    def _make_job(self, chunk: Chunk, meta: dict[str, str | bool | None]) -> Job:
        job = self._queue.create_job(
            PREDICT_FUNCTION,
            (chunk.payload,),
            job_id=chunk.id,
            meta=meta,
            status=JobStatus.QUEUED,
            timeout=JOB_TIMEOUT,
            result_ttl=RESULT_TTL,
            failure_ttl=RESULT_TTL,
            retry=allow_lost_attempts(),
            description=f"predict {len(chunk.tasks)} tasks",  # RQ's own would log addresses with their tokens
        )
        job.origin, job.enqueued_at = self._queue.name, now()
        return job

    def _enqueue(self, jobs: Sequence[Job], place: Place, project: str) -> list[Job]:
        """Enqueues new jobs; keeps those that exist, and replaces those that failed."""
        enqueued = {job.id: job for job in jobs}
        missing = list(enqueued.values())
        for _ in range(ENQUEUE_ATTEMPTS):
            is_new = self._backlogs.enqueue(missing, place, project)
            missing = [
                job
                for job, is_new in zip(missing, is_new, strict=True)
                if not is_new and self._delete_if_failed(job.id)
            ]
            if not missing:
                return [enqueued[job.id] for job in jobs]
        raise QueueUnavailable("concurrent requests keep replacing this job; try again")

    def _delete_if_failed(self, job_id: str) -> bool:
        """Deletes a job that failed or answered a task with an error; returns whether there is none of this id now."""
        job = fetch_job(job_id, self._connection)
        if job is None:
            return True
        result = get_final_result(job)
        if result is None:
            return False
        answers = _read_answers(result)
        if answers is not None and not any(isinstance(answer, TaskError) for answer in answers):
            return False
        delete_chunk(self._connection, job_id)
        return True

    def wait(self, job: Job, deadline: float, is_cancelled: Callable[[], bool] = lambda: False) -> list[Answer] | None:
        """Waits for a job and returns its answers; None if it failed.

        Args:
            job: from `enqueue`.
            deadline: of `time.monotonic`.
            is_cancelled: returns whether to wait no longer.

        Raises:
            TimeoutError: the job is not finished at the deadline, or when the waiting was cancelled.
        """
        with redis_errors():
            while True:
                start = time.monotonic()
                is_in_time = start < deadline and not is_cancelled()
                if result := get_final_result(job, POLL_TIMEOUT if is_in_time else 0):
                    return _read_answers(result)
                if not is_in_time:
                    raise TimeoutError
                if time.monotonic() - start < RETRY_POLL:  # the result of an earlier attempt does not block
                    time.sleep(RETRY_POLL)

    def count_waiting(self) -> int:
        """Counts the chunks that wait."""
        with redis_errors():
            return len(self._queue) + self._backlogs.count()

    def get_ready_workers(self) -> dict[str, WorkerInfo]:
        """Returns the live workers by name whose model is loaded."""
        with redis_errors():
            workers = get_live_workers(self._connection, READY_KEY)
        return {name: worker for name, worker in workers.items() if worker.checkpoint == self._checkpoint}

    def get_batch_size(self) -> int:
        """Returns the number of images for one job: the smallest batch size among the ready workers.

        Without any it is that of the last ones, so that a request that is repeated while they start again is cut into
        the same chunks, and finds its answers.
        """
        sizes = [worker.batch_size for worker in self.get_ready_workers().values() if worker.batch_size]
        with redis_errors():
            if sizes:
                self._connection.set(BATCH_SIZE_KEY + self._checkpoint, min(sizes))
                return min(sizes)
            return int(self._connection.get(BATCH_SIZE_KEY + self._checkpoint) or DEFAULT_BATCH_SIZE)


def get_result(connection: Redis, chunk_id: str) -> ChunkResult:
    """Returns the state and answers of a chunk without waiting; raises QueueUnavailable."""
    with redis_errors():
        job = fetch_job(chunk_id, connection)
        result = get_final_result(job) if job else None
    if job is None:
        return ChunkResult(ChunkState.MISSING)
    if result is None:
        return ChunkResult(ChunkState.WAITING)
    answers = _read_answers(result)
    return ChunkResult(ChunkState.FAILED if answers is None else ChunkState.ANSWERED, answers)


def filter_unfinished(connection: Redis, chunk_ids: Sequence[str]) -> set[str]:
    """Returns those of these chunks that wait or are at work; the others are answered, failed or missing.

    Raises:
        QueueUnavailable: Redis does not answer.
    """
    with redis_errors(), connection.pipeline(transaction=False) as pipeline:
        for chunk_id in chunk_ids:
            pipeline.hget(Job.key_for(chunk_id), "status")
            pipeline.hexists(Job.key_for(chunk_id), "data")  # without, a late heartbeat left it
        rows = pipeline.execute()
    unfinished = (JobStatus.QUEUED.value.encode(), JobStatus.STARTED.value.encode())
    states = zip(chunk_ids, rows[::2], rows[1::2], strict=True)
    return {chunk_id for chunk_id, status, is_whole in states if is_whole and status in unfinished}


def expire_result(connection: Redis, chunk_id: str) -> None:
    """Keeps the answers of a chunk that are delivered for a moment only: somebody may be waiting for them."""
    with redis_errors(), connection.pipeline(transaction=False) as pipeline:
        pipeline.expire(Job.key_for(chunk_id), DELIVERED_RESULT_TTL)
        pipeline.expire(f"rq:results:{chunk_id}", DELIVERED_RESULT_TTL)
        pipeline.execute()


def delete_chunk(connection: Redis, chunk_id: str) -> None:
    """Removes a chunk and its answers from Redis, which would keep them for `RESULT_TTL`; raises QueueUnavailable."""
    with redis_errors():
        if job := fetch_job(chunk_id, connection):
            job.delete()
        LostChunk(connection, chunk_id).delete()


def make_backlogs(connection: Redis, checkpoint: str) -> Backlogs:
    """Makes the backlogs of the queue of a checkpoint."""
    queue = make_queue(PREDICT + checkpoint, connection)
    return Backlogs(connection, queue.name, queue.key)


def count_waiting_by_checkpoint(connection: Redis) -> Counter[str]:
    """Counts the chunks that wait for the workers of each checkpoint, by its fingerprint; raises QueueUnavailable."""
    with redis_errors():
        keys: set[bytes] = connection.smembers(QUEUES_KEY)  # type: ignore[assignment]
    prefix = QUEUE_KEY + PREDICT
    checkpoints = [key.decode().removeprefix(prefix) for key in keys if key.decode().startswith(prefix)]
    return Counter({checkpoint: PredictQueue(connection, checkpoint).count_waiting() for checkpoint in checkpoints})


def _read_answers(result: Result) -> list[Answer] | None:
    """Reads the answers of a finished job; None if it failed or answered in a format that is not known here."""
    if result.type is not Result.Type.SUCCESSFUL or not result.return_value:
        return None
    try:
        return read_message(ChunkAnswers, result.return_value).answers
    except MessageError:
        return None

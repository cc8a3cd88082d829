"""The queue "predict": the jobs, their names, and who may run them.

Jobs and answers are plain JSON. A worker runs only the functions in `ALLOWED`: a job in Redis may name any import path.
"""

from __future__ import annotations

import hashlib
import json
import os
import socket
import time
from collections.abc import Mapping, Sequence
from typing import Any

from redis import Redis
from rq import Queue, Retry
from rq.exceptions import DuplicateJobError, NoSuchJobError
from rq.job import Job
from rq.results import Result
from rq.serializers import JSONSerializer

from backend.errors import Overloaded, QueueUnavailable
from backend.logs import REQUEST_ID
from backend.queue.allowed_job import PREDICT_FUNCTION, AllowedJob, final_result
from backend.queue.redis import get_indexed, redis_errors

PREDICT = "predict"
FIT = "fit"

CHUNK_KEY = "gdino:chunk:"  # + job id -> hash of a chunk over which a worker died: deaths, at, and answers by number
MOVE_TO_FRONT_SCRIPT = "if redis.call('LREM', KEYS[1], 1, ARGV[1]) == 1 then redis.call('LPUSH', KEYS[1], ARGV[1]) end"
READY_KEY = "gdino:ready:"  # + worker name -> JSON: batch_size, device; a worker with its model loaded keeps it alive
DEFAULT_BATCH_SIZE = 4  # pictures in one job while no worker has said what it wants
IMPORTED_KEY = "gdino:imported"  # sorted set: project -> when it last got tasks

JOB_TIMEOUT = 3600  # s; a task of 500 pages on a CPU takes as long, and the watchdog ends what hangs
MAX_WAITING_CHUNKS = 100_000  # waiting; about 300 MB of Redis
RESULT_TTL = 3600  # s that the answers of a finished chunk are kept, for whoever asks for the same again
ENQUEUE_ATTEMPTS = 3  # at putting a job in the place of one that others may be replacing too
RETRY_POLL = 0.1  # s between looks at a job that failed once and is to run again
POLL_TIMEOUT = 1  # s; shorter than SOCKET_TIMEOUT, so that waiting for a job does not look like a dead Redis


def chunk_id(payload: Mapping[str, Any]) -> str:
    """The same for the same tasks asked the same way: the name of their job."""
    return hashlib.sha256(json.dumps(payload, sort_keys=True).encode()).hexdigest()


def predict_queue(connection: Redis) -> Queue:
    """RQ's queue of chunks to predict."""
    return Queue(PREDICT, connection=connection, serializer=JSONSerializer, job_class=AllowedJob)


class PredictQueue:
    """The queue "predict" as the web front sees it; safe to share between threads."""

    def __init__(self, connection: Redis) -> None:
        self._connection = connection
        self._queue = predict_queue(connection)

    def enqueue(
        self, payloads: Sequence[dict[str, Any]], at_front: bool = False, project: str | None = ""
    ) -> list[Job]:
        """One job for each payload, in order; those at the front run before all that wait.

        A payload that is waiting, at work or well answered within the last hour keeps the job it has, so that asking
        again goes on where the deadline cut in. `project` is whose they are, for the status page;
        None keeps them off it.

        Raises:
            Overloaded: too much is waiting already; a single chunk at the front is always taken.
            QueueUnavailable: Redis does not answer.
        """
        with redis_errors():
            if not at_front and len(self._queue) + len(payloads) > MAX_WAITING_CHUNKS:
                raise Overloaded(f"{len(self._queue)} chunks are waiting already; ask again later")
            meta: dict[str, str | None] = {"project": project, "request": REQUEST_ID.get()}
            return [self._enqueue(payload, at_front, meta) for payload in payloads]

    def _enqueue(self, payload: dict[str, Any], at_front: bool, meta: dict[str, str | None]) -> Job:
        job_id = chunk_id(payload)
        for _ in range(ENQUEUE_ATTEMPTS):
            try:
                return self._enqueue_new(job_id, payload, at_front, meta)
            except DuplicateJobError:
                if job := self._still_good(job_id):
                    if at_front:
                        self._to_front(job_id)
                    return job
        raise QueueUnavailable("others keep taking the same job away; ask again")

    def _still_good(self, job_id: str) -> Job | None:
        """The job of this id; one that failed, or holds a task that did, makes room."""
        job = self._fetch(job_id)
        if job is None:
            return None
        result = final_result(job)
        if result is None or _is_well_answered(result):
            return job
        job.delete()
        self._connection.delete(CHUNK_KEY + job_id)  # what a worker kept of it before it died
        return None

    def _to_front(self, job_id: str) -> None:
        """An annotator does not wait behind the bulk that asked for the same before."""
        self._connection.eval(MOVE_TO_FRONT_SCRIPT, 1, self._queue.key, job_id)

    def _fetch(self, job_id: str) -> Job | None:
        try:
            return self._queue.job_class.fetch(job_id, connection=self._connection, serializer=JSONSerializer)
        except NoSuchJobError:
            return None

    def _enqueue_new(self, job_id: str, payload: dict[str, Any], at_front: bool, meta: dict[str, str | None]) -> Job:
        return self._queue.enqueue(
            PREDICT_FUNCTION,
            payload,
            job_id=job_id,
            unique=True,
            at_front=at_front,
            meta=meta,
            job_timeout=JOB_TIMEOUT,
            result_ttl=RESULT_TTL,
            failure_ttl=RESULT_TTL,
            retry=Retry(max=1),
            description=f"predict {len(payload['tasks'])} tasks",  # the default would log addresses and their tokens
        )

    def wait(self, job: Job, deadline: float) -> Any:
        """What the job returned; None if it failed, or is not finished at `deadline` (of `time.monotonic`).

        Raises:
            QueueUnavailable: Redis does not answer.
            TimeoutError: not finished by the deadline.
        """
        with redis_errors():
            while True:
                start = time.monotonic()
                in_time = start < deadline
                if result := final_result(job, POLL_TIMEOUT if in_time else 0):
                    return result.return_value if result.type is Result.Type.SUCCESSFUL else None
                if not in_time:
                    raise TimeoutError
                if (
                    time.monotonic() - start < RETRY_POLL
                ):  # the result of an earlier attempt is there and does not block
                    time.sleep(RETRY_POLL)

    def get_result(self, payload: dict[str, Any]) -> tuple[list[dict[str, Any]] | None, str]:
        """What a chunk was answered, None if it was not, and how it stands: answered, waiting, failed, or gone.

        Gone: never asked for, or its answers lay there longer than `RESULT_TTL`.

        Raises:
            QueueUnavailable: Redis does not answer.
        """
        with redis_errors():
            job = self._fetch(chunk_id(payload))
            result = final_result(job) if job else None
        if result and result.return_value:
            return list(result.return_value["answers"]), "answered"
        return None, "gone" if job is None else "failed" if result else "waiting"

    def delete(self, payload: dict[str, Any]) -> None:
        """Takes a chunk and its answers out of Redis, which would keep them for an hour.

        Raises:
            QueueUnavailable: Redis does not answer.
        """
        with redis_errors():
            if job := self._fetch(chunk_id(payload)):
                job.delete()

    def count_waiting(self) -> int:
        """How many chunks wait.

        Raises:
            QueueUnavailable: Redis does not answer.
        """
        with redis_errors():
            return len(self._queue)

    def count_ready_workers(self) -> int:
        """How many workers have their model loaded.

        Raises:
            QueueUnavailable: Redis does not answer.
        """
        with redis_errors():
            return len(get_indexed(self._connection, READY_KEY))

    def batch_size(self) -> int:
        """Pictures in one job, as the smallest of the ready workers wants it.

        Raises:
            QueueUnavailable: Redis does not answer.
        """
        with redis_errors():
            rows = get_indexed(self._connection, READY_KEY)
        return min((int(json.loads(row)["batch_size"]) for row in rows.values()), default=DEFAULT_BATCH_SIZE)


def _is_well_answered(result: Result) -> bool:
    if result.type is not Result.Type.SUCCESSFUL or not result.return_value:
        return False
    return not any("error" in answer for answer in result.return_value["answers"])


def record_import(connection: Redis, project: str) -> None:
    """Notes that a project got tasks.

    Raises:
        QueueUnavailable: Redis does not answer.
    """
    with redis_errors():
        connection.zadd(IMPORTED_KEY, {project: time.time()})


def worker_name() -> str:
    """A name that no other worker on any machine has."""
    return f"{socket.gethostname()}-{os.getpid()}-{time.time_ns() % 1_000_000}"

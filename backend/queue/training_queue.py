"""The queue "fit" and what is known of each project's training: one job a project, its progress, its outcome."""

from __future__ import annotations

import json
import time
from typing import Any

from redis import Redis
from rq import Queue, Retry
from rq.exceptions import DuplicateJobError, NoSuchJobError
from rq.serializers import JSONSerializer

from backend.queue.allowed_job import FIT_FUNCTION, AllowedJob, final_result
from backend.queue.predict_queue import CHUNK_KEY, FIT
from backend.queue.redis import get_indexed, redis_errors, set_indexed

PROGRESS_KEY = "gdino:training:"  # + project -> JSON: state, done, of, text, time, and in the end the outcome
FIT_READY_KEY = "gdino:fit-ready:"  # + worker name; a fit worker keeps it alive
FIT_TIMEOUT = 7 * 24 * 3600  # s
RETRIES = 3  # of a training whose worker was killed; it goes on where it was


def training_queue(connection: Redis) -> Queue:
    """RQ's queue of trainings."""
    return Queue(FIT, connection=connection, serializer=JSONSerializer, job_class=AllowedJob)


class TrainingQueue:
    """Trainings as the web front and the command line see them; safe to share between threads."""

    def __init__(self, connection: Redis) -> None:
        self._connection = connection
        self._queue = training_queue(connection)

    def start(self, project: str, train: str) -> str:
        """Puts a training into the queue, unless one of this project waits or runs, and returns the name of its job.

        Raises:
            QueueUnavailable: Redis does not answer.
        """
        job_id = f"fit-{project}"
        with redis_errors():
            try:
                self._enqueue(job_id, project, train)
            except DuplicateJobError:
                if self._has_ended(job_id):
                    self._enqueue(job_id, project, train)
        return job_id

    def _has_ended(self, job_id: str) -> bool:
        """Whether the job is over; it then makes room for another."""
        try:
            job = AllowedJob.fetch(job_id, connection=self._connection, serializer=JSONSerializer)
        except NoSuchJobError:
            return True
        if final_result(job) is None:
            return False
        job.delete()
        self._connection.delete(CHUNK_KEY + job_id)  # how often its workers died
        return True

    def _enqueue(self, job_id: str, project: str, train: str) -> None:
        self._queue.enqueue(
            FIT_FUNCTION,
            {"project": project, "train": train, "run": str(time.time_ns())},
            job_id=job_id,
            unique=True,
            job_timeout=FIT_TIMEOUT,
            retry=Retry(max=RETRIES),
            description=f"train for project {project}",
        )
        self.report(project, "queued")

    def report(self, project: str, state: str, **more: Any) -> None:
        """Says where a training is: `state` is queued, reading, loading, measuring, training, done or failed.

        Raises:
            QueueUnavailable: Redis does not answer.
        """
        row = {"project": project, "state": state, "time": round(time.time(), 1), **more}
        with redis_errors():
            set_indexed(self._connection, PROGRESS_KEY, project, json.dumps(row))

    def progress(self, project: str) -> dict[str, Any] | None:
        """The last report of a project's training; None if there never was one.

        Raises:
            QueueUnavailable: Redis does not answer.
        """
        with redis_errors():
            row = self._connection.get(PROGRESS_KEY + project)
        return json.loads(row) if row else None

    def all(self) -> list[dict[str, Any]]:
        """The last report of each project's training.

        Raises:
            QueueUnavailable: Redis does not answer.
        """
        with redis_errors():
            rows = get_indexed(self._connection, PROGRESS_KEY)
        return [json.loads(row) for _, row in sorted(rows.items())]

"""The queue "fit": one training per project, its progress and its outcome."""

from __future__ import annotations

import json
import time
from typing import Any

from redis import Redis
from rq.exceptions import DuplicateJobError

from backend.queue.jobs import TRAIN_FUNCTION, fetch_job, get_final_result, make_queue
from backend.queue.messages import TrainingRequest
from backend.queue.recovery import LostChunk, allow_lost_attempts
from backend.queue.redis import get_indexed, redis_errors, set_indexed

FIT = "fit"  # the queue's name
PROGRESS_KEY = "gdino:training:"  # + project -> JSON: state, done, of, text, time, and in the end the outcome
TRAINING_TIMEOUT = 7 * 24 * 3600  # s


class TrainingQueue:
    """Trainings as the web front and the commands use them; safe to share between threads.

    Every method raises QueueUnavailable if Redis does not answer.
    """

    def __init__(self, connection: Redis) -> None:
        self._connection = connection
        self._queue = make_queue(FIT, connection)

    def start(self, project: str, train: str) -> str:
        """Enqueues a training, unless one of the project waits or runs; returns the id of its job.

        Args:
            project: its number.
            train: what the training may change, as the setting TRAIN.
        """
        job_id = f"fit-{project}"
        with redis_errors():
            try:
                self._enqueue(job_id, project, train)
            except DuplicateJobError:
                if self._delete_if_finished(job_id):
                    self._enqueue(job_id, project, train)
        return job_id

    def _enqueue(self, job_id: str, project: str, train: str) -> None:
        request = TrainingRequest(project=project, train=train, run=str(time.time_ns()))
        self._queue.enqueue(
            TRAIN_FUNCTION,
            request.model_dump(),
            job_id=job_id,
            unique=True,
            job_timeout=TRAINING_TIMEOUT,
            retry=allow_lost_attempts(),  # each goes on where the last one stopped
            description=f"train for project {project}",
        )
        self.report(project, "queued")

    def _delete_if_finished(self, job_id: str) -> bool:
        job = fetch_job(job_id, self._connection)
        if job is None:
            return True
        if get_final_result(job) is None:
            return False
        job.delete()
        LostChunk(self._connection, job_id).delete()
        return True

    def report(self, project: str, state: str, **details: Any) -> None:
        """Saves the progress of a training.

        Args:
            project: its number.
            state: queued, reading, loading, measuring, rehearsing, training, done or failed.
            details: `done` and `of`, or the outcome.
        """
        progress = {"project": project, "state": state, "time": round(time.time(), 1), **details}
        with redis_errors():
            set_indexed(self._connection, PROGRESS_KEY, project, json.dumps(progress))

    def get_progress(self, project: str) -> dict[str, Any] | None:
        """Returns the last report of a project's training; None if there never was a training."""
        with redis_errors():
            progress = self._connection.get(PROGRESS_KEY + project)
        return json.loads(progress) if progress else None

    def list_progress(self) -> list[dict[str, Any]]:
        """Lists the last report of each project's training, by project."""
        with redis_errors():
            rows = get_indexed(self._connection, PROGRESS_KEY)
        return [json.loads(row) for _, row in sorted(rows.items())]

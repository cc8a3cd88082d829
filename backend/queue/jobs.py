"""RQ jobs that run only the functions that their worker offers, and no callbacks.

RQ resolves any import path that a job in Redis names, so whoever writes to Redis could run anything. Here the name of
a job's function is a key into the functions of the worker, and nothing is imported.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

from redis import Redis
from rq import Queue
from rq.exceptions import NoSuchJobError
from rq.job import Job
from rq.results import Result
from rq.serializers import JSONSerializer

PREDICT_FUNCTION = "predict"
TRAIN_FUNCTION = "train"

JobFunction = Callable[[Mapping[str, Any]], Mapping[str, Any]]  # plain JSON in and out


class AllowedJob(Job):
    """A job that runs a function of `functions`; the web front, which runs none, has no functions."""

    functions: ClassVar[Mapping[str, JobFunction]] = {}

    @classmethod
    def with_functions(cls, functions: Mapping[str, JobFunction]) -> type[AllowedJob]:
        """Makes the job class of a worker that offers these functions."""
        return type("AllowedJob", (cls,), {"functions": functions})

    @property
    def func(self) -> JobFunction:
        """The function to run.

        Raises:
            PermissionError: the worker does not offer it.
        """
        name = self.func_name or ""
        if name not in self.functions:
            raise PermissionError(f"this worker runs only its own functions, not {name!r}")
        return self.functions[name]

    @property
    def success_callback(self) -> None:
        """None: callbacks are import paths too."""

    @property
    def failure_callback(self) -> None:
        """None: callbacks are import paths too."""

    @property
    def stopped_callback(self) -> None:
        """None: callbacks are import paths too."""


def make_queue(name: str, connection: Redis) -> Queue:
    """Makes RQ's queue of this name, whose jobs are plain JSON."""
    return Queue(name, connection=connection, serializer=JSONSerializer, job_class=AllowedJob)


def fetch_job(job_id: str, connection: Redis) -> Job | None:
    """Fetches a job; None if Redis does not have it."""
    try:
        return AllowedJob.fetch(job_id, connection=connection, serializer=JSONSerializer)
    except NoSuchJobError:
        return None


def get_final_result(job: Job, timeout: int = 0) -> Result | None:
    """Returns a job's result, for which it waits up to `timeout` seconds; None while another attempt is to come."""
    result = job.latest_result(timeout=timeout)
    return None if result is None or result.type is Result.Type.RETRIED else result

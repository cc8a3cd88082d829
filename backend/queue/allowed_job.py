"""The jobs that a worker runs, and no others."""

from __future__ import annotations

from typing import Any

from rq.job import Job
from rq.results import Result

PREDICT_FUNCTION = "backend.prediction.predict_job.predict"


FIT_FUNCTION = "backend.training.training_job.fit"


ALLOWED = (PREDICT_FUNCTION, FIT_FUNCTION)


class AllowedJob(Job):
    """A job that resolves only functions on the list, and no callbacks."""

    @property
    def func(self) -> Any:
        """The function to run.

        Raises:
            PermissionError: it is not on the list.
        """
        if self.func_name not in ALLOWED:
            raise PermissionError("this worker runs only its own functions")
        return super().func

    @property
    def success_callback(self) -> None:
        """None: callbacks are import paths too."""

    @property
    def failure_callback(self) -> None:
        """None: callbacks are import paths too."""

    @property
    def stopped_callback(self) -> None:
        """None: callbacks are import paths too."""


def final_result(job: Job, timeout: int = 0) -> Result | None:
    """The job's result, for which it waits up to `timeout` seconds; none while another attempt is to come."""
    result = job.latest_result(timeout=timeout)
    return None if result is None or result.type is Result.Type.RETRIED else result

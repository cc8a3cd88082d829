"""The circuit breaker: pauses a project's bulk work when most images of a chunk cannot be fetched now."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from redis.exceptions import RedisError
from rq import get_current_job

from backend.queue.messages import Answer, TaskError
from backend.queue.pauses import PAUSED_BULK_KEY, Pauses

log = logging.getLogger(__name__)

MIN_FAILED_SHARE = 0.5  # of the tasks of a chunk


def pause_if_unavailable(answers: Sequence[Answer]) -> None:
    """Pauses the project of the current job, if it is a bulk job and its images are unavailable.

    Jobs that try failed tasks again do not count: they say little about the other tasks.
    """
    job = get_current_job()
    if job is None or not job.meta.get("is_bulk") or job.meta.get("is_retry"):
        return
    project = str(job.meta.get("project") or "")
    pauses = Pauses(job.connection, PAUSED_BULK_KEY)
    reasons = [answer.error.detail for answer in answers if isinstance(answer, TaskError) and answer.error.is_retryable]
    try:
        if len(reasons) < MIN_FAILED_SHARE * len(answers):
            pauses.resume(project)
            return
        seconds = pauses.pause(project, reasons[0])
    except RedisError as error:
        log.warning("project %s: its bulk work could not be paused (%s)", project, type(error).__name__)
    else:
        if seconds:
            log.warning("project %s: bulk work pauses for %d s: %s", project, seconds, reasons[0])

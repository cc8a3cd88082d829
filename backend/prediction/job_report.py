"""The report of one predict job: a line in the log, metrics, and data for the status page."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from PIL import Image
from rq import get_current_job
from rq.timeouts import JobTimeoutException

from backend.images.thumbnails import ThumbnailSampler
from backend.labelstudio.regions import read_label
from backend.labelstudio.targets import ImageTarget
from backend.logs import REQUEST_ID
from backend.metrics import FAILURES, STAGE_SECONDS, count_boxes
from backend.monitoring.activity import record_answers, record_image
from backend.monitoring.feedback import record_predicted
from backend.queue.messages import Answer, ChunkTask, TaskError

log = logging.getLogger(__name__)


class JobReport:
    """Reports the current job; outside of a job, as in a test, it only logs and counts."""

    def __init__(self, thumbnails: ThumbnailSampler) -> None:
        """Begins the report: from now on the log carries the id of the job's request."""
        self._start, self._job, self._thumbnails = time.monotonic(), get_current_job(), thumbnails
        meta = self._job.meta if self._job else {}
        self.project: str | None = meta.get("project", "")  # None: the job is kept off the status page
        self.forward_seconds = 0.0
        REQUEST_ID.set(meta.get("request", "-"))
        if self._job and self._job.enqueued_at:
            STAGE_SECONDS.labels("queue_wait").observe(max(time.time() - self._job.enqueued_at.timestamp(), 0))

    def offer_thumbnail(self, uri: str, image: Image.Image) -> None:
        """Takes a small copy of an image now and then; safe to call from any thread."""
        with _suppress_and_log():
            self._thumbnails.offer(uri, image)

    def record_sample(
        self,
        task_ids: Mapping[Any, object],
        targets: Mapping[Any, ImageTarget],
        results: Mapping[Any, object],
        model_version: str,
    ) -> None:
        """Keeps the thumbnail of one of these targets with its boxes, where there is a new one.

        All three mappings have the same keys; a result is a list of regions or an error.
        """
        keys = list(targets)
        thumbnail = self._thumbnails.pop([targets[key].uri for key in keys])
        if thumbnail is None or self._job is None or self.project is None:
            return
        key = keys[thumbnail.image_index]
        result = results[key]
        with _suppress_and_log():
            regions = result if isinstance(result, list) else []
            record_image(
                self._job.connection,
                thumbnail.jpeg,
                regions,
                project=self.project,
                task=task_ids[key],
                model_version=model_version,
            )

    def finish(self, tasks: Sequence[ChunkTask], answers: Sequence[Answer]) -> None:
        """Counts the answers and logs the chunk."""
        if self.project is not None:
            with _suppress_and_log():
                self._count(tasks, answers)
        failed = sum(isinstance(answer, TaskError) for answer in answers)
        name = f"project {self.project}" if self.project else "no project"
        seconds = time.monotonic() - self._start
        log.info(
            "%s: %d tasks in %.2f s (forward %.2f s), %d failed",
            name, len(answers), seconds, self.forward_seconds, failed,
        )  # fmt: skip

    def _count(self, tasks: Sequence[ChunkTask], answers: Sequence[Answer]) -> None:
        for answer in answers:
            if isinstance(answer, TaskError):
                FAILURES.labels(answer.error.code).inc()
                continue
            for label in filter(None, map(read_label, answer.result)):
                count_boxes(label)
        if self._job and self.project is not None:
            record_answers(self._job.connection, self.project, tasks, answers)
            record_predicted(self._job.connection, self.project, tasks, answers)


@contextlib.contextmanager
def _suppress_and_log() -> Iterator[None]:
    """Logs reporting errors, which never fail a job."""
    try:
        yield
    except JobTimeoutException:
        raise
    except Exception:
        log.exception("could not record status-page data")

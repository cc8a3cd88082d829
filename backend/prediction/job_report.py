"""What a worker tells of the chunk in hand: a line in the log, figures, and notes for the status page."""

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
from backend.labelstudio.regions import Region, read_label
from backend.logs import REQUEST_ID
from backend.metrics import FAILURES, STAGE_SECONDS, count_boxes
from backend.monitoring.activity import record_answers, record_image
from backend.monitoring.project_stats import record_predicted

log = logging.getLogger(__name__)

Rows = Sequence[Mapping[str, Any]]


class JobReport:
    """Of one job; without one, as in a test, it only logs and counts."""

    def __init__(self, glimpse: ThumbnailSampler) -> None:
        """Begins: what is logged from now on is about this job's request."""
        self._start, self._job, self._glimpse = time.monotonic(), get_current_job(), glimpse
        meta = self._job.meta if self._job else {}
        self._project = meta.get("project", "")  # None: nothing of it is kept
        REQUEST_ID.set(meta.get("request", "-"))
        if self._job and self._job.enqueued_at:
            STAGE_SECONDS.labels("queue_wait").observe(max(time.time() - self._job.enqueued_at.timestamp(), 0))

    def loaded(self, uri: str, image: Image.Image) -> None:
        """Takes a small copy of a picture now and then; safe to call from any thread."""
        with _never_in_the_way():
            self._glimpse.see(uri, image)

    def picture(self, uris: Sequence[str], tasks: Sequence[object], found: Sequence[Any], version: str) -> None:
        """Keeps one of these pictures now and then; for each its task, and its regions or an error."""
        taken = self._glimpse.take(uris)
        if not (taken and self._job and self._project is not None):
            return
        place, jpeg = taken
        regions: Sequence[Region] = found[place] if isinstance(found[place], list) else []
        about = {"project": self._project, "task": tasks[place], "model_version": version}
        with _never_in_the_way():
            record_image(self._job.connection, jpeg, regions, **about)

    def answered(self, tasks: Rows, answers: Rows) -> None:
        """Ends."""
        if self._project is not None:
            with _never_in_the_way():
                self._count(tasks, answers)
        failed, took = sum("error" in answer for answer in answers), time.monotonic() - self._start
        name = f"project {self._project}" if self._project else "no project"
        log.info("%s: %d tasks in %.2f s, %d of them failed", name, len(answers), took, failed)

    def _count(self, tasks: Rows, answers: Rows) -> None:
        for answer in answers:
            if "error" in answer:
                FAILURES.labels(answer["error"]["code"]).inc()
            for label in filter(None, map(read_label, answer.get("result", ()))):
                count_boxes(label)
        if self._job:
            record_answers(self._job.connection, self._project, tasks, answers)
            record_predicted(self._job.connection, self._project, tasks, answers)


@contextlib.contextmanager
def _never_in_the_way() -> Iterator[None]:
    """What people may look at later fails no task now."""
    try:
        yield
    except JobTimeoutException:
        raise
    except Exception:
        log.exception("the status page will miss something")

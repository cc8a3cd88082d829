"""The delivery job: imports the finished predictions of one project into Label Studio, each exactly once.

Label Studio saves pulled predictions one by one (0.14 s each) and gives up after 100 s; an import of 250 takes 0.7 s.

What happens to an entry of the outbox that is due, by the state of its chunk:

| chunk    | the job                                                                       |
|----------|-------------------------------------------------------------------------------|
| WAITING  | looks again later                                                             |
| MISSING  | enqueues it again: its answers expired, or it is time for another attempt     |
| FAILED   | enqueues it again after a while                                               |
| ANSWERED | imports its predictions (`batch_import`); later deletes what is stored twice  |

A task whose error may pass is tried again for RETRY_HOURS, with growing delays; then, and with any other error at once,
it becomes a dead letter (`failures`).
"""

from __future__ import annotations

import contextlib
import logging
import random
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from redis import Redis

from backend.delivery.batch_import import Batch, BatchImporter, DeliveryLost, group_into_batches
from backend.delivery.failures import Failure, Failures
from backend.delivery.outbox import Outbox, OutboxEntry
from backend.errors import (
    BackendError,
    LabelStudioError,
    LabelStudioNotFound,
    Overloaded,
    QueueUnavailable,
)
from backend.labelstudio.client import LabelStudioClient
from backend.queue.backlogs import Place
from backend.queue.messages import Answer, ErrorDetail, TaskError
from backend.queue.pauses import FIRST_PAUSE, PAUSED_DELIVERY_KEY, Pauses
from backend.queue.predict_queue import (
    ChunkState,
    PredictQueue,
    delete_chunk,
    expire_result,
    filter_unfinished,
    get_result,
)
from backend.queue.redis import redis_errors
from backend.settings import Settings

log = logging.getLogger(__name__)

ENTRIES_PER_LOOK = 512  # that are loaded at a time
# An import makes Label Studio recount all tasks of the project (0.6 ms each with SQLite), however small it is. So while
# more predictions are being made, the project rests for IMPORT_REST times the duration of the last import.
IMPORT_REST, MAX_IMPORT_REST = 5, 60  # times, s
LOOK_UP_INTERVAL = 10  # s between two looks for predictions whose delivery has no end yet
FIRST_RETRY, MAX_RETRY = 8, 900  # s before another attempt at a failed task
RECHECKS_PER_LOOK = 500  # tasks

CHUNK_FAILED = ErrorDetail(
    code=BackendError.code, detail="the workers failed on this chunk of tasks; their log says why", is_retryable=True
)


class Deliverer:
    """Delivers projects, one at a time; made once in each thread."""

    def __init__(
        self,
        settings: Settings,
        connection: Redis,
        label_studio: LabelStudioClient,
        holds_job: Callable[[], bool] = lambda: True,
    ) -> None:
        """Prepares deliveries; `holds_job` returns whether the current job is still this worker's."""
        self._settings, self._connection, self._label_studio = settings, connection, label_studio
        self._outbox, self._failures = Outbox(connection), Failures(connection)
        self._pauses = Pauses(connection, PAUSED_DELIVERY_KEY)
        self.holds_job = holds_job
        self._importer = BatchImporter(settings, connection, label_studio, lambda: self.holds_job())
        self._has_held = False  # tasks whose earlier delivery is not known

    def deliver(self, payload: Mapping[str, Any]) -> dict[str, Any]:
        """Delivers what is due of a project; the function of the jobs."""
        self.deliver_project(str(payload["project"]))
        return {}

    def deliver_project(self, project: str) -> None:
        """Delivers what is due of a project, until Label Studio refuses or an import calls for a rest.

        Raises:
            QueueUnavailable: Redis does not answer.
        """
        self._has_held = False
        try:
            while self._deliver_due(project):
                pass
            self._delete_doubles(project)
            if not self._has_held:
                self._resume(project)
        except (LabelStudioError, QueueUnavailable) as error:
            with redis_errors():
                seconds = self._pauses.pause(project, str(error))
            if seconds:
                log.warning("project %s: delivery pauses for %d s: %s", project, seconds, error)
            self._outbox.rest(project, seconds or FIRST_PAUSE)
        except DeliveryLost:
            log.warning("project %s: another worker delivers it", project)
            return
        self._outbox.schedule(project)

    def _resume(self, project: str) -> None:
        with redis_errors():
            self._pauses.resume(project)

    def _deliver_due(self, project: str) -> bool:
        """Delivers the first entries that are due; returns whether to look for more at once."""
        due = self._outbox.list_due(project, ENTRIES_PER_LOOK)
        unfinished = filter_unfinished(self._connection, due)
        self._outbox.postpone(project, sorted(unfinished))
        finished: dict[str, list[tuple[OutboxEntry, Sequence[Answer]]]] = defaultdict(list)  # by model version
        for entry in self._outbox.load(project, [chunk_id for chunk_id in due if chunk_id not in unfinished]):
            result = get_result(self._connection, entry.chunk_id)
            if result.state in (ChunkState.MISSING, ChunkState.WAITING):
                self._outbox.postpone(project, [entry.chunk_id])
            if result.state is ChunkState.MISSING:
                with contextlib.suppress(Overloaded, QueueUnavailable):  # then it is looked at again
                    queue = PredictQueue(self._connection, entry.chunk.checkpoint)
                    queue.enqueue([entry.chunk], Place.BACKLOG, project, is_retry=entry.attempts > 0)
            elif result.state is not ChunkState.WAITING:
                answers = result.answers
                if answers is None or len(answers) != len(entry.chunk.tasks):
                    answers = [TaskError(error=CHUNK_FAILED)] * len(entry.chunk.tasks)
                finished[entry.chunk.model_version].append((entry, answers))
        seconds = 0.0
        for version, entries in sorted(finished.items()):
            for batch in group_into_batches(project, version, entries):
                start = time.monotonic()
                self._deliver_batch(batch)
                seconds = time.monotonic() - start
        if finished and self._outbox.count(project):
            self._outbox.rest(project, min(IMPORT_REST * seconds, MAX_IMPORT_REST))
            return False
        return bool(due)

    def _deliver_batch(self, batch: Batch) -> None:
        """Delivers a batch; while Label Studio refuses it its entries stay, until they are too old."""
        try:
            self._importer.import_batch(batch)
        except (LabelStudioError, QueueUnavailable) as error:
            self._give_up_old_entries(batch, error)
            raise
        self._has_held |= bool(batch.held)
        self._finish(batch)

    def _give_up_old_entries(self, batch: Batch, error: BackendError) -> None:
        """Gives up the tasks of a failed batch that could not be delivered for RETRY_HOURS."""
        now = self._outbox.get_time()
        failed_since = self._outbox.mark_failed(batch.project, [entry.chunk_id for entry, _ in batch.entries])
        limit = self._settings.retry_hours * 3600
        old = [(entry, answers) for entry, answers in batch.entries if now - failed_since[entry.chunk_id] > limit]
        tasks = [task for entry, _ in old for task in entry.task_ids]
        pushed = self._outbox.filter_pushed(batch.project, batch.version, tasks)
        failures = {task: ErrorDetail.from_error(error) for task in tasks if task not in pushed}
        self._finish(Batch(batch.project, batch.version, old, failures=failures), is_final=True)

    def _finish(self, batch: Batch, is_final: bool = False) -> None:
        """Removes the entries without held tasks; failed tasks are tried again later, or become dead letters."""
        now = self._outbox.get_time()
        held = [entry.chunk_id for entry, _ in batch.entries if batch.held & set(entry.task_ids)]
        self._outbox.postpone(batch.project, held, LOOK_UP_INTERVAL)
        for entry, _ in batch.entries:
            if entry.chunk_id in held:
                continue
            failed_since = entry.failed_since or now
            is_too_old = is_final or now - failed_since > self._settings.retry_hours * 3600
            failed = {task: batch.failures[task] for task in entry.task_ids if task in batch.failures}
            retried = {task for task, error in failed.items() if error.is_retryable and not is_too_old}
            dead = [
                Failure(task, error.code, error.detail, now, batch.version, entry.attempts + 1)
                for task, error in failed.items()
                if task not in retried
            ]
            self._failures.record(batch.project, dead)  # before the entry is gone
            retry = _make_retry(entry, retried, failed_since, failed[min(retried)]) if retried else None
            if retried:  # they may be of the same chunk
                delete_chunk(self._connection, entry.chunk_id)
            else:
                expire_result(self._connection, entry.chunk_id)
            resolved = [task for task in entry.task_ids if task not in retried]
            delay = min(FIRST_RETRY * 2**entry.attempts, MAX_RETRY) * random.uniform(0.75, 1.25)
            self._outbox.replace(entry, resolved, retry, delay)
            self._failures.remove(batch.project, [task for task in resolved if task not in failed])
            if retry:
                first = failed[min(retried)].detail
                log.warning(
                    "project %s: %d tasks are tried again in %d s: %s", batch.project, len(retried), delay, first
                )

    def _delete_doubles(self, project: str) -> None:
        """Deletes predictions that Label Studio has stored twice: by an import without an end, and by another."""
        while rechecks := self._outbox.list_due_rechecks(project, RECHECKS_PER_LOOK):
            by_version: dict[str, list[int]] = defaultdict(list)
            for version, task in rechecks:
                by_version[version].append(task)
            with contextlib.suppress(LabelStudioNotFound):  # the project was deleted
                for version, tasks in by_version.items():
                    deleted = self._label_studio.delete_double_predictions(project, tasks, version)
                    if deleted:
                        log.warning("project %s: deleted %d predictions that were stored twice", project, deleted)
            self._outbox.remove_rechecks(project, rechecks)


def _make_retry(entry: OutboxEntry, tasks: set[int], failed_since: float, error: ErrorDetail) -> OutboxEntry:
    """Makes the entry of the next attempt at some tasks of an entry."""
    chunk = entry.chunk.model_copy(update={"tasks": tuple(task for task in entry.chunk.tasks if task.id in tasks)})
    attempt = OutboxEntry.from_chunk(
        entry.project, type(chunk).model_validate(dict(chunk)), entry.since, entry.created_at
    )
    changes = {"failed_since": failed_since, "attempts": entry.attempts + 1, "error": error}
    return attempt.model_copy(update=changes)

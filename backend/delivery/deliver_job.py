"""The delivery job: imports the finished predictions of one project into Label Studio, each exactly once.

Label Studio saves pulled predictions one by one (0.14 s each) and gives up after 100 s; an import of 250 takes 0.7 s.

What happens to an entry of the outbox that is due, by the state of its chunk:

| chunk    | the job                                                                                    |
|----------|--------------------------------------------------------------------------------------------|
| WAITING  | looks again later                                                                          |
| MISSING  | enqueues it again: its answers expired, or it is time for another attempt                  |
| FAILED   | enqueues it again after a while                                                            |
| ANSWERED | compares its tasks with Label Studio, claims them, imports the predictions, and confirms it |

What happens to a task with an earlier claim that Label Studio lacks the prediction of: it is left alone as long as that
delivery may still be stored, and imported then. It is looked at once more later, and a double is deleted.

A task whose error may pass is tried again for RETRY_HOURS, with growing delays; then, and with any other error at once,
it becomes a dead letter (`failures`).
"""

from __future__ import annotations

import contextlib
import logging
import random
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from redis import Redis

from backend.delivery.failures import Failure, Failures
from backend.delivery.outbox import SELECTION_TIMEOUT, Delivery, Outbox, OutboxEntry
from backend.errors import (
    BackendError,
    LabelStudioAuthError,
    LabelStudioError,
    LabelStudioNotFound,
    LabelStudioUnavailable,
    Overloaded,
    QueueUnavailable,
)
from backend.labelstudio.client import LabelStudioClient
from backend.metrics import PUSH_SECONDS, PUSHED_PREDICTIONS
from backend.queue.backlogs import Place
from backend.queue.messages import Answer, ChunkTask, ErrorDetail, Prediction, TaskError
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
MAX_PREDICTIONS_PER_IMPORT, MAX_REGIONS_PER_IMPORT = 5000, 40_000  # about 12 MB
# An import makes Label Studio recount all tasks of the project (0.6 ms each with SQLite), however small it is. So while
# more predictions are being made, the project rests for IMPORT_REST times the duration of the last import.
IMPORT_REST, MAX_IMPORT_REST = 5, 60  # times, s
LOOK_UP_INTERVAL = 10  # s between two looks for predictions whose delivery has no end yet
PULL_TIMEOUT = 60  # s within which Label Studio stores the answers that it has pulled
REFUSED_TIMEOUT = 20  # s within which an import may still be stored that ended with 502 or 503: it hardly ever is
FULL_ATTEMPTS = 2  # failures in a row after which imports get smaller
FIRST_RETRY, MAX_RETRY = 8, 900  # s before another attempt at a failed task
RECHECKS_PER_LOOK = 500  # tasks
# Label Studio on SQLite repeats a request that waited 5 s for the database's lock, also when it had stored the import.
SLOW_IMPORT = 4  # s

CHUNK_FAILED = ErrorDetail(
    code=BackendError.code, detail="the workers failed on this chunk of tasks; their log says why", is_retryable=True
)


@dataclass
class Batch:
    """Entries of one project and model version that go into one import.

    Attributes:
        entries: with their answers.
        held: tasks whose earlier delivery may still be stored: their entries stay.
        failures: tasks that get no prediction, with the reason.
    """

    project: str
    version: str
    entries: list[tuple[OutboxEntry, Sequence[Answer]]]
    held: set[int] = field(default_factory=set)
    failures: dict[int, ErrorDetail] = field(default_factory=dict)

    def iterate(self) -> Iterator[tuple[OutboxEntry, ChunkTask, Answer]]:
        """Yields each task with its entry and its answer."""
        for entry, answers in self.entries:
            for task, answer in zip(entry.chunk.tasks, answers, strict=True):
                yield entry, task, answer


class DeliveryLost(Exception):
    """Another worker has this delivery job now: this one was paused too long."""


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
                self._end_pauses(project)
        except (LabelStudioError, QueueUnavailable) as error:
            with redis_errors():
                seconds = self._pauses.begin(project, str(error))
            if seconds:
                log.warning("project %s: delivery pauses for %d s: %s", project, seconds, error)
            self._outbox.rest(project, seconds or FIRST_PAUSE)
        except DeliveryLost:
            log.warning("project %s: another worker delivers it", project)
            return
        self._outbox.schedule(project)

    def _end_pauses(self, project: str) -> None:
        with redis_errors():
            self._pauses.end(project)

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
            for group in _group_into_imports(entries):
                start = time.monotonic()
                self._deliver_batch(Batch(project, version, group))
                seconds = time.monotonic() - start
        if finished and self._outbox.count(project):
            self._outbox.rest(project, min(IMPORT_REST * seconds, MAX_IMPORT_REST))
            return False
        return bool(due)

    def _deliver_batch(self, batch: Batch) -> None:
        """Delivers a batch; while Label Studio refuses it its entries stay, until they are too old."""
        try:
            self._import_batch(batch)
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
        failures = {task: ErrorDetail.of(error) for task in tasks if task not in pushed}
        self._finish(Batch(batch.project, batch.version, old, failures=failures), is_final=True)

    def _import_batch(self, batch: Batch) -> None:
        """Compares, claims, looks up, imports and confirms the predictions of a batch."""
        predictions: dict[int, Prediction] = {}
        since: dict[int, float] = {}
        for entry, task, answer in self._compare(batch):
            if isinstance(answer, TaskError):
                batch.failures[task.id] = answer.error
            else:
                predictions[task.id] = answer
                since[task.id] = max(entry.since, since.get(task.id, 0))
        for task_id in predictions.keys() & batch.failures.keys():  # in two entries, and one of them is enough
            del batch.failures[task_id]
        tasks = self._limit(batch, self._claim(batch, since))
        self._import(batch, {task: predictions[task] for task in tasks})

    def _claim(self, batch: Batch, since: Mapping[int, float]) -> list[int]:
        """Claims tasks, each requested at a time, and looks up what Label Studio has of them.

        Returns:
            Those to import. Those that an earlier delivery may still store are held.
        """
        project, version, timeout = batch.project, batch.version, self._settings.import_timeout
        selected = {task: requested_at - SELECTION_TIMEOUT for task, requested_at in since.items()}
        claims = self._outbox.claim(Delivery.PUSHING, project, version, selected, timeout)
        undelivered = [
            task
            for task, claim in claims.items()
            if not (claim and claim.delivery is Delivery.PUSHED and claim.at >= since[task])
        ]
        lacking = self._label_studio.filter_without_prediction(project, undelivered, version)
        stored = [task for task in undelivered if task not in lacking]
        self._outbox.save_claims(Delivery.PUSHED, project, version, stored)
        unconfirmed = {task: claim for task, claim in claims.items() if claim and claim.delivery is not Delivery.PUSHED}
        self._outbox.recheck(project, version, [task for task in stored if task in unconfirmed], 0)
        now, lost = self._outbox.get_time(), []
        for task in lacking & unconfirmed.keys():
            claim = unconfirmed[task]
            if claim.at + (PULL_TIMEOUT if claim.delivery is Delivery.PULL else 0) > now:
                batch.held.add(task)
            else:
                lost.append(task)
        self._outbox.recheck(project, version, lost, timeout)
        return [task for task in undelivered if task in lacking - batch.held]

    def _limit(self, batch: Batch, tasks: Sequence[int]) -> Sequence[int]:
        """Takes fewer tasks after several failures in a row: Label Studio may fail at one of them, or at so many."""
        with redis_errors():
            pauses = self._pauses.count(batch.project)
        limit = max(MAX_PREDICTIONS_PER_IMPORT >> 2 * max(pauses - FULL_ATTEMPTS, 0), 1)
        if len(tasks) <= limit:
            return tasks
        taken = random.sample(tasks, limit)
        others = set(tasks) - set(taken)
        self._outbox.release(batch.project, batch.version, sorted(others))
        batch.held |= others
        return taken

    def _compare(self, batch: Batch) -> Iterator[tuple[OutboxEntry, ChunkTask, Answer]]:
        """Yields what belongs to Label Studio's project of this number; deleted tasks are left out.

        A request names the project by number and by when it was created, and its tasks by number and data. Label Studio
        may have another project of that number by now, or be another one than the one that asked.
        """
        created_at = self._label_studio.get_project_created_at(batch.project)
        data = self._label_studio.get_task_data(batch.project, [task.id for _, task, _ in batch.iterate()])
        is_other_project = False
        for entry, task, answer in batch.iterate():
            found = data.get(task.id)
            if entry.created_at not in (None, created_at):
                is_other_project = True
            elif found is not None and any(found.get(name) != task.data[name] for name in task.data):
                batch.failures[task.id] = OTHER_DATA
            elif found is not None:
                yield entry, task, answer
        if is_other_project:
            log.error(
                "project %s at LABEL_STUDIO_URL is another than the requesting project; not pushing", batch.project
            )
            self._outbox.mark_mismatched(batch.project)

    def _import(self, batch: Batch, predictions: Mapping[int, Prediction]) -> None:
        """Imports predictions by task; those that Label Studio refuses fail, each alone."""
        if not predictions:
            return
        if not self.holds_job():
            raise DeliveryLost
        project, version, tasks = batch.project, batch.version, list(predictions)
        rows = [{"task": task, **prediction.model_dump()} for task, prediction in predictions.items()]
        self._outbox.save_claims(Delivery.PUSHING, project, version, tasks, self._settings.import_timeout)
        start = time.monotonic()
        try:
            created = self._label_studio.import_predictions(project, rows, self._settings.import_timeout)
        except (LabelStudioUnavailable, LabelStudioAuthError, LabelStudioNotFound) as error:
            if not getattr(error, "may_have_succeeded", False):
                self._outbox.release(project, version, tasks)
            elif isinstance(error, LabelStudioUnavailable) and error.has_answered:
                self._outbox.save_claims(Delivery.PUSHING, project, version, tasks, REFUSED_TIMEOUT)
            raise
        except LabelStudioError as error:
            self._import_halves(batch, predictions, error)
            return
        seconds = time.monotonic() - start
        PUSH_SECONDS.observe(seconds)
        PUSHED_PREDICTIONS.inc(created)
        log.info("project %s: %d predictions pushed in %.1f s", project, created, seconds)
        if created != len(rows):
            lacking = self._label_studio.filter_without_prediction(project, tasks, version)
            batch.failures |= dict.fromkeys(lacking, LEFT_OUT)
        self._outbox.save_claims(Delivery.PUSHED, project, version, tasks)
        if seconds > SLOW_IMPORT:
            self._outbox.recheck(project, version, tasks, 0)
        self._end_pauses(project)

    def _import_halves(self, batch: Batch, predictions: Mapping[int, Prediction], error: LabelStudioError) -> None:
        """Imports what Label Studio refused together without the tasks that were deleted meanwhile, or in halves."""
        self._outbox.release(batch.project, batch.version, list(predictions))  # each half claims its own
        existing = self._label_studio.get_task_data(batch.project, list(predictions))
        remaining = {task: prediction for task, prediction in predictions.items() if task in existing}
        if len(remaining) < len(predictions):
            self._import(batch, remaining)
        elif len(predictions) == 1:
            batch.failures |= dict.fromkeys(predictions, ErrorDetail.of(error))
        else:
            items = list(predictions.items())
            for half in (items[: len(items) // 2], items[len(items) // 2 :]):
                self._import(batch, dict(half))

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


LEFT_OUT = ErrorDetail.of(BackendError("Label Studio left the prediction out of the import"))
OTHER_DATA = ErrorDetail.of(BackendError("in Label Studio the task has other data than in the request"))


def _make_retry(entry: OutboxEntry, tasks: set[int], failed_since: float, error: ErrorDetail) -> OutboxEntry:
    """Makes the entry of the next attempt at some tasks of an entry."""
    chunk = entry.chunk.model_copy(update={"tasks": tuple(task for task in entry.chunk.tasks if task.id in tasks)})
    attempt = OutboxEntry.of(entry.project, type(chunk).model_validate(dict(chunk)), entry.since, entry.created_at)
    changes = {"failed_since": failed_since, "attempts": entry.attempts + 1, "error": error}
    return attempt.model_copy(update=changes)


def _group_into_imports(
    entries: Sequence[tuple[OutboxEntry, Sequence[Answer]]],
) -> Iterator[list[tuple[OutboxEntry, Sequence[Answer]]]]:
    """Groups entries so that each group fits into one import."""
    group: list[tuple[OutboxEntry, Sequence[Answer]]] = []
    predictions = regions = 0
    for entry, answers in entries:
        more = sum(len(answer.result) for answer in answers if isinstance(answer, Prediction))
        is_full = predictions + len(answers) > MAX_PREDICTIONS_PER_IMPORT
        if group and (is_full or regions + more > MAX_REGIONS_PER_IMPORT):
            yield group
            group, predictions, regions = [], 0, 0
        group.append((entry, answers))
        predictions, regions = predictions + len(answers), regions + more
    if group:
        yield group

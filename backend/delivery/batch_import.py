"""The import of a batch of finished predictions into one project of Label Studio, each exactly once.

It compares the tasks with Label Studio, claims them, looks up which predictions Label Studio has, imports the others,
and confirms them. A task with an earlier claim that Label Studio lacks the prediction of is held: it is left alone as
long as that delivery may still be stored, and imported then. It is looked at once more later, for a double.
"""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from redis import Redis

from backend.delivery.outbox import SELECTION_TIMEOUT, Delivery, Outbox, OutboxEntry
from backend.errors import (
    BackendError,
    LabelStudioAuthError,
    LabelStudioError,
    LabelStudioNotFound,
    LabelStudioUnavailable,
)
from backend.labelstudio.client import LabelStudioClient
from backend.metrics import PUSH_SECONDS, PUSHED_PREDICTIONS
from backend.queue.messages import Answer, ChunkTask, ErrorDetail, Prediction, TaskError
from backend.queue.pauses import PAUSED_DELIVERY_KEY, Pauses
from backend.queue.redis import redis_errors
from backend.settings import Settings

log = logging.getLogger(__name__)

MAX_PREDICTIONS_PER_IMPORT, MAX_REGIONS_PER_IMPORT = 5000, 40_000  # about 12 MB
PULL_TIMEOUT = 60  # s within which Label Studio stores the answers that it has pulled
REFUSED_TIMEOUT = 20  # s within which an import may still be stored that ended with 502 or 503: it hardly ever is
FULL_ATTEMPTS = 2  # failures in a row after which imports get smaller
# Label Studio on SQLite repeats a request that waited 5 s for the database's lock, also when it had stored the import.
SLOW_IMPORT = 4  # s

LEFT_OUT = ErrorDetail.from_error(BackendError("Label Studio left the prediction out of the import"))
OTHER_DATA = ErrorDetail.from_error(BackendError("in Label Studio the task has other data than in the request"))


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


class BatchImporter:
    """Imports batches, one at a time; made once in each thread."""

    def __init__(
        self,
        settings: Settings,
        connection: Redis,
        label_studio: LabelStudioClient,
        holds_job: Callable[[], bool],
    ) -> None:
        """Prepares imports; `holds_job` returns whether the current job is still this worker's."""
        self._settings, self._label_studio, self._holds_job = settings, label_studio, holds_job
        self._outbox, self._pauses = Outbox(connection), Pauses(connection, PAUSED_DELIVERY_KEY)

    def import_batch(self, batch: Batch) -> None:
        """Compares, claims, looks up, imports and confirms the predictions of a batch.

        It adds to the batch what is held and what failed.

        Raises:
            LabelStudioError: Label Studio refuses, or may not have stored, what is imported.
            QueueUnavailable: Redis does not answer.
            DeliveryLost: another worker has this job now.
        """
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
        if not self._holds_job():
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
        with redis_errors():
            self._pauses.resume(project)

    def _import_halves(self, batch: Batch, predictions: Mapping[int, Prediction], error: LabelStudioError) -> None:
        """Imports what Label Studio refused together without the tasks that were deleted meanwhile, or in halves."""
        self._outbox.release(batch.project, batch.version, list(predictions))  # each half claims its own
        existing = self._label_studio.get_task_data(batch.project, list(predictions))
        remaining = {task: prediction for task, prediction in predictions.items() if task in existing}
        if len(remaining) < len(predictions):
            self._import(batch, remaining)
        elif len(predictions) == 1:
            batch.failures |= dict.fromkeys(predictions, ErrorDetail.from_error(error))
        else:
            items = list(predictions.items())
            for half in (items[: len(items) // 2], items[len(items) // 2 :]):
                self._import(batch, dict(half))


def group_into_batches(
    project: str, version: str, entries: Sequence[tuple[OutboxEntry, Sequence[Answer]]]
) -> Iterator[Batch]:
    """Groups entries so that each batch fits into one import."""
    batch = Batch(project, version, [])
    predictions = regions = 0
    for entry, answers in entries:
        more = sum(len(answer.result) for answer in answers if isinstance(answer, Prediction))
        is_full = predictions + len(answers) > MAX_PREDICTIONS_PER_IMPORT
        if batch.entries and (is_full or regions + more > MAX_REGIONS_PER_IMPORT):
            yield batch
            batch, predictions, regions = Batch(project, version, []), 0, 0
        batch.entries.append((entry, answers))
        predictions, regions = predictions + len(answers), regions + more
    if batch.entries:
        yield batch

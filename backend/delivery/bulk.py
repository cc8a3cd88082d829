"""Bulk work of one project on its way into the queue and the outbox, each task once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from redis import Redis

from backend.delivery.failures import Failures
from backend.delivery.outbox import Outbox, OutboxEntry
from backend.queue.backlogs import Place
from backend.queue.predict_queue import PredictQueue
from backend.registry.project_model import ProjectModel
from backend.settings import Settings


class BulkSender:
    """Sends tasks of a project. Methods raise QueueUnavailable or Overloaded, and lose nothing by it."""

    def __init__(
        self, settings: Settings, connection: Redis, project: str, project_model: ProjectModel, created_at: int | None
    ) -> None:
        """Prepares the sender; `created_at` is when the project was created, where it is known."""
        self._settings, self._project, self._created_at = settings, project, created_at
        self.project_model = project_model
        self._queue = PredictQueue(connection, project_model.checkpoint.fingerprint)
        self._outbox, self._failures = Outbox(connection), Failures(connection)
        self._tasks: list[Mapping[str, Any]] = []  # not yet in chunks
        self._entries: list[OutboxEntry] = []  # not yet enqueued
        self._since = 0.0  # when the first of them was requested

    def get_time(self) -> float:
        """Returns the time by which requests and deliveries are compared."""
        return self._outbox.get_time()

    def send(self, tasks: Sequence[Mapping[str, Any]], since: float) -> None:
        """Sends tasks, without those whose prediction is pending already.

        After an error the tasks are kept, and `flush` sends them.

        Args:
            tasks: as Label Studio sends them, each with a number as its id.
            since: when they were requested, or known to have no prediction.

        Raises:
            LabelingConfigError: the config cannot be served.
        """
        self._since = since if not self._tasks else self._since
        self._tasks += tasks
        self.flush()

    def flush(self) -> None:
        """Sends what an error kept back. The outbox comes first: what it holds is enqueued sooner or later."""
        if self._tasks:
            pending = self.filter_pending([task["id"] for task in self._tasks])
            new = [task for task in self._tasks if task["id"] not in pending]
            size = self._settings.batch_size or self._queue.get_batch_size()  # workers may still be starting
            chunks = self.project_model.make_chunks(new, size)
            self._entries += [
                OutboxEntry.from_chunk(self._project, chunk, self._since, self._created_at) for chunk in chunks
            ]
            self._tasks = []
        if self._entries:
            self._queue.check_room(len(self._entries))  # the outbox would keep them whatever the queue says
            self._outbox.add(self._entries)
            self._failures.remove(self._project, [task for entry in self._entries for task in entry.task_ids])
            self._queue.enqueue([entry.chunk for entry in self._entries], Place.BACKLOG, self._project)
            self._entries = []

    def filter_pending(self, tasks: Sequence[int]) -> set[int]:
        """Returns those of these tasks whose prediction is pending."""
        return self._outbox.filter_pending(self._project, self.project_model.model_version, tasks)

    def list_retried(self) -> dict[int, OutboxEntry]:
        """Lists the pending tasks that failed before, each with the entry in which it is tried again."""
        entries = self._outbox.list_retries(self._project)
        version = self.project_model.model_version
        return {task: entry for entry in entries if entry.chunk.model_version == version for task in entry.task_ids}

    def count_pending_chunks(self) -> int:
        """Counts the chunks of the project that are pending, whoever sent them."""
        return self._outbox.count(self._project)


def make_project_sender(settings: Settings, connection: Redis, label_studio: Any, project: str) -> BulkSender:
    """Makes the sender of a project as Label Studio has it now.

    Raises:
        LabelStudioError: Label Studio refused.
        LabelStudioUnavailable: Label Studio did not answer.
    """
    created_at = label_studio.get_project_created_at(project)
    project_model = ProjectModel(settings, label_studio.get_label_config(project), project, created_at)
    return BulkSender(settings, connection, project, project_model, created_at)

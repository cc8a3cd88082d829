"""A whole project predicted chunk by chunk, through the queue and the pusher; it resumes where it was stopped.

What is done is what Label Studio holds: a task with a prediction of the current model version is not predicted again.
"""

from __future__ import annotations

import csv
import logging
import re
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from redis import Redis

from backend.delivery.outbox import Outbox
from backend.delivery.pusher import Pusher
from backend.errors import BackendError, LabelStudioUnavailable, Overloaded, QueueUnavailable
from backend.labelstudio.client import LabelStudioClient
from backend.queue.live_workers import make_worker_name
from backend.queue.messages import Answer, Chunk, TaskError
from backend.queue.predict_queue import PredictQueue
from backend.registry.project_model import ProjectModel
from backend.settings import Settings

log = logging.getLogger(__name__)

MAX_CHUNKS_IN_FLIGHT = 512  # enough work while the pusher backs off
POLL_INTERVAL = 0.5  # s
MAX_BACKOFF = 15  # s between two attempts while something is unavailable

Task = Mapping[str, Any]
Progress = Callable[[int, int], object]  # tasks done, and how many of them failed

CHUNK_FAILED = TaskError.of(BackendError("the worker failed on this chunk of tasks; its log says why"))


@dataclass
class PreannotationSummary:
    """How many tasks are done, and which of them failed: task, code, detail."""

    done: int = 0
    failures: list[tuple[int, str, str]] = field(default_factory=list)

    def add(self, chunk: Chunk, answers: Sequence[Answer] | None) -> None:
        """Counts a finished chunk; None as answers: it failed as a whole."""
        for task, answer in zip(chunk.tasks, answers or [CHUNK_FAILED] * len(chunk.tasks), strict=True):
            self.done += 1
            if isinstance(answer, TaskError):
                self.failures.append((task.id, answer.error.code, answer.error.detail))

    def count_by_reason(self) -> Counter[str]:
        """Counts the failed tasks by reason."""
        return Counter(detail for _, _, detail in self.failures)

    def write_failures(self, path: Path) -> None:
        """Writes the failures as CSV: task, code, detail."""
        with path.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(("task", "code", "detail"))
            writer.writerows(self.failures)


class TaskCursor:
    """Reads tasks page by page and hands out any number at a time; a page that fails is read again."""

    def __init__(
        self, read_page: Callable[[int], Sequence[Task]], find_next: Callable[[int, Sequence[Task]], int]
    ) -> None:
        """Prepares the cursor.

        Args:
            read_page: reads the page at a position, which is 0 at first; an empty page is the end.
            find_next: returns the position behind the page that was read at a position.
        """
        self._read_page, self._find_next, self._position = read_page, find_next, 0
        self._tasks: list[Task] = []
        self._is_at_end = False
        self.read_at = time.time()  # when the oldest of the tasks at hand was read

    def take(self, count: int) -> list[Task]:
        """Takes the next tasks, fewer at the end; raises what reading a page raises, and loses no task by it."""
        while len(self._tasks) < count and not self._is_at_end:
            start = time.time()
            page = self._read_page(self._position)
            if page:
                self._position = self._find_next(self._position, page)
            self._is_at_end = not page
            self.read_at = self.read_at if self._tasks else start
            self._tasks += page
        taken, self._tasks = self._tasks[:count], self._tasks[count:]
        return taken


class Preannotation:
    """One run over one project."""

    def __init__(self, settings: Settings, connection: Redis, label_studio: LabelStudioClient, project: str) -> None:
        """Reads the project's labeling config.

        Raises:
            LabelStudioError: Label Studio refused.
            LabelStudioUnavailable: Label Studio did not answer.
        """
        self._settings, self._label_studio, self._project = settings, label_studio, project
        label_config = label_studio.get_label_config(project)
        self.project_model = ProjectModel(settings, label_config, project, label_studio.get_project_created_at(project))
        self._queue, self._outbox = PredictQueue(connection), Outbox(connection)
        self._pusher = Pusher(connection, label_studio, make_worker_name())
        self._in_flight: dict[str, Chunk] = {}  # by chunk id

    def count_pending(self, task_ids: Sequence[int] = ()) -> int:
        """Counts the tasks without a prediction of the current model version; raises as the constructor.

        `task_ids` restricts the tasks to these, if given.
        """
        version = self.project_model.model_version
        return self._label_studio.count_tasks_without_prediction(self._project, version, task_ids)

    def open_cursor(self, task_ids: Sequence[int] = (), view: str = "") -> TaskCursor:
        """Opens a cursor over the pending tasks: all of them, those of these ids, or those of a view."""
        client, version = self._label_studio, self.project_model.model_version
        if view:
            return TaskCursor(
                lambda pages_read: client.list_tasks_of_view(view, pages_read + 1), lambda pages_read, _: pages_read + 1
            )
        return TaskCursor(
            lambda last_id: client.list_tasks_without_prediction(self._project, version, last_id, task_ids),
            lambda _, page: page[-1]["id"],
        )

    def run(
        self, cursor: TaskCursor, max_tasks: int, on_progress: Progress, replace: bool = False
    ) -> PreannotationSummary:
        """Predicts tasks and pushes the predictions into Label Studio, waiting while anything is unavailable.

        Args:
            cursor: over the tasks.
            max_tasks: how many of them.
            on_progress: called as the run goes on.
            replace: whether predictions of older versions of this model are deleted once the new ones are stored.

        Raises:
            LabelingConfigError: the config cannot be served.
            LabelStudioError: Label Studio refuses.
        """
        summary, remaining, failures = PreannotationSummary(), max_tasks, 0
        while self._in_flight or remaining:
            try:
                while remaining and len(self._in_flight) < MAX_CHUNKS_IN_FLIGHT:
                    size = self._settings.batch_size or self._queue.get_batch_size()  # workers may still be starting
                    sent = self._send_chunk(cursor, min(size, remaining))
                    remaining = 0 if sent is None else remaining - sent
                self._pusher.run_once()
                pending = self._outbox.filter_pending(list(self._in_flight))
                for chunk_id in [chunk_id for chunk_id in self._in_flight if chunk_id not in pending]:
                    chunk = self._in_flight[chunk_id]
                    summary.add(chunk, self._queue.get_result(chunk_id).answers)
                    del self._in_flight[chunk_id]
                    if replace:
                        self._delete_old_predictions(chunk)
                failures = 0
            except (LabelStudioUnavailable, QueueUnavailable, Overloaded) as error:
                failures += 1
                log.warning("project %s: %s; waiting", self._project, error)
            on_progress(summary.done, len(summary.failures))
            if self._in_flight or failures:
                time.sleep(min(POLL_INTERVAL * 2**failures, MAX_BACKOFF))
        return summary

    def _send_chunk(self, cursor: TaskCursor, size: int) -> int | None:
        """Enqueues the next chunk and returns its number of tasks; None at the end of the tasks."""
        tasks = cursor.take(size)
        version = self.project_model.model_version
        pending = [task for task in tasks if version not in task["model_versions"]]
        for chunk in self.project_model.make_chunks(pending, size):
            self._outbox.add(self._project, [chunk], cursor.read_at)
            self._queue.enqueue([chunk], project=self._project)
            self._in_flight[chunk.id] = chunk
        return len(pending) if tasks else None

    def _delete_old_predictions(self, chunk: Chunk) -> None:
        """Deletes predictions of other versions of this model; those of other models and of people stay."""
        own_version = re.compile(rf"{re.escape(self.project_model.checkpoint.name)}-[0-9a-f]{{8}}")
        for task in chunk.tasks:
            predictions = self._label_studio.list_predictions(task.id)
            if any(row["model_version"] == chunk.model_version for row in predictions):
                for row in predictions:
                    version = str(row["model_version"])
                    if version != chunk.model_version and own_version.fullmatch(version):
                        self._label_studio.delete_prediction(row["id"])

"""A whole project predicted chunk by chunk, through the queue and the delivery jobs; it resumes where it was stopped.

What is done is what Label Studio holds: a task with a prediction of the current model version is not predicted again.
"""

from __future__ import annotations

import csv
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from redis import Redis

from backend.delivery.bulk import make_project_sender
from backend.delivery.failures import Failure, Failures
from backend.errors import BackendError, LabelStudioUnavailable, Overloaded, QueueUnavailable
from backend.labelstudio.client import LabelStudioClient
from backend.settings import Settings

log = logging.getLogger(__name__)

MAX_TASKS_IN_FLIGHT = 8192  # enough work while the delivery rests
IDS_PER_PAGE = 100
POLL_INTERVAL = 0.5  # s
MAX_BACKOFF = 15  # s between two attempts while something is unavailable
ATTEMPTS_TO_WAIT_FOR = 3  # about a minute; further ones are the server's
MAX_RETRIES_LISTED, RETRIES_INTERVAL = 10_000, 5  # tasks; s between two looks at them
NOT_STORED = "Label Studio does not hold the prediction; the log of the backend says why"

Task = Mapping[str, Any]
Progress = Callable[[int, int], object]  # tasks done, and how many of them failed


@dataclass
class PreannotationSummary:
    """How many tasks are done, and which of them failed: task, code, detail."""

    done: int = 0
    failures: dict[int, tuple[str, str]] = field(default_factory=dict)  # by task: code, detail

    def count_by_reason(self) -> Counter[str]:
        """Counts the failed tasks by reason."""
        return Counter(detail for _, detail in self.failures.values())

    def write_failures(self, path: Path) -> None:
        """Writes the failures as CSV: task, code, detail."""
        with path.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(("task", "code", "detail"))
            writer.writerows((task, *reason) for task, reason in self.failures.items())


@dataclass(frozen=True)
class Page:
    """Some tasks, and where the next page begins; None behind the last page."""

    tasks: Sequence[Task]
    next_position: int | None


class TaskCursor:
    """Reads tasks page by page and hands out any number at a time; a page that fails is read again."""

    def __init__(self, read_page: Callable[[int], Page]) -> None:
        """Prepares the cursor; `read_page` reads the page at a position, which is 0 at first."""
        self._read_page = read_page
        self._position: int | None = 0
        self._tasks: list[Task] = []

    def take(self, count: int) -> list[Task]:
        """Takes the next tasks, fewer at the end; raises what reading a page raises, and loses no task by it."""
        while len(self._tasks) < count and self._position is not None:
            page = self._read_page(self._position)
            self._position = page.next_position
            self._tasks += page.tasks
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
        self._label_studio, self._project = label_studio, project
        self._sender = make_project_sender(settings, connection, label_studio, project)
        self.project_model = self._sender.project_model
        self._version = self.project_model.model_version
        self._failures = Failures(connection)
        self._in_flight: set[int] = set()
        self._next_look = 0.0  # at the tasks that are tried again

    def count_pending(self, task_ids: Sequence[int] = ()) -> int:
        """Counts the tasks without a prediction of the current model version; raises as the constructor.

        `task_ids` restricts the tasks to these, if given.
        """
        if not task_ids:
            return self._label_studio.count_tasks_without_prediction(self._project, self._version)
        return len(self._label_studio.filter_without_prediction(self._project, task_ids, self._version))

    def open_cursor(self, task_ids: Sequence[int] = (), view: str = "") -> TaskCursor:
        """Opens a cursor over the pending tasks: all of them, those of these ids, or those of a view.

        The ids of a view are read first: it shrinks while its tasks are predicted, so its pages would shift.
        """
        ids = self._label_studio.list_task_ids_of_view(view) if view else list(task_ids)
        if view or task_ids:
            return TaskCursor(lambda position: self._read_page_of(ids, position))
        return TaskCursor(self._read_page_after)

    def _read_page_after(self, last_id: int) -> Page:
        tasks = self._label_studio.list_tasks_without_prediction(self._project, self._version, last_id)
        return Page(tasks, tasks[-1]["id"] if tasks else None)

    def _read_page_of(self, ids: Sequence[int], position: int) -> Page:
        some_ids, end = ids[position : position + IDS_PER_PAGE], position + IDS_PER_PAGE
        tasks = (
            self._label_studio.list_tasks_without_prediction(self._project, self._version, 0, some_ids)
            if some_ids
            else []
        )
        return Page(tasks, end if end < len(ids) else None)

    def run(
        self, cursor: TaskCursor, max_tasks: int, on_progress: Progress, replace: bool = False
    ) -> PreannotationSummary:
        """Predicts tasks and waits for their delivery, whatever is unavailable meanwhile.

        Args:
            cursor: over the tasks.
            max_tasks: how many of them.
            on_progress: called as the run goes on.
            replace: whether predictions of older versions of this model are deleted once the new ones are stored.

        Raises:
            LabelingConfigError: the config cannot be served.
            LabelStudioError: Label Studio refuses.
        """
        summary, remaining, attempts = PreannotationSummary(), max_tasks, 0
        sent: list[int] = []
        while True:
            try:
                self._sender.flush()
                while remaining and len(self._in_flight) < MAX_TASKS_IN_FLIGHT:
                    since = self._sender.get_time()
                    tasks = cursor.take(min(IDS_PER_PAGE, remaining))
                    remaining = remaining - len(tasks) if tasks else 0
                    sent += [task["id"] for task in tasks]
                    self._in_flight |= {task["id"] for task in tasks}
                    self._sender.send(tasks, since)
                done = self._in_flight - self._sender.filter_pending(sorted(self._in_flight))
                if done and replace:
                    self._label_studio.delete_older_predictions(
                        self._project, sorted(done), self._version, self.project_model.checkpoint.name
                    )
                self._count(summary, sorted(done))
                if not remaining and (not self._in_flight or self._leave_retries(summary, bool(done))):
                    self._count_missing(summary, sent)
                    return summary
                attempts = 0
            except (LabelStudioUnavailable, QueueUnavailable, Overloaded) as error:
                attempts += 1
                log.warning("project %s: %s; waiting", self._project, error)
            on_progress(summary.done, len(summary.failures))
            time.sleep(min(POLL_INTERVAL * 2 ** min(attempts, 10), MAX_BACKOFF))

    def _count(self, summary: PreannotationSummary, done: Sequence[int]) -> None:
        """Counts tasks that are delivered or given up."""
        failures = self._failures.get(self._project, done)
        summary.failures |= {task: _describe(failure) for task, failure in failures.items()}
        summary.done += len(done)
        self._in_flight -= set(done)

    def _leave_retries(self, summary: PreannotationSummary, is_moving: bool) -> bool:
        """Leaves the last tasks to the server if all of them have failed several times; returns whether they have."""
        if is_moving or len(self._in_flight) > MAX_RETRIES_LISTED or time.monotonic() < self._next_look:
            return False
        self._next_look = time.monotonic() + RETRIES_INTERVAL
        retried = self._sender.list_retried()
        if any(task not in retried or retried[task].attempts < ATTEMPTS_TO_WAIT_FOR for task in self._in_flight):
            return False
        for task in self._in_flight:
            if error := retried[task].error:
                summary.failures[task] = error.code, f"{error.detail}; the server goes on trying"
        return True

    def _count_missing(self, summary: PreannotationSummary, sent: Sequence[int]) -> None:
        """Counts the tasks whose predictions Label Studio does not hold in the end, whatever was said before."""
        missing = set(self._find_missing(sent))
        summary.failures = {
            task: summary.failures.get(task, (BackendError.code, NOT_STORED)) for task in sent if task in missing
        }

    def _find_missing(self, sent: Sequence[int]) -> Iterator[int]:
        """Finds the tasks without a prediction among those that were sent, with as few requests as possible."""
        lacking = self._label_studio.count_tasks_without_prediction(self._project, self._version)
        if lacking >= len(sent):
            yield from self._label_studio.filter_without_prediction(self._project, sent, self._version)
            return
        known, last_id = set(sent), 0
        while tasks := self._label_studio.list_tasks_without_prediction(self._project, self._version, last_id):
            last_id = tasks[-1]["id"]
            yield from (task["id"] for task in tasks if task["id"] in known)


def _describe(failure: Failure) -> tuple[str, str]:
    return failure.code, failure.detail

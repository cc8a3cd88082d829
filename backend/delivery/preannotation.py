"""A whole project predicted, chunk by chunk, through the queue and the pusher; it goes on where it was stopped.

What is done is what Label Studio holds: tasks with a prediction of the current version are not asked for again.
"""

from __future__ import annotations

import csv
import logging
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from redis import Redis

from backend.delivery.outbox import Outbox
from backend.delivery.pusher import Pusher
from backend.errors import LabelStudioUnavailable, Overloaded, QueueUnavailable
from backend.labelstudio.client import LabelStudioClient
from backend.queue.predict_queue import PredictQueue, chunk_id, worker_name
from backend.registry.project_model import ProjectModel
from backend.settings import Settings

log = logging.getLogger(__name__)

MAX_CHUNKS_IN_FLIGHT = 512  # chunks; enough to do while the pusher rests
POLL_INTERVAL = 0.5  # s between looks
MAX_BACKOFF = 15  # s between attempts while something is away

Task = Mapping[str, Any]
Progress = Callable[[int, int], object]  # tasks done, of which failed


@dataclass
class PreannotationSummary:
    """What became of the tasks."""

    done: int = 0
    failures: list[tuple[int, str, str]] = field(default_factory=list)  # task, code, detail

    def add(self, chunk: Mapping[str, Any], answers: Sequence[Mapping[str, Any]] | None) -> None:
        """Counts a chunk that is over; no answers: it failed as a whole."""
        failed = {"error": {"code": "internal", "detail": "the worker failed on this chunk; its log says why"}}
        for task, answer in zip(chunk["tasks"], answers or [failed] * len(chunk["tasks"]), strict=True):
            self.done += 1
            if "error" in answer:
                self.failures.append((task["id"], answer["error"]["code"], answer["error"]["detail"]))

    def by_reason(self) -> Counter[str]:
        """How many tasks failed for each reason."""
        return Counter(detail for _, _, detail in self.failures)

    def write(self, path: Path) -> None:
        """The failures as CSV: task, code, detail."""
        with path.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(("task", "code", "detail"))
            writer.writerows(self.failures)


class TaskCursor:
    """Tasks read page by page, as many at a time as are wanted; what goes wrong with one page loses none of them."""

    def __init__(self, read: Callable[[int], Sequence[Task]], following: Callable[[int, Sequence[Task]], int]) -> None:
        """`read` gives the page at a place, which is 0 at first, and `following` the place after it."""
        self._read, self._following, self._place = read, following, 0
        self._rows: list[Task] = []
        self.read_at = time.time()  # when the first of the rows at hand was read

    def take(self, count: int) -> list[Task]:
        """The next tasks, fewer at the end."""
        while len(self._rows) < count and self._place >= 0:
            start = time.time()
            page = self._read(self._place)
            self._place = self._following(self._place, page) if page else -1
            self.read_at = self.read_at if self._rows else start
            self._rows += page
        taken, self._rows = self._rows[:count], self._rows[count:]
        return taken


class Preannotation:
    """One run over one project."""

    def __init__(self, settings: Settings, connection: Redis, studio: LabelStudioClient, project: str) -> None:
        """Reads the project's labeling config.

        Raises:
            LabelStudioError: Label Studio refused.
            LabelStudioUnavailable: it did not answer.
        """
        self._settings, self._label_studio, self._project = settings, studio, project
        self.project_model = ProjectModel(settings, studio.label_config(project), project, studio.created(project))
        self._queue, self._outbox = PredictQueue(connection), Outbox(connection)
        self._pusher = Pusher(connection, studio, worker_name())
        self._open: dict[str, dict[str, Any]] = {}  # chunks on their way, by name

    def count_pending(self, numbers: Sequence[int] = ()) -> int:
        """How many tasks have no prediction of the version that serves now; raises as the constructor."""
        return self._label_studio.count_tasks_without_prediction(
            self._project, self.project_model.model_version, numbers
        )

    def pages(self, numbers: Sequence[int] = (), view: str = "") -> TaskCursor:
        """The tasks to do: all of them, those of these numbers, or those of a tab of the Data Manager."""
        version = self.project_model.model_version
        if view:
            return TaskCursor(
                lambda place: self._label_studio.list_tasks_of_view(view, place + 1), lambda place, _: place + 1
            )
        return TaskCursor(
            lambda last: self._label_studio.list_tasks_without_prediction(self._project, version, last, numbers),
            lambda _, page: page[-1]["id"],
        )

    def run(self, pages: TaskCursor, most: int, progress: Progress, replace: bool = False) -> PreannotationSummary:
        """Predicts tasks and brings the predictions into Label Studio, waiting while anything is away.

        Args:
            pages: of the tasks.
            most: tasks, of them.
            progress: called as it goes on.
            replace: whether predictions of other versions of this model are deleted once the new ones are in.

        Raises:
            LabelingConfigError: the config cannot be served.
            LabelStudioError: Label Studio refuses.
        """
        tally, left, failures = PreannotationSummary(), most, 0
        while self._open or left:
            try:
                while left and len(self._open) < MAX_CHUNKS_IN_FLIGHT:
                    size = self._settings.batch_size or self._queue.batch_size()  # workers may be starting yet
                    sent = self._send(pages, min(size, left))
                    left = 0 if sent is None else left - sent
                self._pusher.run_once()
                for chunk in self._finished(tally):
                    self._delete_old(chunk, replace)
                failures = 0
            except (LabelStudioUnavailable, QueueUnavailable, Overloaded) as error:
                failures += 1
                log.warning("%s; waiting", error)
            progress(tally.done, len(tally.failures))
            if self._open or failures:
                time.sleep(min(POLL_INTERVAL * 2**failures, MAX_BACKOFF))
        return tally

    def _send(self, pages: TaskCursor, size: int) -> int | None:
        """Puts one more chunk on its way, and returns its number of tasks; None at the end."""
        tasks = pages.take(size)
        version = self.project_model.model_version
        to_do = [task for task in tasks if version not in task["versions"]]
        for chunk in self.project_model.make_chunks(to_do, size):
            self._outbox.add(self._project, [chunk], pages.read_at)
            self._queue.enqueue([chunk], project=self._project)
            self._open[chunk_id(chunk)] = chunk
        return len(to_do) if tasks else None

    def _finished(self, tally: PreannotationSummary) -> Iterator[dict[str, Any]]:
        """The chunks that the pusher is done with."""
        waiting = self._outbox.filter_pending(list(self._open))
        for name in [name for name in self._open if name not in waiting]:
            answers, _ = self._queue.get_result(self._open[name])
            tally.add(self._open[name], answers)
            yield self._open.pop(name)

    def _delete_old(self, chunk: Mapping[str, Any], replace: bool) -> None:
        """Deletes predictions of other versions of this model; those of other models and of people stay."""
        name, version = self.project_model.checkpoint.name, chunk["model_version"]
        ours = re.compile(rf"{re.escape(name)}-[0-9a-f]{{8}}")
        for task in chunk["tasks"] if replace else ():
            rows = self._label_studio.list_predictions(task["id"])
            if any(row["model_version"] == version for row in rows):
                for row in rows:
                    if row["model_version"] != version and ours.fullmatch(str(row["model_version"])):
                        self._label_studio.delete_prediction(row["id"])

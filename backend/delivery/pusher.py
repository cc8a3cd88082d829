"""The pusher: imports predictions into Label Studio, each exactly once per model version.

Label Studio saves pulled predictions one by one (0.14 s each) and gives up after 100 s; an import of 250 takes 0.7 s.

What happens to an entry of the outbox, by the state of its chunk:

| chunk    | the pusher                                                                         |
|----------|------------------------------------------------------------------------------------|
| WAITING  | checks again later                                                                 |
| FAILED   | enqueues it again, until it has failed MAX_FAILED_ATTEMPTS times                   |
| MISSING  | enqueues it again, until the entry is older than MAX_AGE                           |
| ANSWERED | claims its tasks, imports the claimed predictions, confirms them, drops the entry  |

A task with an earlier claim is imported only if that claim is an unconfirmed import (PUSHING) and Label Studio lacks
the prediction.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from redis import Redis

from backend.delivery.outbox import Delivery, Outbox, OutboxEntry
from backend.errors import (
    BackendError,
    LabelStudioAuthError,
    LabelStudioError,
    LabelStudioUnavailable,
    QueueUnavailable,
)
from backend.labelstudio.client import LabelStudioClient
from backend.metrics import PUSH_SECONDS, PUSHED_PREDICTIONS
from backend.queue.messages import Answer, Prediction, TaskError
from backend.queue.predict_queue import ChunkState, PredictQueue
from backend.queue.redis import redis_errors
from backend.queue.worker_metrics import publish_metrics

log = logging.getLogger(__name__)

SCAN_LIMIT = 512  # entries read from the head of the outbox at a time
MAX_UNFINISHED = 64  # unfinished entries in a row, after which the scan ends: chunks are predicted in order
MAX_PREDICTIONS_PER_IMPORT, MAX_REGIONS_PER_IMPORT = 5000, 40_000  # about 12 MB
# An import makes Label Studio recount all tasks of the project (0.6 ms each with SQLite), however small it is. So while
# more predictions are being made, the pusher waits IMPORT_BACKOFF times the duration of the last import.
IMPORT_BACKOFF, MAX_IMPORT_BACKOFF = 5, 60  # times, s
POLL_INTERVAL = 1.0  # s
MAX_BACKOFF = 15  # s between two attempts while Label Studio is unavailable
UNCONFIRMED_WAIT = 20  # s before checking whether an unacknowledged import was stored
MAX_FAILED_ATTEMPTS = 3  # attempts at a chunk that fails as a whole
MAX_AGE = 3 * 24 * 3600  # s for which an entry may wait for its answers
LEASE_KEY, LEASE_TTL = "gdino:pusher", 90  # s, longer than Label Studio takes to store an import


@dataclass(frozen=True)
class AnsweredEntry:
    """An entry whose chunk is answered."""

    entry: OutboxEntry
    answers: list[Answer]

    def count_regions(self) -> int:
        """Counts the regions of all predictions."""
        return sum(len(answer.result) for answer in self.answers if isinstance(answer, Prediction))


class Lease:
    """The right to push, which one pusher holds at a time. Methods raise QueueUnavailable if Redis does not answer."""

    def __init__(self, connection: Redis, owner: str) -> None:
        self._connection, self._owner = connection, owner

    def acquire_or_renew(self) -> bool:
        """Acquires or renews the lease; returns False while another pusher holds it."""
        with redis_errors():
            is_mine = (
                self._connection.set(LEASE_KEY, self._owner, nx=True, ex=LEASE_TTL)
                or self._connection.get(LEASE_KEY) == self._owner.encode()
            )
            if is_mine:
                self._connection.expire(LEASE_KEY, LEASE_TTL)
        return bool(is_mine)

    @contextlib.contextmanager
    def keep_renewing(self) -> Iterator[None]:
        """Renews the lease in a thread: an import may take longer than LEASE_TTL."""
        stop = threading.Event()

        def renew() -> None:
            while not stop.wait(LEASE_TTL / 3):
                with contextlib.suppress(QueueUnavailable):
                    self.acquire_or_renew()

        thread = threading.Thread(target=renew, daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()


class Pusher:
    """Empties the outbox; of several pushers only the holder of the lease works."""

    def __init__(self, connection: Redis, label_studio: LabelStudioClient, name: str) -> None:
        self._connection, self._label_studio, self._name = connection, label_studio, name
        self._queue, self._outbox, self._lease = PredictQueue(connection), Outbox(connection), Lease(connection, name)
        self._verified_projects: set[str] = set()
        self._failed_attempts: Counter[str] = Counter()  # by chunk id
        self._backoff_until = 0.0  # of `time.monotonic`

    def run(self, stop: threading.Event) -> None:
        """Pushes until `stop` is set, through all outages."""
        failures, pause = 0, POLL_INTERVAL
        while not stop.wait(pause):
            try:
                with redis_errors():
                    publish_metrics(self._connection, self._name)
                self.run_once()
                failures, pause = 0, POLL_INTERVAL
            except BackendError as error:
                failures += 1
                is_unconfirmed = isinstance(error, LabelStudioUnavailable) and error.may_have_succeeded
                pause = UNCONFIRMED_WAIT if is_unconfirmed else min(2**failures, MAX_BACKOFF)
                log.warning("pushing stopped: %s; trying again in %g s", error, pause)

    def run_once(self) -> None:
        """Pushes the finished chunks at the head of the outbox.

        Raises:
            LabelStudioUnavailable: Label Studio does not answer.
            LabelStudioAuthError: Label Studio refuses the key.
            QueueUnavailable: Redis does not answer.
        """
        is_backing_off = time.monotonic() < self._backoff_until and self._queue.count_waiting() > 0
        if is_backing_off or not self._lease.acquire_or_renew():
            return
        finished: dict[tuple[str, str], list[AnsweredEntry]] = defaultdict(list)  # by project and model version
        unfinished_in_a_row = 0
        for entry in self._outbox.peek(SCAN_LIMIT):
            result = self._queue.get_result(entry.chunk_id)
            if result.answers is not None:
                finished[entry.project, entry.chunk.model_version].append(AnsweredEntry(entry, result.answers))
                unfinished_in_a_row = 0
                continue
            if result.state is not ChunkState.WAITING:
                self._requeue(entry, result.state)
            unfinished_in_a_row += 1
            if unfinished_in_a_row > MAX_UNFINISHED:
                break
        for (project, model_version), entries in sorted(finished.items()):
            for group in _group_into_imports(entries):
                if self._lease.acquire_or_renew():
                    self._push(project, model_version, group)

    def _requeue(self, entry: OutboxEntry, state: ChunkState) -> None:
        """Enqueues a chunk again that failed or whose answers expired, or gives it up."""
        chunk, tasks = entry.chunk, len(entry.chunk.tasks)
        self._failed_attempts[entry.chunk_id] += state is ChunkState.FAILED
        attempts, age = self._failed_attempts[entry.chunk_id], time.time() - entry.since
        if attempts >= MAX_FAILED_ATTEMPTS:
            log.error("project %s: giving up on %d tasks after %d failed attempts", entry.project, tasks, attempts)
        elif age > MAX_AGE:
            log.error("project %s: giving up on %d tasks after %d days", entry.project, tasks, age // (24 * 3600))
        else:
            self._queue.enqueue([chunk], project=entry.project)
            return
        self._outbox.remove([entry.chunk_id])

    def _push(self, project: str, model_version: str, entries: Sequence[AnsweredEntry]) -> None:
        """Delivers entries and removes them; one that cannot be delivered is given up alone."""
        try:
            if self._verify_project(entries[0].entry):
                with self._lease.keep_renewing():
                    self._deliver(project, model_version, entries)
        except (LabelStudioUnavailable, LabelStudioAuthError, QueueUnavailable):
            raise
        except Exception as error:  # one odd chunk must not hold up the others
            if len(entries) > 1:
                middle = len(entries) // 2
                self._push(project, model_version, entries[:middle])
                self._push(project, model_version, entries[middle:])
                return
            log.error("project %s: a chunk cannot be pushed: %s", project, error)
        self._outbox.remove([answered.entry.chunk_id for answered in entries])

    def _verify_project(self, entry: OutboxEntry) -> bool:
        """Returns whether Label Studio's project of this number has the data of a requested task."""
        if entry.project in self._verified_projects:
            return True
        for task in entry.chunk.tasks:
            data = self._label_studio.get_task_data(entry.project, task.id)
            if data is None:
                continue  # deleted meanwhile, or another Label Studio: the next task decides
            if all(data.get(field) == value for field, value in task.data.items()):
                self._verified_projects.add(entry.project)
                return True
        log.error(
            "project %s at LABEL_STUDIO_URL has other data than the requesting project; not pushing", entry.project
        )
        self._outbox.mark_mismatched(entry.project)
        return False

    def _deliver(self, project: str, model_version: str, entries: Sequence[AnsweredEntry]) -> None:
        """Claims the tasks of these entries, imports what Label Studio does not have, and confirms it."""
        predictions: dict[int, Prediction] = {}
        for answered in entries:
            for task, answer in zip(answered.entry.chunk.tasks, answered.answers, strict=True):
                if isinstance(answer, TaskError):
                    log.warning("project %s, task %s: %s", project, task.id, answer.error.detail)
                else:
                    predictions[task.id] = answer
        since = min(answered.entry.since for answered in entries)
        claims = self._outbox.claim(Delivery.PUSHING, project, model_version, list(predictions), time.time(), since)
        claimed = [task for task, obstacle in claims.items() if obstacle in (None, Delivery.PUSHING)]
        unconfirmed = [task for task, obstacle in claims.items() if obstacle is Delivery.PUSHING]
        stored: set[int] = set()
        if unconfirmed:
            stored = set(unconfirmed) - self._label_studio.filter_existing(project, unconfirmed, model_version)
        rows = [{"task": task, **predictions[task].model_dump()} for task in claimed if task not in stored]
        self._import(project, rows)
        self._outbox.confirm(project, model_version, claimed, time.time())

    def _import(self, project: str, rows: Sequence[dict[str, Any]], is_checked: bool = False) -> None:
        """Imports predictions (`task` and the fields of Prediction); one that Label Studio refuses is left out.

        `is_checked`: tasks that Label Studio does not have are left out already.
        """
        if not rows:
            return
        if not self._lease.acquire_or_renew():
            raise LabelStudioUnavailable("another pusher has taken over")
        start = time.monotonic()
        try:
            created = self._label_studio.import_predictions(project, rows)
        except (LabelStudioUnavailable, LabelStudioAuthError):
            raise
        except LabelStudioError as error:
            if len(rows) == 1:
                log.error("project %s, task %s: %s", project, rows[0]["task"], error)
                return
            existing = rows
            if not is_checked:
                ids = self._label_studio.filter_existing(project, [row["task"] for row in rows])
                existing = [row for row in rows if row["task"] in ids]
            if len(existing) < len(rows):  # the others were deleted meanwhile
                self._import(project, existing, is_checked=True)
            else:
                self._import(project, rows[: len(rows) // 2], is_checked=True)
                self._import(project, rows[len(rows) // 2 :], is_checked=True)
            return
        seconds = time.monotonic() - start
        PUSH_SECONDS.observe(seconds)
        PUSHED_PREDICTIONS.inc(created)
        self._backoff_until = time.monotonic() + min(IMPORT_BACKOFF * seconds, MAX_IMPORT_BACKOFF)
        log.info("project %s: %d predictions pushed in %.1f s", project, created, seconds)
        if created != len(rows):
            log.error("project %s: Label Studio left out %d predictions", project, len(rows) - created)


def _group_into_imports(entries: Sequence[AnsweredEntry]) -> Iterator[list[AnsweredEntry]]:
    """Groups entries so that each group fits into one import."""
    group: list[AnsweredEntry] = []
    predictions = regions = 0
    for answered in entries:
        more = answered.count_regions()
        is_full = predictions + len(answered.answers) > MAX_PREDICTIONS_PER_IMPORT
        if group and (is_full or regions + more > MAX_REGIONS_PER_IMPORT):
            yield group
            group, predictions, regions = [], 0, 0
        group.append(answered)
        predictions, regions = predictions + len(answered.answers), regions + more
    if group:
        yield group

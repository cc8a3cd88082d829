"""Brings predictions into Label Studio by its import, each exactly once a model version.

Label Studio saves what it pulls one by one (0.14 s each) and gives up after 100 s; an import of 250 takes it 0.7 s.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from redis import Redis

from backend.delivery.outbox import PULL, PUSHED, PUSHING, Entry, Outbox
from backend.errors import (
    BackendError,
    LabelStudioAuthError,
    LabelStudioError,
    LabelStudioUnavailable,
    QueueUnavailable,
)
from backend.labelstudio.client import LabelStudioClient
from backend.metrics import PUSH_SECONDS, PUSHED_PREDICTIONS
from backend.queue.predict_queue import PredictQueue
from backend.queue.redis import redis_errors
from backend.queue.worker_metrics import publish_metrics

log = logging.getLogger(__name__)

SCAN_LIMIT = 512  # chunks from the head of the outbox at a time
MAX_UNFINISHED = 64  # one after the other, behind which none is looked at: chunks are made in their order
MAX_PREDICTIONS_PER_IMPORT, MAX_REGIONS_PER_IMPORT = 5000, 40_000  # predictions in one import, and regions: about 12 MB
# An import makes Label Studio count all tasks of the project anew (0.6 ms each with SQLite), however little it brings:
# while more is being made, the pusher rests so many times as long as the last import took.
IMPORT_BACKOFF, MAX_IMPORT_BACKOFF = 5, 60  # times, s
POLL_INTERVAL = 1.0  # s between looks
MAX_BACKOFF = 15  # s between attempts while Label Studio is away
MAX_FAILED_ATTEMPTS = 3  # at a chunk that fails as a whole
MAX_AGE = 3 * 24 * 3600  # s that a chunk may wait for its answers or for Label Studio
UNCONFIRMED_WAIT = 20  # s until we look what became of an import that Label Studio did not answer
LEASE_KEY, LEASE_TTL = "gdino:pusher", 90  # s, longer than Label Studio needs to store what it has begun to

Prediction = dict[str, Any]  # task, result, score, model_version


class Pusher:
    """Empties the outbox; of several only one is at work."""

    def __init__(self, connection: Redis, studio: LabelStudioClient, name: str) -> None:
        self._connection, self._label_studio, self._name = connection, studio, name
        self._queue, self._outbox = PredictQueue(connection), Outbox(connection)
        self._known: set[str] = set()  # projects that were compared with Label Studio's
        self._attempts: Counter[str] = Counter()  # at chunks that failed
        self._rests_until = 0.0  # of `time.monotonic`

    def run(self, stop: threading.Event) -> None:
        """Pushes until `stop` is set, whatever goes away meanwhile."""
        failures, pause = 0, POLL_INTERVAL
        while not stop.wait(pause):
            try:
                with redis_errors():
                    publish_metrics(self._connection, self._name)
                self.run_once()
                failures, pause = 0, POLL_INTERVAL
            except BackendError as error:
                failures += 1
                pause = (
                    UNCONFIRMED_WAIT
                    if isinstance(error, LabelStudioUnavailable) and error.reached
                    else min(2**failures, MAX_BACKOFF)
                )
                log.warning("%s; trying again in %g s", error, pause)

    def _has_lease(self) -> bool:
        with redis_errors():
            taken = self._connection.set(LEASE_KEY, self._name, nx=True, ex=LEASE_TTL)
            mine = taken or self._connection.get(LEASE_KEY) == self._name.encode()
            if mine:
                self._connection.expire(LEASE_KEY, LEASE_TTL)
        return bool(mine)

    @contextlib.contextmanager
    def _keeping_lease(self) -> Iterator[None]:
        """An import may take longer than a lease."""
        stop = threading.Event()

        def keep() -> None:
            while not stop.wait(LEASE_TTL / 3):
                with contextlib.suppress(QueueUnavailable):
                    self._has_lease()

        keeping = threading.Thread(target=keep, daemon=True)
        keeping.start()
        try:
            yield
        finally:
            stop.set()
            keeping.join()

    def run_once(self) -> None:
        """Pushes what is finished among the first chunks.

        Raises:
            LabelStudioUnavailable: Label Studio does not answer.
            LabelStudioAuthError: it refuses the key.
            QueueUnavailable: Redis does not answer.
        """
        is_resting = time.monotonic() < self._rests_until and self._queue.count_waiting() > 0
        if is_resting or not self._has_lease():
            return
        finished, unfinished = [], 0
        for entry in self._outbox.peek(SCAN_LIMIT):
            if (answers := self._answers(entry)) is not None:
                finished.append((entry, answers))
            unfinished = 0 if answers is not None else unfinished + 1
            if unfinished > MAX_UNFINISHED:
                break
        for (project, version), rows in itertools.groupby(sorted(finished, key=_target), key=_target):
            for batch in _batches(list(rows)):
                if self._has_lease():
                    self._push_batch(project, version, batch)

    def _answers(self, entry: Entry) -> list[Prediction] | None:
        """What the chunk was answered; None while it was not, or if it never will be."""
        answers, state = self._queue.get_result(entry.payload)
        if state in ("failed", "gone"):
            self._attempts[entry.chunk] += state == "failed"
            if self._attempts[entry.chunk] >= MAX_FAILED_ATTEMPTS or time.time() - entry.since > MAX_AGE:
                log.error("project %s: %d tasks fail in the worker", entry.project, len(entry.payload["tasks"]))
                self._outbox.remove([entry])
            else:
                self._queue.enqueue([entry.payload], project=entry.project)
        return answers

    def _push_batch(self, project: str, version: str, batch: Sequence[tuple[Entry, list[Prediction]]]) -> None:
        entries = [entry for entry, _ in batch]
        try:
            if self._is_known(entries[0]):
                with self._keeping_lease():
                    self._deliver(project, version, batch)
        except (LabelStudioUnavailable, LabelStudioAuthError, QueueUnavailable):
            raise
        except Exception as error:  # one odd chunk must not hold up the others
            if len(batch) > 1:
                for half in (batch[: len(batch) // 2], batch[len(batch) // 2 :]):
                    self._push_batch(project, version, half)
                return
            log.error("project %s: a chunk cannot be pushed: %s", project, error)
        self._outbox.remove(entries)

    def _is_known(self, entry: Entry) -> bool:
        """Whether Label Studio's project of this number holds the very task that was sent to us."""
        if entry.project in self._known:
            return True
        for task in entry.payload["tasks"]:
            theirs = self._label_studio.get_task_data(entry.project, task["id"])
            if theirs is None:
                continue  # deleted meanwhile, or another Label Studio: the next one tells
            if all(theirs.get(field) == value for field, value in task["data"].items()):
                self._known.add(entry.project)
                return True
        log.error("project %s at LABEL_STUDIO_URL is not the one that asks; nothing is pushed", entry.project)
        self._outbox.mark_mismatched(entry.project)
        return False

    def _deliver(self, project: str, version: str, batch: Sequence[tuple[Entry, list[Prediction]]]) -> None:
        since = min(entry.since for entry, _ in batch)
        wanted = {row["task"]: row for entry, answers in batch for row in _predictions(entry, answers)}
        ways = self._outbox.claim(PUSHING, project, version, list(wanted), time.time(), since)
        begun = [task for task, way in ways.items() if way == PUSHING]  # an import of which we never heard the end
        there = set(begun) - self._label_studio.filter_existing(project, begun, version) if begun else set()
        ours = [task for task, way in ways.items() if way not in (PULL, PUSHED)]
        self._import(project, [wanted[task] for task in ours if task not in there])
        self._outbox.confirm(project, version, ours, time.time())

    def _import(self, project: str, predictions: Sequence[Prediction], is_checked: bool = False) -> None:
        """Stores predictions; one that Label Studio refuses is left out, and the others are stored."""
        if not predictions:
            return
        if not self._has_lease():
            raise LabelStudioUnavailable("another pusher has taken over")
        start = time.monotonic()
        try:
            created = self._label_studio.import_predictions(project, predictions)
        except (LabelStudioUnavailable, LabelStudioAuthError):
            raise
        except LabelStudioError as error:
            if len(predictions) == 1:
                log.error("task %s: %s", predictions[0]["task"], error)
                return
            there = (
                None
                if is_checked
                else self._label_studio.filter_existing(project, [row["task"] for row in predictions])
            )
            kept = [row for row in predictions if there is None or row["task"] in there]
            if len(kept) < len(predictions):  # tasks were deleted meanwhile
                self._import(project, kept, is_checked=True)
                return
            half = len(predictions) // 2
            self._import(project, predictions[:half], is_checked=True)
            self._import(project, predictions[half:], is_checked=True)
        else:
            took = time.monotonic() - start
            PUSH_SECONDS.observe(took)
            PUSHED_PREDICTIONS.inc(created)
            self._rests_until = time.monotonic() + min(IMPORT_BACKOFF * took, MAX_IMPORT_BACKOFF)
            log.info("project %s: %d predictions pushed in %.1f s", project, created, took)
            if created != len(predictions):
                log.error("project %s: Label Studio left out %d of them", project, len(predictions) - created)


def _target(row: tuple[Entry, object]) -> tuple[str, str]:
    return row[0].project, row[0].payload["model_version"]


def _batches(rows: list[tuple[Entry, list[Prediction]]]) -> Iterator[list[tuple[Entry, list[Prediction]]]]:
    batch: list[tuple[Entry, list[Prediction]]] = []
    tasks = regions = 0
    for entry, answers in rows:
        more = sum(len(answer.get("result", ())) for answer in answers)
        if batch and (tasks + len(answers) > MAX_PREDICTIONS_PER_IMPORT or regions + more > MAX_REGIONS_PER_IMPORT):
            yield batch
            batch, tasks, regions = [], 0, 0
        batch.append((entry, answers))
        tasks, regions = tasks + len(answers), regions + more
    yield batch


def _predictions(entry: Entry, answers: Sequence[Mapping[str, Any]]) -> Iterator[Prediction]:
    for task, answer in zip(entry.payload["tasks"], answers, strict=True):
        if "error" in answer:
            log.warning("project %s, task %s: %s", entry.project, task["id"], answer["error"]["detail"])
        else:
            yield {"task": task["id"], **answer}

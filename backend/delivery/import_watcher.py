"""Projects that got new tasks are predicted without being asked, where `PREANNOTATE_ON_IMPORT` is set."""

from __future__ import annotations

import logging
import sys
import threading

from redis import Redis

from backend.delivery.preannotation import Preannotation
from backend.errors import BackendError, QueueUnavailable
from backend.labelstudio.client import LabelStudioClient
from backend.queue.predict_queue import IMPORTED_KEY
from backend.queue.redis import redis_errors
from backend.settings import Settings

log = logging.getLogger(__name__)

LOCK_KEY, LOCK = "gdino:importing:", 60  # + project; s, renewed as it goes on
POLL_INTERVAL = 2.0  # s between looks
AFTER_FAILURE = 60.0  # s


class ImportWatcher:
    """Predicts the projects that were noted; of several only one works on a project."""

    def __init__(self, settings: Settings, connection: Redis, studio: LabelStudioClient, name: str) -> None:
        self._settings, self._connection, self._label_studio, self._name = settings, connection, studio, name

    def run(self, stop: threading.Event) -> None:
        """Works until `stop` is set, whatever goes away meanwhile."""
        pause = POLL_INTERVAL
        while not stop.wait(pause):
            try:
                self.run_once()
                pause = POLL_INTERVAL
            except BackendError as error:
                log.warning("%s; trying again in %g s", error, AFTER_FAILURE)
                pause = AFTER_FAILURE

    def run_once(self) -> None:
        """Predicts what is noted now; a project that gets more tasks meanwhile stays noted."""
        with redis_errors():
            rows: list[tuple[bytes, float]] = self._connection.zrange(IMPORTED_KEY, 0, -1, withscores=True)  # type: ignore[assignment]
        for name, noted in rows:
            project = name.decode()
            if self._lock(project):
                self._predict(project)
                with redis_errors():
                    if self._connection.zscore(IMPORTED_KEY, project) == noted:
                        self._connection.zrem(IMPORTED_KEY, project)

    def _predict(self, project: str) -> None:
        run = Preannotation(self._settings, self._connection, self._label_studio, project)
        log.info("project %s has new tasks", project)
        tally = run.run(run.pages(), sys.maxsize, lambda done, failed: self._renew(project))
        log.info("project %s: %d new tasks, %d failed", project, tally.done, len(tally.failures))

    def _lock(self, project: str) -> bool:
        key = LOCK_KEY + project
        with redis_errors():
            taken = self._connection.set(key, self._name, nx=True, ex=LOCK)
            return bool(taken) or self._connection.get(key) == self._name.encode()

    def _renew(self, project: str) -> None:
        try:
            with redis_errors():
                self._connection.expire(LOCK_KEY + project, LOCK)
        except QueueUnavailable as error:
            log.warning("%s", error)

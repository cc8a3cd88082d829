"""The import watcher: predicts projects that got new tasks, where `PREANNOTATE_ON_IMPORT` is set."""

from __future__ import annotations

import logging
import sys
import threading

from redis import Redis

from backend.delivery.imported_projects import list_imported, remove_imported
from backend.delivery.preannotation import Preannotation
from backend.errors import BackendError, QueueUnavailable
from backend.labelstudio.client import LabelStudioClient
from backend.queue.redis import redis_errors
from backend.settings import Settings

log = logging.getLogger(__name__)

LOCK_KEY, LOCK_TTL = "gdino:importing:", 60  # + project; s, renewed during the work
POLL_INTERVAL = 2.0  # s
FAILURE_BACKOFF = 60.0  # s


class ImportWatcher:
    """Predicts the projects that were noted; of several watchers only one works on a project."""

    def __init__(self, settings: Settings, connection: Redis, label_studio: LabelStudioClient, name: str) -> None:
        self._settings, self._connection, self._label_studio = settings, connection, label_studio
        self._name = name

    def run(self, stop: threading.Event) -> None:
        """Watches until `stop` is set, through all outages."""
        pause = POLL_INTERVAL
        while not stop.wait(pause):
            try:
                self.run_once()
                pause = POLL_INTERVAL
            except BackendError as error:
                log.warning("pre-annotation after an import stopped: %s; trying again in %g s", error, FAILURE_BACKOFF)
                pause = FAILURE_BACKOFF

    def run_once(self) -> None:
        """Predicts the projects that are noted now; one that gets more tasks meanwhile stays noted."""
        for project, imported_at in list_imported(self._connection):
            if self._acquire_or_renew_lock(project):
                self._predict(project)
                remove_imported(self._connection, project, imported_at)

    def _predict(self, project: str) -> None:
        preannotation = Preannotation(self._settings, self._connection, self._label_studio, project)
        log.info("project %s has new tasks", project)

        def renew_lock(done: int, failed: int) -> None:
            try:
                with redis_errors():
                    self._connection.expire(LOCK_KEY + project, LOCK_TTL)
            except QueueUnavailable as error:
                log.warning("project %s: %s", project, error)

        summary = preannotation.run(preannotation.open_cursor(), sys.maxsize, renew_lock)
        log.info("project %s: %d new tasks, %d failed", project, summary.done, len(summary.failures))

    def _acquire_or_renew_lock(self, project: str) -> bool:
        key = LOCK_KEY + project
        with redis_errors():
            is_new = self._connection.set(key, self._name, nx=True, ex=LOCK_TTL)
            return bool(is_new) or self._connection.get(key) == self._name.encode()

"""The import job: predicts the tasks that a project got, where `PREANNOTATE_ON_IMPORT` is set.

A job sends as many tasks as may wait at a time, and ends; while there are more, the project stays noted and gets
another job. So no project waits for the end of another, however many tasks that has.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from redis import Redis

from backend.delivery.bulk import make_project_sender
from backend.delivery.imported_projects import get_cursor, list_imported, remove_imported, save_cursor
from backend.delivery.outbox import Outbox
from backend.errors import LabelingConfigError, LabelStudioError, LabelStudioNotFound, Overloaded, QueueUnavailable
from backend.labelstudio.client import LabelStudioClient
from backend.queue.pauses import PAUSED_IMPORT_KEY, Pauses
from backend.queue.redis import redis_errors
from backend.settings import Settings

log = logging.getLogger(__name__)

IMPORT_FUNCTION = "predict-imported"
MAX_PENDING_CHUNKS = 512  # of a project, up to which tasks are sent, and again when half of them are done


class ImportPredictor:
    """Sends the new tasks of projects to the workers."""

    def __init__(self, settings: Settings, connection: Redis, label_studio: LabelStudioClient) -> None:
        self._settings, self._connection, self._label_studio = settings, connection, label_studio
        self._pauses = Pauses(connection, PAUSED_IMPORT_KEY)

    def predict(self, payload: Mapping[str, Any]) -> dict[str, Any]:
        """Sends the next tasks of a project; the function of the jobs."""
        project = str(payload["project"])
        imported_at = dict(list_imported(self._connection)).get(project)
        if imported_at is None or Outbox(self._connection).count(project) > MAX_PENDING_CHUNKS / 2:
            return {}
        try:
            is_done = self._send(project)
            with redis_errors():
                self._pauses.resume(project)
            if is_done:
                remove_imported(self._connection, project, imported_at)
        except (LabelStudioNotFound, LabelingConfigError) as error:
            log.error("project %s: its new tasks are not predicted: %s", project, error)
            remove_imported(self._connection, project, imported_at)
        except (LabelStudioError, Overloaded, QueueUnavailable) as error:
            with redis_errors():
                seconds = self._pauses.pause(project, str(error))
            log.warning("project %s: predicting its new tasks pauses for %s s: %s", project, seconds, error)
        return {}

    def _send(self, project: str) -> bool:
        """Sends tasks until too many are pending; returns whether all were sent."""
        sender = make_project_sender(self._settings, self._connection, self._label_studio, project)
        version = sender.project_model.model_version
        while sender.count_pending_chunks() < MAX_PENDING_CHUNKS:
            after_id, since = get_cursor(self._connection, project), sender.get_time()
            tasks = self._label_studio.list_tasks_without_prediction(project, version, after_id)
            if not tasks:
                return True
            sender.send(tasks, since)
            save_cursor(self._connection, project, tasks[-1]["id"])
            log.info("project %s: %d new tasks", project, len(tasks))
        return False

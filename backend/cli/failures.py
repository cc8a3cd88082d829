"""The command `failures`: lists the tasks whose predictions were given up, tries them again, or drops them."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from datetime import datetime

from tqdm import tqdm

from backend.delivery.bulk import make_project_sender
from backend.delivery.failures import Failures
from backend.delivery.outbox import Outbox
from backend.errors import SettingsError
from backend.labelstudio.client import TASKS_PER_PAGE, LabelStudioClient
from backend.queue.redis import connect
from backend.settings import Settings


def list_failures(settings: Settings, project: str) -> int:
    """Prints the failures of a project, or how many each project has; returns the exit code: 1 if there are any.

    Tasks that are tried again are listed, too, and do not count.
    """
    connection = connect(settings.redis_url)
    failures = Failures(connection)
    if not project:
        counts = failures.count_by_project()
        for number, count in counts.items():
            print(f"project {number}: {count} tasks")
        return 1 if counts else 0
    rows = sorted(failures.iterate(project), key=lambda failure: failure.task)
    for row in rows:
        when = datetime.fromtimestamp(row.time).isoformat(" ", "seconds")
        print(f"task {row.task}: {row.code}: {row.detail} (attempt {row.attempts}, {when})")
    retries = Outbox(connection).list_retries(project)
    for entry in retries:
        tasks, detail = ", ".join(map(str, entry.task_ids)), entry.error.detail if entry.error else ""
        print(f"tried again after attempt {entry.attempts}: tasks {tasks}: {detail}")
    waiting = sum(len(entry.task_ids) for entry in retries)
    print(f"{len(rows)} tasks given up, {waiting} are tried again", file=sys.stderr)
    return 1 if rows else 0


def retry_failures(settings: Settings, project: str, tasks: Sequence[int]) -> int:
    """Sends failed tasks to the workers again, all of the project or these; returns the exit code.

    Raises:
        SettingsError: Label Studio is not configured.
        BackendError: Label Studio or Redis refused or did not answer; the failures that were not sent are kept.
    """
    if not (settings.label_studio_url and settings.label_studio_api_key):
        raise SettingsError("set LABEL_STUDIO_URL and LABEL_STUDIO_API_KEY: the tasks are read there")
    label_studio = LabelStudioClient(settings.label_studio_url, settings.label_studio_api_key)
    connection = connect(settings.redis_url)
    failures, sender = Failures(connection), make_project_sender(settings, connection, label_studio, project)
    failed = sorted(f.task for f in failures.iterate(project) if not tasks or f.task in tasks)
    sent = 0
    for start in tqdm(range(0, len(failed), TASKS_PER_PAGE), unit="page", file=sys.stderr, disable=len(failed) == 0):
        page = failed[start : start + TASKS_PER_PAGE]
        since = sender.get_time()
        found = label_studio.list_tasks_without_prediction(project, sender.project_model.model_version, 0, page)
        failures.remove(project, sorted(set(page) - {task["id"] for task in found}))  # predicted meanwhile, or deleted
        sender.send(found, since)  # which removes the others
        sent += len(found)
    print(f"{sent} tasks are tried again; {len(failed) - sent} are predicted or deleted meanwhile")
    return 0


def drop_failures(settings: Settings, project: str, tasks: Sequence[int]) -> int:
    """Forgets failed tasks, all of the project or these; returns the exit code."""
    failures = Failures(connect(settings.redis_url))
    dropped = list(tasks) or [failure.task for failure in failures.iterate(project)]
    failures.remove(project, dropped)
    print(f"{len(dropped)} tasks dropped")
    return 0

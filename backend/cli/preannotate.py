"""The command `preannotate`: predicts a whole project, with a progress bar and a list of failures."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path

from tqdm import tqdm

from backend.delivery.deliver_worker import running_workers
from backend.delivery.preannotation import Preannotation, PreannotationSummary
from backend.errors import SettingsError
from backend.labelstudio.client import LabelStudioClient
from backend.monitoring.activity import BulkProgress
from backend.queue.redis import connect, redis_errors
from backend.settings import Settings


def preannotate(
    settings: Settings, project: str, task_ids: list[int], view: str, limit: int, dry_run: bool, replace: bool
) -> int:
    """Predicts the tasks of a project that have no prediction of the current version.

    Args:
        settings: with the URL of a Redis.
        project: its number.
        task_ids: the tasks to predict; empty: all.
        view: the number of the Data Manager tab whose tasks are predicted; empty: all.
        limit: how many tasks to predict at most; 0: all.
        dry_run: only report what would be predicted.
        replace: delete older predictions of this model.

    Returns:
        The exit code: 0 if all tasks were predicted, 1 if some failed.

    Raises:
        SettingsError: an option is invalid.
        BackendError: the run cannot go on.
    """
    if not (settings.label_studio_url and settings.label_studio_api_key):
        raise SettingsError("set LABEL_STUDIO_URL and LABEL_STUDIO_API_KEY: without them there are no tasks to read")
    if not project.isdigit():
        raise SettingsError("--project must be a project's number")
    label_studio = LabelStudioClient(settings.label_studio_url, settings.label_studio_api_key)
    connection = connect(settings.redis_url)
    run = Preannotation(settings, connection, label_studio, project)
    with redis_errors():
        run.project_model.save_summary(connection)  # for the status page
    pending = run.count_pending(task_ids)
    version = run.project_model.model_version
    print(f"project {project}: {pending} tasks have no prediction of {version}", file=sys.stderr)
    if dry_run:
        for control in run.project_model.plan.controls:
            for label in control.labels:
                print(f"{control.from_name}: {label.name}: {', '.join(label.phrases)}; from {label.threshold}")
        return 0
    max_tasks = limit or (sys.maxsize if view else pending)  # the tasks of a view are not counted
    expected = min(max_tasks, pending)
    progress = BulkProgress(connection, f"preannotate-{project}", f"preannotate, project {project}")
    with contextlib.closing(progress), tqdm(total=expected, unit="task", file=sys.stderr) as bar:

        def on_progress(done: int, failed: int) -> None:
            bar.n = done
            bar.set_postfix(failed=failed, refresh=False)
            bar.refresh()
            progress.report(done, failed, expected)

        with running_workers(settings, label_studio, threads=1):  # where no server delivers
            summary = run.run(run.open_cursor(task_ids, view), max_tasks, on_progress, replace)
    return _report_summary(summary, Path(f"preannotate-{project}-failures.csv"))


def _report_summary(summary: PreannotationSummary, failures_path: Path) -> int:
    """Prints how many tasks failed and why, and writes them to a file; returns the exit code."""
    print(f"{summary.done - len(summary.failures)} tasks predicted, {len(summary.failures)} failed")
    if not summary.failures:
        return 0
    for reason, count in summary.count_by_reason().most_common():
        print(f"  {count}: {reason}")
    summary.write_failures(failures_path)
    print(f"{failures_path} lists the failed tasks; the same command tries them again")
    return 1

"""The command `preannotate`."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path

from tqdm import tqdm

from backend.delivery.preannotation import Preannotation, PreannotationSummary
from backend.errors import SettingsError
from backend.labelstudio.client import LabelStudioClient
from backend.monitoring.activity import BulkProgress
from backend.queue.redis import connect, redis_errors
from backend.settings import Settings


def preannotate(
    settings: Settings, project: str, numbers: str, view: str, limit: int, dry_run: bool, replace: bool
) -> int:
    """Runs the command; returns its exit code: 0 all done, 1 some failed.

    Raises:
        SettingsError: an option is not what it must be.
        BackendError: it could not run.
    """
    if not (settings.label_studio_url and settings.label_studio_api_key):
        raise SettingsError("set LABEL_STUDIO_URL and LABEL_STUDIO_API_KEY: without them there are no tasks to read")
    if not project.isdigit():
        raise SettingsError("--project must be a project's number")
    wanted = _numbers(numbers)
    studio = LabelStudioClient(settings.label_studio_url, settings.label_studio_api_key)
    connection = connect(settings.redis_url)
    run = Preannotation(settings, connection, studio, project)
    with redis_errors():
        run.project_model.save_summary(connection)  # for the status page
    count = run.count_pending(wanted)
    print(f"project {project}: {count} tasks have no prediction of {run.project_model.model_version}", file=sys.stderr)
    if dry_run:
        for control in run.project_model.plan.controls:
            for label in control.labels:
                print(f"{control.from_name}: {label.name}: {', '.join(label.phrases)}; from {label.threshold}")
        return 0
    most = limit or (sys.maxsize if view else count)
    shown = BulkProgress(connection, f"preannotate-{project}", f"preannotate, project {project}")
    most_there = min(most, count)
    with contextlib.closing(shown), tqdm(total=most_there, unit="task", file=sys.stderr) as bar:

        def progress(done: int, failed: int) -> None:
            bar.n = done
            bar.set_postfix(failed=failed, refresh=False)
            bar.refresh()
            shown.report(done, failed, most_there)

        tally = run.run(run.open_cursor(wanted, view), most, progress, replace)
    return _sum_up(tally, Path(f"preannotate-{project}-failures.csv"))


def _numbers(text: str) -> list[int]:
    words = [word.strip() for word in text.split(",") if word.strip()]
    if not all(word.isdigit() for word in words):
        raise SettingsError("--tasks must be task numbers with commas between")
    return [int(word) for word in words]


def _sum_up(tally: PreannotationSummary, path: Path) -> int:
    print(f"{tally.done - len(tally.failures)} tasks predicted, {len(tally.failures)} failed")
    if not tally.failures:
        return 0
    for reason, count in tally.count_by_reason().most_common():
        print(f"  {count}: {reason}")
    tally.write_failures(path)
    print(f"each of them is in {path}; the same command tries them again")
    return 1

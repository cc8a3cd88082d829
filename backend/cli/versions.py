"""Commands about learning: `train`, and `versions list|show|promote|rollback`."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from typing import Any

import click
from tqdm import tqdm

from backend.queue.training_queue import TrainingQueue
from backend.registry.versions import VersionStore
from backend.settings import Settings

POLL_INTERVAL = 0.5  # s
STATE_TEXTS = {
    "queued": "waiting for a fit worker",
    "reading": "reading annotations",
    "loading": "loading pictures",
    "measuring": "measuring what serves now",
    "rehearsing": "looking for what the model knows already",
    "training": "fine-tuning, rounds",
}


def follow(trainings: TrainingQueue, project: str) -> dict[str, Any]:
    """Shows a training's progress until it is over, and returns its outcome."""
    with tqdm(file=sys.stderr, bar_format="{desc} {bar} {n_fmt}/{total_fmt}", leave=False) as bar:
        while True:
            row = trainings.get_progress(project) or {"state": "queued"}
            if row["state"] in ("done", "failed"):
                return row
            bar.set_description_str(STATE_TEXTS.get(row["state"], row["state"]), refresh=False)
            bar.total, bar.n = row.get("of") or 1, row.get("done", 0)
            bar.refresh()
            time.sleep(POLL_INTERVAL)


def add_commands(group: click.Group, settings_options: Callable[..., Any], read: Callable[..., Settings]) -> None:
    """Adds `versions` and its commands; `read` makes settings of the options."""
    project_option = click.option("--project", required=True, metavar="NUMBER", help="of Label Studio")

    @group.group()
    def versions() -> None:
        """What was learned for a project."""

    @versions.command("list")
    @project_option
    @settings_options
    def list_(project: str, **options: str | None) -> None:
        """Every version of a project, oldest first; the one that is to serve has a star."""
        store = VersionStore(read(options).model_dir, project)
        current = store.get_current_id()
        print("* the checkpoint as it came" if not current else "  the checkpoint as it came")
        for version in store.list_versions():
            print(f"{'*' if version.id == current else ' '} {version.id}  {version.reason}")

    @versions.command()
    @click.argument("version")
    @project_option
    @settings_options
    def show(version: str, project: str, **options: str | None) -> None:
        """One version as JSON: thresholds (before, learned), metrics, parent."""
        found = VersionStore(read(options).model_dir, project).get(version)
        print(json.dumps(vars(found), indent=2))

    @versions.command()
    @click.argument("version")
    @project_option
    @settings_options
    def promote(version: str, project: str, **options: str | None) -> None:
        """Let a version serve; "none" stands for the checkpoint as it came."""
        VersionStore(read(options).model_dir, project).promote("" if version == "none" else version)
        print(f"project {project} is served by {version}")

    @versions.command()
    @project_option
    @settings_options
    def rollback(project: str, **options: str | None) -> None:
        """Let what served before the current version serve again."""
        serving = VersionStore(read(options).model_dir, project).roll_back()
        print(f"project {project} is served by {serving or 'the checkpoint as it came'}")


def report(row: dict[str, Any]) -> int:
    """Prints a training's outcome; returns the exit code."""
    print(f"{row['state']}: {row['text']}")
    if row.get("version"):
        print(f"{'promoted' if row['is_promoted'] else 'kept'}: version {row['version']}")
    return 0 if row["state"] == "done" else 1

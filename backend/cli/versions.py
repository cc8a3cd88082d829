"""The commands `versions list|show|promote|rollback`, and what `train` prints."""

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
BASE_CHECKPOINT = "the base checkpoint"
STATE_TEXTS = {  # by the states that TrainingQueue.report names
    "queued": "waiting for a training worker",
    "reading": "reading annotations",
    "loading": "loading images",
    "measuring": "evaluating the current version",
    "rehearsing": "pseudo-labeling images",
    "training": "fine-tuning, epochs",
}


def follow_training(queue: TrainingQueue, project: str) -> dict[str, Any]:
    """Shows a training's progress until it is over, and returns its last report."""
    with tqdm(file=sys.stderr, bar_format="{desc} {bar} {n_fmt}/{total_fmt}", leave=False) as bar:
        while True:
            progress = queue.get_progress(project) or {"state": "queued"}
            if progress["state"] in ("done", "failed"):
                return progress
            bar.set_description_str(STATE_TEXTS.get(progress["state"], progress["state"]), refresh=False)
            bar.total, bar.n = progress.get("of") or 1, progress.get("done", 0)
            bar.refresh()
            time.sleep(POLL_INTERVAL)


def report_outcome(outcome: dict[str, Any]) -> int:
    """Prints the last report of a training; returns the exit code."""
    print(f"{outcome['state']}: {outcome['text']}")
    if outcome.get("version"):
        print(f"{'promoted' if outcome['is_promoted'] else 'kept'}: version {outcome['version']}")
    return 0 if outcome["state"] == "done" else 1


def add_versions_commands(
    group: click.Group, settings_options: Callable[..., Any], read_settings: Callable[..., Settings]
) -> None:
    """Adds the group `versions`.

    Args:
        group: the program.
        settings_options: decorates a command with the options of all settings.
        read_settings: makes the settings from these options.
    """
    project_option = click.option(
        "--project", required=True, metavar="NUMBER", help="the project's number in Label Studio"
    )

    @group.group()
    def versions() -> None:
        """List, show, promote and roll back the trained versions of a project."""

    @versions.command("list")
    @project_option
    @settings_options
    def list_(project: str, **options: str | None) -> None:
        """List a project's versions, the oldest first; a star marks the promoted one."""
        store = VersionStore(read_settings(options).model_dir, project)
        current = store.get_current_id()
        print(f"{' ' if current else '*'} {BASE_CHECKPOINT}")
        for version in store.list_versions():
            print(f"{'*' if version.id == current else ' '} {version.id}  {version.reason}")

    @versions.command()
    @click.argument("version")
    @project_option
    @settings_options
    def show(version: str, project: str, **options: str | None) -> None:
        """Show a version as JSON: thresholds (before, trained), metrics, parent."""
        store = VersionStore(read_settings(options).model_dir, project)
        print(json.dumps(vars(store.get(version)), indent=2))

    @versions.command()
    @click.argument("version")
    @project_option
    @settings_options
    def promote(version: str, project: str, **options: str | None) -> None:
        """Serve a version; "none" stands for the base checkpoint."""
        VersionStore(read_settings(options).model_dir, project).promote("" if version == "none" else version)
        print(f"project {project} is served by {BASE_CHECKPOINT if version == 'none' else version}")

    @versions.command()
    @project_option
    @settings_options
    def rollback(project: str, **options: str | None) -> None:
        """Serve what was served before the current version."""
        version = VersionStore(read_settings(options).model_dir, project).roll_back()
        print(f"project {project} is served by {version or BASE_CHECKPOINT}")

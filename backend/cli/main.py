"""The command line: `python -m backend …`. Every option has an environment variable, and the reverse."""

from __future__ import annotations

import logging
import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from backend import __version__
from backend.cli.process import EXIT_UNUSABLE
from backend.cli.supervisor import build_gunicorn_command, stop_on_signals
from backend.cli.supervisor import serve as run_everything
from backend.cli.versions import add_commands, follow, report
from backend.delivery.import_watcher import ImportWatcher
from backend.delivery.pusher import Pusher
from backend.errors import BackendError, CheckpointError, SettingsError
from backend.labelstudio.client import LabelStudioClient
from backend.logs import set_up_logging
from backend.queue.live_workers import make_worker_name
from backend.queue.private_redis import resolve_redis_url
from backend.queue.redis import connect
from backend.queue.training_queue import TrainingQueue
from backend.settings import Settings, describe_setting
from backend.training.training_worker import run as serve_fit

# Turns that one of torch's threads waits for the others before it sleeps. The default is without end: two busy
# processes on the same cores then hold each other up, fifty times over (docs/benchmarks.md).
SPIN_COUNT = "1000"

Command = TypeVar("Command", bound=Callable[..., Any])


def settings_options(command: Command) -> Command:
    """One option for each setting; the command gets those that were given as keyword arguments."""
    for name, field in reversed(Settings.model_fields.items()):
        default = f"; default: {field.default}" if field.default != "" else ""
        help_text = f"{describe_setting(name)}{default}; variable: {name.upper()}"
        command = click.option(f"--{name.replace('_', '-')}", metavar="VALUE", help=help_text)(command)
    return command


def _settings(options: dict[str, str | None]) -> Settings:
    """The environment, with what was given on the command line on top."""
    settings = Settings(**{name: value for name, value in options.items() if value})
    set_up_logging(settings)
    return settings


@click.group()
@click.version_option(__version__)
def cli() -> None:
    """Grounding DINO for Label Studio."""


@cli.command()
@settings_options
def serve(**options: str | None) -> None:
    """Run everything: web front, workers and, without REDIS_URL, a private Redis."""
    sys.exit(run_everything(_settings(options)))


@cli.command()
@settings_options
def web(**options: str | None) -> None:
    """Run the web front alone, with REDIS_URL or beside a running server."""
    settings = resolve_redis_url(_settings(options))
    command = build_gunicorn_command(settings)
    os.execve(command[0], command, {**os.environ, **settings.to_env()})  # noqa: S606


@cli.command()
@click.option("--queue", type=click.Choice(["predict", "fit"]), default="predict", help="its work; default: predict")
@settings_options
def worker(queue: str, **options: str | None) -> None:
    """Run one worker alone, with REDIS_URL or beside a running server."""
    settings = resolve_redis_url(_settings(options))
    os.environ.setdefault("GOMP_SPINCOUNT", SPIN_COUNT)  # read when torch is loaded
    code = 0
    try:
        if queue == "predict":
            from backend.prediction.predict_worker import (
                run as serve_predict,  # loads torch: only this command pays for it
            )

            serve_predict(settings)
        elif serve_fit(settings):
            os.execv(sys.executable, [sys.executable, "-m", "backend", *sys.argv[1:]])  # noqa: S606
    except BackendError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        code = EXIT_UNUSABLE if isinstance(error, (SettingsError, CheckpointError)) else 1
    logging.shutdown()
    os._exit(code)  # Python would wait for a download that hangs


@cli.command()
@settings_options
def push(**options: str | None) -> None:
    """Run the pusher alone: it brings predictions of large requests into Label Studio."""
    settings = resolve_redis_url(_settings(options))
    if not (settings.label_studio_url and settings.label_studio_api_key):
        raise SettingsError("set LABEL_STUDIO_URL and LABEL_STUDIO_API_KEY: without them nothing can be pushed")
    studio = LabelStudioClient(settings.label_studio_url, settings.label_studio_api_key)
    stop, name = stop_on_signals(), make_worker_name()
    if settings.preannotate_on_import:
        imports = ImportWatcher(settings, connect(settings.redis_url), studio, name)
        threading.Thread(target=imports.run, args=(stop,), daemon=True).start()
    Pusher(connect(settings.redis_url), studio, name).run(stop)


@cli.command()
@click.option("--project", default="", metavar="NUMBER", help="project whose config and one picture are tried")
@settings_options
def check(project: str, **options: str | None) -> None:
    """Try everything that must work, and say what does not; exit code 1 if anything fails."""
    from backend.cli.check import check as try_everything  # loads numpy: the supervisor and the front do without

    settings = resolve_redis_url(_settings({**options, "log_level": "ERROR"}))
    lines = []
    for line in try_everything(settings, project):
        print(line, flush=True)
        lines.append(line)
    if not all(line.is_well for line in lines):
        sys.exit(1)


@cli.command()
@click.option("--project", required=True, metavar="NUMBER", help="of Label Studio")
@settings_options
def train(project: str, **options: str | None) -> None:
    """Learn from a project's annotations, as Start Training does, and show how it goes; Ctrl-C leaves it running."""
    settings = resolve_redis_url(_settings(options))
    if not (settings.label_studio_url and settings.label_studio_api_key):
        raise SettingsError("training reads annotations: set LABEL_STUDIO_URL and LABEL_STUDIO_API_KEY")
    if not project.isdigit():
        raise SettingsError("--project must be a project's number")
    trainings = TrainingQueue(connect(settings.redis_url))
    trainings.start(project, settings.train)
    sys.exit(report(follow(trainings, project)))


@cli.command()
@click.option("--project", required=True, metavar="NUMBER", help="of Label Studio")
@click.option("--tasks", default="", metavar="NUMBERS", help="only these, with commas between")
@click.option("--view", default="", metavar="NUMBER", help="only those of this tab of the Data Manager")
@click.option("--limit", type=int, default=0, metavar="COUNT", help="at most so many")
@click.option("--dry-run", is_flag=True, help="say what would be done")
@click.option("--replace", is_flag=True, help="delete this model's older predictions once the new ones are in")
@settings_options
def preannotate(
    project: str, tasks: str, view: str, limit: int, dry_run: bool, replace: bool, **options: str | None
) -> None:
    """Predict a whole project; Ctrl-C stops, and the same command goes on. Exit code 1: some tasks failed."""
    from backend.cli.preannotate import preannotate as run  # loads the pusher: other commands do without

    settings = resolve_redis_url(
        _settings({"log_level": "ERROR", **{k: v for k, v in options.items() if v is not None}})
    )
    try:
        sys.exit(run(settings, project, tasks, view, limit, dry_run, replace))
    except KeyboardInterrupt:
        print("stopped; what is on its way is still brought in, and the same command goes on", file=sys.stderr)
        sys.exit(130)


@cli.command()
@click.argument("images", nargs=-1, required=True)
@click.option("--labels", default="", metavar="NAMES", help='what to look for, such as "red circle, blue square"')
@click.option("--labels-file", type=click.Path(exists=True, dir_okay=False), help="a file with one of them a line")
@click.option("--labels-from", type=click.Path(exists=True, dir_okay=False), help="a labeling config as XML")
@click.option("--out", required=True, type=click.Path(file_okay=False), help="folder to write")
@click.option("--format", "formats", default="yolo", help="of yolo, coco and labelstudio, with commas between")
@click.option("--val", type=click.FloatRange(0, 1), default=0.2, help="share of pictures for validation; default: 0.2")
@click.option("--preview", is_flag=True, help="draw the boxes on copies of the pictures, and a sheet for each label")
@click.option("--zip", "as_zip", is_flag=True, help="pack the folder as well")
@click.option("--sample", type=int, default=0, metavar="COUNT", help="try so many first: counts by threshold, sheets")
@click.option("--force", is_flag=True, help="write a finished folder anew")
@settings_options
def label(
    images: tuple[str, ...], labels: str, labels_file: str | None, labels_from: str | None, out: str, formats: str,
    val: float, preview: bool, as_zip: bool, sample: int, force: bool, **options: str | None,
) -> None:  # fmt: skip
    """Label pictures in files, folders or patterns; the same command goes on where it was stopped."""
    from backend.cli import label as bulk  # loads Pillow: other commands do without

    chosen = tuple(word.strip() for word in formats.split(","))
    if not set(chosen) <= set(bulk.FORMATS):
        raise SettingsError(f"--format must be of {', '.join(bulk.FORMATS)}")
    config = bulk.config_from(labels, labels_file, labels_from)
    settings = _settings({"log_level": "ERROR", **{k: v for k, v in options.items() if v is not None}})
    wanted = bulk.LabelOptions(Path(out), chosen, val, preview, as_zip, sample, force)
    try:
        sys.exit(bulk.label(settings, images, config, wanted))
    except KeyboardInterrupt:
        print("stopped; the same command goes on", file=sys.stderr)
        sys.exit(130)


add_commands(cli, settings_options, _settings)


def main() -> None:
    """The program; an error that the user can mend ends it with one line and exit code 2."""
    try:
        cli(standalone_mode=False)
    except click.ClickException as error:
        error.show()
        sys.exit(2)
    except click.Abort:
        sys.exit(130)
    except BackendError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)

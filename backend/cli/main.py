"""The command line: `python -m backend …`. Every option has an environment variable, and the reverse."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from backend import __version__
from backend.cli.process_group import EXIT_UNUSABLE
from backend.cli.supervisor import build_gunicorn_command, stop_on_signals
from backend.cli.supervisor import serve as run_supervisor
from backend.cli.versions import add_versions_commands, follow_training, report_outcome
from backend.delivery import deliver_worker
from backend.errors import BackendError, CheckpointError, SettingsError
from backend.logs import set_up_logging
from backend.queue.private_redis import resolve_redis_url
from backend.queue.redis import connect
from backend.queue.training_queue import TrainingQueue
from backend.settings import Settings, describe_setting
from backend.training import training_worker

# Iterations for which an idle OpenMP thread of torch spins before it sleeps. Without a limit, two busy processes on the
# same cores slow each other down fifty-fold (docs/benchmarks.md).
SPIN_COUNT = "1000"

Command = TypeVar("Command", bound=Callable[..., Any])


def settings_options(command: Command) -> Command:
    """Adds an option for each setting; the command gets the given ones as keyword arguments."""
    for name, field in reversed(Settings.model_fields.items()):
        default = f"; default: {field.default}" if field.default != "" else ""
        help_text = f"{describe_setting(name)}{default}; variable: {name.upper()}"
        command = click.option(f"--{name.replace('_', '-')}", metavar="VALUE", help=help_text)(command)
    return command


def _read_settings(options: dict[str, str | None]) -> Settings:
    """Reads the settings, options before environment variables, and sets up logging."""
    given = {name: value for name, value in options.items() if value is not None}
    defaults = {name: Settings.model_fields[name].default for name, value in given.items() if not value}
    settings = Settings(**{**given, **defaults})  # an empty option is the default, whatever its variable says
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
    sys.exit(run_supervisor(_read_settings(options)))


@cli.command()
@settings_options
def web(**options: str | None) -> None:
    """Run the web front alone, with REDIS_URL or beside a running server."""
    settings = resolve_redis_url(_read_settings(options))
    command = build_gunicorn_command(settings)
    os.execve(command[0], command, {**os.environ, **settings.to_env()})  # noqa: S606


@cli.command()
@click.option(
    "--queue", type=click.Choice(["predict", "fit"]), default="predict",
    help="predict: run predictions; fit: run trainings; default: predict",
)  # fmt: skip
@settings_options
def worker(queue: str, **options: str | None) -> None:
    """Run one worker alone, with REDIS_URL or beside a running server."""
    settings = resolve_redis_url(_read_settings(options))
    os.environ.setdefault("GOMP_SPINCOUNT", SPIN_COUNT)  # read when torch is loaded
    code = 0
    try:
        if queue == "predict":
            from backend.prediction import predict_worker  # loads torch: the other commands do without

            predict_worker.run(settings)
        elif training_worker.run(settings):
            os.execv(sys.executable, [sys.executable, "-m", "backend", *sys.argv[1:]])  # noqa: S606
    except BackendError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        code = EXIT_UNUSABLE if isinstance(error, (SettingsError, CheckpointError)) else 1
    logging.shutdown()
    os._exit(code)  # a normal exit would wait for a download that hangs


@cli.command()
@settings_options
def push(**options: str | None) -> None:
    """Run the delivery workers alone, which store the predictions of large requests in Label Studio."""
    settings = resolve_redis_url(_read_settings(options))
    if not (settings.label_studio_url and settings.label_studio_api_key):
        raise SettingsError("set LABEL_STUDIO_URL and LABEL_STUDIO_API_KEY: without them nothing can be pushed")
    deliver_worker.run(settings, stop_on_signals())
    logging.shutdown()
    os._exit(0)  # a normal exit would wait for a thread whose Redis is away


@cli.command()
@click.option("--project", default="", metavar="NUMBER", help="also check this project's config and one of its images")
@settings_options
def check(project: str, **options: str | None) -> None:
    """Check Redis, workers, model and Label Studio, line by line. Exit code 1: a check failed."""
    from backend.cli.check import check as run_checks  # loads numpy: the supervisor and the web front do without

    settings = resolve_redis_url(_read_settings({**options, "log_level": "ERROR"}))
    has_failed = False
    for result in run_checks(settings, project):
        print(result, flush=True)
        has_failed |= not result.is_ok
    sys.exit(1 if has_failed else 0)


@cli.command()
@click.option("--project", required=True, metavar="NUMBER", help="the project's number in Label Studio")
@settings_options
def train(project: str, **options: str | None) -> None:
    """Train on a project's annotations, as Start Training does. Ctrl-C ends the display, not the training."""
    settings = resolve_redis_url(_read_settings(options))
    if not (settings.label_studio_url and settings.label_studio_api_key):
        raise SettingsError("training reads annotations: set LABEL_STUDIO_URL and LABEL_STUDIO_API_KEY")
    if not project.isdigit():
        raise SettingsError("--project must be a project's number")
    queue = TrainingQueue(connect(settings.redis_url))
    queue.start(project, settings.train)
    sys.exit(report_outcome(follow_training(queue, project)))


@cli.command()
@click.option("--project", required=True, metavar="NUMBER", help="the project's number in Label Studio")
@click.option("--tasks", default="", metavar="NUMBERS", help="predict only these tasks, comma-separated")
@click.option("--view", default="", metavar="NUMBER", help="predict only the tasks of this Data Manager tab")
@click.option("--limit", type=int, default=0, metavar="COUNT", help="predict at most this many tasks")
@click.option("--dry-run", is_flag=True, help="report what would be predicted, and stop")
@click.option("--replace", is_flag=True, help="delete this model's older predictions once the new ones are stored")
@settings_options
def preannotate(
    project: str, tasks: str, view: str, limit: int, dry_run: bool, replace: bool, **options: str | None
) -> None:
    """Predict a whole project. Ctrl-C stops it, and the same command resumes it. Exit code 1: some tasks failed."""
    from backend.cli.preannotate import preannotate as run_preannotate  # loads the delivery: other commands do without

    settings = resolve_redis_url(_read_settings({**options, "log_level": options["log_level"] or "ERROR"}))
    try:
        sys.exit(run_preannotate(settings, project, _parse_numbers("--tasks", tasks), view, limit, dry_run, replace))
    except KeyboardInterrupt:
        print("stopped; queued predictions are still delivered, and the same command resumes", file=sys.stderr)
        sys.exit(130)


@cli.command()
@click.option("--project", default="", metavar="NUMBER", help="the project's number in Label Studio; empty: count all")
@click.option("--tasks", default="", metavar="NUMBERS", help="only these tasks, comma-separated")
@click.option("--retry", is_flag=True, help="send the tasks to the workers again")
@click.option("--drop", is_flag=True, help="forget the tasks")
@settings_options
def failures(project: str, tasks: str, retry: bool, drop: bool, **options: str | None) -> None:
    """List the tasks whose predictions were given up, with the reason; try them again, or drop them. Exit code 1:
    there are some.
    """
    from backend.cli import failures as command

    settings = resolve_redis_url(_read_settings({**options, "log_level": options["log_level"] or "ERROR"}))
    numbers = _parse_numbers("--tasks", tasks)
    if project and not project.isdigit():
        raise SettingsError("--project must be a project's number")
    if ((retry or drop) and not project) or (retry and drop):
        raise SettingsError("--retry and --drop need --project, and exclude each other")
    if retry:
        sys.exit(command.retry_failures(settings, project, numbers))
    if drop:
        sys.exit(command.drop_failures(settings, project, numbers))
    sys.exit(command.list_failures(settings, project))


def _parse_numbers(option: str, text: str) -> list[int]:
    """Parses comma-separated numbers; raises SettingsError."""
    words = [word.strip() for word in text.split(",") if word.strip()]
    if not all(word.isdigit() for word in words):
        raise SettingsError(f"{option} must be task numbers, comma-separated")
    return [int(word) for word in words]


@cli.command()
@click.argument("images", nargs=-1, required=True)
@click.option("--labels", default="", metavar="NAMES", help='what to detect, such as "red circle, blue square"')
@click.option("--labels-file", type=click.Path(exists=True, dir_okay=False), help="a file with one label per line")
@click.option("--labels-from", type=click.Path(exists=True, dir_okay=False), help="a labeling config as XML")
@click.option("--out", required=True, type=click.Path(file_okay=False), help="folder to write")
@click.option("--format", "formats", default="yolo", help="yolo, coco, labelstudio, comma-separated; default: yolo")
@click.option("--val", type=click.FloatRange(0, 1), default=0.2, help="share of images for validation; default: 0.2")
@click.option("--preview", is_flag=True, help="draw the boxes on copies of the images, and a contact sheet per label")
@click.option("--zip", "as_zip", is_flag=True, help="also pack the folder")
@click.option(
    "--sample", type=int, default=0, metavar="COUNT",
    help="try this many random images first: box counts by threshold, contact sheets",
)  # fmt: skip
@click.option("--force", is_flag=True, help="overwrite a finished folder")
@settings_options
def label(
    images: tuple[str, ...], labels: str, labels_file: str | None, labels_from: str | None, out: str, formats: str,
    val: float, preview: bool, as_zip: bool, sample: int, force: bool, **options: str | None,
) -> None:  # fmt: skip
    """Label images in files, folders or patterns. Ctrl-C stops it, and the same command resumes it. Exit code 1: some
    images failed.
    """
    from backend.cli import label as command  # loads Pillow: other commands do without

    format_names = tuple(name.strip() for name in formats.split(","))
    if not set(format_names) <= set(command.FORMATS):
        raise SettingsError(f"--format must be of {', '.join(command.FORMATS)}")
    label_config = command.read_label_config(labels, labels_file, labels_from)
    settings = _read_settings({**options, "log_level": options["log_level"] or "ERROR"})
    label_options = command.LabelOptions(Path(out), format_names, val, preview, as_zip, sample, force)
    try:
        sys.exit(command.label(settings, images, label_config, label_options))
    except KeyboardInterrupt:
        print("stopped; the same command resumes", file=sys.stderr)
        sys.exit(130)


add_versions_commands(cli, settings_options, _read_settings)


def main() -> None:
    """Runs the program; an error that the user can correct ends it with one line and exit code 2."""
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

"""The command `check`: one line for each thing that must work, with what came back or what to do about it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from redis import Redis

from backend.delivery.failures import Failures
from backend.delivery.outbox import Outbox
from backend.errors import BackendError
from backend.images.decoding import ImageLoader
from backend.images.sources import ImageFetcher
from backend.labelstudio.client import LabelStudioClient, parse_origin
from backend.labelstudio.labeling_config import Plan, read_plan
from backend.labelstudio.targets import expand_targets
from backend.queue.live_workers import READY_KEY, get_live_workers
from backend.queue.predict_queue import count_waiting_by_checkpoint
from backend.queue.redis import connect, redis_errors
from backend.registry.checkpoint import find_checkpoint
from backend.settings import Settings

NO_MODELS_CONNECTED = (
    "none. If connecting answers 403 'reserved network address', Label Studio refuses private addresses: "
    "start it with ML_BLOCK_LOCAL_IP=false and SSRF_PROTECTION_ENABLED=false"
)


@dataclass(frozen=True)
class CheckResult:
    """The outcome of one check.

    Attributes:
        subject: what was checked.
        detail: what came back, or what is wrong and what to do about it.
        is_ok: the check passed.
    """

    subject: str
    detail: str
    is_ok: bool

    def __str__(self) -> str:
        return f"{'ok  ' if self.is_ok else 'FAIL'}  {self.subject}: {self.detail}"


def check(settings: Settings, project: str) -> Iterator[CheckResult]:
    """Runs the checks one after the other.

    Args:
        settings: with the URL of a Redis.
        project: its number; empty: no check of a project.

    Yields:
        The result of each check, as soon as it is known.
    """
    connection = connect(settings.redis_url)
    label_studio = LabelStudioClient(settings.label_studio_url, settings.label_studio_api_key)
    yield _run_check("MODEL", lambda: find_checkpoint(settings.model).source)
    yield _run_check("Redis", lambda: _describe_queue(connection))
    yield _run_check("workers", lambda: _describe_workers(settings, connection))
    yield _run_check("given up", lambda: _describe_failures(connection))
    if not settings.label_studio_url:
        detail = "LABEL_STUDIO_URL is not set: uploads cannot be read, nothing can be pushed"
        yield CheckResult("Label Studio", detail, is_ok=False)
        return
    yield _run_check("Label Studio", label_studio.get_version)
    yield _run_check("LABEL_STUDIO_API_KEY", lambda: f"{label_studio.get_token_type()} of {label_studio.whoami()}")
    if project:
        yield from _check_project(settings, label_studio, project)


def _run_check(subject: str, attempt: Callable[[], str]) -> CheckResult:
    """Makes a result from what `attempt` returns, or from the BackendError that it raises."""
    try:
        return CheckResult(subject, attempt(), is_ok=True)
    except BackendError as error:
        return CheckResult(subject, str(error), is_ok=False)


def _describe_queue(connection: Redis) -> str:
    waiting = count_waiting_by_checkpoint(connection).total()
    to_push = sum(Outbox(connection).count_by_project().values())
    return f"{waiting} chunks are waiting, {to_push} to be pushed"


def _describe_workers(settings: Settings, connection: Redis) -> str:
    """Describes the workers of this MODEL; names those of others, which take nothing from this one's queue."""
    checkpoint = find_checkpoint(settings.model).fingerprint
    with redis_errors():
        workers = get_live_workers(connection, READY_KEY)
    others = [f"{name} serves {info.model}" for name, info in workers.items() if info.checkpoint != checkpoint]
    ready = len(workers) - len(others)
    if not ready:
        also = f" ({', '.join(others)})" if others else ""
        raise BackendError(f"none has this MODEL loaded{also}; see the log of `serve`, or start `worker`")
    return ", ".join([f"{ready} ready", *(f"another MODEL: {other}" for other in others)])


def _describe_failures(connection: Redis) -> str:
    counts = Failures(connection).count_by_project()
    if not counts:
        return "no tasks"
    tasks = ", ".join(f"{count} of project {project}" for project, count in counts.items())
    raise BackendError(f"{tasks}; `python -m backend failures --project …` lists them and tries them again")


def _check_project(settings: Settings, label_studio: LabelStudioClient, project: str) -> Iterator[CheckResult]:
    subject = f"labeling config of project {project}"
    try:
        plan = read_plan(label_studio.get_label_config(project), settings.box_threshold, settings.nms_iou)
    except BackendError as error:
        yield CheckResult(subject, str(error), is_ok=False)
    else:
        labels = [f"{label.name}: {', '.join(label.phrases)}" for control in plan.controls for label in control.labels]
        yield CheckResult(subject, "; ".join(labels) or "labels come with the task", is_ok=True)
        yield _run_check("one image of it", lambda: _load_first_image(settings, label_studio, project, plan))
    yield _run_check("models connected to it", lambda: _list_models(label_studio, project))


def _load_first_image(settings: Settings, label_studio: LabelStudioClient, project: str, plan: Plan) -> str:
    """Loads the first image of the project's first task, and describes it."""
    task = label_studio.get_first_task(project)
    if task is None:
        raise BackendError("the project has no tasks")
    target = next(iter(expand_targets(plan, task["data"])), None)
    if target is None:
        raise BackendError("the task's list of images is empty or missing")
    fetcher = ImageFetcher.from_settings(settings, label_studio)
    image = ImageLoader(fetcher, settings.max_image_pixels).load(target.uri, task["id"])
    return f"task {task['id']}: {image.size[0]} x {image.size[1]} pixels"


def _list_models(label_studio: LabelStudioClient, project: str) -> str:
    models = label_studio.list_ml_backends(project)
    states = [f"{parse_origin(model['url'])} {json.dumps(model.get('readable_state'))}" for model in models]
    return ", ".join(states) or NO_MODELS_CONNECTED

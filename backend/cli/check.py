"""`check`: one line for each thing that must work: what was tried, what came back, and what to do about it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from backend.errors import BackendError
from backend.images.decoding import ImageLoader
from backend.images.sources import ImageFetcher
from backend.labelstudio.client import LabelStudioClient, parse_origin
from backend.labelstudio.labeling_config import Plan, read_plan
from backend.labelstudio.targets import expand_targets
from backend.queue.predict_queue import PredictQueue
from backend.queue.redis import connect
from backend.registry.checkpoint import find_checkpoint
from backend.settings import Settings

BLOCKS_LOCAL = (
    "none. If connecting answers 403 'reserved network address', Label Studio refuses private addresses: "
    "start it with ML_BLOCK_LOCAL_IP=false and SSRF_PROTECTION_ENABLED=false"
)


@dataclass(frozen=True)
class CheckResult:
    """What was tried, what came back or is to be done, and whether it is well."""

    tried: str
    found: str
    is_well: bool

    def __str__(self) -> str:
        return f"{'ok  ' if self.is_well else 'FAIL'}  {self.tried}: {self.found}"


def check(settings: Settings, project: str) -> Iterator[CheckResult]:
    """Tries one thing after the other; `project` is a number, or empty to leave out what needs one."""
    studio = LabelStudioClient(settings.label_studio_url, settings.label_studio_api_key)
    yield _tried("MODEL", lambda: find_checkpoint(settings.model).source)
    yield _tried("Redis", lambda: _redis(settings))
    yield _tried("workers", lambda: _workers(settings))
    if not settings.label_studio_url:
        yield CheckResult(
            "Label Studio", "LABEL_STUDIO_URL is not set: uploads cannot be read, nothing can be pushed", False
        )
        return
    yield _tried("Label Studio", lambda: studio.get_version())
    yield _tried("LABEL_STUDIO_API_KEY", lambda: f"{studio.get_token_type()} of {studio.whoami()}")
    if project:
        yield from _project(settings, studio, project)


def _tried(tried: str, attempt: Callable[[], str]) -> CheckResult:
    try:
        return CheckResult(tried, attempt(), True)
    except BackendError as error:
        return CheckResult(tried, str(error), False)


def _redis(settings: Settings) -> str:
    return f"{PredictQueue(connect(settings.redis_url)).count_waiting()} chunks are waiting"


def _workers(settings: Settings) -> str:
    ready = PredictQueue(connect(settings.redis_url)).count_ready_workers()
    if not ready:
        raise BackendError("none has its model loaded; look into the log of `serve`, or start `worker`")
    return f"{ready} ready"


def _project(settings: Settings, studio: LabelStudioClient, project: str) -> Iterator[CheckResult]:
    config: list[Plan] = []

    def plan() -> str:
        config.append(read_plan(studio.get_label_config(project), settings.box_threshold, settings.nms_iou))
        labels = [label for control in config[0].controls for label in control.labels]
        return "; ".join(f"{label.name}: {', '.join(label.phrases)}" for label in labels) or "labels come with the task"

    yield _tried(f"labeling config of project {project}", plan)
    if config:
        yield _tried("one picture of it", lambda: _picture(settings, studio, project, config[0]))
    yield _tried("models connected to it", lambda: _backends(studio, project))


def _picture(settings: Settings, studio: LabelStudioClient, project: str, plan: Plan) -> str:
    task = studio.get_first_task(project)
    if task is None:
        raise BackendError("the project has no tasks")
    sources = ImageFetcher.from_settings(settings, studio)
    view = next(iter(expand_targets(plan, task["data"])), None)
    if view is None:
        raise BackendError("the task's list of images is empty or missing")
    picture = ImageLoader(sources, settings.max_image_pixels).load(view.uri, task["id"])
    return f"task {task['id']}: {picture.size[0]} x {picture.size[1]} pixels"


def _backends(studio: LabelStudioClient, project: str) -> str:
    rows = studio.list_ml_backends(project)
    states = [
        f"{parse_origin(row['url'])} {json.dumps(row.get('readable_state'))}" for row in rows
    ]
    return ", ".join(states) or BLOCKS_LOCAL

"""`check`: one line for each thing that must work: what was tried, what came back, and what to do about it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from backend.errors import BackendError
from backend.images.decoding import Images
from backend.images.sources import Sources
from backend.labelstudio.client import Studio, origin
from backend.labelstudio.labeling_config import Plan, read_plan
from backend.labelstudio.targets import views
from backend.queue.predict_queue import PredictQueue
from backend.queue.redis import connect
from backend.registry.checkpoint import find_checkpoint
from backend.settings import Settings

BLOCKS_LOCAL = (
    "none. If connecting answers 403 'reserved network address', Label Studio refuses private addresses: "
    "start it with ML_BLOCK_LOCAL_IP=false and SSRF_PROTECTION_ENABLED=false"
)


@dataclass(frozen=True)
class Line:
    """What was tried, what came back or is to be done, and whether it is well."""

    tried: str
    found: str
    is_well: bool

    def __str__(self) -> str:
        return f"{'ok  ' if self.is_well else 'FAIL'}  {self.tried}: {self.found}"


def check(settings: Settings, project: str) -> Iterator[Line]:
    """Tries one thing after the other; `project` is a number, or empty to leave out what needs one."""
    studio = Studio(settings.label_studio_url, settings.label_studio_api_key)
    yield _tried("MODEL", lambda: find_checkpoint(settings.model).source)
    yield _tried("Redis", lambda: _redis(settings))
    yield _tried("workers", lambda: _workers(settings))
    if not settings.label_studio_url:
        yield Line("Label Studio", "LABEL_STUDIO_URL is not set: uploads cannot be read, nothing can be pushed", False)
        return
    yield _tried("Label Studio", lambda: studio.release())
    yield _tried("LABEL_STUDIO_API_KEY", lambda: f"{studio.kind_of_key()} of {studio.user()}")
    if project:
        yield from _project(settings, studio, project)


def _tried(tried: str, attempt: Callable[[], str]) -> Line:
    try:
        return Line(tried, attempt(), True)
    except BackendError as error:
        return Line(tried, str(error), False)


def _redis(settings: Settings) -> str:
    return f"{PredictQueue(connect(settings.redis_url)).waiting()} chunks are waiting"


def _workers(settings: Settings) -> str:
    ready = PredictQueue(connect(settings.redis_url)).ready_workers()
    if not ready:
        raise BackendError("none has its model loaded; look into the log of `serve`, or start `worker`")
    return f"{ready} ready"


def _project(settings: Settings, studio: Studio, project: str) -> Iterator[Line]:
    config: list[Plan] = []

    def plan() -> str:
        config.append(read_plan(studio.label_config(project), settings.box_threshold, settings.nms_iou))
        labels = [label for control in config[0].controls for label in control.labels]
        return "; ".join(f"{label.name}: {', '.join(label.phrases)}" for label in labels) or "labels come with the task"

    yield _tried(f"labeling config of project {project}", plan)
    if config:
        yield _tried("one picture of it", lambda: _picture(settings, studio, project, config[0]))
    yield _tried("models connected to it", lambda: _backends(studio, project))


def _picture(settings: Settings, studio: Studio, project: str, plan: Plan) -> str:
    task = studio.first_task(project)
    if task is None:
        raise BackendError("the project has no tasks")
    sources = Sources.from_settings(settings, studio)
    view = next(iter(views(plan, task["data"])), None)
    if view is None:
        raise BackendError("the task's list of pictures is empty or missing")
    picture = Images(sources, settings.max_image_pixels).load(view.uri, task["id"])
    return f"task {task['id']}: {picture.size[0]} x {picture.size[1]} pixels"


def _backends(studio: Studio, project: str) -> str:
    rows = studio.backends(project)
    states = [f"{'{}://{}:{}'.format(*origin(row['url']))} {json.dumps(row.get('readable_state'))}" for row in rows]
    return ", ".join(states) or BLOCKS_LOCAL

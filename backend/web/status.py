"""What the status page and `/metrics` show, read from Redis."""

from __future__ import annotations

import time
from typing import Any

from redis import Redis

from backend.delivery.outbox import Outbox
from backend.errors import CheckpointError, QueueUnavailable
from backend.monitoring.activity import list_bulk_progress, list_failures, list_images, list_tasks_per_minute
from backend.monitoring.project_stats import get_project_summaries
from backend.queue.live_workers import FIT_READY_KEY, READY_KEY, get_live_workers
from backend.queue.predict_queue import PredictQueue
from backend.queue.redis import redis_errors
from backend.queue.training_queue import TrainingQueue
from backend.registry.project_model import ProjectModel
from backend.settings import Settings

READY_KEYS = {"predict": READY_KEY, "fit": FIT_READY_KEY}  # by queue


def list_workers(connection: Redis) -> list[dict[str, Any]]:
    """Lists the live workers with their queue, device, batch size and whether they are busy; raises RedisError."""
    live = [
        (queue, name, info)
        for queue, key in READY_KEYS.items()
        for name, info in get_live_workers(connection, key).items()
    ]
    with connection.pipeline() as pipeline:
        for _, name, _ in live:
            pipeline.hget(f"rq:worker:{name}", "state")
        states = pipeline.execute()
    return [
        {
            "name": name,
            "queue": queue,
            "is_busy": state == b"busy",
            "device": info.device,
            **({"batch_size": info.batch_size} if info.batch_size else {}),
        }
        for (queue, name, info), state in zip(live, states, strict=True)
    ]


def read_status(settings: Settings, connection: Redis, seen: str = "") -> dict[str, Any]:
    """Everything that the status page shows, as plain JSON; without the queue, that it is away.

    `pictures` is null where the last of them is of the time `seen`, as text: they are most of the bytes.
    """
    try:
        model = ProjectModel(settings, "").checkpoint.make_model_version()
    except CheckpointError as error:
        model = str(error)
    row: dict[str, Any] = {"time": time.time(), "model": settings.model, "model_version": model}
    try:
        with redis_errors():
            return {**row, **_from_redis(settings, connection, seen)}
    except QueueUnavailable as error:
        return {**row, "error": error.to_dict()}


def _from_redis(settings: Settings, connection: Redis, seen: str) -> dict[str, Any]:
    shown = list_images(connection) if settings.may_show_images else []
    return {
        "workers": list_workers(connection),
        "waiting": PredictQueue(connection).count_waiting(),
        "to_push": len(Outbox(connection)),
        "rate": list_tasks_per_minute(connection),
        "bulk": list_bulk_progress(connection),
        "trainings": TrainingQueue(connection).list_progress(),
        "projects": get_project_summaries(connection),
        "failures": list_failures(connection),
        "pictures": None if shown and seen == str(shown[0]["time"]) else shown,
        "may_show_images": settings.may_show_images,
    }

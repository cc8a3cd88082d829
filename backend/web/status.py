"""What the status page and `/metrics` show, read from Redis."""

from __future__ import annotations

import json
import time
from typing import Any

from redis import Redis

from backend.delivery.outbox import Outbox
from backend.errors import CheckpointError, QueueUnavailable
from backend.monitoring.activity import bulk, failures, pictures, rate
from backend.monitoring.project_stats import cards
from backend.queue.predict_queue import READY_KEY, PredictQueue
from backend.queue.redis import found, redis_errors
from backend.queue.training_queue import FIT_READY_KEY, Trainings
from backend.registry.project_model import Asking
from backend.settings import Settings

WORKERS = ((READY_KEY, "predict"), (FIT_READY_KEY, "fit"))


def workers(connection: Redis) -> list[dict[str, Any]]:
    """Workers that live, with their queue, device and whether they are busy; raises RedisError."""
    alive = [(queue, name, row) for kind, queue in WORKERS for name, row in found(connection, kind).items()]
    with connection.pipeline() as pipeline:
        for _, name, _ in alive:
            pipeline.hget(f"rq:worker:{name}", "state")
        states = pipeline.execute()
    return [
        {"name": name, "queue": queue, "is_busy": state == b"busy", **json.loads(row)}
        for (queue, name, row), state in zip(alive, states, strict=True)
    ]


def status(settings: Settings, connection: Redis, seen: str = "") -> dict[str, Any]:
    """Everything that the status page shows, as plain JSON; without the queue, that it is away.

    `pictures` is null where the last of them is of the time `seen`, as text: they are most of the bytes.
    """
    try:
        model = Asking(settings, "").checkpoint.model_version()
    except CheckpointError as error:
        model = str(error)
    row: dict[str, Any] = {"time": time.time(), "model": settings.model, "model_version": model}
    try:
        with redis_errors():
            return {**row, **_from_redis(settings, connection, seen)}
    except QueueUnavailable as error:
        return {**row, "error": error.to_dict()}


def _from_redis(settings: Settings, connection: Redis, seen: str) -> dict[str, Any]:
    shown = pictures(connection) if settings.may_show_pictures else []
    return {
        "workers": workers(connection),
        "waiting": PredictQueue(connection).waiting(),
        "to_push": len(Outbox(connection)),
        "rate": rate(connection),
        "bulk": bulk(connection),
        "trainings": Trainings(connection).all(),
        "projects": cards(connection),
        "failures": failures(connection),
        "pictures": None if shown and seen == str(shown[0]["time"]) else shown,
        "may_show_pictures": settings.may_show_pictures,
    }

"""What the status page and `/metrics` show, read from Redis."""

from __future__ import annotations

import json
import time
from typing import Any

from redis import Redis

from backend.errors import CheckpointError, QueueUnavailable
from backend.fit_queue import FIT_READY_KEY, Trainings
from backend.outbox import Outbox
from backend.projects import cards
from backend.queues import READY_KEY, PredictQueue, redis_errors
from backend.recent import bulk, failures, pictures, rate
from backend.settings import Settings
from backend.versions import find_checkpoint

WORKERS = ((READY_KEY, "predict"), (FIT_READY_KEY, "fit"))


def workers(connection: Redis) -> list[dict[str, Any]]:
    """Workers that live, with their queue, device and whether they are busy; raises RedisError."""
    found = []
    for prefix, queue in WORKERS:
        keys: list[bytes] = sorted(connection.scan_iter(f"{prefix}*", count=1000))
        for key, row in zip(keys, connection.mget(keys) if keys else [], strict=True):
            name = key.decode().removeprefix(prefix)
            is_busy = connection.hget(f"rq:worker:{name}", "state") == b"busy"
            if row:
                found.append({"name": name, "queue": queue, "is_busy": is_busy, **json.loads(row)})
    return found


def status(settings: Settings, connection: Redis) -> dict[str, Any]:
    """Everything that the status page shows, as plain JSON; without the queue, that it is away."""
    try:
        model = find_checkpoint(settings.model).model_version()
    except CheckpointError as error:
        model = str(error)
    row: dict[str, Any] = {"time": time.time(), "model": settings.model, "model_version": model}
    try:
        with redis_errors():
            return {**row, **_from_redis(settings, connection)}
    except QueueUnavailable as error:
        return {**row, "error": error.to_dict()}


def _from_redis(settings: Settings, connection: Redis) -> dict[str, Any]:
    return {
        "workers": workers(connection),
        "waiting": PredictQueue(connection).waiting(),
        "to_push": len(Outbox(connection)),
        "rate": rate(connection),
        "bulk": bulk(connection),
        "trainings": Trainings(connection).all(),
        "projects": cards(connection),
        "failures": failures(connection),
        "pictures": pictures(connection) if settings.show_pictures else [],
    }

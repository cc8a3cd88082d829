"""`/status`: all that the status page shows, as JSON."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from flask import Blueprint, Response, jsonify, request
from redis import Redis

from backend.delivery.failures import Failures
from backend.delivery.outbox import Outbox
from backend.errors import CheckpointError, QueueUnavailable
from backend.monitoring.activity import list_bulk_progress, list_failures, list_images, list_tasks_per_minute
from backend.monitoring.project_stats import get_project_summaries
from backend.queue.live_workers import FIT_READY_KEY, READY_KEY, get_live_workers
from backend.queue.pauses import PAUSED_BULK_KEY, PAUSED_DELIVERY_KEY, PAUSED_IMPORT_KEY, Pauses
from backend.queue.predict_queue import count_waiting_by_checkpoint
from backend.queue.redis import redis_errors
from backend.queue.training_queue import TrainingQueue
from backend.registry.project_model import ProjectModel
from backend.settings import Settings

PAUSED_WORK = {
    "bulk prediction": PAUSED_BULK_KEY,
    "delivery": PAUSED_DELIVERY_KEY,
    "prediction of imported tasks": PAUSED_IMPORT_KEY,
}
READY_KEYS = {"predict": READY_KEY, "fit": FIT_READY_KEY}  # by queue


def register_status(blueprint: Blueprint, settings: Settings, get_connection: Callable[[], Redis]) -> None:
    """Adds the route `/status`."""

    @blueprint.get("/status")
    def status() -> Response:
        return jsonify(read_status(settings, get_connection(), request.args.get("seen", "")))


def read_status(settings: Settings, connection: Redis, newest_image_time: str = "") -> dict[str, Any]:
    """Reads all that the status page shows, as plain JSON; while Redis is away, `error` replaces what it holds.

    Args:
        settings: of this process.
        connection: to Redis.
        newest_image_time: that of the newest image on the page. While there is no newer one, `pictures` is null: images
            are most of the bytes.
    """
    try:
        found = ProjectModel(settings, "").checkpoint
        model_version, checkpoint = found.make_model_version(), found.fingerprint
    except CheckpointError as error:
        model_version, checkpoint = str(error), ""
    status: dict[str, Any] = {"time": time.time(), "model": settings.model, "model_version": model_version}
    try:
        with redis_errors():
            images = list_images(connection) if settings.may_show_images else []
            return {
                **status,
                "workers": list_workers(connection),
                "checkpoint": checkpoint,
                "waiting": count_waiting_by_checkpoint(connection).total(),
                "to_push": sum(Outbox(connection).count_by_project().values()),
                "pauses": [
                    {**pause, "work": work}
                    for work, key in PAUSED_WORK.items()
                    for pause in Pauses(connection, key).list()
                ],
                "given_up": Failures(connection).count_by_project(),
                "rate": list_tasks_per_minute(connection),
                "bulk": list_bulk_progress(connection),
                "trainings": TrainingQueue(connection).list_progress(),
                "projects": get_project_summaries(connection),
                "failures": list_failures(connection),
                "pictures": None if images and newest_image_time == str(images[0]["time"]) else images,
                "may_show_pictures": settings.may_show_images,
            }
    except QueueUnavailable as error:
        return {**status, "error": error.to_dict()}


def list_workers(connection: Redis) -> list[dict[str, Any]]:
    """Lists the live workers: name, queue, device, batch size, and whether each is busy; raises RedisError."""
    live = [
        (queue, name, info)
        for queue, key in READY_KEYS.items()
        for name, info in get_live_workers(connection, key).items()
    ]
    with connection.pipeline() as pipeline:
        for _, name, _ in live:
            pipeline.exists(f"rq:worker:{name}:executions")
        at_work = pipeline.execute()
    return [
        {
            "name": name,
            "queue": queue,
            "is_busy": bool(is_busy),
            "device": info.device,
            "model": info.model,
            "checkpoint": info.checkpoint,
            **({"batch_size": info.batch_size} if info.batch_size else {}),
        }
        for (queue, name, info), is_busy in zip(live, at_work, strict=True)
    ]

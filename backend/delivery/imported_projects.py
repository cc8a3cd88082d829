"""The projects that got new tasks, noted by the web front for the import watcher."""

from __future__ import annotations

import time

from redis import Redis

from backend.queue.redis import redis_errors

IMPORTED_KEY = "gdino:imported"  # sorted set: project -> when it last got tasks


def record_import(connection: Redis, project: str) -> None:
    """Notes that a project got tasks now; raises QueueUnavailable."""
    with redis_errors():
        connection.zadd(IMPORTED_KEY, {project: time.time()})


def list_imported(connection: Redis) -> list[tuple[str, float]]:
    """Lists the noted projects and when each last got tasks, the oldest first; raises QueueUnavailable."""
    with redis_errors():
        rows: list[tuple[bytes, float]] = connection.zrange(IMPORTED_KEY, 0, -1, withscores=True)  # type: ignore[assignment]
    return [(project.decode(), imported_at) for project, imported_at in rows]


def remove_imported(connection: Redis, project: str, imported_at: float) -> None:
    """Removes a project, unless it got more tasks after `imported_at`; raises QueueUnavailable."""
    with redis_errors():
        if connection.zscore(IMPORTED_KEY, project) == imported_at:
            connection.zrem(IMPORTED_KEY, project)

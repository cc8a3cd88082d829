"""The projects that got new tasks, noted by the web front for the import jobs."""

from __future__ import annotations

from redis import Redis

from backend.queue.redis import get_time, redis_errors

IMPORTED_KEY = "gdino:imported"  # sorted set: project -> when it last got tasks
CURSORS_KEY = "gdino:imported:cursors"  # hash: project -> last task that was sent

# Keys: IMPORTED_KEY, CURSORS_KEY; arguments: project, when it got the tasks that are done.
REMOVE_SCRIPT = """
redis.call('HDEL', KEYS[2], ARGV[1])
if redis.call('ZSCORE', KEYS[1], ARGV[1]) == ARGV[2] then redis.call('ZREM', KEYS[1], ARGV[1]) end
"""


def record_import(connection: Redis, project: str) -> None:
    """Notes that a project got tasks now; raises QueueUnavailable."""
    with redis_errors():
        connection.zadd(IMPORTED_KEY, {project: int(get_time(connection) * 1000)})


def list_imported(connection: Redis) -> list[tuple[str, int]]:
    """Lists the noted projects and when each last got tasks (in ms), the oldest first; raises QueueUnavailable."""
    with redis_errors():
        rows: list[tuple[bytes, float]] = connection.zrange(IMPORTED_KEY, 0, -1, withscores=True)  # type: ignore[assignment]
    return [(project.decode(), int(imported_at)) for project, imported_at in rows]


def remove_imported(connection: Redis, project: str, imported_at: int) -> None:
    """Removes a project, unless it got more tasks after `imported_at`; raises QueueUnavailable."""
    with redis_errors():
        connection.eval(REMOVE_SCRIPT, 2, IMPORTED_KEY, CURSORS_KEY, project, imported_at)


def get_cursor(connection: Redis, project: str) -> int:
    """Returns the last task of a project that was sent, 0 if none was; raises QueueUnavailable."""
    with redis_errors():
        return int(connection.hget(CURSORS_KEY, project) or 0)


def save_cursor(connection: Redis, project: str, task: int) -> None:
    """Saves the last task of a project that was sent; raises QueueUnavailable."""
    with redis_errors():
        connection.hset(CURSORS_KEY, project, str(task))

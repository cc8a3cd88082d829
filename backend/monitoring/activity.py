"""What happened last, kept in Redis for the status page: failures, pictures, their number by the minute, bulk work.

None of it is needed for the work itself: where Redis does not take it, it is left out.
"""

from __future__ import annotations

import base64
import contextlib
import json
import time
from collections.abc import Sequence
from typing import Any

from redis import Redis
from redis.exceptions import RedisError

from backend.labelstudio.regions import Region, read_label, read_percent_box
from backend.queue.messages import Answer, ChunkTask, TaskError
from backend.queue.redis import get_indexed, set_indexed

FAILURES_KEY, MAX_FAILURES = "gdino:recent:failures", 50  # list of JSON, the last first
PICTURES_KEY, MAX_IMAGES = "gdino:recent:pictures", 12  # likewise
RATE_KEY, MINUTES = "gdino:recent:rate:", 60  # + minute since the epoch -> tasks answered in it
BULK_KEY, BULK_TTL = "gdino:recent:bulk:", 600  # + name -> JSON; s, longer than an import or a chunk may take


def record_image(connection: Redis, jpeg: bytes, regions: Sequence[Region], **about: Any) -> None:
    """Keeps a picture with its boxes: label, score, and x, y, width, height in percent."""
    boxes = [
        {"label": read_label(region), "score": region["score"], **read_percent_box(region)}
        for region in regions
        if read_label(region)
    ]
    row = {"time": time.time(), "jpeg": base64.b64encode(jpeg).decode(), "boxes": boxes, **about}
    with contextlib.suppress(RedisError), connection.pipeline() as pipeline:
        pipeline.lpush(PICTURES_KEY, json.dumps(row))
        pipeline.ltrim(PICTURES_KEY, 0, MAX_IMAGES - 1)
        pipeline.execute()


def record_answers(connection: Redis, project: str, tasks: Sequence[ChunkTask], answers: Sequence[Answer]) -> None:
    """Counts a chunk's tasks, and keeps the last of those that failed."""
    failed = [
        {"time": time.time(), "project": project, "task": task.id, **answer.error.model_dump()}
        for task, answer in zip(tasks, answers, strict=True)
        if isinstance(answer, TaskError)
    ]
    minute = f"{RATE_KEY}{int(time.time() // 60)}"
    with contextlib.suppress(RedisError), connection.pipeline() as pipeline:
        pipeline.incrby(minute, len(answers))
        pipeline.expire(minute, (MINUTES + 2) * 60)
        for row in failed[-MAX_FAILURES:]:
            pipeline.lpush(FAILURES_KEY, json.dumps(row))
        pipeline.ltrim(FAILURES_KEY, 0, MAX_FAILURES - 1)
        pipeline.execute()


class BulkProgress:
    """A command's progress, as the status page shows it."""

    def __init__(self, connection: Redis, name: str, what: str) -> None:
        """`what` is what people read; a command of the same `name` takes its place."""
        self._connection, self._name = connection, name
        self._row: dict[str, Any] = {"what": what, "since": time.time()}
        self._last = 0.0

    def report(self, done: int, failed: int, of: int) -> None:
        """Says how far it is, at most once a second."""
        if time.monotonic() - self._last < 1 and done < of:
            return
        self._last = time.monotonic()
        self._row.setdefault("before", done)  # another run did them
        row = {**self._row, "time": time.time(), "done": done, "failed": failed, "of": of}
        with contextlib.suppress(RedisError):
            set_indexed(self._connection, BULK_KEY, self._name, json.dumps(row), BULK_TTL)

    def close(self) -> None:
        """It is over."""
        with contextlib.suppress(RedisError):
            self._connection.delete(BULK_KEY + self._name)


def list_failures(connection: Redis) -> list[dict[str, Any]]:
    """The last ones, the last first; raises RedisError."""
    return [json.loads(row) for row in connection.lrange(FAILURES_KEY, 0, -1)]


def list_images(connection: Redis) -> list[dict[str, Any]]:
    """The last ones, the last first; raises RedisError."""
    return [json.loads(row) for row in connection.lrange(PICTURES_KEY, 0, -1)]


def list_tasks_per_minute(connection: Redis) -> list[int]:
    """Tasks answered in each of the last 60 minutes, the present one last; raises RedisError."""
    now = int(time.time() // 60)
    counts = connection.mget([f"{RATE_KEY}{minute}" for minute in range(now - MINUTES + 1, now + 1)])
    return [int(count or 0) for count in counts]


def list_bulk_progress(connection: Redis) -> list[dict[str, Any]]:
    """Commands at work, the oldest first; raises RedisError."""
    rows = [json.loads(row) for row in get_indexed(connection, BULK_KEY).values()]
    return sorted(rows, key=lambda row: float(row["since"]))

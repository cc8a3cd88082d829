"""Recent activity for the status page: failed tasks, sample images, tasks per minute, and the progress of commands.

Predictions do not depend on it: writers ignore a Redis that does not answer, readers raise RedisError.
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

FAILURES_KEY = "gdino:recent:failures"  # list of JSON, newest first: time, project, task, code, detail; never expires
MAX_FAILURES = 50  # entries of FAILURES_KEY

IMAGES_KEY = "gdino:recent:pictures"  # list of JSON, newest first: `record_image`; never expires
MAX_IMAGES = 12  # entries of IMAGES_KEY, about 20 kB each

TASK_COUNT_KEY = "gdino:recent:rate:"  # + minute since the epoch -> integer: tasks answered in that minute
TASK_COUNT_MINUTES = 60  # minutes that the status page shows
TASK_COUNT_TTL = (TASK_COUNT_MINUTES + 2) * 60  # s, so at most 62 keys

BULK_KEY = "gdino:recent:bulk:"  # + name of a command -> JSON: what, since, before, time, done, failed, of; indexed
BULK_TTL = 600  # s without a report; longer than an import or a chunk takes


def record_image(
    connection: Redis, jpeg: bytes, regions: Sequence[Region], *, project: str, task: object, model_version: str
) -> None:
    """Records a thumbnail with its boxes; the oldest one beyond `MAX_IMAGES` is dropped.

    Args:
        connection: to Redis.
        jpeg: the thumbnail's file.
        regions: of the prediction; their boxes are in percent of the image, so they fit the thumbnail too.
        project: the project's number; empty where there is none.
        task: the task's id.
        model_version: that made the prediction.
    """
    boxes = [
        {"label": read_label(region), "score": region["score"], **read_percent_box(region)}
        for region in regions
        if read_label(region)
    ]
    entry = {
        "time": time.time(),
        "jpeg": base64.b64encode(jpeg).decode(),
        "boxes": boxes,
        "project": project,
        "task": task,
        "model_version": model_version,
    }
    with contextlib.suppress(RedisError), connection.pipeline() as pipeline:
        pipeline.lpush(IMAGES_KEY, json.dumps(entry))
        pipeline.ltrim(IMAGES_KEY, 0, MAX_IMAGES - 1)
        pipeline.execute()


def record_answers(connection: Redis, project: str, tasks: Sequence[ChunkTask], answers: Sequence[Answer]) -> None:
    """Counts the tasks of a chunk in the current minute and records those that failed.

    Args:
        connection: to Redis.
        project: the project's number; empty where there is none.
        tasks: of the chunk.
        answers: one for each task, in order.
    """
    failures = [
        {"time": time.time(), "project": project, "task": task.id, **answer.error.model_dump()}
        for task, answer in zip(tasks, answers, strict=True)
        if isinstance(answer, TaskError)
    ]
    minute_key = f"{TASK_COUNT_KEY}{int(time.time() // 60)}"
    with contextlib.suppress(RedisError), connection.pipeline() as pipeline:
        pipeline.incrby(minute_key, len(answers))
        pipeline.expire(minute_key, TASK_COUNT_TTL)
        for failure in failures[-MAX_FAILURES:]:
            pipeline.lpush(FAILURES_KEY, json.dumps(failure))
        pipeline.ltrim(FAILURES_KEY, 0, MAX_FAILURES - 1)
        pipeline.execute()


class BulkProgress:
    """The progress of a running command, as the status page shows it."""

    def __init__(self, connection: Redis, name: str, title: str) -> None:
        """Prepares the report; nothing is written yet.

        Args:
            connection: to Redis.
            name: of the command; a later command of the same name takes its place on the page.
            title: the text that people read.
        """
        self._connection, self._name = connection, name
        self._entry: dict[str, Any] = {"what": title, "since": time.time()}
        self._reported_at = 0.0  # of `time.monotonic`

    def report(self, done: int, failed: int, total: int) -> None:
        """Records the number of done, failed and all items; at most once a second, but always the last one."""
        if time.monotonic() - self._reported_at < 1 and done < total:
            return
        self._reported_at = time.monotonic()
        self._entry.setdefault("before", done)  # done by an earlier run: they say nothing about the speed of this one
        entry = {**self._entry, "time": time.time(), "done": done, "failed": failed, "of": total}
        with contextlib.suppress(RedisError):
            set_indexed(self._connection, BULK_KEY, self._name, json.dumps(entry), BULK_TTL)

    def close(self) -> None:
        """Removes the command from the status page."""
        with contextlib.suppress(RedisError):
            self._connection.delete(BULK_KEY + self._name)


def list_failures(connection: Redis) -> list[dict[str, Any]]:
    """Lists the last failed tasks, newest first; raises RedisError."""
    return [json.loads(entry) for entry in connection.lrange(FAILURES_KEY, 0, -1)]


def list_images(connection: Redis) -> list[dict[str, Any]]:
    """Lists the last thumbnails with their boxes, newest first; raises RedisError."""
    return [json.loads(entry) for entry in connection.lrange(IMAGES_KEY, 0, -1)]


def list_tasks_per_minute(connection: Redis) -> list[int]:
    """Lists the tasks answered in each of the last 60 minutes, the current minute last; raises RedisError."""
    now = int(time.time() // 60)
    minutes = range(now - TASK_COUNT_MINUTES + 1, now + 1)
    return [int(count or 0) for count in connection.mget([f"{TASK_COUNT_KEY}{minute}" for minute in minutes])]


def list_bulk_progress(connection: Redis) -> list[dict[str, Any]]:
    """Lists the running commands, the first started first; raises RedisError."""
    entries = [json.loads(entry) for entry in get_indexed(connection, BULK_KEY).values()]
    return sorted(entries, key=lambda entry: float(entry["since"]))

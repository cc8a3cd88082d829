"""The dead letters: tasks whose prediction was given up, each with the reason, until somebody acts."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass

from redis import Redis

from backend.queue.redis import redis_errors

log = logging.getLogger(__name__)

FAILURES_KEY = "gdino:failures:"  # + project -> hash: task -> JSON: Failure
PROJECTS_KEY = "gdino:failures"  # set of the projects that have any
FAILURES_TTL = 90 * 24 * 3600  # s
MAX_FAILURES = 100_000  # of a project; more are only logged and counted
TASKS_PER_COMMAND = 1000


@dataclass(frozen=True)
class Failure:
    """A task without a prediction: why, when (seconds since the epoch), and after how many attempts."""

    task: int
    code: str
    detail: str
    time: float
    model_version: str
    attempts: int = 1


class Failures:
    """The dead letters of all projects. Methods raise QueueUnavailable if Redis does not answer."""

    def __init__(self, connection: Redis) -> None:
        self._connection = connection

    def record(self, project: str, failures: Sequence[Failure]) -> None:
        """Adds failures, each in place of an earlier one of its task."""
        for failure in failures:
            log.error("project %s, task %s: given up: %s", project, failure.task, failure.detail)
        if not failures:
            return
        with redis_errors():
            room = max(MAX_FAILURES - self.count(project), 0)
            rows = {str(failure.task): json.dumps(asdict(failure)) for failure in failures[:room]}
            with self._connection.pipeline() as pipeline:
                if rows:
                    pipeline.hset(FAILURES_KEY + project, mapping=rows)  # type: ignore[arg-type]
                pipeline.expire(FAILURES_KEY + project, FAILURES_TTL)
                pipeline.sadd(PROJECTS_KEY, project)
                pipeline.execute()

    def count(self, project: str) -> int:
        """Counts the failures of a project."""
        with redis_errors():
            return int(self._connection.hlen(FAILURES_KEY + project))

    def count_by_project(self) -> dict[str, int]:
        """Counts the failures of each project that has any, by its number."""
        with redis_errors():
            members: set[bytes] = self._connection.smembers(PROJECTS_KEY)  # type: ignore[assignment]
            projects = sorted(project.decode() for project in members)
            counts = {project: self.count(project) for project in projects}
            if empty := [project for project, count in counts.items() if not count]:
                self._connection.srem(PROJECTS_KEY, *empty)
        return {project: count for project, count in counts.items() if count}

    def iterate(self, project: str) -> Iterator[Failure]:
        """Yields the failures of a project, in no particular order."""
        with redis_errors():
            for _, row in self._connection.hscan_iter(FAILURES_KEY + project, count=TASKS_PER_COMMAND):
                yield Failure(**json.loads(row))

    def get(self, project: str, tasks: Sequence[int]) -> Mapping[int, Failure]:
        """Returns the failures of some tasks, by task."""
        with redis_errors():
            rows = self._connection.hmget(FAILURES_KEY + project, list(map(str, tasks))) if tasks else []
        found = (Failure(**json.loads(row)) for row in rows if row)
        return {failure.task: failure for failure in found}

    def remove(self, project: str, tasks: Sequence[int]) -> None:
        """Removes the failures of tasks, which are predicted meanwhile, tried again, or given up for good."""
        with redis_errors():
            for start in range(0, len(tasks), TASKS_PER_COMMAND):
                self._connection.hdel(FAILURES_KEY + project, *map(str, tasks[start : start + TASKS_PER_COMMAND]))

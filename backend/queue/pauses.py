"""Pauses of one project's work: a circuit breaker, so that a project in trouble wastes no work and holds up no other.

Each pause in a row is longer than the one before, up to `MAX_PAUSE`. Two kinds of work pause:

- bulk prediction, while the images of a project cannot be fetched: the queue is not refilled from the project's
  backlog. Single tasks and small selections do not wait.
- delivery, while Label Studio refuses or does not answer for a project; and likewise the reading of tasks that a
  project got.
"""

from __future__ import annotations

import json
import random
from typing import Any

from redis import Redis

from backend.queue.redis import get_indexed, set_indexed

PAUSED_BULK_KEY = "gdino:paused:bulk:"  # + project -> JSON: project, reason, seconds; expires when the pause is over
PAUSED_DELIVERY_KEY = "gdino:paused:delivery:"  # likewise
PAUSED_IMPORT_KEY = "gdino:paused:import:"  # likewise
PAUSES_KEY = "gdino:pauses:"  # + bulk:, delivery: or import: + project -> number of pauses in a row
FIRST_PAUSE, MAX_PAUSE = 4, 60  # s
IN_A_ROW = 1800  # s after the begin of a pause within which the next one counts as in a row with it


class Pauses:
    """The pauses of one kind. Methods raise RedisError."""

    def __init__(self, connection: Redis, key: str) -> None:
        """Opens the pauses of PAUSED_BULK_KEY or PAUSED_DELIVERY_KEY."""
        self._connection, self._key = connection, key
        self._counters = PAUSES_KEY + key.removeprefix("gdino:paused:")

    def pause(self, project: str, reason: str) -> int | None:
        """Pauses a project; returns for how many seconds, None if it is paused already."""
        if self.is_paused(project):
            return None
        with self._connection.pipeline() as pipeline:
            pipeline.incr(self._counters + project)
            pipeline.expire(self._counters + project, IN_A_ROW)
            pauses = int(pipeline.execute()[0])
        seconds = min(FIRST_PAUSE * 2.0 ** min(pauses - 1, 10), MAX_PAUSE) * random.uniform(0.8, 1.2)
        row = {"project": project, "reason": reason, "seconds": round(seconds)}
        set_indexed(self._connection, self._key, project, json.dumps(row), round(seconds))
        return round(seconds)

    def resume(self, project: str) -> None:
        """Ends the pause of a project, and forgets those before it: the next one is short again."""
        self._connection.delete(self._counters + project, self._key + project)

    def count(self, project: str) -> int:
        """Counts a project's pauses in a row."""
        return int(self._connection.get(self._counters + project) or 0)

    def is_paused(self, project: str) -> bool:
        """Returns whether a pause lasts now."""
        return bool(self._connection.exists(self._key + project))

    def list(self) -> list[dict[str, Any]]:
        """Lists the pauses that last now: project, reason, seconds."""
        return [json.loads(row) for _, row in sorted(get_indexed(self._connection, self._key).items())]

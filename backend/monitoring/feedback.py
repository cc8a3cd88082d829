"""Annotation events of a project."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from redis import Redis

from backend.monitoring.project_stats import BOX_OUTCOMES, OUTCOMES_KEY, Boxes
from backend.queue.redis import redis_errors

ANNOTATIONS_KEY = "gdino:evidence:"  # + project -> hash of annotation id -> JSON: task, updated_at, is_deleted, boxes


# Events come twice, late and in any order. Of one annotation the last change counts, and a deletion ends it.
RECORD_SCRIPT = """
local fates, sums = cjson.decode(ARGV[3]), {}
local function count(row, sign)
    for label, numbers in pairs(row.boxes or {}) do
        for i, fate in ipairs(fates) do
            local field = label .. '\\n' .. fate
            if numbers[i] ~= 0 then sums[field] = (sums[field] or 0) + sign * numbers[i] end
        end
    end
end
for i = 5, #ARGV, 2 do
    local old = redis.call('HGET', KEYS[1], ARGV[i])
    local now, is_newer = cjson.decode(ARGV[i + 1]), redis.call('HLEN', KEYS[1]) < tonumber(ARGV[2])
    if old then
        local was = cjson.decode(old)
        is_newer = not was.is_deleted and (now.is_deleted or was.updated_at < now.updated_at)
        if is_newer then count(was, -1) end
    end
    if is_newer then
        redis.call('HSET', KEYS[1], ARGV[i], ARGV[i + 1])
        count(now, 1)
    end
end
local size = redis.call('HLEN', KEYS[2])
for field, sum in pairs(sums) do
    local is_new = redis.call('HEXISTS', KEYS[2], field) == 0
    if sum ~= 0 and not (is_new and size >= tonumber(ARGV[4])) then
        redis.call('HINCRBY', KEYS[2], field, sum)
        if is_new then size = size + 1 end
    end
end
redis.call('EXPIRE', KEYS[1], ARGV[1])
redis.call('EXPIRE', KEYS[2], ARGV[1])
"""


ANNOTATIONS_TTL, MAX_ANNOTATIONS = 90 * 24 * 3600, 200_000  # s, and annotations of a project


MAX_OUTCOME_COUNTS = 4000  # numbers of boxes that are kept of a project


EVENTS_PER_CALL = 500  # annotations in one call: Redis serves nobody else meanwhile


@dataclass(frozen=True)
class AnnotationEvent:
    """What an event says of one annotation."""

    number: int
    task: int | None
    updated_at: str  # as Label Studio writes it, which sorts by time
    is_deleted: bool = False
    boxes: Boxes = field(default_factory=dict)  # what became of them

    def to_dict(self) -> dict[str, Any]:
        """What is kept of it."""
        return {"task": self.task, "updated_at": self.updated_at, "is_deleted": self.is_deleted, "boxes": self.boxes}


class AnnotationLog:
    """Which annotations a project has, as its events tell; what they hold is asked of Label Studio when it matters."""

    def __init__(self, connection: Redis, project: str) -> None:
        self._connection, self._keys = connection, (ANNOTATIONS_KEY + project, OUTCOMES_KEY + project)

    def record(self, rows: Sequence[AnnotationEvent]) -> None:
        """Notes annotations; the same event again, or an older one late, changes nothing.

        Raises:
            QueueUnavailable: Redis does not answer.
        """
        for start in range(0, len(rows), EVENTS_PER_CALL):
            piece = rows[start : start + EVENTS_PER_CALL]
            words = [word for row in piece for word in (str(row.number), json.dumps(row.to_dict()))]
            with redis_errors():
                self._connection.eval(
                    RECORD_SCRIPT,
                    2,
                    *self._keys,
                    ANNOTATIONS_TTL,
                    MAX_ANNOTATIONS,
                    json.dumps(BOX_OUTCOMES),
                    MAX_OUTCOME_COUNTS,
                    *words,
                )

    def annotations(self) -> dict[int, int | None]:
        """Each annotation that is not deleted, with its task.

        Raises:
            QueueUnavailable: Redis does not answer.
        """
        with redis_errors():
            rows: dict[bytes, bytes] = self._connection.hgetall(self._keys[0])  # type: ignore[assignment]
        known = {int(number): json.loads(row) for number, row in rows.items()}
        return {number: row["task"] for number, row in sorted(known.items()) if not row["is_deleted"]}

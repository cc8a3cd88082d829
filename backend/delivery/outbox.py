"""What is to be pushed into Label Studio, kept in Redis until it is there, and who brought which prediction.

Label Studio stores what it is given, twice if it is given twice. So whoever delivers a prediction claims it first: an
answer to a request ("pull"), or the pusher ("pushing", and "pushed" once Label Studio has confirmed).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from redis import Redis

from backend.queue.predict_queue import chunk_id
from backend.queue.redis import redis_errors

ORDER_KEY = "gdino:outbox"  # sorted set: chunk -> when it was asked for
ENTRIES_KEY = "gdino:outbox:entries"  # hash: chunk -> project, since, payload
DELIVERED_KEY = "gdino:delivered:"  # + project:version -> hash: task -> way and time
STRANGE_KEY = "gdino:strange:"  # + project -> a project that is not the one at LABEL_STUDIO_URL
KEPT = 7 * 24 * 3600  # s that deliveries are remembered
STRANGE_TTL = 600  # s until a project is compared again

PULL, PUSHING, PUSHED = "pull", "pushing", "pushed"

CLAIM_SCRIPT = """
local answers = {}
for i = 4, #ARGV do
  local old = redis.call('HGET', KEYS[1], ARGV[i])
  local way, at = '', '-1'
  if old then way, at = string.match(old, '(%a+) (.+)') end
  local recent = tonumber(at) >= tonumber(ARGV[3])
  if (recent and (ARGV[1] == 'pushing' or way ~= 'pull')) or (way == 'pushing' and ARGV[1] == 'pushing') then
    answers[i - 3] = way
  else
    redis.call('HSET', KEYS[1], ARGV[i], ARGV[1] .. ' ' .. ARGV[2])
    answers[i - 3] = ''
  end
end
redis.call('EXPIRE', KEYS[1], 604800)
return answers
"""


@dataclass(frozen=True)
class Entry:
    """One chunk to be pushed; `since` is when it was asked for, in seconds since the epoch."""

    chunk: str
    project: str
    since: float
    payload: dict[str, Any]


class Outbox:
    """Safe to share between threads and processes; every method raises QueueUnavailable if Redis does not answer."""

    def __init__(self, connection: Redis) -> None:
        self._connection = connection
        self._claim = connection.register_script(CLAIM_SCRIPT)

    def add(self, project: str, payloads: Sequence[Mapping[str, Any]], since: float) -> None:
        """Puts chunks behind those that are there; one that is there keeps its place."""
        with redis_errors(), self._connection.pipeline() as pipeline:
            for number, payload in enumerate(payloads):
                chunk = chunk_id(payload)
                entry = json.dumps({"project": project, "since": since, "payload": payload})
                pipeline.hset(ENTRIES_KEY, chunk, entry)
                pipeline.zadd(ORDER_KEY, {chunk: since + number * 1e-6}, nx=True)
            pipeline.execute()

    def peek(self, count: int) -> list[Entry]:
        """The first chunks in order of asking."""
        with redis_errors():
            chunks: list[bytes] = self._connection.zrange(ORDER_KEY, 0, count - 1)  # type: ignore[assignment]
            rows = self._connection.hmget(ENTRIES_KEY, chunks) if chunks else []
        return [Entry(chunk.decode(), **json.loads(row)) for chunk, row in zip(chunks, rows, strict=True) if row]

    def filter_pending(self, chunks: Sequence[str]) -> set[str]:
        """Those of these chunks that are still to be pushed."""
        with redis_errors():
            scores = self._connection.zmscore(ORDER_KEY, list(chunks)) if chunks else []
        return {chunk for chunk, score in zip(chunks, scores, strict=True) if score is not None}

    def remove(self, entries: Sequence[Entry]) -> None:
        """Forgets chunks that are delivered, or cannot be."""
        with redis_errors(), self._connection.pipeline() as pipeline:
            for entry in entries:
                pipeline.zrem(ORDER_KEY, entry.chunk)
                pipeline.hdel(ENTRIES_KEY, entry.chunk)
            pipeline.execute()

    def __len__(self) -> int:
        with redis_errors():
            return int(self._connection.zcard(ORDER_KEY))

    def claim(
        self, way: str, project: str, version: str, tasks: Sequence[int], now: float, since: float
    ) -> dict[int, str]:
        """Claims tasks for a delivery, unless they were delivered at or after `since`.

        Args:
            way: PULL, refused where the pusher was; or PUSHING, refused where anyone was.
            project: its number.
            version: the predictions' model version.
            tasks: their numbers.
            now: seconds since the epoch.
            since: likewise.

        Returns:
            By task "" where the claim was granted, otherwise how the task was delivered.
        """
        if not tasks:
            return {}
        with redis_errors():
            ways = self._claim(keys=[f"{DELIVERED_KEY}{project}:{version}"], args=[way, now, since, *tasks])
        return {task: way.decode() for task, way in zip(tasks, ways, strict=True)}

    def confirm(self, project: str, version: str, tasks: Sequence[int], now: float) -> None:
        """Notes that Label Studio has confirmed what was PUSHING."""
        if tasks:
            with redis_errors():
                rows = [word for task in tasks for word in (str(task), f"{PUSHED} {now}")]
                self._connection.hset(f"{DELIVERED_KEY}{project}:{version}", items=rows)

    def mark_mismatched(self, project: str) -> None:
        """Notes that the project of this number is another one at LABEL_STUDIO_URL; nothing is pushed there."""
        with redis_errors():
            self._connection.set(STRANGE_KEY + project, 1, ex=STRANGE_TTL)

    def is_mismatched(self, project: str) -> bool:
        """Whether the project was found to be another one."""
        with redis_errors():
            return bool(self._connection.exists(STRANGE_KEY + project))

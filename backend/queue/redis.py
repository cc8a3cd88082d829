"""Values in Redis by kind and name, found without a walk through all keys; most expire with what they tell of."""

from __future__ import annotations

import time

from redis import Redis

NAMES = "names"  # ends the key of the sorted set of a kind's names


def put(connection: Redis, kind: str, name: str, value: str | bytes, ttl: int | None = None) -> None:
    """Sets a value, for so many seconds or for good; raises RedisError."""
    with connection.pipeline() as pipeline:
        pipeline.set(kind + name, value, ex=ttl)
        pipeline.zadd(kind + NAMES, {name: time.time()})
        pipeline.execute()


def found(connection: Redis, kind: str) -> dict[str, str]:
    """The values of a kind that there are, by name; raises RedisError."""
    names: list[bytes] = connection.zrange(kind + NAMES, 0, -1)  # type: ignore[assignment]
    keys = [kind.encode() + name for name in names]
    rows: list[bytes | None] = connection.mget(keys) if keys else []  # type: ignore[assignment]
    if gone := [name for name, row in zip(names, rows, strict=True) if row is None]:
        connection.zrem(kind + NAMES, *gone)
    return {name.decode(): row.decode() for name, row in zip(names, rows, strict=True) if row is not None}

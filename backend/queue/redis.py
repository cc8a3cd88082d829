"""Values in Redis by kind and name, found without a walk through all keys; most expire with what they tell of."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

from redis import Redis
from redis.backoff import NoBackoff
from redis.exceptions import RedisError
from redis.retry import Retry as ConnectionRetry

from backend.errors import QueueUnavailable

NAMES = "names"  # ends the key of the sorted set of a kind's names


def set_indexed(connection: Redis, kind: str, name: str, value: str | bytes, ttl: int | None = None) -> None:
    """Sets a value, for so many seconds or for good; raises RedisError."""
    with connection.pipeline() as pipeline:
        pipeline.set(kind + name, value, ex=ttl)
        pipeline.zadd(kind + NAMES, {name: time.time()})
        pipeline.execute()


def get_indexed(connection: Redis, kind: str) -> dict[str, str]:
    """The values of a kind that there are, by name; raises RedisError."""
    names: list[bytes] = connection.zrange(kind + NAMES, 0, -1)  # type: ignore[assignment]
    keys = [kind.encode() + name for name in names]
    rows: list[bytes | None] = connection.mget(keys) if keys else []  # type: ignore[assignment]
    if gone := [name for name, row in zip(names, rows, strict=True) if row is None]:
        connection.zrem(kind + NAMES, *gone)
    return {name.decode(): row.decode() for name, row in zip(names, rows, strict=True) if row is not None}


CONNECT_TIMEOUT, SOCKET_TIMEOUT = 0.5, 2.0  # s; together below the 3 s that Label Studio waits for /setup


MAX_CONNECTIONS = 512  # one for each waiting thread of the web front, and some


def connect(redis_url: str, socket_timeout: float | None = SOCKET_TIMEOUT) -> Redis:
    """A client that says at once when Redis is away, instead of retrying; connects on first use."""
    retry = ConnectionRetry(NoBackoff(), 0)
    return Redis.from_url(
        redis_url,
        socket_connect_timeout=CONNECT_TIMEOUT,
        socket_timeout=socket_timeout,
        max_connections=MAX_CONNECTIONS,
        retry=retry,
        health_check_interval=0,
    )


@contextlib.contextmanager
def redis_errors() -> Iterator[None]:
    """Turns any failure of Redis into `QueueUnavailable`."""
    try:
        yield
    except RedisError as error:
        raise QueueUnavailable(f"the queue does not answer ({type(error).__name__}); is Redis running?") from error

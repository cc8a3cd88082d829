"""The connection to Redis, its errors, and values that expire but can still be listed by kind."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

from redis import Redis
from redis.backoff import ConstantBackoff, NoBackoff
from redis.exceptions import RedisError
from redis.retry import Retry

from backend.errors import QueueUnavailable

CONNECT_TIMEOUT, SOCKET_TIMEOUT = 0.5, 2.0  # s; together below the 3 s that Label Studio waits for /setup
MAX_CONNECTIONS = 512  # one for each waiting thread of the web front, and some to spare
PATIENCE, PATIENT_INTERVAL = 120, 0.5  # s for which a worker's command waits for Redis, and between two attempts
PATIENT_SOCKET_TIMEOUT = 15  # s; longer than RQ waits for a job in one command
FAIL_FAST = Retry(NoBackoff(), 0)
INDEX = "names"  # ends the key of a kind's index: a sorted set of name -> when its value was set


def connect(redis_url: str) -> Redis:
    """Makes a client that connects on first use and fails fast: it does not retry while Redis is away."""
    return _connect(redis_url, SOCKET_TIMEOUT, FAIL_FAST)


def connect_patiently(redis_url: str) -> Redis:
    """Makes a worker's client: while Redis is away each command waits for it, up to `PATIENCE` seconds."""
    patient = Retry(ConstantBackoff(PATIENT_INTERVAL), int(PATIENCE / PATIENT_INTERVAL))
    return _connect(redis_url, PATIENT_SOCKET_TIMEOUT, patient)


def _connect(redis_url: str, socket_timeout: float, retry: Retry) -> Redis:
    return Redis.from_url(
        redis_url,
        socket_connect_timeout=CONNECT_TIMEOUT,
        socket_timeout=socket_timeout,
        max_connections=MAX_CONNECTIONS,
        retry=retry,
        health_check_interval=0,
    )


def end_patience(connection: Redis) -> None:
    """Makes a client fail fast from now on: its process is about to end."""
    connection.set_retry(FAIL_FAST)


def get_time(connection: Redis) -> float:
    """Returns the time of Redis in seconds since the epoch: one clock for all machines; raises RedisError."""
    seconds, microseconds = connection.time()
    return float(seconds) + microseconds * 1e-6


@contextlib.contextmanager
def redis_errors() -> Iterator[None]:
    """Turns any failure of Redis into `QueueUnavailable`."""
    try:
        yield
    except RedisError as error:
        raise QueueUnavailable(f"the queue does not answer ({type(error).__name__}); is Redis running?") from error


def set_indexed(connection: Redis, kind: str, name: str, value: str | bytes, ttl: int | None = None) -> None:
    """Sets the value of `kind` + `name` and adds the name to the kind's index, so no one has to scan all keys.

    Args:
        connection: to Redis.
        kind: the prefix of the keys.
        name: the rest of the key.
        value: to set.
        ttl: seconds until the value expires; None: never.

    Raises:
        RedisError: Redis does not answer.
    """
    with connection.pipeline() as pipeline:
        pipeline.set(kind + name, value, ex=ttl)
        pipeline.zadd(kind + INDEX, {name: time.time()})
        pipeline.execute()


def get_indexed(connection: Redis, kind: str) -> dict[str, str]:
    """Returns the values of a kind that have not expired, by name; raises RedisError."""
    names: list[bytes] = connection.zrange(kind + INDEX, 0, -1)  # type: ignore[assignment]
    keys = [kind.encode() + name for name in names]
    values: list[bytes | None] = connection.mget(keys) if keys else []  # type: ignore[assignment]
    if expired := [name for name, value in zip(names, values, strict=True) if value is None]:
        connection.zrem(kind + INDEX, *expired)
    return {name.decode(): value.decode() for name, value in zip(names, values, strict=True) if value is not None}

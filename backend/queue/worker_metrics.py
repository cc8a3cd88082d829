"""The metrics of workers, which reach Prometheus through Redis and the web front."""

from __future__ import annotations

from redis import Redis

from backend.metrics import render_metrics
from backend.queue.redis import get_indexed, set_indexed

METRICS_KEY = "gdino:figures:"  # + worker name -> Prometheus text
METRICS_TTL = 30  # s


def publish_metrics(connection: Redis, worker: str) -> None:
    """Publishes this process's metrics for the web front; raises RedisError."""
    set_indexed(connection, METRICS_KEY, worker, render_metrics(), METRICS_TTL)


def collect_metrics(connection: Redis) -> dict[str, str]:
    """Returns the metrics of all live workers by name; raises RedisError."""
    return get_indexed(connection, METRICS_KEY)

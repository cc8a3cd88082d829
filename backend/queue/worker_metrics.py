"""Figures of workers on their way to the web front, through Redis."""

from __future__ import annotations

from redis import Redis

from backend.metrics import render_metrics
from backend.queue.redis import get_indexed, set_indexed

FIGURES, FIGURES_TTL = "gdino:figures:", 30  # + worker name -> what Prometheus reads; s


def publish_metrics(connection: Redis, name: str) -> None:
    """Lays this process's figures out for the web front; raises RedisError."""
    set_indexed(connection, FIGURES, name, render_metrics(), FIGURES_TTL)


def collect_metrics(connection: Redis) -> dict[str, str]:
    """The figures of all workers, by name; raises RedisError."""
    return get_indexed(connection, FIGURES)

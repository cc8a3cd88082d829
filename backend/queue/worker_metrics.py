"""Figures of workers on their way to the web front, through Redis."""

from __future__ import annotations

from redis import Redis

from backend.metrics import exposed
from backend.queue.redis import found, put

FIGURES, FIGURES_TTL = "gdino:figures:", 30  # + worker name -> what Prometheus reads; s


def hand_over(connection: Redis, name: str) -> None:
    """Lays this process's figures out for the web front; raises RedisError."""
    put(connection, FIGURES, name, exposed(), FIGURES_TTL)


def handed_over(connection: Redis) -> dict[str, str]:
    """The figures of all workers, by name; raises RedisError."""
    return found(connection, FIGURES)

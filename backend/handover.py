"""Figures of workers on their way to the web front, through Redis."""

from __future__ import annotations

from redis import Redis

from backend.metrics import exposed

FIGURES_KEY, FIGURES_TTL = "gdino:figures:", 30  # + worker name -> what Prometheus reads; s


def hand_over(connection: Redis, name: str) -> None:
    """Lays this process's figures out for the web front; raises RedisError."""
    connection.set(FIGURES_KEY + name, exposed(), ex=FIGURES_TTL)


def handed_over(connection: Redis) -> dict[str, str]:
    """The figures of all workers, by name; raises RedisError."""
    keys: list[bytes] = sorted(connection.scan_iter(f"{FIGURES_KEY}*", count=1000))
    rows: list[bytes | None] = connection.mget(keys) if keys else []  # type: ignore[assignment]
    names = [key.decode().removeprefix(FIGURES_KEY) for key in keys]
    return {name: row.decode() for name, row in zip(names, rows, strict=True) if row}

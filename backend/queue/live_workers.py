"""The workers that are alive: each has a key in Redis that expires without its heartbeats.

RQ's own heartbeat does not show whether the model is loaded, and stops while a job runs in the worker's process.
"""

from __future__ import annotations

import os
import socket
import time
from pathlib import Path

from pydantic import BaseModel, ConfigDict
from redis import Redis

from backend.queue.redis import get_indexed, set_indexed

READY_KEY = "gdino:ready:"  # + name of a predict worker whose model is loaded -> JSON: WorkerInfo
FIT_READY_KEY = "gdino:fit-ready:"  # + name of a training worker, likewise
READY_TTL = 10  # s after its last heartbeat for which a worker counts as alive


class WorkerInfo(BaseModel):
    """A live worker: its torch device, the images of one batch (predict workers), and its process."""

    model_config = ConfigDict(frozen=True)

    device: str
    batch_size: int | None = None
    host: str
    pid: int
    process_start: int | None  # clock ticks since the machine's boot; None where it is unknown


def make_worker_name() -> str:
    """Makes a name that no other worker on any machine has."""
    return f"{socket.gethostname()}-{os.getpid()}-{time.time_ns() % 1_000_000}"


def describe_worker(device: str, batch_size: int | None = None) -> WorkerInfo:
    """Describes the worker in this process."""
    pid = os.getpid()
    return WorkerInfo(
        device=device,
        batch_size=batch_size,
        host=socket.gethostname(),
        pid=pid,
        process_start=_read_process_start(pid),
    )


def save_heartbeat(connection: Redis, key: str, name: str, info: WorkerInfo) -> None:
    """Keeps a worker alive for `READY_TTL` seconds; raises RedisError."""
    set_indexed(connection, key, name, info.model_dump_json(), READY_TTL)


def get_live_workers(connection: Redis, key: str) -> dict[str, WorkerInfo]:
    """Returns the live workers by name; `key` is READY_KEY or FIT_READY_KEY. Raises RedisError."""
    return {name: WorkerInfo.model_validate_json(row) for name, row in get_indexed(connection, key).items()}


def remove_stale_heartbeats(connection: Redis) -> None:
    """Removes the heartbeats of workers of this machine whose process is gone; raises RedisError.

    After a kill -9 of everything, the heartbeats of the killed workers would pass for those of new ones.
    """
    for key in (READY_KEY, FIT_READY_KEY):
        for name, info in get_live_workers(connection, key).items():
            if info.host == socket.gethostname() and not _is_running(info):
                connection.delete(key + name)


def _is_running(info: WorkerInfo) -> bool:
    try:
        os.kill(info.pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's process
        pass
    return info.process_start == _read_process_start(info.pid)


def _read_process_start(pid: int) -> int | None:
    """Reads when a process was started, which distinguishes it from an earlier one with its id (proc(5)).

    None for a zombie, which nothing may ever reap in a container, and where the system has no /proc.
    """
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return None if fields[0] == "Z" else int(fields[19])
    except (OSError, ValueError, IndexError):
        return None

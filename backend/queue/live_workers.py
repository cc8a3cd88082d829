"""The workers that are alive: each has a key in Redis that expires without its heartbeats.

RQ's own heartbeat does not show whether the model is loaded, and stops while a job runs in the worker's process.
"""

from __future__ import annotations

import logging
import os
import socket
import time
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError
from redis import Redis

from backend.queue.messages import describe_validation_error
from backend.queue.redis import get_indexed, set_indexed

READY_KEY = "gdino:ready:"  # + name of a predict worker whose model is loaded -> JSON: WorkerInfo
FIT_READY_KEY = "gdino:fit-ready:"  # + name of a training worker, likewise

READY_TTL = 10  # s after its last heartbeat for which a worker counts as alive

log = logging.getLogger(__name__)


class WorkerInfo(BaseModel):
    """A live worker: its torch device and process; of a predict worker also its model and the images of one batch."""

    model_config = ConfigDict(frozen=True)

    device: str
    model: str | None = None  # as MODEL names it
    checkpoint: str | None = None  # its fingerprint
    batch_size: int | None = None
    host: str
    pid: int
    pid_namespace: str  # each container numbers its own processes; empty where the system has no namespaces
    process_start: int | None  # clock ticks since the machine's boot; None where the system has no /proc


def make_worker_name() -> str:
    """Makes a name that no other worker on any machine has."""
    return f"{socket.gethostname()}-{os.getpid()}-{time.time_ns() % 1_000_000}"


def describe_worker(
    device: str, model: str | None = None, checkpoint: str | None = None, batch_size: int | None = None
) -> WorkerInfo:
    """Describes the worker in this process."""
    pid = os.getpid()
    return WorkerInfo(
        device=device,
        model=model,
        checkpoint=checkpoint,
        batch_size=batch_size,
        host=socket.gethostname(),
        pid=pid,
        pid_namespace=_read_pid_namespace(),
        process_start=_read_process_start(pid),
    )


def save_heartbeat(connection: Redis, key: str, name: str, info: WorkerInfo) -> None:
    """Keeps a worker alive for `READY_TTL` seconds; raises RedisError."""
    set_indexed(connection, key, name, info.model_dump_json(), READY_TTL)


def get_live_workers(connection: Redis, key: str) -> dict[str, WorkerInfo]:
    """Returns the live workers by name; leaves out those of another version of the backend.

    Args:
        connection: to Redis.
        key: READY_KEY or FIT_READY_KEY.

    Raises:
        RedisError: Redis does not answer.
    """
    workers = {}
    for name, row in get_indexed(connection, key).items():
        try:
            workers[name] = WorkerInfo.model_validate_json(row)
        except ValidationError as error:
            reason = describe_validation_error(error)
            log.warning("worker %s runs another version of the backend (%s); run the same everywhere", name, reason)
    return workers


def remove_stale_heartbeats(connection: Redis) -> None:
    """Removes the heartbeats of workers of this machine whose process is gone; raises RedisError.

    After a kill -9 of everything, the heartbeats of the killed workers would pass for those of new ones.
    """
    for key in (READY_KEY, FIT_READY_KEY):
        for name, info in get_live_workers(connection, key).items():
            is_here = (info.host, info.pid_namespace) == (socket.gethostname(), _read_pid_namespace())
            if is_here and not _is_running(info):
                connection.delete(key + name)


def remove_all_heartbeats(connection: Redis) -> None:
    """Removes all heartbeats, from a Redis that no worker has reached since its start; raises RedisError."""
    for key in (READY_KEY, FIT_READY_KEY):
        for name in get_indexed(connection, key):
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


def _read_pid_namespace() -> str:
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""

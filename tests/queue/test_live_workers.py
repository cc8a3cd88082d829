"""Live workers and their heartbeats."""

import os
import subprocess
import sys

import pytest
from redis import Redis

from backend.queue.live_workers import (
    FIT_READY_KEY,
    READY_KEY,
    WorkerInfo,
    describe_worker,
    get_live_workers,
    remove_all_heartbeats,
    remove_stale_heartbeats,
    save_heartbeat,
)
from backend.queue.predict_queue import DEFAULT_BATCH_SIZE, PredictQueue
from backend.queue.redis import set_indexed
from tests.chunks import CHECKPOINT


def save_worker(connection: Redis, name: str, **changes: object) -> None:
    info = WorkerInfo.model_validate({**describe_worker("cpu", "demo", CHECKPOINT, 8).model_dump(), **changes})
    save_heartbeat(connection, READY_KEY, name, info)


def find_exited_process() -> int:
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        process.wait()
    return process.pid


def test_heartbeats_of_processes_that_are_gone_are_removed(connection: Redis) -> None:
    save_worker(connection, "this-process")
    save_worker(connection, "exited", pid=find_exited_process())
    save_worker(connection, "same-number-later", process_start=1)
    save_worker(connection, "elsewhere", host="other-machine", pid=1, process_start=1)
    save_worker(connection, "in-a-container", pid_namespace="pid:[1]", pid=1, process_start=1)
    remove_stale_heartbeats(connection)
    assert set(get_live_workers(connection, READY_KEY)) == {"this-process", "elsewhere", "in-a-container"}


def test_the_heartbeat_of_a_zombie_is_removed(connection: Redis) -> None:
    with subprocess.Popen([sys.executable, "-c", ""]) as zombie:
        info = describe_worker("cpu", "demo", CHECKPOINT, 8)
        os.waitid(os.P_PID, zombie.pid, os.WEXITED | os.WNOWAIT)  # it has exited and is not reaped
        save_worker(connection, "zombie", pid=zombie.pid, process_start=info.process_start)
        remove_stale_heartbeats(connection)
    assert get_live_workers(connection, READY_KEY) == {}


def test_all_heartbeats_can_be_removed(connection: Redis) -> None:
    for key in (READY_KEY, FIT_READY_KEY):
        save_heartbeat(connection, key, "worker", describe_worker("cpu", "demo", CHECKPOINT, 8))
    remove_all_heartbeats(connection)
    assert get_live_workers(connection, READY_KEY) == get_live_workers(connection, FIT_READY_KEY) == {}


def test_a_worker_of_another_version_of_the_backend_is_left_out(
    connection: Redis, caplog: pytest.LogCaptureFixture
) -> None:
    set_indexed(connection, READY_KEY, "old", '{"batch_size": 2, "device": "cpu"}', 10)
    queue = PredictQueue(connection, CHECKPOINT)
    assert (queue.get_ready_workers(), queue.get_batch_size()) == ({}, DEFAULT_BATCH_SIZE)
    remove_stale_heartbeats(connection)
    assert "worker old runs another version of the backend (host: Field required)" in caplog.text
    save_worker(connection, "new")
    assert queue.get_batch_size() == 8

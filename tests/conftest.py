"""Fixtures for all tests: a real Redis, and the whole server as a user starts it."""

import os

os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # as a worker does: the tests run several processes on few cores

if "PYTEST_XDIST_WORKER" in os.environ:
    import torch  # noqa: F401 - it reads the variable below when it is loaded, and here it may use all cores

    os.environ.setdefault("OMP_NUM_THREADS", "1")  # of the servers that tests start: many run at a time on few cores

import contextlib
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from redis import Redis

from backend.queue import private_redis
from backend.queue.redis import connect
from backend.settings import Settings
from tests.servers import ServeProcess


@pytest.hookimpl(wrapper=True)
def pytest_report_to_serializable(config: pytest.Config, report: object) -> Iterator[dict]:
    """Replaces lone surrogates, which odd requests leave in the log: parallel workers exchange Unicode text only."""
    data = yield
    if data and data.get("sections"):
        data["sections"] = [(name, text.encode(errors="replace").decode()) for name, text in data["sections"]]
    return data


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Removes the settings of the developer's shell from the environment."""
    for name in Settings.model_fields:
        monkeypatch.delenv(name.upper(), raising=False)


@contextlib.contextmanager
def running_redis(folder: Path) -> Iterator[str]:
    path = folder / "r.sock"
    process = subprocess.Popen(private_redis.build_command(private_redis.find_server(), path, folder))
    try:
        private_redis.wait_until_ready(private_redis.make_url(path))
        yield private_redis.make_url(path)
    finally:
        process.kill()
        process.wait()


@pytest.fixture(scope="session")
def redis_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A real, empty Redis that no worker serves."""
    with running_redis(tmp_path_factory.mktemp("redis")) as url:
        yield url


@pytest.fixture
def connection(redis_url: str) -> Iterator[Redis]:
    """A client of an empty Redis."""
    client = connect(redis_url)
    client.flushdb()
    yield client
    client.flushdb()


@pytest.fixture(scope="session")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServeProcess]:
    """`python -m backend serve` with the bundled checkpoint, ready."""
    server = ServeProcess(tmp_path_factory.mktemp("served"))
    server.started = time.monotonic()
    try:
        server.wait_until_ready()
        yield server
    finally:
        server.stop()


@pytest.fixture
def start_server(tmp_path: Path) -> Iterator[Callable[..., ServeProcess]]:
    """Starts servers of a test's own, with settings given by name; those that still run are stopped at the end."""
    started: list[ServeProcess] = []

    def start(**env: str) -> ServeProcess:
        started.append(ServeProcess(tmp_path, **env))
        return started[-1]

    yield start
    for server in started:
        server.stop()

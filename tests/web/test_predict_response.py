"""Clients that hang up or wait long, through the real gunicorn: nobody else waits for them."""

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import requests

from backend.web.predict_response import MAX_WAITING_REQUESTS, MAX_WAITING_SELECTIONS
from tests.scenes import make_labeling_config, make_scenes
from tests.servers import ROOT, find_free_port, wait_for

pytestmark = pytest.mark.timeout(120)

CONFIG = make_labeling_config(make_scenes(1))


@pytest.fixture
def port(redis_url: str, tmp_path: Path) -> Iterator[int]:
    """The port of a web front whose queue has no worker."""
    port = find_free_port()
    settings = {"MODEL": "demo", "MODEL_DIR": str(tmp_path), "REDIS_URL": redis_url, "PORT": str(port)}
    command = [sys.executable, "-m", "backend", "web"]
    front = subprocess.Popen(command, cwd=ROOT, env={**os.environ, **settings}, stderr=subprocess.DEVNULL)
    try:
        wait_for(lambda: requests.get(f"http://127.0.0.1:{port}/health", timeout=2).ok, 30, "the web front")
        yield port
    finally:
        front.terminate()
        front.wait(10)


def send(port: int, first: int, count: int) -> socket.socket:
    """Sends a request for `count` tasks and leaves its connection open."""
    tasks = [{"id": first + n, "data": {"image": f"{first + n}.png"}} for n in range(count)]
    body = json.dumps({"tasks": tasks, "label_config": CONFIG, "project": "1.1"}).encode()
    head = f"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    connection = socket.create_connection(("127.0.0.1", port))
    connection.sendall(head.encode() + body)
    return connection


def is_refused(port: int, first: int, count: int) -> bool:
    """Returns whether the web front answers a request at once that it has no slot."""
    connection = send(port, first, count)
    connection.settimeout(1)
    try:
        return b" 503 " in connection.recv(100)
    except TimeoutError:
        return False
    finally:
        connection.close()


def test_a_client_that_hangs_up_frees_its_slot_at_once(port: int) -> None:
    waiting = [send(port, number, 1) for number in range(MAX_WAITING_REQUESTS)]
    wait_for(lambda: is_refused(port, 9000, 1), 30, "all slots taken")
    for connection in waiting:
        connection.close()
    start = time.monotonic()
    wait_for(lambda: not is_refused(port, 9001, 1), 10, "a free slot")
    assert time.monotonic() - start < 5


def test_slots_are_kept_for_single_tasks(port: int) -> None:
    waiting = [send(port, 10 * number, 2) for number in range(MAX_WAITING_SELECTIONS)]
    wait_for(lambda: is_refused(port, 9000, 2), 30, "all slots of selections taken")
    assert not is_refused(port, 9002, 1)
    for connection in waiting:
        connection.close()

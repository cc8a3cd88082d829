"""Processes die and hang under load; nothing is lost. `make chaos` runs the long form (CHAOS=full)."""

import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import requests
from redis import Redis

from backend.queue import private_redis
from backend.queue.predict_queue import PREDICT
from backend.queue.redis import connect
from backend.registry.checkpoint import find_checkpoint
from backend.web.predict_response import MAX_WAITING_SELECTIONS
from tests.chaos.saboteur.sitecustomize import HANGS, KILLS, SLOW
from tests.scenes import make_labeling_config, make_scenes, to_data_uri
from tests.servers import ServeProcess, find_free_port, is_running, wait_for

pytestmark = pytest.mark.timeout(400)

FULL = os.environ.get("CHAOS") == "full"
KILLS_OF_WORKERS, CHUNKS, CLIENTS = (4, 60, MAX_WAITING_SELECTIONS) if FULL else (2, 16, 60)
BATCH = 4
SCENE = make_scenes(1)[0]
CONFIG = make_labeling_config([SCENE])
QUEUE = PREDICT + find_checkpoint("demo").fingerprint
SABOTEUR = str(Path(__file__).parent / "saboteur")


def make_tasks(count: int, start: int = 1, width: int = 96) -> list[dict[str, Any]]:
    """Makes tasks that differ, so that no answer is reused; their images are `width` pixels wide."""
    image = SCENE.image.resize((width, 96))
    return [{"id": start + i, "data": {"image": to_data_uri(mark_image(image, start + i))}} for i in range(count)]


def make_slow_tasks(first: int) -> list[dict[str, Any]]:
    """Makes the tasks of CHUNKS chunks that take half a second each, with ids from `first`."""
    numbers = range(first, first + CHUNKS * BATCH, BATCH)
    return [task for i in numbers for task in [*make_tasks(BATCH - 1, i), *make_tasks(1, i + BATCH - 1, SLOW)]]


def mark_image(image: Any, number: int) -> Any:
    image = image.copy()
    image.putpixel((0, 0), (number % 256, number // 256 % 256, 7))
    return image


def predict(served: ServeProcess, tasks: list[dict[str, Any]], timeout: float = 300) -> requests.Response:
    body = {"tasks": tasks, "label_config": CONFIG, "project": "1.1", "params": {}}
    return requests.post(f"{served.url}/predict", json=body, timeout=timeout)


def list_error_codes(response: requests.Response) -> list[str]:
    """Lists the codes of the errors among the answers."""
    assert response.status_code == 200, response.text
    return [result["error"]["code"] for result in response.json()["results"] if "error" in result]


def find_processes(served: ServeProcess, word: str) -> list[int]:
    """Returns the ids of the processes one of whose arguments ends with `word`."""
    return [pid for pid in served.list_descendants() if any(argument.endswith(word) for argument in read_command(pid))]


def read_command(pid: int) -> list[str]:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text().split("\0")
    except OSError:
        return []


def connect_to(served: ServeProcess) -> Redis:
    return connect((served.model_dir / "redis.url").read_text())


def count_finished(connection: Redis) -> int:
    return int(connection.zcard(f"rq:finished:{QUEUE}"))


def count_at_work(connection: Redis) -> int:
    return int(connection.zcard(f"rq:wip:{QUEUE}"))


@pytest.fixture(scope="module")
def sabotaged(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServeProcess]:
    """One server for all tests that leave it running; each uses tasks of its own, because answers are reused."""
    server = ServeProcess(
        tmp_path_factory.mktemp("sabotaged"),
        PYTHONPATH=SABOTEUR, PREDICT_DEADLINE="300", BATCH_SIZE=str(BATCH), FORWARD_TIMEOUT="4", WORKERS="2",
    )  # fmt: skip
    try:
        server.wait_until_ready()
        wait_for(lambda: count_finished(connect_to(server)) == 1, 20, "the welcome's prediction")
        yield server
    finally:
        server.stop()


def test_killed_workers_lose_nothing(sabotaged: ServeProcess) -> None:
    connection, tasks = connect_to(sabotaged), make_slow_tasks(1000)
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(predict, sabotaged, tasks)
        for killing in range(KILLS_OF_WORKERS):
            mark = count_finished(connection)
            wait_for(lambda mark=mark: count_finished(connection) > mark + 4 and count_at_work(connection), 60, "work")
            workers = find_processes(sabotaged, "worker")
            os.kill(workers[killing % len(workers)], signal.SIGKILL)
        last = time.monotonic()
        assert list_error_codes(answer.result()) == []
    assert time.monotonic() - last < 30 + CHUNKS / 4
    assert connection.llen(f"rq:queue:{QUEUE}") == count_at_work(connection) == 0


def test_an_image_that_kills_workers_fails_alone(sabotaged: ServeProcess) -> None:
    tasks = make_tasks(BATCH * 2, 2000)
    tasks[2] = make_tasks(1, 2002, KILLS)[0]
    response = predict(sabotaged, tasks, 120)
    assert list_error_codes(response) == ["worker_died"]
    assert "error" in response.json()["results"][2]
    assert "project 1, task 2002 crashed two workers; answering worker_died" in sabotaged.read_log()


def test_a_worker_whose_forward_pass_hangs_is_replaced(sabotaged: ServeProcess) -> None:
    tasks = [*make_tasks(1, 3000), *make_tasks(1, 3001, HANGS), *make_tasks(2, 3002)]
    assert list_error_codes(predict(sabotaged, tasks, 120)) == ["worker_died"]
    assert "no progress for 4 s" in sabotaged.read_log()


def test_a_killed_redis_loses_nothing(sabotaged: ServeProcess) -> None:
    connection, tasks = connect_to(sabotaged), make_slow_tasks(4000)
    before = count_finished(connection)
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(predict, sabotaged, tasks)
        wait_for(lambda: count_finished(connection) > before + 3, 60, "work")
        os.kill(find_processes(sabotaged, "redis.sock")[0], signal.SIGKILL)
        assert answer.result().status_code == 503
    connection = connect_to(sabotaged)
    wait_for(lambda: find_processes(sabotaged, "redis.sock"), 10, "Redis")
    time.sleep(1)
    assert count_finished(connection) > before + 3
    # No request waits for these chunks any more.
    wait_for(lambda: count_finished(connection) == before + CHUNKS, 120, "the requested chunks")
    assert list_error_codes(predict(sabotaged, tasks)) == []
    assert count_finished(connection) == before + CHUNKS


def test_a_killed_web_front_loses_nothing(sabotaged: ServeProcess) -> None:
    connection, tasks = connect_to(sabotaged), make_slow_tasks(5000)
    before = count_finished(connection)
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(predict, sabotaged, tasks)
        wait_for(lambda: count_finished(connection) > before + 3, 60, "work")
        os.kill(find_processes(sabotaged, "_wsgi:app")[0], signal.SIGKILL)
        with pytest.raises(requests.ConnectionError):
            answer.result()
    wait_for(lambda: requests.get(f"{sabotaged.url}/health", timeout=1).ok, 20, "the web front")
    assert list_error_codes(predict(sabotaged, tasks)) == []
    assert count_finished(connection) == before + CHUNKS


def test_queued_work_goes_on_after_everything_was_killed(
    start_server: Callable[..., ServeProcess], tmp_path: Path
) -> None:
    settings = {"BATCH_SIZE": str(BATCH), "PREDICT_DEADLINE": "300", "PYTHONPATH": SABOTEUR}
    first = start_server(**settings)
    first.wait_until_ready()
    wait_for(lambda: count_finished(connect_to(first)) == 1, 20, "the welcome's prediction")
    tasks = make_slow_tasks(1)
    request = ThreadPoolExecutor(1).submit(predict, first, tasks)
    connection = connect_to(first)
    wait_for(lambda: count_finished(connection) > 3, 60, "work")
    children = first.list_descendants()
    for pid in [first.process.pid, *children]:
        os.kill(pid, signal.SIGKILL)
    wait_for(lambda: not any(map(is_running, children)), 10, "their end")
    assert request.exception(10) or request.result().status_code == 503  # Redis may have died before the web front
    second = start_server(**settings)
    second.wait_until_ready()
    connection = connect_to(second)
    wait_for(lambda: count_finished(connection) > CHUNKS, 120, "the requested chunks")
    assert list_error_codes(predict(second, tasks)) == []


def test_the_web_front_reports_a_dead_redis_and_recovers(
    tmp_path: Path, start_server: Callable[..., ServeProcess]
) -> None:
    port, folder = find_free_port(), tmp_path / "own"
    folder.mkdir()
    command = [
        *private_redis.build_command(private_redis.find_server(), folder / "r.sock", folder),
        "--port",
        str(port),
    ]
    own = subprocess.Popen(command)
    served = start_server(REDIS_URL=f"redis://127.0.0.1:{port}/0")
    try:
        served.wait_until_ready()
        own.kill()
        own.wait()
        start = time.monotonic()
        assert predict(served, make_tasks(1), 10).status_code == 503
        assert time.monotonic() - start < 3
        health = [requests.get(f"{served.url}/health", timeout=5).elapsed.total_seconds() for _ in range(20)]
        assert statistics.median(health) < 0.1
        own = subprocess.Popen(command)
        wait_for(lambda: requests.get(f"{served.url}/ready", timeout=5).ok, 60, "ready")
        assert list_error_codes(predict(served, make_tasks(3))) == []
    finally:
        own.kill()
        own.wait()


WATCH_HEALTH = """
import sys, time, requests
slowest = 0
while True:
    slowest = max(slowest, requests.get(sys.argv[1], timeout=10).elapsed.total_seconds())
    print(slowest, flush=True)
    time.sleep(0.05)
"""


def test_many_clients_at_once_get_all_their_answers(served: ServeProcess) -> None:
    first = predict(served, make_tasks(1, 999))  # also sets up what is set up lazily
    assert list_error_codes(first) == []
    # in a process of its own, which the 200 threads of this one do not slow down
    command = [sys.executable, "-c", WATCH_HEALTH, f"{served.url}/health"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as watcher:
        requested = [make_tasks(2, 1000 + 2 * i) for i in range(CLIENTS)]
        with ThreadPoolExecutor(CLIENTS) as pool:
            answers = list(pool.map(lambda tasks: predict(served, tasks), requested))
        watcher.terminate()
        slowest = float(watcher.stdout.read().split()[-1])
    assert [list_error_codes(answer) for answer in answers] == [[]] * CLIENTS
    assert slowest < 0.25, f"/health took {slowest:.2f} s"

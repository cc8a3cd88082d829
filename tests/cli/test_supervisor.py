"""Starting, supervising and stopping the real processes."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import requests

from backend.queue.live_workers import READY_KEY, describe_worker, get_live_workers, save_heartbeat
from backend.queue.predict_queue import PredictQueue, delete_chunk
from backend.queue.redis import connect
from tests.chunks import make_chunk
from tests.scenes import make_labeling_config, make_scenes, to_data_uri
from tests.servers import ROOT, ServeProcess, find_free_port, is_running, list_descendants, wait_for

MB = 1024 * 1024


def serve_and_fail(**env: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "backend", "serve"]
    return subprocess.run(
        command, cwd=ROOT, env={**os.environ, "MODEL": "demo", **env}, capture_output=True, text=True, timeout=30
    )


def test_the_web_front_loads_no_torch() -> None:
    code = "import _wsgi, sys; print([m for m in ('torch', 'transformers', 'numpy', 'PIL') if m in sys.modules])"
    env = {**os.environ, "MODEL": "demo"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "[]", done.stderr


def measure_memory_mb(pid: int) -> float:
    return int(re.search(r"VmRSS:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())[1]) * 1024 / MB


def test_the_web_front_stays_small(served: ServeProcess) -> None:
    fronts = [pid for pid in served.list_descendants() if b"gunicorn" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    assert len(fronts) == 2
    assert max(measure_memory_mb(pid) for pid in fronts) < 80


def test_the_welcome_shows_url_sample_prediction_and_next_steps(served: ServeProcess) -> None:
    wait_for(lambda: "Ctrl-C stops everything" in served.read_log(), 30, "the welcome")
    text = served.read_log()
    for expected in (
        f"http://localhost:{served.port}",
        "model ready after",
        "sample prediction",
        "score 0.",
        "Connect Model",
    ):
        assert expected in text


def find_processes(served: ServeProcess, word: bytes) -> list[int]:
    """Returns the ids of the processes with `word` among their arguments."""
    return [pid for pid in served.list_descendants() if word in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")]


def test_crashed_processes_are_restarted_and_stopping_leaves_nothing_behind(
    start_server: Callable[..., ServeProcess],
) -> None:
    served = start_server()
    started = time.monotonic()
    wait_for(lambda: requests.get(f"{served.url}/health", timeout=1).ok, 30, "health")
    assert requests.post(f"{served.url}/setup", json={"schema": "<View></View>"}, timeout=3).ok
    assert time.monotonic() - started < 20
    served.wait_until_ready()
    socket_path = Path((served.model_dir / "redis.url").read_text().removeprefix("unix://"))

    (worker,) = find_processes(served, b"worker")
    os.kill(worker, signal.SIGKILL)
    tasks = [{"id": 1, "data": {"image": to_data_uri(make_scenes(1)[0].image)}}]
    body = {"tasks": tasks, "label_config": make_labeling_config(make_scenes(1))}
    answer = requests.post(f"{served.url}/predict", json=body, timeout=95)
    assert "result" in answer.json()["results"][0]

    front = find_processes(served, b"gunicorn")[0]
    os.kill(front, signal.SIGKILL)
    wait_for(
        lambda: not is_running(front) and requests.get(f"{served.url}/health", timeout=1).ok, 30, "a new web front"
    )

    children = served.list_descendants()
    start = time.monotonic()
    assert served.stop() == 0
    assert time.monotonic() - start < 5
    wait_for(lambda: not any(map(is_running, children)), 1, "the end of all processes")
    assert not socket_path.parent.exists()
    assert not (served.model_dir / "redis.url").exists()
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", served.port)) != 0


def test_everything_ends_when_the_supervisor_is_killed(start_server: Callable[..., ServeProcess]) -> None:
    served = start_server()
    wait_for(lambda: requests.get(f"{served.url}/health", timeout=1).ok, 30, "health")
    children = served.list_descendants()
    served.process.kill()
    served.process.wait()
    wait_for(lambda: not any(map(is_running, children)), 10, "the end of all processes")


def test_a_taken_port_is_one_line_and_exit_code_2(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        done = serve_and_fail(PORT=port, MODEL_DIR=str(tmp_path))
    assert (done.returncode, done.stderr) == (
        2, f"error: port {port} cannot be used (Address already in use); set PORT to a free one\n"
    )  # fmt: skip


@pytest.mark.parametrize(
    ("env", "line"),
    [
        ({"MODEL_DIR": "/dev/null/x"}, "MODEL_DIR=/dev/null/x cannot be written"),
        ({"PORT": "abc"}, "PORT must be a whole number, not 'abc'"),
        ({"MODEL": "./nowhere"}, "MODEL=./nowhere: no such folder or file"),
        ({"REDIS_URL": "redis://:s3cret@127.0.0.1:1"}, "Redis at redis://127.0.0.1:1 does not answer"),
        ({"REDIS_URL": "localhost:6379"}, "REDIS_URL must begin with redis://"),
    ],
)
def test_an_error_that_users_can_fix_is_one_line_and_exit_code_2(
    tmp_path: Path, env: dict[str, str], line: str
) -> None:
    done = serve_and_fail(**{"PORT": str(find_free_port()), "MODEL_DIR": str(tmp_path), **env})
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert line in done.stderr
    assert "s3cret" not in done.stderr


def test_two_servers_do_not_share_a_folder(served: ServeProcess) -> None:
    done = serve_and_fail(PORT=str(find_free_port()), MODEL_DIR=str(served.model_dir))
    assert (done.returncode, "is in use by another server" in done.stderr) == (2, True)


@pytest.mark.parametrize("command", ["web", "worker"])
def test_a_process_started_alone_needs_a_redis(tmp_path: Path, command: str) -> None:
    env = {**os.environ, "MODEL": "demo", "MODEL_DIR": str(tmp_path)}
    arguments = [sys.executable, "-m", "backend", command]
    done = subprocess.run(arguments, cwd=ROOT, env=env, capture_output=True, text=True, timeout=30)
    assert (done.returncode, done.stderr) == (
        2, f"error: set REDIS_URL; no server runs in MODEL_DIR={tmp_path} either\n"
    )  # fmt: skip


def test_a_second_worker_joins_a_running_server(served: ServeProcess) -> None:
    env = {**os.environ, "MODEL": "demo", "MODEL_DIR": str(served.model_dir)}
    command = [sys.executable, "-m", "backend", "worker"]
    with subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as worker:
        wait_for(lambda: requests.get(f"{served.url}/ready", timeout=5).json()["workers"] == 2, 60, "a second worker")
        worker.terminate()
        assert worker.wait(10) == 0
    assert requests.get(f"{served.url}/ready", timeout=5).json()["workers"] == 1


def test_a_worker_leaves_the_chunks_of_another_model_alone(served: ServeProcess) -> None:
    connection = connect((served.model_dir / "redis.url").read_text())
    queue, chunk = PredictQueue(connection, "other"), make_chunk({"id": 1}, checkpoint="other")
    queue.enqueue([chunk])
    time.sleep(2)
    assert queue.count_waiting() == 1
    delete_chunk(connection, chunk.id)


def test_check_and_status_name_workers_of_another_model(served: ServeProcess) -> None:
    connection = connect((served.model_dir / "redis.url").read_text())
    save_heartbeat(connection, READY_KEY, "odd-one", describe_worker("cuda:0", "other/model", "another", 8))
    env = {**os.environ, "MODEL": "demo", "MODEL_DIR": str(served.model_dir)}
    done = subprocess.run(
        [sys.executable, "-m", "backend", "check"], cwd=ROOT, env=env, capture_output=True, text=True, timeout=60
    )
    assert "ok    workers: 1 ready, another MODEL: odd-one serves other/model" in done.stdout
    status = requests.get(f"{served.url}/status", timeout=5).json()
    models = {worker["model"]: worker["checkpoint"] == status["checkpoint"] for worker in status["workers"]}
    assert models == {"demo": True, "other/model": False}
    assert requests.get(f"{served.url}/ready", timeout=5).json()["workers"] == 1
    connection.delete(READY_KEY + "odd-one")


def test_serve_can_be_stopped_while_it_waits_for_redis(start_server: Callable[..., ServeProcess]) -> None:
    served = start_server(REDIS_URL="redis://127.0.0.1:1")
    time.sleep(2)
    start = time.monotonic()
    served.stop()
    assert time.monotonic() - start < 5


def test_a_redis_that_cannot_start_is_reported_at_once(tmp_path: Path) -> None:
    appended = tmp_path / "data" / "redis" / "appendonlydir"
    appended.mkdir(parents=True)
    (appended / "appendonly.aof.manifest").write_text("not a manifest")
    start = time.monotonic()
    done = serve_and_fail(PORT=str(find_free_port()), MODEL_DIR=str(tmp_path / "data"))
    assert (done.returncode, "the private Redis exited at once" in done.stderr) == (2, True)
    assert time.monotonic() - start < 10


def test_a_killed_redis_is_restarted_with_its_data(start_server: Callable[..., ServeProcess]) -> None:
    served = start_server()
    served.wait_until_ready()
    connection = connect((served.model_dir / "redis.url").read_text())
    connection.set("kept", "yes")
    time.sleep(1.5)  # its file is written every second
    (redis,) = [
        pid for pid in served.list_descendants() if b"valkey-server" in Path(f"/proc/{pid}/cmdline").read_bytes()
    ]
    os.kill(redis, signal.SIGKILL)
    wait_for(lambda: "private Redis exited with -9" in served.read_log(), 10, "notice")
    served.wait_until_ready()
    assert connection.get("kept") == b"yes"
    body = {
        "tasks": [{"id": 1, "data": {"image": to_data_uri(make_scenes(1)[0].image)}}],
        "label_config": make_labeling_config(make_scenes(1)),
    }
    wait_for(lambda: "result" in requests.post(f"{served.url}/predict", json=body, timeout=95).json()["results"][0], 30)


def test_sigterm_to_make_ends_everything(tmp_path: Path) -> None:
    port, log = find_free_port(), tmp_path / "log"
    if not (ROOT / ".venv" / "installed").exists():
        pytest.skip("make would install into .venv first")
    env = {**os.environ, "PORT": str(port), "MODEL_DIR": str(tmp_path / "data")}
    with log.open("wb") as output:
        make = subprocess.Popen(["make", "demo"], cwd=ROOT, env=env, stdout=output, stderr=subprocess.STDOUT)
    try:
        wait_for(lambda: requests.get(f"http://127.0.0.1:{port}/health", timeout=1).ok, 60, "health")
        descendants = list_descendants(make.pid)
        assert len(descendants) >= 4, log.read_text()  # supervisor, Redis, web front, worker
        make.terminate()
        make.wait(10)
        wait_for(lambda: not any(map(is_running, descendants)), 5, "the end of all processes")
    finally:
        for pid in list_descendants(make.pid):
            os.kill(pid, signal.SIGKILL)
        make.kill()


def test_heartbeats_of_killed_workers_do_not_make_the_next_start_ready(
    start_server: Callable[..., ServeProcess],
) -> None:
    first = start_server()
    first.wait_until_ready()
    time.sleep(1.5)  # Redis writes its file every second
    for pid in [first.process.pid, *first.list_descendants()]:
        os.kill(pid, signal.SIGKILL)
    first.process.wait()
    again = start_server()
    workers: list[int] = []

    def is_ready() -> bool:
        workers[:] = find_processes(again, b"worker")
        return requests.get(f"{again.url}/ready", timeout=1).ok

    wait_for(is_ready, 60, "ready")
    connection = connect((again.model_dir / "redis.url").read_text())
    live = get_live_workers(connection, READY_KEY)
    assert {info.pid for info in live.values()} == set(workers)


def test_a_model_that_cannot_be_loaded_ends_the_first_start(tmp_path: Path) -> None:
    model = tmp_path / "x.pth"
    model.write_text("not a checkpoint")
    done = serve_and_fail(MODEL=str(model), PORT=str(find_free_port()), MODEL_DIR=str(tmp_path / "data"))
    assert done.returncode == 2
    assert done.stderr.count("error:") == 1
    assert f"error: MODEL={model} is damaged or not a checkpoint" in done.stderr

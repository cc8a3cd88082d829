"""Real processes and servers for the tests, on free ports; each is stopped at the end."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import requests

ROOT = Path(__file__).parent.parent


def find_free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wait_for(condition: Callable[[], object], seconds: float = 60, what: str = "it") -> object:
    """Waits for a true value of `condition` and returns it; connection errors count as false."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        with contextlib.suppress(requests.ConnectionError, requests.Timeout):
            if value := condition():
                return value
        time.sleep(0.05)
    raise AssertionError(f"{what} did not happen within {seconds} s")


class ServeProcess:
    """Runs `python -m backend serve` as a process of its own."""

    def __init__(self, folder: Path, **env: str) -> None:
        self.port = find_free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = folder / "serve.log"
        self.model_dir = folder / "data"
        settings = {"MODEL": "demo", "PORT": str(self.port), "MODEL_DIR": str(self.model_dir)}
        settings |= {"ALLOWED_IMAGE_HOSTS": "127.0.0.0/8", **env}  # where the tests serve their images
        self.env = env
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "backend", "serve"],
                cwd=ROOT,
                env={**os.environ, **settings},
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def wait_until_ready(self, seconds: float = 90) -> None:
        def is_ready() -> bool:
            assert self.process.poll() is None, self.read_log()
            return requests.get(f"{self.url}/ready", timeout=5).status_code == 200

        wait_for(is_ready, seconds, "ready")

    def read_log(self) -> str:
        return self.log.read_text(errors="replace")

    def list_descendants(self) -> list[int]:
        """Returns the process ids of all its children and their descendants."""
        return list_descendants(self.process.pid)

    def stop(self, seconds: float = 10) -> int:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        return self.process.wait(seconds)


def list_descendants(pid: int) -> list[int]:
    """Returns the process ids of a process's children and their descendants."""
    rows = subprocess.run(["ps", "-eo", "pid,ppid"], capture_output=True, text=True).stdout.split("\n")[1:]
    parents = {int(row.split()[0]): int(row.split()[1]) for row in rows if row.strip()}
    tree = [pid]
    for parent in tree:
        tree += [child for child, ppid in parents.items() if ppid == parent]
    return tree[1:]


def is_running(pid: int) -> bool:
    """Returns whether a process exists and is not a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


@contextlib.contextmanager
def http_server(answer: Callable[[BaseHTTPRequestHandler], None]) -> Iterator[str]:
    """Runs a web server that answers every request with `answer`; yields its URL."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                answer(self)

        do_POST = do_HEAD = do_GET

        def log_message(self, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def send_reply(handler: BaseHTTPRequestHandler, body: bytes, status: int = 200, **headers: str) -> None:
    """Sends a complete answer; header names are given with underscores."""
    handler.send_response(status)
    for name, value in {"Content-Length": str(len(body)), **headers}.items():
        handler.send_header(name.replace("_", "-"), value)
    handler.end_headers()
    handler.wfile.write(body)

"""`serve`: the web front, the workers and, where none is configured, a private Redis, as one supervised group."""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import fcntl
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

from backend.cli.welcome import welcome
from backend.errors import SettingsError
from backend.queue import private_redis
from backend.registry.checkpoint import find_checkpoint
from backend.settings import Settings

ROOT = Path(__file__).parent.parent.parent
SOCKET_ROOT = "/tmp"  # noqa: S108 - a socket's path may have 108 bytes, and TMPDIR may be long; the folder is private
CONFIGURED_REDIS_TIMEOUT = 10  # s; it may be starting beside us
MAX_RESTART_DELAY = 30  # s before a part that keeps crashing is started again
STABLE_AFTER = 60  # s after which a crash counts as the first
NVIDIA = Path("/proc/driver/nvidia/gpus")
SHUTDOWN_TIMEOUT = 2  # s between SIGTERM and SIGKILL
PR_SET_PDEATHSIG = 1  # prctl(2)
LIBC = ctypes.CDLL(None)  # bound here: between fork and exec nothing may be loaded


class ManagedProcess:
    """One process of the group; started again when it ends, after a pause that grows while it keeps ending at once."""

    def __init__(self, name: str, command: list[str], env: dict[str, str]) -> None:
        self.name, self._command, self._env = name, command, env
        self._crashes, self._started, self._start_at = 0, 0.0, 0.0
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Starts the process; it gets SIGTERM should this one die without a word."""
        self._started = time.monotonic()
        self.process = subprocess.Popen(
            self._command, env=self._env, cwd=ROOT, stdin=subprocess.DEVNULL, start_new_session=True,
            preexec_fn=_end_with_parent,
        )  # fmt: skip

    def has_ended(self) -> bool:
        """Whether the process was started and is gone."""
        return self.process is not None and self.process.poll() is not None

    def tend(self) -> None:
        """Notices that the process has ended, and starts it again when its pause is over."""
        if self.process and self.has_ended():
            _end_session(self.process)
            self._crashes = 0 if time.monotonic() - self._started > STABLE_AFTER else self._crashes
            pause = min(2**self._crashes - 1, MAX_RESTART_DELAY)
            echo(f"{self.name} ended with {self.process.returncode}; starting it again in {pause} s")
            self._crashes, self._start_at, self.process = self._crashes + 1, time.monotonic() + pause, None
        if not self.process and time.monotonic() >= self._start_at:
            self.start()

    def stop(self, deadline: float) -> None:
        """SIGTERM, and SIGKILL to whatever of its session is left at `deadline`."""
        if not self.process:
            return
        self.process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(max(deadline - time.monotonic(), 0))
        _end_session(self.process)
        self.process.wait()


def _end_session(process: subprocess.Popen[bytes]) -> None:
    """Ends what the process started itself: an orphan of gunicorn would hold the port."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def _end_with_parent() -> None:
    LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def echo(text: str) -> None:
    """A line for the person at the terminal."""
    print(text, flush=True)


def serve(settings: Settings) -> None:
    """Runs everything until SIGTERM or Ctrl-C.

    Raises:
        SettingsError: the port is taken, MODEL_DIR cannot be written, or Redis does not answer.
        CheckpointError: there is no such MODEL.
    """
    stop = stop_on_signals()
    _check_port(settings.port)
    find_checkpoint(settings.model)
    with _own_folder(settings.model_dir), tempfile.TemporaryDirectory(prefix="gdino-", dir=SOCKET_ROOT) as private:
        redis, settings = _private_redis(settings, Path(private), stop)
        try:
            _supervise(settings, redis, stop)
        finally:
            for part in redis:
                part.stop(time.monotonic() + SHUTDOWN_TIMEOUT)
            (settings.model_dir / private_redis.URL_FILE).unlink(missing_ok=True)


@contextlib.contextmanager
def temporary_workers(settings: Settings) -> Iterator[Settings]:
    """Workers, and a Redis where none is configured, for as long as this lasts; the settings that lead to them.

    Raises:
        SettingsError: MODEL_DIR is in use or cannot be written, or Redis does not start.
        CheckpointError: there is no such MODEL.
    """
    stop = threading.Event()
    find_checkpoint(settings.model)
    with _own_folder(settings.model_dir), tempfile.TemporaryDirectory(prefix="gdino-", dir=SOCKET_ROOT) as private:
        redis, settings = _private_redis(settings, Path(private), stop)
        parts = [*redis, *_workers(settings, {**os.environ, **settings.to_env()})]
        tending = threading.Thread(target=_tend, args=(parts, stop), daemon=True)
        tending.start()
        try:
            yield settings
        finally:
            stop.set()
            tending.join()
            for part in reversed(parts):
                part.stop(time.monotonic() + SHUTDOWN_TIMEOUT)
            (settings.model_dir / private_redis.URL_FILE).unlink(missing_ok=True)


def _tend(parts: list[ManagedProcess], stop: threading.Event) -> None:
    while not stop.is_set():
        for part in parts:
            part.tend()
        stop.wait(0.2)


def _workers(settings: Settings, env: dict[str, str]) -> list[ManagedProcess]:
    devices = _devices(settings.device)
    names = range(settings.workers or len(devices))
    return [_part(f"worker {n + 1}", ["worker"], {**env, "DEVICE": devices[n % len(devices)]}) for n in names]


def _supervise(settings: Settings, redis: list[ManagedProcess], stop: threading.Event) -> None:
    env = {**os.environ, **settings.to_env()}
    parts = [_part("web front", ["web"], env), *_workers(settings, env)]
    if settings.label_studio_url and settings.label_studio_api_key:
        parts.append(_part("pusher", ["push"], env))
        last = {**env, "DEVICE": _devices(settings.device)[-1]}  # of several GPUs the one that is asked last
        parts.append(_part("fit worker", ["worker", "--queue", "fit"], last))
    greeting = threading.Thread(target=welcome, args=(settings, echo, stop), daemon=True)
    greeting.start()
    _tend([*redis, *parts], stop)
    echo("stopping")
    deadline = time.monotonic() + SHUTDOWN_TIMEOUT
    for part in parts:
        if part.process:
            part.process.terminate()
    for part in parts:
        part.stop(deadline)


def _devices(device: str) -> list[str]:
    """One for each worker; counted without torch, which would be a gigabyte of memory here."""
    if device not in ("auto", "cuda"):
        return [name.strip() for name in device.split(",")]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus = visible.split(",") if visible is not None else list(NVIDIA.glob("*"))
    return [f"cuda:{number}" for number in range(len(gpus))] if len(gpus) > 1 else [device]


def _part(name: str, arguments: list[str], env: dict[str, str]) -> ManagedProcess:
    return ManagedProcess(name, [sys.executable, "-m", "backend", *arguments], env)


def _private_redis(settings: Settings, private: Path, stop: threading.Event) -> tuple[list[ManagedProcess], Settings]:
    """The private server, running, and the settings that lead to it; no server where one is configured."""
    if settings.redis_url:
        private_redis.wait_until_ready(settings.redis_url, CONFIGURED_REDIS_TIMEOUT, stop.is_set)
        return [], settings
    path, folder = private / "redis.sock", settings.model_dir / "redis"
    part = ManagedProcess(
        "private Redis", private_redis.command(private_redis.find_server(), path, folder.resolve()), {}
    )
    part.start()
    try:
        private_redis.wait_until_ready(private_redis.url(path), given_up=lambda: stop.is_set() or part.has_ended())
        if part.has_ended() and not stop.is_set():
            raise SettingsError(f"the private Redis ended at once; {folder / 'redis.log'} says why")
    except SettingsError:
        part.stop(time.monotonic())
        raise
    (settings.model_dir / private_redis.URL_FILE).write_text(private_redis.url(path))
    return [part], dataclasses.replace(settings, redis_url=private_redis.url(path))


def _check_port(port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError as error:
            raise SettingsError(f"port {port} cannot be used ({error.strerror}); set PORT to a free one") from None


@contextlib.contextmanager
def _own_folder(folder: Path) -> Iterator[None]:
    """Makes MODEL_DIR and keeps a second `serve` out of it: two servers would write one Redis file."""
    try:
        (folder / "redis").mkdir(parents=True, exist_ok=True)
        lock = (folder / "lock").open("w")
    except OSError as error:
        raise SettingsError(
            f"MODEL_DIR={folder} cannot be written ({error.strerror}); set it to another folder"
        ) from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise SettingsError(f"MODEL_DIR={folder} is in use by another server; stop it or set another") from None
        yield


def stop_on_signals() -> threading.Event:
    """An event that SIGTERM and Ctrl-C set."""
    stop = threading.Event()

    def on_signal(number: int, frame: FrameType | None) -> None:
        stop.set()

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, on_signal)
    return stop


def build_gunicorn_command(settings: Settings) -> list[str]:
    """The web front as a command: one process, to keep its memory small, and a thread for each waiting request."""
    options = {
        "bind": f"0.0.0.0:{settings.port}",
        "worker-class": "gthread",
        "threads": "256",
        "graceful-timeout": "2",
        "pythonpath": str(ROOT),
        "log-level": settings.log_level.lower() if settings.log_level != "INFO" else "warning",
    }
    words = [word for key, value in options.items() for word in (f"--{key}", value)]
    return [sys.executable, "-m", "gunicorn", "_wsgi:app", "--no-control-socket", *words]

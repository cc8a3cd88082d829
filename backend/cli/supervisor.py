"""`serve`: web front, all workers and, where none is configured, a private Redis, as one supervised group."""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import os
import re
import signal
import socket
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import FrameType

from redis.exceptions import RedisError

from backend.cli.process_group import EXIT_UNUSABLE, ROOT, ManagedProcess, ProcessGroup
from backend.cli.welcome import welcome
from backend.errors import SettingsError
from backend.queue import private_redis
from backend.queue.live_workers import remove_all_heartbeats, remove_stale_heartbeats
from backend.queue.redis import connect
from backend.registry.checkpoint import find_checkpoint
from backend.settings import Settings

SOCKET_ROOT = "/tmp"  # noqa: S108 - a socket's path may have 108 bytes, and TMPDIR may be long; the folder is private
CONFIGURED_REDIS_TIMEOUT = 10  # s; it may be starting beside us
NVIDIA = Path("/proc/driver/nvidia/gpus")
GPU_NAME = re.compile(r"\d+|(GPU|MIG)-.+")  # in CUDA_VISIBLE_DEVICES


def echo(text: str) -> None:
    """Prints a line for the person at the terminal."""
    print(text, flush=True)


def serve(settings: Settings) -> int:
    """Runs everything until SIGTERM or Ctrl-C; returns the exit status.

    Raises:
        SettingsError: the port is taken, MODEL_DIR cannot be written, or Redis does not answer.
        CheckpointError: there is no such MODEL.
    """
    stop = stop_on_signals()
    _check_port(settings.port)
    with _run_group(settings, stop) as (group, running):
        env = {**os.environ, **running.to_env()}
        processes = [_make_process("web front", ["web"], env), *_make_workers(running, env)]
        if running.label_studio_url and running.label_studio_api_key:
            processes.append(_make_process("delivery worker", ["push"], env))
            last_device = {**env, "DEVICE": list_devices(running.device)[-1]}  # of several GPUs the least busy one
            processes.append(_make_process("training worker", ["worker", "--queue", "fit"], last_device))
        group.add_stage(*processes, stop_timeout=running.stop_timeout)
        threading.Thread(target=welcome, args=(running, echo, stop), daemon=True).start()
        status = group.supervise(stop)
        stop.set()
        echo("stopping")
    return status


@contextlib.contextmanager
def temporary_workers(settings: Settings) -> Iterator[Settings]:
    """Runs workers, and a Redis where none is configured, for as long as the context lasts.

    Yields:
        The settings, with the URL of that Redis.

    Raises:
        SettingsError: MODEL_DIR is in use or cannot be written, or Redis does not start.
        CheckpointError: there is no such MODEL.
        SystemExit: the workers cannot work at all; they have logged why.
    """
    stop = threading.Event()

    def exit_unusable(number: int, frame: FrameType | None) -> None:
        raise SystemExit(EXIT_UNUSABLE)

    with _run_group(settings, stop) as (group, running):
        workers = _make_workers(running, {**os.environ, **running.to_env()})
        group.add_stage(*workers, stop_timeout=running.stop_timeout)

        def supervise() -> None:
            if group.supervise(stop):  # the main thread waits for answers that will never come
                signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGUSR1)

        previous = signal.signal(signal.SIGUSR1, exit_unusable)  # not SIGINT, which shells ignore in the background
        thread = threading.Thread(target=supervise, daemon=True)
        thread.start()
        try:
            yield running
        finally:
            stop.set()
            thread.join()
            signal.signal(signal.SIGUSR1, previous)


@contextlib.contextmanager
def _run_group(settings: Settings, stop: threading.Event) -> Iterator[tuple[ProcessGroup, Settings]]:
    """Locks MODEL_DIR and starts Redis where none is configured; stops all processes at the end."""
    find_checkpoint(settings.model)
    with (
        lock_data_dir(settings.model_dir),
        tempfile.TemporaryDirectory(prefix="gdino-", dir=SOCKET_ROOT) as socket_dir,
        ProcessGroup() as group,
    ):
        is_private = not settings.redis_url
        if not is_private:
            private_redis.wait_until_ready(settings.redis_url, CONFIGURED_REDIS_TIMEOUT, stop.is_set)
        else:
            settings = _start_private_redis(group, settings, Path(socket_dir), stop)
        try:
            with contextlib.suppress(RedisError):  # it may have gone again, or we are stopping
                remove_heartbeats = remove_all_heartbeats if is_private else remove_stale_heartbeats
                remove_heartbeats(connect(settings.redis_url))
            yield group, settings
        finally:
            (settings.model_dir / private_redis.URL_FILE).unlink(missing_ok=True)


def _start_private_redis(group: ProcessGroup, settings: Settings, socket_dir: Path, stop: threading.Event) -> Settings:
    """Starts the private Redis and returns the settings with its URL."""
    path, data_dir = socket_dir / "redis.sock", settings.model_dir / "redis"
    command = private_redis.build_command(private_redis.find_server(), path, data_dir.resolve())
    server = ManagedProcess("private Redis", command, {}, echo)
    group.add_stage(server)
    server.start()
    url = private_redis.make_url(path)
    private_redis.wait_until_ready(url, given_up=lambda: stop.is_set() or server.has_exited())
    if server.has_exited() and not stop.is_set():
        raise SettingsError(f"the private Redis exited at once; {data_dir / 'redis.log'} says why")
    (settings.model_dir / private_redis.URL_FILE).write_text(url)
    return settings.replace(redis_url=url)


def _make_workers(settings: Settings, env: Mapping[str, str]) -> list[ManagedProcess]:
    devices = list_devices(settings.device)
    if settings.workers:
        devices = [devices[n % len(devices)] for n in range(settings.workers)]
    else:  # while a worker loads the images of a chunk it leaves its GPU idle; a CPU is busy with that as well
        devices += [device for device in devices if _is_gpu(device)]
    return [
        _make_process(f"worker {number}", ["worker"], {**env, "DEVICE": device})
        for number, device in enumerate(devices, 1)
    ]


def _make_process(name: str, arguments: list[str], env: Mapping[str, str]) -> ManagedProcess:
    return ManagedProcess(name, [sys.executable, "-m", "backend", *arguments], env, echo)


def list_devices(device: str) -> list[str]:
    """Lists the devices of a DEVICE setting; counts GPUs without torch, which takes a gigabyte of memory."""
    if device not in ("auto", "cuda"):
        return [name.strip() for name in device.split(",")]
    gpus = _count_gpus()
    return [f"cuda:{number}" for number in range(gpus)] if gpus > 1 else [device]


def _is_gpu(device: str) -> bool:
    return device.startswith("cuda") or (device == "auto" and _count_gpus() > 0)


def _count_gpus() -> int:
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return len(list(NVIDIA.glob("*")))
    names = (name.strip() for name in visible.split(","))
    return len(list(itertools.takewhile(GPU_NAME.fullmatch, names)))  # CUDA ignores what follows another, such as -1


def _check_port(port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError as error:
            raise SettingsError(f"port {port} cannot be used ({error.strerror}); set PORT to a free one") from None


@contextlib.contextmanager
def lock_data_dir(folder: Path) -> Iterator[None]:
    """Creates MODEL_DIR and locks it: two servers would write the same Redis file.

    Raises:
        SettingsError: the folder cannot be written, or is in use.
    """
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
    """Returns an event that SIGTERM and Ctrl-C set."""
    stop = threading.Event()

    def on_signal(number: int, frame: FrameType | None) -> None:
        stop.set()

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, on_signal)
    return stop


def build_gunicorn_command(settings: Settings) -> list[str]:
    """Builds the web front's command: one process, to keep its memory small, and a thread for each waiting request."""
    options = {
        "bind": f"0.0.0.0:{settings.port}",
        "worker-class": "gthread",
        "threads": "256",
        "graceful-timeout": "2",
        "pythonpath": str(ROOT),
        "log-level": settings.log_level.lower() if settings.log_level != "INFO" else "warning",
    }
    arguments = [word for name, value in options.items() for word in (f"--{name}", value)]
    return [sys.executable, "-m", "gunicorn", "_wsgi:app", "--no-control-socket", *arguments]

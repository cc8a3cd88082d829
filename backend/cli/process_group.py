"""Child processes that are started, restarted and stopped together.

Every child runs in a session of its own, so that Ctrl-C in the terminal reaches the supervisor alone, and asks the
kernel for SIGTERM at the supervisor's death (prctl(2)), so that it ends even when the supervisor is killed.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
STOP_TIMEOUT = 2  # s between SIGTERM and SIGKILL, unless a stage needs longer
MAX_RESTART_DELAY = 30  # s before a process that keeps crashing is started again
STABLE_AFTER = 60  # s after which a crash counts as the first
POLL_INTERVAL = 0.2  # s
EXIT_UNUSABLE = 2  # exit status of a process whose settings or model cannot be used: a restart changes nothing
PR_SET_PDEATHSIG = 1  # of prctl(2)
LIBC = ctypes.CDLL(None)  # bound here: between fork and exec nothing may be loaded


class ManagedProcess:
    """One child process; restarted when it exits, after a delay that grows while it keeps exiting at once."""

    def __init__(self, name: str, command: list[str], env: Mapping[str, str], echo: Callable[[str], None]) -> None:
        self.name, self._command, self._env, self._echo = name, command, env, echo
        self._starts, self._crashes, self._started_at, self._start_at = 0, 0, 0.0, 0.0
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Starts the process."""
        self._starts, self._started_at = self._starts + 1, time.monotonic()
        self._process = subprocess.Popen(
            self._command, env=self._env, cwd=ROOT, stdin=subprocess.DEVNULL, start_new_session=True,
            preexec_fn=lambda: LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGTERM),
        )  # fmt: skip

    def has_exited(self) -> bool:
        """Returns whether the process was started and is gone."""
        return self._process is not None and self._process.poll() is not None

    def is_unusable(self) -> bool:
        """Returns whether the first start showed that the process cannot work at all."""
        process = self._process
        return self._starts == 1 and process is not None and process.poll() == EXIT_UNUSABLE

    def restart_if_exited(self) -> None:
        """Starts the process when it is not running and its delay is over."""
        if self._process and self.has_exited():
            self._kill_session()
            self._crashes = 0 if time.monotonic() - self._started_at > STABLE_AFTER else self._crashes
            delay = min(2**self._crashes - 1, MAX_RESTART_DELAY)
            self._echo(f"{self.name} exited with {self._process.returncode}; starting it again in {delay} s")
            self._crashes, self._start_at, self._process = self._crashes + 1, time.monotonic() + delay, None
        if not self._process and time.monotonic() >= self._start_at:
            self.start()

    def terminate(self) -> None:
        """Sends SIGTERM."""
        if self._process:
            self._process.terminate()

    def wait_or_kill(self, deadline: float) -> None:
        """Waits for the process, and kills whatever is left of its session at `deadline` (of `time.monotonic`)."""
        if not self._process:
            return
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(max(deadline - time.monotonic(), 0))
        self._kill_session()
        self._process.wait()

    def _kill_session(self) -> None:
        """Kills what the process started itself: an orphan of gunicorn would hold the port."""
        if self._process:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)


class ProcessGroup:
    """Supervised processes; as a context, it stops them at the end, in the reverse order of their stages."""

    def __init__(self) -> None:
        self._stages: list[tuple[list[ManagedProcess], float]] = []

    def add_stage(self, *processes: ManagedProcess, stop_timeout: float = STOP_TIMEOUT) -> None:
        """Adds processes that need those of the earlier stages; `supervise` starts what is not running yet.

        They get `stop_timeout` seconds to end at SIGTERM.
        """
        self._stages.append((list(processes), stop_timeout))

    def supervise(self, stop: threading.Event) -> int:
        """Starts and restarts the processes until `stop` is set.

        Returns:
            The exit status: 0, or EXIT_UNUSABLE if a process cannot work at all; that process has logged why.
        """
        while not stop.wait(POLL_INTERVAL):
            for process in self._list_processes():
                if process.is_unusable():
                    return EXIT_UNUSABLE
                process.restart_if_exited()
        return 0

    def _list_processes(self) -> list[ManagedProcess]:
        return [process for processes, _ in self._stages for process in processes]

    def stop(self) -> None:
        """Stops the processes, each stage within its time."""
        for processes, stop_timeout in reversed(self._stages):
            for process in processes:
                process.terminate()
            deadline = time.monotonic() + stop_timeout
            for process in processes:
                process.wait_or_kill(deadline)

    def __enter__(self) -> ProcessGroup:
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()

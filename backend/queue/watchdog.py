"""A watchdog that ends a worker whose work hangs; the supervisor starts another.

A stuck native call cannot be interrupted from Python: neither by a signal nor by an exception.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from collections.abc import Iterator

log = logging.getLogger(__name__)

EXIT_HUNG = 70  # exit status


class Watchdog:
    """Ends the process when work that should `beat` at least every `limit` seconds does not."""

    def __init__(self, limit: float) -> None:
        self._limit = limit
        self._last_beat: float | None = None  # of the monotonic clock; None while nothing is watched
        threading.Thread(target=self._watch, daemon=True).start()

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Watches the work inside the context."""
        self._last_beat = time.monotonic()
        try:
            yield
        finally:
            self._last_beat = None

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Does not watch the work inside the context, which has a limit of its own."""
        before, self._last_beat = self._last_beat, None
        try:
            yield
        finally:
            self._last_beat = time.monotonic() if before is not None else None

    def beat(self) -> None:
        """Shows progress; does nothing while nothing is watched."""
        if self._last_beat is not None:
            self._last_beat = time.monotonic()

    def _watch(self) -> None:
        while True:
            time.sleep(self._limit / 10)
            last_beat = self._last_beat
            if last_beat is not None and time.monotonic() - last_beat > self._limit:
                log.critical("no progress for %g s; the worker ends, and another takes its job", self._limit)
                os._exit(EXIT_HUNG)

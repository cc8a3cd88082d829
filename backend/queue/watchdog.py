"""Ends a worker whose work in hand shows no sign of life; the supervisor starts another.

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
    """Watches work that is expected to `beat` at least every `limit` seconds."""

    def __init__(self, limit: float) -> None:
        self._limit = limit
        self._last: float | None = None  # of the monotonic clock; none while there is nothing to watch
        threading.Thread(target=self._watch, daemon=True).start()

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Watches what is done inside."""
        self._last = time.monotonic()
        try:
            yield
        finally:
            self._last = None

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Does not watch what is done inside, which has a limit of its own."""
        was, self._last = self._last, None
        try:
            yield
        finally:
            self._last = time.monotonic() if was is not None else None

    def beat(self) -> None:
        """A sign of life; means nothing while nothing is watched."""
        if self._last is not None:
            self._last = time.monotonic()

    def _watch(self) -> None:
        while True:
            time.sleep(self._limit / 10)
            last = self._last
            if last is not None and time.monotonic() - last > self._limit:
                log.critical("no sign of life for %g s: the worker ends, so that another can go on", self._limit)
                os._exit(EXIT_HUNG)

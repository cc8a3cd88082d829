"""Now and then a small copy of a picture that a worker loads, for the status page."""

from __future__ import annotations

import io
import threading
import time
from collections.abc import Sequence

from PIL import Image

EDGE, EVERY = 320, 2.0  # pixels, s between two


class Glimpse:
    """Safe to share between threads."""

    def __init__(self, is_on: bool) -> None:
        self._due, self._lock = 0.0 if is_on else float("inf"), threading.Lock()
        self._uri, self._jpeg = "", b""

    def see(self, uri: str, image: Image.Image) -> None:
        """Keeps a copy, if it is time for one; `image` is RGB."""
        with self._lock:
            if time.monotonic() < self._due:
                return
            self._due = time.monotonic() + EVERY
        small, buffer = image.copy(), io.BytesIO()
        small.thumbnail((EDGE, EDGE))
        small.save(buffer, "JPEG", quality=80)
        self._uri, self._jpeg = uri, buffer.getvalue()

    def take(self, uris: Sequence[str]) -> tuple[int, bytes] | None:
        """The copy, as JPEG, with the place of its picture among these; none where there is nothing new."""
        if not self._uri or self._uri not in uris:
            return None
        taken = uris.index(self._uri), self._jpeg
        self._uri = ""
        return taken

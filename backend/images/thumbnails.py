"""Now and then a small copy of a picture that a worker loads, for the status page."""

from __future__ import annotations

import hashlib
import io
import threading
import time
from collections.abc import Sequence

from PIL import Image

MAX_EDGE, SAMPLE_INTERVAL = 320, 2.0  # pixels, s between two


class ThumbnailSampler:
    """Safe to share between threads."""

    def __init__(self, is_on: bool) -> None:
        self._due, self._lock = 0.0 if is_on else float("inf"), threading.Lock()
        self._seen, self._jpeg = "", b""

    def see(self, uri: str, image: Image.Image) -> None:
        """Keeps a copy, if it is time for one; `image` is RGB."""
        with self._lock:
            if time.monotonic() < self._due:
                return
            self._due = time.monotonic() + SAMPLE_INTERVAL
        scale, buffer = min(MAX_EDGE / max(image.size), 1), io.BytesIO()
        size = (max(round(image.width * scale), 1), max(round(image.height * scale), 1))
        image.resize(size, reducing_gap=2).save(buffer, "JPEG", quality=80)
        with self._lock:
            self._seen, self._jpeg = _name(uri), buffer.getvalue()

    def take(self, uris: Sequence[str]) -> tuple[int, bytes] | None:
        """The copy, as JPEG, with the place of its picture among these; none where there is nothing new."""
        with self._lock:
            seen, jpeg = self._seen, self._jpeg
        place = next((i for i, uri in enumerate(uris) if seen and _name(uri) == seen), None)
        if place is None:
            return None
        with self._lock:
            self._seen = ""
        return place, jpeg


def _name(uri: str) -> str:
    """A `data:` address may be as long as its picture."""
    return uri if len(uri) < 200 else hashlib.sha256(uri.encode(errors="replace")).hexdigest()

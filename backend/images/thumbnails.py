"""Samples small copies of the images that a worker loads, for the status page."""

from __future__ import annotations

import hashlib
import io
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image

MAX_THUMBNAIL_EDGE = 320  # pixels
SAMPLE_INTERVAL = 2.0  # seconds between two samples
MAX_KEY_LENGTH = 200  # characters; a longer address is kept as its hash


@dataclass(frozen=True)
class Thumbnail:
    """A small copy of the image whose address is at `image_index` of those given to `pop`."""

    image_index: int
    jpeg: bytes


class ThumbnailSampler:
    """Keeps a small copy of one image at a time, a new one every `SAMPLE_INTERVAL`; safe to share between threads."""

    def __init__(self, is_on: bool) -> None:
        self._lock = threading.Lock()
        self._next_sample_at = 0.0 if is_on else float("inf")
        self._key, self._jpeg = "", b""  # of the latest sample; no key once it has been popped

    def offer(self, uri: str, image: Image.Image) -> None:
        """Keeps a copy of `image` (RGB) if a sample is due."""
        with self._lock:
            if time.monotonic() < self._next_sample_at:
                return
            self._next_sample_at = time.monotonic() + SAMPLE_INTERVAL
        scale, buffer = min(MAX_THUMBNAIL_EDGE / max(image.size), 1), io.BytesIO()
        size = (max(round(image.width * scale), 1), max(round(image.height * scale), 1))
        image.resize(size, reducing_gap=2).save(buffer, "JPEG", quality=80)
        with self._lock:
            self._key, self._jpeg = _make_key(uri), buffer.getvalue()

    def pop(self, uris: Sequence[str]) -> Thumbnail | None:
        """Returns the latest sample, once, if it is of one of these images."""
        with self._lock:
            key, jpeg = self._key, self._jpeg
        index = next((i for i, uri in enumerate(uris) if key and _make_key(uri) == key), None)
        if index is None:
            return None
        with self._lock:
            self._key = ""
        return Thumbnail(index, jpeg)


def _make_key(uri: str) -> str:
    """Shortens an address: a `data:` URI is as long as its image."""
    return uri if len(uri) < MAX_KEY_LENGTH else hashlib.sha256(uri.encode(errors="replace")).hexdigest()

"""Pictures as the model reads them, kept on disk while it learns from them: fetched once, looked at many times."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

from backend.detection.detector import Detector
from backend.detection.preprocess import ModelInput
from backend.errors import BackendError, ImageError
from backend.images.decoding import ImageLoader

DOWNLOAD_THREADS = 8  # pictures fetched at the same time
RESERVE = 1_000_000_000  # bytes of the disk that stay free: Redis writes there too


class DiskFull(BackendError):
    """There is too little room for the pictures of a training."""

    code = "disk_full"


class ImageCache:
    """A folder of prepared pictures by address."""

    def __init__(self, folder: Path, images: ImageLoader, detector: Detector) -> None:
        self._folder, self._images, self._detector = folder, images, detector
        self._mean = torch.tensor(detector.image_format.mean)[:, None, None]
        self._std = torch.tensor(detector.image_format.std)[:, None, None]
        self._shapes: dict[str, tuple[int, ...]] = {}
        folder.mkdir(parents=True, exist_ok=True)

    def fetch(self, uris: Mapping[str, int], on_picture: Callable[[int], object]) -> dict[str, str]:
        """Fetches what is not there yet; returns the addresses that failed, and why.

        Args:
            uris: each address, with a task that has it.
            on_picture: called with the number of pictures done.

        Raises:
            DiskFull: the disk has no room for them.
        """
        failed: dict[str, str] = {}

        def fetch(uri: str) -> None:
            try:
                self._put(uri, uris[uri])
            except ImageError as error:
                failed[uri] = str(error)
            except (BackendError, OSError):  # the disk, or Label Studio: no picture's own fault
                raise
            except Exception as error:  # one odd picture is left out alone
                failed[uri] = f"the picture cannot be read ({type(error).__name__})"

        with ThreadPoolExecutor(DOWNLOAD_THREADS) as pool:
            for done, _ in enumerate(pool.map(fetch, uris), 1):
                on_picture(done)
        return failed

    def _put(self, uri: str, task: int) -> None:
        path = self._path(uri)
        if path.exists():
            with np.load(path) as row:
                self._shapes[uri] = tuple(row["shape"].tolist())
            return
        if shutil.disk_usage(self._folder).free < RESERVE:
            raise DiskFull(f"MODEL_DIR has less than {RESERVE // 10**9} GB left; make room and start again")
        picture = self._images.load(uri, task)
        prepared = self._detector.prepare(picture.image, picture.size)
        raw = ((prepared.pixels * self._std + self._mean) * 255).round().clamp(0, 255).to(torch.uint8).numpy()
        aside = path.with_suffix(".new")
        with aside.open("wb") as file:
            np.savez(file, pixels=raw, shape=raw.shape, frame=prepared.frame, size=prepared.size)
        aside.replace(path)
        self._shapes[uri] = raw.shape

    def shape(self, uri: str) -> tuple[int, ...]:
        """Channels, height and width of a picture that was fetched: only equal ones share a batch."""
        return self._shapes[uri]

    def get(self, uri: str) -> ModelInput:
        """A picture that was fetched."""
        with np.load(self._path(uri)) as row:
            pixels = (torch.from_numpy(row["pixels"]).float() / 255 - self._mean) / self._std
            frame, size = row["frame"].tolist(), row["size"].tolist()
        return ModelInput(pixels, (frame[0], frame[1]), (size[0], size[1]))

    def _path(self, uri: str) -> Path:
        return self._folder / f"{hashlib.sha256(uri.encode(errors='replace')).hexdigest()[:32]}.npz"

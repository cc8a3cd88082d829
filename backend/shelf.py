"""Pictures as the model reads them, kept on disk while it learns from them: fetched once, looked at many times."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

from backend.detector import Detector
from backend.errors import ImageError
from backend.images import Images
from backend.preprocess import Prepared

DOWNLOADS = 8  # pictures fetched at the same time


class Shelf:
    """A folder of prepared pictures by address."""

    def __init__(self, folder: Path, images: Images, detector: Detector) -> None:
        self._folder, self._images, self._detector = folder, images, detector
        folder.mkdir(parents=True, exist_ok=True)

    def fetch(self, uris: Mapping[str, int], on_picture: Callable[[int], object]) -> dict[str, str]:
        """Fetches what is not there yet; returns the addresses that failed, and why.

        Args:
            uris: each address, with a task that has it.
            on_picture: called with the number of pictures done.
        """
        failed: dict[str, str] = {}

        def fetch(uri: str) -> None:
            try:
                self._put(uri, uris[uri])
            except ImageError as error:
                failed[uri] = str(error)

        with ThreadPoolExecutor(DOWNLOADS) as pool:
            for done, _ in enumerate(pool.map(fetch, uris), 1):
                on_picture(done)
        return failed

    def _put(self, uri: str, task: int) -> None:
        path = self._path(uri)
        if path.exists():
            return
        picture = self._images.load(uri, task)
        prepared = self._detector.prepare(picture.image, picture.size)
        aside = path.with_suffix(".new")
        with aside.open("wb") as file:
            np.savez(file, pixels=prepared.pixels.half().numpy(), frame=prepared.frame, size=prepared.size)
        aside.replace(path)

    def get(self, uri: str) -> Prepared:
        """A picture that was fetched."""
        with np.load(self._path(uri)) as row:
            width, height = row["size"].tolist()
            frame = row["frame"].tolist()
            return Prepared(torch.from_numpy(row["pixels"]).float(), (frame[0], frame[1]), (width, height))

    def _path(self, uri: str) -> Path:
        return self._folder / f"{hashlib.sha256(uri.encode(errors='replace')).hexdigest()[:32]}.npz"

"""The images of a training, preprocessed and kept on disk: downloaded once, read in every epoch."""

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
from backend.errors import BackendError, DiskFull, ImageError
from backend.images.decoding import ImageLoader

DOWNLOAD_THREADS = 8
MIN_FREE_DISK = 1_000_000_000  # bytes left to others; Redis writes to the same disk


class ImageCache:
    """A folder of model inputs by URI; an `ImageProvider`."""

    def __init__(self, folder: Path, loader: ImageLoader, detector: Detector) -> None:
        self._folder, self._loader, self._detector = folder, loader, detector
        self._shapes: dict[str, tuple[int, ...]] = {}
        folder.mkdir(parents=True, exist_ok=True)

    def download(self, task_by_uri: Mapping[str, int], on_image: Callable[[int], object]) -> dict[str, str]:
        """Downloads the images that the folder lacks.

        Args:
            task_by_uri: URIs, each with a task whose data holds it: Label Studio presigns URLs for tasks only.
            on_image: called after each image with the number of images so far.

        Returns:
            The reason by URI, for images that could not be loaded.

        Raises:
            DiskFull: the disk has no room for them.
        """
        errors: dict[str, str] = {}

        def download(uri: str) -> None:
            try:
                self._add(uri, task_by_uri[uri])
            except ImageError as error:
                errors[uri] = str(error)
            except (BackendError, OSError):  # not the fault of an image: the disk, or Label Studio
                raise
            except Exception as error:  # one malformed image must not end the training
                errors[uri] = f"the image cannot be read ({type(error).__name__})"

        with ThreadPoolExecutor(DOWNLOAD_THREADS) as pool:
            for done, _ in enumerate(pool.map(download, task_by_uri), 1):
                on_image(done)
        return errors

    def _add(self, uri: str, task: int) -> None:
        path = self._get_path(uri)
        if path.exists():
            with np.load(path) as arrays:
                self._shapes[uri] = tuple(arrays["shape"].tolist())
            return
        if shutil.disk_usage(self._folder).free < MIN_FREE_DISK:
            raise DiskFull(f"MODEL_DIR has less than {MIN_FREE_DISK // 10**9} GB left; make room and start again")
        image = self._loader.load(uri, task)
        model_input = self._detector.prepare_image(image.image, image.size)
        pixels = model_input.pixels.numpy()
        temporary = path.with_suffix(".new")
        with temporary.open("wb") as file:
            np.savez(file, pixels=pixels, shape=pixels.shape[:2], padding=model_input.padding, size=model_input.size)
        temporary.replace(path)
        self._shapes[uri] = pixels.shape[:2]

    def get_shape(self, uri: str) -> tuple[int, ...]:
        """Returns height and width of a downloaded image as the model reads it."""
        return self._shapes[uri]

    def load_input(self, uri: str) -> ModelInput:
        """Loads a downloaded image."""
        with np.load(self._get_path(uri)) as arrays:
            padding, size = arrays["padding"].tolist(), arrays["size"].tolist()
            pixels = torch.from_numpy(arrays["pixels"])
        return ModelInput(pixels, (padding[0], padding[1]), (size[0], size[1]), self._detector.image_format)

    def _get_path(self, uri: str) -> Path:
        return self._folder / f"{hashlib.sha256(uri.encode(errors='replace')).hexdigest()[:32]}.npz"

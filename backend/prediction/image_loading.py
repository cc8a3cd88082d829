"""The images of a chunk, loaded in threads within a time limit."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeout  # another class than the builtin in Python 3.10

from rq.timeouts import JobTimeoutException

from backend.detection.preprocess import ModelInput
from backend.errors import BackendError, ImageError, ImageUnavailable

DOWNLOAD_THREADS = 8
LOAD_TIMEOUT = 60  # s for all images together; each has limits of its own, but a server may trickle its headers

log = logging.getLogger(__name__)

ImageOrError = ModelInput | BackendError


def load_images(tasks_by_uri: Mapping[str, int], load: Callable[[str, int], ModelInput]) -> dict[str, ImageOrError]:
    """Loads images; one that fails is an error in the result and takes no other down.

    Args:
        tasks_by_uri: each image's address with the id of a task that has it.
        load: loads one image, given its address and task; called in threads.

    Returns:
        For each address the image as the model reads it, or why it could not be loaded.
    """
    pool, deadline = ThreadPoolExecutor(DOWNLOAD_THREADS), time.monotonic() + LOAD_TIMEOUT
    futures = {uri: pool.submit(load, uri, task) for uri, task in tasks_by_uri.items()}
    images: dict[str, ImageOrError] = {}
    for uri, future in futures.items():
        try:
            images[uri] = future.result(max(deadline - time.monotonic(), 0))
        except BackendError as error:
            images[uri] = error
        except FutureTimeout:
            images[uri] = ImageUnavailable(f"the image did not arrive within {LOAD_TIMEOUT} s")
        except JobTimeoutException:
            raise
        except Exception as error:  # one odd image fails alone, whatever it made a library do
            log.error("task %s: an image raised %s", tasks_by_uri[uri], type(error).__name__)
            images[uri] = ImageError(f"the image cannot be read ({type(error).__name__})")
    pool.shutdown(wait=False, cancel_futures=True)  # a thread that hangs must not hold up the others' answers
    return images

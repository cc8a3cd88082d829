"""A worker process without a model, whose jobs sleep or raise: `python -m tests.queue.worker_program URL TIMEOUT`."""

import logging
import os
import sys
import time
from collections.abc import Mapping
from typing import Any

from backend.queue.live_workers import READY_KEY, describe_worker
from backend.queue.worker_loop import run_worker
from backend.settings import Settings
from tests.chunks import CHECKPOINT, PREDICT_QUEUE


def work(payload: Mapping[str, Any]) -> dict[str, Any]:
    end = time.monotonic() + payload.get("seconds", 0)
    while time.monotonic() < end:  # in short steps, as the steps of a model are
        time.sleep(0.01)
    if payload.get("raises"):
        raise ValueError("as requested")
    return {"pid": os.getpid()}


if __name__ == "__main__":
    logging.basicConfig(level="WARNING", stream=sys.stderr)
    settings = Settings(redis_url=sys.argv[1], stop_timeout=int(sys.argv[2]))
    info = describe_worker("cpu", "demo", CHECKPOINT, 4)
    run_worker(settings, PREDICT_QUEUE, READY_KEY, info, {"predict": work})
    os._exit(0)

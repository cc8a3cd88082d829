"""The training worker: one training at a time. It loads torch only when there is a training to do."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from typing import Any

from backend.queue.jobs import TRAIN_FUNCTION
from backend.queue.live_workers import FIT_READY_KEY, describe_worker
from backend.queue.training_queue import FIT
from backend.queue.worker_loop import run_worker
from backend.settings import Settings

log = logging.getLogger(__name__)


def run(settings: Settings) -> bool:
    """Serves the queue "fit" until one training is over, or SIGTERM or SIGINT; returns whether to serve on.

    After a training the process has to be replaced: the memory that it took does not come back otherwise. A training
    whose worker is killed resumes after its last epoch.

    Raises:
        QueueUnavailable: Redis does not answer at the start.
    """
    os.environ.setdefault("OMP_NUM_THREADS", str(max((os.cpu_count() or 2) // 2, 1)))  # predict workers want some too

    def train(payload: Mapping[str, Any]) -> dict[str, Any]:
        from backend.training.training_job import train as run_training  # loads torch

        return run_training(settings, payload)

    info = describe_worker(settings.device)
    return run_worker(settings, FIT, FIT_READY_KEY, info, {TRAIN_FUNCTION: train}, max_jobs=1)

"""The predict worker: loads the detector once, then takes chunks from the queue."""

from __future__ import annotations

import logging
import os
import signal
import sys

import torch

from backend.detection.acceleration import keep_freed_memory
from backend.metrics import GPU_MEMORY
from backend.prediction import predict_job as jobs
from backend.queue.predict_queue import PREDICT, READY_KEY, predict_queue
from backend.queue.worker_loop import heartbeat, run_worker
from backend.settings import Settings

log = logging.getLogger(__name__)


def run(settings: Settings) -> None:
    """Serves the queue "predict" until SIGTERM or SIGINT; the job in progress is finished first.

    Raises:
        CheckpointError: the model cannot be loaded.
        QueueUnavailable: Redis does not answer at the start.
    """
    keep_freed_memory()
    # beside our other data, not in /tmp: kept for the next start, and nobody else's to write
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(settings.model_dir.resolve() / "compiled"))
    tools = jobs.set_up(settings)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # until RQ sets its own: whoever is ready can be stopped
    size, device = tools.batch_size, tools.detectors.plain.device
    if device.type == "cuda":
        GPU_MEMORY.labels(str(device)).set_function(lambda: torch.cuda.memory_reserved(device))
    with heartbeat(settings, predict_queue, READY_KEY, batch_size=size, device=str(device)) as name:
        log.info("worker %s is ready on %s with %d pictures a batch", name, device, size)
        run_worker(settings, PREDICT, name)

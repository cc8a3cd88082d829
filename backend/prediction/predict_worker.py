"""The predict worker: loads the model once, then takes chunks from the queue."""

from __future__ import annotations

import logging
import os
import signal
import sys

import torch

from backend.detection.acceleration import keep_freed_memory
from backend.metrics import GPU_MEMORY
from backend.prediction.predict_job import Predictor
from backend.queue.jobs import PREDICT_FUNCTION
from backend.queue.live_workers import READY_KEY, describe_worker
from backend.queue.predict_queue import PREDICT, make_backlogs
from backend.queue.redis import connect_patiently
from backend.queue.worker_loop import run_worker
from backend.settings import Settings

log = logging.getLogger(__name__)


def run(settings: Settings) -> None:
    """Serves the queue "predict" until SIGTERM or SIGINT; the current job is finished first.

    Raises:
        CheckpointError: the model cannot be loaded.
        QueueUnavailable: Redis does not answer at the start.
    """
    keep_freed_memory()
    # In MODEL_DIR, not in the system's temporary folder: kept for the next start, and only this user may write there.
    compiled = settings.model_dir.resolve() / "compiled"
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(compiled))
    os.environ.setdefault("TRITON_CACHE_DIR", str(compiled / "triton"))
    predictor = Predictor(settings)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # until RQ sets its own handler
    device = predictor.detectors.base.device
    if device.type == "cuda":
        GPU_MEMORY.labels(str(device)).set_function(lambda: torch.cuda.memory_reserved(device))
    info = describe_worker(str(device), settings.model, predictor.checkpoint, predictor.batch_size)
    log.info("ready on %s with a batch size of %d", device, predictor.batch_size)
    refill = make_backlogs(connect_patiently(settings.redis_url), predictor.checkpoint).refill
    functions = {PREDICT_FUNCTION: predictor.predict}
    run_worker(settings, PREDICT + predictor.checkpoint, READY_KEY, info, functions, refill=refill)

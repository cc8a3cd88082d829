"""The fit worker: one training at a time. It loads torch only when there is one to do."""

from __future__ import annotations

import logging
import os

from backend.queue.predict_queue import FIT
from backend.queue.training_queue import FIT_READY_KEY, training_queue
from backend.queue.worker_loop import heartbeat, run_worker
from backend.settings import Settings

log = logging.getLogger(__name__)


def run(settings: Settings) -> bool:
    """Serves the queue "fit" until one training is over, or SIGTERM or SIGINT; says whether to serve on.

    After a training the process is to start anew: the memory that it took does not come back otherwise. Killed in the
    middle of one, it goes on from the last round when started again.

    Raises:
        QueueUnavailable: Redis does not answer at the start.
    """
    os.environ.update(settings.to_env())  # where the job reads them
    os.environ.setdefault("OMP_NUM_THREADS", str(max((os.cpu_count() or 2) // 2, 1)))  # predict workers want some too
    with heartbeat(settings, training_queue, FIT_READY_KEY, device=settings.device) as name:
        log.info("fit worker %s is ready", name)
        return run_worker(settings, FIT, name, max_jobs=1)

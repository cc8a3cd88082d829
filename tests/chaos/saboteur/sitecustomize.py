"""Python imports this at its start where this folder is on PYTHONPATH; in a worker, pictures of some widths do harm."""

import os
import signal
import sys
import time
from pathlib import Path

KILLS, HANGS, SLOW = 101, 103, 107  # pixels; at least 0.5 s for a slow one

if b"worker" in Path("/proc/self/cmdline").read_bytes().split(b"\0"):
    sys.path.insert(0, str(Path(__file__).parents[3]))
    from backend.detection.detector import Detector

    harmless = Detector._stack_pixels

    def stacked(self, batch):
        for picture in batch:
            if picture.size[0] == KILLS:
                os.kill(os.getpid(), signal.SIGKILL)
            while picture.size[0] == HANGS:
                time.sleep(1)
            if picture.size[0] == SLOW:
                time.sleep(0.5)
        return harmless(self, batch)

    Detector._stack_pixels = stacked

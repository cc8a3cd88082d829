"""Sabotages workers: images of some widths do harm. Python imports this at its start if the folder is on PYTHONPATH."""

import os
import signal
import sys
import time
from pathlib import Path

KILLS, HANGS, SLOW = 101, 103, 107  # pixels; at least 0.5 s for a slow one

if b"worker" in Path("/proc/self/cmdline").read_bytes().split(b"\0"):
    sys.path.insert(0, str(Path(__file__).parents[3]))
    from backend.detection.detector import Detector

    original_stack_pixels = Detector._stack_pixels

    def do_harm_and_stack_pixels(self, batch):
        for image in batch:
            if image.size[0] == KILLS:
                os.kill(os.getpid(), signal.SIGKILL)
            while image.size[0] == HANGS:
                time.sleep(1)
            if image.size[0] == SLOW:
                time.sleep(0.5)
        return original_stack_pixels(self, batch)

    Detector._stack_pixels = do_harm_and_stack_pixels

import subprocess
import sys
import time

from backend.queue.watchdog import EXIT_HUNG
from tests.servers import ROOT


def run(body: str) -> tuple[int, float]:
    """Runs a process that has a watchdog of half a second; returns its exit status and duration in seconds."""
    code = f"import time\nfrom backend.queue.watchdog import Watchdog\nw = Watchdog(0.5)\n{body}"
    start = time.monotonic()
    status = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False, capture_output=True).returncode
    return status, time.monotonic() - start


def test_work_without_a_beat_ends_the_process() -> None:
    status, seconds = run("with w.watching(): time.sleep(30)")
    assert status == EXIT_HUNG
    assert seconds < 5


def test_idle_beating_and_paused_work_goes_on() -> None:
    assert run("w.beat(); time.sleep(1)")[0] == 0
    assert run("with w.watching():\n for _ in range(5): time.sleep(0.2); w.beat()")[0] == 0
    assert run("with w.watching():\n with w.paused(): time.sleep(1)")[0] == 0
    assert run("with w.watching(): pass\ntime.sleep(1)")[0] == 0


def test_work_after_a_pause_is_watched_again() -> None:
    assert run("with w.watching():\n with w.paused(): pass\n time.sleep(30)")[0] == EXIT_HUNG

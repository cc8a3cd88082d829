import subprocess
import sys
import time

from backend.queue.watchdog import EXIT_HUNG
from tests.servers import ROOT


def run(body: str) -> tuple[int, float]:
    """Exit status and seconds of a process that has a watchdog of half a second."""
    code = f"import time\nfrom backend.queue.watchdog import Watchdog\nw = Watchdog(0.5)\n{body}"
    start = time.monotonic()
    status = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False, capture_output=True).returncode
    return status, time.monotonic() - start


def test_what_shows_no_sign_of_life_is_ended() -> None:
    status, seconds = run("with w.watching(): time.sleep(30)")
    assert status == EXIT_HUNG
    assert seconds < 5


def test_idleness_beats_and_pauses_are_fine() -> None:
    assert run("w.beat(); time.sleep(1)")[0] == 0
    assert run("with w.watching():\n for _ in range(5): time.sleep(0.2); w.beat()")[0] == 0
    assert run("with w.watching():\n with w.paused(): time.sleep(1)")[0] == 0
    assert run("with w.watching(): pass\ntime.sleep(1)")[0] == 0


def test_a_pause_ends() -> None:
    assert run("with w.watching():\n with w.paused(): pass\n time.sleep(30)")[0] == EXIT_HUNG

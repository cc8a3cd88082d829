"""`make bench`: start-up, latency and memory of the whole server, with the bundled checkpoint.

Prints one line per metric: median, and minimum to maximum of all runs. BENCH_FRESH=1 also times the first `make demo`
of a fresh clone, which installs everything.
"""

import os
import platform
import re
import signal
import statistics
import subprocess
import tempfile
import time
from pathlib import Path

import requests

from tests.scenes import make_labeling_config, make_scenes, to_data_uri
from tests.servers import ROOT, ServeProcess, find_free_port, wait_for

STARTS, REQUESTS = 5, 50


def show(name: str, unit: str, values: list[float]) -> None:
    low, high = min(values), max(values)
    print(
        f"{name:<52} {statistics.median(values):8.1f} {unit:<3} ({low:.1f} to {high:.1f}, {len(values)} runs)",
        flush=True,
    )


def measure_memory_mb(pid: int) -> float:
    return int(re.search(r"VmRSS:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())[1]) / 1024


def measure_front_memory_mb(served: ServeProcess) -> float:
    fronts = [pid for pid in served.list_descendants() if b"gunicorn" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    return max(map(measure_memory_mb, fronts))


def measure_requests(served: ServeProcess) -> list[float]:
    scene = make_scenes(1, (640, 480))[0]
    body = {"label_config": make_labeling_config([scene])}
    times = []
    for number in range(REQUESTS + 5):
        body["tasks"] = [{"id": number, "data": {"image": to_data_uri(scene.image)}}]  # another id: an answer is reused
        start = time.perf_counter()
        assert "result" in requests.post(f"{served.url}/predict", json=body, timeout=60).json()["results"][0]
        times.append(1000 * (time.perf_counter() - start))
    return times[5:]


def bench_warm_starts() -> None:
    ready, memory, latency = [], [], []
    for _ in range(STARTS):
        with tempfile.TemporaryDirectory() as folder:
            start = time.monotonic()
            served = ServeProcess(Path(folder))
            try:
                served.wait_until_ready()
                ready.append(time.monotonic() - start)
                latency += measure_requests(served)
                memory.append(measure_front_memory_mb(served))
            finally:
                served.stop()
    show("warm start to /ready", "s", ready)
    show("one 640x480 image through /predict", "ms", latency)
    show("memory of the web front", "MB", memory)


def bench_fresh_start() -> None:
    with tempfile.TemporaryDirectory() as folder:
        clone, port = Path(folder) / "clone", find_free_port()
        subprocess.run(["git", "clone", "-q", str(ROOT), str(clone)], check=True)
        start = time.monotonic()
        env = {**os.environ, "PORT": str(port)}
        with (Path(folder) / "log").open("wb") as log:
            make = subprocess.Popen(
                ["make", "demo"], cwd=clone, env=env, stdout=log, stderr=log, start_new_session=True
            )
        try:
            wait_for(lambda: requests.get(f"http://127.0.0.1:{port}/ready", timeout=5).ok, 1800, "ready")
            show("first `make demo` of a fresh clone to /ready", "s", [time.monotonic() - start])
        finally:
            os.killpg(make.pid, signal.SIGTERM)
            make.wait(20)


def main() -> None:
    print(f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}")
    if os.environ.get("BENCH_FRESH"):
        bench_fresh_start()
    bench_warm_starts()


if __name__ == "__main__":
    main()

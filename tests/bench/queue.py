"""`make bench`: the overhead of the queue, with the bundled checkpoint and one worker."""

import os

os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # as a worker does: threads that spin here would hold it up

import io
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import requests
from PIL import Image

from backend.labelstudio.labeling_config import read_plan
from backend.prediction.predict_job import Predictor
from backend.queue.backlogs import Place
from backend.queue.messages import Chunk, Prediction
from backend.queue.predict_queue import PredictQueue
from backend.queue.redis import connect
from backend.registry.project_model import ProjectModel
from backend.settings import Settings
from tests.bench.serving import measure_front_memory_mb, show
from tests.scenes import encode, make_labeling_config, make_scenes
from tests.servers import ServeProcess, http_server, send_reply

SINGLE, BULK, LARGE = 200, 1000, 10_000
BATCH = 16
SCENE = make_scenes(1, (640, 480))[0]
CONFIG, JPEG = make_labeling_config([SCENE]), encode(SCENE.image, "JPEG")


def measure_seconds(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def predict(served: ServeProcess, uri: str, first: int, count: int) -> list[dict[str, Any]]:
    tasks = [{"id": first + i, "data": {"image": uri}} for i in range(count)]
    body = {"tasks": tasks, "label_config": CONFIG, "project": "1.1", "params": {}}
    return requests.post(f"{served.url}/predict", json=body, timeout=1000).json()["results"]


def bench_single_tasks(served: ServeProcess, uri: str, predictor: Predictor) -> None:
    """Measures in turn: an image fetched and predicted in this process, as a job, and through a request."""
    project_model = ProjectModel(Settings(model="demo"), CONFIG)
    connection = connect((served.model_dir / "redis.url").read_text())
    queue = PredictQueue(connection, project_model.checkpoint.fingerprint)

    def make_chunk(number: int) -> Chunk:
        return project_model.make_chunks([{"id": -number, "data": {"image": uri}}], 1)[0]

    def predict_as_job(number: int) -> None:
        (job,) = queue.enqueue([make_chunk(number)], Place.URGENT)
        (answer,) = queue.wait(job, time.monotonic() + 60)
        assert isinstance(answer, Prediction)

    direct, queued, requested = [], [], []
    for number in range(SINGLE + 10):
        rows = [
            measure_seconds(lambda number=number: predictor.predict(make_chunk(number).payload)),
            measure_seconds(lambda number=number: predict_as_job(number)),
            measure_seconds(lambda number=number: predict(served, uri, 10**6 + number, 1)),
        ]
        if number >= 10:
            for values, value in zip((direct, queued, requested), rows, strict=True):
                values.append(1000 * value)
    show("one 640x480 JPEG, fetched and predicted in-process", "ms", direct)
    show("the same as a job", "ms", queued)
    show("the same through /predict", "ms", requested)
    show("the queue adds", "ms", [b - a for a, b in zip(direct, queued, strict=True)])


def bench_bulk(served: ServeProcess, uri: str, predictor: Predictor) -> None:
    """Measures 1,000 tasks in one request, and then single tasks that an annotator opens meanwhile."""
    batch, labels = (
        [Image.open(io.BytesIO(JPEG)).convert("RGB")] * BATCH,
        read_plan(CONFIG, 0.3, 0.7).controls[0].labels,
    )
    alone = measure_seconds(
        lambda: [predictor.detectors.base.detect(batch, labels, nms_iou=0.7) for _ in range(BULK // BATCH)]
    )
    rate = BATCH * (BULK // BATCH) / alone
    through = BULK / measure_seconds(lambda: predict(served, uri, 1, BULK))
    print(f"1,000 tasks: detector alone {rate:.1f}/s, through /predict {through:.1f}/s, {through / rate:.2f} of it")
    waits: list[float] = []
    done = threading.Event()

    def annotate() -> None:
        number = 2 * 10**6
        while not done.is_set():
            number += 1
            waits.append(1000 * measure_seconds(lambda number=number: predict(served, uri, number, 1)))
            time.sleep(0.2)

    with ThreadPoolExecutor(1) as pool:
        annotator = pool.submit(annotate)
        predict(served, uri, 10**5, BULK)
        done.set()
        annotator.result()
    show("one task opened during a bulk request of 1,000", "ms", waits)
    print(
        f"  95% within {statistics.quantiles(waits, n=20)[-1]:.0f} ms; one chunk of {BATCH} takes {16000 / rate:.0f} ms"
    )


def bench_memory(served: ServeProcess) -> None:
    """Measures how much a request of 10,000 tasks with plain addresses makes the web front grow."""
    before = measure_front_memory_mb(served)
    peak: list[float] = [before]
    done = threading.Event()

    def watch() -> None:
        while not done.wait(0.05):
            peak.append(measure_front_memory_mb(served))

    watcher = threading.Thread(target=watch)
    watcher.start()
    tasks = [{"id": i, "data": {"image": f"http://127.0.0.1:1/images/{i:06}.jpg"}} for i in range(LARGE)]
    body = {"tasks": tasks, "label_config": CONFIG, "project": "1.1", "params": {}}
    requests.post(f"{served.url}/predict", json=body, timeout=1000)
    done.set()
    watcher.join()
    print(f"the web front grew from {before:.0f} MB by {max(peak) - before:.0f} MB for 10,000 tasks")


def main() -> None:
    predictor = Predictor(Settings(model="demo", batch_size=BATCH, allowed_image_hosts="127.0.0.1"))
    with tempfile.TemporaryDirectory() as folder, http_server(lambda request: send_reply(request, JPEG)) as url:
        served = ServeProcess(Path(folder), PREDICT_DEADLINE="900", BATCH_SIZE=str(BATCH), LOG_LEVEL="ERROR")
        try:
            served.wait_until_ready()
            bench_single_tasks(served, f"{url}/a.jpg", predictor)
            bench_bulk(served, f"{url}/a.jpg", predictor)
            bench_memory(served)
        finally:
            served.stop()


if __name__ == "__main__":
    main()

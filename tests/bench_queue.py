"""`make bench`: what the queue costs beside the detector, with the bundled checkpoint and one worker."""

import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import requests

from backend.checkpoints import load_checkpoint
from backend.detector import Detector
from backend.labeling import Label, read_plan
from backend.queues import PredictQueue, connect
from backend.versions import DEMO
from tests.bench import front_memory, show
from tests.pictures import config_for, data_uri, scenes
from tests.running import Served

SINGLE, BULK, LARGE = 200, 1000, 10_000
BATCH = 16
SCENE = scenes(1, (640, 480))[0]
URI, CONFIG = data_uri(SCENE.image), config_for([SCENE])


def seconds(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def ask(served: Served, first: int, count: int) -> list[dict[str, Any]]:
    tasks = [{"id": first + i, "data": {"image": URI}} for i in range(count)]
    body = {"tasks": tasks, "label_config": CONFIG, "project": "1.1", "params": {}}
    return requests.post(f"{served.url}/predict", json=body, timeout=1000).json()["results"]


def labels() -> tuple[Label, ...]:
    return read_plan(CONFIG, 0.3, 0.7).controls[0].labels


def single(served: Served, detector: Detector) -> None:
    """In turn: the detector in this process, a job through the queue, and a request."""
    queue = PredictQueue(connect((served.model_dir / "redis.url").read_text()))
    plan = read_plan(CONFIG, 0.3, 0.7)
    common = {"plan": plan.to_dict(), "model_version": "bench", "fingerprint": fingerprint(served)}

    def through_queue(number: int) -> None:
        (job,) = queue.enqueue([{"tasks": [{"id": -number, "data": {"image": URI}}], **common}], at_front=True)
        assert "result" in queue.wait(job, time.monotonic() + 60)["answers"][0]

    direct, queued, asked = [], [], []
    for number in range(SINGLE + 10):
        rows = [
            seconds(lambda: detector.detect([SCENE.image], plan.controls[0].labels, nms_iou=0.7)),
            seconds(lambda number=number: through_queue(number)),
            seconds(lambda number=number: ask(served, 10**6 + number, 1)),
        ]
        if number >= 10:
            for values, value in zip((direct, queued, asked), rows, strict=True):
                values.append(1000 * value)
    show("one 640x480 picture, detector in the process", "ms", direct)
    show("the same as a job (decodes the picture too)", "ms", queued)
    show("the same through /predict", "ms", asked)


def fingerprint(served: Served) -> str:
    from backend.versions import find_checkpoint

    return find_checkpoint("demo").fingerprint


def bulk(served: Served, detector: Detector) -> None:
    """1,000 tasks in one request, while an annotator opens one after the other."""
    batches = [[SCENE.image] * BATCH] * (BULK // BATCH)
    alone = seconds(lambda: [detector.detect(batch, labels(), nms_iou=0.7) for batch in batches])
    rate = BATCH * len(batches) / alone
    through = BULK / seconds(lambda: ask(served, 1, BULK))
    print(f"1,000 tasks: detector alone {rate:.1f}/s, through /predict {through:.1f}/s, {through / rate:.2f} of it")
    waits: list[float] = []
    done = threading.Event()

    def annotate() -> None:
        number = 2 * 10**6
        while not done.is_set():
            number += 1
            waits.append(1000 * seconds(lambda number=number: ask(served, number, 1)))
            time.sleep(0.2)

    with ThreadPoolExecutor(1) as pool:
        annotating = pool.submit(annotate)
        ask(served, 10**5, BULK)
        done.set()
        annotating.result()
    show("one task opened during a bulk of 1,000", "ms", waits)
    print(
        f"  95% within {statistics.quantiles(waits, n=20)[-1]:.0f} ms; one chunk of {BATCH} takes {16000 / rate:.0f} ms"
    )


def memory(served: Served) -> None:
    """Of the web front, by a request of 10,000 tasks with plain addresses."""
    before = front_memory(served)
    peak: list[float] = [before]
    done = threading.Event()

    def watch() -> None:
        while not done.wait(0.05):
            peak.append(front_memory(served))

    watcher = threading.Thread(target=watch)
    watcher.start()
    tasks = [{"id": i, "data": {"image": f"http://127.0.0.1:1/pictures/{i:06}.jpg"}} for i in range(LARGE)]
    body = {"tasks": tasks, "label_config": CONFIG, "project": "1.1", "params": {}}
    requests.post(f"{served.url}/predict", json=body, timeout=1000)
    done.set()
    watcher.join()
    print(f"the web front grew from {before:.0f} MB by {max(peak) - before:.0f} MB for 10,000 tasks")


def main() -> None:
    detector = Detector(*load_checkpoint(str(DEMO)))
    with tempfile.TemporaryDirectory() as folder:
        served = Served(Path(folder), PREDICT_DEADLINE="900", BATCH_SIZE=str(BATCH), LOG_LEVEL="ERROR")
        try:
            served.wait_until_ready()
            single(served, detector)
            bulk(served, detector)
            memory(served)
        finally:
            served.stop()


if __name__ == "__main__":
    main()

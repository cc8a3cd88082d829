"""Training jobs that fail or are interrupted, on a stub: a real Label Studio never fails on demand (see tests/e2e)."""

import itertools
import json
import os
import resource
import signal
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
import requests
from redis import Redis

from backend.queue.messages import TrainingRequest
from backend.queue.training_queue import TrainingQueue
from backend.registry.versions import VersionStore
from backend.settings import Settings
from backend.training import training_job
from backend.training.dataset import choose_split
from backend.training.pipeline import MIN_EVALUATION_IMAGES, MIN_TRAIN_IMAGES
from backend.training.training_job import train as run_training
from tests.scenes import encode, make_labeling_config, make_scenes
from tests.servers import ServeProcess, http_server, send_reply, wait_for

SCENES = make_scenes(8, (160, 120), seed=21)
CONFIG = make_labeling_config(SCENES)


def make_region(label: str, x: float, y: float, width: float, height: float) -> dict[str, Any]:
    value = {"x": x, "y": y, "width": width, "height": height, "rotation": 0, "rectanglelabels": [label]}
    return {"from_name": "label", "to_name": "image", "type": "rectanglelabels", "value": value}


def make_task(number: int, result: list[dict[str, Any]]) -> dict[str, Any]:
    data = {"image": f"/data/upload/7/{number}.png"}
    return {"id": number, "data": data, "annotations": [{"id": number, "result": result, "updated_at": "2026"}]}


def make_regions(number: int) -> list[dict[str, Any]]:
    scene = SCENES[number % len(SCENES)]
    width, height = scene.image.size
    percent_x, percent_y = 100 / width, 100 / height
    return [
        make_region(
            f"{s.colour} {s.shape}", x1 * percent_x, y1 * percent_y, (x2 - x1) * percent_x, (y2 - y1) * percent_y
        )
        for s in scene.shapes
        for x1, y1, x2, y2 in [s.box_xyxy]
    ]


def passes_filter(task: dict[str, Any], item: dict[str, Any]) -> bool:
    """Returns whether a task passes a filter of the Data Manager; a skipped annotation counts as cancelled only."""
    skipped = [bool(annotation.get("was_cancelled")) for annotation in task["annotations"]]
    counts = {"id": task["id"], "total_annotations": skipped.count(False), "cancelled_annotations": skipped.count(True)}
    value = counts[item["filter"].removeprefix("filter:tasks:")]
    return value > item["value"] if item["operator"] == "greater" else value == item["value"]


PAGE = 100  # tasks, to which this Label Studio limits a page


class Stub:
    """Answers as Label Studio does; it is unavailable to the first `failures` requests for tasks."""

    def __init__(self, tasks: list[dict[str, Any]], failures: int = 0, config: str = CONFIG) -> None:
        self.tasks, self.failures, self.config, self.queries = tasks, failures, config, 0

    def __call__(self, request: BaseHTTPRequestHandler) -> None:
        parts = urlsplit(request.path)
        if parts.path.startswith("/data/upload/"):
            number = int(Path(parts.path).stem)
            send_reply(request, encode(SCENES[number % len(SCENES)].image))
            return
        if parts.path == "/api/version":
            send_reply(request, b'{"release": "1.23.2"}')
            return
        if parts.path.startswith("/api/projects/"):
            send_reply(
                request, json.dumps({"label_config": self.config, "created_at": "2026-11-22T07:57:05.3Z"}).encode()
            )
            return
        self.queries += 1
        if self.queries <= self.failures:
            send_reply(request, b"{}", 503)
            return
        items = json.loads(parse_qs(parts.query)["query"][0])["filters"]["items"]
        tasks = [task for task in self.tasks if all(passes_filter(task, item) for item in items)]
        tasks = sorted(tasks, key=lambda task: task["id"])[:PAGE]
        send_reply(request, json.dumps({"tasks": tasks}).encode())


Train = Callable[..., dict[str, Any]]


@pytest.fixture
def train(connection: Redis, redis_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Train:
    """Returns a function that trains project 7 in this process and returns the outcome."""
    monkeypatch.setattr(training_job, "RETRY_DELAYS", (0.01, 0.01, 0.01))

    def run(stub: Stub, train: str = "thresholds", run: str = "1") -> dict[str, Any]:
        with http_server(stub) as url:
            settings = Settings(
                model="demo", model_dir=tmp_path, redis_url=redis_url, label_studio_url=url, label_studio_api_key="key"
            )
            request = TrainingRequest(project="7", train=train, run=run)
            outcome = run_training(settings, request.model_dump())
        assert TrainingQueue(connection).get_progress("7")["text"] == outcome["text"]
        return outcome

    return run


SKIPPED = {**make_task(1, []), "annotations": [{"result": [], "was_cancelled": True}]}


@pytest.mark.parametrize(
    ("tasks", "text"),
    [
        ([], "there are no annotations to train on"),
        ([make_task(1, make_regions(1))], "only 1 image to evaluate on"),
        ([SKIPPED, {**SKIPPED, "id": 2}], "left out: 2 tasks that were skipped"),
        (
            [make_task(n, make_regions(n)) for n in range(1, 7)],
            "fine-tuning needs 10 images to train on, and there are",
        ),
    ],
)
def test_too_few_annotations_are_reported(train: Train, tmp_path: Path, tasks: list[Any], text: str) -> None:
    assert text in train(Stub(tasks), "encoder")["text"]
    assert VersionStore(tmp_path, "7").list_versions() == []


def test_10000_boxes_in_one_task_and_a_label_without_examples(train: Train) -> None:
    many = [make_region("red circle", i % 100 * 0.9, i // 100 * 0.9, 0.5, 0.5) for i in range(10_000)]
    outcome = train(Stub([make_task(1, many), *(make_task(n, make_regions(n)) for n in range(2, 20))]))
    assert outcome["state"] == "done"


def test_all_pages_of_tasks_are_read(train: Train) -> None:
    tasks = [make_task(n, make_regions(n)) for n in range(1, PAGE + 21)]
    outcome = train(Stub(tasks))
    assert outcome["metrics"]["pictures"] == PAGE + 20


def test_an_image_that_cannot_be_loaded_is_left_out(train: Train) -> None:
    broken = {**make_task(1, make_regions(1)), "data": {"image": "http://127.0.0.1:1/gone.png"}}
    outcome = train(Stub([broken, *(make_task(n, make_regions(n)) for n in range(2, 9))]))
    assert outcome["left_out"] == {"images that cannot be read": 1}
    assert outcome["metrics"]["pictures"] == 7


def test_label_studio_may_be_unavailable_for_a_while(train: Train) -> None:
    tasks = [make_task(n, make_regions(n)) for n in range(1, 9)]
    assert train(Stub(tasks, failures=2))["state"] == "done"


def test_a_training_fails_if_label_studio_stays_unavailable(train: Train) -> None:
    outcome = train(Stub([], failures=99))
    assert (outcome["state"], outcome["text"]) == ("failed", "Label Studio cannot answer now (HTTP 503)")


def test_a_training_fails_if_the_config_cannot_be_served_any_more(train: Train) -> None:
    outcome = train(Stub([make_task(1, make_regions(1))], config="<View/>"))
    assert outcome["state"] == "failed"
    assert "no Image" in outcome["text"]


def choose_fewest_tasks() -> list[int]:
    """Returns the ids of the fewest tasks of project 7 that suffice for fine-tuning."""
    missing = {"train": MIN_TRAIN_IMAGES, "validation": MIN_EVALUATION_IMAGES, "held_out": MIN_EVALUATION_IMAGES}
    chosen = []
    for task in itertools.count(1):
        split = choose_split("7", task)
        if missing[split]:
            missing[split] -= 1
            chosen.append(task)
        if not any(missing.values()):
            return chosen
    raise AssertionError("not reached")


def test_a_full_disk_leaves_the_serving_version(train: Train, tmp_path: Path) -> None:
    tasks = [make_task(n, make_regions(n)) for n in choose_fewest_tasks()]
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, hard))  # the state that training saves is larger
    try:
        outcome = train(Stub(tasks, config=CONFIG.replace("red", "zorp")), "encoder")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert outcome["state"] == "failed"
    assert "MODEL_DIR cannot be used (File too large)" in outcome["text"]
    assert VersionStore(tmp_path, "7").get_serving("any") is None


@pytest.mark.timeout(300)
def test_a_killed_training_resumes_after_its_last_epoch(start_server: Callable[..., ServeProcess]) -> None:
    tasks = [make_task(n, make_regions(n)) for n in choose_fewest_tasks()]
    for task in tasks:  # an unknown word, so that training takes some epochs
        for region in task["annotations"][0]["result"]:
            region["value"]["rectanglelabels"] = ["zorp"]
    label_config = (
        '<View><Image name="image" value="$image"/><RectangleLabels name="label" toName="image"><Label value="zorp"/>'
        "</RectangleLabels></View>"
    )
    with http_server(Stub(tasks, config=label_config)) as url:
        server = start_server(LABEL_STUDIO_URL=url, LABEL_STUDIO_API_KEY="key")
        server.wait_until_ready()

        def get_progress() -> dict[str, Any]:
            trainings = requests.get(f"{server.url}/versions", timeout=5).json()["trainings"]
            return trainings[0] if trainings else {}

        def has_two_epochs() -> bool:
            progress = get_progress()
            return progress.get("state") == "training" and progress["done"] >= 2

        start = {"action": "START_TRAINING", "project": {"id": 7}}
        first = requests.post(f"{server.url}/webhook", json=start, timeout=5).json()
        wait_for(has_two_epochs, 120, "two epochs")
        assert requests.post(f"{server.url}/webhook", json=start, timeout=5).json() == first
        epochs_before_kill = get_progress()["done"]
        os.kill(find_training_worker(server), signal.SIGKILL)
        reported_epochs = []

        def has_resumed() -> bool:
            time.sleep(0.2)
            progress = get_progress()
            if progress.get("state") == "training":
                reported_epochs.append(progress["done"])
            has_ended = progress.get("state") in ("done", "failed")
            return has_ended or (bool(reported_epochs) and reported_epochs[-1] > epochs_before_kill)

        wait_for(has_resumed, 200, "another epoch")
        assert get_progress()["state"] != "failed", get_progress()
        assert min(reported_epochs) >= epochs_before_kill


def find_training_worker(server: ServeProcess) -> int:
    """Returns the id of the process that runs trainings."""
    commands = {pid: Path(f"/proc/{pid}/cmdline").read_text().split("\0") for pid in server.list_descendants()}
    return next(pid for pid, arguments in commands.items() if "fit" in arguments)

"""Trainings when things go wrong; tests/e2e has them with the real Label Studio, which will not do so on demand."""

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

from backend.labelstudio.client import PAGE
from backend.queue.training_queue import TrainingQueue
from backend.registry.versions import VersionStore
from backend.settings import Settings
from backend.training import training_job as fit_module
from backend.training.training_job import fit
from tests.scenes import config_for, encode, scenes
from tests.servers import Served, http_server, reply, wait_for

DRAWN = scenes(8, (160, 120), seed=21)
CONFIG = config_for(DRAWN)
CREATED = 1795334225


def region(label: str, x: float, y: float, width: float, height: float) -> dict[str, Any]:
    value = {"x": x, "y": y, "width": width, "height": height, "rotation": 0, "rectanglelabels": [label]}
    return {"from_name": "label", "to_name": "image", "type": "rectanglelabels", "value": value}


def annotated(number: int, result: list[dict[str, Any]]) -> dict[str, Any]:
    data = {"image": f"/data/upload/7/{number}.png"}
    return {"id": number, "data": data, "annotations": [{"id": number, "result": result, "updated_at": "2026"}]}


def truth(number: int) -> list[dict[str, Any]]:
    scene = DRAWN[number % len(DRAWN)]
    width, height = scene.image.size
    across, down = 100 / width, 100 / height
    return [
        region(f"{s.colour} {s.shape}", x1 * across, y1 * down, (x2 - x1) * across, (y2 - y1) * down)
        for s in scene.shapes
        for x1, y1, x2, y2 in [s.box_xyxy]
    ]


def fits(task: dict[str, Any], item: dict[str, Any]) -> bool:
    """Whether a task passes a filter of the Data Manager; a skipped annotation counts as cancelled alone."""
    skipped = [bool(annotation.get("was_cancelled")) for annotation in task["annotations"]]
    counts = {"id": task["id"], "total_annotations": skipped.count(False), "cancelled_annotations": skipped.count(True)}
    value = counts[item["filter"].removeprefix("filter:tasks:")]
    return value > item["value"] if item["operator"] == "greater" else value == item["value"]


class Stub:
    """Answers as Label Studio does; the first `away` requests for tasks find it gone."""

    def __init__(self, tasks: list[dict[str, Any]], away: int = 0, config: str = CONFIG) -> None:
        self.tasks, self.away, self.config, self.query = tasks, away, config, 0

    def __call__(self, request: BaseHTTPRequestHandler) -> None:
        parts = urlsplit(request.path)
        if parts.path.startswith("/data/upload/"):
            number = int(Path(parts.path).stem)
            reply(request, encode(DRAWN[number % len(DRAWN)].image))
            return
        if parts.path == "/api/version":
            reply(request, b'{"release": "1.23.2"}')
            return
        if parts.path.startswith("/api/projects/"):
            reply(request, json.dumps({"label_config": self.config, "created_at": "2026-11-22T07:57:05.3Z"}).encode())
            return
        self.query += 1
        if self.query <= self.away:
            reply(request, b"{}", 503)
            return
        items = json.loads(parse_qs(parts.query)["query"][0])["filters"]["items"]
        rows = [task for task in self.tasks if all(fits(task, item) for item in items)]
        rows = sorted(rows, key=lambda task: task["id"])[:PAGE]
        reply(request, json.dumps({"tasks": rows}).encode())


Train = Callable[..., dict[str, Any]]


@pytest.fixture
def train(connection: Redis, redis_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Train:
    """Trains project 7 in this process; what comes of it."""
    monkeypatch.setattr(fit_module, "RETRY_DELAYS", (0.01, 0.01, 0.01))

    def run(stub: Stub, train: str = "thresholds", run: str = "1") -> dict[str, Any]:
        with http_server(stub) as url:
            settings = Settings(
                model="demo", model_dir=tmp_path, redis_url=redis_url, label_studio_url=url, label_studio_api_key="key"
            )
            for name, value in settings.to_env().items():
                monkeypatch.setenv(name, value)
            outcome = fit({"project": "7", "train": train, "run": run})
        assert TrainingQueue(connection).progress("7")["text"] == outcome["text"]
        return outcome

    return run


SKIPPED = {**annotated(1, []), "annotations": [{"result": [], "was_cancelled": True}]}


@pytest.mark.parametrize(
    ("tasks", "text"),
    [
        ([], "there are no annotations to learn from"),
        ([annotated(1, truth(1))], "1 picture to judge by are too few"),
        ([SKIPPED, {**SKIPPED, "id": 2}], "left out: 2 tasks that were skipped"),
        ([annotated(n, truth(n)) for n in range(1, 7)], "fine-tuning needs 10 pictures to train on, and there are"),
    ],
)  # fmt: skip
def test_too_little_to_learn_from_is_said(train: Train, tmp_path: Path, tasks: list[Any], text: str) -> None:
    assert text in train(Stub(tasks), "encoder")["text"]
    assert VersionStore(tmp_path, "7").all() == []


def test_10000_boxes_in_one_task_and_a_label_without_examples(train: Train) -> None:
    many = [region("red circle", i % 100 * 0.9, i // 100 * 0.9, 0.5, 0.5) for i in range(10_000)]
    outcome = train(Stub([annotated(1, many), *(annotated(n, truth(n)) for n in range(2, 20))]))
    assert outcome["state"] == "done"


def test_more_than_a_page_of_tasks_is_read(train: Train) -> None:
    tasks = [annotated(n, truth(n)) for n in range(1, PAGE + 21)]
    outcome = train(Stub(tasks))
    assert outcome["metrics"]["pictures"] == PAGE + 20


def test_a_picture_that_cannot_be_had_is_left_out(train: Train) -> None:
    gone = {**annotated(1, truth(1)), "data": {"image": "http://127.0.0.1:1/gone.png"}}
    outcome = train(Stub([gone, *(annotated(n, truth(n)) for n in range(2, 9))]))
    assert outcome["left_out"] == {"pictures that cannot be read": 1}
    assert outcome["metrics"]["pictures"] == 7


def test_label_studio_may_be_away_for_a_while(train: Train) -> None:
    tasks = [annotated(n, truth(n)) for n in range(1, 9)]
    assert train(Stub(tasks, away=2))["state"] == "done"


def test_label_studio_that_stays_away_ends_it_with_the_reason(train: Train) -> None:
    outcome = train(Stub([], away=99))
    assert (outcome["state"], outcome["text"]) == ("failed", "Label Studio cannot answer now (HTTP 503)")


def test_a_config_that_cannot_be_served_any_more_ends_it_with_the_reason(train: Train) -> None:
    outcome = train(Stub([annotated(1, truth(1))], config="<View/>"))
    assert outcome["state"] == "failed"
    assert "no Image" in outcome["text"]


def deleting(number: int) -> list[dict[str, Any]]:
    """What annotators leave who delete each box of one label."""
    return [row for row in truth(number) if row["value"]["rectanglelabels"] != ["red circle"]]


def test_a_full_disk_leaves_what_serves(train: Train, tmp_path: Path) -> None:
    tasks = [annotated(n, truth(n)) for n in range(1, 61)]
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, hard))  # the state of a training is larger
    try:
        outcome = train(Stub(tasks, config=CONFIG.replace("red", "zorp")), "encoder")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert outcome["state"] == "failed"
    assert "MODEL_DIR cannot be used (File too large)" in outcome["text"]
    assert VersionStore(tmp_path, "7").get_serving("any") is None


@pytest.mark.timeout(300)
def test_killed_in_the_middle_it_goes_on_where_it_was(start_server: Callable[..., Served]) -> None:
    tasks = [annotated(n, truth(n)) for n in range(1, 61)]
    for task in tasks:  # a word to learn, so that training takes some rounds
        for row in task["annotations"][0]["result"]:
            row["value"]["rectanglelabels"] = ["zorp"]
    zorp = (
        '<View><Image name="image" value="$image"/><RectangleLabels name="label" toName="image"><Label value="zorp"/>'
    )
    with http_server(Stub(tasks, config=f"{zorp}</RectangleLabels></View>")) as url:
        served = start_server(LABEL_STUDIO_URL=url, LABEL_STUDIO_API_KEY="key")
        served.wait_until_ready()

        def row() -> dict[str, Any]:
            rows = requests.get(f"{served.url}/versions", timeout=5).json()["trainings"]
            return rows[0] if rows else {}

        start = {"action": "START_TRAINING", "project": {"id": 7}}
        first = requests.post(f"{served.url}/webhook", json=start, timeout=5).json()
        wait_for(lambda: row().get("state") == "training" and row()["done"] >= 2, 120, "two rounds")
        assert requests.post(f"{served.url}/webhook", json=start, timeout=5).json() == first
        done = row()["done"]
        os.kill(fit_worker(served), signal.SIGKILL)
        seen = []

        def goes_on() -> bool:
            time.sleep(0.2)
            now = row()
            if now.get("state") == "training":
                seen.append(now["done"])
            return now.get("state") in ("done", "failed") or (bool(seen) and seen[-1] > done)

        wait_for(goes_on, 200, "another round")
        assert row()["state"] != "failed", row()
        assert min(seen) >= done


def fit_worker(served: Served) -> int:
    commands = {pid: Path(f"/proc/{pid}/cmdline").read_text().split("\0") for pid in served.children()}
    return next(pid for pid, words in commands.items() if "fit" in words)

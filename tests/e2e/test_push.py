"""Large selections are pushed into a real Label Studio, each prediction once, also when it goes away meanwhile."""

import collections
import os
import time
from pathlib import Path

import pytest
import requests

from tests.e2e.studio import LEGACY_TOKEN, LabelStudio, Project, running_label_studio
from tests.scenes import make_labeling_config, make_scenes, to_data_uri
from tests.servers import ServeProcess, find_free_port, wait_for

pytestmark = pytest.mark.timeout(900)

TASKS = 250
AWAY = 60 if os.environ.get("CHAOS") == "full" else 10  # s, besides what its start takes
DRAWN = make_scenes(5, (96, 96))


def start_backend(folder: Path, url: str) -> ServeProcess:
    folder.mkdir()
    served = ServeProcess(folder, LABEL_STUDIO_URL=url, LABEL_STUDIO_API_KEY=LEGACY_TOKEN, BATCH_SIZE="5")
    served.wait_until_ready()
    return served


def create_project(studio: LabelStudio, title: str, backend: ServeProcess) -> Project:
    project = studio.create_project(title, make_labeling_config(DRAWN), {})
    tasks = [{"data": {"image": to_data_uri(DRAWN[i % 5].image), "number": i}} for i in range(TASKS)]
    studio.call("POST", f"/api/projects/{project.number}/import", json=tasks)
    project.connect(backend.url)
    return project


def per_task(project: Project) -> collections.Counter:
    return collections.Counter(prediction["task"] for prediction in project.predictions())


def retrieve(project: Project) -> None:
    project.action("retrieve_tasks_predictions", [task["id"] for task in project.tasks()])


def test_one_click_brings_every_task_exactly_one_prediction(studio: LabelStudio, tmp_path: Path) -> None:
    backend = start_backend(tmp_path / "b", studio.url)
    try:
        project = create_project(studio, "bulk", backend)
        start = time.monotonic()
        retrieve(project)
        assert time.monotonic() - start < 30  # it did not wait for them
        wait_for(lambda: len(per_task(project)) == TASKS, 120, "a prediction for every task")
        time.sleep(3)
        assert set(per_task(project).values()) == {1}
        assert {p["model_version"] for p in project.predictions()} == {project.model_version()}
        retrieve(project)
        time.sleep(3)
        assert set(per_task(project).values()) == {1}
    finally:
        backend.stop()


def test_another_label_studio_with_the_same_numbers_is_left_alone(studio: LabelStudio, tmp_path: Path) -> None:
    backend = start_backend(tmp_path / "b", studio.url)
    try:
        project = create_project(studio, "strange", backend)
        ids = [task["id"] for task in project.tasks()][:60]
        others = [to_data_uri(DRAWN[(i + 1) % 5].image) for i in range(60)]  # not what the project holds
        elsewhere = [{"id": number, "data": {"image": uri}} for number, uri in zip(ids, others, strict=True)]
        body = {
            "tasks": elsewhere,
            "label_config": make_labeling_config(DRAWN),
            "project": f"{project.number}.1",
            "params": {},
        }
        requests.post(f"{backend.url}/predict", json=body, timeout=60)
        wait_for(lambda: "has other data than the requesting project" in backend.read_log(), 30, "a line in the log")
        assert project.predictions() == []
        answers = requests.post(f"{backend.url}/predict", json=body, timeout=60).json()["results"]
        assert all("result" in answer for answer in answers)  # pulled from now on
    finally:
        backend.stop()


def test_label_studio_goes_away_while_predictions_are_pushed(tmp_path: Path) -> None:
    port, folder = find_free_port(), tmp_path / "studio"
    folder.mkdir()
    with running_label_studio(folder, port) as studio:
        backend = start_backend(tmp_path / "b", studio.url)
        project = create_project(studio, "away", backend)
        retrieve(project)
        wait_for(lambda: project.predictions(), 60, "some predictions")
    try:
        time.sleep(AWAY)
        with running_label_studio(folder, port):
            wait_for(lambda: len(per_task(project)) == TASKS, 180, "a prediction for every task")
            time.sleep(25)  # what an import did that was cut off is looked at only then
            assert set(per_task(project).values()) == {1}
    finally:
        backend.stop()

"""Large selections are pushed into a real Label Studio, each prediction once, also when it goes away meanwhile."""

import collections
import os
import time
from pathlib import Path

import pytest
import requests

from tests.e2e.label_studio import LEGACY_TOKEN, LabelStudio, Project, running_label_studio
from tests.scenes import make_labeling_config, make_scenes, to_data_uri
from tests.servers import ServeProcess, find_free_port, wait_for

pytestmark = pytest.mark.timeout(900)

TASKS = 250
OUTAGE = 60 if os.environ.get("CHAOS") == "full" else 10  # s, in addition to its start
DRAWN = make_scenes(5, (96, 96))


def start_backend(folder: Path, url: str) -> ServeProcess:
    folder.mkdir()
    served = ServeProcess(folder, LABEL_STUDIO_URL=url, LABEL_STUDIO_API_KEY=LEGACY_TOKEN, BATCH_SIZE="5")
    served.wait_until_ready()
    return served


def create_project(label_studio: LabelStudio, title: str, backend: ServeProcess) -> Project:
    project = label_studio.create_project(title, make_labeling_config(DRAWN), {})
    tasks = [{"data": {"image": to_data_uri(DRAWN[i % 5].image), "number": i}} for i in range(TASKS)]
    label_studio.call("POST", f"/api/projects/{project.number}/import", json=tasks)
    project.connect(backend.url)
    return project


def count_by_task(project: Project) -> collections.Counter:
    return collections.Counter(prediction["task"] for prediction in project.list_predictions())


def retrieve(project: Project) -> None:
    project.run_action("retrieve_tasks_predictions", [task["id"] for task in project.list_tasks()])


def test_one_click_brings_every_task_exactly_one_prediction(label_studio: LabelStudio, tmp_path: Path) -> None:
    backend = start_backend(tmp_path / "b", label_studio.url)
    try:
        project = create_project(label_studio, "bulk", backend)
        start = time.monotonic()
        retrieve(project)
        assert time.monotonic() - start < 30  # the request did not wait for its predictions
        wait_for(lambda: len(count_by_task(project)) == TASKS, 120, "a prediction for every task")
        time.sleep(3)
        assert set(count_by_task(project).values()) == {1}
        assert {p["model_version"] for p in project.list_predictions()} == {project.get_model_version()}
        retrieve(project)
        time.sleep(3)
        assert set(count_by_task(project).values()) == {1}
    finally:
        backend.stop()


def test_another_label_studio_with_the_same_numbers_is_left_alone(label_studio: LabelStudio, tmp_path: Path) -> None:
    backend = start_backend(tmp_path / "b", label_studio.url)
    try:
        project = create_project(label_studio, "mismatched", backend)
        ids = [task["id"] for task in project.list_tasks()][:60]
        others = [to_data_uri(DRAWN[(i + 1) % 5].image) for i in range(60)]  # other images than in the project
        elsewhere = [{"id": number, "data": {"image": uri}} for number, uri in zip(ids, others, strict=True)]
        body = {
            "tasks": elsewhere,
            "label_config": make_labeling_config(DRAWN),
            "project": f"{project.number}.1",
            "params": {},
        }
        requests.post(f"{backend.url}/predict", json=body, timeout=60)
        wait_for(lambda: "is another than the requesting project" in backend.read_log(), 30, "the log line")
        assert project.list_predictions() == []
        answers = requests.post(f"{backend.url}/predict", json=body, timeout=60).json()["results"]
        assert all("result" in answer for answer in answers)  # answers are pulled from now on
    finally:
        backend.stop()


def test_each_prediction_is_pushed_once_through_an_outage_of_label_studio(tmp_path: Path) -> None:
    port, folder = find_free_port(), tmp_path / "label-studio"
    folder.mkdir()
    with running_label_studio(folder, port) as label_studio:
        backend = start_backend(tmp_path / "b", label_studio.url)
        project = create_project(label_studio, "away", backend)
        retrieve(project)
        wait_for(lambda: project.list_predictions(), 60, "some predictions")
    try:
        time.sleep(OUTAGE)
        with running_label_studio(folder, port):
            wait_for(lambda: len(count_by_task(project)) == TASKS, 180, "a prediction for every task")
            time.sleep(25)  # only then an unconfirmed import is checked
            assert set(count_by_task(project).values()) == {1}
    finally:
        backend.stop()

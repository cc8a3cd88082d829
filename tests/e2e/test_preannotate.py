"""A whole project by one command, killed on the way, with a real Label Studio."""

import collections
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import pytest
import requests
from playwright.sync_api import expect

from tests.e2e.browser import open_browser, save_screenshot
from tests.e2e.label_studio import LEGACY_TOKEN, LabelStudio, Project
from tests.scenes import encode, make_labeling_config, make_scenes, to_data_uri
from tests.servers import ROOT, ServeProcess, http_server, send_reply, wait_for

pytestmark = pytest.mark.timeout(900)

TASKS, BROKEN = 1000, 3
SCENES = make_scenes(5, (96, 96))
JPEGS = [encode(scene.image, "JPEG", quality=95) for scene in SCENES]


@pytest.fixture(scope="module")
def images_url() -> Iterator[str]:
    def answer(request: BaseHTTPRequestHandler) -> None:
        name = Path(request.path).stem
        if name.isdigit():
            send_reply(request, JPEGS[int(name) % len(JPEGS)])
        else:
            send_reply(request, b"", 404)

    with http_server(answer) as url:
        yield url


@pytest.fixture(scope="module")
def backend(label_studio: LabelStudio, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServeProcess]:
    folder = tmp_path_factory.mktemp("bulk")
    keys = {"LABEL_STUDIO_URL": label_studio.url, "LABEL_STUDIO_API_KEY": LEGACY_TOKEN}
    server = ServeProcess(folder, PREANNOTATE_ON_IMPORT="true", **keys)
    try:
        server.wait_until_ready()
        yield server
    finally:
        server.stop()


def create_project(label_studio: LabelStudio, images_url: str, count: int) -> Project:
    project = label_studio.create_project("bulk", make_labeling_config(SCENES), {})
    tasks = [{"data": {"image": f"{images_url}/{number}.jpg"}} for number in range(count)]
    if tasks:
        label_studio.call("POST", f"/api/projects/{project.number}/import", json=tasks)
    return project


def start_preannotate(backend: ServeProcess, folder: Path, *arguments: str) -> subprocess.Popen[str]:
    """Starts `preannotate` as a process of its own, in this folder."""
    given = {"MODEL": "demo", "MODEL_DIR": str(backend.model_dir), "PYTHONPATH": str(ROOT)}
    keys = {name: value for name, value in backend.env.items() if name.startswith("LABEL_STUDIO")}
    command = [sys.executable, "-m", "backend", "preannotate", *arguments]
    return subprocess.Popen(
        command, cwd=folder, env={**os.environ, **given, **keys}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def count_by_task(project: Project) -> collections.Counter:
    """Counts the predictions of each task."""
    return collections.Counter(prediction["task"] for prediction in project.list_predictions())


def measure_single_tasks(backend: ServeProcess, count: int) -> list[float]:
    """Measures the seconds until an annotator who opens a task sees its boxes."""
    times = []
    for number in range(count):
        data = {"image": to_data_uri(make_scenes(1, (96, 96), seed=1000 + number)[0].image)}
        body = {
            "tasks": [{"id": number, "data": data}],
            "label_config": make_labeling_config(SCENES),
            "project": "999.1",
        }
        start = time.monotonic()
        answer = requests.post(f"{backend.url}/predict", json=body, timeout=60).json()
        times.append(time.monotonic() - start)
        assert "result" in answer["results"][0]
    return times


def check_status_page(backend: ServeProcess, project: Project) -> None:
    """Checks that the status page shows the running command; it is opened well before the last task is done."""
    with open_browser() as browser:
        page = browser.new_page(viewport={"width": 1200, "height": 900})
        page.goto(backend.url)
        running = page.locator("#running")
        expect(running).to_contain_text(f"preannotate, project {project.number}", timeout=15_000)
        save_screenshot(page, "preannotate")


def test_1000_tasks_are_predicted_once_although_the_command_is_killed_twice(
    label_studio: LabelStudio, backend: ServeProcess, images_url: str, tmp_path: Path
) -> None:
    project = create_project(label_studio, images_url, TASKS)
    option = ("--project", str(project.number))
    dry, _ = start_preannotate(backend, tmp_path, *option, "--dry-run").communicate(timeout=60)
    assert f"{TASKS} tasks have no prediction of demo-" in dry, dry
    assert project.list_predictions() == []
    for count in (1, 300):
        killed = start_preannotate(backend, tmp_path, *option)
        wait_for(lambda count=count: len(project.list_predictions()) >= count, 120, "some predictions")
        killed.send_signal(signal.SIGKILL)
        killed.communicate(timeout=10)
    resumed = start_preannotate(backend, tmp_path, *option)
    check_status_page(backend, project)
    seconds = measure_single_tasks(backend, 10)
    output, _ = resumed.communicate(timeout=300)
    assert resumed.returncode == 0, output[-3000:]
    assert statistics.median(seconds) < 1, seconds  # a chunk takes about 0.2 s, and Label Studio shares the cores
    wait_for(lambda: len(count_by_task(project)) == TASKS, 60, "a prediction for every task")
    time.sleep(3)
    assert set(count_by_task(project).values()) == {1}
    again = start_preannotate(backend, tmp_path, *option)
    output, _ = again.communicate(timeout=60)
    assert (again.returncode, "0 tasks predicted" in output) == (0, True), output


def test_failures_are_listed_and_old_versions_replaced(
    label_studio: LabelStudio, backend: ServeProcess, images_url: str, tmp_path: Path
) -> None:
    project = create_project(label_studio, images_url, 20)
    bad = [{"data": {"image": f"{images_url}/missing-{number}.jpg"}} for number in range(BROKEN)]
    label_studio.call("POST", f"/api/projects/{project.number}/import", json=bad)
    tasks = [task["id"] for task in project.list_tasks()]
    foreign = {"task": tasks[0], "result": [], "score": 0.5, "model_version": "somebody-else"}
    old = [{"task": task, "result": [], "score": 0.5, "model_version": "demo-00000000"} for task in tasks[:5]]
    label_studio.call("POST", f"/api/projects/{project.number}/import/predictions", json=[foreign, *old])
    run = start_preannotate(backend, tmp_path, "--project", str(project.number), "--replace")
    output, _ = run.communicate(timeout=120)
    assert run.returncode == 1, output
    assert f"20 tasks predicted, {BROKEN} failed" in output
    rows = (tmp_path / f"preannotate-{project.number}-failures.csv").read_text().splitlines()
    assert [row.split(",")[:2] for row in rows[1:]] == [[str(task), "image"] for task in tasks[20:]]
    versions = collections.Counter(p["model_version"] for p in project.list_predictions())
    assert versions.pop("somebody-else") == 1
    assert list(versions.values()) == [20]
    assert "demo-00000000" not in versions


def test_tasks_are_predicted_as_they_are_imported(
    label_studio: LabelStudio, backend: ServeProcess, images_url: str
) -> None:
    project = create_project(label_studio, images_url, 0)
    project.connect(backend.url)
    for count in (10, 25):
        tasks = [{"data": {"image": f"{images_url}/{number}.jpg"}} for number in range(count)]
        label_studio.call("POST", f"/api/projects/{project.number}/import", json=tasks)
    wait_for(lambda: len(count_by_task(project)) == 35, 60, "predictions")
    time.sleep(3)
    assert set(count_by_task(project).values()) == {1}


def test_reading_tasks_makes_label_studio_request_nothing(
    label_studio: LabelStudio, backend: ServeProcess, images_url: str, tmp_path: Path
) -> None:
    opened, project = (create_project(label_studio, images_url, count) for count in (5, 60))
    for connected in (opened, project):
        connected.connect(backend.url)
        # "Retrieve predictions when loading a task automatically"
        change = {"evaluate_predictions_automatically": True}
        label_studio.call("PATCH", f"/api/projects/{connected.number}", json=change)
    before = backend.read_log().count("POST /predict")
    label_studio.call("GET", "/api/tasks", params={"project": opened.number})
    assert backend.read_log().count("POST /predict") == before + 1  # the switch is on
    run = start_preannotate(backend, tmp_path, "--project", str(project.number))
    output, _ = run.communicate(timeout=60)
    assert "60 tasks predicted, 0 failed" in output
    assert count_by_task(project) == dict.fromkeys((task["id"] for task in project.list_tasks()), 1)
    assert backend.read_log().count("POST /predict") == before + 1


def test_only_the_tasks_of_the_options_are_predicted(
    label_studio: LabelStudio, backend: ServeProcess, images_url: str, tmp_path: Path
) -> None:
    project = create_project(label_studio, images_url, 12)
    tasks = [task["id"] for task in project.list_tasks()]
    some = ",".join(map(str, tasks[:5]))
    for arguments, count in ((("--tasks", some, "--limit", "2"), 2), (("--tasks", some), 5), (("--limit", "3"), 8)):
        run = start_preannotate(backend, tmp_path, "--project", str(project.number), *arguments)
        output, _ = run.communicate(timeout=60)
        assert run.returncode == 0, output
        assert len(project.list_predictions()) == count
    tab = label_studio.call("POST", "/api/dm/views", json={"project": project.number, "data": {"title": "all"}})["id"]
    run = start_preannotate(backend, tmp_path, "--project", str(project.number), "--view", str(tab))
    output, _ = run.communicate(timeout=60)
    assert run.returncode == 0, output
    assert set(count_by_task(project).values()) == {1}
    assert len(count_by_task(project)) == 12
    wrong = start_preannotate(backend, tmp_path, "--project", "99999")
    output, _ = wrong.communicate(timeout=60)
    assert (wrong.returncode, "Traceback" in output) == (2, False), output

"""The main job, against the real thing: from a project to rectangles in it."""

import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler

import pytest
import requests

from backend.demo import samples
from backend.images.decoding import ImageLoader
from backend.images.sources import ImageFetcher
from backend.labelstudio.client import LabelStudioClient
from backend.monitoring.feedback import BOX_OUTCOMES
from tests.e2e.browser import open_browser, screenshot
from tests.e2e.studio import LEGACY_TOKEN, PASSWORD, USER, LabelStudio, Project
from tests.scenes import compute_recall, encode, make_labeling_config, make_scenes
from tests.servers import ROOT, ServeProcess, http_server, send_reply, wait_for

pytestmark = pytest.mark.timeout(600)

DRAWN = make_scenes(12, (640, 480), seed=5)


@pytest.fixture(scope="module")
def backend(studio: LabelStudio, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServeProcess]:
    keys = {"LABEL_STUDIO_URL": studio.url, "LABEL_STUDIO_API_KEY": studio.personal_access_token}
    server = ServeProcess(tmp_path_factory.mktemp("backend"), **keys)
    try:
        server.wait_until_ready()
        yield server
    finally:
        server.stop()


@pytest.fixture(scope="module")
def project(studio: LabelStudio, backend: ServeProcess) -> Project:
    pictures = {f"scene-{i:02}.png": encode(scene.image) for i, scene in enumerate(DRAWN)}
    project = studio.create_project("shapes", make_labeling_config(DRAWN), pictures)
    project.connect(backend.url)
    return project


def test_retrieve_predictions_puts_rectangles_on_the_shapes(project: Project) -> None:
    tasks = project.tasks()
    project.action("retrieve_tasks_predictions", [task["id"] for task in tasks])
    by_task = {prediction["task"]: prediction for prediction in project.predictions()}
    assert sorted(by_task) == [task["id"] for task in tasks]
    assert len(project.predictions()) == len(tasks)
    drawn = {task["id"]: DRAWN[int(task["data"]["image"].split("scene-")[1][:2])] for task in tasks}
    found = [compute_recall(by_task[number]["result"], scene) for number, scene in drawn.items()]
    assert statistics.mean(found) > 0.85, found
    assert {prediction["model_version"] for prediction in by_task.values()} == {project.model_version()}


def test_retrieving_again_asks_for_nothing(project: Project) -> None:
    before = project.predictions()
    project.action("retrieve_tasks_predictions", [task["id"] for task in project.tasks()])
    assert project.predictions() == before


def test_opening_a_task_brings_its_prediction(project: Project) -> None:
    task = project.tasks()[0]["id"]
    project.action("delete_tasks_predictions", [task])
    opened = project.studio.call("GET", f"/api/tasks/{task}")
    assert [prediction["model_version"] for prediction in opened["predictions"]] == [project.model_version()]


def test_interactive_prediction(project: Project) -> None:
    body = {"task": project.tasks()[0]["id"], "context": {"result": []}}
    answer = project.studio.call("POST", f"/api/ml/{project.backend}/interactive-annotating", json=body)
    assert answer["data"]["result"]


def test_annotations_are_saved_quickly_and_recorded(project: Project, backend: ServeProcess) -> None:
    task, start = project.tasks()[1]["id"], time.monotonic()
    created = project.studio.call("POST", f"/api/tasks/{task}/annotations", json={"result": [], "lead_time": 1})
    assert time.monotonic() - start < 1
    project.studio.call("DELETE", f"/api/annotations/{created['id']}")
    project.studio.call("POST", f"/api/ml/{project.backend}/train", json={})


def test_a_picture_that_fails_leaves_the_others_and_is_asked_again(studio: LabelStudio, backend: ServeProcess) -> None:
    project = studio.create_project("broken", make_labeling_config(DRAWN), {"scene-00.png": encode(DRAWN[0].image)})
    body = [{"data": {"image": "http://127.0.0.1:1/gone.png"}}]
    studio.call("POST", f"/api/projects/{project.number}/import", json=body)
    project.connect(backend.url)
    good, bad = project.tasks()
    project.action("retrieve_tasks_predictions", [good["id"], bad["id"]])
    assert [prediction["task"] for prediction in project.predictions()] == [good["id"]]
    assert f"task {bad['id']}: the image could not be fetched" in backend.read_log()


@pytest.mark.parametrize("kind", ["legacy token", "personal access token"])
def test_uploaded_pictures_open_with_either_key(studio: LabelStudio, project: Project, kind: str) -> None:
    key = LEGACY_TOKEN if kind == "legacy token" else studio.personal_access_token
    uri = project.tasks()[0]["data"]["image"]
    assert uri.startswith("/data/upload/")
    assert ImageLoader(ImageFetcher(LabelStudioClient(studio.url, key), 10**7), 10**7).load(uri).size == (640, 480)


def test_pictures_of_its_storages_are_found(studio: LabelStudio, backend: ServeProcess) -> None:
    asked: list[tuple[str, str | None]] = []

    def bucket(handler: BaseHTTPRequestHandler) -> None:
        asked.append((handler.command, handler.headers["Authorization"]))
        send_reply(handler, encode(DRAWN[0].image) if handler.command == "GET" else b"")

    folder = studio.files / "pictures"
    folder.mkdir()
    (folder / "a b.png").write_bytes(encode(DRAWN[0].image))
    project = studio.create_project("storages", make_labeling_config(DRAWN), {})
    with http_server(bucket) as url:
        common = {"project": project.number, "title": "pictures", "use_blob_urls": True}
        keys = {"aws_access_key_id": "id", "aws_secret_access_key": "key", "region_name": "eu-central-1"}
        studio.call("POST", "/api/storages/localfiles", json={**common, "path": str(folder)})
        studio.call("POST", "/api/storages/s3", json={**common, **keys, "bucket": "box", "s3_endpoint": url})
        uris = ["/data/local-files/?d=pictures/a%20b.png", "s3://box/a b.png"]
        studio.call("POST", f"/api/projects/{project.number}/import", json=[{"data": {"image": uri}} for uri in uris])
        project.connect(backend.url)
        project.action("retrieve_tasks_predictions", [task["id"] for task in project.tasks()])
    local, cloud = project.predictions()
    assert compute_recall(local["result"], DRAWN[0]) == compute_recall(cloud["result"], DRAWN[0]) > 0.5
    assert asked[-1] == ("GET", None)  # of the backend, with the signature in the address


def check(backend: ServeProcess, project: str, **env: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "backend", "check", "--project", project]
    given = {**os.environ, "MODEL": "demo", "MODEL_DIR": str(backend.model_dir), **env}
    return subprocess.run(command, cwd=ROOT, env=given, capture_output=True, text=True, timeout=60, check=False)


def test_check_says_what_works_and_what_does_not(studio: LabelStudio, backend: ServeProcess, project: Project) -> None:
    keys = {"LABEL_STUDIO_URL": studio.url, "LABEL_STUDIO_API_KEY": studio.personal_access_token}
    good = check(backend, str(project.number), **keys)
    assert good.returncode == 0, good.stdout + good.stderr
    assert "personal access token of e2e@example.com" in good.stdout
    assert "640 x 480 pixels" in good.stdout
    assert "Connected" in good.stdout
    wrong = check(backend, "12345", **{**keys, "LABEL_STUDIO_API_KEY": LEGACY_TOKEN[::-1]})
    assert wrong.returncode == 1
    assert "FAIL  LABEL_STUDIO_API_KEY" in wrong.stdout
    assert "Traceback" not in wrong.stdout + wrong.stderr
    assert LEGACY_TOKEN[::-1] not in wrong.stdout + wrong.stderr
    away = check(backend, "1", **{**keys, "LABEL_STUDIO_URL": "http://127.0.0.1:1"})
    assert "does not answer at http://127.0.0.1:1" in away.stdout


def test_the_boxes_are_seen_in_the_browser(studio: LabelStudio, backend: ServeProcess) -> None:
    pictures = {path.name: path.read_bytes() for path in sorted(samples.FOLDER.glob("*.jpg"))}
    project = studio.create_project("samples", (samples.FOLDER / "labeling_config.xml").read_text(), pictures)
    project.connect(backend.url)
    tasks = [task["id"] for task in project.tasks()]
    project.action("retrieve_tasks_predictions", tasks)
    most = max(project.predictions(), key=lambda prediction: (len(prediction["result"]), prediction["score"]))
    with open_browser() as browser:
        page = browser.new_page(viewport={"width": 1400, "height": 800})
        page.goto(f"{studio.url}/user/login/")
        page.fill("input[name=email]", USER)
        page.fill("input[name=password]", PASSWORD)
        page.click("button[type=submit]")
        page.wait_for_url(lambda url: "/login" not in url)
        page.goto(f"{studio.url}/projects/{project.number}/data?task={most['task']}")
        page.wait_for_selector("canvas", timeout=60_000)
        page.wait_for_selector(".lsf-outliner-item", timeout=60_000)
        page.wait_for_timeout(2000)  # the picture and the boxes on it are drawn after their list
        listed = page.locator(".lsf-outliner-item__title").all_inner_texts()
        screenshot(page, "label-studio")
        page.get_by_label("Submit current annotation").click()
        wait_for(lambda: totals(backend, project) == [len(most["result"]), 0, 0, 0], 20, "boxes that count as kept")
        page.goto(backend.url)
        page.wait_for_selector("#images figure")
        screenshot(page, "status")
    assert len(listed) == len(most["result"]) >= 3


def totals(backend: ServeProcess, project: Project) -> list[int]:
    """What the status page says of the boxes of a project: kept, changed, deleted, drawn."""
    cards = requests.get(f"{backend.url}/status", timeout=10).json()["projects"]
    (boxes,) = [card["boxes"] for card in cards if card["project"] == str(project.number)]
    return [sum(counts[fate] for counts in boxes.values()) for fate in BOX_OUTCOMES]

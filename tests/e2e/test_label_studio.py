"""The main job with a real Label Studio: from a project to rectangles in it."""

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
from tests.e2e.browser import open_browser, save_screenshot
from tests.e2e.label_studio import LEGACY_TOKEN, PASSWORD, USER, LabelStudio, Project
from tests.scenes import compute_recall, encode, make_labeling_config, make_scenes
from tests.servers import ROOT, ServeProcess, http_server, send_reply, wait_for

pytestmark = pytest.mark.timeout(600)

DRAWN = make_scenes(12, (640, 480), seed=5)


@pytest.fixture(scope="module")
def backend(label_studio: LabelStudio, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServeProcess]:
    keys = {"LABEL_STUDIO_URL": label_studio.url, "LABEL_STUDIO_API_KEY": label_studio.personal_access_token}
    server = ServeProcess(tmp_path_factory.mktemp("backend"), **keys)
    try:
        server.wait_until_ready()
        yield server
    finally:
        server.stop()


@pytest.fixture(scope="module")
def project(label_studio: LabelStudio, backend: ServeProcess) -> Project:
    images = {f"scene-{i:02}.png": encode(scene.image) for i, scene in enumerate(DRAWN)}
    project = label_studio.create_project("shapes", make_labeling_config(DRAWN), images)
    project.connect(backend.url)
    return project


def test_retrieve_predictions_puts_rectangles_on_the_shapes(project: Project) -> None:
    tasks = project.list_tasks()
    project.run_action("retrieve_tasks_predictions", [task["id"] for task in tasks])
    predictions_by_task = {prediction["task"]: prediction for prediction in project.list_predictions()}
    assert sorted(predictions_by_task) == [task["id"] for task in tasks]
    assert len(project.list_predictions()) == len(tasks)
    drawn = {task["id"]: DRAWN[int(task["data"]["image"].split("scene-")[1][:2])] for task in tasks}
    recalls = [compute_recall(predictions_by_task[number]["result"], scene) for number, scene in drawn.items()]
    assert statistics.mean(recalls) > 0.85, recalls
    assert {prediction["model_version"] for prediction in predictions_by_task.values()} == {project.get_model_version()}


def test_retrieving_again_requests_nothing(project: Project) -> None:
    before = project.list_predictions()
    project.run_action("retrieve_tasks_predictions", [task["id"] for task in project.list_tasks()])
    assert project.list_predictions() == before


def test_opening_a_task_brings_its_prediction(project: Project) -> None:
    task = project.list_tasks()[0]["id"]
    project.run_action("delete_tasks_predictions", [task])
    opened = project.label_studio.call("GET", f"/api/tasks/{task}")
    assert [prediction["model_version"] for prediction in opened["predictions"]] == [project.get_model_version()]


def test_an_interactive_request_returns_regions(project: Project) -> None:
    body = {"task": project.list_tasks()[0]["id"], "context": {"result": []}}
    answer = project.label_studio.call("POST", f"/api/ml/{project.backend}/interactive-annotating", json=body)
    assert answer["data"]["result"]


def test_annotations_are_saved_quickly_and_recorded(project: Project, backend: ServeProcess) -> None:
    task, start = project.list_tasks()[1]["id"], time.monotonic()
    created = project.label_studio.call("POST", f"/api/tasks/{task}/annotations", json={"result": [], "lead_time": 1})
    assert time.monotonic() - start < 1
    project.label_studio.call("DELETE", f"/api/annotations/{created['id']}")
    project.label_studio.call("POST", f"/api/ml/{project.backend}/train", json={})


def test_a_failed_image_fails_alone_and_the_log_says_why(label_studio: LabelStudio, backend: ServeProcess) -> None:
    image = encode(DRAWN[0].image)
    project = label_studio.create_project("broken", make_labeling_config(DRAWN), {"scene-00.png": image})
    body = [{"data": {"image": "http://127.0.0.1:1/gone.png"}}]
    label_studio.call("POST", f"/api/projects/{project.number}/import", json=body)
    project.connect(backend.url)
    good, bad = project.list_tasks()
    project.run_action("retrieve_tasks_predictions", [good["id"], bad["id"]])
    assert [prediction["task"] for prediction in project.list_predictions()] == [good["id"]]
    assert f"task {bad['id']}: the image could not be fetched" in backend.read_log()


@pytest.mark.parametrize("kind", ["legacy token", "personal access token"])
def test_uploaded_images_are_loaded_with_either_kind_of_key(
    label_studio: LabelStudio, project: Project, kind: str
) -> None:
    key = LEGACY_TOKEN if kind == "legacy token" else label_studio.personal_access_token
    uri = project.list_tasks()[0]["data"]["image"]
    assert uri.startswith("/data/upload/")
    fetcher = ImageFetcher(LabelStudioClient(label_studio.url, key), 10**7)
    assert ImageLoader(fetcher, 10**7).load(uri).size == (640, 480)


def test_images_of_the_projects_storages_are_predicted(label_studio: LabelStudio, backend: ServeProcess) -> None:
    requested: list[tuple[str, str | None]] = []

    def bucket(handler: BaseHTTPRequestHandler) -> None:
        requested.append((handler.command, handler.headers["Authorization"]))
        send_reply(handler, encode(DRAWN[0].image) if handler.command == "GET" else b"")

    folder = label_studio.files / "images"
    folder.mkdir()
    (folder / "a b.png").write_bytes(encode(DRAWN[0].image))
    project = label_studio.create_project("storages", make_labeling_config(DRAWN), {})
    with http_server(bucket) as url:
        common = {"project": project.number, "title": "images", "use_blob_urls": True}
        keys = {"aws_access_key_id": "id", "aws_secret_access_key": "key", "region_name": "eu-central-1"}
        label_studio.call("POST", "/api/storages/localfiles", json={**common, "path": str(folder)})
        label_studio.call("POST", "/api/storages/s3", json={**common, **keys, "bucket": "box", "s3_endpoint": url})
        uris = ["/data/local-files/?d=images/a%20b.png", "s3://box/a b.png"]
        tasks = [{"data": {"image": uri}} for uri in uris]
        label_studio.call("POST", f"/api/projects/{project.number}/import", json=tasks)
        project.connect(backend.url)
        project.run_action("retrieve_tasks_predictions", [task["id"] for task in project.list_tasks()])
    local, cloud = project.list_predictions()
    assert compute_recall(local["result"], DRAWN[0]) == compute_recall(cloud["result"], DRAWN[0]) > 0.5
    assert requested[-1] == ("GET", None)  # by the backend, with the signature in the URL


def run_check(backend: ServeProcess, project: str, **env: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "backend", "check", "--project", project]
    given = {**os.environ, "MODEL": "demo", "MODEL_DIR": str(backend.model_dir), **env}
    return subprocess.run(command, cwd=ROOT, env=given, capture_output=True, text=True, timeout=60, check=False)


def test_check_reports_what_works_and_what_does_not(
    label_studio: LabelStudio, backend: ServeProcess, project: Project
) -> None:
    keys = {"LABEL_STUDIO_URL": label_studio.url, "LABEL_STUDIO_API_KEY": label_studio.personal_access_token}
    good = run_check(backend, str(project.number), **keys)
    assert good.returncode == 0, good.stdout + good.stderr
    assert "personal access token of e2e@example.com" in good.stdout
    assert "640 x 480 pixels" in good.stdout
    assert "Connected" in good.stdout
    wrong = run_check(backend, "12345", **{**keys, "LABEL_STUDIO_API_KEY": LEGACY_TOKEN[::-1]})
    assert wrong.returncode == 1
    assert "FAIL  LABEL_STUDIO_API_KEY" in wrong.stdout
    assert "Traceback" not in wrong.stdout + wrong.stderr
    assert LEGACY_TOKEN[::-1] not in wrong.stdout + wrong.stderr
    unreachable = run_check(backend, "1", **{**keys, "LABEL_STUDIO_URL": "http://127.0.0.1:1"})
    assert "does not answer at http://127.0.0.1:1" in unreachable.stdout


def test_the_boxes_are_shown_in_the_browser(label_studio: LabelStudio, backend: ServeProcess) -> None:
    images = {path.name: path.read_bytes() for path in sorted(samples.FOLDER.glob("*.jpg"))}
    project = label_studio.create_project("samples", (samples.FOLDER / "labeling_config.xml").read_text(), images)
    project.connect(backend.url)
    tasks = [task["id"] for task in project.list_tasks()]
    project.run_action("retrieve_tasks_predictions", tasks)
    largest = max(project.list_predictions(), key=lambda prediction: (len(prediction["result"]), prediction["score"]))
    with open_browser() as browser:
        page = browser.new_page(viewport={"width": 1400, "height": 800})
        page.goto(f"{label_studio.url}/user/login/")
        page.fill("input[name=email]", USER)
        page.fill("input[name=password]", PASSWORD)
        page.click("button[type=submit]")
        page.wait_for_url(lambda url: "/login" not in url)
        page.goto(f"{label_studio.url}/projects/{project.number}/data?task={largest['task']}")
        page.wait_for_selector("canvas", timeout=60_000)
        page.wait_for_selector(".lsf-outliner-item", timeout=60_000)
        page.wait_for_timeout(2000)  # the image and its boxes are drawn after their list
        listed = page.locator(".lsf-outliner-item__title").all_inner_texts()
        save_screenshot(page, "label-studio")
        page.get_by_label("Submit current annotation").click()
        expected = [len(largest["result"]), 0, 0, 0]
        wait_for(lambda: count_outcomes(backend, project) == expected, 20, "boxes that count as kept")
        page.goto(backend.url)
        page.wait_for_selector("#images figure")
        save_screenshot(page, "status")
    assert len(listed) == len(largest["result"]) >= 3


def count_outcomes(backend: ServeProcess, project: Project) -> list[int]:
    """Reads from the status page the boxes of a project: kept, changed, deleted, drawn."""
    summaries = requests.get(f"{backend.url}/status", timeout=10).json()["projects"]
    (boxes,) = [summary["boxes"] for summary in summaries if summary["project"] == str(project.number)]
    return [sum(counts[outcome] for counts in boxes.values()) for outcome in BOX_OUTCOMES]

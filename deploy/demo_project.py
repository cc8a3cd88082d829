"""Creates the demo project in the demo's Label Studio: sample images, a connected backend and its predictions."""

import os
import time
from typing import Any

import requests

from backend.demo.samples import FOLDER

LABEL_STUDIO, KEY = os.environ["LABEL_STUDIO_URL"], os.environ["LABEL_STUDIO_API_KEY"]
BACKEND = os.environ.get("BACKEND_URL", "http://grounding-dino.internal:9090")
TITLE = "Grounding DINO demo"
MAX_WAIT = 600  # s; at its first start Label Studio creates its database


def call(method: str, path: str, **options: Any) -> Any:
    """Calls Label Studio's API and returns the decoded JSON response.

    Raises:
        requests.HTTPError: Label Studio refuses the request.
    """
    headers = {"Authorization": f"Token {KEY}"}
    response = requests.request(method, LABEL_STUDIO + path, headers=headers, timeout=120, **options)
    response.raise_for_status()
    return response.json()


def wait_for(url: str) -> None:
    """Waits until the URL answers with success, for at most MAX_WAIT seconds."""
    deadline = time.monotonic() + MAX_WAIT
    while time.monotonic() < deadline and not _is_up(url):
        time.sleep(1)


def _is_up(url: str) -> bool:
    try:
        return requests.get(url, timeout=5).ok
    except requests.RequestException:
        return False


def make_project() -> int:
    """Creates a project with the sample images and returns its id."""
    config = (FOLDER / "labeling_config.xml").read_text()
    project = int(call("POST", "/api/projects", json={"title": TITLE, "label_config": config})["id"])
    files = {path.stem: (path.name, path.read_bytes(), "image/jpeg") for path in sorted(FOLDER.glob("*.jpg"))}
    call("POST", f"/api/projects/{project}/import", files=files)
    return project


def connect(project: int) -> None:
    """Connects the backend to the project and retrieves the predictions of all tasks."""
    model = {"project": project, "url": BACKEND, "title": "Grounding DINO", "is_interactive": True}
    call("POST", "/api/ml", json=model)
    everything = {"selectedItems": {"all": True, "excluded": []}, "project": project}
    call("POST", f"/api/dm/actions?id=retrieve_tasks_predictions&project={project}", json=everything)


if __name__ == "__main__":
    print("waiting for Label Studio and a worker; the first start takes a minute or two", flush=True)
    wait_for(f"{LABEL_STUDIO}/health")
    wait_for(f"{BACKEND}/ready")
    existing = [row["id"] for row in call("GET", "/api/projects")["results"] if row["title"] == TITLE]
    number = existing[0] if existing else make_project()
    if not call("GET", f"/api/ml?project={number}"):
        connect(number)
    print(f"open http://localhost:8080/projects/{number} and log in as demo@example.com, throw-away-password")

"""A real Label Studio in a virtual environment of its own, started on a free port with SQLite."""

import contextlib
import functools
import json
import os
import re
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import requests

from tests.servers import ROOT, find_free_port, wait_for

VENV = (ROOT / os.environ.get("LABEL_STUDIO_VENV", ".venv-label-studio")).resolve()
USER, PASSWORD = "e2e@example.com", "e2e-password-of-a-throw-away-server"
LEGACY_TOKEN = "0123456789abcdef0123456789abcdef01234567"
STRICT_VALIDATION = "fflag_feat_utc_210_prediction_validation_15082025"
BOOT_TIMEOUT = 240  # s; the first start migrates its database, which takes about 45 s on a free machine


class LabelStudio:
    """A running server and the few calls that the tests make, as its only user."""

    def __init__(self, url: str, files: Path) -> None:
        self.url, self.files = url, files  # the folder below which it serves local files

    def call(self, method: str, path: str, **options: Any) -> Any:
        headers = {"Authorization": f"Token {LEGACY_TOKEN}"}
        response = requests.request(method, self.url + path, headers=headers, timeout=200, **options)
        assert response.ok, f"{method} {path}: {response.status_code} {response.text[:500]}"
        return response.json() if response.content else None

    @functools.cached_property
    def personal_access_token(self) -> str:
        session = requests.Session()
        page = session.get(f"{self.url}/user/login/", timeout=30).text
        token = re.search(r'csrfmiddlewaretoken" value="([^"]+)"', page)[1]
        form = {"email": USER, "password": PASSWORD, "csrfmiddlewaretoken": token}
        session.post(f"{self.url}/user/login/", data=form, headers={"Referer": self.url}, timeout=30)
        headers = {"Referer": self.url, "X-CSRFToken": session.cookies["csrftoken"]}
        response = session.post(f"{self.url}/api/token", json={}, headers=headers, timeout=30)
        assert response.status_code == 201, response.text
        return response.json()["token"]

    def create_project(self, title: str, config: str, images: dict[str, bytes]) -> "Project":
        project = self.call("POST", "/api/projects", json={"title": title, "label_config": config})["id"]
        files = {f"file{i}": (name, body, "image/png") for i, (name, body) in enumerate(images.items())}
        if files:
            self.call("POST", f"/api/projects/{project}/import?return_task_ids=true", files=files)
        return Project(self, project)


class Project:
    """A project in a running Label Studio."""

    def __init__(self, label_studio: LabelStudio, number: int) -> None:
        self.label_studio, self.number = label_studio, number
        self.backend: int | None = None

    def connect(self, url: str) -> None:
        body = {"project": self.number, "url": url, "title": "Grounding DINO", "is_interactive": True}
        self.backend = self.label_studio.call("POST", "/api/ml", json=body)["id"]

    def get_model_version(self) -> str:
        return self.label_studio.call("GET", f"/api/ml/{self.backend}")["model_version"]

    def list_tasks(self) -> list[dict[str, Any]]:
        query = {"include": [{"field": "id"}, {"field": "data"}]}
        path = f"/api/tasks?project={self.number}&fields=all&page_size=1000&query={json.dumps(query)}"
        return sorted(self.label_studio.call("GET", path)["tasks"], key=lambda task: task["id"])

    def list_predictions(self) -> list[dict[str, Any]]:
        return self.label_studio.call("GET", f"/api/predictions?project={self.number}")

    def run_action(self, name: str, tasks: list[int]) -> Any:
        selected = {"selectedItems": {"all": False, "included": tasks}, "project": self.number}
        return self.label_studio.call("POST", f"/api/dm/actions?id={name}&project={self.number}", json=selected)


@contextlib.contextmanager
def running_label_studio(folder: Path, port: int | None = None) -> Iterator[LabelStudio]:
    """Runs Label Studio with its data in `folder`, where it may have run before."""
    port = port or find_free_port()
    url = f"http://127.0.0.1:{port}"
    data, files, log = folder / "data", folder / "files", folder / "label-studio.log"
    data.mkdir(exist_ok=True)
    files.mkdir(exist_ok=True)
    env = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")} | {
        "LABEL_STUDIO_BASE_DATA_DIR": str(data),
        "LABEL_STUDIO_USERNAME": USER,
        "LABEL_STUDIO_PASSWORD": PASSWORD,
        "LABEL_STUDIO_USER_TOKEN": LEGACY_TOKEN,
        "LABEL_STUDIO_ENABLE_LEGACY_API_TOKEN": "true",
        "LABEL_STUDIO_HOST": url,
        "LABEL_STUDIO_LOCAL_FILES_SERVING_ENABLED": "true",
        "LABEL_STUDIO_LOCAL_FILES_DOCUMENT_ROOT": str(files),
        "ML_BLOCK_LOCAL_IP": "false",
        "SSRF_PROTECTION_ENABLED": "false",
        STRICT_VALIDATION: "true",
        "COLLECT_ANALYTICS": "false",
        "LATEST_VERSION_CHECK": "false",
        "SENTRY_DSN": "",
        "FRONTEND_SENTRY_DSN": "",
    }
    command = [str(VENV / "bin" / "label-studio"), "start", "--no-browser", "--internal-host", "127.0.0.1"]
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*command, "-p", str(port)], env=env, stdout=output, stderr=output, cwd=folder, start_new_session=True
        )
    try:

        def is_healthy() -> bool:
            assert process.poll() is None, log.read_text(errors="replace")[-3000:]
            return requests.get(f"{url}/health", timeout=2).ok

        wait_for(is_healthy, BOOT_TIMEOUT, "Label Studio")
        yield LabelStudio(url, files)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()

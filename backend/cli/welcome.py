"""Prints, once `serve` is up: the URL, when the model is ready, one real prediction, and the next steps."""

from __future__ import annotations

import base64
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import requests

from backend.settings import Settings

READY_POLL = 0.2  # s between two requests of /ready
READY_TIMEOUT = 5  # s that a request of /ready may take
SAMPLES = Path(__file__).parent.parent / "demo" / "samples"
SAMPLE_IMAGE = SAMPLES / "sample-1.jpg"
LABELING_CONFIG = SAMPLES / "labeling_config.xml"

NEXT_STEPS = """
Before Label Studio can use it:
  - start Label Studio with ML_BLOCK_LOCAL_IP=false SSRF_PROTECTION_ENABLED=false
    (since 1.23.1 it refuses a backend on this machine otherwise)
  - start this server with LABEL_STUDIO_URL and LABEL_STUDIO_API_KEY, or it cannot read uploaded images{missing}
Then, in Label Studio:
  1. Settings > Labeling Interface > Code: paste {config}
  2. Settings > Model > Connect Model: any name, backend URL {url}
  3. Import the images in {samples}
  4. Data Manager: select them, Actions > Retrieve predictions, open one
Status: {url}/; try phrases and thresholds: {url}/playground
Ctrl-C stops everything."""


def welcome(settings: Settings, echo: Callable[[str], None], stop: threading.Event) -> None:
    """Waits until a worker is ready, then shows a prediction made through the HTTP route like any other.

    Args:
        settings: those of the server.
        echo: prints a line.
        stop: ends the waiting.
    """
    url = f"http://localhost:{settings.port}" + (f"/s/{settings.path_secret}" if settings.path_secret else "")
    session = requests.Session()
    session.trust_env = False  # a proxy set in the shell would not reach this machine
    echo(f"starting on {url}; loading {settings.model}")
    start = time.monotonic()
    while not _is_ready(session, url):
        if stop.wait(READY_POLL):
            return
    echo(f"model ready after {time.monotonic() - start:.1f} s")
    try:
        for line in _predict_sample(session, settings, url):
            echo(line)
    except requests.RequestException as error:
        echo(f"the sample prediction failed: {error}")
    missing = "" if settings.label_studio_url and settings.label_studio_api_key else " (not set now)"
    echo(NEXT_STEPS.format(config=LABELING_CONFIG, url=url, samples=SAMPLES, missing=missing))


def _is_ready(session: requests.Session, url: str) -> bool:
    try:
        return session.get(f"{url}/ready", timeout=READY_TIMEOUT).ok
    except requests.RequestException:
        return False


def _predict_sample(session: requests.Session, settings: Settings, url: str) -> Iterator[str]:
    """Predicts a bundled image through POST /predict, and yields lines that describe the answer.

    Raises:
        requests.RequestException: the web front does not answer, or answers with an error.
    """
    image = base64.b64encode(SAMPLE_IMAGE.read_bytes()).decode()
    body = {
        "tasks": [{"id": 1, "data": {"image": f"data:image/jpeg;base64,{image}"}}],
        "label_config": LABELING_CONFIG.read_text(),
    }
    login = (settings.basic_auth_user, settings.basic_auth_pass) if settings.basic_auth_user else None
    start = time.monotonic()
    response = session.post(f"{url}/predict", json=body, auth=login, timeout=settings.predict_deadline + 10)
    response.raise_for_status()
    prediction: dict[str, Any] = response.json()["results"][0]
    duration = time.monotonic() - start
    if "error" in prediction:
        yield f"the sample prediction failed: {prediction['error']['detail']}"
        return
    yield f"sample prediction of {SAMPLE_IMAGE.name} by {prediction['model_version']} in {1000 * duration:.0f} ms:"
    for region in prediction["result"]:
        box = {key: round(region["value"][key]) for key in ("x", "y", "width", "height")}
        place = "x {x}%, y {y}%, {width}% wide, {height}% high".format(**box)
        yield f"  {region['value']['rectanglelabels'][0]}  score {region['score']:.2f}  {place}"

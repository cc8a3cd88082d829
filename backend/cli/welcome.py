"""What `serve` prints once it is up: the URL, whether the model is ready, one real prediction, and what to click."""

from __future__ import annotations

import base64
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import requests

from backend.settings import Settings

SAMPLES = Path(__file__).parent.parent / "demo" / "samples"
SAMPLE = SAMPLES / "sample-1.jpg"
LABELING_CONFIG = SAMPLES / "labeling_config.xml"

NEXT_STEPS = """
Before Label Studio can use it:
  - start Label Studio with ML_BLOCK_LOCAL_IP=false SSRF_PROTECTION_ENABLED=false
    (1.23.1 and newer refuse a backend on this machine otherwise)
  - start this server with LABEL_STUDIO_URL and LABEL_STUDIO_API_KEY, or it cannot open uploaded pictures{missing}
Then, in Label Studio:
  1. Settings > Labeling Interface > Code: paste {config}
  2. Settings > Model > Connect Model: any name, backend URL {url}
  3. Import the pictures in {samples}
  4. Data Manager: select them, Actions > Retrieve predictions, open one
What it does: {url}/; phrases and thresholds to try: {url}/playground
Ctrl-C stops everything."""


def welcome(settings: Settings, say: Callable[[str], None], stop: threading.Event) -> None:
    """Waits until a worker is ready, then shows a prediction made through the HTTP route like any other."""
    url = f"http://localhost:{settings.port}" + (f"/s/{settings.path_secret}" if settings.path_secret else "")
    say(f"starting on {url}; loading {settings.model}")
    start = time.monotonic()
    while not _is_ready(url):
        if stop.wait(0.2):
            return
    say(f"model ready after {time.monotonic() - start:.1f} s")
    try:
        prediction, took = sample_prediction(settings, url)
        for line in _describe(prediction, took):
            say(line)
    except requests.RequestException as error:
        say(f"the sample prediction failed: {error}")
    missing = "" if settings.label_studio_url and settings.label_studio_api_key else " (not set now)"
    say(NEXT_STEPS.format(config=LABELING_CONFIG, url=url, samples=SAMPLES, missing=missing))


def _local() -> requests.Session:
    """For calls to this machine: a proxy of the shell would not find it."""
    session = requests.Session()
    session.trust_env = False
    return session


def _is_ready(url: str) -> bool:
    try:
        return _local().get(f"{url}/ready", timeout=5).ok
    except requests.RequestException:
        return False


def sample_prediction(settings: Settings, url: str) -> tuple[dict[str, Any], float]:
    """One bundled picture through POST /predict: the answer for it and the seconds that it took.

    Raises:
        requests.RequestException: the web front does not answer, or answers with an error.
    """
    picture = base64.b64encode(SAMPLE.read_bytes()).decode()
    body = {
        "tasks": [{"id": 1, "data": {"image": f"data:image/jpeg;base64,{picture}"}}],
        "label_config": LABELING_CONFIG.read_text(),
    }
    login = (settings.basic_auth_user, settings.basic_auth_pass) if settings.basic_auth_user else None
    start = time.monotonic()
    reply = _local().post(f"{url}/predict", json=body, auth=login, timeout=settings.predict_deadline + 10)
    reply.raise_for_status()
    return reply.json()["results"][0], time.monotonic() - start


def _describe(prediction: dict[str, Any], took: float) -> Iterator[str]:
    if "error" in prediction:
        yield f"the sample prediction failed: {prediction['error']['detail']}"
        return
    yield f"sample prediction of {SAMPLE.name} by {prediction['model_version']} in {1000 * took:.0f} ms:"
    for region in prediction["result"]:
        box = {key: round(region["value"][key]) for key in ("x", "y", "width", "height")}
        where = "x {x}%, y {y}%, {width}% wide, {height}% high".format(**box)
        yield f"  {region['value']['rectanglelabels'][0]}  score {region['score']:.2f}  {where}"

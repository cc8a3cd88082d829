"""Randomly mutated requests never cause an internal error, and no secret reaches a response or the log."""

import copy
import json
import logging
import os
import random
from typing import Any

import pytest
from flask.testing import FlaskClient

from backend.queue.predict_queue import PredictQueue
from backend.queue.redis import connect
from backend.settings import Settings
from backend.web.app import create_app
from model import GroundingDINO
from tests.scenes import make_labeling_config, make_scenes

REQUEST_COUNT = int(os.environ.get("FUZZ", "10000"))
CANARY = "canary-0123456789abcdef"
CONFIG = make_labeling_config(make_scenes(1)).replace("</View>", '<TextArea name="prompt" toName="image"/></View>')
REGION = {
    "id": "a",
    "type": "rectanglelabels",
    "from_name": "label",
    "to_name": "image",
    "value": {"x": 1, "text": ["b"]},
}
REQUESTS_BY_ROUTE: dict[str, dict[str, Any]] = {
    "/setup": {
        "project": "1.17",
        "schema": CONFIG,
        "hostname": "http://ls",
        "access_token": CANARY,
        "extra_params": None,
    },
    "/predict": {
        "tasks": [{"id": 1, "data": {"image": "http://x/a.png"}, "annotations": [{"result": [REGION]}]}],
        "project": "1.17",
        "label_config": CONFIG,
        "params": {"login": "l", "password": CANARY, "context": {"result": [REGION]}},
    },
    "/webhook": {
        "action": "ANNOTATION_CREATED",
        "annotation": {"id": 1, "result": [REGION], "task": 1},
        "project": {"id": 1, "token": CANARY, "task_data_password": CANARY},
    },
    "/playground/look": {"label_config": CONFIG, "image": "data:image/png;base64,AAAA", "project": "1"},
}
UNEXPECTED_VALUES: list[Any] = [
    None, True, 0, -1, 10**30, 1.5, float("nan"), float("inf"), "", " ", "\0", "🙂", "\ud800", "a" * 10_000, [], {},
    [[]], [None], {"": {}}, "<View>", "<View/>", "<!DOCTYPE a><a/>", "$", "$a.²", "../../x", "http://[", "data:,", "s3://",
]  # fmt: skip


def mutate(value: Any, rng: random.Random) -> Any:
    """Changes one thing in a value; returns it, or what replaces it."""
    if isinstance(value, dict) and value and rng.random() < 0.8:
        key = rng.choice(list(value))
        if rng.random() < 0.15:
            del value[key]
        else:
            value[key] = mutate(value[key], rng)
        return value
    if isinstance(value, list) and value and rng.random() < 0.8:
        index = rng.randrange(len(value))
        value[index] = mutate(value[index], rng)
        return value * rng.choice([1, 1, 2])
    if isinstance(value, str) and value and rng.random() < 0.5:
        index = rng.randrange(len(value))
        inserted = rng.choice(["", "<", "&", '"', "$", ".", ",", "\0", "9" * 50])
        return value[:index] + inserted + value[index + 1 :]
    return copy.deepcopy(rng.choice(UNEXPECTED_VALUES))


def encode_body(value: Any, rng: random.Random) -> bytes:
    body = json.dumps(value).encode()
    if rng.random() < 0.1:
        index = rng.randrange(len(body))
        body = body[:index] + bytes([rng.randrange(256)]) + body[index + 1 :]
    return body[: rng.randrange(len(body))] if rng.random() < 0.05 else body


@pytest.fixture
def web_front(redis_url: str, monkeypatch: pytest.MonkeyPatch) -> FlaskClient:
    def time_out(*args: object) -> None:
        raise TimeoutError  # there is no worker: do not wait 10,000 times

    connect(redis_url).flushdb()
    monkeypatch.setattr(PredictQueue, "wait", time_out)
    return create_app(GroundingDINO, Settings(model="demo", redis_url=redis_url)).test_client()


@pytest.mark.timeout(600)
def test_mutated_requests_cause_no_internal_error_and_reveal_no_secret(
    web_front: FlaskClient, caplog: pytest.LogCaptureFixture
) -> None:
    rng = random.Random(7)
    caplog.set_level(logging.DEBUG)
    for number in range(REQUEST_COUNT):
        route = rng.choice(list(REQUESTS_BY_ROUTE))
        value = copy.deepcopy(REQUESTS_BY_ROUTE[route])
        for _ in range(rng.randrange(1, 4)):
            value = mutate(value, rng)
        body = encode_body(value, rng)
        answer = web_front.post(route, data=body, content_type="application/json")
        assert answer.status_code in (200, 400, 404, 413, 422, 503), (number, route, body[:500], answer.text)
        assert CANARY not in answer.text
        assert "Traceback" not in answer.text
        json.loads(answer.text)
    assert CANARY not in caplog.text

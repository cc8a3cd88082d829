"""Our class below label-studio-ml's own front, where that is installed: it is on no registry in version 2."""

import pytest
import requests

from model import GroundingDINO
from tests.scenes import config_for, data_uri, scenes
from tests.servers import Served

api = pytest.importorskip("label_studio_ml.api", reason="label-studio-ml 2.x is not installed")


def test_setup_and_predict_answer_as_from_our_own_front(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("MODEL", "demo"), ("MODEL_DIR", str(served.model_dir)), ("REDIS_URL", "")):
        monkeypatch.setenv(name, value)
    shown = scenes(2)
    config = config_for(shown)
    setup = {
        "project": "1.17",
        "schema": config,
        "hostname": "http://ls",
        "access_token": "x",
        "extra_params": {"a": 1},
    }
    tasks = [{"id": i, "data": {"image": data_uri(scene.image)}} for i, scene in enumerate(shown)]
    asked = {"project": "1.17", "label_config": config, "tasks": tasks, "params": {"login": "", "password": ""}}
    hosted = api.init_app(GroundingDINO).test_client()
    version = hosted.post("/setup", json=setup).json["model_version"]
    assert version == requests.post(f"{served.url}/setup", json=setup, timeout=10).json()["model_version"]
    answers = hosted.post("/predict", json=asked).json["results"]
    assert answers == requests.post(f"{served.url}/predict", json=asked, timeout=100).json()["results"]
    assert all(answer["result"] for answer in answers)

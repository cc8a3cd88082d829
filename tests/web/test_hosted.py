"""The plugin hosted by label-studio-ml 2.x, where that is installed; no package registry has that version."""

import pytest
import requests

from model import GroundingDINO
from tests.scenes import make_labeling_config, make_scenes, to_data_uri
from tests.servers import ServeProcess

api = pytest.importorskip("label_studio_ml.api", reason="label-studio-ml 2.x is not installed")


def test_setup_and_predict_answer_as_in_our_own_web_front(
    served: ServeProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("MODEL", "demo"), ("MODEL_DIR", str(served.model_dir)), ("REDIS_URL", "")):
        monkeypatch.setenv(name, value)
    drawn = make_scenes(2)
    config = make_labeling_config(drawn)
    setup = {
        "project": "1.17",
        "schema": config,
        "hostname": "http://ls",
        "access_token": "x",
        "extra_params": {"a": 1},
    }
    tasks = [{"id": i, "data": {"image": to_data_uri(scene.image)}} for i, scene in enumerate(drawn)]
    request = {"project": "1.17", "label_config": config, "tasks": tasks, "params": {"login": "", "password": ""}}
    hosted = api.init_app(GroundingDINO).test_client()
    version = hosted.post("/setup", json=setup).json["model_version"]
    assert version == requests.post(f"{served.url}/setup", json=setup, timeout=10).json()["model_version"]
    answers = hosted.post("/predict", json=request).json["results"]
    assert answers == requests.post(f"{served.url}/predict", json=request, timeout=100).json()["results"]
    assert all(answer["result"] for answer in answers)

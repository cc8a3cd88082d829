"""The pages for people and for Prometheus, through HTTP; tests/e2e looks at them in a browser."""

import time

import pytest
import requests
from prometheus_client.parser import text_string_to_metric_families

from backend.monitoring.project_stats import BOX_OUTCOMES
from backend.web.playground import LOWEST
from tests.scenes import config_for, data_uri, scenes
from tests.servers import Served, wait_for

DRAWN = scenes(3)
CONFIG = config_for(DRAWN)
PROJECT = "41.1763800000"


def predict(served: Served, uri: str, task: int = 1, project: str = PROJECT, **headers: str) -> requests.Response:
    body = {"tasks": [{"id": task, "data": {"image": uri}}], "label_config": CONFIG, "project": project}
    return requests.post(f"{served.url}/predict", json=body, headers=headers, timeout=60)


def look(served: Served, **body: object) -> requests.Response:
    given = {"image": data_uri(DRAWN[0].image), "label_config": CONFIG, **body}
    return requests.post(f"{served.url}/playground/look", json=given, timeout=60)


@pytest.mark.parametrize("path", ["/", "/playground", "/pages/style.css", "/pages/boxes.js", "/status", "/metrics"])
def test_nothing_of_another_host_may_run_in_a_page(served: Served, path: str) -> None:
    answer = requests.get(served.url + path, timeout=10)
    assert answer.status_code == 200
    assert "default-src 'none'" in answer.headers["Content-Security-Policy"]
    assert "unsafe" not in answer.headers["Content-Security-Policy"]
    assert answer.headers["X-Content-Type-Options"] == "nosniff"
    assert "http://" not in answer.text.replace("http://www.w3.org/2000/svg", "")
    assert "https://" not in answer.text


@pytest.mark.parametrize("path", ["/pages/../api.py", "/pages/%2e%2e/api.py", "/playground/samples/../shapes.py"])
def test_only_pages_are_served(served: Served, path: str) -> None:
    with requests.Session() as session:
        request = requests.Request("GET", served.url).prepare()
        request.url = served.url + path
        assert session.send(request, timeout=10).status_code == 404


def test_the_status_tells_what_happened(served: Served) -> None:
    requests.post(f"{served.url}/setup", json={"project": PROJECT, "schema": CONFIG}, timeout=10)
    time.sleep(2.1)  # a picture every two seconds
    result = predict(served, data_uri(DRAWN[0].image), 77).json()["results"][0]["result"]
    predict(served, "http://127.0.0.1:1/away.png", 78)
    state = requests.get(f"{served.url}/status", timeout=10).json()
    (worker,) = [row for row in state["workers"] if row["queue"] == "predict"]
    assert (worker["device"], worker["batch_size"] > 0) == ("cpu", True)
    (card,) = [row for row in state["projects"] if row["project"] == "41"]
    assert all(f'value="{row["label"]}"' in CONFIG for row in card["labels"])
    assert len(card["labels"]) == CONFIG.count("<Label ")
    assert (state["failures"][0]["task"], state["failures"][0]["project"]) == (78, "41")
    assert "could not be fetched" in state["failures"][0]["detail"]
    (shown,) = [row for row in state["pictures"] if row["task"] == 77]
    assert [box["score"] for box in shown["boxes"]] == [region["score"] for region in result]
    assert sum(state["rate"]) >= 2


def test_what_annotators_did_is_counted_once(served: Served) -> None:
    requests.post(f"{served.url}/setup", json={"project": "42.1", "schema": CONFIG}, timeout=10)
    result = predict(served, data_uri(DRAWN[1].image), 5, "42.1").json()["results"][0]["result"]
    left = [{**region, "origin": "prediction"} for region in result[1:]]
    annotation = {"id": 9, "task": 5, "updated_at": "2026-01-01", "result": left}
    event = {"action": "ANNOTATION_CREATED", "project": {"id": 42}, "annotation": annotation}
    for _ in range(3):
        assert requests.post(f"{served.url}/webhook", json=event, timeout=10).ok
    projects = requests.get(f"{served.url}/status", timeout=10).json()["projects"]
    (card,) = [row for row in projects if row["project"] == "42"]
    totals = [sum(counts[fate] for counts in card["boxes"].values()) for fate in BOX_OUTCOMES]
    assert totals == [len(result) - 1, 0, 1, 0]


def test_metrics_of_the_front_and_the_workers(served: Served) -> None:
    predict(served, data_uri(DRAWN[2].image), 90)
    wanted = {"download", "decode", "queue_wait", "forward", "post"}

    def stages() -> set[str]:
        text = requests.get(f"{served.url}/metrics", timeout=10).text
        families = {family.name: family for family in text_string_to_metric_families(text)}
        assert len(families) == text.count("# TYPE ")  # each comes once
        assert families["gdino_requests"].samples
        assert {"gdino_workers", "gdino_queue_chunks", "gdino_outbox_chunks", "gdino_boxes"} <= set(families)
        samples = families["gdino_stage_seconds"].samples
        return {s.labels["stage"] for s in samples if s.name.endswith("_count") and "worker" in s.labels and s.value}

    wait_for(lambda: stages() == wanted, 10, "figures of the worker")


def test_a_requests_id_follows_its_job(served: Served) -> None:
    answer = predict(served, data_uri(scenes(1, seed=77)[0].image), 91, **{"X-Request-ID": "follow-me"})
    assert answer.headers["X-Request-ID"] == "follow-me"
    wait_for(lambda: served.text().count("[follow-me]") >= 2, 5, "lines of the request")
    lines = [line for line in served.text().splitlines() if "[follow-me]" in line]
    assert any("backend.prediction.job_report" in line for line in lines)
    assert any("POST /predict 200 in" in line for line in lines)


def test_the_playground_answers_what_predict_answers(served: Served) -> None:
    found = look(served).json()
    result = predict(served, data_uri(DRAWN[0].image)).json()["results"][0]["result"]
    assert {row["threshold"] for row in found["labels"]} == {0.3}
    names = [row["label"] for row in found["labels"]]
    strong = {(names[box["place"]], box["score"]) for box in found["boxes"] if box["score"] >= 0.3}
    assert {(region["value"]["rectanglelabels"][0], region["score"]) for region in result} <= strong
    assert min(box["score"] for box in found["boxes"]) >= LOWEST
    assert len(found["boxes"]) > len(result)


def test_what_is_tried_is_not_shown_to_others(served: Served) -> None:
    time.sleep(2.1)
    look(served)
    state = requests.get(f"{served.url}/status", timeout=10).json()
    assert "playground" not in {row["task"] for row in (*state["pictures"], *state["failures"])}


def test_negative_phrases_are_told_apart(served: Served) -> None:
    config = CONFIG.replace("<RectangleLabels ", '<RectangleLabels model_negative_values="ring, cross" ')
    boxes = look(served, label_config=config, image=data_uri(DRAWN[1].image)).json()["boxes"]
    assert any(box["place"] is None for box in boxes)
    assert any(box["place"] is not None for box in boxes)


@pytest.mark.parametrize(
    ("body", "status", "text"),
    [
        ({"label_config": "<View>"}, 422, "not valid XML"),
        ({"label_config": "<View/>"}, 422, "no Image"),
        ({"image": "data:image/png;base64,AAAA"}, 422, "not a picture"),
        ({"image": "http://127.0.0.1/x.png"}, 400, "data: address"),
        ({"image": 3}, 400, "strings"),
    ],
)
def test_the_playground_says_what_is_wrong(served: Served, body: dict, status: int, text: str) -> None:
    answer = look(served, **body)
    assert (answer.status_code, text in answer.json()["error"]["detail"]) == (status, True), answer.text


def test_a_projects_config_can_be_tried(served: Served) -> None:
    requests.post(f"{served.url}/setup", json={"project": "43.1", "schema": CONFIG}, timeout=10)
    assert requests.get(f"{served.url}/playground/config/43", timeout=10).json() == {"label_config": CONFIG}
    assert requests.get(f"{served.url}/playground/config/999", timeout=10).status_code == 404


def test_the_pages_are_behind_the_same_door(start_server) -> None:
    server = start_server(PATH_SECRET="0123456789abcdef", BASIC_AUTH_USER="u", BASIC_AUTH_PASS="p")
    server.wait_until_ready()
    for path in ("/", "/playground", "/status", "/metrics", "/pages/style.css"):
        assert requests.get(server.url + path, auth=("u", "p"), timeout=10).status_code == 404
        headers = {"X-Request-ID": f"of{path.replace('/', '-')}"}  # one of its own, not that of the request before
        shut = requests.get(f"{server.url}/s/0123456789abcdef{path}", headers=headers, timeout=10)
        assert shut.headers["X-Request-ID"] == headers["X-Request-ID"]
        assert (shut.status_code, shut.headers["WWW-Authenticate"][:5]) == (401, "Basic")
        assert requests.get(f"{server.url}/s/0123456789abcdef{path}", auth=("u", "p"), timeout=10).status_code == 200
    bare = requests.get(f"{server.url}/s/0123456789abcdef", auth=("u", "p"), timeout=10, allow_redirects=False)
    assert bare.headers["Location"].endswith("/s/0123456789abcdef/")


def test_pictures_come_only_when_there_is_another(served: Served) -> None:
    time.sleep(2.1)
    predict(served, data_uri(scenes(1, seed=78)[0].image), 92)
    state = requests.get(f"{served.url}/status", timeout=10).json()
    again = requests.get(f"{served.url}/status?seen={state['pictures'][0]['time']}", timeout=10).json()
    assert again["pictures"] is None


def test_pictures_are_not_kept_where_they_may_not_be_shown(start_server) -> None:
    server = start_server(SHOW_PICTURES="false", LOG_FORMAT="json")
    server.wait_until_ready()
    predict(server, data_uri(DRAWN[0].image))
    assert requests.get(f"{server.url}/status", timeout=10).json()["pictures"] == []
    assert '"message": "POST /predict 200' in server.text()

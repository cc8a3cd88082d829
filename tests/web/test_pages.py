"""The pages and their data over HTTP; tests/e2e opens them in a browser."""

import time

import pytest
import requests
from prometheus_client.parser import text_string_to_metric_families

from backend.monitoring.feedback import BOX_OUTCOMES
from backend.web.playground import MIN_SCORE
from tests.scenes import make_labeling_config, make_scenes, to_data_uri
from tests.servers import ServeProcess, wait_for

DRAWN = make_scenes(3)
CONFIG = make_labeling_config(DRAWN)
PROJECT = "41.1763800000"


def predict(served: ServeProcess, uri: str, task: int = 1, project: str = PROJECT, **headers: str) -> requests.Response:
    body = {"tasks": [{"id": task, "data": {"image": uri}}], "label_config": CONFIG, "project": project}
    return requests.post(f"{served.url}/predict", json=body, headers=headers, timeout=60)


def predict_in_playground(served: ServeProcess, **fields: object) -> requests.Response:
    body = {"image": to_data_uri(DRAWN[0].image), "label_config": CONFIG, **fields}
    return requests.post(f"{served.url}/playground/look", json=body, timeout=60)


@pytest.mark.parametrize("path", ["/", "/playground", "/pages/style.css", "/pages/boxes.js", "/status", "/metrics"])
def test_pages_load_nothing_from_another_host(served: ServeProcess, path: str) -> None:
    answer = requests.get(served.url + path, timeout=10)
    assert answer.status_code == 200
    assert "default-src 'none'" in answer.headers["Content-Security-Policy"]
    assert "unsafe" not in answer.headers["Content-Security-Policy"]
    assert answer.headers["X-Content-Type-Options"] == "nosniff"
    assert "http://" not in answer.text.replace("http://www.w3.org/2000/svg", "")
    assert "https://" not in answer.text


@pytest.mark.parametrize(
    "path",
    ["/static/status.html", "/pages/../app.py", "/pages/%2e%2e/app.py", "/playground/samples/../shapes.py"],
)
def test_only_static_files_are_served(served: ServeProcess, path: str) -> None:
    with requests.Session() as session:
        request = requests.Request("GET", served.url).prepare()
        request.url = served.url + path
        assert session.send(request, timeout=10).status_code == 404


def test_the_status_shows_workers_projects_failures_and_images(served: ServeProcess) -> None:
    requests.post(f"{served.url}/setup", json={"project": PROJECT, "schema": CONFIG}, timeout=10)
    time.sleep(2.1)  # one image every two seconds
    result = predict(served, to_data_uri(DRAWN[0].image), 77).json()["results"][0]["result"]
    predict(served, "http://127.0.0.1:1/away.png", 78)
    state = requests.get(f"{served.url}/status", timeout=10).json()
    (worker,) = [row for row in state["workers"] if row["queue"] == "predict"]
    assert (worker["device"], worker["batch_size"] > 0) == ("cpu", True)
    (summary,) = [row for row in state["projects"] if row["project"] == "41"]
    assert all(f'value="{row["label"]}"' in CONFIG for row in summary["labels"])
    assert len(summary["labels"]) == CONFIG.count("<Label ")
    assert (state["failures"][0]["task"], state["failures"][0]["project"]) == (78, "41")
    assert "could not be fetched" in state["failures"][0]["detail"]
    (image,) = [row for row in state["pictures"] if row["task"] == 77]
    assert [box["score"] for box in image["boxes"]] == [region["score"] for region in result]
    assert sum(state["rate"]) >= 2


def test_repeated_annotation_events_count_once(served: ServeProcess) -> None:
    requests.post(f"{served.url}/setup", json={"project": "42.1", "schema": CONFIG}, timeout=10)
    result = predict(served, to_data_uri(DRAWN[1].image), 5, "42.1").json()["results"][0]["result"]
    kept = [{**region, "origin": "prediction"} for region in result[1:]]
    annotation = {"id": 9, "task": 5, "updated_at": "2026-01-01", "result": kept}
    event = {"action": "ANNOTATION_CREATED", "project": {"id": 42}, "annotation": annotation}
    for _ in range(3):
        assert requests.post(f"{served.url}/webhook", json=event, timeout=10).ok
    projects = requests.get(f"{served.url}/status", timeout=10).json()["projects"]
    (summary,) = [row for row in projects if row["project"] == "42"]
    totals = [sum(counts[outcome] for counts in summary["boxes"].values()) for outcome in BOX_OUTCOMES]
    assert totals == [len(result) - 1, 0, 1, 0]


def test_metrics_of_the_web_front_and_the_workers(served: ServeProcess) -> None:
    predict(served, to_data_uri(DRAWN[2].image), 90)
    expected = {"download", "decode", "queue_wait", "forward", "post"}

    def list_stages() -> set[str]:
        text = requests.get(f"{served.url}/metrics", timeout=10).text
        families = {family.name: family for family in text_string_to_metric_families(text)}
        assert len(families) == text.count("# TYPE ")  # each family occurs once
        assert families["gdino_requests"].samples
        assert {"gdino_workers", "gdino_queue_chunks", "gdino_outbox_chunks", "gdino_boxes"} <= set(families)
        samples = families["gdino_stage_seconds"].samples
        return {s.labels["stage"] for s in samples if s.name.endswith("_count") and "worker" in s.labels and s.value}

    wait_for(lambda: list_stages() == expected, 10, "metrics of the worker")


def test_the_request_id_follows_the_job(served: ServeProcess) -> None:
    answer = predict(served, to_data_uri(make_scenes(1, seed=77)[0].image), 91, **{"X-Request-ID": "follow-me"})
    assert answer.headers["X-Request-ID"] == "follow-me"
    wait_for(lambda: served.read_log().count("[follow-me]") >= 2, 5, "log lines of the request")
    lines = [line for line in served.read_log().splitlines() if "[follow-me]" in line]
    assert any("backend.prediction.job_report" in line for line in lines)
    assert any("POST /predict 200 in" in line for line in lines)


def test_the_playground_returns_the_boxes_of_predict(served: ServeProcess) -> None:
    answer = predict_in_playground(served).json()
    result = predict(served, to_data_uri(DRAWN[0].image)).json()["results"][0]["result"]
    assert {row["threshold"] for row in answer["labels"]} == {0.3}
    names = [row["label"] for row in answer["labels"]]
    above_threshold = {(names[box["place"]], box["score"]) for box in answer["boxes"] if box["score"] >= 0.3}
    assert {(region["value"]["rectanglelabels"][0], region["score"]) for region in result} <= above_threshold
    assert min(box["score"] for box in answer["boxes"]) >= MIN_SCORE
    assert len(answer["boxes"]) > len(result)


def test_playground_images_are_not_on_the_status_page(served: ServeProcess) -> None:
    time.sleep(2.1)  # a thumbnail is due
    before = requests.get(f"{served.url}/status", timeout=10).json()
    assert predict_in_playground(served).ok
    assert predict_in_playground(served, image="data:image/png;base64,AAAA").status_code == 422
    after = requests.get(f"{served.url}/status", timeout=10).json()
    assert (after["pictures"], after["failures"]) == (before["pictures"], before["failures"])


def test_boxes_of_negative_phrases_have_no_place(served: ServeProcess) -> None:
    config = CONFIG.replace("<RectangleLabels ", '<RectangleLabels model_negative_values="ring, cross" ')
    boxes = predict_in_playground(served, label_config=config, image=to_data_uri(DRAWN[1].image)).json()["boxes"]
    assert any(box["place"] is None for box in boxes)
    assert any(box["place"] is not None for box in boxes)


@pytest.mark.parametrize(
    ("fields", "status", "text"),
    [
        ({"label_config": "<View>"}, 422, "not valid XML"),
        ({"label_config": "<View/>"}, 422, "no Image"),
        ({"image": "data:image/png;base64,AAAA"}, 422, "not a supported image"),
        ({"image": "http://127.0.0.1/x.png"}, 400, "data: address"),
        ({"image": 3}, 400, "strings"),
    ],
)
def test_the_playground_reports_errors(served: ServeProcess, fields: dict, status: int, text: str) -> None:
    answer = predict_in_playground(served, **fields)
    assert (answer.status_code, text in answer.json()["error"]["detail"]) == (status, True), answer.text


def test_the_playground_gets_a_projects_labeling_config(served: ServeProcess) -> None:
    requests.post(f"{served.url}/setup", json={"project": "43.1", "schema": CONFIG}, timeout=10)
    assert requests.get(f"{served.url}/playground/config/43", timeout=10).json() == {"label_config": CONFIG}
    assert requests.get(f"{served.url}/playground/config/999", timeout=10).status_code == 404


def test_the_pages_need_the_secret_path_and_the_login(start_server) -> None:
    server = start_server(PATH_SECRET="0123456789abcdef", BASIC_AUTH_USER="u", BASIC_AUTH_PASS="p")
    server.wait_until_ready()
    for path in ("/", "/playground", "/status", "/metrics", "/pages/style.css"):
        assert requests.get(server.url + path, auth=("u", "p"), timeout=10).status_code == 404
        headers = {"X-Request-ID": f"id{path.replace('/', '-')}"}  # must not be that of the request before
        refused = requests.get(f"{server.url}/s/0123456789abcdef{path}", headers=headers, timeout=10)
        assert refused.headers["X-Request-ID"] == headers["X-Request-ID"]
        assert (refused.status_code, refused.headers["WWW-Authenticate"][:5]) == (401, "Basic")
        assert requests.get(f"{server.url}/s/0123456789abcdef{path}", auth=("u", "p"), timeout=10).status_code == 200
    without_slash = requests.get(f"{server.url}/s/0123456789abcdef", auth=("u", "p"), timeout=10, allow_redirects=False)
    assert without_slash.headers["Location"].endswith("/s/0123456789abcdef/")


def test_images_are_sent_only_when_there_is_a_new_one(served: ServeProcess) -> None:
    time.sleep(2.1)
    predict(served, to_data_uri(make_scenes(1, seed=78)[0].image), 92)
    state = requests.get(f"{served.url}/status", timeout=10).json()
    again = requests.get(f"{served.url}/status?seen={state['pictures'][0]['time']}", timeout=10).json()
    assert again["pictures"] is None


def test_images_that_may_not_be_shown_are_not_kept(start_server) -> None:
    server = start_server(SHOW_PICTURES="false", LOG_FORMAT="json")
    server.wait_until_ready()
    predict(server, to_data_uri(DRAWN[0].image))
    assert requests.get(f"{server.url}/status", timeout=10).json()["pictures"] == []
    assert '"message": "POST /predict 200' in server.read_log()

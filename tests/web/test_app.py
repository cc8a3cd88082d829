import base64
import json
import logging
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from flask.testing import FlaskClient
from redis import Redis

from backend.monitoring.feedback import ANNOTATIONS_KEY, AnnotationLog
from backend.queue.redis import connect
from backend.settings import Settings
from backend.web.app import create_app
from model import GroundingDINO
from tests.scenes import make_labeling_config, make_scenes
from tests.servers import ServeProcess

CONFIG = make_labeling_config(make_scenes(1))
EMPTY_CONFIG = "<View></View>"
UNREACHABLE_REDIS = "redis://127.0.0.1:1"


def make_client(**settings: object) -> FlaskClient:
    return create_app(GroundingDINO, Settings(model="demo", **settings)).test_client()


@pytest.fixture
def redisless() -> FlaskClient:
    """A web web_front whose Redis does not answer."""
    return make_client(redis_url=UNREACHABLE_REDIS)


@pytest.fixture
def workerless(redis_url: str) -> FlaskClient:
    """A web web_front whose Redis has no workers."""
    connect(redis_url).flushdb()
    return make_client(redis_url=redis_url, predict_deadline=1)


def make_setup_body(schema: str, project: str = "7.1795334225") -> dict:
    return {
        "project": project,
        "schema": schema,
        "hostname": "http://ls",
        "access_token": "s3cret",
        "extra_params": None,
    }


def test_health_and_setup_need_neither_redis_nor_worker(redisless: FlaskClient) -> None:
    redisless.post("/setup", json=make_setup_body(CONFIG))  # the first request reads the checkpoint's files
    start = time.monotonic()
    assert redisless.get("/health").json["status"] == "UP"
    assert redisless.post("/setup", json=make_setup_body(CONFIG)).json["model_version"].startswith("demo-")
    assert time.monotonic() - start < 0.5


@pytest.mark.parametrize("schema", [EMPTY_CONFIG, "", "<View", CONFIG])
def test_setup_never_blocks_connecting(workerless: FlaskClient, schema: str) -> None:
    answer = workerless.post("/setup", json=make_setup_body(schema))
    assert answer.status_code == 200
    assert isinstance(answer.json["model_version"], str)


def test_the_version_depends_on_phrases_and_thresholds(workerless: FlaskClient) -> None:
    def version(schema: str) -> str:
        return workerless.post("/setup", json=make_setup_body(schema)).json["model_version"]

    assert version(CONFIG) == version(CONFIG.replace("<View>", '<View><Header value="Hi"/>'))
    changed = [
        EMPTY_CONFIG,
        CONFIG.replace('value="', 'predicted_values="x" value="', 2),
        CONFIG.replace("toName", 'model_score_threshold="0.5" toName'),
    ]
    assert len({version(schema) for schema in [CONFIG, *changed]}) == 4


def test_versions_contain_the_version_that_setup_answered(workerless: FlaskClient) -> None:
    version = workerless.post("/setup", json=make_setup_body(CONFIG)).json["model_version"]
    assert version in workerless.get("/versions").json["versions"]


def test_versions_answer_without_redis(redisless: FlaskClient) -> None:
    assert len(redisless.get("/versions").json["versions"]) == 1


def test_ready_counts_workers(workerless: FlaskClient, served: ServeProcess) -> None:
    assert workerless.get("/ready").status_code == 503
    assert workerless.get("/ready").json == {"ready": False, "workers": 0}


def test_predict_without_redis_fails_fast(redisless: FlaskClient) -> None:
    start = time.monotonic()
    answer = redisless.post("/predict", json={"tasks": [{"id": 1, "data": {"image": "x"}}], "label_config": CONFIG})
    assert (answer.status_code, answer.json["error"]["code"]) == (503, "queue_unavailable")
    assert time.monotonic() - start < 3


def test_a_prediction_unfinished_at_the_deadline_is_not_ready(
    workerless: FlaskClient, caplog: pytest.LogCaptureFixture
) -> None:
    start = time.monotonic()
    tasks = [{"id": i, "data": {"image": "x"}} for i in range(20)]
    answer = workerless.post("/predict", json={"tasks": tasks, "label_config": CONFIG})
    assert answer.status_code == 200
    assert [result["error"]["code"] for result in answer.json["results"]] == ["not_ready"] * 20
    assert time.monotonic() - start < 3
    assert "tasks 16, 17, 18, 19: the prediction is not finished yet" in caplog.text


def test_a_config_that_cannot_be_served_is_422_with_the_reason(workerless: FlaskClient) -> None:
    answer = workerless.post("/predict", json={"tasks": [], "label_config": EMPTY_CONFIG})
    assert answer.status_code == 422
    assert answer.json["error"]["code"] == "labeling_config"
    assert "no Image" in answer.json["error"]["detail"]


def test_the_log_names_route_project_and_cause(workerless: FlaskClient, caplog: pytest.LogCaptureFixture) -> None:
    workerless.post("/predict", json={"tasks": [], "label_config": EMPTY_CONFIG, "project": "7.1795334225"})
    assert "POST /predict, project 7: labeling_config: the labeling config has no Image" in caplog.text


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'"x"',
        b"[" * 100_000,
        b'{"tasks": 1, "label_config": "<View/>"}',
        b'{"tasks": [1], "label_config": "<View/>"}',
        b'{"tasks": [{"data": []}, {"data": "x"}], "label_config": "<View/>"}',
        b'{"tasks": [], "label_config": 7}',
        b'{"tasks": [], "label_config": "<View/>", "params": [1]}',
        b"\xff\xfe",
    ],
)
def test_a_bad_request_is_400(workerless: FlaskClient, body: bytes) -> None:
    answer = workerless.post("/predict", data=body, content_type="application/json")
    assert (answer.status_code, answer.json["error"]["code"]) == (400, "bad_request")


def test_a_large_body_is_413(workerless: FlaskClient) -> None:
    workerless.application.config["MAX_CONTENT_LENGTH"] = 1000
    answer = workerless.post("/predict", json={"tasks": [{"data": {"image": "x" * 1000}}], "label_config": CONFIG})
    assert (answer.status_code, answer.json["error"]["code"]) == (413, "request_too_large")


def test_unknown_routes_and_methods_return_an_error_object(workerless: FlaskClient) -> None:
    assert workerless.get("/nothing").json["error"]["code"] == "not_found"
    assert workerless.get("/predict").status_code == 405
    assert "error" in workerless.get("/predict").json


def test_an_internal_error_shows_no_traceback(redis_url: str, caplog: pytest.LogCaptureFixture) -> None:
    def broken(**kwargs: object) -> None:
        raise ZeroDivisionError("s3cret")

    answer = create_app(broken, Settings(redis_url=redis_url)).test_client().post("/setup", json={})
    assert (answer.status_code, answer.json["error"]["code"]) == (500, "internal")
    assert b"s3cret" not in answer.data
    assert "ZeroDivisionError" in caplog.text


def make_login_header(user: str, password: str) -> dict[str, str]:
    return {"Authorization": "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()}


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 401),
        (make_login_header("me", "wrong"), 401),
        (make_login_header("you", "geheim-ü"), 401),
        ({"Authorization": "Bearer x"}, 401),
        ({"Authorization": "Basic !!!"}, 401),
        (make_login_header("me", "geheim-ü"), 200),
    ],
)
def test_basic_auth_protects_all_routes_but_health_and_webhook(
    redis_url: str, headers: dict[str, str], status: int
) -> None:
    web_front = make_client(redis_url=redis_url, basic_auth_user="me", basic_auth_pass="geheim-ü")
    assert web_front.post("/setup", json=make_setup_body(CONFIG), headers=headers).status_code == status
    assert web_front.get("/versions", headers=headers).status_code == status
    assert web_front.get("/health").status_code == 200
    assert web_front.post("/webhook", json={"action": "PROJECT_UPDATED"}).status_code == 200


def test_start_training_needs_the_login_that_label_studio_sends_with_it(redis_url: str) -> None:
    web_front = make_client(redis_url=redis_url, basic_auth_user="me", basic_auth_pass="p")
    start = {"action": "START_TRAINING", "project": {"id": 7}}
    assert web_front.post("/webhook", json=start).status_code == 401
    answer = web_front.post("/webhook", json=start, auth=("me", "p"))
    assert (answer.status_code, answer.json["error"]["code"]) == (400, "bad_request")
    assert "set LABEL_STUDIO_URL" in answer.json["error"]["detail"]


def test_annotation_events_are_recorded_without_secrets(workerless: FlaskClient, redis_url: str) -> None:
    annotation = {"id": 4, "task": 2, "result": [], "was_cancelled": False, "completed_by": 1}
    project = {"id": 7, "token": "s3cret", "task_data_password": "s3cret"}
    two_annotations = [annotation, {**annotation, "id": 5}]
    for action, annotations in [("ANNOTATION_CREATED", annotation), ("ANNOTATIONS_CREATED", two_annotations)]:
        body = {"action": action, "annotation": annotations, "project": project, "task": {"data": {"image": "s3cret"}}}
        assert workerless.post("/webhook", json=body).status_code == 200
    workerless.post("/webhook", json={"action": "ANNOTATIONS_DELETED", "annotations": [{"id": 4}], "project": project})
    assert "s3cret" not in repr(connect(redis_url).hgetall(f"{ANNOTATIONS_KEY}7"))
    assert AnnotationLog(connect(redis_url), "7").get_annotations() == {5: 2}


def test_no_secret_reaches_the_log(workerless: FlaskClient, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    workerless.post("/setup", json=make_setup_body(EMPTY_CONFIG))
    workerless.post(
        "/predict",
        json={"tasks": [], "label_config": EMPTY_CONFIG, "params": {"login": "s3cret", "password": "s3cret"}},
    )
    workerless.post("/webhook", json={"action": "X", "project": {"id": 1, "token": "s3cret"}})
    assert "s3cret" not in caplog.text


def test_no_secret_reaches_the_queue(workerless: FlaskClient, redis_url: str) -> None:
    tasks = [{"id": 1, "data": {"image": "x", "patient": "s3cret"}}]
    params = {"login": "s3cret", "password": "s3cret"}
    workerless.post(
        "/predict", json={"tasks": tasks, "label_config": CONFIG, "params": params, "access_token": "s3cret"}
    )
    connection: Redis = connect(redis_url)
    stored = [connection.hgetall(key) for key in connection.keys("rq:job:*") if connection.type(key) == b"hash"]
    assert stored
    jobs = [json.loads(__import__("zlib").decompress(job[b"data"])) for job in stored]
    assert "s3cret" not in repr(jobs)


@pytest.mark.parametrize("annotation", [5, True, "x", [5], {"id": "x"}])
def test_a_malformed_event_is_accepted(workerless: FlaskClient, annotation: object) -> None:
    assert workerless.post("/webhook", json={"action": "X", "annotation": annotation, "project": 5}).status_code == 200


def test_150_waiting_requests_are_answered(redis_url: str) -> None:
    web_front = create_app(GroundingDINO, Settings(model="demo", redis_url=redis_url, predict_deadline=2))
    body = {"label_config": CONFIG}

    def predict(number: int) -> int:
        tasks = [{"id": number, "data": {"image": "x"}}]
        return web_front.test_client().post("/predict", json={**body, "tasks": tasks}).status_code

    with ThreadPoolExecutor(150) as pool:
        assert set(pool.map(predict, range(150))) == {200}


def test_a_request_beyond_the_waiting_limit_is_overloaded(redis_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("backend.web.predict_response.MAX_WAITING_REQUESTS", 0)
    answer = make_client(redis_url=redis_url).post("/predict", json={"tasks": [], "label_config": CONFIG})
    assert (answer.status_code, answer.json["error"]["code"]) == (503, "overloaded")
    assert int(answer.headers["Retry-After"]) > 0


def test_a_full_queue_refuses_large_requests_and_serves_an_annotator(
    workerless: FlaskClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("backend.queue.predict_queue.MAX_WAITING_CHUNKS", 2)
    tasks = [{"id": i, "data": {"image": "x"}} for i in range(12)]
    answer = workerless.post("/predict", json={"tasks": tasks, "label_config": CONFIG})
    assert (answer.status_code, answer.json["error"]["code"]) == (503, "overloaded")
    assert int(answer.headers["Retry-After"]) > 0
    for number in range(3):
        one = [{"id": 100 + number, "data": {"image": "x"}}]
        assert workerless.post("/predict", json={"tasks": one, "label_config": CONFIG}).status_code == 200


def test_spaces_keep_a_long_wait_alive(workerless: FlaskClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("backend.web.predict_response.KEEP_ALIVE_INTERVAL", 0.2)
    task = {"id": 7, "data": {"image": "y"}}
    answer = workerless.post("/predict", json={"tasks": [task], "label_config": CONFIG})
    assert answer.text.startswith("   ")
    assert answer.json["results"][0]["error"]["code"] == "not_ready"
    late = workerless.post("/predict", json={"tasks": [task], "label_config": EMPTY_CONFIG})
    assert late.status_code == 422  # an error within the first interval keeps its status


SECRET = "a-secret-of-20-chars"


def test_behind_a_secret_path_nothing_else_exists(redis_url: str) -> None:
    web_front = make_client(redis_url=redis_url, path_secret=SECRET, predict_deadline=1)
    assert web_front.get(f"/s/{SECRET}/health").status_code == web_front.get("/health").status_code == 200
    assert web_front.post(f"/s/{SECRET}/setup", json=make_setup_body(CONFIG)).status_code == 200
    webhook = {"action": "PROJECT_UPDATED", "project": {"id": 1}}
    assert web_front.post(f"/s/{SECRET}/webhook", json=webhook).status_code == 200
    for path in ("/setup", "/webhook", f"/s/{SECRET}x/setup", f"/s/{SECRET[:-1]}/setup", "/s//setup", "/s/%FF/setup"):
        answer = web_front.post(path, json=make_setup_body(CONFIG))
        assert (answer.status_code, answer.json["error"]["code"]) == (404, "not_found")


def test_a_secret_path_and_basic_auth_work_together(redis_url: str) -> None:
    web_front = make_client(redis_url=redis_url, path_secret=SECRET, basic_auth_user="u", basic_auth_pass="p")
    assert web_front.post(f"/s/{SECRET}/setup", json=make_setup_body(CONFIG)).status_code == 401
    assert web_front.post(f"/s/{SECRET}/setup", json=make_setup_body(CONFIG), auth=("u", "p")).status_code == 200
    assert web_front.post("/setup", json=make_setup_body(CONFIG), auth=("u", "p")).status_code == 404

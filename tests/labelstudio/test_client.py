import base64
import contextlib
import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from typing import Any
from urllib.parse import urlsplit

import pytest

from backend.errors import LabelStudioAuthError, LabelStudioError, LabelStudioNotFound, LabelStudioUnavailable
from backend.labelstudio.client import TASKS_PER_PAGE, LabelStudioClient, parse_origin
from tests.label_studio_stand_in import LabelStudioStandIn
from tests.servers import http_server, send_reply

LEGACY = "0123456789abcdef0123456789abcdef01234567"
TASKS = {number: {"image": f"/data/upload/1/{number}.jpg"} for number in range(1, 6)}
VERSION, OLDER = "dino-aaaaaaaa", "dino-bbbbbbbb"


def make_jwt(**payload: object) -> str:
    body = base64.urlsafe_b64encode(json.dumps(payload).encode()).decode().rstrip("=")
    return f"eyJhbGciOiJIUzI1NiJ9.{body}.c2lnbmF0dXJl"


PAT = make_jwt(token_type="refresh", exp=9_999_999_999)


@pytest.fixture
def stand_in() -> Iterator[LabelStudioStandIn]:
    """Project 1 with tasks 1 to 5, and view 7 of them all; project 2 is empty."""
    with LabelStudioStandIn(key=LEGACY) as running:
        running.add_project(1, "<View/>", 1_760_000_000, TASKS)
        running.add_project(2, "<View/>", 1_760_000_000, {})
        running.add_view(7, 1)
        yield running


@pytest.fixture
def client(stand_in: LabelStudioStandIn) -> LabelStudioClient:
    return LabelStudioClient(stand_in.url, LEGACY)


def make_rows(*tasks: int, version: str = VERSION, regions: tuple[str, ...] = ("r1", "r2")) -> list[dict[str, Any]]:
    result = [{"id": region, "type": "rectanglelabels"} for region in regions]
    return [{"task": task, "model_version": version, "score": 0.5, "result": result} for task in tasks]


def test_a_legacy_token_is_sent_as_it_is() -> None:
    assert LabelStudioClient("http://ls:8080/", LEGACY).auth_headers("http://ls:8080/data/x") == {
        "Authorization": f"Token {LEGACY}"
    }


@pytest.mark.parametrize(
    "url",
    [
        "http://other/x",
        "https://ls:8080/x",
        "http://ls/x",
        "http://ls:8080@evil/x",
        "http://evil:1\\@ls:8080/x",
        "http://evil:1/@ls:8080/x",
        "http://evil:1#@ls:8080/x",
        "http://evil:1?@ls:8080/x",
    ],
)
def test_no_other_origin_gets_the_key(url: str) -> None:
    assert LabelStudioClient("http://ls:8080", LEGACY).auth_headers(url) == {}


def test_an_invalid_url_gets_no_key() -> None:
    with pytest.raises(ValueError, match=r"ls:8080\.evil"):
        LabelStudioClient("http://ls:8080", LEGACY).auth_headers("http://ls:8080.evil/x")


def test_without_a_key_nothing_is_sent() -> None:
    assert LabelStudioClient("http://ls", "").auth_headers("http://ls/x") == {}
    assert LabelStudioClient("", LEGACY).auth_headers("http://ls/x") == {}


def test_ports_have_defaults() -> None:
    assert parse_origin("https://a/x") == parse_origin("https://a:443") == ("https", "a", 443)


def test_a_personal_access_token_is_exchanged_once_for_many_threads() -> None:
    access, requests = make_jwt(exp=time.time() + 300), []

    def answer(handler: BaseHTTPRequestHandler) -> None:
        requests.append((handler.path, handler.rfile.read(int(handler.headers["Content-Length"]))))
        time.sleep(0.1)
        send_reply(handler, json.dumps({"access": access}).encode())

    headers: list[dict[str, str]] = []
    with http_server(answer) as url:
        client = LabelStudioClient(url, PAT)
        threads = [threading.Thread(target=lambda: headers.append(client.auth_headers(f"{url}/a"))) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert headers == [{"Authorization": f"Bearer {access}"}] * 8
    assert [(path, json.loads(body)) for path, body in requests] == [("/api/token/refresh", {"refresh": PAT})]


def test_an_access_token_is_renewed_before_it_expires() -> None:
    tokens = iter([make_jwt(exp=time.time() + 30), make_jwt(exp=time.time() + 300)])
    with http_server(lambda handler: send_reply(handler, json.dumps({"access": next(tokens)}).encode())) as url:
        client = LabelStudioClient(url, PAT)
        assert client.auth_headers(url) != client.auth_headers(url)
        assert client.auth_headers(url) == client.auth_headers(url)


@pytest.mark.parametrize(("accepted_token", "exchanges"), [("second", 2), ("none", 2)])
def test_a_refused_token_is_renewed_once(accepted_token: str, exchanges: int) -> None:
    refreshes: list[str] = []

    def answer(handler: BaseHTTPRequestHandler) -> None:
        if handler.path == "/api/token/refresh":
            refreshes.append(handler.path)
            send_reply(handler, json.dumps({"access": ("first", "second")[len(refreshes) - 1]}).encode())
        elif handler.headers["Authorization"] == f"Bearer {accepted_token}":
            send_reply(handler, b'{"release": "1.23.2"}')
        else:
            send_reply(handler, b"{}", 401)

    with http_server(answer) as url, contextlib.suppress(LabelStudioAuthError):
        assert LabelStudioClient(url, PAT).get_version() == "1.23.2"
    assert len(refreshes) == exchanges


def test_the_error_for_a_refused_key_says_what_to_do_without_the_key() -> None:
    with http_server(lambda handler: send_reply(handler, b"{}", 401)) as url, pytest.raises(LabelStudioError) as error:
        LabelStudioClient(url, PAT).auth_headers(url)
    assert "make a new personal access token" in str(error.value)
    assert PAT not in str(error.value)


def test_an_answer_that_is_not_a_token_is_an_error() -> None:
    with (
        http_server(lambda handler: send_reply(handler, b"<html>")) as url,
        pytest.raises(LabelStudioError, match="no token"),
    ):
        LabelStudioClient(url, PAT).auth_headers(url)


def test_a_refused_connection_is_an_error() -> None:
    with pytest.raises(LabelStudioError, match="does not answer"):
        LabelStudioClient("http://127.0.0.1:1", PAT).auth_headers("http://127.0.0.1:1/")


@pytest.mark.parametrize("token", ["opaque", "a.!.c", make_jwt(exp=None), make_jwt()])
def test_an_access_token_without_expiry_lasts_five_minutes(token: str) -> None:
    with http_server(lambda handler: send_reply(handler, json.dumps({"access": token}).encode())) as url:
        client = LabelStudioClient(url, PAT)
        assert client.auth_headers(url) == client.auth_headers(url) == {"Authorization": f"Bearer {token}"}


def test_the_data_of_tasks(stand_in: LabelStudioStandIn, client: LabelStudioClient) -> None:
    assert client.get_task_data("1", [4, 2, 99]) == {2: TASKS[2], 4: TASKS[4]}
    assert client.get_task_data("1", []) == {}
    assert client.get_task_data("2", [4]) == {}
    assert client.get_first_task("1") == {"id": 1, "data": TASKS[1]}
    assert client.get_first_task("2") is None


def test_tasks_without_a_prediction(stand_in: LabelStudioStandIn, client: LabelStudioClient) -> None:
    client.import_predictions("1", [*make_rows(1, 3), *make_rows(2, version=OLDER)])
    tasks = client.list_tasks_without_prediction("1", VERSION, 0)
    assert tasks == [{"id": number, "data": TASKS[number], "annotations": []} for number in (2, 4, 5)]
    assert client.list_tasks_without_prediction("1", VERSION, 2) == tasks[1:]
    assert client.list_tasks_without_prediction("1", VERSION, 0, [1, 4, 99]) == tasks[1:2]
    assert client.list_tasks_without_prediction("1", VERSION, 5) == []
    assert client.count_tasks_without_prediction("1", VERSION) == 3
    assert client.count_tasks_without_prediction("1", "other-aaaaaaaa") == 5
    assert client.filter_without_prediction("1", [1, 2, 4, 99], VERSION) == {2, 4}


def test_many_ids_are_requested_in_several_short_urls() -> None:
    tasks = {number: {"image": str(number)} for number in range(10_000_000, 10_001_200)}
    with LabelStudioStandIn(key=LEGACY) as stand_in:
        stand_in.add_project(1, "<View/>", 0, tasks)
        client = LabelStudioClient(stand_in.url, LEGACY)
        assert client.get_task_data("1", list(tasks)) == tasks
        assert len(stand_in.requests) == 3
        assert max(len(path) for _, path in stand_in.requests) < 8000  # nginx and others allow 8 KiB
        assert client.filter_without_prediction("1", list(tasks), VERSION) == set(tasks)
        page = client.list_tasks_without_prediction("1", VERSION, 0)
        assert [task["id"] for task in page] == list(tasks)[:TASKS_PER_PAGE]


def test_the_ids_of_a_large_view_take_one_request(stand_in: LabelStudioStandIn, client: LabelStudioClient) -> None:
    stand_in.add_project(3, "<View/>", 0, {number: {} for number in range(1000, 4000)})
    stand_in.add_view(9, 3)
    assert client.list_task_ids_of_view("9") == list(range(1000, 4000))
    assert len(stand_in.requests) == 1


def test_all_tasks_are_read_from_a_label_studio_with_small_pages(
    stand_in: LabelStudioStandIn, client: LabelStudioClient
) -> None:
    stand_in.max_page_size = 2
    assert client.get_task_data("1", list(TASKS)) == TASKS
    assert client.filter_without_prediction("1", list(TASKS), VERSION) == set(TASKS)
    assert len(client.list_tasks_without_prediction("1", VERSION, 0)) == 2
    assert [task["id"] for task in client.list_tasks_without_prediction("1", VERSION, 2)] == [3, 4]
    assert client.count_tasks_without_prediction("1", VERSION) == 5
    client.import_predictions("1", [*make_rows(*TASKS, version=OLDER), *make_rows(*TASKS), *make_rows(*TASKS)])
    assert client.delete_older_predictions("1", list(TASKS), VERSION, "dino") == 5
    assert client.delete_double_predictions("1", list(TASKS), VERSION) == 5
    assert stand_in.count_by_task(1, VERSION) == stand_in.count_by_task(1) == dict.fromkeys(TASKS, 1)


@pytest.mark.parametrize(("max_page_size", "requests"), [(None, 1), (5, 1), (4, 2), (2, 3)])
def test_the_ids_of_a_view(
    stand_in: LabelStudioStandIn, client: LabelStudioClient, max_page_size: int | None, requests: int
) -> None:
    stand_in.max_page_size = max_page_size
    assert client.list_task_ids_of_view("7") == list(TASKS)
    assert len(stand_in.requests) == requests
    with pytest.raises(LabelStudioNotFound):
        client.list_task_ids_of_view("8")


def test_a_view_may_shrink_and_shift_while_it_is_read() -> None:
    def answer(handler: BaseHTTPRequestHandler) -> None:
        pages = {"page=1": [4, 2], "page=2": [2, 1]}
        page = next((ids for number, ids in pages.items() if number in handler.path), None)
        rows = {"tasks": [{"id": number} for number in page or []], "total": 4}
        send_reply(handler, json.dumps(rows).encode(), 200 if page else 404)

    with http_server(answer) as url:
        assert LabelStudioClient(url, LEGACY).list_task_ids_of_view("7") == [4, 2, 1]


def test_only_the_models_older_predictions_are_deleted(stand_in: LabelStudioStandIn, client: LabelStudioClient) -> None:
    others = ["", "dino", "dino-bbbb", "my-dino-bbbbbbbb", "dino-bbbbbbbb-2", "dino-BBBBBBBB", "other-bbbbbbbb"]
    kept = [row for version in others for row in make_rows(1, version=version)]
    client.import_predictions("1", [*kept, *make_rows(1, 2, 3, version=OLDER), *make_rows(1, version="dino-cccccccc")])
    client.import_predictions("1", make_rows(1, 3))
    assert client.delete_older_predictions("1", [1, 2, 99], VERSION, "dino") == 2
    of_first = [row.model_version for row in stand_in.predictions if row.task == 1]
    assert of_first == [*others, VERSION]
    assert stand_in.count_by_task(1, OLDER) == {2: 1, 3: 1}  # one has no newer prediction, the other was not named
    assert client.delete_older_predictions("1", [1, 2], VERSION, "dino") == 0


def test_a_models_name_is_no_pattern(stand_in: LabelStudioStandIn, client: LabelStudioClient) -> None:
    versions = ["v1.0-aaaaaaaa", "v1.0-bbbbbbbb", "v1x0-bbbbbbbb"]
    client.import_predictions("1", [row for version in versions for row in make_rows(1, version=version)])
    assert client.delete_older_predictions("1", [1], versions[0], "v1.0") == 1
    assert [row.model_version for row in stand_in.predictions] == [versions[0], versions[2]]


def test_the_oldest_of_equal_predictions_stays(stand_in: LabelStudioStandIn, client: LabelStudioClient) -> None:
    stand_in.double_import(1, times=3)
    assert client.import_predictions("1", make_rows(1, 2, 3)) == 3
    client.import_predictions("1", make_rows(1, version=OLDER))
    client.import_predictions("1", make_rows(4, regions=()))
    first = {row.task: row.id for row in reversed(stand_in.predictions) if row.model_version == VERSION}
    assert client.delete_double_predictions("1", [1, 2, 4, 99], VERSION) == 3
    assert {row.task: row.id for row in stand_in.predictions if row.model_version == VERSION and row.task != 3} == {
        task: first[task] for task in (1, 2, 4)
    }
    assert stand_in.count_by_task(1, VERSION) == {1: 1, 2: 1, 3: 2, 4: 1}  # the third was not named
    assert stand_in.count_by_task(1, OLDER) == {1: 2}  # not this version


def test_predictions_with_other_regions_are_no_doubles(stand_in: LabelStudioStandIn, client: LabelStudioClient) -> None:
    for regions in (("r1",), ("r2",), ("r1", "r2"), ("r1",)):
        client.import_predictions("1", make_rows(1, regions=regions))
    assert client.delete_double_predictions("1", [1], VERSION) == 1
    assert [row.id for row in stand_in.predictions] == [1, 2, 3]
    assert client.delete_double_predictions("1", [1], VERSION) == 0


def test_looking_for_doubles_reads_no_predictions_where_there_are_none(
    stand_in: LabelStudioStandIn, client: LabelStudioClient
) -> None:
    assert client.delete_double_predictions("1", list(TASKS), VERSION) == 0
    client.import_predictions("1", [*make_rows(1, 2), *make_rows(1, version=OLDER)])
    stand_in.requests.clear()
    assert client.delete_double_predictions("1", list(TASKS), VERSION) == 0
    assert [urlsplit(path).path for _, path in stand_in.requests] == ["/api/projects/1/model-versions", "/api/tasks/"]
    assert "fields=all" not in stand_in.requests[1][1]


def test_a_prediction_that_somebody_else_deletes_meanwhile_is_no_error(
    stand_in: LabelStudioStandIn, client: LabelStudioClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    delete = client._delete_predictions
    monkeypatch.setattr(client, "_delete_predictions", lambda ids: (delete(ids), delete(ids)))
    client.import_predictions("1", [*make_rows(1, 2, version=OLDER), *make_rows(1, 2)])
    assert client.delete_older_predictions("1", [1, 2], VERSION, "dino") == 2
    assert [method for method, _ in stand_in.requests].count("DELETE") == 4
    assert stand_in.count_by_task(1, OLDER) == {}


def test_no_method_makes_label_studio_predict(stand_in: LabelStudioStandIn, client: LabelStudioClient) -> None:
    stand_in.predicts_on_read = True
    stand_in.double_import(1)
    calls: dict[str, tuple[Any, ...]] = {
        "get_version": (),
        "whoami": (),
        "get_label_config": ("1",),
        "get_project_created_at": ("1",),
        "list_ml_backends": ("1",),
        "get_task_data": ("1", [1, 2]),
        "get_first_task": ("1",),
        "iter_annotated_tasks": ("1",),
        "list_tasks_without_prediction": ("1", VERSION, 0),
        "count_tasks_without_prediction": ("1", VERSION),
        "filter_without_prediction": ("1", [1, 2], VERSION),
        "list_task_ids_of_view": ("7",),
        "import_predictions": ("1", [*make_rows(1, version=OLDER), *make_rows(1)]),
        "delete_double_predictions": ("1", [1, 2], VERSION),
        "delete_older_predictions": ("1", [1, 2], VERSION, "dino"),
    }
    sending_nothing = {"url_for", "get_token_type", "auth_headers", "renew_token"}
    methods = {name for name, member in vars(LabelStudioClient).items() if callable(member) and name[0] != "_"}
    assert methods == calls.keys() | sending_nothing
    for name, arguments in calls.items():
        answer = getattr(client, name)(*arguments)
        if isinstance(answer, Iterator):
            list(answer)
    assert stand_in.count_by_task(1) == {1: 1}
    assert stand_in.predict_calls == 0
    client._request_json("GET", "/api/tasks/", params={"project": "1"})
    assert stand_in.predict_calls == 1


@pytest.mark.parametrize(
    ("status", "may_have_succeeded", "has_answered"),
    [
        (408, False, True),
        (425, False, True),
        (429, False, True),
        (500, True, True),
        (502, True, True),
        (503, True, True),
        (504, True, False),  # of a proxy
    ],
)
def test_a_status_says_whether_an_import_may_have_been_stored(
    stand_in: LabelStudioStandIn, client: LabelStudioClient, status: int, may_have_succeeded: bool, has_answered: bool
) -> None:
    stand_in.fail(1, status)
    with pytest.raises(LabelStudioUnavailable, match=f"HTTP {status}") as error:
        client.import_predictions("1", make_rows(1))
    assert (error.value.may_have_succeeded, error.value.has_answered) == (may_have_succeeded, has_answered)


def test_an_import_was_not_stored_if_the_connection_was_refused(
    stand_in: LabelStudioStandIn, client: LabelStudioClient
) -> None:
    stand_in.stop()
    with pytest.raises(LabelStudioUnavailable, match="does not answer") as error:
        client.import_predictions("1", make_rows(1))
    assert (error.value.may_have_succeeded, error.value.has_answered) == (False, False)


def test_an_import_may_be_stored_later_if_the_connection_was_closed(
    stand_in: LabelStudioStandIn, client: LabelStudioClient
) -> None:
    stand_in.store_late(1, 60, status=None)
    with pytest.raises(LabelStudioUnavailable, match="does not answer") as error:
        client.import_predictions("1", make_rows(1))
    assert (error.value.may_have_succeeded, error.value.has_answered) == (True, False)


def test_an_import_may_be_stored_though_its_answer_is_late(
    stand_in: LabelStudioStandIn, client: LabelStudioClient
) -> None:
    stand_in.answer_late(1, 60)
    start = time.monotonic()
    with pytest.raises(LabelStudioUnavailable, match="ReadTimeout") as error:
        client.import_predictions("1", make_rows(1), timeout=0.2)
    assert (error.value.may_have_succeeded, error.value.has_answered) == (True, False)
    assert time.monotonic() - start < 5
    assert stand_in.count_by_task(1) == {1: 1}


def test_a_request_was_not_sent_if_its_token_could_not_be_exchanged() -> None:
    def answer(handler: BaseHTTPRequestHandler) -> None:
        handler.rfile.read(int(handler.headers["Content-Length"]))
        send_reply(handler, b"", 503)

    with http_server(answer) as url:
        with pytest.raises(LabelStudioUnavailable, match="503") as error:
            LabelStudioClient(url, PAT).import_predictions("1", make_rows(1))
    assert not error.value.may_have_succeeded


@pytest.mark.parametrize("status", [401, 403])
def test_a_refused_key_is_an_error_of_its_own(
    stand_in: LabelStudioStandIn, client: LabelStudioClient, status: int
) -> None:
    stand_in.fail(1, status)
    with pytest.raises(LabelStudioAuthError, match=f"LABEL_STUDIO_API_KEY .*{status}"):
        client.get_label_config("1")


def test_an_answer_that_is_not_json_is_an_error() -> None:
    with http_server(lambda handler: send_reply(handler, b"<html>")) as url:
        with pytest.raises(LabelStudioUnavailable, match="other than JSON"):
            LabelStudioClient(url, LEGACY).get_version()


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("x" * 300, "x" * 300),
        ("prediction 3: " + "x" * 5000 + " is no label", f"prediction 3: {'x' * 86} … {'x' * 188} is no label"),
    ],
    ids=["short", "long"],
)
def test_the_error_for_a_long_refusal_keeps_its_beginning_and_its_end(text: str, shown: str) -> None:
    with http_server(lambda handler: send_reply(handler, text.encode(), 400)) as url:
        with pytest.raises(LabelStudioError) as error:
            LabelStudioClient(url, LEGACY).get_version()
    assert str(error.value) == f"Label Studio refused GET /api/version (HTTP 400): {shown}"

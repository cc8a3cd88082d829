import io
import json
import time
from collections.abc import Iterator
from typing import Any

import pytest
import requests
from PIL import Image

from backend.errors import LabelStudioAuthError, LabelStudioError, LabelStudioNotFound, LabelStudioUnavailable
from backend.labelstudio.client import LabelStudioClient
from tests.label_studio_stand_in import LabelStudioStandIn, StoredPrediction
from tests.servers import wait_for

CREATED_AT = 1_760_000_000
TASKS = {number: {"image": f"/data/upload/1/{number}.jpg"} for number in range(1, 6)}
REGION = {"type": "rectanglelabels"}


@pytest.fixture
def stand_in() -> Iterator[LabelStudioStandIn]:
    """Project 1 with tasks 1 to 5, project 2 with task 10."""
    with LabelStudioStandIn() as running:
        running.add_project(1, "<View/>", CREATED_AT, TASKS)
        running.add_project(2, "<View/>", CREATED_AT, {10: {"image": "/data/upload/2/a.jpg"}})
        yield running


@pytest.fixture
def client(stand_in: LabelStudioStandIn) -> LabelStudioClient:
    return LabelStudioClient(stand_in.url, "key")


def call(stand_in: LabelStudioStandIn, method: str, path: str, key: str = "key", **options: Any) -> requests.Response:
    headers = {"Authorization": f"Token {key}"}
    return requests.request(method, stand_in.url + path, headers=headers, timeout=10, **options)


def make_rows(*tasks: int, version: str = "v1") -> list[dict[str, Any]]:
    return [{"task": task, "model_version": version, "score": 0.5, "result": [REGION]} for task in tasks]


def read_ids(response: requests.Response) -> list[int]:
    assert response.status_code == 200, response.text
    return [row["id"] for row in response.json()["tasks"]]


def test_projects_version_and_user(stand_in: LabelStudioStandIn, client: LabelStudioClient) -> None:
    assert client.get_version() == "1.23.2"
    assert "@" in client.whoami()
    assert client.get_label_config("1") == "<View/>"
    assert client.get_project_created_at("1") == CREATED_AT
    assert call(stand_in, "GET", "/api/projects/1").json()["task_number"] == 5
    assert client.list_ml_backends("1") == []
    for read in (client.get_label_config, client.list_ml_backends, client.get_first_task):
        with pytest.raises(LabelStudioNotFound):
            read("3")
    assert ("GET", "/api/ml?project=3") in stand_in.requests


def test_only_the_version_is_told_without_the_key(stand_in: LabelStudioStandIn) -> None:
    with pytest.raises(LabelStudioAuthError):
        LabelStudioClient(stand_in.url, "other").get_label_config("1")
    assert requests.get(f"{stand_in.url}/data/upload/1/a.jpg", timeout=10).status_code == 401
    assert requests.get(f"{stand_in.url}/api/version", timeout=10).status_code == 200
    assert call(stand_in, "GET", "/api/nothing").status_code == 404
    assert call(stand_in, "POST", "/api/projects/1/import/predictions/", json=[]).status_code == 404  # the last slash


def test_an_import_stores_all_predictions_or_none(stand_in: LabelStudioStandIn, client: LabelStudioClient) -> None:
    assert client.import_predictions("1", make_rows(1, 2)) == 2
    assert stand_in.predictions[0] == StoredPrediction(1, 1, 1, "v1", 0.5, [REGION])
    for rows in (make_rows(3, 10), make_rows(3, 99)):
        with pytest.raises(LabelStudioError, match="task not found in project"):
            client.import_predictions("1", rows)
    with pytest.raises(LabelStudioNotFound):
        client.import_predictions("3", make_rows(1))
    client.import_predictions("1", make_rows(2, version="v2"))
    assert stand_in.count_by_task(1) == {1: 1, 2: 2}
    assert stand_in.count_by_task(1, "v2") == {2: 1}
    assert stand_in.count_by_task(2) == {}
    assert stand_in.import_sizes == [(1, 2), (1, 1)]


def test_tasks_are_filtered(stand_in: LabelStudioStandIn, client: LabelStudioClient) -> None:
    def select(*conditions: tuple[str, str, Any], conjunction: str = "and", order: str = "tasks:id") -> list[int]:
        keys = ("filter", "operator", "value")
        items = [dict(zip(keys, (f"filter:tasks:{row[0]}", *row[1:]), strict=True)) for row in conditions]
        query = json.dumps({"filters": {"conjunction": conjunction, "items": items}, "ordering": [order]})
        response = call(stand_in, "GET", "/api/tasks/", params={"project": 1, "query": query})
        assert response.status_code != 200 or response.json()["total"] == len(response.json()["tasks"])
        return read_ids(response)

    client.import_predictions("1", [*make_rows(1, 2, version="v1"), *make_rows(1, 3, version="v10")])
    version = "predictions_model_versions"
    assert select() == [1, 2, 3, 4, 5]
    assert select(order="-tasks:id") == [5, 4, 3, 2, 1]
    assert select(("id", "in_list", [2, 4, 10, 99])) == [2, 4]
    assert select(("id", "in_list", [])) == []
    assert select(("total_predictions", "equal", 1)) == [2, 3]
    assert select(("total_annotations", "greater", 0)) == select(("cancelled_annotations", "greater", 0)) == []
    assert select((version, "contains", ["v10"])) == [1, 3]
    assert select((version, "not_contains", ["v10"])) == [2, 4, 5]
    assert select((version, "not_contains", ["V1"])) == [4, 5]  # a part of the version, in upper or lower case
    assert select((version, "not_contains", ["v10"]), ("id", "greater", 2)) == [4, 5]
    assert select((version, "contains", ["v10"]), ("id", "less", 3), conjunction="or", order="-tasks:id") == [3, 2, 1]
    for condition in (("id", "regex", "1"), ("inner_id", "equal", 1), (version, "equal", ["v1"])):
        with pytest.raises(AssertionError, match="the stand-in has no filter"):
            select(condition)


def test_pages_of_tasks(stand_in: LabelStudioStandIn) -> None:
    last = call(stand_in, "GET", "/api/tasks/?project=1&page_size=2&page=3")
    assert read_ids(last) == [5]
    assert last.json()["total"] == 5
    assert call(stand_in, "GET", "/api/tasks/?project=1&page_size=2&page=4").status_code == 404
    assert call(stand_in, "GET", "/api/tasks/").status_code == 404
    everything = "/api/tasks/?project=1&page_size=1000000"
    assert read_ids(call(stand_in, "GET", everything)) == [1, 2, 3, 4, 5]
    stand_in.max_page_size = 3
    clamped = call(stand_in, "GET", everything)
    assert read_ids(clamped) == [1, 2, 3]
    assert clamped.json()["total"] == 5
    assert read_ids(call(stand_in, "GET", f"{everything}&page=2")) == [4, 5]
    assert read_ids(call(stand_in, "GET", "/api/tasks/?project=1&page_size=2")) == [1, 2]
    stand_in.delete_tasks(2, [10])
    assert read_ids(call(stand_in, "GET", "/api/tasks/?project=2")) == []


def test_fields_of_tasks(stand_in: LabelStudioStandIn, client: LabelStudioClient) -> None:
    def read(params: str) -> dict[str, Any]:
        return call(stand_in, "GET", f"/api/tasks/?project=1&page_size=1&{params}").json()["tasks"][0]

    client.import_predictions("1", make_rows(1))
    whole = read("fields=all")
    assert whole["total_predictions"] == 1
    assert whole["annotations"] == []
    assert whole["predictions"][0].items() >= {"id": 1, "model_version": "v1", "result": [REGION]}.items()
    assert read("fields=task_only").keys() == whole.keys() - {"annotations", "predictions"}
    assert read("include=id") == {"id": 1}
    assert read("include=id,data,predictions,unknown") == {"id": 1, "data": TASKS[1]}
    assert read("include=id,predictions&fields=all") == {"id": 1, "predictions": whole["predictions"]}


def test_views(stand_in: LabelStudioStandIn, client: LabelStudioClient) -> None:
    stand_in.add_view(7, 1, without_predictions=True)
    stand_in.add_view(8, 1)
    client.import_predictions("1", make_rows(1, 2))
    assert client.list_task_ids_of_view("7") == [3, 4, 5]
    assert client.list_task_ids_of_view("8") == [1, 2, 3, 4, 5]
    assert call(stand_in, "GET", "/api/tasks/?view=8&page=2").status_code == 404
    assert call(stand_in, "GET", "/api/tasks/?view=9").status_code == 404
    assert call(stand_in, "GET", "/api/tasks/?project=2&view=8").status_code == 500


def test_reading_tasks_asks_for_predictions_as_the_real_one(
    stand_in: LabelStudioStandIn, client: LabelStudioClient
) -> None:
    first = "/api/tasks/?project=1&page_size=1"
    read_ids(call(stand_in, "GET", first))
    stand_in.predicts_on_read = True
    read_ids(call(stand_in, "GET", f"{first}&review=true"))
    assert stand_in.predict_calls == 0
    read_ids(call(stand_in, "GET", first))
    read_ids(call(stand_in, "GET", f"{first}&review=false"))
    assert stand_in.predict_calls == 2
    client.import_predictions("1", make_rows(1))
    read_ids(call(stand_in, "GET", first))  # has a prediction
    assert stand_in.predict_calls == 2


def test_predictions_of_each_version_are_counted(stand_in: LabelStudioStandIn, client: LabelStudioClient) -> None:
    path = "/api/projects/1/model-versions"
    assert call(stand_in, "GET", path).json() == {}
    client.import_predictions("1", [*make_rows(1, 2, 2), *make_rows(1, version="v2")])
    client.import_predictions("2", make_rows(10))
    assert call(stand_in, "GET", path).json() == {"v1": 3, "v2": 1}
    assert call(stand_in, "GET", "/api/projects/3/model-versions").status_code == 404


def test_predictions_are_listed_and_deleted(stand_in: LabelStudioStandIn, client: LabelStudioClient) -> None:
    client.import_predictions("1", [*make_rows(1, 2, 3), *make_rows(1, version="v2")])
    client.import_predictions("2", make_rows(10, version="v2"))
    rows = call(stand_in, "GET", "/api/predictions?task=1").json()
    assert [row["model_version"] for row in rows] == ["v1", "v2"]
    rows = call(stand_in, "GET", "/api/predictions?project=1").json()
    assert [(row["id"], row["task"]) for row in rows] == [(1, 1), (2, 2), (3, 3), (4, 1)]
    unknown = call(stand_in, "GET", "/api/predictions?task=99")
    assert unknown.status_code == 400
    assert "valid choice" in unknown.text
    assert [call(stand_in, "DELETE", "/api/predictions/1").status_code for _ in range(2)] == [204, 404]
    reply = call(stand_in, "DELETE", "/api/projects/1/model-versions", json={"model_version": "v2"})
    assert reply.json() == {"deleted_predictions": 1}
    assert stand_in.count_by_task(1) == {2: 1, 3: 1}
    action = "/api/dm/actions?id=delete_tasks_predictions&project=1"
    reply = call(stand_in, "POST", action, json={"selectedItems": {"all": False, "included": [2, 10]}})
    assert reply.json()["processed_items"] == 1
    assert [row.task for row in stand_in.predictions] == [3, 10]
    call(stand_in, "POST", action, json={"selectedItems": {"all": False, "included": []}})  # all tasks, oddly
    assert [row.task for row in stand_in.predictions] == [10]


def test_tasks_and_projects_are_deleted(stand_in: LabelStudioStandIn, client: LabelStudioClient) -> None:
    client.import_predictions("1", make_rows(1, 2))
    stand_in.add_view(7, 1)
    stand_in.delete_tasks(1, [2])
    assert stand_in.count_by_task(1) == {1: 1}
    stand_in.delete_project(1)
    assert stand_in.predictions == []
    with pytest.raises(LabelStudioNotFound):
        client.list_task_ids_of_view("7")
    assert call(stand_in, "GET", "/data/upload/1/a.jpg").status_code == 500
    with pytest.raises(ValueError, match="another project's"):
        stand_in.add_project(1, "", 0, {10: {}})
    stand_in.add_project(1, "<View/>", CREATED_AT + 1, TASKS)
    assert call(stand_in, "GET", "/api/predictions?task=1").json() == []


def test_images(stand_in: LabelStudioStandIn) -> None:
    reply = call(stand_in, "GET", "/data/upload/1/folder/a.jpg")
    assert reply.headers["Content-Type"] == "image/jpeg"
    assert Image.open(io.BytesIO(reply.content)).format == "JPEG"
    with LabelStudioStandIn(image=b"other", key="k") as other:
        other.add_project(1, "", 0, {})
        assert call(other, "GET", "/data/upload/1/a", key="k").content == b"other"


def test_failures_are_of_one_project_and_some_routes(stand_in: LabelStudioStandIn, client: LabelStudioClient) -> None:
    def list_statuses() -> list[int]:
        routes = [("GET", "/api/predictions?task=1"), ("GET", "/data/upload/1/a"), ("GET", "/api/tasks/?project=2")]
        statuses = [call(stand_in, *route).status_code for route in routes]
        return [*statuses, call(stand_in, "POST", "/api/projects/1/import/predictions", json=[]).status_code]

    stand_in.fail(1, 503)
    assert list_statuses() == [503, 503, 200, 503]
    with pytest.raises(LabelStudioUnavailable, match="503"):
        client.get_label_config("1")
    assert client.get_version()
    stand_in.heal(2)
    assert list_statuses() == [503, 503, 200, 503]
    stand_in.heal(1)
    stand_in.fail(1, 502, routes="images|import")
    stand_in.fail(1, 429, times=1, routes="api")
    assert list_statuses() == [429, 502, 200, 502]
    assert list_statuses() == [200, 502, 200, 502]
    stand_in.heal()
    assert list_statuses() == [200, 200, 200, 201]


def test_late_answers(stand_in: LabelStudioStandIn, client: LabelStudioClient) -> None:
    stand_in.answer_late(1, 1)
    start = time.monotonic()
    client.get_label_config("2")
    assert time.monotonic() - start < 0.9
    client.import_predictions("1", make_rows(1))
    assert time.monotonic() - start > 1


@pytest.mark.parametrize("status", [504, None])
def test_an_import_is_stored_after_its_answer(
    stand_in: LabelStudioStandIn, client: LabelStudioClient, status: int | None
) -> None:
    stand_in.store_late(1, 1, status, times=2)
    for rows in (make_rows(1), make_rows(2, 3)):
        with pytest.raises(LabelStudioUnavailable) as error:
            client.import_predictions("1", rows)
        assert error.value.may_have_succeeded
    stand_in.delete_tasks(1, [3])
    client.import_predictions("1", make_rows(4))
    assert stand_in.count_by_task(1) == {4: 1}
    wait_for(lambda: len(stand_in.predictions) == 2, 5, "the late import")
    time.sleep(0.1)
    assert stand_in.count_by_task(1) == {1: 1, 4: 1}  # the import of the deleted task was dropped as a whole
    assert stand_in.import_sizes == [(1, 1), (1, 1)]


def test_an_import_is_stored_twice(stand_in: LabelStudioStandIn, client: LabelStudioClient) -> None:
    stand_in.double_import(1, times=2, seconds=0)
    assert client.import_predictions("2", make_rows(10)) == 1
    with pytest.raises(LabelStudioError):  # nothing is stored, so it is not one of the two
        client.import_predictions("1", make_rows(99))
    assert client.import_predictions("1", make_rows(1, 2)) == 2
    assert client.import_predictions("1", make_rows(3)) == 1
    assert client.import_predictions("1", make_rows(4)) == 1
    assert stand_in.count_by_task(1) == {1: 2, 2: 2, 3: 2, 4: 1}
    assert stand_in.count_by_task(2) == {10: 1}
    assert stand_in.import_sizes == [(2, 1), (1, 2), (1, 1), (1, 1)]
    stand_in.double_import(1, seconds=0)
    stand_in.heal(1)
    client.import_predictions("1", make_rows(5))
    assert stand_in.count_by_task(1)[5] == 1


def test_closing_drops_imports_that_wait(client: LabelStudioClient, stand_in: LabelStudioStandIn) -> None:
    stand_in.store_late(1, 1)
    with pytest.raises(LabelStudioUnavailable):
        client.import_predictions("1", make_rows(1))
    stand_in.close()
    time.sleep(1.2)
    assert stand_in.predictions == []


def test_a_stopped_one_refuses_and_comes_back_at_its_port(
    stand_in: LabelStudioStandIn, client: LabelStudioClient
) -> None:
    client.import_predictions("1", make_rows(1))
    for _ in range(2):
        stand_in.stop()
        with pytest.raises(LabelStudioUnavailable) as error:
            client.get_label_config("1")
        assert not error.value.may_have_succeeded  # the connection was refused
        stand_in.start()
        assert client.filter_without_prediction("1", [1, 2], "v1") == {2}


def test_stopping_does_not_wait_for_late_answers(stand_in: LabelStudioStandIn, client: LabelStudioClient) -> None:
    stand_in.answer_late(1, 60)
    with pytest.raises(requests.ReadTimeout):
        requests.get(f"{stand_in.url}/api/projects/1", headers=client.auth_headers(stand_in.url), timeout=0.3)
    start = time.monotonic()
    stand_in.stop()
    assert time.monotonic() - start < 5

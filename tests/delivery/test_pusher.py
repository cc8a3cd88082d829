"""The pusher when chunks or Label Studio misbehave; tests/e2e has the real one, which will not do so on demand."""

import json
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
from redis import Redis
from rq.results import Result

from backend.delivery.outbox import Outbox
from backend.delivery.pusher import MAX_FAILED_ATTEMPTS, Pusher
from backend.errors import LabelStudioAuthError, LabelStudioUnavailable
from backend.labelstudio.client import LabelStudioClient
from backend.queue.predict_queue import ChunkState, PredictQueue
from backend.settings import Settings
from model import GroundingDINO
from tests.chunks import PREDICTION, make_answers, make_chunk
from tests.scenes import make_labeling_config, make_scenes
from tests.servers import http_server, send_reply

CHUNK = make_chunk({"id": 1, "data": {"image": "a"}}, {"id": 2, "data": {"image": "b"}})
ANSWERS = make_answers([PREDICTION] * 2)


class Stub:
    """Answers as Label Studio does; `status` is the status of an import; it refuses an import with a task in `bad`."""

    def __init__(self) -> None:
        self.imported: list[int] = []
        self.imports = 0
        self.status, self.bad, self.data = 201, set[int](), {1: "a", 2: "b"}

    def __call__(self, request: BaseHTTPRequestHandler) -> None:
        body = request.rfile.read(int(request.headers.get("Content-Length") or 0))
        if request.path.endswith("/import/predictions"):
            rows = [row["task"] for row in json.loads(body)]
            self.imports += 1
            refused = 400 if self.bad & set(rows) else self.status
            if refused == 201:
                self.imported += rows
            send_reply(request, json.dumps({"created": len(rows)}).encode(), refused)
        else:
            query = json.loads(parse_qs(urlsplit(request.path).query)["query"][0])
            items = query["filters"]["items"]
            rows = [{"id": n, "data": {"image": uri}} for n, uri in self.data.items() if self._passes(n, items)]
            send_reply(request, json.dumps({"tasks": rows}).encode())

    def _passes(self, number: int, items: list[dict[str, Any]]) -> bool:
        """Returns whether a task passes filters of the Data Manager."""
        conditions = {
            "equal": lambda value: number == value,
            "greater": lambda value: number > value,
            "in_list": lambda value: number in value,
            "not_contains": lambda versions: versions == ["v"] and number not in self.imported,
        }
        return all(conditions[item["operator"]](item["value"]) for item in items)


@pytest.fixture
def stub() -> Stub:
    return Stub()


@pytest.fixture
def pusher(connection: Redis, stub: Stub) -> Iterator[Pusher]:
    with http_server(stub) as url:
        yield Pusher(connection, LabelStudioClient(url, "key"), "me")


def add_finished_chunk(connection: Redis, value: Any = ANSWERS, kind: Any = Result.Type.SUCCESSFUL) -> None:
    Outbox(connection).add("1", [CHUNK], since=1e9)
    (job,) = PredictQueue(connection).enqueue([CHUNK])
    Result.create(job, kind, 60, return_value=value)


def test_a_finished_chunk_is_pushed_once(connection: Redis, pusher: Pusher, stub: Stub) -> None:
    add_finished_chunk(connection)
    pusher.run_once()
    pusher.run_once()
    assert stub.imported == [1, 2]
    assert len(Outbox(connection)) == 0


def test_a_refused_prediction_is_left_out_alone(pusher: Pusher, connection: Redis, stub: Stub) -> None:
    stub.bad = {1}
    add_finished_chunk(connection)
    pusher.run_once()
    assert stub.imported == [2]


@pytest.mark.parametrize(
    ("status", "error"), [(502, LabelStudioUnavailable), (401, LabelStudioAuthError), (429, LabelStudioUnavailable)]
)
def test_predictions_stay_pending_while_label_studio_refuses(
    connection: Redis, pusher: Pusher, stub: Stub, status: int, error: type[Exception]
) -> None:
    stub.status = status
    add_finished_chunk(connection)
    with pytest.raises(error):
        pusher.run_once()
    stub.status = 201
    pusher.run_once()
    assert stub.imported == [1, 2]


def test_an_import_whose_answer_was_lost_is_looked_up(connection: Redis, pusher: Pusher, stub: Stub) -> None:
    stub.status = 502
    add_finished_chunk(connection)
    with pytest.raises(LabelStudioUnavailable):
        pusher.run_once()
    stub.imported = [1]  # it did more than it said
    stub.status = 201
    pusher.run_once()
    assert sorted(stub.imported) == [1, 2]


def test_a_deleted_first_task_does_not_make_a_project_mismatched(connection: Redis, pusher: Pusher, stub: Stub) -> None:
    del stub.data[1]
    add_finished_chunk(connection)
    pusher.run_once()
    assert stub.imported == [1, 2]
    assert not Outbox(connection).is_mismatched("1")


def test_deleted_tasks_cost_one_more_import(connection: Redis, pusher: Pusher, stub: Stub) -> None:
    del stub.data[2]
    stub.bad = {2}  # refused with all that come with it
    add_finished_chunk(connection)
    pusher.run_once()
    assert (stub.imported, stub.imports, len(Outbox(connection))) == ([1], 2, 0)


def test_a_malformed_chunk_does_not_stop_the_others(connection: Redis, pusher: Pusher, stub: Stub) -> None:
    odd = make_chunk({"id": 1, "data": {"image": "a"}})
    Outbox(connection).add("1", [odd], 2)
    (job,) = PredictQueue(connection).enqueue([odd])
    Result.create(job, Result.Type.SUCCESSFUL, 60, return_value=ANSWERS)  # two answers for one task
    add_finished_chunk(connection)
    pusher.run_once()
    assert (stub.imported, len(Outbox(connection))) == ([1, 2], 0)


def test_another_project_of_the_same_number_is_left_alone(connection: Redis, pusher: Pusher, stub: Stub) -> None:
    stub.data = {1: "other", 2: "other"}
    add_finished_chunk(connection)
    pusher.run_once()
    assert stub.imported == []
    assert Outbox(connection).is_mismatched("1")


def test_a_chunk_that_fails_as_a_whole_is_given_up(connection: Redis, pusher: Pusher) -> None:
    for _ in range(MAX_FAILED_ATTEMPTS):
        assert len(Outbox(connection)) in (0, 1)
        add_finished_chunk(connection, value=None, kind=Result.Type.FAILED)
        pusher.run_once()
    assert len(Outbox(connection)) == 0


def test_expired_answers_are_requested_again_and_count_as_no_failure(connection: Redis, pusher: Pusher) -> None:
    Outbox(connection).add("1", [CHUNK], time.time())
    for _ in range(MAX_FAILED_ATTEMPTS + 2):  # as when Label Studio is away for hours
        PredictQueue(connection).delete(CHUNK.id)
        pusher.run_once()
    assert len(Outbox(connection)) == 1
    assert PredictQueue(connection).get_result(CHUNK.id).state is ChunkState.WAITING


def test_the_pusher_backs_off_after_an_import_while_chunks_are_waiting(
    connection: Redis, pusher: Pusher, stub: Stub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("backend.delivery.pusher.IMPORT_BACKOFF", 1e6)
    add_finished_chunk(connection)
    pusher.run_once()
    later = make_chunk({"id": 3, "data": {"image": "c"}})
    Outbox(connection).add("1", [later], 3)
    PredictQueue(connection).enqueue([later])
    pusher.run_once()
    assert (stub.imported, len(Outbox(connection))) == ([1, 2], 1)


def test_only_one_pusher_pushes(connection: Redis, pusher: Pusher, stub: Stub) -> None:
    add_finished_chunk(connection)
    Pusher(connection, LabelStudioClient("http://127.0.0.1:1", "key"), "other")._lease.acquire_or_renew()
    pusher.run_once()
    assert stub.imported == []


def test_interactive_work_is_neither_claimed_nor_pushed(connection: Redis, redis_url: str) -> None:
    settings = Settings(
        model="demo", redis_url=redis_url, predict_deadline=1, label_studio_url="http://ls", label_studio_api_key="k"
    )
    plugin = GroundingDINO("1", make_labeling_config(make_scenes(1)), settings)
    tasks = [{"id": 1, "data": {"image": "a"}}]
    plugin.predict(tasks, context={"result": []})
    assert len(Outbox(connection)) == 0
    plugin.predict(tasks)
    assert len(Outbox(connection)) == 1  # missed its deadline

"""A whole project: every task once, through outages, and the truth in the end."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from redis import Redis

from backend.cli.preannotate import preannotate
from backend.delivery import preannotation
from backend.delivery.deliver_worker import running_workers
from backend.delivery.outbox import Outbox
from backend.delivery.preannotation import Page, Preannotation, PreannotationSummary, TaskCursor
from backend.errors import LabelStudioUnavailable, Overloaded, QueueUnavailable
from backend.labelstudio.client import LabelStudioClient
from backend.queue.predict_queue import PredictQueue
from tests.chunks import make_error
from tests.delivery.deliveries import CREATED_AT, make_settings, running_predict_worker
from tests.label_studio_stand_in import LabelStudioStandIn
from tests.scenes import make_labeling_config, make_scenes

pytestmark = pytest.mark.timeout(120)

DAMAGED = "the image is damaged"
CONFIG = make_labeling_config(make_scenes(1))
COUNT = 240


def make_cursor(tasks: list[dict[str, Any]], unavailable_at: list[int], size: int = 3) -> TaskCursor:
    """Makes a cursor over tasks; Label Studio is unavailable once at each position in `unavailable_at`."""

    def read(last_id: int) -> Page:
        if last_id in unavailable_at:
            unavailable_at.remove(last_id)
            raise LabelStudioUnavailable("away")
        page = [task for task in tasks if task["id"] > last_id][:size]
        return Page(page, page[-1]["id"] if page else None)

    return TaskCursor(read)


def test_a_cursor_hands_out_every_task_once() -> None:
    cursor = make_cursor([{"id": number} for number in range(1, 11)], [])
    taken = [cursor.take(4) for _ in range(4)]
    assert [[task["id"] for task in tasks] for tasks in taken] == [[1, 2, 3, 4], [5, 6, 7, 8], [9, 10], []]


def test_a_page_that_fails_is_read_again_and_no_task_is_lost() -> None:
    cursor = make_cursor([{"id": number} for number in range(1, 8)], [0, 3, 6])
    taken: list[int] = []
    for _ in range(10):
        try:
            taken += [task["id"] for task in cursor.take(4)]
        except LabelStudioUnavailable:
            continue
    assert taken == list(range(1, 8))


def test_a_summary_lists_the_failures(tmp_path: Path) -> None:
    summary = PreannotationSummary(4, {2: ("image", DAMAGED), 3: ("image", DAMAGED), 4: ("internal", "failed")})
    assert summary.count_by_reason().most_common(1) == [(DAMAGED, 2)]
    summary.write_failures(tmp_path / "f.csv")
    assert (tmp_path / "f.csv").read_text().splitlines()[:2] == ["task,code,detail", f"2,image,{DAMAGED}"]


@pytest.fixture
def stand_in() -> Iterator[LabelStudioStandIn]:
    with LabelStudioStandIn() as server:
        tasks = {number: {"image": f"{number}.png"} for number in range(1, COUNT + 1)}
        server.add_project(1, CONFIG, CREATED_AT, tasks)
        yield server


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preannotation, "POLL_INTERVAL", 0.02)


def run(
    connection: Redis, redis_url: str, stand_in: LabelStudioStandIn, view: str = "", **options: Any
) -> PreannotationSummary:
    """Runs a pre-annotation beside a worker and a delivery worker."""
    settings = make_settings(redis_url, stand_in.url, batch_size=8)
    label_studio = LabelStudioClient(stand_in.url, "key")
    with running_predict_worker(redis_url), running_workers(settings, label_studio, threads=1):
        run = Preannotation(settings, connection, label_studio, "1")
        return run.run(run.open_cursor(view=view), sys.maxsize, lambda done, failed: None, **options)


def test_all_tasks_are_predicted_once(connection: Redis, redis_url: str, stand_in: LabelStudioStandIn) -> None:
    stand_in.predicts_on_read = True
    summary = run(connection, redis_url, stand_in)
    assert (summary.done, summary.failures) == (COUNT, {})
    assert stand_in.count_by_task(1) == dict.fromkeys(range(1, COUNT + 1), 1)
    assert stand_in.predict_calls == 0


@pytest.mark.parametrize(
    ("owner", "method", "error"),
    [
        (Outbox, "add", QueueUnavailable("the queue does not answer")),
        (Outbox, "filter_pending", QueueUnavailable("the queue does not answer")),
        (PredictQueue, "enqueue", Overloaded("too many chunks wait")),
        (LabelStudioClient, "list_tasks_without_prediction", LabelStudioUnavailable("away")),
        (LabelStudioClient, "count_tasks_without_prediction", LabelStudioUnavailable("away")),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_one_error_loses_no_task(
    connection: Redis,
    redis_url: str,
    stand_in: LabelStudioStandIn,
    monkeypatch: pytest.MonkeyPatch,
    owner: type,
    method: str,
    error: Exception,
) -> None:
    original, calls = getattr(owner, method), []

    def fail_once(*arguments: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) == (1 if "count" in method else 2):
            raise error
        return original(*arguments, **options)

    monkeypatch.setattr(owner, method, fail_once)
    monkeypatch.setattr(preannotation, "IDS_PER_PAGE", 40)
    monkeypatch.setattr("backend.labelstudio.client.TASKS_PER_PAGE", 40)
    summary = run(connection, redis_url, stand_in)
    assert len(calls) > 1
    assert (summary.done, summary.failures) == (COUNT, {})
    assert stand_in.count_by_task(1) == dict.fromkeys(range(1, COUNT + 1), 1)


def test_a_view_that_shrinks_is_read_to_its_end(
    connection: Redis, redis_url: str, stand_in: LabelStudioStandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preannotation, "MAX_TASKS_IN_FLIGHT", 16)
    monkeypatch.setattr(preannotation, "IDS_PER_PAGE", 20)
    monkeypatch.setattr("backend.delivery.deliver_job.IMPORT_REST", 0)
    stand_in.add_view(5, 1, without_predictions=True)
    summary = run(connection, redis_url, stand_in, view="5")
    assert len(stand_in.import_sizes) > 3  # it shrank meanwhile
    assert stand_in.count_by_task(1) == dict.fromkeys(range(1, COUNT + 1), 1)
    assert (summary.done, summary.failures) == (COUNT, {})


def test_a_view_is_read_to_its_end_where_pages_are_small(
    connection: Redis, redis_url: str, stand_in: LabelStudioStandIn
) -> None:
    stand_in.max_page_size = 20
    stand_in.add_view(5, 1)
    summary = run(connection, redis_url, stand_in, view="5")
    assert stand_in.count_by_task(1) == dict.fromkeys(range(1, COUNT + 1), 1)
    assert (summary.done, summary.failures) == (COUNT, {})


def test_only_older_predictions_of_this_model_are_replaced(
    connection: Redis, redis_url: str, stand_in: LabelStudioStandIn
) -> None:
    client = LabelStudioClient(stand_in.url, "key")
    for version in ("demo-00000000", "other-00000000", "demo-by-hand"):
        rows = [{"task": task, "result": [], "score": 0, "model_version": version} for task in (1, 2)]
        client.import_predictions("1", rows)
    run(connection, redis_url, stand_in, replace=True)
    for task in (1, 2):
        versions = {row.model_version for row in stand_in.predictions if row.task == task}
        assert "demo-00000000" not in versions
        assert {"other-00000000", "demo-by-hand"} < versions
        assert len(versions) == 3


def test_pending_tasks_are_not_predicted_again_though_the_chunks_are_cut_otherwise(
    connection: Redis, redis_url: str, stand_in: LabelStudioStandIn
) -> None:
    label_studio, predicted = LabelStudioClient(stand_in.url, "key"), []
    for size in (16, 5):  # a command that was killed, and another, after the workers have restarted
        settings = make_settings(redis_url, stand_in.url, batch_size=size)
        run = Preannotation(settings, connection, label_studio, "1")
        tasks = run.open_cursor().take(COUNT)
        run._sender.send(tasks, run._sender.get_time())

    def answer(task: int) -> dict[str, Any]:
        predicted.append(task)
        return {"result": [], "score": 0, "model_version": run._version}

    with running_predict_worker(redis_url, answer), running_workers(settings, label_studio, threads=1):
        summary = run.run(run.open_cursor(), sys.maxsize, lambda done, failed: None)
    assert sorted(predicted) == list(range(1, COUNT + 1))
    assert summary.failures == {}


def test_the_exit_code_says_what_label_studio_holds(
    connection: Redis,
    redis_url: str,
    stand_in: LabelStudioStandIn,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    settings = make_settings(redis_url, stand_in.url, batch_size=8)

    def answer(task: int) -> dict[str, Any]:
        if task == 7:
            return make_error(DAMAGED)
        return {"result": [], "score": 0, "model_version": Preannotation(settings, connection, client, "1")._version}

    client = LabelStudioClient(stand_in.url, "key")
    with running_predict_worker(redis_url, answer):
        assert preannotate(settings, "1", list(range(1, 21)), "", 0, dry_run=False, replace=False) == 1
    assert "19 tasks predicted, 1 failed" in capsys.readouterr().out
    assert (tmp_path / "preannotate-1-failures.csv").read_text().splitlines()[1:] == [f"7,image,{DAMAGED}"]
    with running_predict_worker(redis_url):
        assert preannotate(settings, "1", [7], "", 0, dry_run=False, replace=False) == 0
    assert stand_in.count_by_task(1) == dict.fromkeys(range(1, 21), 1)


def test_the_command_leaves_tasks_that_fail_again_and_again_to_the_server(
    connection: Redis, redis_url: str, stand_in: LabelStudioStandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("backend.delivery.deliver_job.FIRST_RETRY", 0.05)
    monkeypatch.setattr(preannotation, "RETRIES_INTERVAL", 0.1)
    settings = make_settings(redis_url, stand_in.url, batch_size=8)
    client = LabelStudioClient(stand_in.url, "key")
    run = Preannotation(settings, connection, client, "1")

    def answer(task: int) -> dict[str, Any]:
        if task in (3, 4):
            return make_error("the storage is away", is_retryable=True)
        return {"result": [], "score": 0, "model_version": run._version}

    with running_predict_worker(redis_url, answer), running_workers(settings, client, threads=1):
        summary = run.run(run.open_cursor(list(range(1, 11))), sys.maxsize, lambda done, failed: None)
        reason = ("image", "the storage is away; the server goes on trying")
        assert summary.failures == {3: reason, 4: reason}
        assert run._sender.filter_pending([3, 4]) == {3, 4}
